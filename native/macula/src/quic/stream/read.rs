//! The receiving half: bytes are taken from QUIC only for somebody who asked for them, so that
//! flow control reaches the sender.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};

use crate::engine::transport::{ConnectionError, ReadError, RecvStream, ResetError, VarInt};
use bytes::Bytes;
use rustler::{Atom, Encoder, Env, LocalPid, OwnedBinary, ResourceArc, Term};
use tokio::time::Sleep;

use super::{Inner, Stream};
use crate::vm::active::Active;
use crate::vm::error::Ended;
use crate::vm::fault::{self, Point};
use crate::vm::messages::{Gone, atoms, event, passive};
use crate::vm::owner::Owner;
use crate::vm::payload::{gather, release};
use crate::vm::reply::{LIVENESS, Reply};
use crate::vm::seat::Seat;
use crate::vm::tasks::{Held, attempt};
use crate::vm::turns::Half;

/// Chunks taken from QUIC in one call; a chunk is at most what a packet carries, or a few. A stream that
/// carries little has room for few of them.
const CHUNKS: usize = 64;
const FEW_CHUNKS: usize = 4;
/// A message, or the answer to `recv(Stream, 0)`, is at most this large, plus one chunk.
const MAX_MESSAGE: usize = 256 * 1024;

pub(crate) struct Shared {
    state: Mutex<State>,
    seat: Seat<Serving>,
    stream: Weak<Inner>,
}

struct State {
    active: Active,
    requests: VecDeque<Request>,
    stop: Option<VarInt>,
    /// There is nothing more to read: why.
    over: Option<Over>,
    /// Somebody has read by messages.
    was_active: bool,
    /// The peer finished while the stream was passive: told when it is made active, or before the
    /// stream is closed.
    untold_end: bool,
}

struct Request {
    reply: Reply,
    len: usize,
    /// Takes what has come, and waits for nothing.
    now: bool,
    /// A turn has looked for its bytes.
    seen: bool,
}

/// How the half ended: whoever reads must be able to tell a whole stream from one that was cut off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Over {
    /// The peer finished it, and everything was read.
    Finished,
    Reset(VarInt),
    Lost(Box<ConnectionError>),
    /// This side stopped reading.
    Stopped,
    /// The stream has no receiving half.
    Absent,
    /// A turn panicked.
    Failed,
    /// The stream was opened early, and the peer did not take that.
    Rejected,
}

/// Why a request is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refused {
    /// In active mode data comes as messages.
    Active,
    Over(Over),
}

impl Encoder for Refused {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Refused::Active => atoms::einval().encode(env),
            Refused::Over(over) => over.encode(env),
        }
    }
}

impl Encoder for Over {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Over::Finished => atoms::closed().encode(env),
            Over::Reset(code) => (atoms::reset(), code.into_inner()).encode(env),
            Over::Lost(error) => (atoms::connection_lost(), Ended(error)).encode(env),
            Over::Stopped => atoms::stopped().encode(env),
            Over::Absent => atoms::einval().encode(env),
            Over::Failed => atoms::internal_error().encode(env),
            Over::Rejected => atoms::early_data_rejected().encode(env),
        }
    }
}

enum Step {
    Stop(VarInt),
    /// As a message to the owner.
    Deliver,
    /// As the answer to the first request.
    Answer(Request),
    Read {
        /// Others wait behind the first request?
        crowded: bool,
        /// Does one of them wait for nothing?
        now: bool,
    },
    Idle,
    Over,
}

impl Shared {
    pub(crate) fn new(stream: Weak<Inner>, open: bool, active: Active) -> Self {
        Shared {
            state: Mutex::new(State {
                active: if open { active } else { Active::Off },
                requests: VecDeque::new(),
                stop: None,
                over: (!open).then_some(Over::Absent),
                was_active: active != Active::Off,
                untold_end: false,
            }),
            seat: Seat::new(),
            stream,
        }
    }

    /// Has the half served from now on until it is over.
    pub(super) fn start(&self, stream: Held<RecvStream>) {
        self.seat.take(Serving {
            stream,
            buffer: Buffer::default(),
            room: Room::default(),
            end: None,
            is_announced: false,
            is_gone: false,
            patience: None,
        });
        self.ring();
    }

    /// Has the half look at what is wanted. Waits for nothing.
    pub(super) fn ring(&self) {
        if self.seat.ring()
            && let Some(stream) = self.stream.upgrade()
        {
            stream.has_turn(Half::Receiving);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn active(&self) -> Active {
        self.lock().active
    }

    /// Changes the mode, and with it whether the handle is pinned. A count that comes to its end by
    /// this, as it may by a negative number, is told to the owner.
    pub(super) fn set_active(
        &self,
        env: Env,
        change: Active,
        handle: &ResourceArc<Stream>,
    ) -> Result<(), Atom> {
        let mut state = self.lock();
        let (active, now_passive) = state.active.change(change).map_err(|_| atoms::einval())?;
        state.active = active;
        state.was_active |= state.active != Active::Off;
        // Under the lock, as a turn unpins under it. The caller's own reference keeps the
        // destructor from running here.
        if state.active == Active::Off || state.over.is_some() {
            drop(handle.inner.take_pin());
        } else {
            handle.inner.owner.pin(handle);
        }
        if now_passive {
            // Under the lock, so that it is behind the data and before what follows.
            handle.inner.owner.post_from_nif(env, handle, passive);
        }
        if state.active != Active::Off && std::mem::take(&mut state.untold_end) {
            handle
                .inner
                .owner
                .post_from_nif(env, handle, peer_send_shutdown);
        }
        drop(state);
        self.ring();
        Ok(())
    }

    /// The stream is about to be closed: who reads by messages, and has not asked for the next one,
    /// is told now that it was whole.
    pub(super) fn tell_end(&self, owner: &Owner<Stream>) {
        let mut state = self.lock();
        if state.was_active && std::mem::take(&mut state.untold_end) {
            // A dead owner needs no message.
            let _ = owner.post(peer_send_shutdown);
        }
    }

    /// Somebody gave up waiting, and may stand before others.
    pub(super) fn cancelled(&self) {
        self.lock()
            .requests
            .retain(|request| !request.reply.is_cancelled());
        self.ring();
    }

    /// There is no more for now: answers those that wait for nothing.
    fn expire(&self) {
        let expired: VecDeque<_> = {
            let mut state = self.lock();
            let all = std::mem::take(&mut state.requests);
            let (expired, left): (VecDeque<_>, VecDeque<_>) = all
                .into_iter()
                .partition(|request| request.now && request.seen);
            state.requests = left;
            expired
        };
        for request in expired {
            request.reply.error(atoms::timeout());
        }
    }

    /// Drops the requests of the dead.
    fn bury(&self) {
        self.lock()
            .requests
            .retain(|request| !request.reply.is_abandoned());
    }

    /// Gives the reply back if the request is not taken.
    pub(super) fn request(
        &self,
        reply: Reply,
        len: usize,
        now: bool,
    ) -> Result<(), (Reply, Refused)> {
        let mut state = self.lock();
        if let Some(over) = &state.over {
            return Err((reply, Refused::Over(over.clone())));
        }
        if state.active != Active::Off {
            return Err((reply, Refused::Active));
        }
        // Mostly the only one.
        if state.requests.capacity() == 0 {
            state.requests.reserve_exact(1);
        }
        state.requests.push_back(Request {
            reply,
            len,
            now,
            seen: false,
        });
        drop(state);
        self.ring();
        Ok(())
    }

    pub(super) fn stop(&self, code: VarInt) {
        self.lock().stop.get_or_insert(code);
        self.ring();
    }

    /// What to do next, with `buffered` bytes at hand, and more to come unless `ended`.
    fn step(&self, buffered: usize, ended: bool) -> Step {
        let mut state = self.lock();
        if let Some(code) = state.stop {
            return Step::Stop(code);
        }
        while state
            .requests
            .front()
            .is_some_and(|request| request.reply.is_cancelled())
        {
            state.requests.pop_front();
        }
        if buffered == 0 && ended {
            return Step::Over;
        }
        if let Some(request) = state.requests.front() {
            let enough = buffered > 0 && (ended || buffered >= request.len);
            return match enough.then(|| state.requests.pop_front()).flatten() {
                Some(request) => Step::Answer(request),
                None => {
                    let mut now = false;
                    for request in &mut state.requests {
                        request.seen = true;
                        now |= request.now;
                    }
                    Step::Read {
                        crowded: state.requests.len() > 1,
                        now,
                    }
                }
            };
        }
        match (state.active, buffered) {
            (Active::Off, _) => Step::Idle,
            (_, 0) => Step::Read {
                crowded: false,
                now: false,
            },
            _ => Step::Deliver,
        }
    }
}

/// What was read and not yet given away.
#[derive(Default)]
struct Buffer {
    chunks: VecDeque<Bytes>,
    size: usize,
    offset: u64,
}

impl Buffer {
    fn push(&mut self, chunks: &mut [Bytes]) {
        if self.chunks.capacity() == 0 {
            self.chunks.reserve_exact(chunks.len());
        }
        for chunk in chunks {
            let chunk = std::mem::take(chunk);
            self.size += chunk.len();
            self.chunks.push_back(chunk);
        }
    }

    /// The first bytes, copied; they stay here until `consume`.
    fn copy(&self, len: usize) -> OwnedBinary {
        gather(self.chunks.iter().map(|chunk| chunk.as_ref()), len)
    }

    fn consume(&mut self, mut len: usize) {
        self.size -= len;
        self.offset += len as u64;
        while len > 0 {
            let Some(first) = self.chunks.front_mut() else {
                return;
            };
            if first.len() > len {
                // Keeps the rest.
                drop(first.split_to(len));
                return;
            }
            len -= first.len();
            self.chunks.pop_front();
        }
    }
}

impl End {
    /// What has arrived and nobody has asked for yet is gone: the peer reset the stream, or this
    /// side closed the connection.
    fn discards(&self) -> bool {
        match self {
            End::Reset(_) => true,
            End::Lost(error) => **error == ConnectionError::LocallyClosed,
            End::Finished | End::Stopped | End::Rejected => false,
        }
    }
}

impl End {
    /// As the connection calls it.
    fn of(self, inner: &Inner) -> End {
        match self {
            End::Lost(error) => End::Lost(Box::new(inner.connection.ended(*error))),
            // So QUIC calls what has gone with the connection, too, before the handshake is done.
            End::Rejected => match inner.connection.close_reason() {
                Some(error) => End::Lost(Box::new(error)),
                None => End::Rejected,
            },
            other => other,
        }
    }
}

enum End {
    Finished,
    Reset(VarInt),
    Lost(Box<ConnectionError>),
    Stopped,
    Rejected,
}

impl From<ReadError> for End {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => End::Reset(code),
            ReadError::ConnectionLost(error) => End::Lost(Box::new(error)),
            ReadError::ZeroRttRejected => End::Rejected,
            ReadError::ClosedStream => End::Stopped,
            ReadError::IllegalOrderedRead => End::Stopped,
        }
    }
}

/// What serves the half, between its turns.
struct Serving {
    stream: Held<RecvStream>,
    buffer: Buffer,
    room: Room,
    end: Option<End>,
    is_announced: bool,
    /// The connection is over, and that was looked at.
    is_gone: bool,
    /// How long those that crowd are waited for before the dead among them are looked for.
    patience: Option<Pin<Box<Sleep>>>,
}

/// What is waited for next.
enum Next {
    Stop(VarInt),
    Read { crowded: bool, now: bool },
    Idle,
    Over,
}

/// Does what there is to do.
pub(super) fn turn(inner: &Inner, cx: &mut Context<'_>) {
    let seat = &inner.read.seat;
    let Some((mut serving, served)) = seat.turn(|serving| serving.serve(inner, cx)) else {
        return;
    };
    let end = served.ok().and_then(|()| serving.end.take());
    if served.is_err() {
        inner.fail();
    }
    let finished = attempt(|| finish(inner, end));
    if finished.is_err() {
        inner.fail();
    }
    let (lost, _unpinned) = finished.unwrap_or_default();
    inner.half_over(lost);
}

impl Serving {
    fn serve(&mut self, inner: &Inner, cx: &mut Context<'_>) -> Poll<()> {
        if !std::mem::replace(&mut self.is_announced, true) {
            inner.connection.announced();
        }
        // The time begins anew with each turn but the one that it rings for.
        self.patience.take_if(|time| !time.is_elapsed());
        loop {
            match self.give(inner) {
                Next::Over => return Poll::Ready(()),
                Next::Stop(code) => {
                    let stream = &self.stream;
                    if ready!(inner.may_tell_end(|| stream.poll_over(cx).map(drop))) {
                        // Fails only on a stream that is over.
                        let _ = self.stream.stop(code);
                    }
                    self.end = Some(End::Stopped);
                    return Poll::Ready(());
                }
                Next::Read { crowded, now } => {
                    if !crowded {
                        self.patience = None;
                    }
                    match self.room.poll(&mut self.stream, &mut self.buffer, cx) {
                        Poll::Ready(Ok(Some(()))) => {}
                        Poll::Ready(Ok(None)) => self.end = Some(End::Finished),
                        Poll::Ready(Err(error)) => self.end = Some(End::from(error).of(inner)),
                        Poll::Pending if now && !inner.connection.is_closed_here() => {
                            inner.read.expire();
                        }
                        Poll::Pending if crowded => {
                            // The first of them may be dead, and nobody told.
                            ready!(self.lose_patience(cx));
                            inner.read.bury();
                        }
                        Poll::Pending => return Poll::Pending,
                    }
                }
                Next::Idle if self.is_gone => return Poll::Pending,
                Next::Idle if self.end.is_some() => {
                    // Who closes the connection wants no more of it, not even of a whole stream.
                    let error = ready!(self.stream.poll_over(cx));
                    self.is_gone = true;
                    if inner.connection.ended(error.clone()) == ConnectionError::LocallyClosed {
                        self.end = Some(End::Lost(Box::new(error)));
                    }
                }
                Next::Idle => {
                    self.room.free();
                    let reset = ready!(self.stream.poll_received_reset(cx));
                    self.end = Some(match reset {
                        Ok(Some(code)) => End::Reset(code),
                        Ok(None) => End::Finished,
                        Err(ResetError::ZeroRttRejected) => End::Rejected.of(inner),
                        // What came before the connection was lost is still to be read.
                        Err(ResetError::ConnectionLost(_)) => ready!(self.drain(cx)).of(inner),
                    });
                }
            }
        }
    }

    /// Gives away what there is for somebody.
    fn give(&mut self, inner: &Inner) -> Next {
        let buffer = &mut self.buffer;
        loop {
            if buffer.size > 0 && self.end.as_ref().is_some_and(End::discards) {
                *buffer = Buffer::default();
            }
            fault::pass(Point::StreamRead);
            match inner.read.step(buffer.size, self.end.is_some()) {
                Step::Deliver => {
                    if deliver(inner, buffer).is_err() {
                        inner.read.stop(VarInt::from_u32(0));
                    }
                }
                Step::Answer(request) => answer(request, buffer),
                Step::Stop(code) => return Next::Stop(code),
                Step::Read { crowded, now } => return Next::Read { crowded, now },
                Step::Idle => return Next::Idle,
                Step::Over => return Next::Over,
            }
        }
    }

    fn lose_patience(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let patience = self
            .patience
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(LIVENESS)));
        ready!(patience.as_mut().poll(cx));
        self.patience = None;
        Poll::Ready(())
    }

    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            match ready!(self.room.poll(&mut self.stream, &mut self.buffer, cx)) {
                Ok(Some(())) => {}
                Ok(None) => return Poll::Ready(End::Finished),
                Err(error) => return Poll::Ready(End::from(error)),
            }
        }
    }
}

/// Room for the chunks of one call, which follows what comes. There is none while nobody reads.
#[derive(Default)]
struct Room {
    chunks: Vec<Bytes>,
    size: usize,
}

impl Room {
    /// What has come; `None` at the end.
    fn poll(
        &mut self,
        stream: &mut RecvStream,
        buffer: &mut Buffer,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<()>, ReadError>> {
        self.size = self.size.clamp(FEW_CHUNKS, CHUNKS);
        self.chunks.resize(self.size, Bytes::new());
        let Some(count) = ready!(stream.poll_chunks(cx, &mut self.chunks))? else {
            return Poll::Ready(Ok(None));
        };
        buffer.push(&mut self.chunks[..count]);
        if count == self.size {
            self.size *= 4;
        } else if count < self.size / 8 {
            self.size /= 2;
        }
        Poll::Ready(Ok(Some(())))
    }

    fn free(&mut self) {
        self.chunks = Vec::new();
    }
}

fn deliver(inner: &Inner, buffer: &mut Buffer) -> Result<(), Gone> {
    let len = buffer.size.min(MAX_MESSAGE);
    let data = buffer.copy(len);
    let offset = buffer.offset;
    let mut unpinned = None;
    let mut state = inner.read.lock();
    // Once the owner has made the stream passive it gets no more messages.
    if state.active == Active::Off {
        return Ok(());
    }
    let left = state.active.after_message();
    let counted = matches!(state.active, Active::Count(_));
    state.active = left;
    let posted = inner.owner.post(move |env, handle, _| {
        let info = Term::map_from_pairs(
            env,
            &[
                (atoms::absolute_offset(), offset),
                (atoms::len(), len as u64),
                (atoms::flags(), 0),
            ],
        )
        .ok()?;
        Some(event(env, release(env, data), handle, info))
    });
    if left == Active::Off {
        if counted {
            // The message before it has told whether the owner lives.
            let _ = inner.owner.post(passive);
        }
        unpinned = inner.take_pin();
    }
    drop(state);
    drop(unpinned);
    posted?;
    buffer.consume(len);
    Ok(())
}

fn peer_send_shutdown<'a>(env: Env<'a>, handle: Term<'a>, _owner: LocalPid) -> Option<Term<'a>> {
    let undefined = atoms::undefined();
    Some(event(env, atoms::peer_send_shutdown(), handle, undefined))
}

fn answer(request: Request, buffer: &mut Buffer) {
    let len = match request.len {
        0 => buffer.size.min(MAX_MESSAGE),
        len => buffer.size.min(len),
    };
    let data = buffer.copy(len);
    let sent = request
        .reply
        .send(|env| (atoms::ok(), release(env, data)).encode(env));
    // Data that nobody waited for any more is for the next one.
    if sent.is_ok() {
        buffer.consume(len);
    }
}

/// Says how the half is over: nothing where a turn has panicked. The answer is the error that has ended the connection,
/// if that is why, and a handle that stays until the end of the stream is told.
fn finish(
    inner: &Inner,
    end: Option<End>,
) -> (Option<Box<ConnectionError>>, Option<ResourceArc<Stream>>) {
    let mut state = inner.read.lock();
    let was_active = state.active != Active::Off;
    let end = end.filter(|_| !inner.failed());
    let over = match &end {
        Some(End::Finished) => Over::Finished,
        Some(End::Reset(code)) => Over::Reset(*code),
        Some(End::Lost(error)) => Over::Lost(error.clone()),
        Some(End::Stopped) => Over::Stopped,
        Some(End::Rejected) => Over::Rejected,
        None => Over::Failed,
    };
    state.over = Some(over.clone());
    state.untold_end = matches!(end, Some(End::Finished)) && !was_active;
    let requests = std::mem::take(&mut state.requests);
    let unpinned = inner.take_pin();
    drop(state);
    for request in requests {
        request.reply.error(over.clone());
    }
    let owner = &inner.owner;
    // Errors below: the owner is dead.
    let lost = match end {
        Some(End::Lost(error)) => Some(error),
        Some(End::Reset(code)) => {
            let _ = owner.post(move |env, handle, _| {
                let code = code.into_inner();
                Some(event(env, atoms::peer_send_aborted(), handle, code))
            });
            None
        }
        Some(End::Finished) if was_active => {
            let _ = owner.post(peer_send_shutdown);
            None
        }
        Some(End::Rejected) => {
            inner.reject();
            None
        }
        Some(End::Finished | End::Stopped) | None => None,
    };
    (lost, unpinned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(step: &Step) -> &'static str {
        match step {
            Step::Stop(_) => "stop",
            Step::Deliver => "deliver",
            Step::Answer(_) => "answer",
            Step::Read { crowded: false, .. } => "read",
            Step::Read { crowded: true, .. } => "read for many",
            Step::Idle => "idle",
            Step::Over => "over",
        }
    }

    fn step(active: Active, buffered: usize, ended: bool) -> &'static str {
        name(&Shared::new(Weak::new(), true, active).step(buffered, ended))
    }

    #[test]
    fn nothing_is_read_that_nobody_asked_for() {
        assert_eq!("idle", step(Active::Off, 0, false));
        // Nor is what is left over given away.
        assert_eq!("idle", step(Active::Off, 5, false));
        for active in [Active::On, Active::Once, Active::Count(1)] {
            assert_eq!("read", step(active, 0, false));
            assert_eq!("deliver", step(active, 5, false));
        }
    }

    #[test]
    fn what_arrived_before_the_end_is_given_away_first() {
        assert_eq!("deliver", step(Active::Once, 5, true));
        assert_eq!("idle", step(Active::Off, 5, true));
        assert_eq!("over", step(Active::Off, 0, true));
        assert_eq!("over", step(Active::On, 0, true));
    }

    #[test]
    fn a_stop_goes_before_everything_and_its_first_code_stands() {
        let shared = Shared::new(Weak::new(), true, Active::On);
        shared.stop(VarInt::from_u32(3));
        shared.stop(VarInt::from_u32(4));
        assert!(matches!(shared.step(5, false), Step::Stop(code) if code.into_inner() == 3));
        assert!(matches!(shared.step(0, true), Step::Stop(_)));
    }

    #[test]
    fn a_half_that_never_was_cannot_be_read() {
        let shared = Shared::new(Weak::new(), false, Active::On);
        assert_eq!(Active::Off, shared.active());
        assert_eq!(Some(Over::Absent), shared.lock().over);
    }

    #[test]
    fn a_buffer_is_consumed_across_its_chunks() {
        let mut buffer = Buffer::default();
        buffer.push(&mut [Bytes::from_static(b"abc"), Bytes::from_static(b"defg")]);
        buffer.push(&mut [Bytes::from_static(b"h")]);
        assert_eq!((8, 0), (buffer.size, buffer.offset));
        buffer.consume(2);
        assert_eq!(b"c".as_ref(), buffer.chunks[0].as_ref());
        buffer.consume(3);
        assert_eq!(b"fg".as_ref(), buffer.chunks[0].as_ref());
        assert_eq!((3, 5), (buffer.size, buffer.offset));
        buffer.consume(0);
        buffer.consume(3);
        assert!(buffer.chunks.is_empty());
        assert_eq!((0, 8), (buffer.size, buffer.offset));
    }

    #[test]
    fn a_reset_and_the_own_close_discard_and_a_loss_does_not() {
        assert!(End::Reset(VarInt::from_u32(1)).discards());
        assert!(End::Lost(Box::new(ConnectionError::LocallyClosed)).discards());
        assert!(!End::Lost(Box::new(ConnectionError::TimedOut)).discards());
        assert!(!End::Finished.discards());
    }
}
