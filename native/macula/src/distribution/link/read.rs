//! The lanes of the peer, up to the input process.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use crate::engine::transport::RecvStream;
use bytes::Bytes;
use rustler::LocalPid;

use super::super::frame::{self, Assembler, Said};
use super::super::incoming::Batch;
use super::super::messages::Input;
use super::super::send::lane::Lane;
use super::{Control, Link, StreamError};
use crate::vm::boost;
use crate::vm::fault::{self, Point};
use crate::vm::tasks::{Held, contain};

/// Bytes delivered to the input process and not yet given back as credit. Enough to keep it busy; more
/// only lets it run further ahead of those that receive.
pub(super) const CREDIT: i64 = 512 * 1024;

/// A delivery is at most about this big, so that it is handled while the next one is read.
const DELIVERY: usize = 256 * 1024;

/// The express lane is read on when the bulk lane waits for the input process.
pub(super) fn least_credit(lane: Lane) -> i64 {
    match lane {
        Lane::Express => -CREDIT,
        Lane::Bulk => 0,
    }
}

impl Link {
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
}

pub(super) async fn read_task(link: Arc<Link>, input: Input) {
    let error = tokio::select! {
        error = contain(read_loop(&link, input.pid())) => error.unwrap_or(StreamError::Panicked),
        () = link.stopped() => StreamError::Ended,
    };
    let why = link.abort(&error);
    // Always the last message, after all that was delivered.
    input.close(why);
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
            Ok(second) => tokio::select! {
                error = read_lane(link, second, &taken, input) => error,
                error = third(link) => error,
            },
            Err(e) => e.into(),
        }
    };
    tokio::select! {
        error = read_lane(link, first, &taken, input) => error,
        error = second => error,
    }
}

/// The transport lets the peer have as many streams at a time as there are lanes: one more comes after another's end.
async fn third(link: &Link) -> StreamError {
    match link.connection.accept_uni().await {
        Ok(_) => StreamError::ThirdLane,
        // The lanes tell, after all their data.
        Err(_) => std::future::pending().await,
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
    // Before the preamble there is nothing to deliver, and no lane whose credit to wait for: word of that credit
    // comes once, and is the other stream's.
    let mut lane = Lane::Express;
    let mut begun = false;
    let mut assembler = Assembler::new(frame::MAX_PAYLOAD);
    let mut batch = Batch::new();
    let mut chunks: [Bytes; 32] = std::array::from_fn(|_| Bytes::new());
    loop {
        while begun && link.credit.load(Ordering::Acquire) <= least_credit(lane) {
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
                            begun = true;
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
