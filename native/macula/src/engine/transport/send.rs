//! The sending half of a stream.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use quinn_proto::{self as proto, ClosedStream, FinishError, StreamId, VarInt, Written};

use super::errors::{StoppedError, WriteError};
use super::shares::Had;
use super::state::{Alive, Guard, Shared};

/// Dropped as it is, the stream is finished.
pub(crate) struct SendStream {
    connection: Arc<Alive>,
    id: StreamId,
    /// What was written.
    had: Had,
    /// The stream began as early data.
    early: bool,
}

impl SendStream {
    pub(super) fn new(connection: Arc<Alive>, id: StreamId, early: bool) -> Self {
        SendStream {
            connection,
            id,
            had: Had::default(),
            early,
        }
    }

    pub(crate) fn id(&self) -> StreamId {
        self.id
    }

    fn is_rejected(&self, state: &Guard<'_>) -> bool {
        self.early && state.has_rejected_early()
    }

    /// Writes at most so many bytes as `write` is told.
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(&mut proto::SendStream<'_>, usize) -> Result<Written, proto::WriteError>,
    ) -> Poll<Result<Written, WriteError>> {
        let mut state = self.connection.lock();
        if self.is_rejected(&state) {
            return Poll::Ready(Err(WriteError::ZeroRttRejected));
        }
        if let Some(error) = &state.error {
            return Poll::Ready(Err(error.clone().into()));
        }
        let Some(most) = state.shares.allow(&mut self.had) else {
            // Behind those that were woken with this one.
            drop(state);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        };
        let written = match write(&mut state.proto.send_stream(self.id), most) {
            Ok(written) => {
                self.had.add(written.bytes);
                Ok(written)
            }
            Err(proto::WriteError::Blocked) => {
                state.shares.wait(self.id, &mut self.had);
                state.writers.insert(self.id, cx.waker().clone());
                return Poll::Pending;
            }
            Err(proto::WriteError::Stopped(code)) => Err(WriteError::Stopped(code)),
            Err(proto::WriteError::ClosedStream) => Err(WriteError::ClosedStream),
        };
        drop(state);
        if written.is_ok() {
            self.connection.wake();
        }
        Poll::Ready(written)
    }

    /// Takes some of it, at once.
    pub(crate) fn poll_bytes(
        &mut self,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<Result<usize, WriteError>> {
        let written = self.poll_write(cx, |stream, most| {
            let bytes = stream.write(&data[..data.len().min(most)])?;
            Ok(Written { bytes, chunks: 0 })
        });
        written.map_ok(|written| written.bytes)
    }

    /// The same, waited for.
    pub(crate) async fn write(&mut self, data: &[u8]) -> Result<usize, WriteError> {
        poll_fn(|cx| self.poll_bytes(cx, data)).await
    }

    /// Takes some chunks, the last of them perhaps in part, at once.
    pub(crate) fn poll_chunks(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<Written, WriteError>> {
        self.poll_write(cx, |stream, most| write_within(stream, chunks, most))
    }

    /// The same, waited for.
    pub(crate) async fn write_chunks(
        &mut self,
        chunks: &mut [Bytes],
    ) -> Result<Written, WriteError> {
        poll_fn(|cx| self.poll_chunks(cx, chunks)).await
    }

    pub(crate) async fn write_all(&mut self, mut data: &[u8]) -> Result<(), WriteError> {
        while !data.is_empty() {
            let written = self.write(data).await?;
            data = &data[written..];
        }
        Ok(())
    }

    pub(crate) async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), WriteError> {
        let mut chunks = [chunk];
        while !chunks[0].is_empty() {
            self.write_chunks(&mut chunks).await?;
        }
        Ok(())
    }

    /// Nothing more is written. Of a stream that the peer has stopped `stopped` tells.
    pub(crate) fn finish(&mut self) -> Result<(), ClosedStream> {
        let mut state = self.connection.lock();
        if state.is_broken {
            return Ok(());
        }
        let finished = state.proto.send_stream(self.id).finish();
        drop(state);
        match finished {
            Ok(()) => {
                self.connection.wake();
                Ok(())
            }
            Err(FinishError::Stopped(_)) => Ok(()),
            Err(FinishError::ClosedStream) => Err(ClosedStream::default()),
        }
    }

    /// What has not arrived need not arrive any more.
    pub(crate) fn reset(&mut self, code: VarInt) -> Result<(), ClosedStream> {
        let mut state = self.connection.lock();
        if state.is_broken || self.is_rejected(&state) {
            return Ok(());
        }
        let reset = state.proto.send_stream(self.id).reset(code);
        drop(state);
        self.connection.wake();
        reset
    }

    pub(crate) fn set_priority(&self, priority: i32) -> Result<(), ClosedStream> {
        let mut state = self.connection.lock();
        if state.is_broken {
            return Ok(());
        }
        state.proto.send_stream(self.id).set_priority(priority)
    }

    /// Ready when the peer has stopped the stream, with the peer's code, or has acknowledged all of it.
    pub(crate) fn poll_stopped(
        &self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<VarInt>, StoppedError>> {
        poll_stopped(&self.connection, self.id, self.early, cx)
    }

    /// Ready when the connection is over, or where the stream never was.
    pub(crate) fn poll_over(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.connection.lock();
        if state.error.is_some() || self.is_rejected(&state) {
            return Poll::Ready(());
        }
        state.enders.insert(self.id, cx.waker().clone());
        Poll::Pending
    }

    /// The same as `poll_stopped`, waited for. One at a time.
    pub(crate) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<VarInt>, StoppedError>> + Send + 'static {
        let (connection, id, early) = (self.connection.clone(), self.id, self.early);
        poll_fn(move |cx| poll_stopped(&connection, id, early, cx))
    }
}

/// Writes whole chunks of so many bytes in all, or a part of the first one.
fn write_within(
    stream: &mut proto::SendStream<'_>,
    chunks: &mut [Bytes],
    most: usize,
) -> Result<Written, proto::WriteError> {
    let mut size = 0;
    let whole = chunks.iter().take_while(|chunk| {
        size += chunk.len();
        size <= most
    });
    let whole = whole.count();
    match chunks.first_mut() {
        Some(first) if whole == 0 => {
            let mut part = [first.slice(..most)];
            let Written { bytes, .. } = stream.write_chunks(&mut part)?;
            first.advance(bytes);
            Ok(Written { bytes, chunks: 0 })
        }
        _ => stream.write_chunks(&mut chunks[..whole]),
    }
}

fn poll_stopped(
    connection: &Shared,
    id: StreamId,
    early: bool,
    cx: &mut Context<'_>,
) -> Poll<Result<Option<VarInt>, StoppedError>> {
    let mut state = connection.lock();
    if let Some(error) = state.broken() {
        return Poll::Ready(Err(error.into()));
    }
    if early && state.has_rejected_early() {
        return Poll::Ready(Err(StoppedError::ZeroRttRejected));
    }
    match state.proto.send_stream(id).stopped() {
        Err(ClosedStream { .. }) => Poll::Ready(Ok(None)),
        Ok(Some(code)) => Poll::Ready(Ok(Some(code))),
        Ok(None) => match &state.error {
            Some(error) => Poll::Ready(Err(error.clone().into())),
            None => {
                state.enders.insert(id, cx.waker().clone());
                Poll::Pending
            }
        },
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        let mut state = self.connection.lock();
        // A later stream may have the number of one that was rejected.
        if self.is_rejected(&state) {
            return;
        }
        // QUIC says nothing of the end of a stream that was reset.
        let waiting = (
            state.writers.remove(&self.id),
            state.enders.remove(&self.id),
        );
        state.shares.leave(self.id);
        if state.error.is_some() {
            drop(state);
            drop(waiting);
            return;
        }
        let mut stream = state.proto.send_stream(self.id);
        let is_new = match stream.finish() {
            Ok(()) => true,
            Err(FinishError::Stopped(code)) => stream.reset(code).is_ok(),
            Err(FinishError::ClosedStream) => false,
        };
        drop(state);
        drop(waiting);
        if is_new {
            self.connection.wake();
        }
    }
}
