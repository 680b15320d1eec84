//! Opening streams: some are opened ahead, so that a caller gets one without waiting for a native
//! thread. The peer does not see a stream before something is sent on it (RFC 9000, section 2), and
//! gives credit for streams by their numbers, which are handed out in order.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::engine::transport::{self, ConnectionError};
use rustler::{Atom, Encoder, Env, NifResult, ResourceArc, Term};
use tokio::time::Instant;

use super::{Connection, Handle};
use crate::quic::stream::{self, Halves};
use crate::vm::active::Active;
use crate::vm::bell::Bell;
use crate::vm::fault::{self, Point};
use crate::vm::messages::{Gone, atoms};
use crate::vm::reply::{LIVENESS, Reply};
use crate::vm::runtime::Worker;
use crate::vm::tasks::contain;

/// Streams that are open ahead at most, in each direction.
const MOST: usize = 64;

/// Of one direction.
pub(super) struct Shared {
    bidirectional: bool,
    pool: Mutex<Pool>,
    wake: Arc<Bell>,
    started: AtomicBool,
    /// The streams that were opened so far.
    opened: AtomicU64,
}

#[derive(Default)]
struct Pool {
    ready: VecDeque<Halves>,
    /// How many are to be ready: the number grows when a caller finds none.
    wanted: usize,
    waiting: VecDeque<Waiting>,
    /// No stream is opened any more: what callers are told.
    over: Option<Atom>,
}

struct Waiting {
    reply: Reply,
    active: Active,
    priority: i32,
    /// The time is measured here, so that a stream that is there at once is given also when there is no
    /// time to wait, and one that is not given was never opened.
    deadline: Option<Instant>,
}

impl Shared {
    pub(super) fn new(worker: &Worker, bidirectional: bool) -> Self {
        Shared {
            bidirectional,
            pool: Mutex::default(),
            wake: worker.bell(),
            started: AtomicBool::new(false),
            opened: AtomicU64::new(0),
        }
    }

    /// How many more streams may be opened, where the peer has allowed so many so far.
    pub(super) fn left_of(&self, allowed: u64) -> u64 {
        let ahead = self.lock().ready.len() as u64;
        let opened = self.opened.load(Ordering::Acquire);
        allowed.saturating_sub(opened) + ahead
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream that is open ahead, unless others wait for one.
    fn take(&self) -> Option<Halves> {
        let mut pool = self.lock();
        if !pool.waiting.is_empty() {
            return None;
        }
        let taken = pool.ready.pop_front();
        if taken.is_none() {
            pool.wanted = (pool.wanted * 2).clamp(1, MOST);
        }
        let refill = taken.is_some() && pool.ready.len() <= pool.wanted / 2;
        drop(pool);
        if refill {
            self.wake.ring();
        }
        taken
    }

    async fn open(&self, quic: &transport::Connection) -> Result<Halves, ConnectionError> {
        let halves = if self.bidirectional {
            Halves::bi(quic.open_bi().await?)
        } else {
            Halves::uni_out(quic.open_uni().await?)
        };
        // Numbers count up by four (RFC 9000, section 2.1).
        self.opened.store(halves.id / 4 + 1, Ordering::Release);
        Ok(halves)
    }

    /// A stream, if the peer allows one now.
    async fn open_now(
        &self,
        quic: &transport::Connection,
    ) -> Option<Result<Halves, ConnectionError>> {
        tokio::select! {
            biased;
            opened = self.open(quic) => Some(opened),
            () = std::future::ready(()) => None,
        }
    }

    /// When to look again: the first of those that wait will have waited long enough, or may be dead, as a
    /// death wakes nobody. Those that have waited long enough are told.
    fn expire(&self) -> Instant {
        let now = Instant::now();
        let mut pool = self.lock();
        pool.waiting.retain(|waiting| !waiting.reply.is_abandoned());
        let (late, rest): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut pool.waiting)
            .into_iter()
            .partition(|waiting| waiting.deadline.is_some_and(|deadline| deadline <= now));
        pool.waiting = rest;
        let deadlines = pool.waiting.iter().filter_map(|w| w.deadline);
        let next = deadlines.fold(now + LIVENESS, Instant::min);
        drop(pool);
        for waiting in late {
            waiting.reply.error(atoms::timeout());
        }
        next
    }

    fn wants_more(&self) -> bool {
        let pool = self.lock();
        pool.ready.len() < pool.wanted
    }

    fn is_awaited(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    /// Streams that were opened so far are of no use any more, and their numbers are given again.
    pub(super) fn forget(&self) {
        self.opened.store(0, Ordering::Release);
        let forgotten = std::mem::take(&mut self.lock().ready);
        drop(forgotten);
        self.wake.ring();
    }

    /// Those that wait get this for an answer.
    fn refuse(&self, why: Atom) {
        let waiting = std::mem::take(&mut self.lock().waiting);
        for waiting in waiting {
            waiting.reply.error(why);
        }
    }
}

/// Opens a stream. With `none` as the reference there is no waiting: `later` says that a call with a
/// reference is due, which waits for so many milliseconds, if it is a number, for the peer to allow one.
#[rustler::nif]
fn conn_open_stream<'a>(
    env: Env<'a>,
    handle: ResourceArc<Handle>,
    reference: Term<'a>,
    bidirectional: bool,
    active: Term<'a>,
    priority: i32,
    timeout: Term<'a>,
) -> NifResult<Term<'a>> {
    let active = Active::decode(active).ok_or(rustler::Error::BadArg)?;
    let connection = &handle.connection;
    if connection.is_closing() {
        return Ok((atoms::error(), connection.why_no_stream()).encode(env));
    }
    let opening = connection.opening(bidirectional);
    if !reference.is_ref() {
        let Some(halves) = opening.take() else {
            return Ok(atoms::later().encode(env));
        };
        let keep = handle.keep.clone();
        return Ok(
            match stream::make(
                env,
                connection.clone(),
                keep,
                halves,
                env.pid(),
                active,
                priority,
            ) {
                Ok(stream) => (atoms::ok(), stream).encode(env),
                Err(Gone) => (atoms::error(), atoms::closed()).encode(env),
            },
        );
    }
    let limit: Option<Duration> = timeout.decode().ok().map(Duration::from_millis);
    let (reply, operation) = Reply::about(env, reference, handle.clone());
    let mut pool = opening.lock();
    if let Some(why) = pool.over {
        drop(pool);
        reply.forget();
        return Ok((atoms::error(), why).encode(env));
    }
    pool.waiting.push_back(Waiting {
        reply,
        active,
        priority,
        deadline: limit.and_then(|limit| Instant::now().checked_add(limit)),
    });
    drop(pool);
    if !opening.started.swap(true, Ordering::AcqRel) {
        connection
            .worker
            .start(serve(connection.clone(), bidirectional));
    }
    opening.wake.ring();
    Ok(operation.encode(env))
}

impl Connection {
    fn opening(&self, bidirectional: bool) -> &Shared {
        if bidirectional {
            &self.opening_bidi
        } else {
            &self.opening_uni
        }
    }

    fn why_no_stream(&self) -> Atom {
        if self.fate.has_failed() {
            atoms::internal_error()
        } else {
            atoms::closed()
        }
    }

    /// Has those that wait for a stream looked at: one of them gave up.
    pub(super) fn opener_gave_up(&self) {
        for opening in [&self.opening_bidi, &self.opening_uni] {
            opening
                .lock()
                .waiting
                .retain(|waiting| !waiting.reply.is_cancelled());
        }
    }

    /// Gives the first of those that wait the stream, or keeps it for the next caller.
    fn hand_opened(self: &Arc<Self>, opening: &Shared, halves: Halves) {
        let mut halves = Some(halves);
        while let Some(taken) = halves.take() {
            let first = opening.lock().waiting.pop_front();
            let (Some(waiting), Some(keep)) = (first, self.keep()) else {
                opening.lock().ready.push_front(taken);
                return;
            };
            if waiting.reply.is_abandoned() {
                halves = Some(taken);
                continue;
            }
            let mut slot = Some(taken);
            let Waiting {
                reply,
                active,
                priority,
                ..
            } = waiting;
            let caller = reply.caller();
            let given = &mut slot;
            // Whoever gave up, or died, leaves the stream to the next one.
            let _ = reply.send(|env| {
                let stream = given.take().ok_or(Gone).and_then(|halves| {
                    stream::make(env, self.clone(), keep, halves, caller, active, priority)
                });
                match stream {
                    Ok(stream) => (atoms::ok(), stream).encode(env),
                    Err(Gone) => (atoms::error(), atoms::closed()).encode(env),
                }
            });
            halves = slot;
        }
    }
}

/// Opens streams for those that wait, and ahead, until the connection has ended.
async fn serve(connection: Arc<Connection>, bidirectional: bool) {
    let opening = connection.opening(bidirectional);
    let _ending = Ending(&connection, opening);
    loop {
        tokio::select! {
            biased;
            () = connection.fate.failed() => return,
            served = contain(open_while_wanted(&connection, opening)) => match served {
                Ok(()) => return,
                // Those that wait are told, and the next caller finds the task at work again.
                Err(_) => opening.refuse(atoms::internal_error()),
            },
        }
        if opening.is_awaited() {
            continue;
        }
        opening.wake.rung().await;
    }
}

async fn open_while_wanted(connection: &Arc<Connection>, opening: &Shared) {
    let quic = &connection.quic;
    loop {
        fault::pass(Point::OpenStream);
        // Whoever waits goes first, also with no time left.
        let mut allowed = true;
        while allowed && opening.is_awaited() {
            let ahead = opening.lock().ready.pop_front();
            let opened = match ahead {
                Some(halves) => Some(Ok(halves)),
                None => opening.open_now(quic).await,
            };
            match opened {
                Some(Ok(halves)) => connection.hand_opened(opening, halves),
                Some(Err(_)) => return,
                None => allowed = false,
            }
        }
        // A caller without time who has come since then is told so only where the peer allows no stream.
        if !allowed {
            let next = opening.expire();
            if opening.is_awaited() {
                tokio::select! {
                    biased;
                    opened = opening.open(quic) => match opened {
                        Ok(halves) => connection.hand_opened(opening, halves),
                        Err(_) => return,
                    },
                    () = opening.wake.rung() => {}
                    () = tokio::time::sleep_until(next) => {}
                }
                continue;
            }
        }
        while opening.wants_more() {
            match opening.open_now(quic).await {
                Some(Ok(halves)) => opening.lock().ready.push_back(halves),
                Some(Err(_)) => return,
                None => break,
            }
        }
        tokio::select! {
            () = opening.wake.rung() => {}
            _ = quic.closed() => return,
        }
    }
}

/// Says that no stream is opened any more, however the task ends. Streams that nobody has got end here,
/// on a native thread: that takes the connection's lock.
struct Ending<'s>(&'s Connection, &'s Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let Ending(connection, opening) = self;
        let why = connection.why_no_stream();
        let mut pool = opening.lock();
        pool.over = Some(why);
        let ready = std::mem::take(&mut pool.ready);
        drop(pool);
        drop(ready);
        opening.refuse(why);
    }
}
