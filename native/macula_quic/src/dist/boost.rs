//! The native thread gets the processor at once while traffic is interactive, where the system lets us.
//!
//! A scheduler of the VM that has nothing to do spins for a third of a millisecond before it sleeps,
//! and the system lets it: where processors are few, a packet that has arrived waits for the end of
//! that, on each side, and a round trip of 50 µs takes 300 or 600. So while packets come one by one
//! the thread runs under the real-time policy of the lowest priority, which may interrupt a spinning
//! scheduler. Under load it has no such right: then the order in which threads run matters less than
//! that each gets its share, and packets that wait a moment travel together.
//!
//! The system grants the policy to root and to whoever has `CAP_SYS_NICE` or an `RLIMIT_RTPRIO`.
//! `MACULA_DIST_REALTIME=0` forbids it.

use std::cell::RefCell;
use std::time::{Duration, Instant};

/// What happened in this time decides about the next.
const WINDOW: Duration = Duration::from_millis(5);

/// The state of one thread.
struct Boost {
    since: Instant,
    unparked: Instant,
    busy: Duration,
    deliveries: u32,
    packets: u32,
    boosted: bool,
}

thread_local! {
    static BOOST: RefCell<Option<Boost>> = const { RefCell::new(None) };
}

/// Begins to look after this thread.
pub(crate) fn start() {
    if std::env::var("MACULA_DIST_REALTIME").is_ok_and(|value| value == "0") {
        return;
    }
    if set_realtime(true) {
        let now = Instant::now();
        BOOST.set(Some(Boost {
            since: now,
            unparked: now,
            busy: Duration::ZERO,
            deliveries: 0,
            packets: 0,
            boosted: true,
        }));
    }
}

/// The thread goes to sleep.
pub(crate) fn park() {
    with(Boost::pause);
}

/// The thread has been woken.
pub(crate) fn unpark() {
    with(|boost| boost.unparked = Instant::now());
}

/// So many packets were delivered at once.
pub(crate) fn delivered(packets: usize) {
    with(|boost| {
        boost.deliveries += 1;
        boost.packets += packets as u32;
        // A thread that never sleeps is asked here.
        if boost.deliveries.is_multiple_of(16) {
            boost.pause();
        }
    });
}

fn with(change: impl FnOnce(&mut Boost)) {
    BOOST.with(|cell| {
        // A call from within a call is of no consequence.
        if let Ok(mut boost) = cell.try_borrow_mut()
            && let Some(boost) = &mut *boost
        {
            change(boost);
        }
    });
}

impl Boost {
    fn pause(&mut self) {
        let now = Instant::now();
        self.busy += now.saturating_duration_since(self.unparked);
        self.unparked = now;
        self.decide(now);
    }

    fn decide(&mut self, now: Instant) {
        let window = now.saturating_duration_since(self.since);
        if window < WINDOW {
            return;
        }
        let interactive = is_interactive(window, self.busy, self.deliveries, self.packets);
        if interactive != self.boosted && set_realtime(interactive) {
            self.boosted = interactive;
        }
        self.since = now;
        self.busy = Duration::ZERO;
        self.deliveries = 0;
        self.packets = 0;
    }
}

/// Packets come one by one, and the thread sleeps at least half of the time.
fn is_interactive(window: Duration, busy: Duration, deliveries: u32, packets: u32) -> bool {
    busy < window / 2 && packets <= deliveries + deliveries / 2
}

#[cfg(target_os = "linux")]
fn set_realtime(on: bool) -> bool {
    let (policy, priority) = if on {
        (libc::SCHED_RR, 1)
    } else {
        (libc::SCHED_OTHER, 0)
    };
    // SAFETY: plain data, of which zero is a value; zero as thread means this one.
    unsafe {
        let mut param: libc::sched_param = std::mem::zeroed();
        param.sched_priority = priority;
        libc::sched_setscheduler(0, policy | libc::SCHED_RESET_ON_FORK, &raw const param) == 0
    }
}

#[cfg(not(target_os = "linux"))]
fn set_realtime(_on: bool) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_packets_at_ease_are_interactive() {
        let window = Duration::from_millis(5);
        let fifth = window / 5;
        assert!(is_interactive(window, Duration::ZERO, 0, 0));
        assert!(is_interactive(window, fifth, 100, 100));
        assert!(!is_interactive(window, fifth, 100, 300));
        assert!(!is_interactive(window, fifth * 4, 100, 100));
        assert!(!is_interactive(window, fifth * 4, 0, 0));
    }
}
