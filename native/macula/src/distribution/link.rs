//! One link between two nodes: a QUIC connection, its control stream and its lanes.
//!
//! Life: the connection is up and the control stream open, frames are exchanged one per request
//! (authentication, then OTP's handshake); `start` opens the lane and hands what arrives to the
//! input process; the link ends when its owner dies, its handle is dropped, `stop` is called, or the
//! connection is lost. An end from this side lets what was sent before arrive: the lane is finished,
//! not cut, and the peer takes the end of the lane for the end of the link.
//!
//! Tasks hold the `Link`, never the handle, so the collector can always reach the handle.

mod control;
mod handle;
mod liveness;
mod read;
pub(super) mod write;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustler::LocalPid;
use tokio::sync::{Notify, mpsc, watch};

use crate::engine::transport::{
    Connection, ConnectionError, ConnectionStats, ReadError, RecvStream, SendStream, VarInt,
    WriteError,
};
use crate::vm::objects::{Counted, Kind};
use crate::vm::tasks::{Held, attempt};

use super::driver::Driver;
use super::frame::{self, FrameError};
use super::lent::Lent;
use super::messages::{Input, Reply, Why};
use super::outgoing::Outgoing;
use super::recv::fence::{Fence, FenceError};
use super::send::lane::Lane;
use super::send::router::ReportError;
use super::socket::plain;
use super::strangers::Slot;
use super::streams::{Carrier, Streams};
use super::tls;

pub(crate) use handle::LinkHandle;
pub(crate) use liveness::Look;

use control::control_task;
use liveness::{EARLY, Refusal, Watch, turn};
use read::{CREDIT, least_credit};
use write::{Lanes, Survey, Writer};

/// What the transport holds at least that is not yet acknowledged, in bytes.
pub(crate) const SEND_WINDOW_MIN: u64 = 256 * 1024;
/// What the transport holds beyond the peer's window.
const SEND_AHEAD_MAX: u64 = 1024 * 1024;
/// Ticks do not wait for the acknowledgement of data.
const CONTROL_RESERVE: u64 = 16 * 1024;
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
    /// Senders that were told to wait.
    pub(crate) held: AtomicU64,
}

/// A connection whose control stream is open.
pub(crate) struct Met {
    pub(crate) connection: Connection,
    pub(crate) streams: (Held<SendStream>, Held<RecvStream>),
    pub(crate) driver: Arc<Driver>,
}

/// What holds for all links of an endpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// A peer is gone after this long without a sign of life of its transport.
    pub(crate) liveness: Duration,
    /// One lane: one order of all that is sent on a link.
    pub(crate) single: bool,
    /// User streams that a peer may have open at a time; 0 for none at all.
    pub(crate) streams: u32,
    /// Bytes of a lane that may be under way, or unread.
    pub(crate) window: u32,
}

pub(crate) struct Link {
    connection: Connection,
    control: mpsc::UnboundedSender<Control>,
    driver: Arc<Driver>,
    outgoing: Outgoing,
    /// One lane, and one order of all that is sent.
    single: bool,
    /// When the path was looked at last.
    surveyed: Mutex<Option<Survey>>,
    /// What was known of the connection at the last look.
    known: Mutex<Known>,
    /// Bytes written to the lane and not yet acknowledged.
    send_window: AtomicU64,
    send_window_max: u64,
    /// What is reserved beyond that.
    reserved: AtomicU64,
    /// Streams of the users' own.
    streams: Streams,
    writer: Arc<Writer>,
    /// When the last batch came, in nanoseconds since `born`.
    last_batch: AtomicU64,
    born: Instant,
    /// The lanes, from `start` on. Held for no longer than it takes to write what there is.
    lanes: Lent<Option<Lanes>>,
    /// How far the peer's lanes are.
    fence: Mutex<Fence>,
    /// A lane may go on.
    fence_moved: [Notify; 2],
    /// The control task knows that there is something to report.
    reporting: AtomicBool,
    credit: AtomicI64,
    credited: [Notify; 2],
    pub(crate) counters: Counters,
    stop: watch::Sender<bool>,
    /// Why the link has ended: what was wrong first.
    end: OnceLock<Why>,
    started: AtomicBool,
    /// The peer is trusted, and its transport does not know yet what it may do.
    untold: AtomicBool,
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

enum Control {
    Send(Bytes, Reply),
    Receive(Reply),
    Tick,
    /// Something that the peer's transport answers, and its VM does not see.
    Probe,
    Start(Input),
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
    Connection(#[from] ConnectionError),
    #[error("frame: {0}")]
    Frame(#[from] FrameError),
    #[error("marks: {0}")]
    Fence(#[from] FenceError),
    #[error("report: {0}")]
    Report(#[from] ReportError),
    #[error("a lane of number {0}")]
    Lane(u16),
    #[error("a third lane")]
    ThirdLane,
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
                | StreamError::ThirdLane
                | StreamError::Credit
        )
    }

    fn why(&self) -> Why {
        match self {
            StreamError::Read(ReadError::ConnectionLost(e))
            | StreamError::Write(WriteError::ConnectionLost(e))
            | StreamError::Connection(e) => e.into(),
            StreamError::Panicked => Why::Internal,
            e if e.is_the_peers_mistake() => Why::Protocol(e.to_string()),
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
        rules: Rules,
        rhythm: Arc<Notify>,
    ) -> Arc<Link> {
        let Rules {
            liveness,
            single,
            streams,
            window,
        } = rules;
        let Met {
            connection,
            streams: control_stream,
            driver,
        } = met;
        let (control, commands) = mpsc::unbounded_channel();
        let writer = crate::vm::runtime::dist().bell();
        let known = Known::of(&connection);
        let link = Arc::new(Link {
            connection,
            control,
            driver,
            lanes: Lent::new(None, writer.clone()),
            fence: Mutex::default(),
            fence_moved: [Notify::new(), Notify::new()],
            reporting: AtomicBool::new(false),
            outgoing: Outgoing::new(single),
            single,
            surveyed: Mutex::new(None),
            known: Mutex::new(known),
            send_window: AtomicU64::new(SEND_WINDOW_MIN),
            send_window_max: u64::from(window) + SEND_AHEAD_MAX,
            reserved: AtomicU64::new(0),
            streams: Streams::new(streams),
            writer: Arc::new(Writer(writer)),
            last_batch: AtomicU64::new(0),
            born: Instant::now(),
            credit: AtomicI64::new(CREDIT),
            credited: [Notify::new(), Notify::new()],
            counters: Counters::default(),
            stop: watch::Sender::new(false),
            end: OnceLock::new(),
            started: AtomicBool::new(false),
            untold: AtomicBool::new(false),
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
        self.command(Control::Start(Input::new(input)))
    }

    fn command(&self, command: Control) -> Result<(), ()> {
        self.control
            .send(command)
            .map_err(|refused| match refused.0 {
                // The NIF's result tells the caller.
                Control::Send(_, reply) | Control::Receive(reply) => reply.forget(),
                Control::Start(input) => input.forget(),
                Control::Tick | Control::Probe | Control::Delivered | Control::Credit { .. } => (),
            })
    }

    /// The peer is who it says: it no longer counts as a stranger, may open its lanes, and is looked at
    /// from now on. `liveness` is the peer's own.
    pub(crate) fn trust(&self, liveness: Duration) {
        self.slot().take();
        self.untold.store(true, Ordering::Release);
        let mut watch = self.watch();
        watch.liveness = watch.liveness.min(liveness);
        watch.next = Some(Instant::now() + turn(watch.liveness));
        drop(watch);
        self.rhythm.notify_one();
    }

    /// Tells the transport of a trusted peer what it may do from now on: together with the next frame, as a
    /// packet of its own costs both ends as much as the frame. The peer's lanes begin later than that frame.
    fn tell_trust(&self) {
        if self.untold.swap(false, Ordering::AcqRel) {
            self.connection
                .set_max_concurrent_uni_streams(VarInt::from_u32(Lane::ALL.len() as u32));
            // Each stream has its limit; a common one would let a full lane stop the control stream.
            self.connection.set_receive_window(VarInt::MAX);
        }
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
        let visit = self.driver.visit();
        match visit {
            Some(_undisturbed) => self.look_up(),
            None => *self.known.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    fn refusal(&self) -> MutexGuard<'_, Option<Refusal>> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Also by a failure of this side.
    pub(crate) fn is_closed(&self) -> bool {
        attempt(|| self.connection.close_reason().is_some()) != Ok(false)
    }

    fn close(&self, code: u32, reason: &str) {
        // Where driving it has failed nothing is left to close.
        let _ = attempt(|| {
            self.connection
                .close(VarInt::from_u32(code), reason.as_bytes());
        });
    }

    /// Completes when driving the connection has failed.
    async fn driver_failed(&self) {
        self.driver.fate().failed().await;
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

    pub(crate) async fn stopped(&self) {
        // The sender lives in `self`, so this can't fail.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Ends the link because of the peer's mistake, or our own. Answers what was wrong first.
    fn abort(&self, error: &StreamError) -> &Why {
        let end = self.end.get_or_init(|| error.why());
        // First: the end of a stream that is dropped must not look like one in order.
        self.stop();
        let code = match error {
            StreamError::Panicked => CODE_INTERNAL,
            error if error.is_the_peers_mistake() => CODE_PROTOCOL,
            _ => return end,
        };
        self.close(code, &error.to_string());
        end
    }
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

    fn ask_for_streams(&self, open: u64) {
        self.give_stream_credit(frame::CONTROL, open);
    }

    fn end_for_overrun(&self) {
        self.abort(&StreamError::Credit);
    }
}
