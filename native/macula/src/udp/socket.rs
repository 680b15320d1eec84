//! UDP sockets below the QUIC endpoints.
//!
//! Quinn's own socket does most of it; what is done here instead is what large datagrams need.
//! On loopback the path takes datagrams of up to 64 KB, and finding that out triples the
//! throughput; but a batch of such datagrams is more than one segmented send can carry, so batches
//! are split, and a receive buffer need not have room for 64 of them. The socket also asks the
//! event loop for readable events only: writability is asked for when a send was refused.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::sync::{Arc, Weak};

use super::refused;
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;

use crate::vm::fault::{self, Point};

/// The most one send call carries, all segments together.
const MAX_BATCH: usize = 65_000;
/// The most one receive call brings, all segments together.
const MAX_RECEIVE: usize = 65_535;
/// Receive calls that fail in a row before the thread turns to other work.
#[cfg(unix)]
const FAILURES: u32 = 16;
/// And how long that takes at least.
#[cfg(unix)]
const PAUSE: std::time::Duration = std::time::Duration::from_millis(10);
/// Room in the system for a few dozen of the largest datagrams in each direction: a burst must not
/// be lost while the one thread that reads is busy.
const BUFFER: usize = 4 * 1024 * 1024;

/// Binds a socket. The unspecified IPv6 address serves IPv4 too; another IPv6 address does not.
pub(crate) fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if let SocketAddr::V6(v6) = addr {
        let serves_v4 = v6.ip().is_unspecified() || v6.ip().to_ipv4_mapped().is_some();
        socket.set_only_v6(!serves_v4)?;
    }
    socket.set_nonblocking(true)?;
    grow_buffers(&socket);
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

/// A socket as quinn takes it, and the hold on its port.
pub(crate) struct Wrapped {
    pub(crate) socket: Arc<dyn AsyncUdpSocket>,
    pub(crate) port: Port,
}

/// The port of a socket. A handle of quinn's keeps the socket, also when its connection is long over.
pub(crate) struct Port(Weak<dyn Release>);

impl Port {
    /// Gives the port back to the system, whoever still holds the socket. To be called when nothing
    /// is sent or received on it any more.
    pub(crate) fn free(&self) {
        if let Some(socket) = self.0.upgrade() {
            socket.release();
        }
    }
}

trait Release: Send + Sync {
    fn release(&self);
}

/// Gets the addresses where, as the network says, nobody has the port a datagram went to. What does
/// not fit is lost: the next datagram will be refused too.
pub(crate) type Refusals = mpsc::Sender<SocketAddr>;

/// Wraps a bound socket for an endpoint that takes datagrams of up to `max_datagram` bytes. Must
/// be called inside the runtime.
#[cfg(unix)]
pub(crate) fn wrap<P: Pace>(
    socket: UdpSocket,
    max_datagram: u16,
    refusals: Option<Refusals>,
) -> io::Result<Wrapped> {
    let socket = Arc::new(imp::Watched::<P>::new(socket, max_datagram, refusals)?);
    let weak = Arc::downgrade(&socket);
    Ok(Wrapped {
        socket,
        port: Port(weak),
    })
}

#[cfg(not(unix))]
pub(crate) fn wrap<P: Pace>(
    socket: UdpSocket,
    _max_datagram: u16,
    _refusals: Option<Refusals>,
) -> io::Result<Wrapped> {
    struct Nothing;

    impl Release for Nothing {
        fn release(&self) {}
    }

    Ok(Wrapped {
        socket: quinn::Runtime::wrap_udp_socket(&quinn::TokioRuntime, socket)?,
        port: Port(Weak::<Nothing>::new()),
    })
}

/// Segments for which a receive buffer must have room, each as large as the largest datagram.
#[cfg(unix)]
fn receive_segments(max_datagram: u16, offload: usize) -> usize {
    MAX_RECEIVE
        .div_ceil(usize::from(max_datagram.max(1)))
        .min(offload)
        .max(1)
}

/// Hands the batch over in pieces of whole segments that one send call can carry.
fn send_split(
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

#[cfg(unix)]
mod imp {
    use std::marker::PhantomData;
    use std::os::fd::AsRawFd;
    use std::pin::Pin;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::{Context, Poll, ready};

    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    use super::*;

    #[derive(Debug)]
    pub(super) struct Watched<P> {
        io: AsyncFd<UdpSocket>,
        state: UdpSocketState,
        receive_segments: usize,
        /// The last send was refused for want of room.
        blocked: AtomicBool,
        refusals: Option<Refusals>,
        pace: PhantomData<P>,
    }

    impl<P: Pace> Watched<P> {
        pub(super) fn new(
            socket: UdpSocket,
            max_datagram: u16,
            refusals: Option<Refusals>,
        ) -> io::Result<Self> {
            let state = UdpSocketState::new((&socket).into())?;
            if refusals.is_some() {
                refused::ask(&socket);
            }
            let io = watch(socket, Interest::READABLE)?;
            Ok(Self {
                io,
                receive_segments: receive_segments(max_datagram, state.gro_segments()),
                state,
                blocked: AtomicBool::new(false),
                refusals,
                pace: PhantomData,
            })
        }

        fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            let socket = self.io.get_ref();
            match self.state.try_send(socket.into(), transmit) {
                Ok(()) => Ok(()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(e),
                // It may be the fate of an earlier datagram that the system tells now, and this one
                // has not gone. If it is of this one, it is as good as lost on the way.
                Err(_) => {
                    self.hear();
                    self.send_single(transmit)
                }
            }
        }

        /// Sends each datagram of a batch alone: a driver may refuse to separate them.
        fn send_single(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            let socket = self.io.get_ref();
            let segment = transmit.segment_size.unwrap_or(0).max(1);
            if transmit.segment_size.is_none() || transmit.contents.len() <= segment {
                return self.state.send(socket.into(), transmit);
            }
            for contents in transmit.contents.chunks(segment) {
                self.state.send(
                    socket.into(),
                    &Transmit {
                        contents,
                        segment_size: None,
                        ..transmit.clone()
                    },
                )?;
            }
            Ok(())
        }

        /// Passes on what the network says of earlier datagrams.
        fn hear(&self) {
            if let Some(refusals) = &self.refusals {
                refused::take(self.io.get_ref(), |addr| {
                    let _ = refusals.try_send(addr);
                });
            }
        }
    }

    impl<P: Pace> Release for Watched<P> {
        /// Puts a socket that is bound to nothing behind the descriptor, which stays valid.
        fn release(&self) {
            let own = self.io.get_ref();
            let domain = own.local_addr().map_or(Domain::IPV4, Domain::for_address);
            if let Ok(other) = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)) {
                // SAFETY: two descriptors that live; it fails without harm.
                unsafe { libc::dup2(other.as_raw_fd(), own.as_raw_fd()) };
            }
        }
    }

    impl<P: Pace> AsyncUdpSocket for Watched<P> {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            Box::pin(WritePoller {
                socket: self,
                writable: None,
            })
        }

        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            fault::pass(Point::Transmit);
            let sent = send_split(transmit, |piece| self.send(piece));
            if matches!(&sent, Err(e) if e.kind() == io::ErrorKind::WouldBlock) {
                self.blocked.store(true, Ordering::Relaxed);
            }
            P::moved(transmit.contents.len());
            sent
        }

        fn poll_recv(
            &self,
            cx: &mut Context<'_>,
            bufs: &mut [IoSliceMut<'_>],
            meta: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            let mut failures = 0;
            loop {
                fault::pass(Point::Receive);
                let mut guard = ready!(self.io.poll_read_ready(cx))?;
                match guard.try_io(|io| self.state.recv(io.get_ref().into(), bufs, meta)) {
                    // Whatever the system says of one datagram, the next one may come.
                    Ok(Err(e)) if !refused::is_end(&e, self.io.get_ref()) => {
                        self.hear();
                        failures += 1;
                        if failures == FAILURES {
                            let waker = cx.waker().clone();
                            tokio::spawn(async move {
                                tokio::time::sleep(PAUSE).await;
                                waker.wake();
                            });
                            return Poll::Pending;
                        }
                    }
                    Ok(result) => {
                        // Fewer than asked for: the socket is empty, and the system tells when it
                        // is not. Asking it again would cost a call per wake-up.
                        if cfg!(target_os = "linux")
                            && matches!(result, Ok(count) if count < bufs.len())
                        {
                            guard.clear_ready();
                        }
                        if let Ok(count) = result {
                            P::moved(meta.iter().take(count).map(|one| one.len).sum());
                        }
                        return Poll::Ready(result);
                    }
                    Err(_would_block) => continue,
                }
            }
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            self.io.get_ref().local_addr()
        }

        fn max_transmit_segments(&self) -> usize {
            if P::is_slow() {
                1
            } else {
                self.state.max_gso_segments()
            }
        }

        fn max_receive_segments(&self) -> usize {
            self.receive_segments
        }

        fn may_fragment(&self) -> bool {
            self.state.may_fragment()
        }
    }

    /// Waits for writability on a duplicate of the descriptor, which holds the port, too, and is
    /// closed with the wait.
    #[derive(Debug)]
    struct WritePoller<P> {
        socket: Arc<Watched<P>>,
        writable: Option<AsyncFd<UdpSocket>>,
    }

    impl<P: Pace> UdpPoller for WritePoller<P> {
        fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            if !P::may_send() {
                // The native thread goes on.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if !self.socket.blocked.load(Ordering::Relaxed) {
                self.writable = None;
                return Poll::Ready(Ok(()));
            }
            if P::is_slow() {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if self.writable.is_none() {
                let twin = self.socket.io.get_ref().try_clone()?;
                self.writable = Some(watch(twin, Interest::WRITABLE)?);
            }
            let Some(fd) = &self.writable else {
                return Poll::Ready(Ok(()));
            };
            loop {
                let mut guard = ready!(fd.poll_write_ready(cx))?;
                if is_writable(fd.get_ref()) {
                    self.socket.blocked.store(false, Ordering::Relaxed);
                    self.writable = None;
                    return Poll::Ready(Ok(()));
                }
                guard.clear_ready();
                // News in the error queue looks like the end of writing, which nothing clears.
                if guard.ready().is_write_closed() {
                    self.socket.hear();
                    self.writable = None;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
        }
    }

    fn watch(socket: UdpSocket, interest: Interest) -> io::Result<AsyncFd<UdpSocket>> {
        // SAFETY: the descriptor is owned by the socket, which the `AsyncFd` owns.
        Ok(unsafe { AsyncFd::register_with_interest(socket, interest) }?)
    }

    fn is_writable(socket: &UdpSocket) -> bool {
        let mut poll = libc::pollfd {
            fd: socket.as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: one valid pollfd, no waiting.
        unsafe { libc::poll(&mut poll, 1, 0) != 0 }
    }
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
