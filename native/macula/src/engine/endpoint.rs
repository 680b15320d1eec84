//! The QUIC endpoints on UDP sockets. All clients of a family share one endpoint.

use std::any::Any;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;

use crate::engine::routed::{Movable, Routed};
use crate::engine::transport::{
    ClientConfig, ConnectError, Connecting, Endpoint, EndpointConfig, Hold, ServerConfig, Stepper,
    tokio_timer,
};
use crate::udp::aimed::any;
use crate::udp::socket::{self, Port, Replace, Unpaced, WrapOptions, Wrapped};
use crate::udp::wrap::wrap;
use crate::vm::tasks::Fate;

/// The largest UDP payload that QUIC looks for by itself, and has receive buffers for.
const TRANSPORT_MAX_MTU: u16 = 1472;
/// An endpoint whose socket is gone ends if no other can be had in its place for so long.
const REPLACED_WITHIN: Duration = Duration::from_secs(10);

/// An endpoint and its port.
pub(crate) struct Bound {
    pub(crate) endpoint: Endpoint,
    pub(crate) port: Port,
    pub(crate) fixed: Fixed,
    /// Of an endpoint that only dials.
    routed: Option<Arc<Routed>>,
}

impl Bound {
    /// Nothing can be done with the endpoint any more.
    pub(crate) fn is_lost(&self) -> bool {
        self.port.lost().is_some() || self.endpoint.fate().has_failed()
    }
}

/// What an endpoint is made with and cannot change.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Fixed {
    pub(crate) reset_key: Vec<u8>,
    pub(crate) max_mtu: u16,
}

/// QUIC version 1 (RFC 9000). `quinn-proto` would speak the drafts before it, too, whose keys are not those of
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
    let routed = Routed::new(socket, port.clone());
    let dials = server.is_none();
    let (endpoint, driver) = Endpoint::new(config, server, routed.clone(), tokio_timer);
    tokio::spawn(driver);
    Ok(Bound {
        endpoint,
        port,
        fixed,
        routed: dials.then_some(routed),
    })
}

/// The task that drives one connection.
pub(crate) struct Driver {
    task: AbortHandle,
    hold: Hold,
}

impl Driver {
    /// Drives a connection on the worker of this thread.
    pub(crate) fn spawn(stepper: Stepper) -> Self {
        let hold = stepper.hold();
        Driver {
            task: tokio::spawn(stepper).abort_handle(),
            hold,
        }
    }

    pub(crate) fn fate(&self) -> Arc<Fate> {
        self.hold.fate().clone()
    }

    /// Keeps something as long as QUIC knows the connection.
    pub(crate) fn keep(&self, guest: impl Any + Send) {
        self.hold.keep(guest);
    }

    /// Ends a connection that nothing is left to do for.
    pub(crate) fn abandon(&self) {
        self.task.abort();
    }
}

/// A connection that begins.
pub(crate) struct Dial {
    pub(crate) connecting: Connecting,
    pub(crate) driver: Driver,
    pub(crate) endpoint: Endpoint,
    /// The endpoint's port if it is for this dial alone.
    pub(crate) own: Option<Port>,
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
        let (connecting, stepper) = endpoint.connect_with(config.clone(), to, server_name)?;
        let movable = routed.as_ref().map(|routed| Movable {
            routed: routed.clone(),
            moving: Arc::default(),
            wrap: wrap_own,
            max_mtu,
        });
        Ok::<_, ConnectError>(Dial {
            connecting,
            driver: Driver::spawn(stepper),
            endpoint: endpoint.clone(),
            own,
            movable,
        })
    };
    if local.is_some() || max_mtu > TRANSPORT_MAX_MTU {
        let bound = dialling(local.unwrap_or_else(|| any(to)), fixed)?;
        let own = Some(bound.port);
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
