//! The receiving half: bytes are taken from QUIC for an owner that wants them, and credit follows.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::engine::transport::{ReadError, RecvStream, ResetError};
use bytes::Bytes;

use super::stream::{End, Inner, RecvStep};
use super::{INITIAL_CREDIT, Streams, ahead};
use crate::vm::fault::{self, Point};
use crate::vm::tasks::{Held, contain};

/// A message is at most this large, plus one chunk.
const MAX_MESSAGE: usize = 256 * 1024;
/// Chunks taken from QUIC in one call.
const CHUNKS: usize = 32;
/// What a stream may send ahead when its owner reads: its part of this, within these limits. All together get no more
/// than this, and the least for each.
const SHARED: u64 = 8 * 1024 * 1024;
const PART: (u64, u64) = (1024, 256 * 1024);
/// And while it is limited by that. Less than QUIC's own window for a stream, and what that is not
/// told of at once.
const MAX_WINDOW: u64 = 3 * 1024 * 1024;
/// What all streams of a link may have beyond their part.
const EXTRA: u64 = 16 * 1024 * 1024;
/// A window that is used up in so many round trips is too small.
const ROUND_TRIPS: u32 = 4;
const LEAST_ROUND: Duration = Duration::from_millis(5);

/// What was read and not yet given away.
#[derive(Default)]
pub(super) struct Buffer {
    chunks: Vec<Bytes>,
    size: usize,
    fin: bool,
}

impl Buffer {
    fn has_some(&self) -> bool {
        self.size > 0 || self.fin
    }

    /// Waits for something, and takes what else is there. Cancelled it has taken nothing.
    pub(super) async fn read(&mut self, stream: &mut RecvStream) -> Result<(), ReadError> {
        poll_fn(|cx| self.poll(stream, cx)).await
    }

    fn poll(
        &mut self,
        stream: &mut RecvStream,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), ReadError>> {
        let mut chunks: [Bytes; CHUNKS] = std::array::from_fn(|_| Bytes::new());
        while self.size < MAX_MESSAGE && !self.fin {
            let read = pin!(stream.read_chunks(&mut chunks)).poll(cx);
            match read {
                Poll::Ready(Ok(Some(count))) => {
                    for chunk in &mut chunks[..count] {
                        let chunk = std::mem::take(chunk);
                        self.size += chunk.len();
                        self.chunks.push(chunk);
                    }
                }
                Poll::Ready(Ok(None)) => self.fin = true,
                // It comes again at the next try.
                Poll::Ready(Err(_)) if self.has_some() => break,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending if self.has_some() => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// The credit of one stream.
struct Credit {
    consumed: u64,
    /// What the peer was told, and what it may send in any case.
    told: Option<u64>,
    granted: u64,
    /// The window: its part of what all share, and more.
    part: u64,
    extra: u64,
    /// When credit was given last.
    last: Option<Instant>,
}

impl Credit {
    fn new() -> Self {
        Credit {
            consumed: 0,
            told: None,
            granted: INITIAL_CREDIT,
            part: 0,
            extra: 0,
            last: None,
        }
    }

    /// The owner was given so many bytes: the peer may send more. False if it has sent more than it may.
    fn consumed(&mut self, inner: &Inner, bytes: usize) -> bool {
        self.consumed += bytes as u64;
        if self.consumed > self.granted {
            return false;
        }
        let has_enough = match self.told {
            None => self.consumed < ahead::FIRST,
            Some(told) => told.saturating_sub(self.consumed) > self.window() / 2,
        };
        if has_enough {
            return true;
        }
        self.share(inner.link.streams());
        let round = ROUND_TRIPS * inner.link.connection().rtt();
        if self
            .last
            .is_some_and(|last| last.elapsed() < round.max(LEAST_ROUND))
        {
            self.grow(inner);
        }
        self.last = Some(Instant::now());
        let limit = self.consumed + self.window();
        self.told = Some(limit);
        self.granted = self.granted.max(limit);
        inner.link.give_stream_credit(inner.id, limit);
        true
    }

    fn window(&self) -> u64 {
        self.part + self.extra
    }

    /// The part follows the number of streams.
    fn share(&mut self, streams: &Streams) {
        let (least, most) = PART;
        let part = (SHARED / streams.count().max(1) as u64).clamp(least, most);
        let others = streams.lent.load(Ordering::Relaxed) - self.part;
        let part = part.min(SHARED.saturating_sub(others)).max(least);
        streams.lent.store(others + part, Ordering::Relaxed);
        self.part = part;
    }

    /// The receiving half is over: others have what it had, and the peer is told that nothing of it is left here.
    /// Of a stream that came to its end with little the peer has not had a place.
    fn end(self, inner: &Inner) {
        let streams = inner.link.streams();
        streams.lent.fetch_sub(self.part, Ordering::Relaxed);
        streams.extra.fetch_sub(self.extra, Ordering::Relaxed);
        let is_whole = inner.is_read() && self.consumed < ahead::FIRST;
        if self.told.is_none() && !is_whole {
            inner.link.give_stream_credit(inner.id, 0);
        }
    }

    fn grow(&mut self, inner: &Inner) {
        let window = self.window();
        let more = window.min(MAX_WINDOW - window.min(MAX_WINDOW));
        let total = &inner.link.streams().extra;
        if total.fetch_add(more, Ordering::Relaxed) + more > EXTRA {
            total.fetch_sub(more, Ordering::Relaxed);
        } else {
            self.extra += more;
        }
    }
}

/// Serves the receiving half until it is over.
pub(super) async fn serve(inner: Arc<Inner>, mut stream: Held<RecvStream>, first: Option<Buffer>) {
    let mut credit = Credit::new();
    let ended = contain(rounds(&inner, &mut stream, &mut credit, first));
    if ended.await.is_err() {
        inner.cut(End::Failed);
    }
    credit.end(&inner);
    inner.recv_over();
    if inner.is_lost() {
        // Dropped before the connection is over it would be stopped.
        let _ = contain(inner.link.connection().closed()).await;
    }
}

async fn rounds(
    inner: &Inner,
    stream: &mut RecvStream,
    credit: &mut Credit,
    first: Option<Buffer>,
) {
    // The first data tells the owner that there is a stream.
    let mut force = first.is_some();
    let mut buffer = first.unwrap_or_default();
    loop {
        fault::pass(Point::DistStreamRead);
        let step = match inner.recv_step(buffer.has_some()) {
            RecvStep::Idle if force => RecvStep::Deliver,
            step => step,
        };
        match step {
            RecvStep::Cut(code) => {
                // Fails only on a stream that is over.
                let _ = stream.stop(code);
                return;
            }
            RecvStep::Lost => {
                // What has come is still for an owner that wants it.
                while buffer.has_some() || buffer.take_rest(stream) {
                    let fin = buffer.fin;
                    if !deliver(inner, &mut buffer, credit, std::mem::take(&mut force)) || fin {
                        return;
                    }
                }
                return;
            }
            RecvStep::Deliver => {
                let fin = buffer.fin;
                let told = deliver(inner, &mut buffer, credit, std::mem::take(&mut force));
                if told && fin {
                    return;
                }
                tokio::task::coop::consume_budget().await;
            }
            RecvStep::Read => tokio::select! {
                biased;
                () = inner.recv_bell.rung() => (),
                read = buffer.read(stream) => match read {
                    Ok(()) => (),
                    Err(ReadError::Reset(code)) => inner.cut(End::Reset(code)),
                    Err(_) => inner.cut(End::Lost),
                },
            },
            RecvStep::Idle => tokio::select! {
                biased;
                () = inner.recv_bell.rung() => (),
                reset = stream.received_reset(), if !buffer.fin => match reset {
                    Ok(Some(code)) => inner.cut(End::Reset(code)),
                    // All has come, and waits here or with QUIC.
                    Ok(None) => inner.recv_bell.rung().await,
                    Err(ResetError::ConnectionLost(_) | ResetError::ZeroRttRejected) => {
                        inner.cut(End::Lost);
                    }
                },
            },
        }
    }
}

/// False when the owner wants nothing now.
fn deliver(inner: &Inner, buffer: &mut Buffer, credit: &mut Credit, force: bool) -> bool {
    let parts = buffer.chunks.iter().map(|chunk| chunk.as_ref());
    if !inner.deliver(parts, buffer.size, buffer.fin, force) {
        return false;
    }
    let size = buffer.size;
    *buffer = Buffer::default();
    if !credit.consumed(inner, size) {
        inner.link.end_for_overrun();
    }
    true
}

impl Buffer {
    /// What QUIC still has of a link that is gone. False when there is nothing.
    fn take_rest(&mut self, stream: &mut RecvStream) -> bool {
        let waker = std::task::Waker::noop();
        let read = self.poll(stream, &mut Context::from_waker(waker));
        matches!(read, Poll::Ready(Ok(()))) && self.has_some()
    }
}
