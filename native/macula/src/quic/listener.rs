//! Listeners: a bound socket, a backlog of established connections, and those who want them.
//!
//! As a TCP listener does, it completes handshakes by itself, up to the backlog. Closing it, its
//! owner's death or the collection of its handle refuse new connections and leave those that are
//! established alone; the socket is closed with the last of them.

mod armed;
mod handshake;
mod reload;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::engine::transport::{ConnectionError, EndpointConfig, Incoming, ServerConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use rustler::{
    Atom, Binary, Encoder, Env, LocalPid, Monitor, NifMap, NifResult, Resource, ResourceArc, Term,
};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

use crate::engine::{endpoint, qlog, transport};
use crate::quic::connection::{Begun, Connection, Early, Handshake, Terms, address};
use crate::quic::crowd::{self, Crowd};
use crate::quic::options::{self, Secrets, Transport};
use crate::quic::stream::{Watermarks, begun};
use crate::quic::verdict;
use crate::tls::resumption::server::{Resumption, Sessions, Tickets};
use crate::tls::session::Noticing;
use crate::tls::shown::Shown;
use crate::tls::{self, TlsError, VerifyClient, lean, watched};
use crate::udp::address::parse;
use crate::udp::socket;
use crate::vm::error::posix;
use crate::vm::fault::{self, Point};
use crate::vm::messages::{self, Gone, atoms, event};
use crate::vm::objects::{Counted, Kind};
use crate::vm::owner::Owner;
use crate::vm::reply::{Reply, Subject};
use crate::vm::runtime::{self, Worker};
use crate::vm::tasks::{Fate, Held, attempt, contain};
use crate::vm::waiters::Waiters;

use armed::Armed;
use handshake::handshake;
use reload::{Changeable, Reload};

rustler::atoms! { optional, required, always, auto, never, early_data, locked, refused }

/// How long a full backlog waits before it looks for connections that ended meanwhile.
const FULL_BACKLOG: Duration = Duration::from_millis(100);

/// The handle.
pub(crate) struct Handle(Arc<Listener>);

#[rustler::resource_impl(name = "macula_listener")]
impl Resource for Handle {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, monitor: Monitor) {
        if self.0.owner.is_down(monitor) {
            self.0.stop();
        }
    }
}

impl Subject for ResourceArc<Handle> {
    fn cancelled(&self) {
        let mut state = self.0.lock();
        state.waiting.keep(|waiting| !waiting.reply.is_cancelled());
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.stop();
    }
}

struct Listener {
    owner: Owner<Handle>,
    bound: SocketAddr,
    state: Mutex<State>,
    changed: Notify,
    handshakes: AtomicUsize,
    established: AtomicUsize,
    /// New connections are refused.
    locked: AtomicBool,
    /// The process that is asked about clients' certificates, if any is.
    verifier: Option<LocalPid>,
    /// Those that are counted, where they are limited.
    crowd: Option<Arc<Crowd>>,
    refused: AtomicUsize,
    limits: Limits,
    resumption: Resumption,
    logging: Option<Logging>,
    _counted: Counted,
}

/// How connections are made that are to have a log each.
struct Logging {
    logs: qlog::Directory,
    transport: Transport,
    first_window: u64,
    /// As it was changed last.
    server: Mutex<ServerConfig>,
}

impl Logging {
    fn change(&self, server: &ServerConfig) {
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = server.clone();
    }

    fn config(&self, incoming: &Incoming) -> Arc<ServerConfig> {
        // Whether or not certificates are to come, there is room for them.
        let mut transport = self.transport.config(true, self.first_window);
        let log = self.logs.log(&incoming.orig_dst_cid(), qlog::Side::Server);
        qlog::attach(&mut transport, log);
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let mut server = server.clone();
        server.transport_config(transport);
        Arc::new(server)
    }
}

struct Limits {
    handshakes: usize,
    handshake_timeout: Duration,
    backlog: usize,
    retry: Atom,
    terms: Terms,
    /// What a connection may receive once its handshake is done.
    window: VarInt,
}

/// An established connection, who drives it, and what becomes of that.
struct Ready {
    quic: Held<transport::Connection>,
    worker: &'static Worker,
    fate: Arc<Fate>,
    early: Option<Early>,
}

impl Ready {
    /// It has ended while it waited, and the peer has left no stream in it.
    fn is_empty(&self) -> bool {
        let empty = attempt(|| match self.quic.close_reason() {
            None => false,
            // Whoever was to have it has died.
            Some(ConnectionError::LocallyClosed) => true,
            Some(_) => self.quic.remote_streams() == [0, 0],
        });
        empty != Ok(false)
    }
}

struct Waiting {
    reply: Reply,
    /// Takes a connection that is there, and waits for none.
    now: bool,
}

#[derive(Default)]
struct State {
    waiting: Waiters<Waiting>,
    armed: Armed<LocalPid>,
    ready: VecDeque<Ready>,
    stopping: bool,
    stopped: bool,
    closers: Vec<Reply>,
    reloads: Vec<(Reload, Reply)>,
}

#[derive(NifMap)]
struct Options<'a> {
    address: String,
    port: u16,
    alpn: Vec<Binary<'a>>,
    cert: Vec<Binary<'a>>,
    key_kind: Atom,
    key: Binary<'a>,
    sni_hosts: Vec<Host<'a>>,
    verify_client: Atom,
    cacerts: Vec<Binary<'a>>,
    verifier: Vec<LocalPid>,
    handshakes: usize,
    handshake_timeout: u64,
    backlog: usize,
    /// 0 is without limit, here and below.
    max_connections: usize,
    max_per_address: usize,
    rate_per_address: u32,
    burst_per_address: u32,
    retry: Atom,
    migration: bool,
    reset_key: Binary<'a>,
    keylog: bool,
    sslkeylogfile: String,
    high_watermark: usize,
    low_watermark: usize,
    disconnect_timeout: u64,
    resumption: Atom,
    resumption_keys: Vec<Binary<'a>>,
    resumption_lifetime: u32,
    early_data_limit: u64,
    early_data_sessions: usize,
    transport: Transport,
}

/// A name, with a chain, and the kind and the DER of its key.
type Host<'a> = (String, Vec<Binary<'a>>, Atom, Binary<'a>);

type Hosts = Result<Vec<(String, tls::Credentials)>, TlsError>;

/// Copied out of the VM.
fn copied(hosts: &[Host]) -> Hosts {
    let hosts = hosts.iter().map(|(name, chain, kind, key)| {
        match options::credentials(chain, *kind, key) {
            Ok(credentials) => Ok((name.clone(), credentials)),
            Err(error) => Err(TlsError::Host(name.clone(), Box::new(error))),
        }
    });
    hosts.collect()
}

#[derive(Debug, thiserror::Error)]
enum ListenError {
    #[error("not an address: {0}")]
    Address(String),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("no qlog: {0}")]
    Qlog(io::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Encoder for ListenError {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            ListenError::Address(_) => atoms::einval().encode(env),
            ListenError::Tls(error) => error.encode(env),
            ListenError::Qlog(error) => {
                (atoms::bad_option(), atoms::qlog_dir(), posix(error)).encode(env)
            }
            ListenError::Io(error) => posix(error).encode(env),
        }
    }
}

/// A listener to be: everything copied out of the VM.
struct Plan {
    address: String,
    port: u16,
    alpn: Vec<Vec<u8>>,
    credentials: Result<tls::Credentials, TlsError>,
    hosts: Hosts,
    client: VerifyClient,
    verifier: Option<LocalPid>,
    crowd: crowd::Limits,
    limits: Limits,
    migration: bool,
    reset_key: Vec<u8>,
    secrets: Secrets,
    resumption: Resumption,
    early_data_limit: u64,
    transport: Transport,
}

/// The system gives no random bytes.
struct NoTickets;

impl Options<'_> {
    /// Copied out of the VM.
    fn plan(self) -> Result<Plan, NoTickets> {
        let roots = options::certificates(&self.cacerts);
        let resumption = if self.resumption == early_data() {
            Resumption::Sessions(Sessions::new(
                self.early_data_sessions,
                self.resumption_lifetime,
            ))
        } else if self.resumption == rustler::types::atom::true_() {
            let keys: Vec<&[u8]> = self.resumption_keys.iter().map(|k| &**k).collect();
            match Tickets::new(&keys, self.resumption_lifetime) {
                Ok(tickets) => Resumption::Tickets(tickets),
                Err(_) => return Err(NoTickets),
            }
        } else {
            Resumption::Never
        };
        Ok(Plan {
            address: self.address,
            port: self.port,
            alpn: self.alpn.iter().map(|p| p.as_slice().to_vec()).collect(),
            credentials: options::credentials(&self.cert, self.key_kind, &self.key),
            hosts: copied(&self.sni_hosts),
            client: if self.verify_client == required() {
                VerifyClient::Required(roots)
            } else if self.verify_client == optional() {
                VerifyClient::Optional(roots)
            } else {
                VerifyClient::No
            },
            verifier: self.verifier.first().copied(),
            crowd: crowd::Limits {
                total: (self.max_connections > 0).then_some(self.max_connections),
                per_address: (self.max_per_address > 0).then_some(self.max_per_address),
                rate: (self.rate_per_address > 0)
                    .then_some((self.rate_per_address, self.burst_per_address)),
            },
            limits: Limits {
                handshakes: self.handshakes,
                handshake_timeout: Duration::from_millis(self.handshake_timeout),
                backlog: self.backlog,
                retry: self.retry,
                terms: Terms::new(
                    Watermarks {
                        high: self.high_watermark,
                        low: self.low_watermark,
                    },
                    self.disconnect_timeout,
                    self.transport.streams(),
                ),
                window: options::varint(self.transport.receive_window()),
            },
            migration: self.migration,
            reset_key: self.reset_key.as_slice().to_vec(),
            secrets: Secrets::new(self.keylog, self.sslkeylogfile),
            resumption,
            early_data_limit: self.early_data_limit,
            transport: self.transport,
        })
    }
}

#[rustler::nif]
fn listener_start<'a>(
    env: Env<'a>,
    reference: Term<'a>,
    options: Options<'a>,
) -> NifResult<Term<'a>> {
    if runtime::start_quic().is_err() {
        return Ok((atoms::error(), atoms::eagain()).encode(env));
    }
    let Ok(plan) = options.plan() else {
        return Ok((atoms::error(), atoms::internal_error()).encode(env));
    };
    let (reply, operation) = Reply::about(env, reference, ());
    runtime::quic().spawn(async move {
        let owner = reply.caller();
        match start(plan, owner) {
            Ok((listener, bound, terms)) => {
                let sent = attempt(|| {
                    reply.send(|env| {
                        let handle = ResourceArc::new(Handle(listener.clone()));
                        match listener.owner.attach(env, &handle, owner) {
                            Ok(()) => (atoms::ok(), handle).encode(env),
                            Err(Gone) => (atoms::error(), atoms::closed()).encode(env),
                        }
                    })
                });
                if sent != Ok(Ok(())) {
                    // Nobody waits any more, and perhaps no handle was made that could stop it.
                    listener.stop();
                }
                serve(listener, bound, terms).await;
            }
            Err(error) => reply.error(error),
        }
    });
    Ok(operation.encode(env))
}

fn start(
    plan: Plan,
    owner: LocalPid,
) -> Result<(Arc<Listener>, endpoint::Bound, Changeable), ListenError> {
    fault::pass(Point::Listen);
    let address = parse(&plan.address, plan.port)
        .ok_or_else(|| ListenError::Address(plan.address.clone()))?;
    let asks = !matches!(plan.client, VerifyClient::No);
    let shown = Shown::new(plan.credentials?, plan.hosts?)?;
    let secrets = plan.secrets.open()?;
    let tls = tls::server_config(
        &shown,
        plan.client.clone(),
        plan.verifier.is_some(),
        plan.alpn.clone(),
        &secrets,
        &plan.resumption,
    )?;
    let tls = lean::Server::new(tls).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let tls = watched::Server::<_, Noticing>::new(tls);
    let mut server = ServerConfig::with_crypto(Arc::new(tls));
    let window = plan.transport.receive_window();
    let first_window = match plan.resumption {
        Resumption::Sessions(_) => window.min(plan.early_data_limit),
        _ => window,
    };
    server
        .transport_config(plan.transport.config(asks, first_window))
        .migration(plan.migration)
        .max_incoming(plan.limits.handshakes.max(64));
    let changeable = Changeable {
        shown,
        client: plan.client,
        defers: plan.verifier.is_some(),
        alpn: plan.alpn,
        secrets,
        asking: plan.transport.config(true, window),
        server: server.clone(),
    };
    let logs = plan.transport.qlog_dir().map(qlog::Directory::open);
    let logs = logs.transpose().map_err(ListenError::Qlog)?;
    let logging = logs.map(|logs| (logs, server.clone()));
    let config = endpoint_config(&plan.reset_key);
    let fixed = endpoint::Fixed {
        reset_key: plan.reset_key,
        max_mtu: plan.transport.max_mtu,
    };
    let bound = match socket::bind(address) {
        // The socket may be ours: of a listener that was closed and has connections left.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => take_over(address, &fixed),
        bound => bound.map(Socket::New),
    };
    let bound = match bound? {
        Socket::New(socket) => endpoint::start(socket, config, fixed, Some(server))?,
        Socket::Taken(bound) => {
            bound.endpoint.set_server_config(Some(server));
            bound
        }
    };
    let listener = Arc::new(Listener {
        owner: Owner::new(owner),
        bound: bound.endpoint.local_addr()?,
        state: Mutex::new(State::default()),
        changed: Notify::new(),
        handshakes: AtomicUsize::new(0),
        established: AtomicUsize::new(0),
        locked: AtomicBool::new(false),
        verifier: plan.verifier,
        crowd: plan.crowd.are_some().then(|| Crowd::new(plan.crowd)),
        refused: AtomicUsize::new(0),
        limits: plan.limits,
        resumption: plan.resumption,
        logging: logging.map(|(logs, server)| Logging {
            logs,
            transport: plan.transport,
            first_window,
            server: Mutex::new(server),
        }),
        _counted: Counted::new(Kind::Listener),
    });
    Ok((listener, bound, changeable))
}

/// Of an endpoint that resets the connections of one before it that had the same key, if any is given.
fn endpoint_config(key: &[u8]) -> EndpointConfig {
    let mut config = EndpointConfig::default();
    if key.is_empty() {
        return config;
    }
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, key);
    // The endpoint resets only what bears an id it could have given itself: those, too, must
    // come from the key. They show themselves to the network, so not from the key as it is.
    let tag = aws_lc_rs::hmac::sign(&key, b"macula connection ids");
    let seed = tag.as_ref().iter().take(8);
    let seed = seed.fold(0, |seed: u64, byte| seed << 8 | u64::from(*byte));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(seed)));
    config.reset_key(Arc::new(key));
    config
}

enum Socket {
    New(UdpSocket),
    Taken(endpoint::Bound),
}

/// The socket of a closed listener at the address.
fn take_over(address: SocketAddr, fixed: &endpoint::Fixed) -> io::Result<Socket> {
    let mut closed = closed();
    match closed.remove(&address) {
        Some(left) if left.is_lost() => left.port.free(),
        Some(left) if left.fixed == *fixed => return Ok(Socket::Taken(left)),
        // What belongs to the endpoint itself cannot be changed any more.
        Some(left) if left.endpoint.open_connections() > 0 => {
            closed.insert(address, left);
            return Err(io::ErrorKind::AddrInUse.into());
        }
        Some(left) => left.port.free(),
        // Perhaps it has just been given back.
        None => {}
    }
    socket::bind(address).map(Socket::New)
}

type Endpoints = HashMap<SocketAddr, endpoint::Bound>;

/// Endpoints of closed listeners whose connections live on, by the address they are bound to.
fn closed() -> MutexGuard<'static, Endpoints> {
    static CLOSED: LazyLock<Mutex<Endpoints>> = LazyLock::new(Mutex::default);
    CLOSED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Listener {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the listener closed by its task. Runs on VM threads.
    fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_one();
    }

    /// Gives connections to those who want them.
    fn hand_out(&self) {
        loop {
            let mut state = self.lock();
            if state.waiting.is_empty() && state.armed.is_empty() {
                return;
            }
            let Some(ready) = state.ready.pop_front() else {
                let expired = state.waiting.take_out(|waiting| waiting.now);
                drop(state);
                for waiting in expired {
                    waiting.reply.error(atoms::timeout());
                }
                return;
            };
            if ready.is_empty() {
                continue;
            }
            if let Some(Waiting { reply, .. }) = state.waiting.first() {
                drop(state);
                self.answer(reply, ready);
            } else if let Some(pid) = state.armed.next() {
                drop(state);
                let delivered = self.deliver(pid, ready);
                let mut state = self.lock();
                let over = match delivered {
                    Ok(()) => state.armed.served(pid),
                    Err(NotDelivered(ready)) => {
                        // A dead process leaves the connection to the next one.
                        state.ready.push_front(ready);
                        state.armed.is_gone(pid)
                    }
                };
                drop(state);
                if over {
                    self.unpin_if_idle();
                }
            }
        }
    }

    fn unpin_if_idle(&self) {
        let state = self.lock();
        let idle = state.armed.is_empty();
        let unpinned = idle.then(|| self.owner.take_pin()).flatten();
        drop(state);
        drop(unpinned);
    }

    fn connection(&self, ready: &Ready, owner: LocalPid) -> Arc<Connection> {
        let Ready {
            quic,
            fate,
            worker,
            early,
        } = ready;
        let terms = self.limits.terms;
        Connection::new(
            (**quic).clone(),
            worker,
            fate.clone(),
            owner,
            self.bound,
            terms,
            Begun::accepted(quic, early.clone()),
        )
    }

    fn answer(&self, reply: Reply, ready: Ready) {
        if reply.is_abandoned() {
            self.lock().ready.push_front(ready);
            return;
        }
        let caller = reply.caller();
        let connection = self.connection(&ready, caller);
        let giving = connection.giving();
        let sent = reply.send(|env| match connection.make(env, caller) {
            Ok(handle) => (atoms::ok(), handle).encode(env),
            Err(Gone) => (atoms::error(), atoms::closed()).encode(env),
        });
        drop(giving);
        if sent.is_err() {
            // For the next one; if it was the caller that died, the connection is closed by now
            // and passed over.
            self.lock().ready.push_front(ready);
        }
    }

    fn deliver(&self, pid: LocalPid, ready: Ready) -> Result<(), NotDelivered> {
        let connection = self.connection(&ready, pid);
        let giving = connection.giving();
        let delivered = messages::send(&pid, |env| {
            fault::pass(Point::NewConnection);
            // Before a handle is made, whose collection would close the connection.
            if !pid.is_alive(env) {
                return None;
            }
            let handle = connection.make(env, pid).ok()?;
            let early = Early::name(ready.early.as_ref());
            let info = Handshake::of(&ready.quic)
                .info(env, ready.quic.remote_address(), early)
                .ok()?;
            Some(event(env, atoms::new_conn(), handle, info))
        });
        drop(giving);
        delivered.map_err(|Gone| NotDelivered(ready))
    }
}

/// A connection whose acceptor is dead.
struct NotDelivered(Ready);

/// Serves the listener until it is stopped.
async fn serve(listener: Arc<Listener>, bound: endpoint::Bound, mut changeable: Changeable) {
    let served = take_connections(&listener, &bound.endpoint, &mut changeable);
    let failed = contain(served).await.is_err() || bound.endpoint.fate().has_failed();
    let lost = bound.port.lost();
    // Calls are refused from here on.
    listener.lock().stopping = true;
    let closed = contain(close(&listener, bound)).await;
    let (closers, waiting) = {
        let mut state = listener.lock();
        state.stopped = true;
        let waiting = state.waiting.all();
        let reloads = std::mem::take(&mut state.reloads);
        let closers = std::mem::take(&mut state.closers);
        let reloads = reloads.into_iter().map(|(_, reply)| reply);
        let waiting = waiting.into_iter().map(|waiting| waiting.reply);
        (closers, waiting.chain(reloads).collect::<Vec<_>>())
    };
    let (why, detail) = if failed || closed.is_err() {
        (atoms::internal_error(), atoms::internal_error())
    } else {
        let detail = lost.as_ref().map_or_else(atoms::undefined, posix);
        (atoms::closed(), detail)
    };
    for reply in waiting {
        reply.error(why);
    }
    listener.owner.post_terminal(move |env, handle, _| {
        Some(event(env, atoms::listener_stopped(), handle, detail))
    });
    if let Some(verifier) = listener.verifier {
        verdict::release(verifier);
    }
    for reply in closers {
        // Who gave up waiting is not told.
        let _ = reply.send(|env| atoms::ok().encode(env));
    }
}

async fn take_connections(
    listener: &Arc<Listener>,
    endpoint: &transport::Endpoint,
    changeable: &mut Changeable,
) {
    let slots = Arc::new(Semaphore::new(listener.limits.handshakes));
    let mut handshakes = JoinSet::new();
    loop {
        fault::pass(Point::Listener);
        listener.hand_out();
        for (reload, reply) in std::mem::take(&mut listener.lock().reloads) {
            match changeable.reload(reload, &listener.resumption) {
                Ok(server) => {
                    if let Some(logging) = &listener.logging {
                        logging.change(&server);
                    }
                    endpoint.set_server_config(Some(server));
                    // Who gave up waiting is not told.
                    let _ = reply.send(|env| atoms::ok().encode(env));
                }
                Err(error) => reply.error(error),
            }
        }
        let locked = listener.locked.load(Ordering::Acquire);
        let room = {
            let mut state = listener.lock();
            if state.stopping {
                break;
            }
            let full = state.ready.len() >= listener.limits.backlog;
            if full {
                state.ready.retain(|ready| !ready.is_empty());
            }
            state.ready.len() < listener.limits.backlog
        };
        // A full backlog leaves new ones with QUIC, whose buffer for them is bounded, too.
        let incoming = async {
            if locked {
                // A refusal needs no room.
                return Some(Some((endpoint.accept().await?, None)));
            }
            if !room {
                tokio::time::sleep(FULL_BACKLOG).await;
                return Some(None);
            }
            let slot = slots.clone().acquire_owned().await.ok()?;
            Some(Some((endpoint.accept().await?, Some(slot))))
        };
        tokio::select! {
            biased;
            () = listener.changed.notified() => {}
            Some(_) = handshakes.join_next() => {}
            incoming = incoming => match incoming {
                Some(None) => {}
                Some(Some((incoming, slot))) => {
                    // Asked again: it was perhaps locked while this waited.
                    let Some(slot) = slot.filter(|_| !listener.locked.load(Ordering::Acquire)) else {
                        listener.turn_away(incoming);
                        continue;
                    };
                    if let Some((incoming, place)) = listener.admit(incoming, &slots) {
                        // The connection stays with the worker that makes the handshake.
                        let worker = runtime::quic();
                        let handshake = handshake(listener.clone(), incoming, place, worker, slot);
                        handshakes.spawn_on(handshake, worker.handle());
                    }
                }
                // The endpoint's socket failed.
                None => break,
            }
        }
    }
    // Handshakes in progress would hold the socket until their peers give up.
    handshakes.shutdown().await;
}

/// Refuses what is not established yet, and closes the socket when nothing is left on it.
async fn close(listener: &Listener, bound: endpoint::Bound) {
    let endpoint = bound.endpoint.clone();
    endpoint.set_server_config(None);
    let ready = std::mem::take(&mut listener.lock().ready);
    for Ready { quic, .. } in ready {
        let _ = attempt(|| quic.close(VarInt::from_u32(0), b"listener closed"));
    }
    while let Some(Some(incoming)) = now_or_never(endpoint.accept()).await {
        incoming.refuse();
    }
    // What has lost its socket or its driver ends with all its connections, and is nothing to take over.
    if bound.is_lost() || endpoint.open_connections() == 0 {
        bound.port.free();
        return;
    }
    let address = listener.bound;
    closed().insert(address, bound);
    tokio::spawn(async move {
        endpoint.wait_idle().await;
        let mut closed = closed();
        // Unless a new listener took it over, and with it the duty to close it.
        if let Some(left) = closed.get(&address)
            && (left.is_lost() || left.endpoint.open_connections() == 0)
        {
            left.port.free();
            closed.remove(&address);
        }
    });
}

async fn now_or_never<F: Future>(future: F) -> Option<F::Output> {
    tokio::select! {
        biased;
        output = future => Some(output),
        () = std::future::ready(()) => None,
    }
}

/// Has connections delivered to the calling process: so many, or, for 0, all that come.
#[rustler::nif]
fn listener_arm<'a>(env: Env<'a>, handle: ResourceArc<Handle>, count: u64) -> Term<'a> {
    let listener = &handle.0;
    let mut state = listener.lock();
    if state.stopping {
        return (atoms::error(), atoms::closed()).encode(env);
    }
    let count = (count > 0).then_some(count);
    let caller = env.pid();
    state.armed.arm(caller, count, |pid| !pid.is_alive(env));
    listener.owner.pin(&handle);
    drop(state);
    listener.changed.notify_one();
    atoms::ok().encode(env)
}

/// Waits for one connection; with `now` the answer is `timeout` if none is there.
#[rustler::nif]
fn listener_accept<'a>(
    env: Env<'a>,
    handle: ResourceArc<Handle>,
    reference: Term<'a>,
    now: bool,
) -> Term<'a> {
    let listener = &handle.0;
    let mut state = listener.lock();
    if state.stopping {
        return (atoms::error(), atoms::closed()).encode(env);
    }
    let (reply, operation) = Reply::about(env, reference, handle.clone());
    let waiting = Waiting { reply, now };
    state
        .waiting
        .join(waiting, |waiting| waiting.reply.is_abandoned());
    drop(state);
    listener.changed.notify_one();
    (atoms::ok(), operation).encode(env)
}

/// The secrets of tickets from now on. False where the listener makes no tickets.
#[rustler::nif]
fn listener_set_resumption_keys(handle: ResourceArc<Handle>, keys: Vec<Binary>) -> bool {
    let keys: Vec<&[u8]> = keys.iter().map(|key| &**key).collect();
    match &handle.0.resumption {
        Resumption::Never | Resumption::Sessions(_) => false,
        Resumption::Tickets(tickets) => !keys.is_empty() && tickets.rotate(&keys).is_ok(),
    }
}

/// From now on new connections are refused, or not any more.
#[rustler::nif]
fn listener_set_locked<'a>(env: Env<'a>, handle: ResourceArc<Handle>, lock: bool) -> Term<'a> {
    let listener = &handle.0;
    if listener.lock().stopping {
        return (atoms::error(), atoms::closed()).encode(env);
    }
    listener.locked.store(lock, Ordering::Release);
    listener.changed.notify_one();
    atoms::ok().encode(env)
}

/// Answered when the port is free, or when only established connections still hold it.
#[rustler::nif]
fn listener_close<'a>(env: Env<'a>, handle: ResourceArc<Handle>, reference: Term<'a>) -> Term<'a> {
    let listener = &handle.0;
    let mut state = listener.lock();
    if state.stopped {
        return atoms::ok().encode(env);
    }
    let (reply, operation) = Reply::about(env, reference, handle.clone());
    state.closers.push(reply);
    // Its last message is owed even if the handle is dropped now.
    listener.owner.pin(&handle);
    drop(state);
    listener.stop();
    (atoms::ok(), operation).encode(env)
}

#[rustler::nif]
fn listener_begin_transfer<'a>(
    env: Env<'a>,
    handle: ResourceArc<Handle>,
    to: LocalPid,
) -> Term<'a> {
    begun(env, handle.0.owner.begin_transfer(env, &handle, to))
}

#[rustler::nif]
fn listener_commit_transfer(env: Env, handle: ResourceArc<Handle>) -> Atom {
    if !handle.0.owner.commit_transfer(env, &handle) {
        handle.0.stop();
    }
    atoms::ok()
}

#[rustler::nif]
fn listener_sockname<'a>(env: Env<'a>, handle: ResourceArc<Handle>) -> Term<'a> {
    (atoms::ok(), address(env, handle.0.bound)).encode(env)
}

#[rustler::nif]
fn listener_info<'a>(env: Env<'a>, handle: ResourceArc<Handle>) -> NifResult<Term<'a>> {
    let listener = &handle.0;
    let (state, ready) = {
        let state = listener.lock();
        let name = if state.stopping {
            atoms::closed()
        } else {
            atoms::open()
        };
        (name, state.ready.len())
    };
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed).encode(env);
    Term::map_from_pairs(
        env,
        &[
            (atoms::handle(), atoms::listener().encode(env)),
            (atoms::state(), state.encode(env)),
            (atoms::sockname(), address(env, listener.bound)),
            (atoms::owner(), listener.owner.pid().encode(env)),
            (atoms::handshakes(), count(&listener.handshakes)),
            (atoms::accepted(), count(&listener.established)),
            (atoms::backlog(), ready.encode(env)),
            (refused(), count(&listener.refused)),
            (
                locked(),
                listener.locked.load(Ordering::Acquire).encode(env),
            ),
        ],
    )
}

/// Whether a term is a live handle of a listener.
#[rustler::nif]
fn listener_is(term: Term) -> bool {
    term.decode::<ResourceArc<Handle>>().is_ok()
}
