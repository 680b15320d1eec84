//! Sending unreliable datagrams (RFC 9221): a bounded queue, and the task that feeds QUIC from it, in
//! order. Whoever finds the queue full waits for room.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::engine::transport::SendDatagramError;
use bytes::Bytes;
use rustler::{Atom, Binary, Encoder, Env, ResourceArc, Term};

use super::{Connection, Handle};
use crate::vm::bell::Bell;
use crate::vm::fault::{self, Point};
use crate::vm::messages::atoms;
use crate::vm::payload::{Piece, piece};
use crate::vm::reply::Reply;
use crate::vm::runtime::Worker;
use crate::vm::tasks::contain;
use crate::vm::waiters::Look;

/// Bytes that wait for QUIC, with what each datagram costs beside its bytes.
const ROOM: usize = 256 * 1024;
const COST: usize = 64;

pub(super) struct Shared {
    state: Mutex<State>,
    wake: Arc<Bell>,
    started: AtomicBool,
    /// Taken, and too large for the path when their turn came, or too old when there was no room for others.
    dropped: AtomicU64,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Bytes>,
    /// Of those that the task has in hand, too.
    size: usize,
    /// The largest that fits, or why none does, as far as is known.
    largest: Option<Result<usize, Atom>>,
    waiting: VecDeque<Waiting>,
    look: Look,
    over: bool,
}

struct Waiting {
    reply: Reply,
    /// Of a datagram that is too large for what is known: the task looks again.
    too_large: Option<usize>,
}

/// What becomes of a datagram.
enum Taken {
    Queued,
    /// To be tried again when the task says so.
    Later,
    Refused(Atom),
}

impl Shared {
    pub(super) fn new(worker: &Worker) -> Self {
        Shared {
            state: Mutex::default(),
            wake: worker.bell(),
            started: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
        }
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// With `drops` the oldest make room.
    fn push(&self, data: &Binary, drops: bool, wait: impl FnOnce() -> Option<Reply>) -> Taken {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.over {
            return Taken::Refused(atoms::closed());
        }
        let fits = match state.largest {
            Some(Err(why)) => return Taken::Refused(why),
            Some(Ok(largest)) => data.len() <= largest,
            None => false,
        };
        if fits && drops {
            self.make_room(state);
        } else if !fits || state.size >= ROOM {
            let is_gone = |other: &Waiting| other.reply.is_cancelled();
            state.look.through(&mut state.waiting, is_gone);
            if let Some(reply) = wait() {
                state.waiting.push_back(Waiting {
                    reply,
                    too_large: (!fits).then_some(data.len()),
                });
            }
            return Taken::Later;
        }
        state.size += data.len() + COST;
        state.queue.push_back(match piece(data) {
            Piece::Held(bytes) => bytes,
            Piece::Small(bytes) => Bytes::copy_from_slice(bytes),
        });
        Taken::Queued
    }

    /// What the task has in hand stays.
    fn make_room(&self, state: &mut State) {
        while state.size >= ROOM {
            let Some(oldest) = state.queue.pop_front() else {
                return;
            };
            state.size = state.size.saturating_sub(oldest.len() + COST);
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What is next to be sent. Tells those who asked about the size.
    fn take(&self, connection: &Connection) -> VecDeque<Bytes> {
        let mut state = self.lock();
        let asked = |waiting: &Waiting| waiting.too_large.is_some();
        if state.largest.is_none() || state.waiting.iter().any(asked) {
            drop(state);
            // Takes the connection's lock.
            let largest = largest(connection);
            state = self.lock();
            state.largest = Some(largest);
            let (told, rest) = std::mem::take(&mut state.waiting)
                .into_iter()
                .partition(asked);
            state.waiting = rest;
            let queue = std::mem::take(&mut state.queue);
            drop(state);
            tell(told, largest);
            return queue;
        }
        std::mem::take(&mut state.queue)
    }

    /// QUIC has taken a datagram.
    fn sent(&self, len: usize) {
        let mut state = self.lock();
        state.size = state.size.saturating_sub(len + COST);
        if state.size > ROOM / 2 || state.waiting.is_empty() {
            return;
        }
        let (asked, room) = std::mem::take(&mut state.waiting)
            .into_iter()
            .partition(|waiting| waiting.too_large.is_some());
        state.waiting = asked;
        drop(state);
        try_again(room);
    }
}

fn tell(asked: VecDeque<Waiting>, largest: Result<usize, Atom>) {
    for Waiting { reply, too_large } in asked {
        match largest {
            Ok(largest) if too_large.is_some_and(|len| len > largest) => {
                reply.error(atoms::emsgsize());
            }
            // The next try finds out.
            _ => try_again([Waiting { reply, too_large }]),
        }
    }
}

fn try_again(waiting: impl IntoIterator<Item = Waiting>) {
    for Waiting { reply, .. } in waiting {
        // Who gave up waiting is not told.
        let _ = reply.send(|env| atoms::ok().encode(env));
    }
}

fn largest(connection: &Connection) -> Result<usize, Atom> {
    // Larger than any, so that nothing is sent.
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    match connection.quic.send_datagram(Bytes::from_static(&ZEROS)) {
        Err(SendDatagramError::Disabled) => Err(atoms::disabled()),
        Err(SendDatagramError::ConnectionLost(_)) => Err(atoms::closed()),
        _ => connection
            .quic
            .max_datagram_size()
            .ok_or(atoms::unsupported()),
    }
}

/// Queues one datagram, or says why it cannot be sent. If it cannot be now, `Mode` says what follows:
/// `wait` for word to try again, or `now`, which is `full`; with `drop_oldest` that is only the answer while the
/// largest that fits is not known.
#[rustler::nif]
fn conn_send_datagram<'a>(
    env: Env<'a>,
    handle: ResourceArc<Handle>,
    reference: Term<'a>,
    data: Binary<'a>,
    mode: Atom,
) -> Term<'a> {
    let connection = &handle.connection;
    let shared = &connection.datagrams_out;
    if connection.is_closing() {
        return (atoms::error(), atoms::closed()).encode(env);
    }
    let mut operation = None;
    let taken = shared.push(&data, mode == atoms::drop_oldest(), || {
        if mode != atoms::wait() {
            return None;
        }
        let (reply, made) = Reply::about(env, reference, handle.clone());
        operation = Some(made);
        Some(reply)
    });
    match (&taken, &operation) {
        (Taken::Refused(why), _) => return (atoms::error(), *why).encode(env),
        (Taken::Later, None) => return atoms::full().encode(env),
        _ => {}
    }
    if !shared.started.swap(true, Ordering::AcqRel) {
        connection.worker.start(serve(connection.clone()));
    }
    shared.wake.ring();
    match operation {
        Some(operation) => (atoms::wait(), operation).encode(env),
        None => atoms::ok().encode(env),
    }
}

async fn serve(connection: Arc<Connection>) {
    let _ending = Ending(&connection.datagrams_out);
    let ended = tokio::select! {
        ended = contain(send(&connection)) => ended,
        () = connection.fate.failed() => return,
    };
    if ended.is_err() {
        connection.fail();
    }
}

async fn send(connection: &Connection) {
    let shared = &connection.datagrams_out;
    loop {
        fault::pass(Point::DatagramsOut);
        let batch = shared.take(connection);
        if batch.is_empty() {
            tokio::select! {
                () = shared.wake.rung() => continue,
                _ = connection.quic.closed() => return,
            }
        }
        for datagram in batch {
            let len = datagram.len();
            match connection.quic.send_datagram_wait(datagram).await {
                Ok(()) => {}
                Err(SendDatagramError::ConnectionLost(_)) => return,
                // The path takes less than it did when the datagram was queued.
                Err(_) => {
                    shared.dropped.fetch_add(1, Ordering::Relaxed);
                    shared.lock().largest = None;
                }
            }
            shared.sent(len);
        }
    }
}

/// Says that no datagram is sent any more, however the task ends.
struct Ending<'s>(&'s Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.over = true;
        state.queue.clear();
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for Waiting { reply, .. } in waiting {
            reply.error(atoms::closed());
        }
    }
}
