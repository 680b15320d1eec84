//! The UDP socket below the distribution's endpoint: as any other, but processes may send on it too,
//! and threads of the VM are not to be kept.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::sync::mpsc;

use super::visit;
use crate::udp::ask::KNOCK;
use crate::udp::socket::{Pace, Replace, WrapOptions, Wrapped};
use crate::vm::boost;

pub(crate) use crate::udp::socket::{News, mapped, plain};
use crate::udp::socket::{bind_any, grow_buffers};

/// What the user asks of the socket; what is empty is left to us.
#[derive(Debug, Default, Clone)]
pub(crate) struct SocketOptions {
    pub(crate) receive_buffer: Option<usize>,
    pub(crate) send_buffer: Option<usize>,
    /// The unspecified IPv6 address shall not serve IPv4.
    pub(crate) only_v6: bool,
}

/// What a peer may send in one datagram.
pub(crate) const MAX_DATAGRAM: u16 = 65_507;

#[derive(Debug)]
struct Visits;

impl Pace for Visits {
    fn is_slow() -> bool {
        visit::is_visit()
    }

    fn may_send() -> bool {
        visit::may_send()
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
    drop_knocks(&socket);
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

/// Lets the system throw knocks away before they wake the thread. Best effort: the endpoint ignores
/// what is no QUIC packet.
#[cfg(target_os = "linux")]
fn drop_knocks(socket: &UdpSocket) {
    use std::os::fd::AsRawFd;

    const UDP_HEADER: u32 = 8;
    const WHOLE: u32 = u32::MAX;
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    // The length the system shows begins with the header.
    let knock = UDP_HEADER + KNOCK.len() as u32;
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_LEN, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, knock, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        statement(libc::BPF_RET | libc::BPF_K, WHOLE, 0, 0),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as libc::c_ushort,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program lives during the call; the system copies and checks it.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        );
    }
}

#[cfg(not(target_os = "linux"))]
fn drop_knocks(_: &UdpSocket) {}

/// The MTU of the way that packets of a connected socket take, as far as the system knows it.
#[cfg(target_os = "linux")]
pub(crate) fn interface_mtu(socket: &UdpSocket) -> Option<u16> {
    use std::os::fd::AsRawFd;

    let (level, option) = if socket.local_addr().ok()?.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU)
    };
    let mut mtu: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: an int option of a descriptor that lives, with its length.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw mut mtu).cast(),
            &raw mut len,
        )
    };
    (result == 0 && mtu > 0).then(|| u16::try_from(mtu).unwrap_or(u16::MAX))
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn interface_mtu(_: &UdpSocket) -> Option<u16> {
    None
}

/// Must be called inside the runtime. A node's port is known to its peers: an endpoint that listens
/// waits as long as it takes for the port of a socket that is gone.
pub(crate) fn wrap(
    socket: UdpSocket,
    options: SocketOptions,
    listens: bool,
    news: Option<mpsc::Sender<News>>,
) -> io::Result<Wrapped> {
    let options = WrapOptions {
        max_datagram: MAX_DATAGRAM,
        news,
        replace: Replace {
            bind: Box::new(move |addr| bind(addr, &options)),
            any_port: !listens,
            within: None,
        },
        inspects: false,
    };
    crate::udp::wrap::wrap::<Visits>(socket, options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_knock_wakes_nobody() {
        let socket = bind(
            "127.0.0.1:0".parse().expect("address"),
            &SocketOptions::default(),
        )
        .expect("bound");
        let to = socket.local_addr().expect("address");
        let peer = UdpSocket::bind("127.0.0.1:0").expect("bound");
        peer.send_to(&KNOCK, to).expect("sent");
        peer.send_to(b"ab", to).expect("sent");
        let mut buffer = [0; 8];
        let first = socket
            .recv(&mut buffer)
            .expect("loopback delivers within the call");
        if cfg!(target_os = "linux") {
            assert_eq!(&buffer[..first], b"ab");
        }
    }
}
