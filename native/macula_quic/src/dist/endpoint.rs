//! The UDP endpoint of a node: one port that both dials and is dialled.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use aws_lc_rs::hmac;
use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::{
    AsyncUdpSocket, ClientConfig, Connection, EndpointConfig, IdleTimeout, Incoming,
    MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use rustler::{LocalPid, Resource, ResourceArc};
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};

use crate::endpoint::only_version_1;
use crate::halt::{self, Farewell};
use crate::objects::{Counted, Kind};

use super::driver::{self, DistRuntime, Driver};
use super::link::{CODE_END, Link, LinkHandle};
use super::messages::{self, Reply, Why};
use super::socket::{self, SocketOptions, mapped, plain};
use super::tls::{self, TlsError};

/// Datagrams of up to this size are tried on the way to the same host.
const LOCAL_MTU: u16 = 65_000;
/// And up to this on the way to others: what jumbo frames carry.
const FAR_MTU: u16 = 8_952;
/// What a peer may send in one datagram.
pub(crate) const MAX_DATAGRAM: u16 = 65_507;
/// Unread bytes of one lane.
const LANE_WINDOW: u32 = 4 * 1024 * 1024;
/// Sent and not yet acknowledged bytes of a link. More than all lanes' windows together, so that
/// the control stream is never stuck behind data.
const SEND_WINDOW: u64 = LANE_WINDOW as u64 * LANES as u64 + 1024 * 1024;
/// Lanes in each direction.
const LANES: u32 = 1;
/// Strangers beyond this prove their address first.
const RETRY_OVER: usize = 32;
/// Strangers that are dealt with at a time.
const MAX_STRANGERS: usize = 256;
/// Refused datagrams whose links are not told yet.
const REFUSALS: usize = 16;
/// From the first packet to the open control stream.
const HANDSHAKE: Duration = Duration::from_secs(7);

#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("socket: {0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("endpoint configuration: {0}")]
    Config(#[from] quinn::ConfigError),
}

/// How an endpoint is made.
pub(crate) struct Options {
    pub(crate) addr: SocketAddr,
    pub(crate) socket: SocketOptions,
    /// Also serve. Else the endpoint only dials.
    pub(crate) listen: bool,
    /// Derived from the node's identity and the same at each start: a restarted node can tell its
    /// former peers at once that it knows nothing of their links.
    pub(crate) reset_key: Vec<u8>,
    pub(crate) cid_key: u64,
    /// A peer is gone after this long without a sign of life of its transport.
    pub(crate) liveness: Duration,
    pub(crate) bbr: bool,
}

/// The peers that are not yet trusted, oldest first.
#[derive(Default)]
struct Strangers(Mutex<VecDeque<Arc<Notify>>>);

/// A place among them. Whoever comes when all are taken gets the place of the one that has had the
/// longest time to prove itself: a peer that knows the cookie needs a few milliseconds, so those that
/// connect and do nothing keep nobody out.
pub(crate) struct Slot {
    strangers: Arc<Strangers>,
    evicted: Arc<Notify>,
}

impl Strangers {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    fn take(strangers: &Arc<Strangers>) -> Slot {
        let evicted = Arc::new(Notify::new());
        let mut queue = strangers.lock();
        if queue.len() >= MAX_STRANGERS
            && let Some(oldest) = queue.pop_front()
        {
            oldest.notify_one();
        }
        queue.push_back(evicted.clone());
        drop(queue);
        Slot {
            strangers: strangers.clone(),
            evicted,
        }
    }

    /// Completes when the place is given to another.
    pub(crate) fn evicted(&self) -> Arc<Notify> {
        self.evicted.clone()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.strangers
            .lock()
            .retain(|one| !Arc::ptr_eq(one, &self.evicted));
    }
}

pub(crate) struct DistEndpoint {
    /// Empty once closed.
    endpoint: Mutex<Option<quinn::Endpoint>>,
    socket: Weak<dyn AsyncUdpSocket>,
    local: SocketAddr,
    configs: Configs,
    acceptor: Mutex<Option<LocalPid>>,
    strangers: Arc<Strangers>,
    links: Mutex<Vec<Weak<Link>>>,
    _counted: Counted,
}

/// The configurations towards the same host and towards others.
struct Configs {
    client: [ClientConfig; 2],
    server: [Arc<ServerConfig>; 2],
}

/// The links end when the VM halts.
impl Farewell for DistEndpoint {
    fn begin(&self) -> bool {
        let links = self.links();
        for link in &links {
            link.stop();
        }
        !links.is_empty()
    }

    fn is_over(&self) -> bool {
        self.links().is_empty()
    }

    fn force(&self) {
        if let Some(endpoint) = self.handle() {
            endpoint.close(VarInt::from_u32(CODE_END), b"");
        }
    }
}

impl DistEndpoint {
    /// Binds the socket and starts to serve it.
    pub(crate) fn open(options: &Options) -> Result<Arc<Self>, OpenError> {
        let runtime = crate::runtime::dist();
        let _inside = runtime.enter();
        let (refusals, refused) = mpsc::channel(REFUSALS);
        let socket = socket::wrap(socket::bind(options.addr, &options.socket)?, Some(refusals))?;
        let local = socket.local_addr()?;

        let tls = tls::configs()?;
        let transports = [LOCAL_MTU, FAR_MTU].map(|mtu| Arc::new(transport(options, mtu)));
        let configs = Configs {
            client: transports.clone().map(|transport| {
                let mut config = ClientConfig::new(tls.client.clone());
                config.transport_config(transport);
                config
            }),
            server: transports.map(|transport| {
                let mut config = ServerConfig::with_crypto(tls.server.clone());
                config.transport_config(transport);
                config.migration(true);
                config.max_incoming(MAX_STRANGERS * 4);
                Arc::new(config)
            }),
        };

        let key = hmac::Key::new(hmac::HMAC_SHA256, &options.reset_key);
        let cid_key = options.cid_key;
        let mut config = EndpointConfig::new(Arc::new(key));
        only_version_1(&mut config);
        config.max_udp_payload_size(MAX_DATAGRAM)?;
        config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(cid_key)));
        let weak = Arc::downgrade(&socket);
        let endpoint = quinn::Endpoint::new_with_abstract_socket(
            config,
            options.listen.then(|| (*configs.server[1]).clone()),
            socket,
            Arc::new(DistRuntime),
        )?;
        let this = Arc::new(Self {
            endpoint: Mutex::new(Some(endpoint.clone())),
            socket: weak,
            local,
            configs,
            acceptor: Mutex::new(None),
            strangers: Arc::new(Strangers::default()),
            links: Mutex::new(Vec::new()),
            _counted: Counted::new(Kind::DistEndpoint),
        });
        runtime.spawn(hear(Arc::downgrade(&this), refused));
        if options.listen {
            runtime.spawn(serve(Arc::downgrade(&this), endpoint));
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

    fn handle(&self) -> Option<quinn::Endpoint> {
        self.endpoint
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Dials a peer; the answer is `{Ref, {ok, Link} | {error, Why}}`.
    pub(crate) fn connect(self: &Arc<Self>, addr: SocketAddr, limit: Duration, reply: Reply) {
        let this = self.clone();
        crate::runtime::dist().spawn(async move {
            let dialled = tokio::select! {
                dialled = timeout(limit, this.dial(addr)) => dialled.unwrap_or(Err(Why::Timeout)),
                () = refused_port(addr) => Err(Why::Econnrefused),
            };
            match dialled {
                Ok(link) => {
                    let handle = LinkHandle::new(link);
                    reply.link(handle);
                }
                Err(why) => reply.error(&why),
            }
        });
    }

    async fn dial(&self, addr: SocketAddr) -> Result<Arc<Link>, Why> {
        let endpoint = self.handle().ok_or(Why::Closed)?;
        let config = self.configs.client[usize::from(!is_same_host(addr))].clone();
        let (connecting, driver) = driver::capture(|| {
            endpoint.connect_with(config, mapped(addr, self.local), tls::SERVER_NAME)
        });
        let connection = connecting
            .map_err(|_| Why::Closed)?
            .await
            .map_err(|e| Why::from(&e))?;
        let streams = connection.open_bi().await.map_err(|e| Why::from(&e))?;
        Ok(self.add(
            Met {
                connection,
                streams,
                driver,
            },
            None,
        ))
    }

    fn add(&self, met: Met, slot: Option<Slot>) -> Arc<Link> {
        let link = Link::spawn(met, slot);
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(&link));
        link
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
    /// business of their processes; answers when that is done.
    pub(crate) fn close(self: &Arc<Self>, reply: Option<Reply>) {
        let endpoint = self
            .endpoint
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let links = self.links();
        let socket = self.socket.clone();
        crate::runtime::dist().spawn(async move {
            if let Some(endpoint) = endpoint {
                endpoint.set_server_config(None);
                let ended = async {
                    for link in &links {
                        link.connection().closed().await;
                    }
                };
                let _ = timeout(Duration::from_secs(2), ended).await;
                drop(links);
                endpoint.close(VarInt::from_u32(CODE_END), b"");
                let _ = timeout(Duration::from_millis(300), endpoint.wait_idle()).await;
            }
            // The socket goes with the last task that uses it.
            for _ in 0..200 {
                if socket.strong_count() == 0 {
                    break;
                }
                sleep(Duration::from_millis(5)).await;
            }
            if let Some(reply) = reply {
                reply.ok(&[]);
            }
        });
    }
}

/// Tells the links which of their datagrams reached a host that has no such port.
async fn hear(endpoint: Weak<DistEndpoint>, mut refused: mpsc::Receiver<SocketAddr>) {
    while let Some(addr) = refused.recv().await {
        let Some(endpoint) = endpoint.upgrade() else {
            return;
        };
        for link in endpoint.links() {
            if link.peer() == plain(addr) {
                link.refused();
            }
        }
    }
}

async fn serve(endpoint: Weak<DistEndpoint>, quinn: quinn::Endpoint) {
    while let Some(incoming) = quinn.accept().await {
        let Some(endpoint) = endpoint.upgrade() else {
            return;
        };
        let strangers = endpoint.strangers.lock().len();
        if strangers >= RETRY_OVER && incoming.may_retry() && !incoming.remote_address_validated() {
            let _ = incoming.retry();
            continue;
        }
        let slot = Slot::take(&endpoint.strangers);
        crate::runtime::dist().spawn(async move {
            let peer = plain(incoming.remote_address());
            let met = tokio::select! {
                met = timeout(HANDSHAKE, meet(&endpoint, incoming)) => met,
                () = slot.evicted.notified() => Ok(Err(Why::TooMany)),
            };
            let Some(acceptor) = endpoint.acceptor() else {
                return;
            };
            match met.unwrap_or(Err(Why::Timeout)) {
                Ok(met) => {
                    let handle = LinkHandle::new(endpoint.add(met, Some(slot)));
                    messages::link(&acceptor, handle, peer);
                }
                Err(why) => messages::refused(&acceptor, peer, &why),
            }
        });
    }
}

/// A connection whose control stream is open.
pub(crate) struct Met {
    pub(crate) connection: Connection,
    pub(crate) streams: (quinn::SendStream, quinn::RecvStream),
    pub(crate) driver: Option<Arc<Driver>>,
}

async fn meet(endpoint: &DistEndpoint, incoming: Incoming) -> Result<Met, Why> {
    let same_host = incoming
        .local_ip()
        .is_some_and(|ip| ip == incoming.remote_address().ip())
        || plain(incoming.remote_address()).ip().is_loopback();
    let config = endpoint.configs.server[usize::from(!same_host)].clone();
    let (connecting, driver) = driver::capture(|| incoming.accept_with(config));
    let connection = connecting
        .map_err(|e| Why::from(&e))?
        .await
        .map_err(|e| Why::from(&e))?;
    let streams = connection.accept_bi().await.map_err(|e| Why::from(&e))?;
    Ok(Met {
        connection,
        streams,
        driver,
    })
}

fn transport(options: &Options, max_mtu: u16) -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(max_mtu);
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(LANES))
        .stream_receive_window(VarInt::from_u32(LANE_WINDOW))
        // Each stream has its limit; a common one would let a full lane stop the control stream.
        .receive_window(VarInt::MAX)
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(mtu))
        .keep_alive_interval(Some(options.liveness / 8))
        // The idle timer begins anew with the first packet sent after the last one received (RFC
        // 9000, section 10.1), so that a dead peer is given a keep-alive interval more.
        .max_idle_timeout(IdleTimeout::try_from(options.liveness * 8 / 10).ok());
    if options.bbr {
        config.congestion_controller_factory(Arc::new(BbrConfig::default()));
    } else {
        config.congestion_controller_factory(Arc::new(CubicConfig::default()));
    }
    config
}

/// Whether packets to the address never leave this host.
fn is_same_host(addr: SocketAddr) -> bool {
    addr.ip().is_loopback()
        || probe(addr)
            .and_then(|socket| socket.local_addr())
            .is_ok_and(|own| own.ip() == addr.ip())
}

/// A socket that has the address as its only peer.
fn probe(addr: SocketAddr) -> std::io::Result<UdpSocket> {
    let any = match addr.ip() {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0u16; 8]),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(addr)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Completes when the system says that nobody listens at the address. The endpoint's own socket
/// can't be told that, as it has many peers; a byte that no QUIC endpoint answers is sent from one
/// that can.
async fn refused_port(addr: SocketAddr) {
    let probing = async {
        let socket = tokio::net::UdpSocket::from_std(probe(addr)?)?;
        loop {
            socket.send(&[0]).await?;
            let mut answer = [0; 1];
            let _ = timeout(Duration::from_millis(500), socket.recv(&mut answer)).await??;
        }
    };
    let result: std::io::Result<()> = probing.await;
    match result {
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => (),
        _ => std::future::pending().await,
    }
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
        self.0.close(None);
    }
}
