//! A second socket on the port of another, for one peer.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::socket::{grow_buffers, mapped};

/// Binds a socket to the port of `main`, which is bound to `bound`, and connects the socket to a peer: the
/// system gives to it what the peer sends to this address, `local`, and to `main` all else. What came before
/// is left to `main`.
pub(super) fn connect(
    main: &UdpSocket,
    bound: SocketAddr,
    local: Option<IpAddr>,
    peer: SocketAddr,
) -> io::Result<UdpSocket> {
    if cfg!(not(target_os = "linux")) {
        // Other systems have their own rules of who receives what.
        return Err(io::ErrorKind::Unsupported.into());
    }
    let from = source(bound, local, peer).ok_or(io::ErrorKind::AddrNotAvailable)?;
    let socket = Socket::new(Domain::for_address(from), Type::DGRAM, Some(Protocol::UDP))?;
    if let SocketAddr::V6(v6) = from {
        socket.set_only_v6(v6.ip().to_ipv4_mapped().is_none())?;
    }
    socket.set_nonblocking(true)?;
    grow_buffers(&socket);
    socket.set_reuse_address(true)?;
    // Both have to agree, and nobody else is to have the port.
    let main = SockRef::from(main);
    main.set_reuse_address(true)?;
    let result = socket.bind(&from.into());
    main.set_reuse_address(false)?;
    result?;
    socket.connect(&peer.into())?;
    Ok(socket.into())
}

/// The address that packets of the peer come to.
fn source(bound: SocketAddr, local: Option<IpAddr>, peer: SocketAddr) -> Option<SocketAddr> {
    if !bound.ip().is_unspecified() {
        return Some(bound);
    }
    let local = mapped(SocketAddr::new(local?, bound.port()), bound);
    Some(match (local, peer) {
        // Addresses of a link are those of one interface.
        (SocketAddr::V6(v6), SocketAddr::V6(peer)) if v6.ip().is_unicast_link_local() => {
            SocketAddrV6::new(*v6.ip(), v6.port(), 0, peer.scope_id()).into()
        }
        (local, _) => local,
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::time::Duration;

    use super::super::socket::{bind, bind_again};
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn bound(addr: &str) -> (UdpSocket, SocketAddr) {
        let socket = bind(addr.parse().expect("an address")).expect("bound");
        let bound = socket.local_addr().expect("bound");
        (socket, bound)
    }

    fn heard(socket: &UdpSocket) -> (u8, SocketAddr) {
        socket.set_nonblocking(false).expect("set");
        socket.set_read_timeout(Some(PATIENCE)).expect("set");
        let mut data = [0; 1];
        let (_, from) = socket.recv_from(&mut data).expect("received");
        (data[0], from)
    }

    /// A peer is heard beside the main socket, and others by that one, also when the other is gone.
    fn peer_is_heard(main: &str, local: IpAddr, peer: &str) {
        let (main, at) = bound(main);
        let to = SocketAddr::new(local, at.port());
        let (one, from) = bound(peer);
        let (other, _) = bound(peer);
        one.send_to(b"1", to).expect("sent");
        let (_, seen) = heard(&main);
        assert_eq!(from.port(), seen.port());
        let own = connect(&main, at, Some(local), seen).expect("beside");
        one.send_to(b"2", to).expect("sent");
        other.send_to(b"3", to).expect("sent");
        // As the main socket shows it.
        assert_eq!((b'2', seen), heard(&own));
        assert_eq!(b'3', heard(&main).0);
        drop(own);
        one.send_to(b"4", to).expect("sent");
        assert_eq!((b'4', seen), heard(&main));
    }

    #[test]
    fn a_peer_is_heard_beside_the_main_socket() {
        let v4 = Ipv4Addr::LOCALHOST.into();
        peer_is_heard("127.0.0.1:0", v4, "127.0.0.1:0");
        peer_is_heard("0.0.0.0:0", v4, "127.0.0.1:0");
        peer_is_heard(
            "0.0.0.0:0",
            Ipv4Addr::new(127, 0, 0, 2).into(),
            "127.0.0.1:0",
        );
        peer_is_heard("[::]:0", v4, "127.0.0.1:0");
        if bind((Ipv6Addr::LOCALHOST, 0).into()).is_ok() {
            peer_is_heard("[::]:0", Ipv6Addr::LOCALHOST.into(), "[::1]:0");
            peer_is_heard("[::1]:0", Ipv6Addr::LOCALHOST.into(), "[::1]:0");
        }
    }

    #[test]
    fn nobody_else_gets_the_port() {
        let (main, at) = bound("127.0.0.1:0");
        let (_peer, from) = bound("127.0.0.1:0");
        let own = connect(&main, at, None, from).expect("beside");
        let taken = |result: io::Result<UdpSocket>| {
            let error = result.expect_err("taken");
            assert_eq!(io::ErrorKind::AddrInUse, error.kind());
        };
        taken(bind(at));
        taken(bind_again(at));
        drop(own);
        taken(bind_again(at));
        let own = connect(&main, at, None, from).expect("beside");
        drop(main);
        taken(bind(at));
        let main = bind_again(at).expect("the port of the one that is gone");
        taken(bind_again(at));
        drop((main, own));
        bind(at).expect("free");
    }
}
