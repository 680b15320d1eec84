//! What becomes of datagrams that the system denies.
//!
//! A firewall, a lost route or a want of memory denies datagrams for a while. QUIC takes what was
//! handed over for sent: it would make and lose a window's worth of packets, and wait longer and longer
//! before it tries again. So a denied datagram is kept where it is and tried again at a pace that
//! costs nothing: it leaves soon after the denials end, and its acknowledgement brings back the rest.
//!
//! Denials are of a destination, and many connections share a socket. The engine asks the poller of a
//! connection for leave right before each send call, on the same thread: so the socket learns whose
//! datagram it has.

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// From the first to the longest wait before another try.
const PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(100));
/// How long one datagram is kept. QUIC makes two each time its own timer expires, and doubles the
/// timer: half of the time that the denials have lasted bridges the gap. No longer, as the next
/// datagram may have a way: that of a peer with a new address has.
const KEPT: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(4));

thread_local! {
    /// Whose send call is the next one on this thread.
    static TURN: Cell<Option<Arc<Denial>>> = const { Cell::new(None) };
}

/// The denials a connection has met.
#[derive(Debug, Default)]
pub(super) struct Denial(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Where the connection's last datagram went. One that goes elsewhere looks for a new path; when
    /// it is denied, it must not hold up the others.
    usual: Option<SocketAddr>,
    /// The first denial since a datagram has left.
    since: Option<Instant>,
    /// The first denial of the datagram that is kept.
    kept: Option<Instant>,
    pause: Duration,
    due: Option<Instant>,
}

/// Takes the turn that was announced on this thread: none if the datagram belongs to no connection.
pub(super) fn turn() -> Option<Arc<Denial>> {
    TURN.take()
}

impl Denial {
    /// The next send call on this thread is of this connection.
    pub(super) fn announce(self: &Arc<Self>) {
        TURN.set(Some(self.clone()));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A datagram has left.
    pub(super) fn sent(&self, to: SocketAddr) {
        let mut state = self.lock();
        if state.since.is_some() || state.usual != Some(to) {
            *state = State {
                usual: Some(to),
                ..State::default()
            };
        }
    }

    /// A datagram was denied. Is it kept? Else it is lost.
    pub(super) fn keep(&self, to: SocketAddr, now: Instant) -> bool {
        let mut state = self.lock();
        if state.usual.is_some_and(|usual| usual != to) {
            return false;
        }
        let since = *state.since.get_or_insert(now);
        let kept = *state.kept.get_or_insert(now);
        if now - kept >= ((now - since) / 2).clamp(KEPT.0, KEPT.1) {
            state.kept = None;
            return false;
        }
        state.pause = (state.pause * 2).clamp(PAUSES.0, PAUSES.1);
        state.due = Some(now + state.pause);
        true
    }

    /// When to try again, asked once after each denial.
    pub(super) fn due(&self) -> Option<Instant> {
        self.lock().due.take()
    }

    /// Gives back an answer that was not used.
    pub(super) fn put_back(&self, due: Instant) {
        self.lock().due = Some(due);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    #[test]
    fn a_denied_datagram_is_tried_again_ever_more_slowly_until_one_leaves() {
        let denial = Denial::default();
        let start = Instant::now();
        assert_eq!(denial.due(), None);
        let mut now = start;
        let mut tries = 0;
        while now - start < Duration::from_secs(10) {
            if denial.keep(address(1), now) {
                tries += 1;
                let due = denial.due().expect("kept for later");
                assert!(due > now && due - now <= PAUSES.1);
                now = due;
            }
        }
        assert!((90..130).contains(&tries), "{tries}");
        denial.sent(address(1));
        assert!(denial.keep(address(1), now));
        assert_eq!(denial.due(), Some(now + PAUSES.0));
    }

    #[test]
    fn one_datagram_is_kept_for_half_of_the_time_that_denials_last() {
        let denial = Denial::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert!(denial.keep(address(1), at(0)));
        assert!(denial.keep(address(1), at(499)));
        assert!(!denial.keep(address(1), at(500)));
        assert!(denial.keep(address(1), at(3_000)));
        assert!(denial.keep(address(1), at(5_900)));
        assert!(!denial.keep(address(1), at(6_100)));
        // And not for longer than a peer with a new address should have to wait.
        assert!(denial.keep(address(1), at(60_000)));
        assert!(!denial.keep(address(1), at(64_000)));
    }

    #[test]
    fn a_datagram_that_goes_elsewhere_is_not_kept() {
        let denial = Denial::default();
        let now = Instant::now();
        denial.sent(address(1));
        assert!(!denial.keep(address(2), now));
        assert_eq!(denial.due(), None);
        assert!(denial.keep(address(1), now));
    }

    #[test]
    fn a_turn_is_taken_once() {
        let denial = Arc::new(Denial::default());
        assert!(turn().is_none());
        denial.announce();
        assert!(turn().is_some_and(|turn| Arc::ptr_eq(&turn, &denial)));
        assert!(turn().is_none());
    }
}
