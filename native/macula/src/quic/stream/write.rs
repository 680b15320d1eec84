//! The sending half: a bounded queue, and the turns that feed it to QUIC.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use crate::engine::transport::{ConnectionError, SendStream, StoppedError, VarInt, WriteError};
use bytes::{Bytes, BytesMut};
use rustler::{Encoder, Env, LocalPid, Term};
use tokio::time::Sleep;

use super::{Inner, Keep, Pieces, Watermarks};
use crate::vm::fault;
use crate::vm::messages::{atoms, event};
use crate::vm::payload::{Piece, piece};
use crate::vm::reply::Reply;
use crate::vm::seat::Seat;
use crate::vm::tasks::{Held, attempt};
use crate::vm::turns::Half;
use crate::vm::waiters::Waiters;

/// Chunks handed to QUIC in one call, under one taking of its lock.
const BATCH: usize = 64;
/// Small sends are gathered in pieces of this size.
const GATHER: usize = 64 * 1024;
/// Questions about delivery that are answered one by one; further ones share an answer.
const MAX_ASKED: usize = 1024;
/// A sender that was told of room and has not come in this time is not waited for: it may be dead.
const COMES: Duration = Duration::from_millis(5);

pub(crate) struct Shared {
    state: Mutex<State>,
    released: Arc<Released>,
    seat: Seat<Serving>,
}

/// How many chunks, from the first on, the peer has acknowledged. QUIC does not tell, but keeps a chunk
/// until all of it and all before it is acknowledged, to send it again if need be, and drops it then.
struct Released {
    count: AtomicU64,
    /// Somebody wants to know.
    awaited: AtomicBool,
    stream: Weak<Inner>,
}

impl Released {
    fn track(self: &Arc<Self>, chunk: Bytes) -> Bytes {
        Bytes::from_owner(Tracked {
            chunk,
            released: self.clone(),
        })
    }
}

/// A chunk that QUIC holds, or a part of which.
struct Tracked {
    chunk: Bytes,
    released: Arc<Released>,
}

impl AsRef<[u8]> for Tracked {
    fn as_ref(&self) -> &[u8] {
        &self.chunk
    }
}

impl Drop for Tracked {
    /// On any thread, and with the connection locked. Dropped, too, is what is reset or lost with
    /// its connection: then the half ends, and looks at the count no more.
    fn drop(&mut self) {
        self.released.count.fetch_add(1, Ordering::SeqCst);
        if self.released.awaited.load(Ordering::SeqCst) {
            let stream = self.released.stream.upgrade();
            if let Some(stream) = stream {
                stream.write.ring();
            }
        }
    }
}

struct State {
    marks: Watermarks,
    chunks: VecDeque<Bytes>,
    gathered: BytesMut,
    /// Bytes that QUIC has not taken yet, those that its turns have taken included.
    queued: usize,
    finish: bool,
    reset: Option<VarInt>,
    priority: Option<i32>,
    /// The peer is to learn of the stream before there is data.
    announce: bool,
    over: Option<Over>,
    /// Chunks so far, those included that QUIC has.
    pushed: u64,
    /// The owner wants to know when what was sent before these points is acknowledged.
    asked: VecDeque<Point>,
    waiting: Waiters<Waiting>,
    /// Bytes of those that were told of room, and have not come yet.
    expected: usize,
    promised: Vec<LocalPid>,
}

/// A process that waits for room, with so many bytes.
struct Waiting {
    reply: Reply,
    size: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    Stopped(VarInt),
    Closed,
    /// Finished, and all of it acknowledged.
    Delivered,
    /// A turn panicked.
    Failed,
    /// It was early data, which the peer did not take.
    Rejected,
}

/// A place in what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Point {
    /// Behind so many chunks.
    Chunk(u64),
    /// Behind the end of the stream.
    End,
}

/// What is known of the delivery of what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivery {
    /// It will be told.
    Awaited,
    Done,
    /// Nothing is sent any more, and not all of it may have arrived.
    CutOff,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PushError {
    Full,
    Stopped(VarInt),
    Closed,
    Failed,
    Rejected,
}

/// Whom to tell that there is room again.
pub(super) enum Waiter {
    /// A process that waits for this answer, `ok`, to try again.
    Answer(Reply),
    /// A process that goes on and gets `send_ready`.
    Promise(LocalPid),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reset {
    Always,
    /// What was finished is still delivered.
    UnlessFinished,
}

enum Step {
    Write,
    /// Let the peer know of the stream, which has no data yet.
    Announce,
    Finish,
    Reset(VarInt),
    /// What the owner asked about has arrived.
    Delivered,
    Idle,
}

impl Shared {
    pub(crate) fn new(stream: Weak<Inner>, open: bool, marks: Watermarks, priority: i32) -> Self {
        let state = State {
            over: (!open).then_some(Over::Closed),
            // What QUIC gives each.
            priority: (priority != 0).then_some(priority),
            ..State::new(marks)
        };
        Shared {
            state: Mutex::new(state),
            released: Arc::new(Released {
                count: AtomicU64::new(0),
                awaited: AtomicBool::new(false),
                stream,
            }),
            seat: Seat::new(),
        }
    }

    /// Has the half served from now on until it is over, and keeps the connection as long.
    pub(super) fn start(&self, stream: Held<SendStream>, keep: Arc<dyn Keep>) {
        self.seat.take(Serving {
            stream,
            batch: VecDeque::new(),
            is_finished: false,
            is_announced: false,
            over: Over::Closed,
            lost: None,
            overdue: None,
            _keep: keep,
        });
        self.ring();
    }

    /// Has the half look at what is wanted. Waits for nothing.
    pub(super) fn ring(&self) {
        if self.seat.ring()
            && let Some(stream) = self.released.stream.upgrade()
        {
            stream.has_turn(Half::Sending);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all of it or nothing. What is below the mark is taken whole, however large: it is in
    /// memory already, and a binary in place costs nothing more.
    ///
    /// Nothing is taken where the connection is not `is_open`: it would never leave.
    ///
    /// Above the mark `full` says who is told of room, if anybody, noted before a turn can make some.
    pub(super) fn push(
        &self,
        is_open: bool,
        data: Pieces,
        size: usize,
        fin: bool,
        full: impl FnOnce() -> Option<Waiter>,
    ) -> Result<(), PushError> {
        let mut state = self.lock();
        match state.over {
            Some(Over::Stopped(code)) => return Err(PushError::Stopped(code)),
            Some(Over::Failed) => return Err(PushError::Failed),
            Some(Over::Rejected) => return Err(PushError::Rejected),
            Some(Over::Closed | Over::Delivered) => return Err(PushError::Closed),
            None if !is_open || state.finish || state.reset.is_some() => {
                return Err(PushError::Closed);
            }
            None => {}
        }
        if size > 0 && state.queued >= state.marks.high {
            match full() {
                Some(Waiter::Answer(reply)) => {
                    state.came(size);
                    let waiting = Waiting { reply, size };
                    state
                        .waiting
                        .join(waiting, |waiting| waiting.reply.is_cancelled());
                }
                Some(Waiter::Promise(to)) if !state.promised.contains(&to) => {
                    state.promised.push(to);
                }
                Some(Waiter::Promise(_)) | None => {}
            }
            return Err(PushError::Full);
        }
        for binary in data {
            match piece(binary) {
                Piece::Small(bytes) => {
                    state.gathered.extend_from_slice(bytes);
                    if state.gathered.len() >= GATHER {
                        state.flush();
                    }
                }
                Piece::Held(bytes) => {
                    state.flush();
                    state.chunk(bytes);
                }
            }
        }
        state.queued += size;
        state.came(size);
        state.finish = fin;
        drop(state);
        self.ring();
        Ok(())
    }

    pub(super) fn finish(&self) {
        self.lock().finish = true;
        self.ring();
    }

    pub(super) fn reset(&self, code: VarInt, when: Reset) {
        let mut state = self.lock();
        if when == Reset::UnlessFinished && state.finish {
            return;
        }
        state.reset.get_or_insert(code);
        drop(state);
        self.ring();
    }

    /// `false` if there is nothing to be sent any more.
    pub(super) fn set_priority(&self, priority: i32) -> bool {
        let mut state = self.lock();
        if state.over.is_some() {
            return false;
        }
        state.priority = Some(priority);
        drop(state);
        self.ring();
        true
    }

    /// Senders that wait go on at the new low mark. `false` if nothing is sent any more.
    pub(super) fn set_watermarks(&self, marks: Watermarks) -> bool {
        let mut state = self.lock();
        if state.over.is_some() {
            return false;
        }
        state.marks = marks;
        drop(state);
        self.ring();
        true
    }

    /// Tells the peer of the stream as soon as flow control lets anything through.
    pub(super) fn announce(&self) -> bool {
        let mut state = self.lock();
        if state.over.is_some() {
            return false;
        }
        state.announce = true;
        drop(state);
        self.ring();
        true
    }

    pub(super) fn tell_delivered(&self) -> Delivery {
        let mut state = self.lock();
        match state.over {
            None => state.ask(),
            Some(Over::Delivered) => return Delivery::Done,
            Some(_) => return Delivery::CutOff,
        }
        // Before a turn looks at the count, and whoever raises it then sees this.
        self.released.awaited.store(true, Ordering::SeqCst);
        drop(state);
        self.ring();
        Delivery::Awaited
    }

    pub(super) fn queued(&self) -> usize {
        self.lock().queued
    }

    /// What to do next, with `batch` filled up.
    fn step(&self, batch: &mut VecDeque<Bytes>, stream: &SendStream) -> Step {
        let mut state = self.lock();
        if let Some(priority) = state.priority.take() {
            drop(state);
            // Not under our lock, as this waits for the connection's. Fails only on a stream that is
            // closed, which the next step finds out.
            let _ = stream.set_priority(priority);
            state = self.lock();
        }
        if state.finish && !state.waiting.is_empty() {
            // Nothing more is taken: the answer to the next try says so.
            let waiting = state.waiting.all();
            drop(state);
            try_again(waiting);
            state = self.lock();
        }
        if let Some(code) = state.reset {
            return Step::Reset(code);
        }
        if state.is_delivered(self.released.count.load(Ordering::SeqCst)) {
            let awaited = !state.asked.is_empty();
            self.released.awaited.store(awaited, Ordering::SeqCst);
            return Step::Delivered;
        }
        if state.chunks.is_empty() {
            state.flush();
        }
        if batch.capacity() == 0 {
            batch.reserve_exact(state.chunks.len().min(BATCH));
        }
        while batch.len() < BATCH {
            match state.chunks.pop_front() {
                Some(chunk) => batch.push_back(self.released.track(chunk)),
                None => break,
            }
        }
        if !batch.is_empty() {
            state.announce = false;
            Step::Write
        } else if std::mem::take(&mut state.announce) && !state.finish {
            Step::Announce
        } else if state.finish {
            Step::Finish
        } else {
            Step::Idle
        }
    }

    /// QUIC took some bytes: who may go on?
    fn drained(&self, inner: &Inner, bytes: usize) {
        let mut state = self.lock();
        state.queued -= bytes.min(state.queued);
        if state.queued > state.marks.low {
            return;
        }
        let promised = std::mem::take(&mut state.promised);
        let mut next = state.next();
        drop(state);
        // Others have the places of those that are gone.
        while let gone @ 1.. = try_again(next) {
            let mut state = self.lock();
            state.came(gone);
            next = state.next();
        }
        for to in promised {
            inner.send_ready(to);
        }
    }

    /// Whether senders wait though nothing is queued.
    fn is_awaited(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    /// Those that were told of room are not waited for any longer.
    fn forget_expected(&self) {
        self.lock().expected = 0;
    }

    /// Nothing is sent any more: who waits is told so by the answer to the next try.
    fn end(&self, inner: &Inner, over: Over) {
        let mut state = self.lock();
        state.over = Some(over);
        // What QUIC drops from now on says nothing.
        self.released.awaited.store(false, Ordering::SeqCst);
        state.chunks.clear();
        state.gathered = BytesMut::new();
        let left = std::mem::take(&mut state.queued);
        let waiting = state.waiting.all();
        drop(state);
        inner.connection.dequeued(left);
        try_again(waiting);
        self.drained(inner, 0);
    }
}

/// Lets those that wait for room look again. Of those that are gone, which are not told, the bytes.
fn try_again(waiting: impl IntoIterator<Item = Waiting>) -> usize {
    let mut gone = 0_usize;
    for Waiting { reply, size } in waiting {
        if reply.send(|env| atoms::ok().encode(env)).is_err() {
            gone = gone.saturating_add(size);
        }
    }
    gone
}

impl State {
    fn new(marks: Watermarks) -> Self {
        State {
            marks,
            chunks: VecDeque::new(),
            gathered: BytesMut::new(),
            queued: 0,
            finish: false,
            reset: None,
            priority: None,
            announce: false,
            over: None,
            pushed: 0,
            asked: VecDeque::new(),
            waiting: Waiters::default(),
            expected: 0,
            promised: Vec::new(),
        }
    }

    /// Those that will find room now, first come first. All of them would mostly find none, and come again and again.
    fn next(&mut self) -> Vec<Waiting> {
        let mut next = Vec::new();
        while self.queued.saturating_add(self.expected) < self.marks.high
            && let Some(waiting) = self.waiting.first()
        {
            self.expected = self.expected.saturating_add(waiting.size);
            next.push(waiting);
        }
        next
    }

    /// Somebody has come with so many bytes, mostly one of those that are expected.
    fn came(&mut self, bytes: usize) {
        self.expected = self.expected.saturating_sub(bytes);
    }

    fn flush(&mut self) {
        if !self.gathered.is_empty() {
            let gathered = self.gathered.split().freeze();
            self.chunk(gathered);
        }
    }

    fn chunk(&mut self, bytes: Bytes) {
        self.pushed += 1;
        // Mostly the only one.
        if self.chunks.capacity() == 0 {
            self.chunks.reserve_exact(1);
        }
        self.chunks.push_back(bytes);
    }

    /// Notes that somebody wants to know of what was sent until now.
    fn ask(&mut self) {
        let point = if self.finish {
            Point::End
        } else if self.asked.len() < MAX_ASKED {
            self.flush();
            Point::Chunk(self.pushed)
        } else {
            self.asked.pop_back();
            Point::Chunk(self.pushed + u64::from(!self.gathered.is_empty()))
        };
        if self.asked.back() != Some(&point) {
            self.asked.push_back(point);
        }
    }

    /// Whether what was first asked about has arrived, with so many chunks acknowledged. Then it is
    /// asked about no more.
    fn is_delivered(&mut self, released: u64) -> bool {
        let due = matches!(self.asked.front(), Some(Point::Chunk(n)) if *n <= released);
        if due {
            self.asked.pop_front();
        }
        due
    }
}

impl Inner {
    fn delivered(&self) {
        // A dead owner needs no message.
        let _ = self.owner.post(delivered);
    }

    fn send_ready(self: &Inner, to: LocalPid) {
        if to == self.owner.pid() {
            // A stream that is over has said so with its terminal message.
            let _ = self.owner.post(|env, handle, _| {
                Some(event(env, atoms::send_ready(), handle, atoms::undefined()))
            });
        } else {
            self.owner.tell(to, atoms::send_ready());
        }
    }
}

pub(super) fn delivered<'a>(env: Env<'a>, handle: Term<'a>, _: LocalPid) -> Option<Term<'a>> {
    Some(event(env, atoms::delivered(), handle, atoms::undefined()))
}

/// What serves the half, between its turns.
struct Serving {
    stream: Held<SendStream>,
    /// Taken from the queue, and not by QUIC yet.
    batch: VecDeque<Bytes>,
    is_finished: bool,
    is_announced: bool,
    over: Over,
    lost: Option<Box<ConnectionError>>,
    /// How long senders that were told of room are waited for.
    overdue: Option<Pin<Box<Sleep>>>,
    /// What was sent is delivered before the connection may go.
    _keep: Arc<dyn Keep>,
}

/// Does what there is to do.
pub(super) fn turn(inner: &Inner, cx: &mut Context<'_>) {
    let seat = &inner.write.seat;
    let Some((mut serving, served)) = seat.turn(|serving| serving.serve(inner, cx)) else {
        return;
    };
    if served.is_err() {
        serving.over = Over::Failed;
        // Dropped as it is the stream would be finished, and the peer would take it for whole. Fails
        // only if it is over.
        let _ = attempt(|| serving.stream.reset(VarInt::from_u32(0)));
        inner.fail();
    }
    if attempt(|| serving.finish(inner)).is_err() {
        inner.fail();
    }
    inner.half_over(serving.lost.take());
}

impl Serving {
    fn serve(&mut self, inner: &Inner, cx: &mut Context<'_>) -> Poll<()> {
        if !std::mem::replace(&mut self.is_announced, true) {
            inner.connection.announced();
        }
        // The time begins anew with each turn but the one that it rings for.
        self.overdue.take_if(|time| !time.is_elapsed());
        let early = inner.connection.begins_early();
        loop {
            fault::pass(fault::Point::StreamWrite);
            // QUIC would finish a later stream, which has the number of a rejected one.
            if early && let Poll::Ready(over) = self.stream.poll_stopped(cx) {
                self.stopped(inner, over);
                return Poll::Ready(());
            }
            let step = match inner.write.step(&mut self.batch, &self.stream) {
                Step::Finish if self.is_finished => Step::Idle,
                step => step,
            };
            match step {
                Step::Reset(code) => {
                    let stream = &self.stream;
                    if ready!(inner.may_tell_end(|| stream.poll_over(cx))) {
                        // Fails only if the stream was finished and acknowledged.
                        let _ = self.stream.reset(code);
                    }
                    return Poll::Ready(());
                }
                Step::Finish => {
                    self.is_finished = true;
                    // Fails only if it was stopped, which is waited for next.
                    let _ = self.stream.finish();
                    inner.write.drained(inner, 0);
                }
                Step::Write => {
                    let chunks = self.batch.make_contiguous();
                    match self.stream.poll_chunks(cx, chunks) {
                        Poll::Ready(Ok(written)) => {
                            self.overdue = None;
                            self.batch.drain(..written.chunks);
                            inner.connection.dequeued(written.bytes);
                            inner.write.drained(inner, written.bytes);
                        }
                        Poll::Ready(Err(error)) => {
                            self.write_error(inner, error);
                            return Poll::Ready(());
                        }
                        Poll::Pending => {
                            // Perhaps with new marks.
                            inner.write.drained(inner, 0);
                            return Poll::Pending;
                        }
                    }
                }
                Step::Announce => {
                    // An empty frame. Where flow control forbids even that, data is told of by itself.
                    if let Poll::Ready(Err(error)) = self.stream.poll_bytes(cx, &[]) {
                        self.write_error(inner, error);
                        return Poll::Ready(());
                    }
                }
                Step::Delivered => inner.delivered(),
                Step::Idle => {
                    inner.write.drained(inner, 0);
                    if let Poll::Ready(over) = self.stream.poll_stopped(cx) {
                        self.stopped(inner, over);
                        return Poll::Ready(());
                    }
                    if !inner.write.is_awaited() {
                        self.overdue = None;
                        return Poll::Pending;
                    }
                    let sleep = || Box::pin(tokio::time::sleep(COMES));
                    ready!(self.overdue.get_or_insert_with(sleep).as_mut().poll(cx));
                    self.overdue = None;
                    inner.write.forget_expected();
                }
            }
        }
    }

    fn write_error(&mut self, inner: &Inner, error: WriteError) {
        match error {
            WriteError::Stopped(code) => self.peer_stopped(inner, code),
            WriteError::ConnectionLost(error) => self.lost = Some(Box::new(error)),
            WriteError::ClosedStream => {}
            WriteError::ZeroRttRejected => self.rejected(inner),
        }
    }

    fn stopped(&mut self, inner: &Inner, result: Result<Option<VarInt>, StoppedError>) {
        match result {
            Ok(Some(code)) => self.peer_stopped(inner, code),
            // Everything was acknowledged.
            Ok(None) => {
                self.over = Over::Delivered;
                // First, so that whoever asks from now on is not forgotten.
                inner.write.end(inner, self.over);
                let asked = std::mem::take(&mut inner.write.lock().asked);
                for _ in asked {
                    inner.delivered();
                }
            }
            Err(StoppedError::ConnectionLost(error)) => self.lost = Some(Box::new(error)),
            Err(StoppedError::ZeroRttRejected) => self.rejected(inner),
        }
    }

    fn rejected(&mut self, inner: &Inner) {
        // So QUIC calls what has gone with the connection, too, before the handshake is done.
        if let Some(error) = inner.connection.close_reason() {
            self.lost = Some(Box::new(error));
            return;
        }
        self.over = Over::Rejected;
        inner.reject();
    }

    fn peer_stopped(&mut self, inner: &Inner, code: VarInt) {
        self.over = Over::Stopped(code);
        // First, so that who has the message gets this answer to the next send.
        inner.write.end(inner, self.over);
        // A dead owner needs no message.
        let _ = inner.owner.post(move |env, handle, _| {
            Some(event(
                env,
                atoms::peer_receive_aborted(),
                handle,
                code.into_inner(),
            ))
        });
    }

    /// Says that the half is over, and how.
    fn finish(&mut self, inner: &Inner) {
        if inner.failed() {
            self.lost = None;
            if self.over == Over::Closed {
                self.over = Over::Failed;
            }
        }
        inner.write.end(inner, self.over);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: Watermarks = Watermarks { high: 10, low: 5 };

    fn shared() -> Shared {
        Shared::new(Weak::new(), true, MARKS, 0)
    }

    fn never() -> Option<Waiter> {
        panic!("nobody has to wait")
    }

    #[test]
    fn an_empty_send_is_taken_whatever_waits() {
        let shared = shared();
        shared.lock().queued = 100;
        assert_eq!(Ok(()), shared.push(true, &[], 0, false, never));
    }

    #[test]
    fn nothing_is_taken_after_the_end() {
        let finished = shared();
        assert_eq!(Ok(()), finished.push(true, &[], 0, true, never));
        assert_eq!(
            Err(PushError::Closed),
            finished.push(true, &[], 1, false, never)
        );
        assert_eq!(
            Err(PushError::Closed),
            shared().push(false, &[], 0, true, never)
        );
        let reset = shared();
        reset.reset(VarInt::from_u32(1), Reset::Always);
        assert_eq!(
            Err(PushError::Closed),
            reset.push(true, &[], 0, false, never)
        );
        let stopped = shared();
        stopped.lock().over = Some(Over::Stopped(VarInt::from_u32(7)));
        assert_eq!(
            Err(PushError::Stopped(VarInt::from_u32(7))),
            stopped.push(true, &[], 0, false, never)
        );
        let receiving = Shared::new(Weak::new(), false, MARKS, 0);
        assert_eq!(
            Err(PushError::Closed),
            receiving.push(true, &[], 0, false, never)
        );
        assert!(!receiving.set_priority(1));
    }

    #[test]
    fn the_first_reset_stands_and_what_was_finished_is_delivered() {
        let shared = shared();
        shared.reset(VarInt::from_u32(1), Reset::UnlessFinished);
        shared.reset(VarInt::from_u32(2), Reset::Always);
        assert_eq!(Some(VarInt::from_u32(1)), shared.lock().reset);
        let finished = Shared::new(Weak::new(), true, MARKS, 0);
        finished.finish();
        finished.reset(VarInt::from_u32(1), Reset::UnlessFinished);
        assert_eq!(None, finished.lock().reset);
        finished.reset(VarInt::from_u32(3), Reset::Always);
        assert_eq!(Some(VarInt::from_u32(3)), finished.lock().reset);
    }

    #[test]
    fn small_pieces_keep_their_place_among_large_ones() {
        let mut state = State::new(MARKS);
        state.gathered.extend_from_slice(b"small");
        state.flush();
        state.chunks.push_back(Bytes::from_static(b"LARGE"));
        state.gathered.extend_from_slice(b"after");
        state.flush();
        state.flush();
        let order: Vec<&[u8]> = state.chunks.iter().map(|c| c.as_ref()).collect();
        assert_eq!(
            vec![b"small".as_ref(), b"LARGE".as_ref(), b"after".as_ref()],
            order
        );
    }

    #[test]
    fn what_was_asked_about_is_delivered_with_its_last_chunk_and_not_with_later_ones() {
        let mut state = State::new(MARKS);
        state.gathered.extend_from_slice(b"one");
        state.ask();
        state.ask();
        state.gathered.extend_from_slice(b"two");
        state.ask();
        state.chunk(Bytes::from_static(b"three"));
        assert_eq!(3, state.pushed);
        assert!(!state.is_delivered(0));
        assert!(state.is_delivered(1));
        // Asked twice at one point, answered once.
        assert!(!state.is_delivered(1));
        assert!(state.is_delivered(2));
        assert!(!state.is_delivered(3));
        // The end is more than its data.
        state.finish = true;
        state.ask();
        assert!(!state.is_delivered(3));
    }

    #[test]
    fn questions_beyond_the_limit_share_an_answer_and_none_is_early() {
        let mut state = State::new(MARKS);
        for _ in 0..MAX_ASKED + 10 {
            state.gathered.extend_from_slice(b"x");
            state.ask();
        }
        assert_eq!(MAX_ASKED, state.asked.len());
        state.flush();
        let mut answers = 0;
        while state.is_delivered(state.pushed - 1) {
            answers += 1;
        }
        assert_eq!(MAX_ASKED - 1, answers);
        assert!(state.is_delivered(state.pushed));
    }

    #[test]
    fn a_chunk_is_released_with_its_last_part() {
        let shared = shared();
        let mut chunk = shared.released.track(Bytes::from_static(b"abcdef"));
        let head = chunk.split_to(2);
        assert_eq!(
            (b"ab".as_ref(), b"cdef".as_ref()),
            (head.as_ref(), chunk.as_ref())
        );
        drop(head);
        assert_eq!(0, shared.released.count.load(Ordering::SeqCst));
        drop(chunk);
        assert_eq!(1, shared.released.count.load(Ordering::SeqCst));
    }
}
