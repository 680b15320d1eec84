//! Sockets with one peer, and what the system knows of the way to it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

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
