//! Where it is asked for, the native thread gets the processor at once while traffic is interactive.
//!
//! A scheduler of the VM that has nothing to do spins for a third of a millisecond before it sleeps,
//! and the system lets it: where processors are few, a packet that has arrived may wait for the end of
//! that, on each side. With `MACULA_DIST_REALTIME=1` the thread runs under the real-time policy of the
//! lowest priority while packets come one by one, and may interrupt a spinning scheduler. Under load of
//! any kind (packets in batches, handshakes, bulk in either direction) it has no such right: then the
//! order in which threads run matters less than that each gets its share.
//!
//! The system grants the policy to root and to whoever has `CAP_SYS_NICE` or an `RLIMIT_RTPRIO`.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What happened in this time decides about the next.
const WINDOW: Duration = Duration::from_millis(5);
/// Datagrams and deliveries after which a thread that does not sleep looks at the clock.
const LOOK: u32 = 16;
/// Bytes in a window, both ways, above which it is no conversation: 13 MB/s.
const CONVERSATION: u64 = 64 * 1024;

/// Somebody asked for the policy and got it.
static WANTED: AtomicBool = AtomicBool::new(false);
/// Bytes sent and received since the last look, by the thread or by a process that visits its links.
static MOVED: AtomicU64 = AtomicU64::new(0);

/// The state of one thread.
struct Boost {
    since: Instant,
    unparked: Instant,
    busy: Duration,
    events: u32,
    seen: Seen,
    boosted: bool,
    apply: fn(bool) -> bool,
}

/// What a window has seen.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    deliveries: u32,
    packets: u32,
    bytes: u64,
}

thread_local! {
    static BOOST: RefCell<Option<Boost>> = const { RefCell::new(None) };
}

/// Begins to look after this thread, if that is wanted.
pub(crate) fn start() {
    if !is_asked_for(std::env::var("MACULA_DIST_REALTIME").ok().as_deref()) {
        return;
    }
    if set_realtime(true) {
        WANTED.store(true, Ordering::Relaxed);
        BOOST.set(Some(Boost::new(Instant::now(), set_realtime)));
    }
}

fn is_asked_for(value: Option<&str>) -> bool {
    value == Some("1")
}

/// The thread goes to sleep.
pub(crate) fn park() {
    with(|boost| boost.look(Instant::now()));
}

/// The thread has been woken.
pub(crate) fn unpark() {
    with(|boost| {
        let now = Instant::now();
        boost.unparked = now;
        // It may have slept long: that decides too.
        boost.look(now);
    });
}

/// So many packets were delivered at once.
pub(crate) fn delivered(packets: usize) {
    with(|boost| {
        boost.seen.deliveries += 1;
        boost.seen.packets = boost.seen.packets.saturating_add(packets as u32);
        boost.event(Instant::now);
    });
}

/// A datagram, or several, went one way or the other. On any thread.
pub(crate) fn moved(bytes: usize) {
    if WANTED.load(Ordering::Relaxed) {
        MOVED.fetch_add(bytes as u64, Ordering::Relaxed);
        with(|boost| boost.event(Instant::now));
    }
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
    fn new(now: Instant, apply: fn(bool) -> bool) -> Self {
        Boost {
            since: now,
            unparked: now,
            busy: Duration::ZERO,
            events: 0,
            seen: Seen::default(),
            boosted: true,
            apply,
        }
    }

    /// A thread that never sleeps comes to its look here.
    fn event(&mut self, now: impl FnOnce() -> Instant) {
        self.events += 1;
        if self.events >= LOOK {
            self.look(now());
        }
    }

    /// What the time since the last look was spent with, and, after a window of it, what follows.
    fn look(&mut self, now: Instant) {
        self.events = 0;
        self.busy += now.saturating_duration_since(self.unparked);
        self.unparked = now;
        self.seen.bytes += MOVED.swap(0, Ordering::Relaxed);
        let window = now.saturating_duration_since(self.since);
        if window < WINDOW {
            return;
        }
        let interactive = self.seen.is_interactive(window, self.busy);
        if interactive != self.boosted && (self.apply)(interactive) {
            self.boosted = interactive;
        }
        self.since = now;
        self.busy = Duration::ZERO;
        self.seen = Seen::default();
    }
}

impl Seen {
    /// Packets come one by one, few bytes move, and the thread sleeps at least half of the time.
    fn is_interactive(&self, window: Duration, busy: Duration) -> bool {
        let windows = window.as_nanos() / WINDOW.as_nanos();
        busy < window / 2
            && self.packets <= self.deliveries.saturating_add(self.deliveries / 2)
            && u128::from(self.bytes) <= u128::from(CONVERSATION) * windows.max(1)
    }
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

    const MS: Duration = Duration::from_millis(1);

    fn seen(deliveries: u32, packets: u32, bytes: u64) -> Seen {
        Seen {
            deliveries,
            packets,
            bytes,
        }
    }

    #[test]
    fn the_policy_is_off_unless_asked_for() {
        assert!(is_asked_for(Some("1")));
        for other in [None, Some(""), Some("0"), Some("yes"), Some("11")] {
            assert!(!is_asked_for(other));
        }
    }

    #[test]
    fn single_packets_at_ease_are_interactive() {
        let window = MS * 5;
        assert!(seen(0, 0, 0).is_interactive(window, Duration::ZERO));
        assert!(seen(100, 100, 30_000).is_interactive(window, MS));
        assert!(!seen(100, 300, 30_000).is_interactive(window, MS));
        assert!(!seen(100, 100, 30_000).is_interactive(window, MS * 4));
        assert!(!seen(0, 0, 0).is_interactive(window, MS * 4));
    }

    #[test]
    fn pure_sending_is_not_interactive() {
        assert!(!seen(0, 0, 1_000_000).is_interactive(MS * 5, MS));
        // So much in a second is what a conversation may be.
        assert!(seen(0, 0, 1_000_000).is_interactive(MS * 1000, MS));
    }

    #[test]
    fn a_thread_that_never_sleeps_and_delivers_nothing_gives_the_policy_back() {
        let begin = Instant::now();
        let mut boost = Boost::new(begin, |_| true);
        // Handshakes: a datagram every 50 µs, and never a packet for a process.
        for n in 1..=200 {
            boost.event(|| begin + Duration::from_micros(50) * n);
        }
        assert!(!boost.boosted);
        // And it comes back to a thread that sleeps again.
        for n in 1..=10 {
            boost.unparked = begin + MS * (20 + n);
            boost.look(begin + MS * (20 + n));
        }
        assert!(boost.boosted);
    }
}
