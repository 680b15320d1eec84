//! Connections: the handle, its NIFs, and the tasks that serve it.
//!
//! A connection ends when it is closed, when its owner dies, when its handle and those of all its
//! streams are collected, or when the network or the peer ends it. The owner hears of it once.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustler::{
    Atom, Binary, Encoder, Env, LocalPid, Monitor, NifResult, Resource, ResourceArc, Term,
};
use rustls::pki_types::CertificateDer;
use tokio::sync::Notify;

use crate::engine::transport::{self, ConnectionError, VarInt};
use crate::quic::options::{patience, varint};
use crate::quic::stream::{self, Halves, Home, Keep, Watermarks, begun};
use crate::tls::session::Data;
use crate::udp::address::{on_link_of, text, text_with_port};
use crate::udp::aimed;
use crate::vm::active::Active;
use crate::vm::bell::Bell;
use crate::vm::error::{Ended, binary, closed_by_peer};
use crate::vm::fault::{self, Point};
use crate::vm::messages::{Gone, atoms, event};
use crate::vm::objects::{Counted, Kind};
use crate::vm::owner::Owner;
use crate::vm::reply::{Reply, Subject};
use crate::vm::runtime::Worker;
use crate::vm::tasks::{Fate, Panicked, attempt, contain};
use crate::vm::waiters::Waiters;

mod changes;
mod datagram;
mod datagram_out;
mod knowledge;
mod live;
mod migration;
mod opening;
mod session;
mod silence;

pub(crate) use migration::Way;
pub(crate) use session::{Begun, Early, Outcome};

/// The handle.
pub(crate) struct Handle {
    pub(crate) connection: Arc<Connection>,
    keep: Arc<Kept>,
}

#[rustler::resource_impl(name = "macula_connection")]
impl Resource for Handle {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, monitor: Monitor) {
        if self.connection.owner.is_down(monitor) {
            self.connection.close(VarInt::from_u32(0), b"owner died");
        }
    }
}

impl Subject for ResourceArc<Handle> {
    fn cancelled(&self) {
        self.connection.accept_wanted.ring();
        self.connection.opener_gave_up();
    }
}

/// Held by every handle of a connection and of its streams; the last one closes it.
pub(crate) struct Kept(Arc<Connection>);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.close(VarInt::from_u32(0), b"");
    }
}

pub(crate) struct Connection {
    pub(crate) quic: transport::Connection,
    /// What becomes of the driving.
    fate: Arc<Fate>,
    /// The streams that are not over.
    open: Mutex<HashMap<u64, Weak<stream::Inner>>>,
    /// Drives the connection, and runs all that serves it.
    pub(crate) worker: &'static Worker,
    owner: Owner<Handle>,
    watermarks: Watermarks,
    /// How long the peer may leave something unanswered.
    patience: Option<Duration>,
    /// The peer has left something unanswered for longer.
    unanswered: AtomicBool,
    /// A task that serves it has panicked.
    failed: AtomicBool,
    close: Mutex<Option<(VarInt, Vec<u8>)>>,
    close_wanted: Notify,
    accept: Mutex<Accept>,
    accept_wanted: Arc<Bell>,
    accepting: AtomicBool,
    /// The task that takes the peer's streams has come to its end.
    accepted: Notify,
    /// The owner has, or will never have, the message that gives it the connection.
    given: Notify,
    /// For streams that come from the peer: they keep the connection as any other does.
    keep: Mutex<Weak<Kept>>,
    migration: migration::Shared,
    datagrams: datagram::Shared,
    datagrams_out: datagram_out::Shared,
    opening_bidi: opening::Shared,
    opening_uni: opening::Shared,
    changes: changes::Shared,
    session: session::Shared,
    /// Bytes that wait natively, in all streams together. A stream's task may count a byte out
    /// before its sender has counted it in.
    queued: AtomicIsize,
    streams: AtomicUsize,
    _counted: Counted,
}

impl Keep for Kept {}

impl Home for Connection {
    fn worker(&self) -> &'static Worker {
        self.worker
    }

    fn watermarks(&self) -> Watermarks {
        self.watermarks
    }

    fn keep_up_with(&self, id: u64, stream: &Arc<stream::Inner>) {
        self.streams.fetch_add(1, Ordering::Relaxed);
        self.open().insert(id, Arc::downgrade(stream));
        if self.fate.has_failed() {
            stream.fail();
        }
    }

    fn is_over(&self, id: u64, stream: &stream::Inner) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
        let mut open = self.open();
        if open
            .get(&id)
            .is_some_and(|known| std::ptr::eq(known.as_ptr(), stream))
        {
            open.remove(&id);
        }
    }

    fn is_closed_here(&self) -> bool {
        self.closing().is_some()
    }

    fn has_failed(&self) -> bool {
        self.fate.has_failed()
    }

    fn begins_early(&self) -> bool {
        self.session.begins_early()
    }

    /// A connection that was closed as its peer did not answer has timed out.
    fn ended(&self, error: ConnectionError) -> ConnectionError {
        let unanswered = self.unanswered.load(Ordering::Acquire) || self.session.is_late();
        if error == ConnectionError::LocallyClosed && unanswered {
            return ConnectionError::TimedOut;
        }
        error
    }

    fn close_reason(&self) -> Option<ConnectionError> {
        self.quic.close_reason().map(|error| self.ended(error))
    }

    fn queued(&self, bytes: usize) {
        self.queued
            .fetch_add(bytes.cast_signed(), Ordering::Relaxed);
    }

    fn dequeued(&self, bytes: usize) {
        self.queued
            .fetch_sub(bytes.cast_signed(), Ordering::Relaxed);
    }

    /// The message is built and sent with the owner locked.
    fn announced(&self) {
        self.owner.settled();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        live::remove(self);
    }
}

/// Streams of the peer that are taken from QUIC at most before somebody asks for them.
const AHEAD: usize = 64;

/// What the options say about a connection and its streams, beside what QUIC is told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) watermarks: Watermarks,
    pub(crate) patience: Option<Duration>,
    /// The streams of the peer that may be open at a time, bidirectional and unidirectional ones.
    pub(crate) streams: [u64; 2],
}

impl Terms {
    /// The time is in milliseconds, and 0 is for ever.
    pub(crate) fn new(watermarks: Watermarks, disconnect_timeout: u64, streams: [u64; 2]) -> Self {
        Terms {
            watermarks,
            patience: patience(disconnect_timeout),
            streams,
        }
    }
}

/// Who wants the streams that the peer opens.
#[derive(Default)]
struct Accept {
    waiting: Waiters<Waiting>,
    /// So many are taken ahead: the number grows when a caller finds none.
    ahead: usize,
    /// Every further one goes to the owner, in this mode.
    armed: Option<Active>,
    ready: VecDeque<Halves>,
}

struct Waiting {
    reply: Reply,
    active: Active,
    /// Takes a stream that is there, and waits for none.
    now: bool,
    /// The task has looked for one.
    seen: bool,
}

impl Connection {
    pub(crate) fn new(
        quic: transport::Connection,
        worker: &'static Worker,
        fate: Arc<Fate>,
        owner: LocalPid,
        bound: SocketAddr,
        Terms {
            watermarks,
            patience,
            streams,
        }: Terms,
        begun: Begun,
    ) -> Arc<Self> {
        // A panic in there is the end of the connection, and told elsewhere.
        let client = attempt(|| quic.side().is_client()) == Ok(true);
        let connection = Arc::new(Connection {
            quic,
            fate,
            open: Mutex::default(),
            worker,
            owner: Owner::new(owner),
            watermarks,
            patience,
            unanswered: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            close: Mutex::new(None),
            close_wanted: Notify::new(),
            accept: Mutex::new(Accept::default()),
            accept_wanted: worker.bell(),
            accepting: AtomicBool::new(false),
            accepted: Notify::new(),
            given: Notify::new(),
            keep: Mutex::new(Weak::new()),
            migration: migration::Shared::new(bound),
            datagrams: datagram::Shared::new(worker),
            datagrams_out: datagram_out::Shared::new(worker),
            opening_bidi: opening::Shared::new(worker, true),
            opening_uni: opening::Shared::new(worker, false),
            changes: changes::Shared::new(streams),
            session: session::Shared::new(begun, client),
            queued: AtomicIsize::new(0),
            streams: AtomicUsize::new(0),
            _counted: Counted::new(Kind::Connection),
        });
        connection.quic.take_turns();
        live::add(&connection);
        connection
    }

    /// Makes the handle for `owner`, and starts what watches over the connection, which waits for
    /// the end of `giving`. `Gone` if the owner is dead: then the connection is closed.
    pub(crate) fn make<'a>(
        self: &Arc<Self>,
        env: Env<'a>,
        owner: LocalPid,
    ) -> Result<Term<'a>, Gone> {
        let keep = Arc::new(Kept(self.clone()));
        *self.keep.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&keep);
        self.worker.start(watch(self.clone()));
        let handle = ResourceArc::new(Handle {
            connection: self.clone(),
            keep,
        });
        self.owner.attach(env, &handle, owner)?;
        Ok(handle.encode(env))
    }

    /// What the owner is told about the connection comes after the connection itself, which is sent
    /// while the result lives.
    pub(crate) fn giving(self: &Arc<Self>) -> Giving {
        Giving(self.clone())
    }

    fn local_address(&self) -> SocketAddr {
        let bound = self.migration.bound();
        let ip = match self.quic.local_ip() {
            Some(ip) => ip,
            // A socket for all addresses does not know: the system says which one it takes.
            None if bound.ip().is_unspecified() => {
                aimed::source(self.quic.remote_address()).unwrap_or(bound.ip())
            }
            None => bound.ip(),
        };
        let beside = match bound {
            SocketAddr::V6(v6) if v6.scope_id() != 0 => bound,
            _ => self.quic.remote_address(),
        };
        on_link_of(ip, bound.port(), beside)
    }

    /// Lets the handle be collected, unless something else is still owed.
    fn unpin(&self) {
        let accept = self.accept();
        let closing = self.closing();
        let idle = accept.armed.is_none() && closing.is_none();
        let unpinned = idle.then(|| self.owner.take_pin()).flatten();
        drop(closing);
        drop(accept);
        drop(unpinned);
    }

    /// Has the connection closed by its task; the first reason stands. Runs on VM threads.
    pub(crate) fn close(&self, code: VarInt, reason: &[u8]) {
        self.closing()
            .get_or_insert_with(|| (code, reason.to_vec()));
        self.close_wanted.notify_one();
    }

    /// With what its user has closed it.
    fn closing(&self) -> MutexGuard<'_, Option<(VarInt, Vec<u8>)>> {
        self.close.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closed by its user, or at its end.
    fn is_closing(&self) -> bool {
        self.is_closed_here() || self.owner.has_ended()
    }

    /// A task that serves the connection has failed, and with it the connection.
    fn fail(&self) {
        self.failed.store(true, Ordering::Release);
        self.close(VarInt::from_u32(0), b"internal error");
    }

    /// Whether it is over for QUIC.
    fn has_ended(&self) -> bool {
        is_over(&self.quic)
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, Weak<stream::Inner>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Driving the connection has failed.
    fn fail_streams(&self) {
        let streams: Vec<_> = self.open().values().filter_map(Weak::upgrade).collect();
        for stream in streams {
            stream.fail();
        }
        self.datagrams.look();
    }

    fn accept(&self) -> MutexGuard<'_, Accept> {
        self.accept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self) -> Option<Arc<Kept>> {
        self.keep
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .upgrade()
    }

    fn want_streams(self: &Arc<Self>) {
        if !self.accepting.swap(true, Ordering::AcqRel) {
            self.worker.start(accept_streams(self.clone()));
        }
        self.accept_wanted.ring();
    }

    /// A stream that was taken ahead, unless others wait for one, or this side wants no more of them.
    fn take_ready(&self) -> Option<Halves> {
        let mut accept = self.accept();
        if !accept.waiting.is_empty() || self.is_closed_here() {
            return None;
        }
        let taken = accept.ready.pop_front();
        let refill = taken.is_some() && accept.ready.len() <= accept.ahead / 2;
        drop(accept);
        if refill {
            self.accept_wanted.ring();
        }
        taken
    }

    /// No stream is there now: answers those that wait for none.
    fn expire(&self) {
        let is_late = |waiting: &Waiting| waiting.now && waiting.seen;
        let expired = self.accept().waiting.take_out(is_late);
        for waiting in expired {
            waiting.reply.error(atoms::timeout());
        }
    }

    /// Gives the streams that came to those who want them.
    fn hand_out(self: &Arc<Self>) {
        loop {
            let mut accept = self.accept();
            if accept.ready.is_empty() || self.is_closed_here() {
                return;
            }
            let waiting = accept.waiting.first();
            let armed = accept.armed;
            let Some(halves) = (waiting.is_some() || armed.is_some())
                .then(|| accept.ready.pop_front())
                .flatten()
            else {
                return;
            };
            drop(accept);
            let Some(keep) = self.keep() else { return };
            if let Some(Waiting { reply, active, .. }) = waiting {
                if reply.is_abandoned() {
                    self.accept().ready.push_front(halves);
                    continue;
                }
                // Not taken out before it is known that somebody waits.
                let mut halves = Some(halves);
                let (connection, caller) = (self.clone(), reply.caller());
                let slot = &mut halves;
                // Who gave up, or died, leaves the stream to the next one.
                let _ = reply.send(|env| {
                    let stream = slot.take().ok_or(Gone).and_then(|halves| {
                        stream::make(env, connection.clone(), keep, halves, caller, active, 0)
                    });
                    match stream {
                        Ok(stream) => (atoms::ok(), stream).encode(env),
                        Err(Gone) => (atoms::error(), atoms::closed()).encode(env),
                    }
                });
                if let Some(halves) = halves {
                    self.accept().ready.push_front(halves);
                }
            } else if let Some(active) = armed {
                let connection = self.clone();
                // A dead owner closes the connection, and with it the stream.
                let _ = self.owner.post(move |env, handle, to| {
                    let bidirectional = halves.send.is_some();
                    let id = halves.id;
                    let stream =
                        stream::make(env, connection.clone(), keep, halves, to, active, 0).ok()?;
                    let direction = if bidirectional {
                        atoms::bidirectional()
                    } else {
                        atoms::unidirectional()
                    };
                    let info = Term::map_from_pairs(
                        env,
                        &[
                            (atoms::conn(), handle),
                            (atoms::stream_id(), id.encode(env)),
                            (atoms::direction(), direction.encode(env)),
                            (atoms::flags(), u8::from(!bidirectional).encode(env)),
                        ],
                    )
                    .ok()?;
                    Some(event(env, atoms::new_stream(), stream, info))
                });
            }
        }
    }
}

/// The owner has the message that gives it the connection, or will never have one, when this is dropped.
pub(crate) struct Giving(Arc<Connection>);

impl Drop for Giving {
    fn drop(&mut self) {
        self.0.given.notify_one();
    }
}

/// Watches over the connection, and tells the owner when it has ended.
async fn watch(connection: Arc<Connection>) {
    connection.given.notified().await;
    if attempt(|| session::begin(&connection)).is_err() {
        connection.fail();
    }
    let ended = tokio::select! {
        biased;
        () = connection.fate.failed() => Err(Panicked),
        ended = contain(close_when_wanted(&connection)) => ended,
    };
    let error = match ended {
        Ok(error) if !connection.failed.load(Ordering::Acquire) => Some(error),
        _ => {
            connection.fail();
            // Nothing is left to close of one that has failed in itself.
            let _ = attempt(|| {
                connection
                    .quic
                    .close(VarInt::from_u32(0), b"internal error");
            });
            None
        }
    };
    if connection.fate.has_failed() {
        connection.fail_streams();
    }
    connection.migration.close();
    connection.accept_wanted.ring();
    // Streams that arrived before are announced before.
    while connection.accepting.load(Ordering::Acquire) {
        connection.accepted.notified().await;
    }
    // And streams that end with it are told before.
    connection.worker.passed_on().await;
    let tag = match &error {
        Some(ConnectionError::LocallyClosed) => atoms::closed(),
        Some(error) if closed_by_peer(error) => atoms::shutdown(),
        _ => atoms::transport_shutdown(),
    };
    connection.owner.post_terminal(move |env, handle, _| {
        let reason = match &error {
            Some(ConnectionError::LocallyClosed) => atoms::normal().encode(env),
            Some(error) => Ended(error).encode(env),
            None => atoms::internal_error().encode(env),
        };
        Some(event(env, tag, handle, reason))
    });
}

/// Whether a connection has ended.
pub(crate) fn is_over(quic: &transport::Connection) -> bool {
    attempt(|| quic.close_reason().is_some()) != Ok(false)
}

/// Closes the connection when that is wanted, and answers why it has ended.
async fn close_when_wanted(connection: &Connection) -> ConnectionError {
    loop {
        fault::pass(Point::Connection);
        tokio::select! {
            biased;
            error = connection.quic.closed() => return connection.ended(error),
            () = silence::unanswered(connection) => {
                connection.unanswered.store(true, Ordering::Release);
                connection.quic.close(VarInt::from_u32(0), b"disconnect timeout");
            }
            () = connection.close_wanted.notified() => {
                let wanted = connection.closing().clone();
                if let Some((code, reason)) = wanted {
                    connection.quic.close(code, &reason);
                }
            }
        }
    }
}

/// Takes the peer's streams while somebody wants them, and a few ahead. Further ones stay with QUIC. The
/// peer's limit on open streams counts all of them.
async fn accept_streams(connection: Arc<Connection>) {
    let accepting = Accepting(&connection);
    let failed = contain(accept_while_wanted(&connection)).await.is_err();
    if failed {
        connection.fail();
    }
    let why = if failed || connection.fate.has_failed() {
        atoms::internal_error()
    } else {
        atoms::closed()
    };
    let waiting = connection.accept().waiting.all();
    for Waiting { reply, .. } in waiting {
        reply.error(why);
    }
    // Later calls find the connection closed when they start the task anew.
    drop(accepting);
    if !connection.accept().waiting.is_empty() {
        connection.want_streams();
    }
}

async fn accept_while_wanted(connection: &Arc<Connection>) {
    loop {
        fault::pass(Point::AcceptStreams);
        connection.hand_out();
        let (asked, ahead, now) = {
            let mut accept = connection.accept();
            let mut now = false;
            accept.waiting.keep(|waiting| {
                waiting.seen = true;
                now |= waiting.now;
                !waiting.reply.is_cancelled()
            });
            let asked = !accept.waiting.is_empty() || accept.armed.is_some();
            (asked, accept.ready.len() < accept.ahead, now)
        };
        let ended = connection.close_reason();
        // Who closed it wants nothing of it any more, though QUIC may hear of that only later.
        if connection.is_closed_here() || matches!(ended, Some(ConnectionError::LocallyClosed)) {
            let unwanted = std::mem::take(&mut connection.accept().ready);
            drop(unwanted);
            break;
        }
        if ended.is_some() && !asked {
            break;
        }
        let wanted = asked || ahead;
        let halves = if wanted {
            let either = async {
                tokio::select! {
                    accepted = connection.quic.accept_bi() => accepted.map(Halves::bi),
                    accepted = connection.quic.accept_uni() => accepted.map(Halves::uni_in),
                }
            };
            tokio::select! {
                biased;
                accepted = either => accepted,
                () = std::future::ready(()), if now => {
                    connection.expire();
                    continue;
                }
                () = connection.accept_wanted.rung() => continue,
            }
        } else {
            connection.accept_wanted.rung().await;
            continue;
        };
        match halves {
            Ok(halves) => connection.accept().ready.push_back(halves),
            Err(_) => match last_stream(&connection.quic).await {
                Some(halves) => connection.accept().ready.push_back(halves),
                None => break,
            },
        }
    }
}

/// Says that the peer's streams are no longer taken, however the task ends: the terminal message of the
/// connection waits for it.
struct Accepting<'c>(&'c Connection);

impl Drop for Accepting<'_> {
    fn drop(&mut self) {
        self.0.accepting.store(false, Ordering::Release);
        self.0.accepted.notify_one();
    }
}

/// A stream that arrived before the connection ended.
async fn last_stream(quic: &transport::Connection) -> Option<Halves> {
    match quic.accept_bi().await {
        Ok(stream) => Some(Halves::bi(stream)),
        Err(_) => quic.accept_uni().await.ok().map(Halves::uni_in),
    }
}

/// Waits for one stream of the peer; with `now` the answer is `timeout` if none is there. One that was taken
/// ahead is given at once.
#[rustler::nif]
fn conn_accept_stream<'a>(
    env: Env<'a>,
    handle: ResourceArc<Handle>,
    reference: Term<'a>,
    active: Term<'a>,
    now: bool,
) -> NifResult<Term<'a>> {
    let active = Active::decode(active).ok_or(rustler::Error::BadArg)?;
    let connection = &handle.connection;
    if let Some(halves) = connection.take_ready() {
        let keep = handle.keep.clone();
        return Ok(
            match stream::make(env, connection.clone(), keep, halves, env.pid(), active, 0) {
                Ok(stream) => (atoms::ok(), stream).encode(env),
                Err(Gone) => (atoms::error(), atoms::closed()).encode(env),
            },
        );
    }
    let (reply, operation) = Reply::about(env, reference, handle.clone());
    let mut accept = connection.accept();
    accept.ahead = (accept.ahead * 2).clamp(1, AHEAD);
    let waiting = Waiting {
        reply,
        active,
        now,
        seen: false,
    };
    accept
        .waiting
        .join(waiting, |waiting| waiting.reply.is_abandoned());
    drop(accept);
    connection.want_streams();
    Ok(operation.encode(env))
}

/// Has every further stream of the peer delivered to the owner.
#[rustler::nif]
fn conn_arm<'a>(
    env: Env<'a>,
    handle: ResourceArc<Handle>,
    active: Term<'a>,
) -> NifResult<Term<'a>> {
    let active = Active::decode(active).ok_or(rustler::Error::BadArg)?;
    let connection = &handle.connection;
    if connection.owner.pid() != env.pid() {
        return Ok((atoms::error(), atoms::not_owner()).encode(env));
    }
    if connection.is_closing() {
        return Ok((atoms::error(), atoms::closed()).encode(env));
    }
    let mut accept = connection.accept();
    accept.armed = Some(active);
    connection.owner.pin(&handle);
    drop(accept);
    connection.want_streams();
    Ok(atoms::ok().encode(env))
}

#[rustler::nif]
fn conn_close(handle: ResourceArc<Handle>, code: u64, reason: Binary) -> Atom {
    // Its last message is owed even if the handle is dropped now.
    let accept = handle.connection.accept();
    handle.connection.owner.pin(&handle);
    handle.connection.close(varint(code), &reason);
    drop(accept);
    atoms::ok()
}

#[rustler::nif]
fn conn_begin_transfer<'a>(env: Env<'a>, handle: ResourceArc<Handle>, to: LocalPid) -> Term<'a> {
    begun(
        env,
        handle.connection.owner.begin_transfer(env, &handle, to),
    )
}

#[rustler::nif]
fn conn_commit_transfer(env: Env, handle: ResourceArc<Handle>) -> Atom {
    if !handle.connection.owner.commit_transfer(env, &handle) {
        handle.connection.close(VarInt::from_u32(0), b"owner died");
    }
    atoms::ok()
}

/// How many bytes of all its streams together the peer may send ahead of their being read. A
/// listener may begin small and allow more to those it knows.
#[rustler::nif]
fn conn_set_receive_window(handle: ResourceArc<Handle>, bytes: u64) -> Atom {
    let connection = handle.connection.clone();
    // On a native thread, as it takes the connection's lock.
    let worker = connection.worker;
    worker.start(async move {
        // Before that the limit of early data counts.
        connection.session.outcome().await;
        connection.quic.set_receive_window(varint(bytes));
    });
    atoms::ok()
}

/// Whether a term is a live handle of a connection.
#[rustler::nif]
fn conn_is(term: Term) -> bool {
    term.decode::<ResourceArc<Handle>>().is_ok()
}

/// What the handshake told.
pub(crate) struct Handshake {
    pub(crate) protocol: Option<Vec<u8>>,
    pub(crate) server_name: Option<String>,
    /// The peer's own certificate first. None where the peer has shown none.
    pub(crate) peer_certificates: Vec<CertificateDer<'static>>,
    pub(crate) resumed: bool,
}

impl Handshake {
    pub(crate) fn of(connection: &transport::Connection) -> Self {
        let data = connection
            .handshake_data()
            .and_then(|data| data.downcast::<Data>().ok());
        let chain = connection
            .peer_identity()
            .and_then(|chain| chain.downcast::<Vec<CertificateDer<'static>>>().ok());
        let (protocol, server_name, resumed) = match data {
            Some(data) => {
                let resumed = data.seen.resumed();
                (data.told.protocol, data.told.server_name, resumed)
            }
            None => (None, None, false),
        };
        Handshake {
            protocol,
            server_name,
            peer_certificates: chain.map_or_else(Vec::new, |chain| *chain),
            resumed,
        }
    }

    /// What there is to know of the peer.
    fn known<'a>(&self, env: Env<'a>, peer: SocketAddr) -> [(Atom, Term<'a>); 4] {
        let bytes = |bytes: Option<&[u8]>| match bytes {
            Some(bytes) => binary(env, bytes),
            None => atoms::undefined().encode(env),
        };
        let name = self.server_name.as_ref().map(|name| name.as_bytes());
        [
            (atoms::peername(), address(env, peer)),
            (
                atoms::negotiated_protocol(),
                bytes(self.protocol.as_deref()),
            ),
            (atoms::server_name(), bytes(name)),
            (
                atoms::peercert(),
                bytes(self.peer_certificates.first().map(|cert| &**cert)),
            ),
        ]
    }

    /// The map that comes with a new connection.
    pub(crate) fn info<'a>(
        &self,
        env: Env<'a>,
        peer: SocketAddr,
        early: Atom,
    ) -> NifResult<Term<'a>> {
        let text = text_with_port(peer);
        let more = [
            (atoms::remote_addr(), binary(env, text.as_bytes())),
            (session::names::resumed(), self.resumed.encode(env)),
            (session::names::early_data(), early.encode(env)),
        ];
        Term::map_from_pairs(env, &[&self.known(env, peer)[..], &more].concat())
    }
}

/// `{AddressString, Port}`.
pub(crate) fn address<'a>(env: Env<'a>, address: SocketAddr) -> Term<'a> {
    // A charlist.
    let chars: Vec<u32> = text(address).chars().map(u32::from).collect();
    (chars, address.port()).encode(env)
}
