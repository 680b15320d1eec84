//! Connections of one endpoint that have sockets of their own.
//!
//! A connection that has moved sends by its own socket, and a busy one hears by its own. An endpoint has a socket
//! that stands for several: all of them are read, in turn.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use quinn_udp::{RecvMeta, Transmit};
use tokio::sync::Notify;

use crate::engine::transport::Connection;
use crate::udp::asynchronous::{AsyncUdpSocket, UdpPoller};
use crate::udp::socket::{self, Port};

/// How long a move waits for an answer of the peer, in round trips, and at least, and at most.
const ANSWER: (u32, Duration, Duration) = (6, Duration::from_secs(2), Duration::from_secs(10));
/// So long a connection still hears what was sent to where it was.
const LINGER: Duration = Duration::from_secs(3);
/// How often a handshake that is not confirmed yet is looked at.
const CONFIRM_POLL: Duration = Duration::from_millis(1);
/// Sockets of busy connections, at most, of one endpoint.
pub(crate) const MAX_BESIDE: usize = 16;
/// So long a socket of a busy connection is not read before what came earlier, by the main one.
const CATCH_UP: Duration = Duration::from_millis(50);

/// The socket of a connection that has moved, or of busy ones.
#[derive(Debug)]
struct Own {
    socket: Arc<dyn AsyncUdpSocket>,
    /// Of a connection that has moved.
    port: Option<Port>,
    peer: SocketAddr,
    /// What of the main one busy connections are reached at.
    local: Option<IpAddr>,
    /// Of a busy connection: it is read from then on, or as soon as the main one is empty.
    after: Mutex<Option<Instant>>,
    /// The peer has sent something here.
    heard: AtomicBool,
    told: Notify,
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(port) = &self.port {
            port.free();
        }
    }
}

impl AsyncUdpSocket for Own {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

/// A socket that stands for several.
#[derive(Debug)]
pub(crate) struct Routed {
    main: Arc<dyn AsyncUdpSocket>,
    /// Of the main one.
    port: Port,
    /// Each lives as long as its connection leaves by it, and a while longer.
    owns: Mutex<Vec<Weak<Own>>>,
    /// There are some, or were when they were last read.
    any: AtomicBool,
    /// What was received last has come by the main one.
    by_main: AtomicBool,
    /// Whose turn it is to be read first.
    turn: AtomicUsize,
    /// Of whoever reads: woken to read one more.
    reader: Mutex<Option<Waker>>,
}

impl Routed {
    pub(crate) fn new(main: Arc<dyn AsyncUdpSocket>, port: Port) -> Arc<Self> {
        Arc::new(Routed {
            main,
            port,
            owns: Mutex::default(),
            any: AtomicBool::new(false),
            by_main: AtomicBool::new(true),
            turn: AtomicUsize::new(0),
            reader: Mutex::default(),
        })
    }

    fn owns(&self) -> MutexGuard<'_, Vec<Weak<Own>>> {
        self.owns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, own: &Arc<Own>) {
        let mut owns = self.owns();
        owns.push(Arc::downgrade(own));
        self.any.store(true, Ordering::Release);
        drop(owns);
        let reader = self.reader().take();
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    fn reader(&self) -> MutexGuard<'_, Option<Waker>> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes who reads.
    fn listen(&self, waker: &Waker) {
        let mut reader = self.reader();
        if !reader.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *reader = Some(waker.clone());
        }
    }

    /// Whether one of these is to wait until the main one is empty.
    fn catches_up(owns: &[Arc<Own>]) -> bool {
        let now = Instant::now();
        let waits = |own: &Arc<Own>| own.after().is_some_and(|after| now < after);
        owns.iter().any(waits)
    }

    fn remove(&self, own: &Arc<Own>) {
        self.owns()
            .retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(own)));
    }

    /// Sockets that stand beside the main one.
    #[cfg(test)]
    pub(crate) fn beside(&self) -> usize {
        self.living().len()
    }

    #[cfg(test)]
    pub(crate) fn is_heard_beside(&self, peer: SocketAddr) -> bool {
        self.living().iter().any(|own| own.peer == peer)
    }

    /// Those that are left.
    fn living(&self) -> Vec<Arc<Own>> {
        let mut owns = self.owns();
        let living: Vec<_> = owns.iter().filter_map(Weak::upgrade).collect();
        if living.len() < owns.len() {
            owns.retain(|own| own.strong_count() > 0);
        }
        self.any.store(!owns.is_empty(), Ordering::Release);
        living
    }
}

impl AsyncUdpSocket for Routed {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.main.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.main.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.listen(cx.waker());
        if !self.any.load(Ordering::Acquire) {
            self.by_main.store(true, Ordering::Relaxed);
            return self.main.poll_recv(cx, bufs, meta);
        }
        let owns = self.living();
        if Self::catches_up(&owns) {
            let received = self.main.poll_recv(cx, bufs, meta);
            if received.is_ready() {
                self.by_main.store(true, Ordering::Relaxed);
                return received;
            }
            for own in &owns {
                *own.after() = None;
            }
        }
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        for at in 0..=owns.len() {
            // The last one is the main one.
            let Some(own) = owns.get((first + at) % (owns.len() + 1)) else {
                match self.main.poll_recv(cx, bufs, meta) {
                    Poll::Pending => continue,
                    received => {
                        self.by_main.store(true, Ordering::Relaxed);
                        return received;
                    }
                }
            };
            match own.socket.poll_recv(cx, bufs, meta) {
                Poll::Pending => {}
                Poll::Ready(Ok(received)) => {
                    self.by_main.store(false, Ordering::Relaxed);
                    let from = meta.iter().take(received).map(|meta| meta.addr);
                    if !own.heard.load(Ordering::Relaxed) && from.into_iter().any(|a| a == own.peer)
                    {
                        own.heard.store(true, Ordering::Release);
                        own.told.notify_waiters();
                    }
                    return Poll::Ready(Ok(received));
                }
                // Its end is not that of the endpoint.
                Poll::Ready(Err(_)) => self.remove(own),
            }
        }
        Poll::Pending
    }

    fn part(&self, peer: SocketAddr, local: Option<IpAddr>) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        // A second one for the same path would get what comes from then on, and what the first one still has would
        // come late, or not at all.
        let mut besides = self.living();
        besides.retain(|own| own.port.is_none());
        let found = besides
            .iter()
            .find(|own| (own.peer, own.local) == (peer, local));
        if let Some(shared) = found {
            return Ok(shared.clone());
        }
        if besides.len() >= MAX_BESIDE {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        if !self.by_main.load(Ordering::Relaxed) {
            // The connection has moved to another port.
            return Err(io::ErrorKind::AddrNotAvailable.into());
        }
        let own = Arc::new(Own {
            socket: self.port.beside(peer, local)?,
            port: None,
            peer,
            local,
            after: Mutex::new(Some(Instant::now() + CATCH_UP)),
            heard: AtomicBool::new(false),
            told: Notify::new(),
        });
        self.add(&own);
        Ok(own)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.main.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.main.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.main.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.main.may_fragment()
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum MoveError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("an address of another family")]
    Family,
    #[error("the connection has ended")]
    Ended,
    #[error("nothing came back")]
    Unanswered,
}

/// What a client's connection needs to move.
#[derive(Clone)]
pub(crate) struct Movable {
    pub(crate) routed: Arc<Routed>,
    /// One move at a time.
    pub(crate) moving: Arc<tokio::sync::Mutex<()>>,
    pub(crate) wrap: fn(std::net::UdpSocket, u16) -> io::Result<socket::Wrapped>,
    pub(crate) max_mtu: u16,
}

impl Movable {
    /// Has the connection leave from another address; where the peer does not answer there, from the one it had.
    /// Returns what it is bound to.
    pub(crate) async fn leave_from(
        &self,
        connection: &Connection,
        from: SocketAddr,
    ) -> Result<SocketAddr, MoveError> {
        let _one = self.moving.lock().await;
        confirmed(connection).await?;
        if from.is_ipv4() != self.routed.local_addr()?.is_ipv4() {
            return Err(MoveError::Family);
        }
        let socket::Wrapped { socket, port } = (self.wrap)(socket::bind(from)?, self.max_mtu)?;
        let bound = socket.local_addr()?;
        let own = Arc::new(Own {
            socket,
            port: Some(port),
            peer: connection.remote_address(),
            local: None,
            after: Mutex::default(),
            heard: AtomicBool::new(false),
            told: Notify::new(),
        });
        self.routed.add(&own);
        let before = connection.leave_by(own.clone()).ok_or(MoveError::Ended)?;
        let mut back = Back {
            movable: self,
            connection,
            own: &own,
            before: Some(before),
        };
        let (trips, least, most) = ANSWER;
        let patience = (connection.rtt() * trips).clamp(least, most);
        let answered = tokio::select! {
            () = own.answered() => true,
            () = tokio::time::sleep(patience) => false,
            _ = connection.closed() => return Err(MoveError::Ended),
        };
        if !answered {
            return Err(MoveError::Unanswered);
        }
        // The new socket stays.
        let before = back.before.take();
        tokio::spawn(async move {
            tokio::time::sleep(LINGER).await;
            drop(before);
        });
        Ok(bound)
    }
}

/// Takes a move back, also where its caller has gone.
struct Back<'m> {
    movable: &'m Movable,
    connection: &'m Connection,
    own: &'m Arc<Own>,
    before: Option<Arc<dyn AsyncUdpSocket>>,
}

impl Drop for Back<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            self.connection.leave_by(before);
            self.movable.routed.remove(self.own);
        }
    }
}

impl Own {
    fn after(&self) -> MutexGuard<'_, Option<Instant>> {
        self.after.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answered(&self) {
        loop {
            let told = self.told.notified();
            if self.heard.load(Ordering::Acquire) {
                return;
            }
            told.await;
        }
    }
}

/// A client moves when its handshake is confirmed, and not before (RFC 9000, section 9). QUIC has no
/// event for that.
async fn confirmed(connection: &Connection) -> Result<(), MoveError> {
    while connection.stats().frame_rx.handshake_done == 0 {
        tokio::select! {
            _ = connection.closed() => return Err(MoveError::Ended),
            () = tokio::time::sleep(CONFIRM_POLL) => {}
        }
    }
    match connection.close_reason() {
        Some(_) => Err(MoveError::Ended),
        None => Ok(()),
    }
}
