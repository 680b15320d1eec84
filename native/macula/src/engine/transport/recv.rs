//! The receiving half of a stream.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use quinn_proto::{
    self as proto, Chunk, Chunks, ClosedStream, ConnectionError, ReadableError, StreamId, VarInt,
};

use super::errors::{ReadError, ResetError};
use super::state::{Alive, Guard};

/// Dropped before its end, the stream is stopped.
pub(crate) struct RecvStream {
    connection: Arc<Alive>,
    id: StreamId,
    /// The stream began as early data.
    early: bool,
    is_over: bool,
    /// The peer has reset the stream.
    reset: Option<VarInt>,
}

/// What became of a look at what has arrived.
enum Got<T> {
    Some(T),
    /// Something perhaps, and that is all.
    End(Option<T>),
    /// Something perhaps, and no more for this reason.
    Stuck(Option<T>, proto::ReadError),
}

impl RecvStream {
    pub(super) fn new(connection: Arc<Alive>, id: StreamId, early: bool) -> Self {
        RecvStream {
            connection,
            id,
            early,
            is_over: false,
            reset: None,
        }
    }

    pub(crate) fn id(&self) -> StreamId {
        self.id
    }

    fn is_rejected(&self, state: &Guard<'_>) -> bool {
        self.early && state.has_rejected_early()
    }

    fn poll_read<T>(
        &mut self,
        cx: &mut Context<'_>,
        ordered: bool,
        read: impl FnOnce(&mut Chunks<'_>) -> Got<T>,
    ) -> Poll<Result<Option<T>, ReadError>> {
        if self.is_over && self.reset.is_none() {
            return Poll::Ready(Ok(None));
        }
        if let Some(code) = self.reset {
            self.is_over = true;
            return Poll::Ready(Err(ReadError::Reset(code)));
        }
        let mut state = self.connection.lock();
        if let Some(error) = state.broken() {
            return Poll::Ready(Err(error.into()));
        }
        if self.is_rejected(&state) {
            return Poll::Ready(Err(ReadError::ZeroRttRejected));
        }
        let mut stream = state.proto.recv_stream(self.id);
        let mut chunks = match stream.read(ordered) {
            Ok(chunks) => chunks,
            Err(ReadableError::ClosedStream) => return Poll::Ready(Err(ReadError::ClosedStream)),
            Err(ReadableError::IllegalOrderedRead) => {
                return Poll::Ready(Err(ReadError::IllegalOrderedRead));
            }
        };
        let got = read(&mut chunks);
        let gives_credit = chunks.finalize().should_transmit();
        let result = match got {
            Got::Some(some) | Got::Stuck(Some(some), proto::ReadError::Blocked) => Ok(Some(some)),
            Got::End(end) => {
                self.is_over = true;
                Ok(end)
            }
            Got::Stuck(some, proto::ReadError::Reset(code)) => {
                self.reset = Some(code);
                self.is_over = some.is_none();
                some.map(Some).ok_or(ReadError::Reset(code))
            }
            Got::Stuck(None, proto::ReadError::Blocked) => match &state.error {
                Some(error) => Err(error.clone().into()),
                None => {
                    state.readers.insert(self.id, cx.waker().clone());
                    drop(state);
                    if gives_credit {
                        self.connection.wake();
                    }
                    return Poll::Pending;
                }
            },
        };
        drop(state);
        if gives_credit {
            self.connection.wake();
        }
        Poll::Ready(result)
    }

    /// What has arrived in order, as far as there is room; how many chunks. Nothing at the end.
    pub(crate) fn poll_chunks(
        &mut self,
        cx: &mut Context<'_>,
        room: &mut [Bytes],
    ) -> Poll<Result<Option<usize>, ReadError>> {
        if room.is_empty() {
            return Poll::Ready(Ok(Some(0)));
        }
        self.poll_read(cx, true, |chunks| {
            let mut count = 0;
            while count < room.len() {
                let some = (count > 0).then_some(count);
                match chunks.next(usize::MAX) {
                    Ok(Some(chunk)) => room[count] = chunk.bytes,
                    Ok(None) => return Got::End(some),
                    Err(error) => return Got::Stuck(some, error),
                }
                count += 1;
            }
            Got::Some(count)
        })
    }

    /// The same, waited for.
    pub(crate) async fn read_chunks(
        &mut self,
        room: &mut [Bytes],
    ) -> Result<Option<usize>, ReadError> {
        poll_fn(|cx| self.poll_chunks(cx, room)).await
    }

    /// The next chunk, of at most so many bytes. Nothing at the end.
    pub(crate) async fn read_chunk(
        &mut self,
        limit: usize,
        ordered: bool,
    ) -> Result<Option<Chunk>, ReadError> {
        poll_fn(|cx| {
            self.poll_read(cx, ordered, |chunks| match chunks.next(limit) {
                Ok(Some(chunk)) => Got::Some(chunk),
                Ok(None) => Got::End(None),
                Err(error) => Got::Stuck(None, error),
            })
        })
        .await
    }

    /// Nothing more is read.
    pub(crate) fn stop(&mut self, code: VarInt) -> Result<(), ClosedStream> {
        let mut state = self.connection.lock();
        if state.is_broken || self.is_rejected(&state) {
            return Ok(());
        }
        state.proto.recv_stream(self.id).stop(code)?;
        drop(state);
        self.connection.wake();
        self.is_over = true;
        Ok(())
    }

    /// Ready when the peer has reset the stream, with the peer's code, or when all of it has arrived. Reads nothing.
    pub(crate) fn poll_received_reset(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<VarInt>, ResetError>> {
        let mut state = self.connection.lock();
        if let Some(error) = state.broken() {
            return Poll::Ready(Err(error.into()));
        }
        if self.is_rejected(&state) {
            return Poll::Ready(Err(ResetError::ZeroRttRejected));
        }
        if let Some(code) = self.reset {
            return Poll::Ready(Ok(Some(code)));
        }
        match state.proto.recv_stream(self.id).received_reset() {
            Err(ClosedStream { .. }) => Poll::Ready(Ok(None)),
            Ok(Some(code)) => {
                self.reset = Some(code);
                drop(state);
                // The stream is gone, and the peer may open another.
                self.connection.wake();
                Poll::Ready(Ok(Some(code)))
            }
            Ok(None) => match &state.error {
                Some(error) => Poll::Ready(Err(error.clone().into())),
                None => {
                    // A reset wakes whoever reads.
                    state.readers.insert(self.id, cx.waker().clone());
                    Poll::Pending
                }
            },
        }
    }

    /// The same, waited for.
    pub(crate) async fn received_reset(&mut self) -> Result<Option<VarInt>, ResetError> {
        poll_fn(|cx| self.poll_received_reset(cx)).await
    }

    /// Ready when the connection is over, with its reason, or where the stream never was.
    pub(crate) fn poll_over(&self, cx: &Context<'_>) -> Poll<ConnectionError> {
        let mut state = self.connection.lock();
        match &state.error {
            Some(error) => Poll::Ready(error.clone()),
            None if self.is_rejected(&state) => Poll::Ready(ConnectionError::LocallyClosed),
            None => {
                state.readers.insert(self.id, cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        let mut state = self.connection.lock();
        // A later stream may have the number of one that was rejected.
        if self.is_rejected(&state) {
            return;
        }
        let waiting = state.readers.remove(&self.id);
        let is_new = !self.is_over && state.error.is_none() && {
            // Fails only on a stream that is over.
            let stopped = state.proto.recv_stream(self.id).stop(VarInt::from_u32(0));
            stopped.is_ok()
        };
        drop(state);
        drop(waiting);
        if is_new {
            self.connection.wake();
        }
    }
}
