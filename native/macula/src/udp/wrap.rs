//! A bound socket becomes one that Quinn's endpoints take.

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
pub(crate) fn wrap<P: Pace>(socket: UdpSocket, _options: WrapOptions) -> io::Result<Wrapped> {
    use super::socket::Release;

    struct Nothing;

    impl Release for Nothing {
        fn release(&self) {}

        fn inspect(&self) {}

        fn lost(&self) -> Option<io::Error> {
            None
        }
    }

    Ok(Wrapped {
        socket: quinn::Runtime::wrap_udp_socket(&quinn::TokioRuntime, socket)?,
        port: Port(std::sync::Weak::<Nothing>::new()),
    })
}
