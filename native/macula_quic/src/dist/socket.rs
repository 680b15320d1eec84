//! The UDP socket below the distribution's endpoint: as any other, but processes may send on it too,
//! and threads of the VM are not to be kept.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use quinn::AsyncUdpSocket;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::endpoint::MAX_DATAGRAM;
use super::{boost, driver};
use crate::socket::Pace;

pub(crate) use crate::socket::{Refusals, mapped, plain};
use crate::socket::{bind_any, grow_buffers};

/// What the user asks of the socket; what is empty is left to us.
#[derive(Debug, Default)]
pub(crate) struct SocketOptions {
    pub(crate) receive_buffer: Option<usize>,
    pub(crate) send_buffer: Option<usize>,
    /// The unspecified IPv6 address shall not serve IPv4.
    pub(crate) only_v6: bool,
}

#[derive(Debug)]
struct Visits;

impl Pace for Visits {
    fn is_slow() -> bool {
        driver::is_visit()
    }

    fn may_send() -> bool {
        driver::may_send()
    }

    fn moved(bytes: usize) {
        boost::moved(bytes);
    }
}

/// Binds a socket of these options. The unspecified IPv6 address serves IPv4 too unless they say no.
pub(crate) fn bind(addr: SocketAddr, options: &SocketOptions) -> io::Result<UdpSocket> {
    let any = addr.ip() == IpAddr::from([0u16; 8]);
    let socket = if any && options.only_v6 {
        bind_only_v6(addr)?
    } else {
        bind_any(addr)?
    };
    let buffers = SockRef::from(&socket);
    if let Some(size) = options.receive_buffer {
        buffers.set_recv_buffer_size(size)?;
    }
    if let Some(size) = options.send_buffer {
        buffers.set_send_buffer_size(size)?;
    }
    Ok(socket)
}

fn bind_only_v6(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_only_v6(true)?;
    socket.set_nonblocking(true)?;
    grow_buffers(&socket);
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Must be called inside the runtime.
pub(crate) fn wrap(
    socket: UdpSocket,
    refusals: Option<Refusals>,
) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    crate::socket::wrap::<Visits>(socket, MAX_DATAGRAM, refusals).map(|wrapped| wrapped.socket)
}
