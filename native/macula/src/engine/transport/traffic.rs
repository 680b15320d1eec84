//! Which connections of an endpoint receive so much that others would wait behind them.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use quinn_proto::ConnectionHandle;

use crate::udp::asynchronous::AsyncUdpSocket;

/// A connection is busy that receives so many datagrams in one window.
const BUSY: u32 = 512;
const WINDOW: Duration = Duration::from_millis(100);
/// A busy connection that has received nothing for so long leaves its socket to another.
pub(super) const QUIET: Duration = Duration::from_secs(1);
/// Sockets of busy connections, at most, of one endpoint.
pub(super) const MAX_APART: usize = 16;

/// What one connection receives.
#[derive(Default)]
pub(super) struct Traffic {
    /// When the window has begun.
    since: Option<Instant>,
    count: u32,
    apart: Option<Box<Apart>>,
}

/// The socket of a busy connection. The system gives to it what comes from the peer, as long as this lives.
pub(super) struct Apart {
    pub(super) peer: SocketAddr,
    pub(super) _socket: Arc<dyn AsyncUdpSocket>,
}

/// Where packets come from, and to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Path {
    pub(super) peer: SocketAddr,
    pub(super) local: Option<IpAddr>,
}

/// A connection that has become busy.
pub(super) struct Busy {
    pub(super) handle: ConnectionHandle,
    pub(super) path: Path,
}

/// A socket of busy connections, as long as one of them has it. There is one for each path: a second one would
/// get what comes from then on, and what the first one still has would come late, or not at all.
pub(super) struct Beside {
    path: Path,
    socket: Weak<dyn AsyncUdpSocket>,
}

impl Beside {
    pub(super) fn new(path: Path, socket: &Arc<dyn AsyncUdpSocket>) -> Self {
        Beside {
            path,
            socket: Arc::downgrade(socket),
        }
    }

    pub(super) fn is_there(&self) -> bool {
        self.socket.strong_count() > 0
    }

    /// The socket, if it is that of the path.
    pub(super) fn of(&self, path: &Path) -> Option<Arc<dyn AsyncUdpSocket>> {
        (self.path == *path)
            .then(|| self.socket.upgrade())
            .flatten()
    }
}

impl Traffic {
    /// Counts a datagram. True for the one that makes the connection busy, unless it has a socket for this peer.
    pub(super) fn count(&mut self, now: Instant, peer: SocketAddr) -> bool {
        if self.since.is_none_or(|since| now - since >= WINDOW) {
            self.since = Some(now);
            self.count = 0;
        }
        self.count = self.count.saturating_add(1);
        self.count == BUSY && self.apart.as_ref().is_none_or(|apart| apart.peer != peer)
    }

    /// Gives the connection a socket, or none. Returns the one that the connection had.
    pub(super) fn part(&mut self, apart: Option<Apart>) -> Option<Box<Apart>> {
        std::mem::replace(&mut self.apart, apart.map(Box::new))
    }

    pub(super) fn is_quiet(&self, now: Instant) -> bool {
        self.since.is_none_or(|since| now - since >= QUIET)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_busy_once_in_a_window_that_is_full() {
        let peer = "127.0.0.1:1".parse().expect("an address");
        let start = Instant::now();
        let mut traffic = Traffic::default();
        let busy = |traffic: &mut Traffic, now, count: u32| {
            (0..count).filter(|_| traffic.count(now, peer)).count()
        };
        assert_eq!(0, busy(&mut traffic, start, BUSY - 1));
        assert_eq!(0, busy(&mut traffic, start + WINDOW, BUSY - 1));
        assert_eq!(1, busy(&mut traffic, start + WINDOW, 2 * BUSY));
        assert!(!traffic.is_quiet(start + WINDOW));
        assert!(traffic.is_quiet(start + WINDOW + QUIET));
    }
}
