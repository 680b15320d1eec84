//! A socket that outlives what happens to it.
//!
//! Whatever the system says of a datagram, the next one may go. Only a descriptor that is no longer
//! our socket, or a socket that has lost its port, is the end of it. Then another socket takes its
//! place at the same address, and the endpoint with its connections notices a pause.

use std::io::{self, IoSliceMut};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use super::asynchronous::{AsyncUdpSocket, UdpPoller};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Sleep, sleep, sleep_until, timeout};

use super::beside;
use super::denied::{self, Denial};
use super::errors::Errors;
use super::refused;
use super::socket::{News, Pace, Release, Replace, WrapOptions, receive_segments, send_split};
use crate::vm::fault::{self, Point};

/// Receive calls that fail in a row before the thread turns to other work.
const FAILURES: u32 = 16;
/// And how long that takes at least.
const PAUSE: Duration = Duration::from_millis(10);
/// How often the socket of an endpoint that sends nothing is looked at: the system tells nobody when a
/// descriptor is closed.
const LOOK: Duration = Duration::from_secs(5);
/// Between two tries to bind another socket, and the longest pause also after a success: what takes
/// sockets away may do so again and again.
const TRIES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));

#[derive(Debug)]
pub(super) struct Watched<P> {
    current: RwLock<Current>,
    max_datagram: u16,
    /// Those that stand beside this one.
    besides: Mutex<Vec<Weak<Watched<P>>>>,
    receive_segments: usize,
    may_fragment: bool,
    /// The last send was refused for want of room.
    blocked: AtomicBool,
    /// The port was given back.
    released: AtomicBool,
    receiver: Mutex<Receiver>,
    /// The socket seems to be gone.
    trouble: Arc<Notify>,
    news: Option<mpsc::Sender<News>>,
    pace: PhantomData<P>,
}

/// The socket of now.
#[derive(Debug)]
struct Current {
    io: ManuallyDrop<AsyncFd<UdpSocket>>,
    state: UdpSocketState,
    bound: SocketAddr,
    /// What the descriptor stood for when it was made.
    identity: Option<Identity>,
}

/// The file behind a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity(libc::dev_t, libc::ino_t);

/// The one that receives.
#[derive(Debug, Default)]
struct Receiver {
    waker: Option<Waker>,
    pause: Option<Pin<Box<Sleep>>>,
    /// Why no socket could be had in place of the one that is gone.
    lost: Option<i32>,
}

impl Receiver {
    /// Pending, and woken also when the socket is replaced.
    fn wait<T>(&mut self, cx: &Context<'_>) -> Poll<T> {
        if !self.waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl Identity {
    fn of(socket: &UdpSocket) -> Option<Self> {
        // SAFETY: an all-zero `stat` is valid.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: a live buffer; a wrong descriptor is answered with an error.
        let known = unsafe { libc::fstat(socket.as_raw_fd(), &raw mut stat) } == 0;
        known.then_some(Self(stat.st_dev, stat.st_ino))
    }
}

impl Current {
    fn new(socket: UdpSocket, hears: bool) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        if hears {
            refused::ask(&socket);
        }
        let bound = socket.local_addr()?;
        let identity = Identity::of(&socket);
        Ok(Self {
            io: ManuallyDrop::new(watch(socket, Interest::READABLE)?),
            state,
            bound,
            identity,
        })
    }

    fn socket(&self) -> &UdpSocket {
        self.io.get_ref()
    }

    /// Whether the descriptor is still what it was.
    fn is_ours(&self) -> bool {
        Identity::of(self.socket()) == self.identity
    }

    /// Somebody closed the descriptor, which may be another file by now, or the system took the port
    /// from the socket.
    fn is_gone(&self) -> bool {
        !self.is_ours()
            || self
                .socket()
                .local_addr()
                .is_ok_and(|addr| addr != self.bound)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match self.state.try_send(self.socket().into(), transmit) {
            // Expected of probes for a larger MTU: as good as lost on the way.
            Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE) => Ok(()),
            sent => sent,
        }
    }

    /// Sends each datagram of a batch alone: a driver may refuse to separate them.
    fn send_single(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let segment = transmit.segment_size.unwrap_or(0).max(1);
        if transmit.segment_size.is_none() || transmit.contents.len() <= segment {
            return self.try_send(transmit);
        }
        transmit.contents.chunks(segment).try_for_each(|contents| {
            self.try_send(&Transmit {
                contents,
                segment_size: None,
                ..transmit.clone()
            })
        })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let ours = self.is_ours();
        // SAFETY: taken once, here.
        let io = unsafe { ManuallyDrop::take(&mut self.io) };
        if !ours {
            // Another's descriptor is not ours to close.
            let _ = io.into_inner().into_raw_fd();
        }
    }
}

impl<P: Pace> Watched<P> {
    pub(super) fn start(socket: UdpSocket, options: WrapOptions) -> io::Result<Arc<Self>> {
        let current = Current::new(socket, options.news.is_some())?;
        let trouble = Arc::new(Notify::new());
        let this = Arc::new(Self {
            max_datagram: options.max_datagram,
            besides: Mutex::default(),
            receive_segments: receive_segments(options.max_datagram, current.state.gro_segments()),
            may_fragment: current.state.may_fragment(),
            current: RwLock::new(current),
            blocked: AtomicBool::new(false),
            released: AtomicBool::new(false),
            receiver: Mutex::default(),
            trouble: trouble.clone(),
            news: options.news,
            pace: PhantomData,
        });
        let look = options.inspects.then_some(LOOK);
        tokio::spawn(keep(Arc::downgrade(&this), trouble, look, options.replace));
        Ok(this)
    }

    fn current(&self) -> RwLockReadGuard<'_, Current> {
        self.current.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn receiver(&self) -> MutexGuard<'_, Receiver> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends one datagram, or several that the system is to separate. The error is the system's no.
    fn send(&self, current: &Current, transmit: &Transmit<'_>) -> io::Result<()> {
        match current.try_send(transmit) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(e),
            // It may be the fate of an earlier datagram that the system tells now, and this one
            // has not gone.
            Err(_) => {
                self.hear(current);
                current.send_single(transmit)
            }
        }
    }

    /// Where somebody wants to know what the network says.
    fn errors(&self) -> Option<Errors> {
        self.news.as_ref()?;
        Errors::of(self.current().socket())
    }

    /// Passes on what the network says of earlier datagrams.
    fn hear(&self, current: &Current) {
        if let Some(news) = &self.news {
            refused::take(current.socket(), |addr| {
                let _ = news.try_send(News::Refused(addr));
            });
        }
    }

    /// Puts another socket in the place of the one that is gone.
    fn replace(&self, with: &Replace) -> io::Result<()> {
        let (bound, old) = {
            let current = self.current();
            (current.bound, current.socket().as_raw_fd())
        };
        let bind = || match (with.bind)(bound) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => self.bind_among(bound, e),
            socket => socket,
        };
        let socket = match bind() {
            Err(e) if with.any_port && e.kind() == io::ErrorKind::AddrInUse => {
                (with.bind)(SocketAddr::new(bound.ip(), 0))
            }
            socket => socket,
        }?;
        // The number that was closed is the next one that the system gives. Under the same number the
        // event loop would lose the new socket with the old one.
        let socket = if socket.as_raw_fd() == old {
            socket.try_clone()?
        } else {
            socket
        };
        let new = Current::new(socket, self.news.is_some())?;
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if self.released.load(Ordering::Acquire) {
            return Ok(());
        }
        let old = std::mem::replace(&mut *current, new);
        drop(current);
        drop(old);
        self.blocked.store(false, Ordering::Relaxed);
        self.wake_receiver(None);
        Ok(())
    }

    /// The sockets that stand beside this one.
    fn besides(&self) -> Vec<Arc<Self>> {
        let mut besides = self.besides.lock().unwrap_or_else(PoisonError::into_inner);
        besides.retain(|beside| beside.strong_count() > 0);
        besides.iter().filter_map(Weak::upgrade).collect()
    }

    /// Binds where sockets of ours have the port, if that is why it is taken.
    fn bind_among(&self, bound: SocketAddr, taken: io::Error) -> io::Result<UdpSocket> {
        let besides = self.besides();
        let currents: Vec<_> = besides.iter().map(|beside| beside.current()).collect();
        let others: Vec<_> = own(&currents).collect();
        if others.is_empty() {
            return Err(taken);
        }
        beside::bind_among(&others, bound)
    }

    fn wake_receiver(&self, lost: Option<i32>) {
        let mut receiver = self.receiver();
        receiver.lost = lost;
        receiver.pause = None;
        let waker = receiver.waker.take();
        drop(receiver);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Has a descriptor stand for another socket, which programs that the VM starts do not inherit either.
fn stand_in(other: &Socket, place: &UdpSocket) {
    let place = place.as_raw_fd();
    // SAFETY: descriptors that live; these calls fail without harm.
    unsafe {
        #[cfg(target_os = "linux")]
        libc::dup3(other.as_raw_fd(), place, libc::O_CLOEXEC);
        #[cfg(not(target_os = "linux"))]
        if libc::dup2(other.as_raw_fd(), place) == place {
            libc::fcntl(place, libc::F_SETFD, libc::FD_CLOEXEC);
        }
    }
}

/// Replaces the socket whenever it is gone, and passes on what the network says of its datagrams. Ends with
/// the socket.
async fn keep<P: Pace>(
    watched: Weak<Watched<P>>,
    trouble: Arc<Notify>,
    look: Option<Duration>,
    with: Replace,
) {
    let mut errors = watched.upgrade().and_then(|socket| socket.errors());
    loop {
        let news = async {
            match &errors {
                Some(errors) => errors.next().await,
                None => std::future::pending().await,
            }
        };
        let trouble = async {
            match look {
                Some(look) => drop(timeout(look, trouble.notified()).await),
                None => trouble.notified().await,
            }
        };
        let is_news = tokio::select! {
            () = trouble => false,
            () = news => true,
        };
        let Some(socket) = watched.upgrade() else {
            return;
        };
        if socket.released.load(Ordering::Acquire) {
            return;
        }
        if is_news {
            socket.hear(&socket.current());
            continue;
        }
        if !socket.current().is_gone() {
            continue;
        }
        let news = socket.news.clone();
        drop(socket);
        tell(&news, News::Gone).await;
        let since = Instant::now();
        let mut pause = TRIES.0;
        loop {
            // Not held while this waits: the endpoint may end meanwhile.
            let Some(socket) = watched.upgrade() else {
                return;
            };
            if socket.released.load(Ordering::Acquire) {
                return;
            }
            match socket.replace(&with) {
                Ok(()) => break,
                Err(e) if with.within.is_some_and(|limit| since.elapsed() >= limit) => {
                    let code = e.raw_os_error().unwrap_or(libc::EBADF);
                    socket.wake_receiver(Some(code));
                    return;
                }
                Err(_) => {}
            }
            drop(socket);
            sleep(pause).await;
            pause = (pause * 2).min(TRIES.1);
        }
        tell(&news, News::Replaced).await;
        sleep(TRIES.1).await;
        errors = watched.upgrade().and_then(|socket| socket.errors());
    }
}

async fn tell(to: &Option<mpsc::Sender<News>>, news: News) {
    if let Some(to) = to {
        // An endpoint that has ended needs no news.
        let _ = to.send(news).await;
    }
}

impl<P> Drop for Watched<P> {
    fn drop(&mut self) {
        self.trouble.notify_one();
    }
}

impl<P: Pace> Release for Watched<P> {
    /// Puts a socket that is bound to nothing behind the descriptor, which stays valid.
    fn release(&self) {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        self.released.store(true, Ordering::Release);
        self.trouble.notify_one();
        if !current.is_ours() {
            return;
        }
        let domain = Domain::for_address(current.bound);
        // The endpoint may still look at what came: that must not block its thread.
        let other = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP));
        if let Ok(other) = other.and_then(|other| other.set_nonblocking(true).map(|()| other)) {
            stand_in(&other, current.socket());
            current.identity = Identity::of(current.socket());
        }
    }

    fn inspect(&self) {
        self.trouble.notify_one();
    }

    fn lost(&self) -> Option<io::Error> {
        self.receiver().lost.map(io::Error::from_raw_os_error)
    }

    /// One that is gone is not replaced: then this one hears the peer again.
    fn beside(
        &self,
        peer: SocketAddr,
        local: Option<IpAddr>,
    ) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let current = self.current();
        if self.released.load(Ordering::Acquire) || !current.is_ours() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let besides = self.besides();
        let currents: Vec<_> = besides.iter().map(|beside| beside.current()).collect();
        let mut those = vec![current.socket()];
        those.extend(own(&currents));
        let socket = beside::connect(&those, current.bound, local, peer)?;
        drop(current);
        let options = WrapOptions {
            max_datagram: self.max_datagram,
            news: None,
            replace: Replace {
                bind: Box::new(|_| Err(io::ErrorKind::Unsupported.into())),
                any_port: false,
                within: Some(Duration::ZERO),
            },
            inspects: false,
        };
        let beside = Self::start(socket, options)?;
        let mut besides = self.besides.lock().unwrap_or_else(PoisonError::into_inner);
        besides.push(Arc::downgrade(&beside));
        Ok(beside)
    }
}

impl<P: Pace> AsyncUdpSocket for Watched<P> {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(WritePoller {
            socket: self,
            denial: Arc::default(),
            pause: None,
            writable: None,
        })
    }

    /// The only error is `WouldBlock`: any other would be the end of the connection.
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let turn = denied::turn();
        // A knock, which no packet is as short as, is the watch's and no driver's.
        if transmit.contents.len() > 1 {
            fault::pass(Point::Transmit);
        }
        let current = self.current();
        let sent = send_split(transmit, |piece| self.send(&current, piece));
        P::moved(transmit.contents.len());
        match sent {
            Ok(()) => {
                if let Some(turn) = turn {
                    turn.sent(transmit.destination);
                }
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.blocked.store(true, Ordering::Relaxed);
                Err(e)
            }
            Err(_) => {
                if current.is_gone() {
                    self.trouble.notify_one();
                }
                match turn {
                    Some(turn) if turn.keep(transmit.destination, Instant::now()) => {
                        Err(io::ErrorKind::WouldBlock.into())
                    }
                    // As good as lost on the way.
                    _ => Ok(()),
                }
            }
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let current = self.current();
        let mut receiver = self.receiver();
        let mut failures = 0;
        loop {
            fault::pass(Point::Receive);
            if let Some(code) = receiver.lost {
                return Poll::Ready(Err(io::Error::from_raw_os_error(code)));
            }
            if let Some(pause) = &mut receiver.pause {
                if pause.as_mut().poll(cx).is_pending() {
                    return receiver.wait(cx);
                }
                receiver.pause = None;
            }
            let Poll::Ready(guard) = current.io.poll_read_ready(cx) else {
                return receiver.wait(cx);
            };
            let mut guard = guard?;
            match guard.try_io(|io| current.state.recv(io.get_ref().into(), bufs, meta)) {
                Ok(Ok(count)) => {
                    // Fewer than asked for: the socket is empty, and the system tells when it
                    // is not. Asking it again would cost a call per wake-up.
                    if cfg!(target_os = "linux") && count < bufs.len() {
                        guard.clear_ready();
                    }
                    // What no packet is as short as: nothing that peers send takes this point.
                    if meta.iter().take(count).any(|one| one.len == 1) {
                        fault::pass(Point::Stray);
                    }
                    P::moved(meta.iter().take(count).map(|one| one.len).sum());
                    return Poll::Ready(Ok(count));
                }
                Ok(Err(_)) if current.is_gone() => {
                    self.trouble.notify_one();
                    return receiver.wait(cx);
                }
                // Whatever the system says of one datagram, the next one may come.
                Ok(Err(_)) => {
                    self.hear(&current);
                    failures += 1;
                    if failures == FAILURES {
                        receiver.pause = Some(Box::pin(sleep(PAUSE)));
                    }
                }
                Err(_would_block) => {}
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.current().bound)
    }

    fn max_transmit_segments(&self) -> usize {
        if P::is_slow() {
            1
        } else {
            self.current().state.max_gso_segments()
        }
    }

    fn max_receive_segments(&self) -> usize {
        self.receive_segments
    }

    fn may_fragment(&self) -> bool {
        self.may_fragment
    }
}

/// Waits until the connection may send. For want of room it waits on a duplicate of the descriptor,
/// which holds the port, too, and is closed with the wait.
#[derive(Debug)]
struct WritePoller<P> {
    socket: Arc<Watched<P>>,
    denial: Arc<Denial>,
    /// Until the next try after a denial.
    pause: Option<Pin<Box<Sleep>>>,
    writable: Option<AsyncFd<UdpSocket>>,
}

impl<P: Pace> WritePoller<P> {
    fn go(&mut self) -> Poll<io::Result<()>> {
        self.writable = None;
        self.denial.announce();
        Poll::Ready(Ok(()))
    }

    /// A descriptor that tells when there is room.
    fn twin(&self) -> io::Result<AsyncFd<UdpSocket>> {
        let twin = self.socket.current().socket().try_clone()?;
        watch(twin, Interest::WRITABLE)
    }
}

impl<P: Pace> UdpPoller for WritePoller<P> {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !P::may_send() {
            // The native thread goes on.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(due) = self.denial.due() {
            if P::is_slow() {
                self.denial.put_back(due);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            self.pause = Some(Box::pin(sleep_until(due.into())));
        }
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        if !self.socket.blocked.load(Ordering::Relaxed) {
            return self.go();
        }
        if P::is_slow() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.writable.is_none() {
            match self.twin() {
                Ok(twin) => self.writable = Some(twin),
                // The socket is gone, or descriptors are short: the next send call tells.
                Err(_) => self.socket.blocked.store(false, Ordering::Relaxed),
            }
        }
        let Some(fd) = &self.writable else {
            return self.go();
        };
        loop {
            let mut guard = ready!(fd.poll_write_ready(cx))?;
            if is_writable(fd.get_ref()) {
                self.socket.blocked.store(false, Ordering::Relaxed);
                drop(guard);
                return self.go();
            }
            guard.clear_ready();
            // News in the error queue looks like the end of writing, which nothing clears.
            if guard.ready().is_write_closed() {
                drop(guard);
                self.socket.hear(&self.socket.current());
                self.writable = None;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }
}

/// Those that are still sockets of ours.
fn own<'s>(currents: &'s [RwLockReadGuard<'_, Current>]) -> impl Iterator<Item = &'s UdpSocket> {
    let ours = currents.iter().filter(|current| current.is_ours());
    ours.map(|current| current.socket())
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

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::super::socket::{Unpaced, bind};
    use super::*;

    type Subject = Arc<Watched<Unpaced>>;

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(test);
    }

    fn subject(any_port: bool, within: Option<Duration>) -> (Subject, mpsc::Receiver<News>) {
        let (news, heard) = mpsc::channel(16);
        let options = WrapOptions {
            max_datagram: 1472,
            news: Some(news),
            replace: Replace {
                bind: Box::new(bind),
                any_port,
                within,
            },
            inspects: true,
        };
        let socket = bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("bound");
        (Watched::start(socket, options).expect("wrapped"), heard)
    }

    fn descriptor(subject: &Subject) -> i32 {
        subject.current().socket().as_raw_fd()
    }

    fn send(subject: &Subject, to: SocketAddr) {
        let sent = subject.try_send(&Transmit {
            destination: to,
            ecn: None,
            contents: b"x",
            segment_size: None,
            src_ip: None,
        });
        sent.expect("no error that ends a connection");
    }

    async fn receive(subject: &Subject) -> io::Result<usize> {
        let mut buffer = [0; 1472];
        let mut meta = [RecvMeta::default()];
        let mut bufs = [IoSliceMut::new(&mut buffer)];
        poll_fn(|cx| subject.poll_recv(cx, &mut bufs, &mut meta)).await
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn one_that_is_gone_is_replaced_though_others_stand_beside_it() {
        run(async {
            let (subject, mut heard) = subject(false, None);
            let peer = UdpSocket::bind("127.0.0.1:0").expect("bound");
            let peer = peer.local_addr().expect("bound");
            let _beside = subject.beside(peer, None).expect("beside");
            // SAFETY: closing any number is harmless here, and this one is what is tested.
            unsafe { libc::close(descriptor(&subject)) };
            subject.inspect();
            replaced(&mut heard).await;
            serves(&subject).await;
        });
    }

    #[test]
    fn a_port_that_was_given_back_with_something_to_read_blocks_nobody() {
        run(async {
            let (subject, _heard) = subject(false, None);
            let at = subject.local_addr().expect("bound");
            let peer = UdpSocket::bind("127.0.0.1:0").expect("bound");
            for _ in 0..2 {
                peer.send_to(b"y", at).expect("sent");
            }
            // The socket is known to be readable from then on.
            assert_eq!(receive(&subject).await.expect("received"), 1);
            subject.release();
            let nothing = timeout(Duration::from_millis(50), receive(&subject)).await;
            assert!(nothing.is_err());
        });
    }

    /// The socket with all that is bound to its port goes on as if nothing had been.
    async fn serves(subject: &Subject) {
        let at = subject.local_addr().expect("bound");
        let peer = UdpSocket::bind("127.0.0.1:0").expect("bound");
        peer.send_to(b"y", at).expect("sent");
        let received = timeout(Duration::from_secs(10), receive(subject)).await;
        assert_eq!(received.expect("in time").expect("received"), 1);
        send(subject, peer.local_addr().expect("bound"));
        let (_, from) = peer.recv_from(&mut [0; 1]).expect("received");
        assert_eq!(from, at);
    }

    async fn replaced(heard: &mut mpsc::Receiver<News>) {
        let told = timeout(Duration::from_secs(10), async {
            assert!(matches!(heard.recv().await, Some(News::Gone)));
            assert!(matches!(heard.recv().await, Some(News::Replaced)));
        });
        told.await.expect("in time");
    }

    /// Takes the descriptor away, and with it the port, unless a duplicate is kept.
    fn put_in_place(of: i32) {
        let other = std::fs::File::open("/dev/null").expect("open");
        // SAFETY: two descriptors that live; the test does not use the old one any more.
        assert_eq!(unsafe { libc::dup2(other.as_raw_fd(), of) }, of);
    }

    #[test]
    fn a_closed_descriptor_is_replaced_at_the_same_port() {
        run(async {
            let (subject, mut heard) = subject(false, None);
            let port = subject.local_addr().expect("bound").port();
            serves(&subject).await;
            // SAFETY: the descriptor is the subject's, which is to bear this.
            unsafe { libc::close(descriptor(&subject)) };
            send(&subject, SocketAddr::from(([127, 0, 0, 1], 9)));
            replaced(&mut heard).await;
            assert_eq!(subject.local_addr().expect("bound").port(), port);
            serves(&subject).await;
        });
    }

    #[test]
    fn a_descriptor_of_another_file_is_replaced_though_nothing_is_sent_and_left_alone() {
        run(async {
            let (subject, mut heard) = subject(false, None);
            let old = descriptor(&subject);
            put_in_place(old);
            replaced(&mut heard).await;
            assert_ne!(descriptor(&subject), old);
            serves(&subject).await;
            // SAFETY: asks for flags alone; then it is the test's to close.
            assert!(unsafe { libc::fcntl(old, libc::F_GETFD) } >= 0);
            unsafe { libc::close(old) };
        });
    }

    #[test]
    fn who_needs_the_port_waits_for_it_and_ends_in_the_end() {
        run(async {
            let (subject, mut heard) = subject(false, Some(Duration::from_millis(700)));
            let kept = subject.current().socket().try_clone().expect("a duplicate");
            put_in_place(descriptor(&subject));
            send(&subject, SocketAddr::from(([127, 0, 0, 1], 9)));
            assert!(matches!(heard.recv().await, Some(News::Gone)));
            let ended = timeout(Duration::from_secs(10), receive(&subject)).await;
            let error = ended.expect("in time").expect_err("an end");
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            assert_eq!(
                subject.lost().map(|e| e.kind()),
                Some(io::ErrorKind::AddrInUse)
            );
            drop(kept);
        });
    }

    #[test]
    fn who_only_dials_takes_another_port() {
        run(async {
            let (subject, mut heard) = subject(true, None);
            let port = subject.local_addr().expect("bound").port();
            let kept = subject.current().socket().try_clone().expect("a duplicate");
            put_in_place(descriptor(&subject));
            send(&subject, SocketAddr::from(([127, 0, 0, 1], 9)));
            replaced(&mut heard).await;
            assert_ne!(subject.local_addr().expect("bound").port(), port);
            serves(&subject).await;
            drop(kept);
        });
    }

    #[test]
    fn a_port_that_was_given_back_leaves_no_descriptor_to_other_programs() {
        run(async {
            let (subject, _heard) = subject(false, None);
            let closes = || {
                // SAFETY: of a descriptor that lives.
                unsafe { libc::fcntl(descriptor(&subject), libc::F_GETFD) & libc::FD_CLOEXEC != 0 }
            };
            assert!(closes());
            subject.release();
            assert!(closes());
        });
    }

    #[test]
    fn a_port_that_was_given_back_stays_so() {
        run(async {
            let (subject, mut heard) = subject(false, None);
            let at = subject.local_addr().expect("bound");
            subject.release();
            send(&subject, SocketAddr::from(([127, 0, 0, 1], 9)));
            assert!(timeout(LOOK + TRIES.1, heard.recv()).await.is_err());
            bind(at).expect("free");
        });
    }
}
