//! Streams of the users' own on a link, beside its lanes.
//!
//! A bidirectional QUIC stream beyond the control stream is a user stream; its bytes are the users' alone.
//! Both ends say in the TLS handshake (`tls::ALPN_STREAMS`) that they know them, and only a peer whose
//! handshake is complete may open some.
//!
//! Lanes stay as they are beside them. What streams send goes behind the express lane and in turn with bulk, or
//! behind bulk, and has room of its own (`room`). What they receive is limited per stream, by credit that the receiver gives on the
//! control stream (`frame`): streams that nobody reads hold little (`ahead`), and one that is read has what
//! the path needs, as long as all together stay within a budget. QUIC's own windows are always wider, so a
//! full stream keeps nothing else from coming.

mod ahead;
mod carrier;
mod nif;
mod receive;
mod room;
mod send;
mod stream;

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::engine::transport::{RecvStream, SendStream, Side, VarInt};
use rustler::{Atom, Encoder, Env, LocalPid, Monitor, Resource, ResourceArc};
use tokio::time::{sleep, timeout};

use super::messages::Reply;
use super::tls;
use crate::vm::active::Active;
use crate::vm::fault::{self, Point};
use crate::vm::messages::Gone;
use crate::vm::tasks::{Held, attempt, contain};

use ahead::Ahead;
pub(crate) use carrier::Carrier;
use carrier::stopped;
use receive::Buffer;
use room::Room;
use stream::{End, Inner, Name, Plan, UserStream};

mod atoms {
    rustler::atoms! {
        ok, error, data, passive, reset, closed, noconnection, internal_error, not_connected,
        unsupported, unknown_stream, not_owner, noproc, too_many, full, wait, einval,
    }
}

/// What a peer may send on a stream with a place (`ahead`) before the first credit. Both ends know it.
const INITIAL_CREDIT: u64 = 16 * 1024;
/// Streams of a peer that are allowed from the beginning; more of them as they come, up to the limit.
const FIRST_STREAMS: u32 = 64;
/// The code of a stream that nobody accepts.
const REFUSED: u32 = 0x100;
/// How long to wait until the peer allows one more stream.
const OPENING: Duration = Duration::from_secs(5);
/// The peer is asked for more streams as soon as somebody waits for one, and again later: one that is over gives
/// its place to another, and QUIC by itself tells of that late. Whoever waits asks ever more seldom.
const ASKING: Duration = Duration::from_millis(10);
const ASKING_MAX: Duration = Duration::from_millis(320);
/// How often the path is looked at while streams send.
const SURVEY: Duration = Duration::from_millis(10);
/// QUIC serves the larger number first, and equal ones in turn. Up to the default a stream has its turn
/// beside bulk, whose number is 0, so that neither stands still for the other; `room` puts such streams in order.
/// Those that are said to be less urgent go behind bulk.
fn priority(number: u8) -> i32 {
    (i32::from(nif::DEFAULT_PRIORITY) - i32::from(number)).min(0)
}

/// The links that are up, by the atoms of their nodes.
static NODES: Mutex<Vec<(Atom, Weak<dyn Carrier>)>> = Mutex::new(Vec::new());

fn nodes() -> MutexGuard<'static, Vec<(Atom, Weak<dyn Carrier>)>> {
    NODES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The link to a node.
fn find(node: Atom) -> Option<Arc<dyn Carrier>> {
    nodes()
        .iter()
        .find(|(name, _)| *name == node)
        .and_then(|(_, link)| link.upgrade())
}

/// The user streams of one link.
pub(crate) struct Streams {
    table: Mutex<Table>,
    room: Arc<Room>,
    ahead: Ahead,
    /// Known when the link is up.
    facts: OnceLock<Facts>,
    /// How many streams a peer may have open at a time.
    limit: u32,
    /// How many it may have open now.
    allowed: AtomicU32,
    /// When the peer was asked for more.
    asked: Mutex<Option<Instant>>,
    /// What streams that are read may have sent ahead.
    lent: AtomicU64,
    /// And beyond that, those that use it up.
    extra: AtomicU64,
    surveyed: Mutex<Option<Instant>>,
}

struct Facts {
    node: Atom,
    /// Both ends know these streams.
    supported: bool,
    /// The lowest bit of the numbers of those that are opened here.
    side: Side,
    /// Numbers of this link's streams begin with it, so that none of an earlier link names one.
    salt: u64,
}

#[derive(Default)]
struct Table {
    streams: BTreeMap<u64, ResourceArc<UserStream>>,
    /// So many of them were opened here.
    own: u64,
    /// Those that accept streams, in turn.
    acceptors: VecDeque<ResourceArc<Acceptor>>,
    ended: bool,
}

/// A process that accepts streams.
struct Acceptor {
    link: Weak<dyn Carrier>,
    pid: LocalPid,
    tag: Atom,
    active: Active,
    monitor: Mutex<Option<Monitor>>,
}

#[rustler::resource_impl]
impl Resource for Acceptor {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, _env: Env<'a>, pid: LocalPid, _monitor: Monitor) {
        if let Some(link) = self.link.upgrade() {
            drop(link.streams().take_acceptor(pid));
        }
    }
}

/// Why a call about streams fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unavailable {
    NotConnected,
    Unsupported,
}

impl Unavailable {
    fn reason(self) -> Atom {
        match self {
            Unavailable::NotConnected => atoms::not_connected(),
            Unavailable::Unsupported => atoms::unsupported(),
        }
    }
}

/// The link to a node whose streams can be used.
fn usable(node: Atom) -> Result<Arc<dyn Carrier>, Unavailable> {
    let link = find(node).ok_or(Unavailable::NotConnected)?;
    match link.streams().facts.get() {
        _ if link.streams().table().ended => Err(Unavailable::NotConnected),
        Some(facts) if facts.supported => Ok(link),
        Some(_) => Err(Unavailable::Unsupported),
        None => Err(Unavailable::NotConnected),
    }
}

impl Streams {
    pub(crate) fn new(limit: u32) -> Self {
        Streams {
            table: Mutex::default(),
            room: Room::new(),
            ahead: Ahead::default(),
            facts: OnceLock::new(),
            limit,
            allowed: AtomicU32::new(limit.min(FIRST_STREAMS)),
            asked: Mutex::new(None),
            lent: AtomicU64::new(0),
            extra: AtomicU64::new(0),
            surveyed: Mutex::new(None),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that streams have under way.
    pub(crate) fn under_way(&self) -> u64 {
        self.room.used() as u64
    }

    /// The peer has room for so many bytes of a stream, which may be over meanwhile.
    pub(crate) fn granted(&self, id: u64, limit: u64) {
        if let Some(stream) = self
            .facts
            .get()
            .and_then(|facts| self.get(facts.number(id)))
        {
            stream.inner.granted(limit);
        }
        // Behind that, so that the stream does not take one meanwhile.
        self.ahead.give_back(id);
    }

    /// False when the link has ended.
    fn add(&self, stream: &ResourceArc<UserStream>) -> bool {
        let mut table = self.table();
        if table.ended {
            return false;
        }
        let number = stream.inner.name.number;
        table.streams.insert(number, stream.clone());
        table.own += u64::from(self.is_own(&stream.inner));
        true
    }

    fn get(&self, number: u64) -> Option<ResourceArc<UserStream>> {
        self.table().streams.get(&number).cloned()
    }

    fn remove(&self, stream: &Inner) {
        let is_own = self.is_own(stream);
        let mut table = self.table();
        let removed = table.streams.remove(&stream.name.number);
        table.own -= u64::from(is_own && removed.is_some());
        drop(table);
        drop(removed);
    }

    fn is_own(&self, stream: &Inner) -> bool {
        let facts = self.facts.get();
        facts.is_some_and(|facts| stream.id & 1 == facts.side as u64)
    }

    fn count(&self) -> usize {
        self.table().streams.len()
    }

    fn all(&self) -> Vec<ResourceArc<UserStream>> {
        self.table().streams.values().cloned().collect()
    }

    /// So many of them, from this number on.
    fn some(&self, from: u64, count: usize) -> Vec<ResourceArc<UserStream>> {
        let table = self.table();
        let streams = table.streams.range(from..).take(count);
        streams.map(|(_, stream)| stream.clone()).collect()
    }

    /// Lets a process accept streams; one that does already does so in the new way. False when the link has
    /// ended, or the process.
    fn accept(&self, link: &Arc<dyn Carrier>, env: Env, tag: Atom, active: Active) -> bool {
        let acceptor = ResourceArc::new(Acceptor {
            link: Arc::downgrade(link),
            pid: env.pid(),
            tag,
            active,
            monitor: Mutex::new(None),
        });
        let Some(monitor) = acceptor.monitor(Some(env), &acceptor.pid) else {
            return false;
        };
        *acceptor
            .monitor
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(monitor);
        let mut table = self.table();
        if table.ended {
            drop(table);
            forget(&acceptor, env);
            return false;
        }
        let known = table
            .acceptors
            .iter()
            .position(|one| one.pid == acceptor.pid);
        let old = match known {
            Some(place) => Some(std::mem::replace(&mut table.acceptors[place], acceptor)),
            None => {
                table.acceptors.push_back(acceptor);
                None
            }
        };
        drop(table);
        if let Some(old) = old {
            forget(&old, env);
        }
        true
    }

    fn take_acceptor(&self, pid: LocalPid) -> Option<ResourceArc<Acceptor>> {
        let mut table = self.table();
        let place = table.acceptors.iter().position(|one| one.pid == pid)?;
        table.acceptors.remove(place)
    }

    /// The next one in turn.
    fn next_acceptor(&self) -> Option<ResourceArc<Acceptor>> {
        let mut table = self.table();
        let next = table.acceptors.pop_front()?;
        table.acceptors.push_back(next.clone());
        Some(next)
    }

    /// The number of streams that a peer may have open follows that of those there are: each one that is
    /// allowed takes memory. For tasks of the native thread, of which one runs at a time.
    fn allow(&self, open: u64) -> bool {
        let allowed = self.allowed.load(Ordering::Relaxed);
        let is_more = open >= u64::from(allowed / 2) && allowed < self.limit;
        if is_more {
            let more = allowed.saturating_mul(2).min(self.limit);
            self.allowed.store(more, Ordering::Relaxed);
        }
        is_more
    }

    /// What QUIC is to allow. The control stream is one of them.
    fn allowed(&self) -> VarInt {
        VarInt::from_u32(self.allowed.load(Ordering::Relaxed) + 1)
    }

    /// Somebody at the peer waits for a stream, and the peer has so many open. Some of them may not have come, as
    /// a stream that has sent nothing does not.
    pub(crate) fn wanted(&self, link: &dyn Carrier, open: u64) {
        if self.facts.get().is_some_and(|facts| facts.supported) {
            self.allow(open);
            link.connection()
                .tell_max_concurrent_bi_streams(self.allowed());
        }
    }

    /// Somebody here waits for a stream.
    fn ask(&self, link: &dyn Carrier) {
        if is_time(&self.asked, ASKING) {
            link.ask_for_streams(self.table().own);
        }
    }

    /// What streams may have under way follows the path.
    fn survey(&self, link: &dyn Carrier) {
        if !is_time(&self.surveyed, SURVEY) {
            return;
        }
        let window = link.connection().stats().path.cwnd;
        let cap = usize::try_from(window.saturating_mul(2)).unwrap_or(usize::MAX);
        self.room.set_cap(cap);
    }
}

/// Whether something was done last, or never, so long ago. Then it is taken to be done now.
fn is_time(last: &Mutex<Option<Instant>>, pause: Duration) -> bool {
    let now = Instant::now();
    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
    let is_time = last.is_none_or(|at| now - at >= pause);
    if is_time {
        *last = Some(now);
    }
    is_time
}

impl Facts {
    fn number(&self, id: u64) -> u64 {
        self.salt << 40 | id
    }
}

/// The process is watched no more.
fn forget(acceptor: &ResourceArc<Acceptor>, env: Env) {
    let mut monitor = acceptor
        .monitor
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(monitor) = monitor.take() {
        acceptor.demonitor(Some(env), &monitor);
    }
}

/// The link to the node is up: from now on streams can be opened on it, from both ends.
pub(crate) fn enter(link: &Arc<dyn Carrier>, node: Atom) {
    let facts = Facts {
        node,
        supported: link.streams().limit > 0 && tls::knows_streams(link.connection()),
        side: link.connection().side(),
        salt: salt(&**link),
    };
    let supported = facts.supported;
    if link.streams().facts.set(facts).is_err() {
        return;
    }
    let mut nodes = nodes();
    nodes.retain(|(name, link)| *name != node && link.strong_count() > 0);
    nodes.push((node, Arc::downgrade(link)));
    drop(nodes);
    if supported {
        link.connection()
            .set_max_concurrent_bi_streams(link.streams().allowed());
    }
    crate::vm::runtime::dist().start(serve(link.clone()));
}

/// Both ends make the same of their TLS session. Small enough that numbers are small integers of the VM.
fn salt(link: &dyn Carrier) -> u64 {
    let mut value = [0; 4];
    let made = link
        .connection()
        .export_keying_material(&mut value, tls::STREAMS_LABEL, b"");
    match made {
        Ok(()) => u64::from(u32::from_be_bytes(value) >> 14),
        Err(_) => 0,
    }
}

/// Takes what the peer opens until the link ends, and ends all streams with it.
async fn serve(link: Arc<dyn Carrier>) {
    let accepting = contain(accept(&link));
    tokio::select! {
        _ = accepting => link.stop(),
        () = stopped(&*link) => (),
    }
    nodes().retain(|(_, other)| !std::ptr::addr_eq(other.as_ptr(), Arc::as_ptr(&link)));
    let mut table = link.streams().table();
    table.ended = true;
    let acceptors = std::mem::take(&mut table.acceptors);
    drop(table);
    drop(acceptors);
    for stream in link.streams().all() {
        stream.inner.cut(End::Lost);
    }
}

async fn accept(link: &Arc<dyn Carrier>) {
    let streams = link.streams();
    while let Ok((send, recv)) = link.connection().accept_bi().await {
        fault::pass(Point::DistStreams);
        let [open, _] = link.connection().remote_streams();
        if streams.allow(open) {
            link.connection()
                .set_max_concurrent_bi_streams(streams.allowed());
        }
        crate::vm::runtime::dist().spawn(begin(link.clone(), Held::new(send), Held::new(recv)));
    }
}

/// A stream of the peer is somebody's with its first data.
async fn begin(link: Arc<dyn Carrier>, mut send: Held<SendStream>, mut recv: Held<RecvStream>) {
    let id = u64::from(VarInt::from(recv.id()));
    let mut buffer = Buffer::default();
    let read = contain(async {
        tokio::select! {
            read = buffer.read(&mut recv) => read.is_ok(),
            () = stopped(&*link) => {
                link.connection().closed().await;
                false
            }
        }
    });
    if read.await != Ok(true) {
        reject(&mut send, &mut recv, 0);
        link.give_stream_credit(id, 0);
        return;
    }
    let Some(facts) = link.streams().facts.get() else {
        return;
    };
    let inner = loop {
        let Some(acceptor) = link.streams().next_acceptor() else {
            reject(&mut send, &mut recv, REFUSED);
            link.give_stream_credit(id, 0);
            return;
        };
        let plan = Plan {
            id,
            name: Name {
                tag: acceptor.tag,
                node: facts.node,
                number: facts.number(id),
            },
            priority: nif::DEFAULT_PRIORITY,
            owner: acceptor.pid,
            active: acceptor.active,
        };
        match Inner::make(&link, &plan) {
            Ok(inner) => break inner,
            // Dead, and about to be taken out.
            Err(Gone) => drop(link.streams().take_acceptor(acceptor.pid)),
        }
    };
    run(inner, send, recv, Some(buffer));
}

/// Nobody wants it.
fn reject(send: &mut SendStream, recv: &mut RecvStream, code: u32) {
    let code = VarInt::from_u32(code);
    let _ = attempt(|| {
        // Fail only on what is over.
        let _ = send.reset(code);
        let _ = recv.stop(code);
    });
}

fn run(inner: Arc<Inner>, send: Held<SendStream>, recv: Held<RecvStream>, first: Option<Buffer>) {
    let _ = attempt(|| send.set_priority(priority(inner.priority)));
    let worker = crate::vm::runtime::dist();
    worker.spawn(send::serve(inner.clone(), send));
    worker.spawn(receive::serve(inner, recv, first));
}

/// Begins when there is none to be opened.
async fn keep_asking(link: &dyn Carrier) -> Infallible {
    let mut pause = ASKING;
    loop {
        link.streams().ask(link);
        sleep(pause).await;
        pause = (2 * pause).min(ASKING_MAX);
    }
}

/// Opens a stream for a process. The answer is `{Ref, {ok, Number} | {error, Why}}`.
fn open(
    link: Arc<dyn Carrier>,
    plan: impl FnOnce(u64, Name) -> Plan + Send + 'static,
    tag: Atom,
    reply: Reply,
) {
    crate::vm::runtime::dist().start(async move {
        let opened = contain(async {
            tokio::select! {
                biased;
                opened = timeout(OPENING, link.connection().open_bi()) => match opened {
                    Ok(Ok((send, recv))) => Ok((Held::new(send), Held::new(recv))),
                    Ok(Err(_)) => Err(atoms::not_connected()),
                    Err(_) => Err(atoms::too_many()),
                },
                () = stopped(&*link) => Err(atoms::not_connected()),
                never = keep_asking(&*link) => match never {},
            }
        });
        let (mut send, mut recv) = match opened.await {
            Ok(Ok(halves)) => halves,
            Ok(Err(reason)) => return reply.send(|env| (atoms::error(), reason).encode(env)),
            Err(_) => return drop(reply),
        };
        let Some(facts) = link.streams().facts.get() else {
            return;
        };
        let id = u64::from(VarInt::from(send.id()));
        let name = Name {
            tag,
            node: facts.node,
            number: facts.number(id),
        };
        match Inner::make(&link, &plan(id, name)) {
            Ok(inner) => {
                run(inner, send, recv, None);
                reply.send(|env| (atoms::ok(), name.number).encode(env));
            }
            Err(Gone) => {
                reject(&mut send, &mut recv, 0);
                reply.send(|env| (atoms::error(), atoms::not_connected()).encode(env));
            }
        }
    });
}
