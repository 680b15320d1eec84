//! The send queue of a lane: packets from the VM, as frames, until the transport takes them.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use rustler::{Binary, LocalPid, NifResult, Term};

use super::frame::{self, FrameError};
use crate::vm::payload::Keeper;

/// Over this the output process stops pulling from the VM, which then suspends the senders.
const HIGH_WATER: usize = 4 * 1024 * 1024;
/// Under this it is told to go on.
const LOW_WATER: usize = 256 * 1024;
/// A part of this size and more is not copied but kept alive where it is.
const ZERO_COPY: usize = 16 * 1024;
/// Copied frames are gathered in pieces of up to this size: the transport walks a list of pieces
/// for every packet it makes, so pieces must not be small.
const PIECE: usize = 64 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pushed {
    Ok,
    /// Taken, and the queue is full now: wait for `macula_dist_writable`.
    Busy,
    Closed,
}

#[derive(Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    /// Who waits for room.
    waiter: Option<LocalPid>,
    closed: bool,
}

#[derive(Default)]
pub(crate) struct Outgoing {
    queue: Mutex<Queue>,
}

impl Outgoing {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds frames. `pid` is told when there is room again, if the answer is `Busy`.
    pub(crate) fn push(&self, frames: Frames, pid: LocalPid) -> Pushed {
        let mut queue = self.lock();
        if queue.closed {
            return Pushed::Closed;
        }
        queue.bytes += frames.bytes;
        queue.pieces.extend(frames.pieces);
        if queue.bytes >= HIGH_WATER {
            queue.waiter = Some(pid);
            return Pushed::Busy;
        }
        Pushed::Ok
    }

    /// Moves up to `bytes.len()` pieces out. Their bytes count until `written` is called.
    pub(crate) fn take(&self, into: &mut [Bytes]) -> usize {
        let mut queue = self.lock();
        let mut count = 0;
        for slot in into.iter_mut() {
            let Some(piece) = queue.pieces.pop_front() else {
                break;
            };
            *slot = piece;
            count += 1;
        }
        count
    }

    /// Returns pieces that the transport did not take.
    pub(crate) fn put_back(&self, pieces: &mut [Bytes]) {
        let mut queue = self.lock();
        for piece in pieces.iter_mut().rev() {
            queue.pieces.push_front(std::mem::take(piece));
        }
    }

    /// The transport has taken `bytes`. Answers who is to be told that there is room.
    pub(crate) fn written(&self, bytes: usize) -> Option<LocalPid> {
        let mut queue = self.lock();
        queue.bytes = queue.bytes.saturating_sub(bytes);
        if queue.bytes <= LOW_WATER {
            queue.waiter.take()
        } else {
            None
        }
    }

    /// Nothing more is taken.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().pieces.is_empty()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.lock().bytes
    }
}

/// Frames ready to be queued.
#[derive(Default)]
pub(crate) struct Frames {
    pieces: Vec<Bytes>,
    pub(crate) bytes: usize,
    pub(crate) count: usize,
}

/// Builds frames from what `erlang:dist_ctrl_get_data/1` gives.
pub(crate) struct Framer {
    frames: Frames,
    piece: BytesMut,
    /// Of the binaries that are not copied, all of a batch together.
    keeper: Option<Keeper>,
}

impl Framer {
    pub(crate) fn new() -> Self {
        Self {
            frames: Frames::default(),
            piece: BytesMut::new(),
            keeper: None,
        }
    }

    /// One packet of `len` bytes in `parts`, binaries that add up to it.
    pub(crate) fn packet<'a>(
        &mut self,
        len: usize,
        parts: impl Iterator<Item = Term<'a>>,
    ) -> NifResult<()> {
        let header = frame::packet_header(len).map_err(|_: FrameError| rustler::Error::BadArg)?;
        self.copy(&header, len);
        let mut seen = 0;
        for part in parts {
            let part = Binary::from_term(part)?;
            seen += part.len();
            if part.len() >= ZERO_COPY {
                self.flush();
                self.keep(&part);
            } else {
                self.copy(&part, 0);
            }
        }
        if seen != len {
            return Err(rustler::Error::BadArg);
        }
        self.frames.count += 1;
        Ok(())
    }

    fn copy(&mut self, bytes: &[u8], expected: usize) {
        if self.piece.len() + bytes.len() > PIECE {
            self.flush();
        }
        if self.piece.capacity() == self.piece.len() {
            self.piece
                .reserve((bytes.len() + expected).clamp(256, PIECE));
        }
        self.piece.put_slice(bytes);
    }

    fn keep(&mut self, part: &Binary<'_>) {
        let bytes = self.keeper.get_or_insert_with(Keeper::new).keep(part);
        self.frames.bytes += bytes.len();
        self.frames.pieces.push(bytes);
    }

    fn flush(&mut self) {
        if !self.piece.is_empty() {
            let piece = self.piece.split().freeze();
            self.frames.bytes += piece.len();
            self.frames.pieces.push(piece);
        }
    }

    pub(crate) fn finish(mut self) -> Frames {
        self.flush();
        self.frames
    }
}
