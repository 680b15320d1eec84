//! UDP sockets below the QUIC endpoints.
//!
//! `quinn-udp` does most of it; what is done here instead is what large datagrams need.
//! On loopback the path takes datagrams of up to 64 KB, and finding that out triples the
//! throughput; but a batch of such datagrams is more than one segmented send can carry, so batches
//! are split, and a receive buffer need not have room for 64 of them. The socket also asks the
//! event loop for readable events only: writability is asked for when a send was refused. What happens
//! to a socket afterwards is dealt with in `watched`; `wrap` puts both together.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::asynchronous::AsyncUdpSocket;
use quinn_udp::Transmit;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;

/// The most one send call carries, all segments together.
const MAX_BATCH: usize = 65_000;
/// The most one receive call brings, all segments together.
const MAX_RECEIVE: usize = 65_535;
/// Room in the system for a few dozen of the largest datagrams in each direction: a burst must not
/// be lost while the one thread that reads is busy.
const BUFFER: usize = 4 * 1024 * 1024;

/// Binds a socket. The unspecified IPv6 address serves IPv4 too; another IPv6 address does not.
pub(crate) fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    bind_with(addr, |_| Ok(()))
}

pub(super) fn bind_with(
    addr: SocketAddr,
    set: impl FnOnce(&Socket) -> io::Result<()>,
) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if let SocketAddr::V6(v6) = addr {
        let serves_v4 = v6.ip().is_unspecified() || v6.ip().to_ipv4_mapped().is_some();
        socket.set_only_v6(!serves_v4)?;
    }
    socket.set_nonblocking(true)?;
    grow_buffers(&socket);
    set(&socket)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// As `bind`, but the unspecified IPv6 address is the IPv4 one where the system has no IPv6.
pub(crate) fn bind_any(addr: SocketAddr) -> io::Result<UdpSocket> {
    match bind(addr) {
        Err(e) if is_no_ipv6(&e) && addr.ip() == IpAddr::from([0u16; 8]) => {
            bind(SocketAddr::from(([0, 0, 0, 0], addr.port())))
        }
        result => result,
    }
}

#[cfg(unix)]
fn is_no_ipv6(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::ENOPROTOOPT)
    )
}

#[cfg(not(unix))]
fn is_no_ipv6(_: &io::Error) -> bool {
    true
}

/// Best effort: the system's limit stands unless we may override it.
pub(crate) fn grow_buffers(socket: &Socket) {
    let _ = socket.set_recv_buffer_size(BUFFER);
    let _ = socket.set_send_buffer_size(BUFFER);
    #[cfg(target_os = "linux")]
    for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
        // It fails without CAP_NET_ADMIN.
        super::option::set(socket, libc::SOL_SOCKET, option, BUFFER as libc::c_int);
    }
}

/// An IPv4 address as such, also when a dual stack socket shows it as IPv6.
pub(crate) fn plain(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddrV4::new(v4, v6.port()).into(),
            None => addr,
        },
        SocketAddr::V4(_) => addr,
    }
}

/// The address in the family the socket speaks.
pub(crate) fn mapped(addr: SocketAddr, local: SocketAddr) -> SocketAddr {
    match (addr, local) {
        (SocketAddr::V4(v4), SocketAddr::V6(_)) => {
            SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into()
        }
        _ => addr,
    }
}

/// Whether the thread that sends may do so now. A thread of the VM must not be kept for long.
pub(crate) trait Pace: std::fmt::Debug + Send + Sync + 'static {
    /// Are packets made one at a time?
    fn is_slow() -> bool;

    /// Asked before each send call.
    fn may_send() -> bool;

    /// Told what was sent or received.
    fn moved(_bytes: usize) {}
}

/// Threads of our own only.
#[derive(Debug)]
pub(crate) struct Unpaced;

impl Pace for Unpaced {
    fn is_slow() -> bool {
        false
    }

    fn may_send() -> bool {
        true
    }
}

/// A socket as endpoints take it, and the hold on its port.
pub(crate) struct Wrapped {
    pub(crate) socket: Arc<dyn AsyncUdpSocket>,
    pub(crate) port: Port,
}

/// The port of a socket. Others may keep the socket, also when the last connection is over.
#[derive(Debug, Clone)]
pub(crate) struct Port(pub(super) Weak<dyn Release>);

impl Port {
    /// Gives the port back to the system, whoever still holds the socket. To be called when nothing
    /// is sent or received on it any more.
    pub(crate) fn free(&self) {
        if let Some(socket) = self.0.upgrade() {
            socket.release();
        }
    }

    /// Has the socket looked at, and replaced if it is gone.
    pub(crate) fn inspect(&self) {
        if let Some(socket) = self.0.upgrade() {
            socket.inspect();
        }
    }

    /// Another socket on this port, for what one peer sends to one address of it.
    pub(crate) fn beside(
        &self,
        peer: SocketAddr,
        local: Option<IpAddr>,
    ) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let socket = self.0.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        socket.beside(peer, local)
    }

    /// Why the socket, which is gone, could not be replaced.
    pub(crate) fn lost(&self) -> Option<io::Error> {
        self.0.upgrade()?.lost()
    }
}

pub(super) trait Release: Send + Sync {
    fn release(&self);

    fn inspect(&self);

    fn lost(&self) -> Option<io::Error>;

    fn beside(
        &self,
        peer: SocketAddr,
        local: Option<IpAddr>,
    ) -> io::Result<Arc<dyn AsyncUdpSocket>>;
}

/// What an endpoint hears of its socket. Refusals that do not fit are lost: the next datagram will be
/// refused, too.
#[derive(Debug)]
pub(crate) enum News {
    /// As the network says, nobody at the address has the port a datagram went to.
    Refused(SocketAddr),
    /// The socket is gone.
    Gone,
    /// Another socket is in its place.
    Replaced,
}

/// How a socket that is gone is replaced by one with the same port.
pub(crate) struct Replace {
    pub(crate) bind: Box<dyn Fn(SocketAddr) -> io::Result<UdpSocket> + Send + Sync>,
    /// Another port will do if the same is taken.
    pub(crate) any_port: bool,
    /// After this long without success the endpoint ends.
    pub(crate) within: Option<Duration>,
}

/// How a socket is wrapped.
pub(crate) struct WrapOptions {
    /// The largest datagram that is taken.
    pub(crate) max_datagram: u16,
    pub(crate) news: Option<mpsc::Sender<News>>,
    pub(crate) replace: Replace,
    /// The socket looks at itself from time to time. Else its endpoint has that done.
    pub(crate) inspects: bool,
}

/// Segments for which a receive buffer must have room, each as large as the largest datagram.
#[cfg(unix)]
pub(super) fn receive_segments(max_datagram: u16, offload: usize) -> usize {
    MAX_RECEIVE
        .div_ceil(usize::from(max_datagram.max(1)))
        .min(offload)
        .max(1)
}

/// Hands the batch over in pieces of whole segments that one send call can carry.
pub(super) fn send_split(
    transmit: &Transmit<'_>,
    mut send: impl FnMut(&Transmit<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let Some(segment) = transmit.segment_size else {
        return send(transmit);
    };
    if transmit.contents.len() <= MAX_BATCH || segment == 0 {
        return send(transmit);
    }
    let piece = (MAX_BATCH / segment).max(1) * segment;
    for contents in transmit.contents.chunks(piece) {
        // When a later piece is refused, the whole batch is sent again: the peer drops duplicates.
        send(&Transmit {
            contents,
            segment_size: (contents.len() > segment).then_some(segment),
            ..transmit.clone()
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(len: usize, segment: Option<usize>) -> Vec<(usize, Option<usize>)> {
        let contents = vec![0u8; len];
        let mut sent = Vec::new();
        let transmit = Transmit {
            destination: SocketAddr::from(([127, 0, 0, 1], 1)),
            ecn: None,
            contents: &contents,
            segment_size: segment,
            src_ip: None,
        };
        send_split(&transmit, |t| {
            sent.push((t.contents.len(), t.segment_size));
            Ok(())
        })
        .expect("no error");
        sent
    }

    #[test]
    fn a_small_batch_is_sent_as_it_is() {
        assert_eq!(pieces(14_520, Some(1452)), vec![(14_520, Some(1452))]);
        assert_eq!(pieces(60_000, None), vec![(60_000, None)]);
    }

    #[test]
    fn a_batch_over_64_kb_is_split_at_segments() {
        assert_eq!(
            pieces(150_000, Some(60_000)),
            vec![(60_000, None), (60_000, None), (30_000, None)]
        );
        let split = pieces(90_000, Some(9_000));
        assert_eq!(split, vec![(63_000, Some(9_000)), (27_000, Some(9_000))]);
        assert!(split.iter().all(|(len, _)| *len <= MAX_BATCH));
    }

    #[test]
    #[cfg(unix)]
    fn a_receive_buffer_has_room_for_64_kb_and_not_for_more() {
        assert_eq!(receive_segments(1472, 64), 45);
        assert_eq!(receive_segments(65_000, 64), 2);
        assert_eq!(receive_segments(65_527, 64), 2);
        assert_eq!(receive_segments(u16::MAX, 64), 1);
        // No system hands over several datagrams at once without the offload.
        assert_eq!(receive_segments(1472, 1), 1);
    }

    #[test]
    fn mapped_addresses_go_both_ways() {
        let v4: SocketAddr = "10.1.2.3:5".parse().expect("address");
        let local: SocketAddr = "[::]:0".parse().expect("address");
        assert_eq!(plain(mapped(v4, local)), v4);
        assert!(mapped(v4, local).is_ipv6());
    }
}
