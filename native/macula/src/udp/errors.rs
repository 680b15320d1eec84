//! Waiting for news in a socket's error queue.
//!
//! What the network says of earlier datagrams wakes neither a reader nor a writer of the event loop, so that
//! an endpoint at rest would read the news with its next datagram, seconds later. An event queue of
//! its own, which knows of the socket's errors alone, is readable when there is news. The queue holds no
//! reference to the socket, whose port is free as soon as the socket is closed.

use std::net::UdpSocket;

#[cfg(target_os = "linux")]
pub(super) struct Errors(tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>);

#[cfg(target_os = "linux")]
impl Errors {
    /// None where the system has none to give: then the news is read with the next datagram.
    pub(super) fn of(socket: &UdpSocket) -> Option<Self> {
        use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
        // SAFETY: takes no pointers.
        let queue = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if queue < 0 {
            return None;
        }
        // SAFETY: made above, and nobody else's.
        let queue = unsafe { OwnedFd::from_raw_fd(queue) };
        let mut event = libc::epoll_event {
            events: (libc::EPOLLERR | libc::EPOLLET).cast_unsigned(),
            u64: 0,
        };
        // SAFETY: a live event and two live descriptors.
        let added = unsafe {
            libc::epoll_ctl(
                queue.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                socket.as_raw_fd(),
                &raw mut event,
            )
        };
        let readable = tokio::io::Interest::READABLE;
        let queue = (added == 0).then_some(queue)?;
        // SAFETY: the descriptor is owned by the `OwnedFd`, which the `AsyncFd` owns.
        let queue =
            unsafe { tokio::io::unix::AsyncFd::register_with_interest(queue, readable) }.ok()?;
        Some(Errors(queue))
    }

    /// Completes when there is news since the last time.
    pub(super) async fn next(&self) {
        use std::os::fd::AsRawFd;
        let Ok(mut guard) = self.0.readable().await else {
            // The event loop ends.
            return std::future::pending().await;
        };
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: room for one event, and no waiting.
        unsafe { libc::epoll_wait(self.0.as_raw_fd(), &raw mut event, 1, 0) };
        guard.clear_ready();
    }
}

/// Elsewhere the news is read with the next datagram.
#[cfg(not(target_os = "linux"))]
pub(super) struct Errors(std::convert::Infallible);

#[cfg(not(target_os = "linux"))]
impl Errors {
    pub(super) fn of(_: &UdpSocket) -> Option<Self> {
        None
    }

    pub(super) async fn next(&self) {
        match self.0 {}
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn news_of_a_refused_datagram_wakes_who_waits_and_data_does_not() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let socket = UdpSocket::bind("127.0.0.1:0").expect("bound");
            crate::udp::refused::ask(&socket);
            let errors = Errors::of(&socket).expect("a queue");
            let here = socket.local_addr().expect("bound");
            let peer = UdpSocket::bind("127.0.0.1:0").expect("bound");
            let there = peer.local_addr().expect("bound");
            let soon = Duration::from_millis(200);
            peer.send_to(b"data", here).expect("sent");
            assert!(tokio::time::timeout(soon, errors.next()).await.is_err());
            drop(peer);
            for _ in 0..3 {
                let mut told = 0;
                // The fate of the one before may be the error of this one.
                let _ = socket.send_to(b"x", there);
                tokio::time::timeout(Duration::from_secs(5), errors.next())
                    .await
                    .expect("woken");
                crate::udp::refused::take(&socket, |addr| {
                    assert_eq!(there, addr);
                    told += 1;
                });
                assert_eq!(1, told);
                // Takes the error from the socket itself.
                assert!(socket.take_error().is_ok());
            }
        });
    }
}
