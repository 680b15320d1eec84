//! What is queued goes into the lanes, from the process that sends or from the native thread.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use crate::engine::transport::SendStream;
use bytes::Bytes;
use rustler::LocalPid;
use tokio::time::timeout;

use super::super::frame;
use super::super::messages;
use super::super::outgoing::{Frames, Pushed};
use super::super::send::lane::Lane;
use super::super::send::queue::Hold;
use super::{CODE_END, CONTROL_RESERVE, Link, SEND_WINDOW_MIN, StreamError};
use crate::vm::bell::Bell;
use crate::vm::fault::{self, Point};
use crate::vm::tasks::{Held, contain};

/// How long an ending link tries to bring out what was sent before.
const LINGER: Duration = Duration::from_millis(500);

/// How long it waits for the peer to acknowledge the end.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);

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

/// Express may have so much more than bulk on its way.
const EXPRESS_RESERVE: u64 = 1024 * 1024;

const EXPRESS_PRIORITY: i32 = 1 << 10;

/// The lanes of the own direction.
pub(super) struct Lanes {
    express: Held<SendStream>,
    /// Opened for the first that goes into it.
    bulk: Option<Held<SendStream>>,
    /// The transport takes more than bulk may have.
    reserved: bool,
}

/// The last look at a path.
pub(super) struct Survey {
    at: Instant,
    /// Packets lost until then.
    lost: u64,
    /// The path counts as one that loses packets.
    lossy_until: Instant,
}

/// Wakes the lane's writer: there is something to write, or room for it. Whoever writes, it is this
/// task that is woken by a stream that has room again: the stream remembers only one.
pub(super) struct Writer(pub(super) Arc<Bell>);

impl Wake for Writer {
    fn wake(self: Arc<Self>) {
        self.0.ring_here();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.ring_here();
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

impl Link {
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
        let Some(mut visit) = self.driver.visit() else {
            return false;
        };
        let Some(mut lanes) = self.lanes.borrow() else {
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
        if room {
            self.writer.0.ring();
        }
        visit.drive();
        // A full stream wakes the writer; an error is the writer's to report.
        !matches!(written, Poll::Ready(Err(_)))
    }

    /// Ends a link at rest from the calling thread: the peer hears of the end before others hear what this node
    /// says next. Whatever this leaves is the native thread's.
    pub(super) fn end_inline(&self) {
        let Some(mut visit) = self.driver.visit() else {
            return;
        };
        let Some(mut lanes) = self.lanes.borrow() else {
            return;
        };
        let Some(open) = &mut *lanes else {
            return;
        };
        if open.bulk.is_some() || !self.outgoing.is_empty() {
            return;
        }
        // Fails only on a stream that is over.
        let _ = open.express.finish();
        drop(lanes);
        visit.drive();
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
    pub(super) fn tell(&self) {
        let room = self.outgoing.room();
        if let Some(output) = room.writable {
            messages::writable(&output);
        }
        if let Some((output, free)) = room.free {
            messages::free(&output, &free);
        }
    }

    /// The marks follow the path. True when more may be written than before.
    pub(super) fn survey(&self) -> bool {
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
        let window = send_window(path.cwnd, now < lossy_until, self.single);
        let window = window.min(self.send_window_max);
        self.send_window.store(window, Ordering::Relaxed);
        self.reserve(0);
        true
    }
}

/// What the transport holds of what was written: what may be under way, and more.
pub(in crate::distribution) fn send_window(cwnd: u64, lossy: bool, single: bool) -> u64 {
    // What follows a lost packet is held until that packet has come: a round trip more, or two.
    // Bulk in its own lane keeps nobody waiting there.
    let rounds = if lossy || !single { 3 } else { 1 };
    let ahead = if single {
        SEND_AHEAD_SINGLE
    } else {
        SEND_AHEAD
    };
    (rounds * cwnd + ahead).max(SEND_WINDOW_MIN)
}

pub(super) async fn write_task(link: Arc<Link>) {
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
    let lanes = link.lanes.lock().take();
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
    let is_new = link.lanes.lock().is_none();
    if is_new {
        let express = open(link, Lane::Express).await?;
        *link.lanes.lock() = Some(Lanes {
            express,
            bulk: None,
            reserved: false,
        });
    }
    let mut has_bulk = !is_new
        && link
            .lanes
            .lock()
            .as_ref()
            .is_some_and(|lanes| lanes.bulk.is_some());
    loop {
        fault::pass(Point::LinkWrite);
        if !has_bulk && link.outgoing.is_wanted(Lane::Bulk) {
            has_bulk = true;
            let bulk = open(link, Lane::Bulk).await?;
            if let Some(lanes) = &mut *link.lanes.lock() {
                lanes.bulk = Some(bulk);
            }
        }
        // This thread serves all links: it waits for no process that the system has taken off its
        // processor while it was writing.
        let mut room = false;
        let written = match link.lanes.try_lock() {
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
            None => Poll::Pending,
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
