//! Connections of one endpoint that leave it by sockets of their own.
//!
//! Quinn moves an endpoint with all its connections to another socket, never one of them. So the endpoint
//! of clients has a socket that stands for several: what the driver of a connection that has moved sends
//! goes to that connection's socket, and all of them are read. Quinn is told that the socket has changed, by
//! which every connection of the endpoint takes another connection id and sends a PING; those that stay leave
//! by the socket that they had, so that their peers see no change.

use std::any::Any;
use std::cell::RefCell;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Connection, Endpoint, UdpPoller};
use tokio::sync::Notify;

use crate::udp::socket::{self, Port};

/// How long a move waits for an answer of the peer, in round trips, and at least, and at most.
const ANSWER: (u32, Duration, Duration) = (6, Duration::from_secs(2), Duration::from_secs(10));
/// So long a connection still hears what was sent to where it was.
const LINGER: Duration = Duration::from_secs(3);
/// How often a handshake that is not confirmed yet is looked at.
const CONFIRM_POLL: Duration = Duration::from_millis(1);

/// Where one connection leaves, as its driver knows.
#[derive(Debug, Default)]
pub(crate) struct Route {
    moved: AtomicBool,
    own: Mutex<Option<Arc<Own>>>,
    /// One move at a time.
    moving: tokio::sync::Mutex<()>,
    guest: Guest,
}

/// Something that lives as long as the connection does for QUIC.
#[derive(Default)]
struct Guest(Mutex<Option<Box<dyn Any + Send>>>);

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").finish_non_exhaustive()
    }
}

impl Guest {
    fn replace(&self, guest: Option<Box<dyn Any + Send>>) {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *place, guest);
        drop(place);
        drop(before);
    }
}

/// The socket of one connection.
#[derive(Debug)]
struct Own {
    socket: Arc<dyn AsyncUdpSocket>,
    port: Port,
    peer: SocketAddr,
    /// The peer has sent something here.
    heard: AtomicBool,
    told: Notify,
}

impl Drop for Own {
    fn drop(&mut self) {
        self.port.free();
    }
}

thread_local! {
    /// The route of the connection whose driver runs on this thread, if the connection has moved.
    static RUNNING: RefCell<Option<Arc<Own>>> = const { RefCell::new(None) };
}

impl Route {
    fn own(&self) -> MutexGuard<'_, Option<Arc<Own>>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the driver of the connection.
    pub(crate) fn run<T>(&self, poll: impl FnOnce() -> T) -> T {
        struct Running;

        impl Drop for Running {
            fn drop(&mut self) {
                RUNNING.set(None);
            }
        }

        if !self.moved.load(Ordering::Acquire) {
            return poll();
        }
        RUNNING.set(self.own().clone());
        let _running = Running;
        poll()
    }

    /// The driver is done, and with it the socket.
    pub(crate) fn end(&self) {
        let own = self.own().take();
        drop(own);
        self.guest.replace(None);
    }

    /// Keeps something until the driver is done.
    pub(crate) fn hold(&self, guest: impl Any + Send) {
        self.guest.replace(Some(Box::new(guest)));
    }

    fn leave_by(&self, own: Option<Arc<Own>>) -> Option<Arc<Own>> {
        self.moved.store(true, Ordering::Release);
        std::mem::replace(&mut *self.own(), own)
    }
}

/// A socket that stands for several.
#[derive(Debug)]
pub(crate) struct Routed {
    main: Arc<dyn AsyncUdpSocket>,
    /// Each lives as long as its connection leaves by it, and a while longer.
    owns: Mutex<Vec<Weak<Own>>>,
    /// There are some, or were when they were last read.
    any: AtomicBool,
    /// Whose turn it is to be read first.
    turn: AtomicUsize,
}

impl Routed {
    pub(crate) fn new(main: Arc<dyn AsyncUdpSocket>) -> Arc<Self> {
        Arc::new(Routed {
            main,
            owns: Mutex::default(),
            any: AtomicBool::new(false),
            turn: AtomicUsize::new(0),
        })
    }

    fn owns(&self) -> MutexGuard<'_, Vec<Weak<Own>>> {
        self.owns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, own: &Arc<Own>) {
        let mut owns = self.owns();
        owns.push(Arc::downgrade(own));
        self.any.store(true, Ordering::Release);
    }

    fn remove(&self, own: &Arc<Own>) {
        self.owns()
            .retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(own)));
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

    /// The socket of the connection whose driver runs.
    fn running(&self) -> Option<Arc<Own>> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        RUNNING.with(|running| running.borrow().clone())
    }
}

impl AsyncUdpSocket for Routed {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        match self.running() {
            Some(own) => own.socket.clone().create_io_poller(),
            None => self.main.clone().create_io_poller(),
        }
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match self.running() {
            Some(own) => own.socket.try_send(transmit),
            None => self.main.try_send(transmit),
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        if !self.any.load(Ordering::Acquire) {
            return self.main.poll_recv(cx, bufs, meta);
        }
        let owns = self.living();
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        for at in 0..=owns.len() {
            // The last one is the main one.
            let Some(own) = owns.get((first + at) % (owns.len() + 1)) else {
                match self.main.poll_recv(cx, bufs, meta) {
                    Poll::Pending => continue,
                    received => return received,
                }
            };
            match own.socket.poll_recv(cx, bufs, meta) {
                Poll::Pending => {}
                Poll::Ready(Ok(received)) => {
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
    pub(crate) endpoint: Endpoint,
    pub(crate) routed: Arc<Routed>,
    pub(crate) route: Arc<Route>,
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
        let _one = self.route.moving.lock().await;
        confirmed(connection).await?;
        if from.is_ipv4() != self.routed.local_addr()?.is_ipv4() {
            return Err(MoveError::Family);
        }
        let socket::Wrapped { socket, port } = (self.wrap)(socket::bind(from)?, self.max_mtu)?;
        let bound = socket.local_addr()?;
        let own = Arc::new(Own {
            socket,
            port,
            peer: connection.remote_address(),
            heard: AtomicBool::new(false),
            told: Notify::new(),
        });
        self.routed.add(&own);
        let before = self.route.leave_by(Some(own.clone()));
        let mut back = Back {
            movable: self,
            own: &own,
            before: Some(before),
        };
        self.tell()?;
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
        let before = back.before.take().flatten();
        if before.is_some() {
            tokio::spawn(async move {
                tokio::time::sleep(LINGER).await;
                drop(before);
            });
        }
        Ok(bound)
    }

    /// Tells Quinn that the socket has changed.
    fn tell(&self) -> io::Result<()> {
        self.endpoint.rebind_abstract(self.routed.clone())
    }
}

/// Takes a move back, also where its caller has gone.
struct Back<'m> {
    movable: &'m Movable,
    own: &'m Arc<Own>,
    before: Option<Option<Arc<Own>>>,
}

impl Drop for Back<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            self.movable.route.leave_by(before);
            self.movable.routed.remove(self.own);
            // Fails only where the main socket has no address any more.
            let _ = self.movable.tell();
        }
    }
}

impl Own {
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

/// A client moves when its handshake is confirmed, and not before (RFC 9000, section 9). Quinn has no event
/// for that.
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
