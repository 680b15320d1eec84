//! A second socket on the port of another, for one peer.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::socket::{bind_with, grow_buffers, mapped};

/// Binds a socket to the port of those that have it, the main one and others beside it, and connects the socket to
/// a peer: the system gives to it what the peer sends to this address, `local`, and to the main one, which is bound
/// to `bound`, all else. What came before is left to where it came.
pub(super) fn connect(
    those: &[&UdpSocket],
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
    socket.set_reuse_port(true)?;
    // All have to agree, for a moment, and are of one user: SO_REUSEADDR would let others in meanwhile.
    share(those, true);
    let result = socket.bind(&from.into());
    share(those, false);
    result?;
    socket.set_reuse_port(false)?;
    socket.connect(&peer.into())?;
    Ok(socket.into())
}

/// Binds a socket where the one is gone that had the port, and others stand beside it.
pub(super) fn bind_among(others: &[&UdpSocket], bound: SocketAddr) -> io::Result<UdpSocket> {
    share(others, true);
    let socket = bind_with(bound, |socket| socket.set_reuse_port(true));
    share(others, false);
    let socket = socket?;
    SockRef::from(&socket).set_reuse_port(false)?;
    Ok(socket)
}

/// Whether another socket of this user may have the port, too. Where one is not asked, the port stays taken.
fn share(sockets: &[&UdpSocket], may: bool) {
    for socket in sockets {
        let _ = SockRef::from(*socket).set_reuse_port(may);
    }
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
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::super::socket::bind;
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
        let own = connect(&[&main], at, Some(local), seen).expect("beside");
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
        // Also who would share it.
        let taken = || {
            for others in [bind(at), bind_among(&[], at)] {
                let error = others.expect_err("taken");
                assert_eq!(io::ErrorKind::AddrInUse, error.kind());
            }
        };
        let own = connect(&[&main], at, None, from).expect("beside");
        taken();
        let (_another, from_another) = bound("127.0.0.1:0");
        let another = connect(&[&main, &own], at, None, from_another).expect("beside both");
        taken();
        drop((own, another));
        taken();
        let own = connect(&[&main], at, None, from).expect("beside");
        drop(main);
        taken();
        let main = bind_among(&[&own], at).expect("the port of the one that is gone");
        taken();
        drop((main, own));
        bind(at).expect("free");
    }

    /// A socket of another user, which would take the port if it could.
    fn squat(at: SocketAddr, ended: &AtomicBool) -> bool {
        let nobody = 65534;
        // SAFETY: of this thread alone, and only what the test needs.
        let left = unsafe { libc::syscall(libc::SYS_setresuid, -1, nobody, -1) };
        assert_eq!(0, left);
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("set");
        socket.set_reuse_port(true).expect("set");
        while !ended.load(Ordering::Relaxed) {
            if socket.bind(&at.into()).is_ok() {
                return true;
            }
        }
        false
    }

    #[test]
    fn another_user_does_not_get_the_port_meanwhile() {
        // SAFETY: it only tells.
        if unsafe { libc::geteuid() } != 0 {
            return;
        }
        let (main, at) = bound("127.0.0.1:0");
        let (_peer, from) = bound("127.0.0.1:0");
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let squatter = scope.spawn(|| squat(at, &ended));
            for _ in 0..5000 {
                drop(connect(&[&main], at, None, from).expect("beside"));
            }
            ended.store(true, Ordering::Relaxed);
            assert!(!squatter.join().expect("no panic"));
        });
    }
}
