//! One link between two nodes: a QUIC connection, its control stream and its lanes.
//!
//! Life: the connection is up and the control stream open, frames are exchanged one per request
//! (authentication, then OTP's handshake); `start` opens the lane and hands what arrives to the
//! input process; the link ends when its owner dies, its handle is dropped, `stop` is called, or the
//! connection is lost. An end from this side lets what was sent before arrive: the lane is finished,
//! not cut, and the peer takes the end of the lane for the end of the link.
//!
//! Tasks hold the `Link`, never the handle, so the collector can always reach the handle.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{Connection, ReadError, RecvStream, SendStream, VarInt, WriteError};
use rustler::{Env, LocalPid, Monitor, Resource, ResourceArc};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::timeout;

use crate::vm::bell::Bell;
use crate::vm::fault::{self, Point};
use crate::vm::objects::{Counted, Kind};
use crate::vm::tasks::{Held, attempt, contain};

use super::driver::Driver;
use super::endpoint::{LANES, Met};
use super::frame::{self, Assembler, FrameError, Splitter};
use super::incoming::Batch;
use super::messages::{self, Reply, Why};
use super::outgoing::{Frames, Outgoing, Pushed};
use super::socket::plain;
use super::strangers::Slot;
use super::tls;
use crate::vm::boost;

/// A handshake frame is a few hundred bytes: node names, flags, digests.
const MAX_CONTROL_FRAME: usize = 64 * 1024;
/// Bytes delivered to the input process and not yet given back as credit. Enough to keep it busy; more
/// only lets it run further ahead of those that receive.
const CREDIT: i64 = 512 * 1024;
/// A delivery is at most about this big, so that it is handled while the next one is read.
const DELIVERY: usize = 256 * 1024;
/// How long an ending link tries to bring out what was sent before.
const LINGER: Duration = Duration::from_millis(500);
/// How long it waits for the peer to acknowledge the end.
const FAREWELL: Duration = Duration::from_secs(1);

/// A peer whose host says so often, for so long, that it has no such port, and that is not heard of
/// meanwhile, is gone.
const REFUSALS: u32 = 3;
const REFUSED_FOR: Duration = Duration::from_secs(1);

/// A batch of up to this size is sent by the process that brings it.
const INLINE_BYTES: usize = 8 * 1024;
/// Unless the last batch was this short a time ago: where many processes send, the native thread
/// puts several batches into one packet.
const INLINE_PAUSE: Duration = Duration::from_micros(20);

const CONTROL_PRIORITY: i32 = 1 << 20;

/// The code the connection is closed with when the link ends in order.
pub(crate) const CODE_END: u32 = 0;
/// The peer broke the rules of the wire.
const CODE_PROTOCOL: u32 = 1;
/// This end has failed.
const CODE_INTERNAL: u32 = 2;

/// Counters of a link, for net ticks and for people. A packet counts when it is a packet of the
/// distribution: what the transport itself sends and receives is no sign of life of a VM.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) packets_in: AtomicU64,
    pub(crate) packets_out: AtomicU64,
    pub(crate) bytes_in: AtomicU64,
    pub(crate) bytes_out: AtomicU64,
    /// Datagrams that the peer's host, or whoever says so, had no port for.
    pub(crate) refused: AtomicU64,
}

pub(crate) struct Link {
    connection: Held<Connection>,
    /// The last handle but one takes the connection's lock in its destructor, as the last one does, when
    /// the driver is gone: a stream's is neither while this is there.
    _spare: Held<Connection>,
    control: mpsc::UnboundedSender<Control>,
    driver: Option<Arc<Driver>>,
    outgoing: Outgoing,
    writer: Arc<Writer>,
    /// When the last batch came, in nanoseconds since `born`.
    last_batch: AtomicU64,
    born: Instant,
    /// The lane, from `start` on. Held for no longer than it takes to write what there is.
    lane: Mutex<Option<Held<SendStream>>>,
    /// The writer found the lane taken, and is to be woken.
    passed_over: AtomicBool,
    credit: AtomicI64,
    credited: Notify,
    pub(crate) counters: Counters,
    stop: watch::Sender<bool>,
    started: AtomicBool,
    /// A process that sent has panicked in it.
    failed: AtomicBool,
    refusal: Mutex<Option<Refusal>>,
    role: Role,
    watch: Mutex<Watch>,
    /// Tells the endpoint that `watch` has another rhythm.
    rhythm: Arc<Notify>,
    /// Held until the peer is trusted: only so many strangers are let in at a time.
    slot: Mutex<Option<Slot>>,
    _counted: Counted,
}

/// Which end of the connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Asks a silent peer for signs of life; one end is enough.
    Dialler,
    Acceptor,
}

/// What is to be done after a look at a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    Nothing,
    /// A datagram that only a host without such a port answers.
    Knock,
}

/// The signs of life of the peer's transport.
struct Watch {
    /// The smaller one of both ends: a peer is gone after this long without a sign.
    liveness: Duration,
    /// None at the acceptor's end before the peer has proven itself.
    next: Option<Instant>,
    /// Datagrams received at the last look.
    heard: u64,
    /// Looks since then that found nothing new.
    silent: u32,
}

/// Looks in the liveness time. The dialler asks for a sign of life at the second look that finds nothing
/// new, and the peer is gone at the next. The acceptor waits for one look more.
const LOOKS: u32 = 5;
/// Until the link is up its dialler looks this often: one that meets a node in the moment of its end is
/// to know at once, as the node that follows may be waiting for this very link.
const EARLY: Duration = Duration::from_millis(500);

/// The peer's host has refused datagrams, and nothing has come from the peer since.
struct Refusal {
    since: Instant,
    count: u32,
    /// Datagrams received before.
    heard: u64,
}

/// Wakes the lane's writer: there is something to write, or room for it. Whoever writes, it is this
/// task that is woken by a stream that has room again: the stream remembers only one.
struct Writer(Arc<Bell>);

impl Wake for Writer {
    fn wake(self: Arc<Self>) {
        self.0.ring_here();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.ring_here();
    }
}

enum Control {
    Send(Bytes, Reply),
    Receive(Reply),
    Tick,
    /// Something that the peer's transport answers, and its VM does not see.
    Probe,
    Start(LocalPid),
}

/// What went wrong with a stream of the link.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("read: {0}")]
    Read(#[from] ReadError),
    #[error("write: {0}")]
    Write(#[from] WriteError),
    #[error("connection: {0}")]
    Connection(#[from] quinn::ConnectionError),
    #[error("frame: {0}")]
    Frame(#[from] FrameError),
    #[error("ended by the peer")]
    Ended,
    #[error("too many peers that have not proven themselves")]
    Evicted,
    #[error("the input process is gone")]
    NoInput,
    #[error("a task has panicked")]
    Panicked,
}

impl StreamError {
    fn why(&self) -> Why {
        match self {
            StreamError::Read(ReadError::ConnectionLost(e))
            | StreamError::Write(WriteError::ConnectionLost(e))
            | StreamError::Connection(e) => e.into(),
            StreamError::Frame(_) => Why::Protocol,
            StreamError::Panicked => Why::Internal,
            _ => Why::Closed,
        }
    }
}

impl Link {
    /// Starts a link on a connection whose control stream is open.
    pub(crate) fn spawn(
        met: Met,
        role: Role,
        slot: Option<Slot>,
        liveness: Duration,
        rhythm: Arc<Notify>,
    ) -> Arc<Link> {
        let Met {
            connection,
            streams,
            driver,
        } = met;
        let (control, commands) = mpsc::unbounded_channel();
        let link = Arc::new(Link {
            _spare: Held::new(connection.clone()),
            connection: Held::new(connection),
            control,
            driver,
            lane: Mutex::new(None),
            passed_over: AtomicBool::new(false),
            outgoing: Outgoing::default(),
            writer: Arc::new(Writer(crate::vm::runtime::dist().bell())),
            last_batch: AtomicU64::new(0),
            born: Instant::now(),
            credit: AtomicI64::new(CREDIT),
            credited: Notify::new(),
            counters: Counters::default(),
            stop: watch::Sender::new(false),
            started: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            refusal: Mutex::new(None),
            role,
            watch: Mutex::new(Watch {
                liveness,
                next: (role == Role::Dialler).then(|| Instant::now() + EARLY),
                heard: 0,
                silent: 0,
            }),
            rhythm,
            slot: Mutex::new(slot),
            _counted: Counted::new(Kind::Link),
        });
        crate::vm::runtime::dist().spawn(control_task(link.clone(), streams, commands));
        link
    }

    /// Sends one frame on the control stream; answered when the transport has taken it.
    pub(crate) fn control_send(&self, frame: Bytes, reply: Reply) -> Result<(), ()> {
        self.command(Control::Send(frame, reply))
    }

    /// Asks for one frame of the control stream.
    pub(crate) fn control_receive(&self, reply: Reply) -> Result<(), ()> {
        self.command(Control::Receive(reply))
    }

    /// Sends an empty packet past all data.
    pub(crate) fn tick(&self) -> Result<(), ()> {
        self.command(Control::Tick)
    }

    /// From now on packets are delivered to `input`, and the lane is open for sending.
    pub(crate) fn start(&self, input: LocalPid) -> Result<(), ()> {
        self.command(Control::Start(input))
    }

    fn command(&self, command: Control) -> Result<(), ()> {
        self.control
            .send(command)
            .map_err(|refused| match refused.0 {
                // The NIF's result tells the caller.
                Control::Send(_, reply) | Control::Receive(reply) => reply.forget(),
                Control::Tick | Control::Probe | Control::Start(_) => (),
            })
    }

    /// The peer is who it says: it no longer counts as a stranger, may open its lanes, and is looked at
    /// from now on. `liveness` is the peer's own.
    pub(crate) fn trust(&self, liveness: Duration) {
        self.slot().take();
        self.connection
            .set_max_concurrent_uni_streams(VarInt::from_u32(LANES));
        // Each stream has its limit; a common one would let a full lane stop the control stream.
        self.connection.set_receive_window(VarInt::MAX);
        let mut watch = self.watch();
        watch.liveness = watch.liveness.min(liveness);
        watch.next = Some(Instant::now() + watch.liveness / LOOKS);
        drop(watch);
        self.rhythm.notify_one();
    }

    pub(crate) fn next_look(&self) -> Option<Instant> {
        self.watch().next
    }

    /// Looks for signs of life, if that is due soon.
    pub(crate) fn look(&self) -> Look {
        let mut watch = self.watch();
        let is_up = self.started.load(Ordering::Acquire);
        let turn = if is_up { watch.liveness / LOOKS } else { EARLY };
        let now = Instant::now();
        let Some(due) = watch.next.filter(|due| *due <= now + turn / 4) else {
            return Look::Nothing;
        };
        watch.next = Some(now + turn);
        let heard = self.connection.stats().udp_rx.datagrams;
        // After a stop of the whole process the peer's datagrams may still wait in the socket.
        let late = now.saturating_duration_since(due) >= turn / 2;
        if heard != watch.heard || late {
            watch.heard = heard;
            watch.silent = 0;
            return Look::Knock;
        }
        if !is_up {
            // The handshake has timeouts of its own: a dead peer's successor answers with a reset.
            if self.role == Role::Dialler {
                let _ = self.command(Control::Probe);
            }
            return Look::Nothing;
        }
        watch.silent += 1;
        match (self.role, watch.silent) {
            (_, 1) => Look::Knock,
            (Role::Dialler, 2) => {
                let _ = self.command(Control::Probe);
                Look::Nothing
            }
            (Role::Dialler, _) | (Role::Acceptor, 4..) => {
                self.connection.close(VarInt::from_u32(CODE_END), b"");
                Look::Nothing
            }
            (Role::Acceptor, _) => Look::Knock,
        }
    }

    /// Queues packets. A small batch is sent by this very call where that is possible.
    pub(crate) fn send(&self, frames: Frames, pid: LocalPid) -> Pushed {
        let _sending = Sending(self);
        let (bytes, count) = (frames.bytes, frames.count as u64);
        let pushed = self.outgoing.push(frames, pid);
        fault::pass(Point::LinkSend);
        if pushed != Pushed::Closed {
            self.counters
                .packets_out
                .fetch_add(count, Ordering::Relaxed);
            let now = self.born.elapsed().as_nanos() as u64;
            let last = self.last_batch.swap(now, Ordering::Relaxed);
            let inline = pushed == Pushed::Ok
                && bytes <= INLINE_BYTES
                && now.saturating_sub(last) >= INLINE_PAUSE.as_nanos() as u64;
            if !inline || !self.send_inline() {
                self.writer.0.ring();
            }
        }
        pushed
    }

    /// Brings the queue out from the calling thread. False when the native thread must see to it.
    fn send_inline(&self) -> bool {
        // The driver first: whoever has it may hold the connection's lock for long.
        let Some(mut visit) = self.driver.as_ref().and_then(|driver| driver.visit()) else {
            return false;
        };
        let Some(mut lane) = self.try_lane() else {
            return false;
        };
        let Some(stream) = &mut *lane else {
            return false;
        };
        let written = self.write(stream);
        // The lane is free before the packets are encrypted and sent.
        drop(lane);
        if self.passed_over.swap(false, Ordering::SeqCst) {
            self.writer.0.ring();
        }
        visit.drive();
        // A full stream wakes the writer; an error is the writer's to report.
        !matches!(written, Poll::Ready(Err(_)))
    }

    /// Moves what is queued into the stream; pending when the stream is full.
    fn write(&self, stream: &mut SendStream) -> Poll<Result<(), StreamError>> {
        let waker = Waker::from(self.writer.clone());
        let cx = &mut Context::from_waker(&waker);
        let mut pieces: [Bytes; 32] = std::array::from_fn(|_| Bytes::new());
        loop {
            let count = self.outgoing.take(&mut pieces);
            if count == 0 {
                return Poll::Ready(Ok(()));
            }
            let mut done = 0;
            while done < count {
                let polled = pin!(stream.write_chunks(&mut pieces[done..count])).poll(cx);
                match polled {
                    Poll::Ready(Ok(written)) => {
                        done += written.chunks;
                        self.counters
                            .bytes_out
                            .fetch_add(written.bytes as u64, Ordering::Relaxed);
                        if let Some(pid) = self.outgoing.written(written.bytes) {
                            messages::writable(&pid);
                        }
                    }
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e.into())),
                    Poll::Pending => {
                        self.outgoing.put_back(&mut pieces[done..count]);
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    /// Hands what has arrived to the input process.
    fn deliver(&self, batch: &mut Batch, input: &LocalPid) -> Result<(), StreamError> {
        if batch.is_empty() {
            return Ok(());
        }
        boost::delivered(batch.count());
        self.counters
            .packets_in
            .fetch_add(batch.count() as u64, Ordering::Relaxed);
        self.credit.fetch_sub(batch.cost() as i64, Ordering::AcqRel);
        if batch.deliver(input) {
            Ok(())
        } else {
            Err(StreamError::NoInput)
        }
    }

    pub(crate) fn queued_bytes(&self) -> usize {
        self.outgoing.bytes()
    }

    /// The input process has handled deliveries of this cost.
    pub(crate) fn give_credit(&self, cost: i64) {
        let before = self.credit.fetch_add(cost, Ordering::AcqRel);
        if before <= 0 && before + cost > 0 {
            self.credited.notify_one();
        }
    }

    /// Ends the link in order. Safe from any thread.
    pub(crate) fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// A datagram to the peer was refused by its host. That may be made up: a peer that lives answers
    /// what it is sent now, and one that is gone has the rest refused, too. At the first refusal it
    /// answers how often to knock from now on.
    pub(crate) fn refused(&self) -> Option<Duration> {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        let heard = self.connection.stats().udp_rx.datagrams;
        let time = REFUSED_FOR.max(4 * self.connection.rtt());
        let mut refusal = self.refusal();
        match &mut *refusal {
            Some(known) if known.heard == heard => {
                known.count += 1;
                if known.count >= REFUSALS && known.since.elapsed() >= time {
                    self.connection.close(VarInt::from_u32(CODE_END), b"");
                }
                None
            }
            other => {
                *other = Some(Refusal {
                    since: Instant::now(),
                    count: 1,
                    heard,
                });
                let _ = self.command(Control::Probe);
                // One more than needed ends the link right after the time is over.
                Some(time / REFUSALS + Duration::from_millis(10))
            }
        }
    }

    /// Datagrams have been refused and nothing has been heard since.
    pub(crate) fn is_in_doubt(&self) -> bool {
        let heard = self.connection.stats().udp_rx.datagrams;
        !self.is_closed()
            && self
                .refusal()
                .as_ref()
                .is_some_and(|known| known.heard == heard)
    }

    fn refusal(&self) -> MutexGuard<'_, Option<Refusal>> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Also when Quinn has failed.
    pub(crate) fn is_closed(&self) -> bool {
        attempt(|| self.connection.close_reason().is_some()) != Ok(false)
    }

    fn close(&self, code: u32, reason: &str) {
        // Where Quinn has failed nothing is left to close.
        let _ = attempt(|| {
            self.connection
                .close(VarInt::from_u32(code), reason.as_bytes())
        });
    }

    /// Completes when Quinn's driver has failed, which wakes nobody any more.
    async fn driver_failed(&self) {
        match &self.driver {
            Some(driver) => driver.fate().failed().await,
            None => std::future::pending().await,
        }
    }

    pub(crate) fn peer(&self) -> SocketAddr {
        plain(self.connection.remote_address())
    }

    /// A value only the two ends of this very TLS session know.
    pub(crate) fn exporter(&self) -> Option<[u8; 32]> {
        let mut value = [0; 32];
        self.connection
            .export_keying_material(&mut value, tls::EXPORTER_LABEL, b"")
            .ok()?;
        Some(value)
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    fn slot(&self) -> MutexGuard<'_, Option<Slot>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_lane(&self) -> Option<MutexGuard<'_, Option<Held<SendStream>>>> {
        match self.lane.try_lock() {
            Ok(lane) => Some(lane),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn lane(&self) -> MutexGuard<'_, Option<Held<SendStream>>> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn stopped(&self) {
        // The sender lives in `self`, so this can't fail.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Ends the link because of the peer's mistake, or our own.
    fn abort(&self, error: &StreamError) {
        // First: the end of a stream that is dropped must not look like one in order.
        self.stop();
        let code = match error {
            StreamError::Frame(_) => CODE_PROTOCOL,
            StreamError::Panicked => CODE_INTERNAL,
            _ => return,
        };
        self.close(code, &error.to_string());
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if attempt(|| self.connection.close_reason()).is_err() {
            // Quinn has failed. So the destructors of our handles do not take the poisoned lock.
            for _ in 0..2 {
                std::mem::forget((*self.connection).clone());
            }
        }
    }
}

/// A process that sends. A panic may have lost a part of what it sent: the link ends.
struct Sending<'l>(&'l Link);

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.outgoing.close();
            self.0.failed.store(true, Ordering::Release);
            self.0.stop();
        }
    }
}

async fn control_task(
    link: Arc<Link>,
    (mut send, mut recv): (Held<SendStream>, Held<RecvStream>),
    commands: mpsc::UnboundedReceiver<Control>,
) {
    let _ = attempt(|| send.set_priority(CONTROL_PRIORITY));
    let evicted = link.slot().as_ref().map(Slot::evicted).unwrap_or_default();
    let ended = tokio::select! {
        ended = contain(control_loop(&link, &mut send, &mut recv, commands)) => {
            Some(ended.unwrap_or(StreamError::Panicked))
        }
        () = link.stopped() => None,
        () = evicted.notified() => Some(StreamError::Evicted),
        () = link.driver_failed() => Some(StreamError::Panicked),
    };
    if let Some(error) = ended {
        link.abort(&error);
    }
    link.outgoing.close();
    link.writer.0.ring();
    if !link.started.load(Ordering::Acquire) {
        // No lane: what was sent here last must still arrive, such as why a peer is refused.
        let farewell = contain(async {
            let _ = send.finish();
            send.stopped().await
        });
        tokio::select! {
            _ = timeout(FAREWELL, farewell) => (),
            () = link.driver_failed() => (),
        }
        link.close(CODE_END, "");
    }
    // With a lane, its writer closes the connection.
}

async fn control_loop(
    link: &Arc<Link>,
    send: &mut SendStream,
    recv: &mut RecvStream,
    mut commands: mpsc::UnboundedReceiver<Control>,
) -> StreamError {
    match control_rounds(link, send, recv, &mut commands).await {
        Ok(never) => match never {},
        Err(e) => e,
    }
}

async fn control_rounds(
    link: &Arc<Link>,
    send: &mut SendStream,
    recv: &mut RecvStream,
    commands: &mut mpsc::UnboundedReceiver<Control>,
) -> Result<std::convert::Infallible, StreamError> {
    let mut splitter = Splitter::default();
    let mut waiting: Option<Reply> = None;
    let mut started = false;
    let mut open = true;
    loop {
        fault::pass(Point::LinkControl);
        // One frame per request until the handshake is over; after that every frame is a tick.
        while started || waiting.is_some() {
            match splitter.next(if started { 0 } else { MAX_CONTROL_FRAME })? {
                Some(frame) => match waiting.take() {
                    Some(reply) => reply.ok(&frame),
                    None => {
                        link.counters.packets_in.fetch_add(1, Ordering::Relaxed);
                    }
                },
                None if open => break,
                None if started => break,
                None => return Err(StreamError::Ended),
            }
        }
        tokio::select! {
            command = commands.recv() => match command {
                Some(Control::Send(frame, reply)) => {
                    send.write_all(&frame::packet_header(frame.len())?).await?;
                    send.write_chunk(frame).await?;
                    reply.ok(&[]);
                }
                Some(Control::Tick) => {
                    link.counters.packets_out.fetch_add(1, Ordering::Relaxed);
                    send_pair(send, &frame::packet_header(0)?).await?;
                }
                Some(Control::Probe) => send_pair(send, &frame::epoch_mark(0)).await?,
                Some(Control::Receive(reply)) => waiting = Some(reply),
                Some(Control::Start(input)) => {
                    started = true;
                    if !link.started.swap(true, Ordering::AcqRel) {
                        crate::vm::runtime::dist().spawn(write_task(link.clone()));
                        crate::vm::runtime::dist().spawn(read_task(link.clone(), input));
                    }
                }
                // The sender lives in the link, which this task holds.
                None => return Err(StreamError::Ended),
            },
            chunk = recv.read_chunk(MAX_CONTROL_FRAME, true), if open && (started || waiting.is_some()) => {
                match chunk? {
                    Some(chunk) => splitter.push(&chunk.bytes),
                    // The lane tells when the link ends, after all its data.
                    None => open = false,
                }
            }
        }
    }
}

/// Sends a frame, and a mark without meaning in a packet of its own: the peer acknowledges the second
/// packet at once (RFC 9000, section 13.2.2), and need not wake up once more to acknowledge the first.
async fn send_pair(send: &mut SendStream, frame: &[u8]) -> Result<(), WriteError> {
    send.write_all(frame).await?;
    // The connection's driver runs now.
    tokio::task::yield_now().await;
    send.write_all(&frame::epoch_mark(0)).await
}

async fn write_task(link: Arc<Link>) {
    let ended = tokio::select! {
        ended = contain(write_loop(&link)) => ended.unwrap_or(Err(StreamError::Panicked)),
        () = link.stopped() => Ok(()),
    };
    let mut ended = match link.failed.load(Ordering::Acquire) {
        true => Err(StreamError::Panicked),
        false => ended,
    };
    // What is queued still goes out, if the peer takes it soon.
    if ended.is_ok() && !link.outgoing.is_empty() {
        let lingering = timeout(LINGER, contain(write_loop(&link)));
        if let Ok(Err(_)) = lingering.await {
            ended = Err(StreamError::Panicked);
        }
    }
    if let Err(error) = &ended {
        link.abort(error);
    }
    let lane = link.lane().take();
    if let Some(mut lane) = lane
        && ended.is_ok()
    {
        let farewell = contain(async {
            let _ = lane.finish();
            lane.stopped().await
        });
        tokio::select! {
            _ = timeout(FAREWELL, farewell) => (),
            () = link.driver_failed() => (),
        }
    }
    link.stop();
    link.close(CODE_END, "");
}

/// Brings queued frames out until the queue is closed and empty.
async fn write_loop(link: &Link) -> Result<(), StreamError> {
    if link.lane().is_none() {
        let mut stream = Held::new(link.connection.open_uni().await?);
        stream.write_all(&frame::preamble(0)).await?;
        *link.lane() = Some(stream);
    }
    loop {
        fault::pass(Point::LinkWrite);
        // This thread serves all links: it waits for no process that the system has taken off its
        // processor while it was writing.
        let written = match link.try_lane() {
            Some(mut lane) => match &mut *lane {
                Some(stream) => link.write(stream),
                None => return Ok(()),
            },
            None => {
                link.passed_over.store(true, Ordering::SeqCst);
                match link.try_lane() {
                    Some(lane) => {
                        drop(lane);
                        continue;
                    }
                    None => Poll::Pending,
                }
            }
        };
        match written {
            Poll::Ready(Ok(())) if *link.stop.borrow() => return Ok(()),
            Poll::Ready(written) => written?,
            Poll::Pending => (),
        }
        link.writer.0.rung().await;
    }
}

async fn read_task(link: Arc<Link>, input: LocalPid) {
    let error = tokio::select! {
        error = contain(read_loop(&link, &input)) => error.unwrap_or(StreamError::Panicked),
        () = link.stopped() => StreamError::Ended,
    };
    link.abort(&error);
    // Always the last message, after all that was delivered.
    messages::link_closed(&input, &error.why());
}

async fn read_loop(link: &Link, input: &LocalPid) -> StreamError {
    match read_rounds(link, input).await {
        Ok(never) => match never {},
        Err(e) => e,
    }
}

async fn read_rounds(
    link: &Link,
    input: &LocalPid,
) -> Result<std::convert::Infallible, StreamError> {
    let mut stream = Held::new(link.connection.accept_uni().await?);
    let mut assembler = Assembler::new(frame::MAX_PAYLOAD);
    let mut batch = Batch::new();
    let mut chunks: [Bytes; 32] = std::array::from_fn(|_| Bytes::new());
    loop {
        while link.credit.load(Ordering::Acquire) <= 0 {
            link.credited.notified().await;
        }
        fault::pass(Point::LinkRead);
        // All that is there, up to a delivery's size, goes to the VM in one message.
        let read = loop {
            let holding = !batch.is_empty();
            let polled = poll_fn(|cx| {
                let read = pin!(stream.read_chunks(&mut chunks)).poll(cx);
                match read {
                    Poll::Pending if holding => Poll::Ready(None),
                    Poll::Pending => Poll::Pending,
                    Poll::Ready(read) => Poll::Ready(Some(read)),
                }
            })
            .await;
            let Some(Ok(Some(count))) = polled else {
                break polled;
            };
            let bytes: usize = chunks[..count].iter().map(Bytes::len).sum();
            link.counters
                .bytes_in
                .fetch_add(bytes as u64, Ordering::Relaxed);
            let mut delivered = false;
            for chunk in &mut chunks[..count] {
                let chunk = std::mem::take(chunk);
                assembler.push(&chunk, &mut batch)?;
                if batch.cost() >= DELIVERY {
                    link.deliver(&mut batch, input)?;
                    delivered = true;
                }
            }
            if delivered {
                break None;
            }
        };
        link.deliver(&mut batch, input)?;
        match read {
            None | Some(Ok(Some(_))) => (),
            Some(Ok(None)) => return Err(StreamError::Ended),
            Some(Err(e)) => return Err(e.into()),
        }
        // A long stream of data must not keep the other tasks of this thread from running.
        tokio::task::coop::consume_budget().await;
    }
}

/// The VM's handle on a link.
pub(crate) struct LinkHandle {
    pub(crate) link: Arc<Link>,
    owner: Mutex<Option<Monitor>>,
}

#[rustler::resource_impl]
impl Resource for LinkHandle {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, monitor: Monitor) {
        let owner = self.owner.lock().unwrap_or_else(PoisonError::into_inner);
        // A monitor that was replaced is no longer of interest.
        if owner.as_ref() == Some(&monitor) {
            self.link.stop();
        }
    }
}

impl LinkHandle {
    pub(crate) fn new(link: Arc<Link>) -> ResourceArc<Self> {
        ResourceArc::new(Self {
            link,
            owner: Mutex::new(None),
        })
    }

    /// Makes the process the owner. False when it is dead already.
    pub(crate) fn own(this: &ResourceArc<Self>, env: Env<'_>, pid: &LocalPid) -> bool {
        let mut owner = this.owner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = owner.take() {
            this.demonitor(Some(env), &old);
        }
        *owner = this.monitor(Some(env), pid);
        owner.is_some()
    }
}

impl Drop for LinkHandle {
    fn drop(&mut self) {
        self.link.stop();
    }
}
