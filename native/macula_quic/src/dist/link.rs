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
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, ReadError, RecvStream, SendStream, VarInt, WriteError};
use rustler::{Env, LocalPid, Monitor, Resource, ResourceArc};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::timeout;

use super::endpoint::Slot;
use super::frame::{self, Assembler, FrameError, Splitter};
use super::incoming::Batch;
use super::messages::{self, Reply, Why};
use super::outgoing::Outgoing;
use super::socket::plain;
use super::tls;

/// A handshake frame is a few hundred bytes: node names, flags, digests.
const MAX_CONTROL_FRAME: usize = 64 * 1024;
/// Bytes delivered to the input process and not yet given back as credit.
const CREDIT: i64 = 2 * 1024 * 1024;
/// A delivery is at most about this big, so that it is handled while the next one is read.
const DELIVERY: usize = 256 * 1024;
/// How long an ending link tries to bring out what was sent before.
const LINGER: Duration = Duration::from_millis(500);
/// How long it waits for the peer to acknowledge the end.
const FAREWELL: Duration = Duration::from_secs(1);

const CONTROL_PRIORITY: i32 = 1 << 20;

/// The code the connection is closed with when the link ends in order.
pub(crate) const CODE_END: u32 = 0;
/// The peer broke the rules of the wire.
const CODE_PROTOCOL: u32 = 1;

/// Counters of a link, for net ticks and for people. A packet counts when it is a packet of the
/// distribution: what the transport itself sends and receives is no sign of life of a VM.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) packets_in: AtomicU64,
    pub(crate) packets_out: AtomicU64,
    pub(crate) bytes_in: AtomicU64,
    pub(crate) bytes_out: AtomicU64,
}

pub(crate) struct Link {
    connection: Connection,
    control: mpsc::UnboundedSender<Control>,
    pub(crate) outgoing: Outgoing,
    pub(crate) queued: Notify,
    credit: AtomicI64,
    credited: Notify,
    pub(crate) counters: Counters,
    stop: watch::Sender<bool>,
    started: AtomicBool,
    /// Held until the peer is trusted: only so many strangers are let in at a time.
    slot: Mutex<Option<Slot>>,
}

enum Control {
    Send(Bytes, Reply),
    Receive(Reply),
    Tick,
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
    #[error("the input process is gone")]
    NoInput,
}

impl StreamError {
    fn why(&self) -> Why {
        match self {
            StreamError::Read(ReadError::ConnectionLost(e))
            | StreamError::Write(WriteError::ConnectionLost(e))
            | StreamError::Connection(e) => e.into(),
            StreamError::Frame(_) => Why::Protocol,
            _ => Why::Closed,
        }
    }
}

impl Link {
    /// Starts a link on a connection whose control stream is open.
    pub(crate) fn spawn(
        connection: Connection,
        streams: (SendStream, RecvStream),
        slot: Option<Slot>,
    ) -> Arc<Link> {
        let (control, commands) = mpsc::unbounded_channel();
        let link = Arc::new(Link {
            connection,
            control,
            outgoing: Outgoing::default(),
            queued: Notify::new(),
            credit: AtomicI64::new(CREDIT),
            credited: Notify::new(),
            counters: Counters::default(),
            stop: watch::Sender::new(false),
            started: AtomicBool::new(false),
            slot: Mutex::new(slot),
        });
        crate::runtime::dist().spawn(control_task(link.clone(), streams, commands));
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
                Control::Tick | Control::Start(_) => (),
            })
    }

    /// The peer is who it says: it no longer counts as a stranger.
    pub(crate) fn trusted(&self) {
        self.slot
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
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

    pub(crate) fn is_closed(&self) -> bool {
        self.connection.close_reason().is_some()
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

    async fn stopped(&self) {
        // The sender lives in `self`, so this can't fail.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Ends the link because of the peer's mistake.
    fn abort(&self, error: &StreamError) {
        if let StreamError::Frame(e) = error {
            let reason = e.to_string();
            self.connection
                .close(VarInt::from_u32(CODE_PROTOCOL), reason.as_bytes());
        }
        self.stop();
    }
}

async fn control_task(
    link: Arc<Link>,
    (mut send, mut recv): (SendStream, RecvStream),
    commands: mpsc::UnboundedReceiver<Control>,
) {
    let _ = send.set_priority(CONTROL_PRIORITY);
    let ended = tokio::select! {
        ended = control_loop(&link, &mut send, &mut recv, commands) => Some(ended),
        () = link.stopped() => None,
    };
    if let Some(error) = ended {
        link.abort(&error);
    }
    link.outgoing.close();
    link.queued.notify_one();
    if !link.started.load(Ordering::Acquire) {
        // No lane: what was sent here last must still arrive, such as why a peer is refused.
        let _ = send.finish();
        let _ = timeout(FAREWELL, send.stopped()).await;
        link.connection.close(VarInt::from_u32(CODE_END), b"");
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
                    send.write_all(&frame::packet_header(0)?).await?;
                    link.counters.packets_out.fetch_add(1, Ordering::Relaxed);
                }
                Some(Control::Receive(reply)) => waiting = Some(reply),
                Some(Control::Start(input)) => {
                    started = true;
                    if !link.started.swap(true, Ordering::AcqRel) {
                        link.trusted();
                        crate::runtime::dist().spawn(write_task(link.clone()));
                        crate::runtime::dist().spawn(read_task(link.clone(), input));
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

async fn write_task(link: Arc<Link>) {
    let mut lane = None;
    let ended = tokio::select! {
        ended = write_loop(&link, &mut lane) => ended,
        () = link.stopped() => Ok(()),
    };
    // What is queued still goes out, if the peer takes it soon.
    if ended.is_ok() && !link.outgoing.is_empty() {
        let _ = timeout(LINGER, write_loop(&link, &mut lane)).await;
    }
    if let Some(mut lane) = lane
        && ended.is_ok()
    {
        let _ = lane.finish();
        let _ = timeout(FAREWELL, lane.stopped()).await;
    }
    link.stop();
    link.connection.close(VarInt::from_u32(CODE_END), b"");
}

/// Brings queued frames out until the queue is closed and empty.
async fn write_loop(link: &Link, lane: &mut Option<SendStream>) -> Result<(), StreamError> {
    if lane.is_none() {
        let mut stream = link.connection.open_uni().await?;
        stream.write_all(&frame::preamble(0)).await?;
        *lane = Some(stream);
    }
    let Some(stream) = lane else { return Ok(()) };
    let mut pieces: [Bytes; 32] = std::array::from_fn(|_| Bytes::new());
    loop {
        let count = link.outgoing.take(&mut pieces);
        if count == 0 {
            if *link.stop.borrow() {
                return Ok(());
            }
            link.queued.notified().await;
            continue;
        }
        let mut rest = &mut pieces[..count];
        while !rest.is_empty() {
            let written = stream.write_chunks(rest).await?;
            rest = &mut rest[written.chunks..];
            link.counters
                .bytes_out
                .fetch_add(written.bytes as u64, Ordering::Relaxed);
            if let Some(pid) = link.outgoing.written(written.bytes) {
                messages::writable(&pid);
            }
        }
    }
}

async fn read_task(link: Arc<Link>, input: LocalPid) {
    let error = tokio::select! {
        error = read_loop(&link, &input) => error,
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
    let mut stream = link.connection.accept_uni().await?;
    let mut assembler = Assembler::new(frame::MAX_PAYLOAD);
    let mut batch = Batch::new();
    let mut chunks: [Bytes; 32] = std::array::from_fn(|_| Bytes::new());
    loop {
        while link.credit.load(Ordering::Acquire) <= 0 {
            link.credited.notified().await;
        }
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
            let mut bytes = 0;
            for chunk in &mut chunks[..count] {
                bytes += chunk.len();
                assembler.push(chunk, &mut batch)?;
                *chunk = Bytes::new();
            }
            link.counters
                .bytes_in
                .fetch_add(bytes as u64, Ordering::Relaxed);
            if batch.cost() >= DELIVERY {
                break None;
            }
        };
        if !batch.is_empty() {
            let cost = batch.cost() as i64;
            link.counters
                .packets_in
                .fetch_add(batch.count() as u64, Ordering::Relaxed);
            link.credit.fetch_sub(cost, Ordering::AcqRel);
            if !batch.deliver(input) {
                return Err(StreamError::NoInput);
            }
        }
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
            env.demonitor(this, &old);
        }
        *owner = env.monitor(this, pid);
        owner.is_some()
    }
}

impl Drop for LinkHandle {
    fn drop(&mut self) {
        self.link.stop();
    }
}
