//! Addresses as text. One that counts on one link only says which, behind a `%` (RFC 4007).

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// An address as Erlang gives it: an IP address, perhaps with the number of an interface.
pub(crate) fn parse(text: &str, port: u16) -> Option<SocketAddr> {
    match text.split_once('%') {
        Some((ip, scope)) => {
            Some(SocketAddrV6::new(ip.parse().ok()?, port, 0, scope.parse().ok()?).into())
        }
        None => Some(SocketAddr::new(text.parse().ok()?, port)),
    }
}

/// The IP address in the form that `parse` and Erlang's side take: with the interface by its name, or by
/// its number where it has no name any more. An IPv4 peer of a dual stack socket is shown as what it is.
pub(crate) fn text(address: SocketAddr) -> String {
    let ip = address.ip().to_canonical();
    match scope(address) {
        0 => ip.to_string(),
        scope => match interface(scope) {
            Some(name) => format!("{ip}%{name}"),
            None => format!("{ip}%{scope}"),
        },
    }
}

/// The same with the port: `127.0.0.1:4433`, `[fe80::1%eth0]:4433`.
pub(crate) fn text_with_port(address: SocketAddr) -> String {
    let (ip, port) = (text(address), address.port());
    match address.ip().to_canonical() {
        IpAddr::V4(_) => format!("{ip}:{port}"),
        IpAddr::V6(_) => format!("[{ip}]:{port}"),
    }
}

fn scope(address: SocketAddr) -> u32 {
    match address {
        SocketAddr::V6(v6) => v6.scope_id(),
        SocketAddr::V4(_) => 0,
    }
}

fn is_link_local(ip: &Ipv6Addr) -> bool {
    ip.segments()[0] & 0xffc0 == 0xfe80
}

/// `ip` and a port on the link that `beside` is on, if `ip` counts on one link only.
pub(crate) fn on_link_of(ip: IpAddr, port: u16, beside: SocketAddr) -> SocketAddr {
    match ip {
        IpAddr::V6(v6) if is_link_local(&v6) => {
            SocketAddrV6::new(v6, port, 0, scope(beside)).into()
        }
        _ => SocketAddr::new(ip, port),
    }
}

#[cfg(unix)]
fn interface(scope: u32) -> Option<String> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size that the function writes at most.
    let found = unsafe { libc::if_indextoname(scope, name.as_mut_ptr().cast()) };
    if found.is_null() {
        return None;
    }
    let name = std::ffi::CStr::from_bytes_until_nul(&name).ok()?;
    Some(name.to_str().ok()?.to_owned())
}

#[cfg(not(unix))]
fn interface(_scope: u32) -> Option<String> {
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_parsed_and_given_back() {
        let scoped = parse("fe80::1%4000000000", 7).unwrap();
        assert_eq!(scope(scoped), 4_000_000_000);
        // No interface has this number.
        assert_eq!(text(scoped), "fe80::1%4000000000");
        assert_eq!(scoped.port(), 7);
        for bad in [
            "fe80::1%",
            "fe80::1%x",
            "fe80::1%-1",
            "127.0.0.1%1",
            "%1",
            "",
        ] {
            assert_eq!(parse(bad, 7), None, "{bad}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_interface_is_named() {
        // SAFETY: the name ends with a zero.
        let lo = unsafe { libc::if_nametoindex(c"lo".as_ptr()) };
        assert_ne!(lo, 0);
        let scoped = parse(&format!("fe80::1%{lo}"), 7).unwrap();
        assert_eq!(text(scoped), "fe80::1%lo");
    }

    #[test]
    fn an_address_without_a_scope_is_as_it_was() {
        for ip in ["127.0.0.1", "::1", "fe80::1"] {
            assert_eq!(text(parse(ip, 0).unwrap()), ip);
        }
        assert_eq!(text(parse("::ffff:10.0.0.1", 0).unwrap()), "10.0.0.1");
    }

    #[test]
    fn a_port_stands_behind_brackets_where_there_are_colons() {
        let with_port = |ip: &str| text_with_port(parse(ip, 7).unwrap());
        assert_eq!(with_port("127.0.0.1"), "127.0.0.1:7");
        assert_eq!(with_port("::1"), "[::1]:7");
        assert_eq!(with_port("::ffff:10.0.0.1"), "10.0.0.1:7");
    }

    #[test]
    fn only_what_counts_on_a_link_gets_its_scope() {
        let beside = parse("fe80::2%3", 1).unwrap();
        let on = |ip: &str| on_link_of(ip.parse().unwrap(), 5, beside);
        assert_eq!(on("fe80::1"), parse("fe80::1%3", 5).unwrap());
        assert_eq!(on("2001:db8::1"), parse("2001:db8::1", 5).unwrap());
        assert_eq!(on("10.0.0.1"), parse("10.0.0.1", 5).unwrap());
    }
}
