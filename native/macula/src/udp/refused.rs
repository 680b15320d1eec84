//! What the network says of datagrams that it could not deliver.
//!
//! A host answers a datagram to a port that nobody has with an ICMP message (RFC 1122, section
//! 4.1.3.1). Linux keeps these in an error queue of the socket, if asked to, with the address the
//! datagram went to (`IP_RECVERR`, ip(7)); elsewhere, and where none comes, nothing is known. Anybody
//! on the path, and others who guess ports, can make such messages up: they are hints.

use std::net::{SocketAddr, UdpSocket};

/// Asks the system to keep what it is told.
#[cfg(target_os = "linux")]
pub(crate) fn ask(socket: &UdpSocket) {
    // A dual stack socket has both; one of another family refuses the other's option.
    for (level, option) in [
        (libc::IPPROTO_IP, libc::IP_RECVERR),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    ] {
        super::option::set(socket, level, option, 1);
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn ask(_: &UdpSocket) {}

/// Empties the error queue. `refused` gets the addresses where nobody has the port.
#[cfg(target_os = "linux")]
pub(crate) fn take(socket: &UdpSocket, mut refused: impl FnMut(SocketAddr)) {
    while let Some(news) = linux::next(socket) {
        if let Some(addr) = news {
            refused(addr);
        }
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn take(_: &UdpSocket, _: impl FnMut(SocketAddr)) {}

#[cfg(target_os = "linux")]
mod linux {
    use std::io;
    use std::os::fd::AsRawFd;

    use socket2::SockAddr;

    use super::*;

    /// Room for all control messages an entry comes with: the error with the address of the router,
    /// the packet's own address, class and time.
    #[repr(C, align(8))]
    struct Control([u8; 512]);

    /// One entry: `Some(None)` if it is of another kind, `None` when there is no more.
    pub(super) fn next(socket: &UdpSocket) -> Option<Option<SocketAddr>> {
        let mut byte = [0u8; 1];
        let mut control = Control([0; 512]);
        let mut vec = libc::iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: byte.len(),
        };
        // SAFETY: every pointer in the header points to a local buffer of the length given, alive
        // to the end; the length of the address is what the system says it has written.
        let (refusal, addr) = unsafe {
            SockAddr::try_init(|storage, len| {
                let mut header: libc::msghdr = std::mem::zeroed();
                header.msg_name = storage.cast();
                header.msg_namelen = *len;
                header.msg_iov = &raw mut vec;
                header.msg_iovlen = 1;
                header.msg_control = (&raw mut control).cast();
                header.msg_controllen = size_of::<Control>() as _;
                let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
                if libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) < 0 {
                    return Err(io::Error::last_os_error());
                }
                *len = header.msg_namelen;
                Ok(is_refusal(&header))
            })
        }
        .ok()?;
        Some(refusal.then(|| addr.as_socket()).flatten())
    }

    /// Whether an ICMP message of either family says that the port is nobody's.
    ///
    /// # Safety
    /// The header must be as `recvmsg` left it.
    unsafe fn is_refusal(header: &libc::msghdr) -> bool {
        // SAFETY: the macros walk within `msg_control`; the payload of this kind begins with the
        // structure that is read.
        unsafe {
            let mut message = libc::CMSG_FIRSTHDR(header);
            while let Some(head) = message.as_ref() {
                if matches!(
                    (head.cmsg_level, head.cmsg_type),
                    (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
                ) {
                    // An entry that was cut says nothing.
                    let whole = libc::CMSG_LEN(size_of::<libc::sock_extended_err>() as _);
                    if (head.cmsg_len as u64) < u64::from(whole) {
                        return false;
                    }
                    let news: libc::sock_extended_err =
                        std::ptr::read_unaligned(libc::CMSG_DATA(message).cast());
                    return news.ee_errno == libc::ECONNREFUSED as u32
                        && matches!(
                            news.ee_origin,
                            libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6
                        );
                }
                message = libc::CMSG_NXTHDR(header, message);
            }
            false
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::udp::socket::{bind, mapped, plain};

    #[test]
    fn a_refused_datagram_names_its_address_in_both_families() {
        for (local, to) in [
            ("127.0.0.1:0", "127.0.0.1"),
            ("[::]:0", "127.0.0.1"),
            ("[::]:0", "::1"),
        ] {
            let socket = bind(local.parse().expect("address")).expect("bound");
            ask(&socket);
            // A port that was free a moment ago.
            let free = UdpSocket::bind(format!("[{to}]:0").replace("[127.0.0.1]", "127.0.0.1"));
            let target = free.expect("bound").local_addr().expect("address");
            let own = socket.local_addr().expect("address");
            let mut found = Vec::new();
            // Loopback answers within the call; the call after it brings the error itself.
            while found.is_empty() {
                let _ = socket.send_to(b"x", mapped(target, own));
                take(&socket, |addr| found.push(plain(addr)));
            }
            assert_eq!(found, vec![target]);
        }
    }

    #[test]
    fn what_was_delivered_is_no_news() {
        let socket = bind("127.0.0.1:0".parse().expect("address")).expect("bound");
        ask(&socket);
        let peer = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let target = peer.local_addr().expect("address");
        socket.send_to(b"x", target).expect("sent");
        peer.recv(&mut [0; 1]).expect("received");
        take(&socket, |addr| panic!("{addr}"));
    }
}
