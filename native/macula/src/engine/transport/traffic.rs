//! Which connections of an endpoint receive so much that others would wait behind them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::ConnectionHandle;

use crate::udp::asynchronous::AsyncUdpSocket;

/// A connection is busy that receives so many datagrams in one window.
const BUSY: u32 = 512;
const WINDOW: Duration = Duration::from_millis(100);
/// A busy connection that has received nothing for so long leaves its socket to another.
pub(super) const QUIET: Duration = Duration::from_secs(1);

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

/// A connection that has become busy.
pub(super) struct Busy {
    pub(super) handle: ConnectionHandle,
    pub(super) peer: SocketAddr,
    /// Where its packets arrive.
    pub(super) local: Option<IpAddr>,
}

impl Traffic {
    /// Counts a datagram. True for each that makes the connection busy, unless it has a socket for this peer: there
    /// may have been nobody else before, or no place.
    pub(super) fn count(&mut self, now: Instant, peer: SocketAddr) -> bool {
        if self.since.is_none_or(|since| now - since >= WINDOW) {
            self.since = Some(now);
            self.count = 0;
        }
        self.count = self.count.saturating_add(1);
        self.count.is_multiple_of(BUSY)
            && self.apart.as_ref().is_none_or(|apart| apart.peer != peer)
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
    fn a_connection_is_busy_with_each_so_many_datagrams_of_one_window() {
        let peer = "127.0.0.1:1".parse().expect("an address");
        let start = Instant::now();
        let mut traffic = Traffic::default();
        let busy = |traffic: &mut Traffic, now, count: u32| {
            (0..count).filter(|_| traffic.count(now, peer)).count()
        };
        assert_eq!(0, busy(&mut traffic, start, BUSY - 1));
        assert_eq!(0, busy(&mut traffic, start + WINDOW, BUSY - 1));
        assert_eq!(2, busy(&mut traffic, start + WINDOW, 2 * BUSY));
        assert!(!traffic.is_quiet(start + WINDOW));
        assert!(traffic.is_quiet(start + WINDOW + QUIET));
    }
}
