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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{Connection, ConnectionStats, ReadError, RecvStream, SendStream, VarInt, WriteError};
use rustler::{Env, LocalPid, Monitor, Resource, ResourceArc};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{sleep_until, timeout};

use crate::engine::handle::Handle;
use crate::vm::bell::Bell;
use crate::vm::fault::{self, Point};
use crate::vm::locks::try_lock;
use crate::vm::objects::{Counted, Kind};
use crate::vm::tasks::{Held, attempt, contain, is_panicking};

use super::driver::Driver;
use super::frame::{self, Assembler, FrameError, Said, Splitter, Whole};
use super::incoming::Batch;
use super::messages::{self, Reply, Why};
use super::outgoing::{Frames, Outgoing, Pushed};
use super::recv::fence::{Fence, FenceError};
use super::send::lane::Lane;
use super::send::queue::Hold;
use super::send::router::ReportError;
use super::socket::plain;
use super::strangers::Slot;
use super::streams::{Carrier, Streams};
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

/// What a path takes in this time a sender may have in the queue, before it has to wait.
const MARK_TIME: Duration = Duration::from_millis(10);
/// How often the path is looked at while there is more to send than it takes.
const SURVEY: Duration = Duration::from_millis(10);
/// So long after a loss a path counts as one that loses packets.
const LOSSY: Duration = Duration::from_secs(1);
/// A sender that was let go and has sent nothing in this time does not use its turn.
const TURN: Duration = Duration::from_millis(2);
/// The transport holds what is under way, and so much more.
const SEND_AHEAD: u64 = 128 * 1024;
/// In a single lane everybody waits behind that.
const SEND_AHEAD_SINGLE: u64 = 64 * 1024;
pub(crate) const SEND_WINDOW_MIN: u64 = 256 * 1024;
const SEND_WINDOW_MAX: u64 = 5 * 1024 * 1024;
/// Express may have so much more than bulk on its way.
const EXPRESS_RESERVE: u64 = 1024 * 1024;
/// Deliveries of bulk are reported together.
const REPORT: Duration = Duration::from_millis(5);
/// Ticks do not wait for the acknowledgement of data.
const CONTROL_RESERVE: u64 = 16 * 1024;

const CONTROL_PRIORITY: i32 = 1 << 20;
const EXPRESS_PRIORITY: i32 = 1 << 10;

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
    /// Senders that were told to wait.
    pub(crate) held: AtomicU64,
}

/// A connection whose control stream is open.
pub(crate) struct Met {
    pub(crate) connection: Connection,
    pub(crate) streams: (Held<quinn::SendStream>, Held<quinn::RecvStream>),
    pub(crate) driver: Option<Arc<Driver>>,
}

pub(crate) struct Link {
    connection: Handle,
    control: mpsc::UnboundedSender<Control>,
    driver: Option<Arc<Driver>>,
    outgoing: Outgoing,
    /// One lane, and one order of all that is sent.
    single: bool,
    /// When the path was looked at last.
    surveyed: Mutex<Option<Survey>>,
    /// What was known of the connection at the last look.
    known: Mutex<Known>,
    /// Bytes written to the lane and not yet acknowledged.
    send_window: AtomicU64,
    /// What is reserved beyond that.
    reserved: AtomicU64,
    /// Streams of the users' own.
    streams: Streams,
    writer: Arc<Writer>,
    /// When the last batch came, in nanoseconds since `born`.
    last_batch: AtomicU64,
    born: Instant,
    /// The lanes, from `start` on. Held for no longer than it takes to write what there is.
    lanes: Mutex<Option<Lanes>>,
    /// How far the peer's lanes are.
    fence: Mutex<Fence>,
    /// A lane may go on.
    fence_moved: [Notify; 2],
    /// The control task knows that there is something to report.
    reporting: AtomicBool,
    /// The writer found the lanes taken, and is to be woken.
    passed_over: AtomicBool,
    credit: AtomicI64,
    credited: [Notify; 2],
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

/// The lanes of the own direction.
struct Lanes {
    express: Held<SendStream>,
    /// Opened for the first that goes into it.
    bulk: Option<Held<SendStream>>,
    /// The transport takes more than bulk may have.
    reserved: bool,
}

/// The express lane is read on when the bulk lane waits for the input process.
fn least_credit(lane: Lane) -> i64 {
    match lane {
        Lane::Express => -CREDIT,
        Lane::Bulk => 0,
    }
}

/// The last look at a path.
struct Survey {
    at: Instant,
    /// Packets lost until then.
    lost: u64,
    /// The path counts as one that loses packets.
    lossy_until: Instant,
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

/// What people ask of a connection.
#[derive(Clone, Copy)]
pub(crate) struct Known {
    pub(crate) stats: ConnectionStats,
    pub(crate) peer: SocketAddr,
}

impl Known {
    /// Waits for the connection's lock.
    fn of(connection: &Connection) -> Self {
        Known {
            stats: connection.stats(),
            peer: plain(connection.remote_address()),
        }
    }
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

/// Between two looks. The dialler asks for a sign of life at the second look that finds nothing new, and the
/// peer is gone at the next, which is the fourth after its last sign at most. The acceptor waits for one look
/// more, or for the end of the liveness time.
fn turn(liveness: Duration) -> Duration {
    liveness * 2 / 9
}

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
    /// Bulk packets have been delivered.
    Delivered,
    /// The peer may send so many bytes of a user stream.
    Credit {
        stream: u64,
        limit: u64,
    },
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
    #[error("marks: {0}")]
    Fence(#[from] FenceError),
    #[error("report: {0}")]
    Report(#[from] ReportError),
    #[error("a lane of number {0}")]
    Lane(u16),
    #[error("ended by the peer")]
    Ended,
    #[error("too many peers that have not proven themselves")]
    Evicted,
    #[error("more of a user stream than there was credit for")]
    Credit,
    #[error("the input process is gone")]
    NoInput,
    #[error("a task has panicked")]
    Panicked,
}

impl StreamError {
    fn is_the_peers_mistake(&self) -> bool {
        matches!(
            self,
            StreamError::Frame(_)
                | StreamError::Fence(_)
                | StreamError::Report(_)
                | StreamError::Lane(_)
                | StreamError::Credit
        )
    }

    fn why(&self) -> Why {
        match self {
            StreamError::Read(ReadError::ConnectionLost(e))
            | StreamError::Write(WriteError::ConnectionLost(e))
            | StreamError::Connection(e) => e.into(),
            StreamError::Panicked => Why::Internal,
            e if e.is_the_peers_mistake() => Why::Protocol,
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
        single: bool,
        streams: u32,
        rhythm: Arc<Notify>,
    ) -> Arc<Link> {
        let Met {
            connection,
            streams: control_stream,
            driver,
        } = met;
        let (control, commands) = mpsc::unbounded_channel();
        let known = Known::of(&connection);
        let link = Arc::new(Link {
            connection: Handle::new(connection),
            control,
            driver,
            lanes: Mutex::new(None),
            fence: Mutex::default(),
            fence_moved: [Notify::new(), Notify::new()],
            reporting: AtomicBool::new(false),
            passed_over: AtomicBool::new(false),
            outgoing: Outgoing::new(single),
            single,
            surveyed: Mutex::new(None),
            known: Mutex::new(known),
            send_window: AtomicU64::new(SEND_WINDOW_MIN),
            reserved: AtomicU64::new(0),
            streams: Streams::new(streams),
            writer: Arc::new(Writer(crate::vm::runtime::dist().bell())),
            last_batch: AtomicU64::new(0),
            born: Instant::now(),
            credit: AtomicI64::new(CREDIT),
            credited: [Notify::new(), Notify::new()],
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
        crate::vm::runtime::dist().spawn(control_task(link.clone(), control_stream, commands));
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
                Control::Tick
                | Control::Probe
                | Control::Start(_)
                | Control::Delivered
                | Control::Credit { .. } => (),
            })
    }

    /// The peer is who it says: it no longer counts as a stranger, may open its lanes, and is looked at
    /// from now on. `liveness` is the peer's own.
    pub(crate) fn trust(&self, liveness: Duration) {
        self.slot().take();
        self.connection
            .set_max_concurrent_uni_streams(VarInt::from_u32(Lane::ALL.len() as u32));
        // Each stream has its limit; a common one would let a full lane stop the control stream.
        self.connection.set_receive_window(VarInt::MAX);
        let mut watch = self.watch();
        watch.liveness = watch.liveness.min(liveness);
        watch.next = Some(Instant::now() + turn(watch.liveness));
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
        let turn = if is_up { turn(watch.liveness) } else { EARLY };
        let now = Instant::now();
        let Some(due) = watch.next.filter(|due| *due <= now + turn / 4) else {
            return Look::Nothing;
        };
        watch.next = Some(now + turn);
        let heard = self.look_up().stats.udp_rx.datagrams;
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
    /// Also answers the senders that have to wait.
    pub(crate) fn send(&self, frames: Frames, pid: LocalPid) -> (Pushed, Vec<Hold>) {
        let _sending = Sending(self);
        let (bytes, count) = (frames.bytes, frames.count as u64);
        let express = frames.is_express();
        let (pushed, hold) = self.outgoing.push(frames, pid);
        fault::pass(Point::LinkSend);
        self.counters
            .held
            .fetch_add(hold.len() as u64, Ordering::Relaxed);
        if pushed != Pushed::Closed {
            self.counters
                .packets_out
                .fetch_add(count, Ordering::Relaxed);
            let now = self.born.elapsed().as_nanos() as u64;
            let last = self.last_batch.swap(now, Ordering::Relaxed);
            let inline = pushed == Pushed::Ok
                && express
                && bytes <= INLINE_BYTES
                && now.saturating_sub(last) >= INLINE_PAUSE.as_nanos() as u64;
            if !inline || !self.send_inline() {
                self.writer.0.ring();
            }
        }
        (pushed, hold)
    }

    /// Brings the queue out from the calling thread. False when the native thread must see to it.
    fn send_inline(&self) -> bool {
        // The driver first: whoever has it may hold the connection's lock for long.
        let Some(mut visit) = self.driver.as_ref().and_then(|driver| driver.visit()) else {
            return false;
        };
        let Some(mut lanes) = try_lock(&self.lanes) else {
            return false;
        };
        let Some(open) = &mut *lanes else {
            return false;
        };
        let mut room = false;
        let written = self.write_express(open, &mut room);
        // The lanes are free before the packets are encrypted and sent.
        drop(lanes);
        // Messages leave from native threads only.
        if self.passed_over.swap(false, Ordering::SeqCst) || room {
            self.writer.0.ring();
        }
        visit.drive();
        // A full stream wakes the writer; an error is the writer's to report.
        !matches!(written, Poll::Ready(Err(_)))
    }

    /// Moves what is queued into the lanes; pending when one of them is full.
    /// `room` becomes true when somebody may be told of it.
    fn write(&self, lanes: &mut Lanes, room: &mut bool) -> Poll<Result<(), StreamError>> {
        let express = self.write_express(lanes, room);
        if matches!(express, Poll::Ready(Err(_))) {
            return express;
        }
        let Some(bulk) = &mut lanes.bulk else {
            return express;
        };
        if !self.outgoing.is_wanted(Lane::Bulk) {
            return express;
        }
        if std::mem::take(&mut lanes.reserved) {
            self.reserve(0);
        }
        match self.write_lane(Lane::Bulk, bulk, room) {
            Poll::Ready(Ok(())) => express,
            other => other,
        }
    }

    /// What bulk has written and the peer has not acknowledged keeps nothing out of the express lane.
    fn write_express(&self, lanes: &mut Lanes, room: &mut bool) -> Poll<Result<(), StreamError>> {
        if lanes.bulk.is_some() && !lanes.reserved && self.outgoing.is_wanted(Lane::Express) {
            lanes.reserved = true;
            self.reserve(EXPRESS_RESERVE);
        }
        self.write_lane(Lane::Express, &mut lanes.express, room)
    }

    fn write_lane(
        &self,
        lane: Lane,
        stream: &mut SendStream,
        room: &mut bool,
    ) -> Poll<Result<(), StreamError>> {
        let waker = Waker::from(self.writer.clone());
        let cx = &mut Context::from_waker(&waker);
        let mut pieces: [Bytes; 32] = std::array::from_fn(|_| Bytes::new());
        loop {
            let count = self.outgoing.take(lane, &mut pieces);
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
                        *room |= self.outgoing.written(lane, written.bytes);
                    }
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e.into())),
                    Poll::Pending => {
                        self.outgoing.put_back(lane, &mut pieces[done..count]);
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    /// Tells whoever waits for room that there is some. On native threads only.
    fn tell(&self) {
        let room = self.outgoing.room();
        if let Some(output) = room.writable {
            messages::writable(&output);
        }
        if let Some((output, free)) = room.free {
            messages::free(&output, &free);
        }
    }

    /// The marks follow the path. True when more may be written than before.
    fn survey(&self) -> bool {
        let now = Instant::now();
        let mut surveyed = self.surveyed.lock().unwrap_or_else(PoisonError::into_inner);
        if surveyed.as_ref().is_some_and(|last| now - last.at < SURVEY) {
            return false;
        }
        let path = self.look_up().stats.path;
        let before = surveyed.take();
        let lossy_until = match &before {
            Some(last) if last.lost != path.lost_packets => now + LOSSY,
            Some(last) => last.lossy_until,
            None => now,
        };
        *surveyed = Some(Survey {
            at: now,
            lost: path.lost_packets,
            lossy_until,
        });
        drop(surveyed);
        let micros = path.rtt.as_micros().max(1);
        let mark = u128::from(path.cwnd) * MARK_TIME.as_micros() / micros;
        self.outgoing
            .set_mark(usize::try_from(mark).unwrap_or(usize::MAX));
        // What follows a lost packet is held until that packet has come: a round trip more, or two.
        // Bulk in its own lane keeps nobody waiting there.
        let rounds = if now < lossy_until || !self.single {
            3
        } else {
            1
        };
        let ahead = if self.single {
            SEND_AHEAD_SINGLE
        } else {
            SEND_AHEAD
        };
        let window = (rounds * path.cwnd + ahead).clamp(SEND_WINDOW_MIN, SEND_WINDOW_MAX);
        self.send_window.store(window, Ordering::Relaxed);
        self.reserve(0);
        true
    }

    /// Room for what must not wait until the peer has acknowledged data.
    fn reserve(&self, bytes: u64) {
        self.reserved.store(bytes, Ordering::Relaxed);
        self.make_room_for_streams();
    }

    pub(crate) fn outgoing(&self) -> &Outgoing {
        &self.outgoing
    }

    fn fence(&self) -> MutexGuard<'_, Fence> {
        self.fence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn sender_mark(&self) -> usize {
        self.outgoing.mark()
    }

    /// Hands what has arrived to the input process.
    fn deliver(&self, lane: Lane, batch: &mut Batch, input: &LocalPid) -> Result<(), StreamError> {
        if batch.is_empty() {
            return Ok(());
        }
        let count = batch.count() as u64;
        boost::delivered(batch.count());
        self.counters.packets_in.fetch_add(count, Ordering::Relaxed);
        self.credit.fetch_sub(batch.cost() as i64, Ordering::AcqRel);
        if !batch.deliver(input) {
            return Err(StreamError::NoInput);
        }
        if self.fence().delivered(lane, count) {
            self.fence_moved[lane.other().index()].notify_one();
        }
        if lane == Lane::Bulk && !self.reporting.swap(true, Ordering::AcqRel) {
            let _ = self.command(Control::Delivered);
        }
        Ok(())
    }

    pub(crate) fn queued_bytes(&self) -> usize {
        self.outgoing.bytes()
    }

    /// The input process has handled deliveries of this cost.
    pub(crate) fn give_credit(&self, cost: i64) {
        let before = self.credit.fetch_add(cost, Ordering::AcqRel);
        for lane in Lane::ALL {
            let least = least_credit(lane);
            if before <= least && before + cost > least {
                self.credited[lane.index()].notify_one();
            }
        }
    }

    /// Ends the link in order. Safe from any thread.
    pub(crate) fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// What is known of the connection. Waits for the connection's lock.
    fn look_up(&self) -> Known {
        let known = Known::of(&self.connection);
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = known;
        known
    }

    /// What is known of the connection, now or, where somebody drives it and has its lock for as long as
    /// encrypting takes, at the last look.
    pub(crate) fn known(&self) -> Known {
        let visit = self.driver.as_ref().and_then(|driver| driver.visit());
        match visit {
            Some(_undisturbed) => self.look_up(),
            None => *self.known.lock().unwrap_or_else(PoisonError::into_inner),
        }
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

    /// Sends a frame, and a mark without meaning in a packet of its own: the peer acknowledges the second
    /// packet at once (RFC 9000, section 13.2.2), and need not wake up once more to acknowledge the first.
    /// Both leave at once, so that the peer wakes up for both.
    async fn send_pair(&self, send: &mut SendStream, frame: &[u8]) -> Result<(), WriteError> {
        for frame in [frame, &frame::mark(0)] {
            send.write_all(frame).await?;
            if let Some(driver) = &self.driver {
                driver.send_now();
            }
        }
        Ok(())
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

    fn lanes(&self) -> MutexGuard<'_, Option<Lanes>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) async fn stopped(&self) {
        // The sender lives in `self`, so this can't fail.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Ends the link because of the peer's mistake, or our own.
    fn abort(&self, error: &StreamError) {
        // First: the end of a stream that is dropped must not look like one in order.
        self.stop();
        let code = match error {
            StreamError::Panicked => CODE_INTERNAL,
            error if error.is_the_peers_mistake() => CODE_PROTOCOL,
            _ => return,
        };
        self.close(code, &error.to_string());
    }
}

/// A process that sends. A panic may have lost a part of what it sent: the link ends.
struct Sending<'l>(&'l Link);

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        if is_panicking() {
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
    let mut report_at: Option<tokio::time::Instant> = None;
    loop {
        fault::pass(Point::LinkControl);
        // One frame per request until the handshake is over; after that every frame is a tick.
        while started || waiting.is_some() {
            match splitter.next(if started { 0 } else { MAX_CONTROL_FRAME })? {
                // Serves to have the packet acknowledged.
                Some(Whole::Mark(0)) => (),
                Some(Whole::Mark(count)) => link.outgoing.delivered(count)?,
                Some(Whole::Credit { stream, limit }) => link.streams.granted(stream, limit),
                Some(Whole::Packet(frame)) => match waiting.take() {
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
                    link.reserve(CONTROL_RESERVE);
                    link.send_pair(send, &frame::packet_header(0)?).await?;
                }
                Some(Control::Probe) => {
                    link.reserve(CONTROL_RESERVE);
                    link.send_pair(send, &frame::mark(0)).await?;
                }
                Some(Control::Receive(reply)) => waiting = Some(reply),
                Some(Control::Start(input)) => {
                    started = true;
                    if !link.started.swap(true, Ordering::AcqRel) {
                        crate::vm::runtime::dist().spawn(write_task(link.clone()));
                        crate::vm::runtime::dist().spawn(read_task(link.clone(), input));
                    }
                }
                Some(Control::Credit { stream, limit }) => {
                    link.reserve(CONTROL_RESERVE);
                    send.write_all(&frame::credit(stream, limit)).await?;
                }
                Some(Control::Delivered) => {
                    report_at = Some(tokio::time::Instant::now() + REPORT);
                }
                // The sender lives in the link, which this task holds.
                None => return Err(StreamError::Ended),
            },
            () = sleep_until(report_at.unwrap_or_else(tokio::time::Instant::now)), if report_at.is_some() => {
                report_at = None;
                // What is delivered from here on is reported next time.
                link.reporting.store(false, Ordering::Release);
                let count = link.fence().count(Lane::Bulk);
                link.reserve(CONTROL_RESERVE);
                let sent = send.write_all(&frame::mark(count)).await;
                // A peer that ends the link hears no reports, and the rest of its lanes still comes.
                if let Err(WriteError::ConnectionLost(e)) = sent {
                    return Err(e.into());
                }
            }
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
    let lanes = link.lanes().take();
    if let Some(lanes) = lanes
        && ended.is_ok()
    {
        let farewell = contain(finish(&link, lanes));
        tokio::select! {
            _ = timeout(FAREWELL, farewell) => (),
            () = link.driver_failed() => (),
        }
    }
    link.stop();
    link.close(CODE_END, "");
}

/// Ends the lanes: express after all of bulk, as its end is the end of the link.
async fn finish(link: &Link, lanes: Lanes) -> Result<(), StreamError> {
    let Lanes {
        mut express, bulk, ..
    } = lanes;
    if let Some(mark) = link.outgoing.last_mark() {
        link.reserve(EXPRESS_RESERVE);
        express.write_all(&frame::mark(mark)).await?;
    }
    let _ = express.finish();
    if let Some(mut bulk) = bulk {
        let _ = bulk.finish();
        let _ = bulk.stopped().await;
    }
    let _ = express.stopped().await;
    Ok(())
}

/// Opens a lane.
async fn open(link: &Link, lane: Lane) -> Result<Held<SendStream>, StreamError> {
    let mut stream = Held::new(link.connection.open_uni().await?);
    if lane == Lane::Express {
        let _ = stream.set_priority(EXPRESS_PRIORITY);
    }
    link.reserve(CONTROL_RESERVE);
    stream
        .write_all(&frame::preamble(lane.index() as u16))
        .await?;
    Ok(stream)
}

/// Brings queued frames out until the queue is closed and empty.
async fn write_loop(link: &Link) -> Result<(), StreamError> {
    let is_new = link.lanes().is_none();
    if is_new {
        let express = open(link, Lane::Express).await?;
        *link.lanes() = Some(Lanes {
            express,
            bulk: None,
            reserved: false,
        });
    }
    let mut has_bulk = !is_new
        && link
            .lanes()
            .as_ref()
            .is_some_and(|lanes| lanes.bulk.is_some());
    loop {
        fault::pass(Point::LinkWrite);
        if !has_bulk && link.outgoing.is_wanted(Lane::Bulk) {
            has_bulk = true;
            let bulk = open(link, Lane::Bulk).await?;
            if let Some(lanes) = &mut *link.lanes() {
                lanes.bulk = Some(bulk);
            }
        }
        // This thread serves all links: it waits for no process that the system has taken off its
        // processor while it was writing.
        let mut room = false;
        let written = match try_lock(&link.lanes) {
            Some(mut lanes) => match &mut *lanes {
                Some(lanes) => {
                    let mut written = link.write(lanes, &mut room);
                    if written.is_pending() && link.survey() {
                        lanes.reserved = false;
                        written = link.write(lanes, &mut room);
                    }
                    written
                }
                None => return Ok(()),
            },
            None => {
                link.passed_over.store(true, Ordering::SeqCst);
                match try_lock(&link.lanes) {
                    Some(lanes) => {
                        drop(lanes);
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
        link.tell();
        if link.outgoing.awaits() {
            if timeout(TURN, link.writer.0.rung()).await.is_err() {
                link.outgoing.forget_awaited();
            }
        } else {
            link.writer.0.rung().await;
        }
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

/// Reads the lanes until the express lane ends, or one of them breaks.
async fn read_loop(link: &Link, input: &LocalPid) -> StreamError {
    let taken = AtomicU64::new(0);
    let first = match link.connection.accept_uni().await {
        Ok(first) => first,
        Err(e) => return e.into(),
    };
    let second = async {
        match link.connection.accept_uni().await {
            Ok(second) => read_lane(link, second, &taken, input).await,
            Err(e) => e.into(),
        }
    };
    tokio::select! {
        error = read_lane(link, first, &taken, input) => error,
        error = second => error,
    }
}

/// Reads one lane. The end of the bulk lane is no end.
async fn read_lane(
    link: &Link,
    stream: RecvStream,
    taken: &AtomicU64,
    input: &LocalPid,
) -> StreamError {
    match read_rounds(link, stream, taken, input).await {
        Ok(Lane::Express) => StreamError::Ended,
        Ok(Lane::Bulk) => {
            let ended = link.fence().ended(Lane::Bulk);
            match ended {
                Ok(()) => std::future::pending().await,
                Err(e) => e.into(),
            }
        }
        Err(e) => e,
    }
}

/// Answers which lane has ended.
async fn read_rounds(
    link: &Link,
    stream: RecvStream,
    taken: &AtomicU64,
    input: &LocalPid,
) -> Result<Lane, StreamError> {
    let mut stream = Held::new(stream);
    // Before the preamble there is nothing to deliver.
    let mut lane = Lane::Express;
    let mut assembler = Assembler::new(frame::MAX_PAYLOAD);
    let mut batch = Batch::new();
    let mut chunks: [Bytes; 32] = std::array::from_fn(|_| Bytes::new());
    loop {
        while link.credit.load(Ordering::Acquire) <= least_credit(lane) {
            link.credited[lane.index()].notified().await;
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
                let mut rest = &chunk[..];
                while let Some(said) = assembler.push(&mut rest, &mut batch)? {
                    match said {
                        Said::Lane(number) => {
                            lane = Lane::of(number).ok_or(StreamError::Lane(number))?;
                            let bit = 1 << lane.index();
                            if taken.fetch_or(bit, Ordering::AcqRel) & bit != 0 {
                                return Err(StreamError::Lane(number));
                            }
                        }
                        Said::Mark(mark) => {
                            link.deliver(lane, &mut batch, input)?;
                            await_mark(link, lane, mark).await?;
                        }
                    }
                }
                if batch.cost() >= DELIVERY {
                    link.deliver(lane, &mut batch, input)?;
                    delivered = true;
                }
            }
            if delivered {
                break None;
            }
        };
        link.deliver(lane, &mut batch, input)?;
        match read {
            None | Some(Ok(Some(_))) => (),
            Some(Ok(None)) => return Ok(lane),
            Some(Err(e)) => return Err(e.into()),
        }
        // A long stream of data must not keep the other tasks of this thread from running.
        tokio::task::coop::consume_budget().await;
    }
}

/// What stands before the mark is delivered.
async fn await_mark(link: &Link, lane: Lane, mark: u64) -> Result<(), StreamError> {
    let mut may_go = link.fence().mark(lane, mark)?;
    while !may_go {
        link.fence_moved[lane.index()].notified().await;
        may_go = link.fence().may_go(lane);
    }
    Ok(())
}

impl Carrier for Link {
    fn connection(&self) -> &Connection {
        &self.connection
    }

    fn streams(&self) -> &Streams {
        &self.streams
    }

    fn stop(&self) {
        Link::stop(self);
    }

    fn stops(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    fn make_room_for_streams(&self) {
        let window = self.send_window.load(Ordering::Relaxed);
        let reserved = self.reserved.load(Ordering::Relaxed);
        self.connection
            .set_send_window(window + reserved + self.streams.under_way());
    }

    fn give_stream_credit(&self, stream: u64, limit: u64) {
        let _ = self.command(Control::Credit { stream, limit });
    }

    fn end_for_overrun(&self) {
        self.abort(&StreamError::Credit);
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
