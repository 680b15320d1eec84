//! UDP sockets and the QUIC endpoints on them. All clients of a family share one endpoint.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, ServerConfig, TokioRuntime};
use socket2::{Domain, Protocol, Socket, Type};

use crate::options::TRANSPORT_MAX_MTU;

/// What a burst of datagrams needs while the one thread that reads them is busy. The system may
/// grant less (`net.core.rmem_max`).
const SOCKET_BUFFER: usize = 4 << 20;

/// An endpoint, and a view of its socket that tells when that is closed.
pub(crate) struct Bound {
    pub(crate) endpoint: Endpoint,
    pub(crate) socket: Weak<dyn AsyncUdpSocket>,
    pub(crate) fixed: Fixed,
}

/// What an endpoint is made with and cannot change.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Fixed {
    pub(crate) reset_key: Vec<u8>,
    pub(crate) max_mtu: u16,
}

/// Binds an address. `::` serves IPv4 too; another IPv6 address does not.
pub(crate) fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if let SocketAddr::V6(v6) = address {
        socket.set_only_v6(!v6.ip().is_unspecified())?;
    }
    // Best effort: the default works too, only slower.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Starts an endpoint. Called on a runtime thread: the endpoint's driver runs there.
pub(crate) fn start(
    socket: UdpSocket,
    mut config: EndpointConfig,
    fixed: Fixed,
    server: Option<ServerConfig>,
) -> io::Result<Bound> {
    if fixed.max_mtu > TRANSPORT_MAX_MTU {
        // Refused only below the minimum, which `max_mtu` is not.
        let _ = config.max_udp_payload_size(fixed.max_mtu);
    }
    let runtime = Arc::new(TokioRuntime);
    let socket = runtime.wrap_udp_socket(socket)?;
    let weak = Arc::downgrade(&socket);
    let endpoint = Endpoint::new_with_abstract_socket(config, server, socket, runtime)?;
    Ok(Bound {
        endpoint,
        socket: weak,
        fixed,
    })
}

/// The endpoint that dials `to`, unless a local address is asked for.
pub(crate) fn client(
    to: SocketAddr,
    local: Option<SocketAddr>,
    max_mtu: u16,
) -> io::Result<Endpoint> {
    static V4: Mutex<Option<Endpoint>> = Mutex::new(None);
    static V6: Mutex<Option<Endpoint>> = Mutex::new(None);
    let fixed = Fixed {
        max_mtu,
        ..Fixed::default()
    };
    // A larger MTU needs larger receive buffers, which not everybody should pay for.
    if local.is_some() || max_mtu > TRANSPORT_MAX_MTU {
        let local = local.unwrap_or_else(|| any(to));
        return start(socket(local)?, EndpointConfig::default(), fixed, None)
            .map(|bound| bound.endpoint);
    }
    let shared = if to.is_ipv4() { &V4 } else { &V6 };
    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(endpoint) = &*shared {
        return Ok(endpoint.clone());
    }
    let bound = start(socket(any(to))?, EndpointConfig::default(), fixed, None)?;
    *shared = Some(bound.endpoint.clone());
    Ok(bound.endpoint)
}

/// Any address of the same family.
pub(crate) fn any(like: SocketAddr) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// The address of this host that packets to `to` leave from.
pub(crate) fn source(to: SocketAddr) -> Option<IpAddr> {
    let socket = UdpSocket::bind(any(to)).ok()?;
    // Sends nothing.
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
