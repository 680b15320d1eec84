//! The UDP endpoint of a node: one port that both dials and is dialled.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use aws_lc_rs::hmac;
use quinn_proto::HashedConnectionIdGenerator;
use quinn_proto::congestion::CubicConfig;
use quinn_udp::Transmit;
use rustler::{LocalPid, Resource, ResourceArc};
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};

use crate::engine::endpoint::only_version_1;
use crate::engine::parting::Parting;
use crate::engine::transport::{
    ClientConfig, ConnectionError, Endpoint, EndpointConfig, IdleTimeout, Incoming,
    MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
};
use crate::udp::aimed::{aim, any};
use crate::udp::ask::{self, KNOCK, Pace};
use crate::udp::asynchronous::AsyncUdpSocket;
use crate::udp::socket::{Port, Wrapped};
use crate::vm::alarm::Alarm;
use crate::vm::error::posix;
use crate::vm::fault::{self, Point};
use crate::vm::halt::{self, Farewell};
use crate::vm::objects::{Counted, Kind};
use crate::vm::tasks::{Fate, Held, contain, keep_up};

use super::congestion::CappedBbrConfig;
use super::driver::Driver;
use super::link::{CODE_END, Link, LinkHandle, Look, Met, Role, Rules, SEND_WINDOW_MIN};
use super::messages::{self, Reply, SocketNews, Why};
use super::socket::{self, MAX_DATAGRAM, News, SocketOptions, mapped, plain};
use super::strangers::{MAX_STRANGERS, Slot, Strangers};
use super::timer::lazy_timer;
use super::tls::{self, TlsError};
use super::visit::forget_visits;

/// The size of the one probe on the way to the same host. The peer parses the padding of a probe byte
/// by byte: twice the size gains little throughput and costs each new link half a millisecond.
const LOCAL_MTU: u16 = 32_000;
/// On the way to others, where the system does not tell the MTU of its interface.
const FAR_MTU: u16 = 1_472;
/// A search over more than an Ethernet frame's range ends this close to the true value.
const JUMBO_STEP: u16 = 128;
/// Every path carries datagrams of this size (RFC 9000, section 14).
const MIN_MTU: u16 = 1_200;
/// Bytes that a peer may have sent unread before its proof.
const STRANGER_WINDOW: u32 = 64 * 1024;
/// Strangers beyond this prove their address first.
const RETRY_OVER: usize = 32;
/// News of the socket that nobody is told yet.
const NEWS: usize = 16;
/// How long the packets that close all connections may take to leave a busy machine.
const TURN: Duration = Duration::from_millis(50);
/// Between two tries to serve the port anew after a failure, and the longest pause.
const RENEWAL: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));
/// How often the socket is looked at, or somewhat more often: together with the links.
const INSPECT: Duration = Duration::from_secs(5);
/// How long to wait for a port that an endpoint which ends still has.
const PORT_FREE: Duration = Duration::from_secs(5);
/// A dial without an answer asks whether anybody has the port. The socket of a process that ends is there for some
/// more milliseconds and answers nothing; the next node must not wait for a dial to that one.
const ASK: Pace = Pace {
    first: Duration::from_millis(50),
    pause: Duration::from_millis(50),
    longest: Duration::from_millis(500),
};
/// From the first packet to the open control stream.
const HANDSHAKE: Duration = Duration::from_secs(7);
/// A dial that has no answer after these times begins anew beside the old attempt: the peer may be
/// another one now, which cannot go on with a handshake that its predecessor began.
const SECOND_ATTEMPTS: [Duration; 2] = [Duration::from_millis(700), Duration::from_secs(2)];

#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("socket: {0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("endpoint configuration: {0}")]
    Config(#[from] quinn_proto::ConfigError),
}

/// How an endpoint is made.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) addr: SocketAddr,
    pub(crate) socket: SocketOptions,
    /// Also serve. Else the endpoint only dials.
    pub(crate) listen: bool,
    /// Derived from the node's identity and the same at each start: a restarted node can tell its
    /// former peers at once that it knows nothing of their links.
    pub(crate) reset_key: Vec<u8>,
    pub(crate) cid_key: u64,
    pub(crate) bbr: bool,
    pub(crate) rules: Rules,
}

/// The sockets that live. Kept here, as whoever asked for one may be gone before the socket is: a VM
/// that restarts kills all its processes.
static SOCKETS: Mutex<Vec<(u16, Weak<dyn AsyncUdpSocket>)>> = Mutex::new(Vec::new());

fn sockets() -> MutexGuard<'static, Vec<(u16, Weak<dyn AsyncUdpSocket>)>> {
    let mut sockets = SOCKETS.lock().unwrap_or_else(PoisonError::into_inner);
    sockets.retain(|(_, socket)| socket.strong_count() > 0);
    sockets
}

/// Answers when no endpoint of this VM has the port any more, `{ok, _}`, or after a few seconds.
/// False if none has it now: then there is no answer.
pub(crate) fn await_port(port: u16, reply: Reply) -> bool {
    let ours: Vec<_> = sockets()
        .iter()
        .filter(|(known, _)| *known == port)
        .map(|(_, socket)| socket.clone())
        .collect();
    if ours.is_empty() {
        reply.forget();
        return false;
    }
    crate::vm::runtime::dist().spawn(async move {
        let freed = async {
            while ours.iter().any(|socket| socket.strong_count() > 0) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = timeout(PORT_FREE, freed).await;
        reply.ok(&[]);
    });
    true
}

pub(crate) struct DistEndpoint {
    options: Options,
    /// Empty once closed.
    current: Mutex<Option<Current>>,
    news: mpsc::Sender<News>,
    local: SocketAddr,
    tls: tls::Configs,
    acceptor: Mutex<Option<LocalPid>>,
    strangers: Arc<Strangers>,
    links: Mutex<Vec<Weak<Link>>>,
    /// A link has another rhythm than those before.
    rhythm: Arc<Notify>,
    _counted: Counted,
}

/// The endpoint of now.
struct Current {
    endpoint: Endpoint,
    socket: Weak<dyn AsyncUdpSocket>,
    port: Port,
}

impl Current {
    /// Binds the socket. To be called inside the runtime.
    fn begin(
        options: &Options,
        addr: SocketAddr,
        tls: &tls::Configs,
        news: mpsc::Sender<News>,
    ) -> Result<Self, OpenError> {
        let socket = socket::bind(addr, &options.socket)?;
        let Wrapped { socket, port } =
            socket::wrap(socket, options.socket.clone(), options.listen, Some(news))?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, &options.reset_key);
        let cid_key = options.cid_key;
        let mut config = EndpointConfig::new(Arc::new(key));
        only_version_1(&mut config);
        config.max_udp_payload_size(MAX_DATAGRAM)?;
        config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(cid_key)));
        let weak = Arc::downgrade(&socket);
        sockets().push((socket.local_addr()?.port(), weak.clone()));
        let server = options.listen.then(|| {
            let transport = transport(options.rules, options.bbr, Way::Far(FAR_MTU));
            server_config(tls, transport)
        });
        let (endpoint, driver) = Endpoint::new(config, server, socket, lazy_timer);
        crate::vm::runtime::dist().spawn(driver);
        Ok(Self {
            endpoint,
            socket: weak,
            port,
        })
    }

    /// What becomes of the driver. Should that fail, another endpoint takes the place.
    fn fate(&self) -> &Arc<Fate> {
        self.endpoint.fate()
    }
}

/// What is known of the way to a peer before its first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    SameHost,
    /// With the largest payload that the interface takes.
    Far(u16),
}

/// The links end when the VM halts.
impl Farewell for DistEndpoint {
    fn begin(&self) -> bool {
        let links = self.links();
        for link in &links {
            link.stop();
        }
        // Who is in the middle of a handshake is to know, too.
        let met = self
            .handle()
            .is_some_and(|endpoint| endpoint.open_connections() > 0);
        met || !links.is_empty()
    }

    fn is_over(&self) -> bool {
        self.links().is_empty()
    }

    fn force(&self) {
        if let Some(endpoint) = self.handle() {
            endpoint.close(VarInt::from_u32(CODE_END), b"");
            // The packets that say so leave on the worker.
            crate::vm::runtime::dist().have_turn(TURN);
        }
    }
}

impl DistEndpoint {
    /// Binds the socket and starts to serve it.
    pub(crate) fn open(options: &Options) -> Result<Arc<Self>, OpenError> {
        let runtime = crate::vm::runtime::start_dist()?;
        let _inside = runtime.handle().enter();
        let (news, heard) = mpsc::channel(NEWS);
        let tls = tls::configs(options.rules.streams > 0)?;
        let current = Current::begin(options, options.addr, &tls, news.clone())?;
        let this = Arc::new(Self {
            options: options.clone(),
            local: current.endpoint.local_addr()?,
            current: Mutex::new(Some(current)),
            news,
            tls,
            acceptor: Mutex::new(None),
            strangers: Arc::new(Strangers::default()),
            links: Mutex::new(Vec::new()),
            rhythm: Arc::default(),
            _counted: Counted::new(Kind::DistEndpoint),
        });
        let weak = Arc::downgrade(&this);
        let mut heard = heard;
        runtime.spawn(async move { while contain(hear(&weak, &mut heard)).await.is_err() {} });
        let (weak, rhythm) = (Arc::downgrade(&this), this.rhythm.clone());
        runtime.spawn(async move { keep_up(|| watch(&weak, &rhythm)).await });
        if options.listen {
            let weak = Arc::downgrade(&this);
            runtime.spawn(async move { keep_up(|| serve_on(&weak)).await });
        }
        let farewell: Weak<Self> = Arc::downgrade(&this);
        halt::register(farewell);
        Ok(this)
    }

    pub(crate) fn local(&self) -> SocketAddr {
        plain(self.local)
    }

    /// New links are announced to this process from now on.
    pub(crate) fn accept(&self, pid: LocalPid) -> bool {
        *self.acceptor.lock().unwrap_or_else(PoisonError::into_inner) = Some(pid);
        self.handle().is_some()
    }

    fn acceptor(&self) -> Option<LocalPid> {
        *self.acceptor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn current(&self) -> MutexGuard<'_, Option<Current>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self) -> Option<Endpoint> {
        Some(self.current().as_ref()?.endpoint.clone())
    }

    /// Serves the port anew if what did so has failed. All links are lost then. To be called inside the
    /// runtime.
    fn renew(&self) -> Result<(), OpenError> {
        let mut current = self.current();
        let Some(failed) = current.as_ref().filter(|now| now.fate().has_failed()) else {
            return Ok(());
        };
        failed.port.free();
        let mut addr = self.local;
        if !self.options.listen {
            addr.set_port(0);
        }
        let begun = Current::begin(&self.options, addr, &self.tls, self.news.clone())?;
        *current = Some(begun);
        Ok(())
    }

    /// Dials a peer; the answer is `{Ref, {ok, Link} | {error, Why}}`.
    pub(crate) fn connect(self: &Arc<Self>, addr: SocketAddr, limit: Duration, reply: Reply) {
        let this = self.clone();
        crate::vm::runtime::dist().spawn(async move {
            // Processes of a VM that halts still run, and would dial the peers that it has just left.
            if halt::is_leaving() {
                return reply.error(&Why::Closed);
            }
            let dialled = contain(async {
                fault::pass(Point::DistDial);
                tokio::select! {
                    dialled = timeout(limit, this.dial(addr)) => {
                        dialled.unwrap_or(Err(Why::Timeout))
                    }
                    why = refused_port(this.aims(addr)) => Err(why),
                }
            });
            match dialled.await.unwrap_or(Err(Why::Internal)) {
                Ok(link) => {
                    let handle = LinkHandle::new(link);
                    reply.link(handle);
                }
                Err(why) => reply.error(&why),
            }
        });
    }

    /// Where packets to this address leave from, and the address as the socket has it.
    fn aims(&self, to: SocketAddr) -> Option<(SocketAddr, SocketAddr)> {
        if !self.local.ip().is_unspecified() {
            return Some((self.local, mapped(to, self.local)));
        }
        let only_v6 = self.local.is_ipv6() && self.options.socket.only_v6;
        (!only_v6 || to.is_ipv6()).then(|| (any(to), to))
    }

    /// The first attempt that succeeds counts.
    async fn dial(&self, addr: SocketAddr) -> Result<Arc<Link>, Why> {
        let [second, third] = SECOND_ATTEMPTS;
        let first = self.attempt(addr);
        let second = async {
            sleep(second).await;
            self.attempt(addr).await
        };
        let third = async {
            sleep(third).await;
            self.attempt(addr).await
        };
        let met = tokio::select! {
            met = first => met,
            Ok(met) = second => Ok(met),
            Ok(met) = third => Ok(met),
        };
        Ok(self.add(met?, Role::Dialler, None))
    }

    async fn attempt(&self, addr: SocketAddr) -> Result<Met, Why> {
        self.renew().map_err(|_| Why::Closed)?;
        let endpoint = self.handle().ok_or(Why::Closed)?;
        let mut config = ClientConfig::new(self.tls.client.clone());
        config.transport_config(Arc::new(transport(
            self.options.rules,
            self.options.bbr,
            way_to(addr),
        )));
        let begun = endpoint.connect_with(config, mapped(addr, self.local), tls::SERVER_NAME);
        let (connecting, stepper) = begun.map_err(|_| Why::Closed)?;
        let driver = Driver::spawn(stepper);
        let connection = connecting.connected().await.map_err(|e| Why::from(&e))?;
        let (send, recv) = connection.open_bi().await.map_err(|e| Why::from(&e))?;
        Ok(Met {
            connection,
            streams: (Held::new(send), Held::new(recv)),
            driver,
        })
    }

    fn add(&self, met: Met, role: Role, slot: Option<Slot>) -> Arc<Link> {
        let link = Link::spawn(met, role, slot, self.options.rules, self.rhythm.clone());
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(&link));
        drop(links);
        if halt::is_leaving() {
            link.stop();
        }
        self.rhythm.notify_one();
        link
    }

    /// Sends a datagram that says nothing and that the peer's system throws away. A host without such
    /// a port refuses the datagram, which the endpoint hears.
    fn knock(&self, link: &Link) {
        let socket = self.current().as_ref().and_then(|now| now.socket.upgrade());
        if let Some(socket) = socket {
            let transmit = Transmit {
                destination: mapped(link.peer(), self.local),
                ecn: None,
                contents: &KNOCK,
                segment_size: None,
                src_ip: None,
            };
            // One that is lost is followed by another.
            let _ = socket.try_send(&transmit);
        }
    }

    /// The system tells nobody when a socket is gone.
    fn inspect(&self) {
        if let Some(now) = &*self.current() {
            now.port.inspect();
        }
    }

    fn refused(self: &Arc<Self>, addr: SocketAddr) {
        for link in self.links() {
            if link.peer() == plain(addr)
                && let Some(pause) = link.refused()
            {
                crate::vm::runtime::dist().spawn(ask_again(Arc::downgrade(self), link, pause));
            }
        }
    }

    fn tell(&self, news: SocketNews) {
        if let Some(acceptor) = self.acceptor() {
            messages::socket(&acceptor, news, self.local());
        }
    }

    /// The links that are still up.
    fn links(&self) -> Vec<Arc<Link>> {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|link| !link.is_closed())
            .collect()
    }

    /// Takes no more links, and frees the port when those there are have ended, which is the
    /// business of their processes.
    pub(crate) fn close(&self) {
        let Some(current) = self.current().take() else {
            return;
        };
        let endpoint = current.endpoint;
        let links = self.links();
        crate::vm::runtime::dist().spawn(async move {
            endpoint.set_server_config(None);
            let ended = async {
                for link in &links {
                    link.connection().closed().await;
                }
            };
            let _ = timeout(Duration::from_secs(2), contain(ended)).await;
            drop(links);
            endpoint.close(VarInt::from_u32(CODE_END), b"");
            // The socket goes with the last task that uses it.
            let _ = timeout(Duration::from_millis(300), endpoint.wait_idle()).await;
        });
    }
}

/// Tells the links which of their datagrams reached a host that has no such port, and the acceptor what
/// becomes of the socket.
async fn hear(endpoint: &Weak<DistEndpoint>, heard: &mut mpsc::Receiver<News>) {
    while let Some(news) = heard.recv().await {
        let Some(endpoint) = endpoint.upgrade() else {
            return;
        };
        match news {
            News::Refused(addr) => endpoint.refused(addr),
            News::Gone => endpoint.tell(SocketNews::Gone),
            News::Replaced => endpoint.tell(SocketNews::Replaced),
        }
    }
}

/// Knocks until it is sure that nobody has the port, or that somebody does.
async fn ask_again(endpoint: Weak<DistEndpoint>, link: Arc<Link>, pause: Duration) {
    while link.is_in_doubt() {
        sleep(pause).await;
        match endpoint.upgrade() {
            Some(endpoint) => endpoint.knock(&link),
            None => return,
        }
    }
}

/// Looks at the links from time to time, at all that are due soon in one turn, so that idle links wake
/// the native thread seldom.
async fn watch(endpoint: &Weak<DistEndpoint>, rhythm: &Notify) {
    let alarm = Alarm::new();
    let mut inspected = Instant::now();
    loop {
        fault::pass(Point::DistWatch);
        let Some(alive) = endpoint.upgrade() else {
            return;
        };
        let due = alive
            .links()
            .iter()
            .filter_map(|link| link.next_look())
            .min();
        drop(alive);
        let inspect = inspected + INSPECT;
        let due = due.map_or(inspect, |due| due.min(inspect));
        tokio::select! {
            () = alarm.at(due) => (),
            () = rhythm.notified() => continue,
        }
        forget_visits();
        let Some(alive) = endpoint.upgrade() else {
            return;
        };
        let now = Instant::now();
        if now + INSPECT / 4 >= inspect {
            inspected = now;
            alive.inspect();
        }
        for link in alive.links() {
            if link.look() == Look::Knock {
                alive.knock(&link);
            }
        }
    }
}

/// Serves the port until it is closed, whatever becomes of what serves it.
async fn serve_on(endpoint: &Weak<DistEndpoint>) {
    loop {
        let serving = endpoint.upgrade().and_then(|alive| {
            let current = alive.current();
            let now = current.as_ref()?;
            Some(now.endpoint.clone())
        });
        let Some(serving) = serving else {
            return;
        };
        serve(endpoint, &serving).await;
        if !serving.fate().has_failed() {
            return;
        }
        drop(serving);
        let mut pause = RENEWAL.0;
        let mut told = false;
        loop {
            let Some(alive) = endpoint.upgrade() else {
                return;
            };
            if !std::mem::replace(&mut told, true) {
                alive.tell(SocketNews::Failed);
            }
            if alive.renew().is_ok() {
                alive.tell(SocketNews::Replaced);
                break;
            }
            drop(alive);
            // The port is not free yet, or the system is short of something.
            sleep(pause).await;
            pause = (pause * 2).min(RENEWAL.1);
        }
    }
}

async fn serve(endpoint: &Weak<DistEndpoint>, serving: &Endpoint) {
    while let Some(incoming) = serving.accept().await {
        fault::pass(Point::DistServe);
        let Some(endpoint) = endpoint.upgrade() else {
            return;
        };
        if halt::is_leaving() {
            incoming.refuse();
            continue;
        }
        let unproven = endpoint.strangers.count() >= RETRY_OVER;
        if unproven && incoming.may_retry() && !incoming.remote_address_validated() {
            let _ = incoming.retry();
            continue;
        }
        let peer = plain(incoming.remote_address());
        let Some(slot) = Slot::take(&endpoint.strangers, peer.ip()) else {
            // The peer repeats its first packet, in a second.
            incoming.ignore();
            continue;
        };
        crate::vm::runtime::dist().spawn(async move {
            let met = contain(async {
                tokio::select! {
                    met = timeout(HANDSHAKE, meet(&endpoint, incoming)) => {
                        met.unwrap_or(Err(Why::Timeout))
                    }
                    () = slot.evicted.notified() => Err(Why::TooMany),
                }
            });
            let met = met.await.unwrap_or(Err(Why::Internal));
            let Some(acceptor) = endpoint.acceptor() else {
                return;
            };
            match met {
                Ok(met) => {
                    let link = endpoint.add(met, Role::Acceptor, Some(slot));
                    messages::link(&acceptor, LinkHandle::new(link), peer);
                }
                Err(why) => messages::refused(&acceptor, peer, &why),
            }
        });
    }
}

async fn meet(endpoint: &DistEndpoint, incoming: Incoming) -> Result<Met, Why> {
    fault::pass(Point::DistMeet);
    let peer = plain(incoming.remote_address());
    let same_host = incoming
        .local_ip()
        .is_some_and(|ip| ip == incoming.remote_address().ip());
    let way = if same_host {
        Way::SameHost
    } else {
        way_to(peer)
    };
    let transport = transport(endpoint.options.rules, endpoint.options.bbr, way);
    let config = Arc::new(server_config(&endpoint.tls, transport));
    let (connecting, stepper) = incoming.accept_with(config).map_err(|e| Why::from(&e))?;
    let driver = Driver::spawn(stepper);
    let connection = match connecting.connected().await {
        Ok(connection) => connection,
        Err(e) => {
            // QUIC sets no timer for a connection whose very first packet closes it, and keeps it.
            let is_over = matches!(
                e,
                ConnectionError::ConnectionClosed(_) | ConnectionError::ApplicationClosed(_)
            );
            if is_over {
                driver.abandon();
            }
            return Err(Why::from(&e));
        }
    };
    let (send, recv) = connection.accept_bi().await.map_err(|e| Why::from(&e))?;
    Ok(Met {
        connection,
        streams: (Held::new(send), Held::new(recv)),
        driver,
    })
}

pub(super) fn server_config(tls: &tls::Configs, transport: TransportConfig) -> ServerConfig {
    let mut config = ServerConfig::with_crypto(tls.server.clone());
    config.transport_config(Arc::new(transport));
    config.migration(true);
    config.max_incoming(MAX_STRANGERS * 4);
    config
}

/// The transport of a link whose peer has not proven itself: `Link::trust` opens the rest.
pub(super) fn transport(rules: Rules, bbr: bool, way: Way) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(rules.window))
        .receive_window(VarInt::from_u32(STRANGER_WINDOW))
        .send_window(SEND_WINDOW_MIN)
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(search(way)))
        // The watch asks silent peers for a sign of life. This ends what the watch does not look at.
        .max_idle_timeout(IdleTimeout::try_from(rules.liveness).ok());
    if bbr {
        config
            .congestion_controller_factory(Arc::new(Parting(Arc::new(CappedBbrConfig::default()))));
    } else {
        config.congestion_controller_factory(Arc::new(Parting(Arc::new(CubicConfig::default()))));
    }
    config
}

/// How large datagrams are searched for.
fn search(way: Way) -> MtuDiscoveryConfig {
    let mut search = MtuDiscoveryConfig::default();
    match way {
        Way::SameHost => {
            // The first step would go half of the way. One that is larger goes to the bound at once.
            let step = (LOCAL_MTU - MIN_MTU) / 2 + 1;
            search.upper_bound(LOCAL_MTU).minimum_change(step);
        }
        Way::Far(payload) => {
            search.upper_bound(payload);
            if payload > 2 * MIN_MTU {
                search.minimum_change(JUMBO_STEP);
            }
        }
    }
    search
}

/// Packets to the same host never leave it; others leave by an interface whose MTU the system knows.
fn way_to(addr: SocketAddr) -> Way {
    if addr.ip().is_loopback() {
        return Way::SameHost;
    }
    let Ok(probe) = aim(any(addr), addr) else {
        return Way::Far(FAR_MTU);
    };
    if probe.local_addr().is_ok_and(|own| own.ip() == addr.ip()) {
        return Way::SameHost;
    }
    let headers = if addr.is_ipv4() { 28 } else { 48 };
    match socket::interface_mtu(&probe) {
        Some(mtu) => Way::Far(mtu.saturating_sub(headers).max(MIN_MTU)),
        None => Way::Far(FAR_MTU),
    }
}

/// Completes when the system says that nobody listens at the address, or that no way leads there.
async fn refused_port(aims: Option<(SocketAddr, SocketAddr)>) -> Why {
    let error = match aims {
        Some((from, to)) => ask::refusal(from, to, ASK).await,
        None => ErrorKind::NetworkUnreachable.into(),
    };
    Why::System(posix(&error))
}

/// The VM's handle on an endpoint. Dropping it closes the endpoint.
pub(crate) struct EndpointHandle(pub(crate) Arc<DistEndpoint>);

#[rustler::resource_impl]
impl Resource for EndpointHandle {}

impl EndpointHandle {
    pub(crate) fn new(endpoint: Arc<DistEndpoint>) -> ResourceArc<Self> {
        ResourceArc::new(Self(endpoint))
    }
}

impl Drop for EndpointHandle {
    fn drop(&mut self) {
        self.0.close();
    }
}
