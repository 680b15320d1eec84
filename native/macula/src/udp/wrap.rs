//! A bound socket becomes one that endpoints take.

use std::io;
use std::net::UdpSocket;

use super::socket::{Pace, Port, WrapOptions, Wrapped};
#[cfg(unix)]
use super::watched::Watched;

/// Wraps a bound socket for an endpoint. Must be called inside the runtime.
#[cfg(unix)]
pub(crate) fn wrap<P: Pace>(socket: UdpSocket, options: WrapOptions) -> io::Result<Wrapped> {
    let socket = Watched::<P>::start(socket, options)?;
    let weak = std::sync::Arc::downgrade(&socket);
    Ok(Wrapped {
        socket,
        port: Port(weak),
    })
}

#[cfg(not(unix))]
pub(crate) fn wrap<P: Pace>(_socket: UdpSocket, _options: WrapOptions) -> io::Result<Wrapped> {
    Err(io::ErrorKind::Unsupported.into())
}
