//! The QUIC endpoints on UDP sockets. All clients of a family share one endpoint.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use quinn::{
    AsyncTimer, AsyncUdpSocket, ClientConfig, ConnectError, Connecting, Endpoint, EndpointConfig,
    Runtime, ServerConfig, TokioRuntime,
};
use tokio::task::AbortHandle;

use crate::engine::capture::Captured;
use crate::engine::routed::{Movable, Route, Routed};
use crate::udp::socket::{self, Port, Replace, Unpaced, WrapOptions, Wrapped};
use crate::udp::wrap::wrap;
use crate::vm::tasks::{Driving, Fate, drive};

/// The largest UDP payload quinn looks for by itself, and has receive buffers for.
const TRANSPORT_MAX_MTU: u16 = 1472;
/// An endpoint whose socket is gone ends if no other can be had in its place for so long.
const REPLACED_WITHIN: Duration = Duration::from_secs(10);

/// An endpoint and its port.
pub(crate) struct Bound {
    pub(crate) endpoint: Endpoint,
    pub(crate) port: Port,
    pub(crate) fixed: Fixed,
    /// What becomes of the endpoint's driver.
    pub(crate) fate: Arc<Fate>,
    /// Of an endpoint that only dials.
    routed: Option<Arc<Routed>>,
}

impl Bound {
    /// Nothing can be done with the endpoint any more.
    pub(crate) fn is_lost(&self) -> bool {
        self.port.lost().is_some() || self.fate.has_failed()
    }
}

/// Completes when no connection is left at an endpoint.
pub(crate) async fn idle(endpoint: &Endpoint, fate: &Fate) {
    // A driver that has failed takes all connections along, and Quinn tells nobody.
    tokio::select! {
        () = endpoint.wait_idle() => {}
        () = fate.failed() => {}
    }
}

/// What an endpoint is made with and cannot change.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Fixed {
    pub(crate) reset_key: Vec<u8>,
    pub(crate) max_mtu: u16,
}

/// QUIC version 1 (RFC 9000). Quinn would speak the drafts before it, too, whose keys are not those of
/// the standard; it has no version 2.
pub(crate) fn only_version_1(config: &mut EndpointConfig) {
    config.supported_versions(vec![1]);
}

/// Starts an endpoint. Called on a runtime thread: the endpoint's driver runs there.
pub(crate) fn start(
    socket: UdpSocket,
    mut config: EndpointConfig,
    fixed: Fixed,
    server: Option<ServerConfig>,
) -> io::Result<Bound> {
    only_version_1(&mut config);
    if fixed.max_mtu > TRANSPORT_MAX_MTU {
        // Refused only below the minimum, which `max_mtu` is not.
        let _ = config.max_udp_payload_size(fixed.max_mtu);
    }
    let max_datagram = fixed.max_mtu.max(TRANSPORT_MAX_MTU);
    let options = WrapOptions {
        max_datagram,
        news: None,
        replace: Replace {
            bind: Box::new(socket::bind),
            any_port: server.is_none(),
            within: Some(REPLACED_WITHIN),
        },
        inspects: true,
    };
    let Wrapped { socket, port } = wrap::<Unpaced>(socket, options)?;
    let (socket, routed): (Arc<dyn AsyncUdpSocket>, _) = match &server {
        Some(_) => (socket, None),
        None => {
            let routed = Routed::new(socket);
            (routed.clone(), Some(routed))
        }
    };
    let (endpoint, driver) = capture(|| {
        Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(QuicRuntime))
    });
    Ok(Bound {
        endpoint: endpoint?,
        port,
        fixed,
        fate: driver.map(|driver| driver.fate).unwrap_or_default(),
        routed,
    })
}

/// Quinn's view of the runtime: tokio's, and a hold on the drivers that Quinn spawns.
#[derive(Debug)]
struct QuicRuntime;

/// The task that drives one connection, or an endpoint.
pub(crate) struct Driver {
    task: AbortHandle,
    pub(crate) fate: Arc<Fate>,
    route: Arc<Route>,
}

impl Driver {
    /// Keeps something as long as QUIC knows the connection.
    pub(crate) fn hold(&self, guest: impl std::any::Any + Send) {
        self.route.hold(guest);
    }

    /// Ends a connection that nothing is left to do for.
    pub(crate) fn abandon(&self) {
        self.task.abort();
    }
}

thread_local! {
    static CAPTURED: Captured<Driver> = const { Captured::new() };
}

/// Runs `make`, which makes a connection or an endpoint, and answers the driver that Quinn spawned for it.
pub(crate) fn capture<T>(make: impl FnOnce() -> T) -> (T, Option<Driver>) {
    CAPTURED.with(|captured| captured.during(make))
}

/// A driver that sends by the socket of its connection.
struct RoutedDriver {
    driver: Driving,
    route: Arc<Route>,
}

impl RoutedDriver {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let driver = &mut self.driver;
        self.route.run(|| driver.as_mut().poll(cx))
    }
}

impl Drop for RoutedDriver {
    fn drop(&mut self) {
        self.route.end();
    }
}

impl Runtime for QuicRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Driving) {
        let fate = Arc::<Fate>::default();
        let route = Arc::<Route>::default();
        let watched = fate.clone();
        let mut routed = RoutedDriver {
            driver: future,
            route: route.clone(),
        };
        let routed = async move {
            std::future::poll_fn(|cx| routed.poll(cx)).await;
        };
        let task = tokio::spawn(async move { drive(routed, &watched).await }).abort_handle();
        let driver = Driver { task, fate, route };
        CAPTURED.with(|captured| captured.put(driver));
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

/// A connection that begins.
pub(crate) struct Dial {
    pub(crate) connecting: Connecting,
    pub(crate) driver: Option<Driver>,
    pub(crate) endpoint: Endpoint,
    /// The endpoint's port and the fate of its driver if it is for this dial alone.
    pub(crate) own: Option<(Port, Arc<Fate>)>,
    /// How it can move.
    pub(crate) movable: Option<Movable>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

/// Begins a connection to `to`. The endpoint is for this dial alone if a local address is asked for,
/// or an MTU that needs larger receive buffers, which not everybody should pay for.
pub(crate) fn dial(
    to: SocketAddr,
    local: Option<SocketAddr>,
    max_mtu: u16,
    config: &ClientConfig,
    server_name: &str,
) -> Result<Dial, DialError> {
    type Shared = Mutex<Option<(Endpoint, Option<Arc<Routed>>)>>;
    static V4: Shared = Mutex::new(None);
    static V6: Shared = Mutex::new(None);
    let fixed = Fixed {
        max_mtu,
        ..Fixed::default()
    };
    let dialling =
        |local, fixed| start(socket::bind(local)?, EndpointConfig::default(), fixed, None);
    let connect = |endpoint: &Endpoint, routed: &Option<Arc<Routed>>, own| {
        let (connecting, driver) =
            capture(|| endpoint.connect_with(config.clone(), to, server_name));
        let movable = routed.as_ref().zip(driver.as_ref());
        let movable = movable.map(|(routed, driver)| Movable {
            endpoint: endpoint.clone(),
            routed: routed.clone(),
            route: driver.route.clone(),
            wrap: wrap_own,
            max_mtu,
        });
        Ok::<_, ConnectError>(Dial {
            connecting: connecting?,
            driver,
            endpoint: endpoint.clone(),
            own,
            movable,
        })
    };
    if local.is_some() || max_mtu > TRANSPORT_MAX_MTU {
        let bound = dialling(local.unwrap_or_else(|| any(to)), fixed)?;
        let own = Some((bound.port, bound.fate));
        return Ok(connect(&bound.endpoint, &bound.routed, own)?);
    }
    let shared = if to.is_ipv4() { &V4 } else { &V6 };
    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((endpoint, routed)) = &*shared {
        match connect(endpoint, routed, None) {
            // It has ended, and another takes its place.
            Err(ConnectError::EndpointStopping) => {}
            begun => return Ok(begun?),
        }
    }
    let bound = dialling(any(to), fixed)?;
    let (endpoint, routed) = shared.insert((bound.endpoint, bound.routed));
    Ok(connect(endpoint, routed, None)?)
}

/// A socket for one connection that has moved.
fn wrap_own(socket: UdpSocket, max_mtu: u16) -> io::Result<Wrapped> {
    wrap::<Unpaced>(
        socket,
        WrapOptions {
            max_datagram: max_mtu.max(TRANSPORT_MAX_MTU),
            news: None,
            replace: Replace {
                bind: Box::new(socket::bind),
                any_port: true,
                within: Some(REPLACED_WITHIN),
            },
            inspects: true,
        },
    )
}

/// Any address of the same family.
pub(crate) fn any(like: SocketAddr) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// Why a socket could not be aimed at an address.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AimError {
    /// The system has no socket for this.
    #[error("no socket: {0}")]
    Socket(io::Error),
    /// The system sends nothing to the address: no route leads there, or one that forbids it.
    #[error("no way to the address: {0}")]
    NoWay(io::Error),
}

impl AimError {
    /// What the system says of the way, if the way is what is missing.
    pub(crate) fn no_way(self) -> Option<io::Error> {
        match self {
            AimError::NoWay(error) => Some(error),
            AimError::Socket(_) => None,
        }
    }
}

/// A socket of its own, from this address and any port, with `to` as its only peer. Sends nothing.
pub(crate) fn aim(mut from: SocketAddr, to: SocketAddr) -> Result<UdpSocket, AimError> {
    from.set_port(0);
    let socket = UdpSocket::bind(from).map_err(AimError::Socket)?;
    socket.set_nonblocking(true).map_err(AimError::Socket)?;
    match socket.connect(to) {
        Ok(()) => Ok(socket),
        Err(error) if is_shortage(&error) => Err(AimError::Socket(error)),
        Err(error) => Err(AimError::NoWay(error)),
    }
}

/// A want of the system's that passes, and that says nothing of an address.
fn is_shortage(error: &io::Error) -> bool {
    #[cfg(unix)]
    let short = matches!(
        error.raw_os_error(),
        Some(libc::ENOMEM | libc::ENOBUFS | libc::EAGAIN | libc::EINTR)
    );
    #[cfg(not(unix))]
    let short = false;
    short
}

/// The address of this host that packets to `to` leave from.
pub(crate) fn source(to: SocketAddr) -> Option<IpAddr> {
    let socket = aim(any(to), to).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
