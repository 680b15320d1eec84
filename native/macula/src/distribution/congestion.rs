//! How much of a link's data is under way.
//!
//! BBR keeps a line busy that loses packets, but Quinn's takes the bursts in which acknowledgements come
//! for the rate of the line. Its window then is many times what the line takes, its queue runs over, and
//! whatever is sent next waits for both. So BBR's window is capped here by what has really been
//! acknowledged: the best rate of the last rounds, for the least round trip and a *slack*.
//!
//! The slack is time that bytes may wait, in the queue of the line and at both ends, for a processor. With
//! less of it than the ends take, the line runs dry.
//!
//! Every ten seconds, and with the first data that fills the window, BBR halts for 200 ms, to see a round trip
//! without a queue: a link that has carried little so far sends four packets in a round trip then, and a peer that
//! wants credit for its bulk waits, too. Quinn's BBR keeps the least round trip of the whole connection anyway, so
//! nothing is learned by that. For this time the window is the cap.
//!
//! The least round trip is forgotten after a while, as the path may have become a longer one; to see it again
//! the queue is let run dry for a moment.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{BbrConfig, Controller, ControllerFactory};

use crate::engine::congestion::{Change, Changed};

/// The cap is never lower: so much is on its way in any short burst.
const FLOOR: u64 = 256 * 1024;
/// Where bulk has shown that the path is a slow one.
const SLOW_FLOOR: u64 = 64 * 1024;
/// Packets that Quinn's pacer lets go at once: it waits until they may. A window of fewer, where packets are large,
/// would have it wait for several round trips.
const BURST: u64 = 10;
/// Beside the part of the product of rate and round trip: a line that takes little is searched faster.
const MORE: u64 = 32 * 1024;
/// Rounds of which the best counts.
const ROUNDS: usize = 6;
/// After so many rounds that are no better the line is full.
const LEVEL: u8 = 2;
/// A round, two round trips, is at least as long as this: acknowledgements come in bursts.
const LEAST_ROUND: Duration = Duration::from_millis(10);
/// On a path with a shorter round trip than this the schedulers and the threads are the longer way.
const LEAST_RTT: Duration = Duration::from_millis(2);
/// The slack of a path of an ordinary length: three eighths of a round trip, but no more than this, or a
/// quarter. On 20 ms a quarter starves under other work on the same processors.
const SLACK: Duration = Duration::from_millis(10);
/// After so long the least round trip is measured anew.
const FORGET: Duration = Duration::from_secs(10);

/// BBR's own: how often it looks for the least round trip, and for how long when little is under way.
const PROBE_EVERY: Duration = Duration::from_secs(10);
const PROBE_TIME: Duration = Duration::from_millis(200);

/// Makes BBR with a cap.
#[derive(Debug, Default)]
pub(crate) struct CappedBbrConfig(Arc<BbrConfig>);

impl ControllerFactory for CappedBbrConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Changed {
            inner: self.0.clone().build(now, current_mtu),
            change: Cap::new(now, current_mtu),
        })
    }
}

/// What the path has shown.
#[derive(Debug, Clone)]
struct Cap {
    since: Instant,
    acknowledged: u64,
    /// Bytes per second of each round.
    rounds: VecDeque<u64>,
    /// Rounds since the last one that was a quarter better than those before.
    level: u8,
    window: u64,
    least: Duration,
    /// When a packet took so little last.
    least_seen: Instant,
    dry: Option<Dry>,
    /// When BBR began to look for the least round trip.
    probed: Option<Instant>,
    /// BBR is still at it.
    probes: bool,
    mtu: u16,
}

/// The queue runs dry, so that the least round trip shows.
#[derive(Debug, Clone)]
struct Dry {
    until: Instant,
    least: Duration,
}

impl Cap {
    fn new(now: Instant, mtu: u16) -> Self {
        Self {
            since: now,
            acknowledged: 0,
            rounds: VecDeque::with_capacity(ROUNDS + 1),
            level: 0,
            window: u64::MAX,
            least: Duration::MAX,
            least_seen: now,
            dry: None,
            probed: None,
            probes: false,
            mtu,
        }
    }

    /// A packet took so long.
    fn took(&mut self, now: Instant, sample: Duration, idle: bool, rtt: Duration) {
        if sample <= self.least {
            self.least = sample;
            self.least_seen = now;
        }
        if let Some(dry) = &mut self.dry {
            dry.least = dry.least.min(sample);
            if now >= dry.until {
                self.least = dry.least;
                self.least_seen = now;
                self.dry = None;
                // The rounds tell the rate of the line, and this was none.
                self.since = now;
                self.acknowledged = 0;
            }
            return;
        }
        let age = now.saturating_duration_since(self.least_seen);
        // On a short path the queues of both ends are all there is to see.
        if age < FORGET || self.least < LEAST_RTT {
            return;
        }
        if idle {
            // No queue of this link's, and the next ones may take less.
            self.least = sample;
            self.least_seen = now;
        } else {
            self.dry = Some(Dry {
                until: now + 2 * rtt + self.slack(),
                least: sample,
            });
        }
    }

    /// The path's own.
    fn slack(&self) -> Duration {
        let horizon = self.horizon();
        if self.least < LEAST_RTT {
            horizon / 4
        } else {
            (horizon / 8 * 3).min(SLACK).max(horizon / 4)
        }
    }

    fn horizon(&self) -> Duration {
        self.least.max(LEAST_RTT)
    }

    /// Counts what has been acknowledged.
    fn count(&mut self, now: Instant, bytes: u64, idle: bool, rtt: Duration) {
        if self.dry.is_some() {
            return;
        }
        self.acknowledged += bytes;
        let took = now.saturating_duration_since(self.since);
        if took < (2 * rtt).max(LEAST_ROUND) {
            return;
        }
        let rate = (u128::from(self.acknowledged) * 1_000_000 / took.as_micros().max(1)) as u64;
        self.since = now;
        self.acknowledged = 0;
        let best = self.rounds.iter().copied().max().unwrap_or(0);
        // With nothing to send a round says nothing of the line.
        if idle && best >= rate {
            return;
        }
        if rate > best / 4 * 5 {
            self.level = 0;
        } else {
            self.level = self.level.saturating_add(1);
        }
        self.rounds.push_back(rate);
        if self.rounds.len() > ROUNDS {
            self.rounds.pop_front();
        }
        let best = self.rounds.iter().copied().max().unwrap_or(rate);
        let mut time = self.horizon() + self.slack();
        // A round trip that carries a quarter more each time has room for more.
        if self.level < LEVEL && self.least >= LEAST_RTT {
            time += self.horizon();
        }
        let floor = if idle || self.least < LEAST_RTT {
            FLOOR
        } else {
            SLOW_FLOOR.max(BURST * u64::from(self.mtu))
        };
        self.window = product(best, time).saturating_add(MORE).max(floor);
    }
}

fn product(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_micros() / 1_000_000).unwrap_or(u64::MAX)
}

impl Change for Cap {
    fn acknowledged(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        // The handshake has been quick where data is not yet.
        if self.least == Duration::MAX {
            self.least = rtt.min();
        }
        let sample = now.saturating_duration_since(sent);
        self.took(now, sample, app_limited, rtt.get());
        self.count(now, bytes, app_limited, rtt.get());
    }

    fn in_flight(&self, in_flight: u64) -> u64 {
        // Its 200 ms begin when little is under way.
        if self.probes { 0 } else { in_flight }
    }

    fn mtu(&mut self, mtu: u16) {
        self.mtu = mtu;
    }

    fn counted(&mut self, now: Instant, app_limited: bool) {
        match self.probed {
            // It ends with the first round after its time.
            Some(last) if self.probes => {
                let rounds = 3 * self.horizon().min(PROBE_TIME);
                self.probes = now.saturating_duration_since(last) < PROBE_TIME + rounds;
            }
            Some(last) if now.saturating_duration_since(last) <= PROBE_EVERY => (),
            _ if app_limited => (),
            _ => {
                self.probes = true;
                self.probed = Some(now);
            }
        }
    }

    fn window(&self, inner: &dyn Controller) -> u64 {
        let window = match (self.probes, self.window) {
            (false, cap) => inner.window().min(cap),
            (true, u64::MAX) => inner.initial_window(),
            (true, cap) => cap,
        };
        match (&self.dry, self.rounds.iter().max()) {
            // On so short a path the floor is the window.
            (Some(_), Some(best)) if self.least >= LEAST_RTT => {
                window.min((product(*best, self.least) / 2).max(MORE))
            }
            _ => window,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(20);
    const MTU: u16 = 1452;

    fn cap(now: Instant) -> Cap {
        let mut cap = Cap::new(now, MTU);
        cap.took(now, RTT, false, RTT);
        cap
    }

    /// Round trips of 20 ms in which so many bytes are acknowledged, in pieces.
    fn rounds(cap: &mut Cap, now: &mut Instant, count: usize, bytes: u64, idle: bool) {
        for _ in 0..count * 20 {
            *now += Duration::from_millis(1);
            cap.count(*now, bytes / 20, idle, RTT);
        }
    }

    /// A line, its queue as long as what is under way makes it.
    fn over(cap: &mut Cap, now: &mut Instant, rate: u64, rtt: Duration, time: Duration) {
        let end = *now + time;
        while *now < end {
            let window = match &cap.dry {
                Some(_) => product(rate, cap.least) / 2,
                None => cap.window.min(2_000_000),
            };
            let whole = rtt.max(Duration::from_micros(window * 1_000_000 / rate));
            let taken = product(window, Duration::from_secs(1)) * 1000 / whole.as_micros() as u64;
            *now += Duration::from_millis(1);
            cap.took(*now, whole, false, whole);
            cap.count(*now, taken, false, whole);
        }
    }

    #[test]
    fn the_window_is_what_the_line_holds_and_what_may_wait() {
        let mut now = Instant::now();
        let mut cap = cap(now);
        assert_eq!(cap.window, u64::MAX);
        rounds(&mut cap, &mut now, 8, 500_000, false);
        assert!((700_000..=740_000).contains(&cap.window), "{}", cap.window);
    }

    #[test]
    fn nobody_waits_while_bbr_looks_for_the_least_round_trip() {
        let mut now = Instant::now();
        let mut cap = cap(now);
        let tiny = Tiny;
        cap.counted(now, true);
        assert_eq!((cap.window(&tiny), cap.in_flight(9)), (4800, 9));
        cap.counted(now, false);
        assert_eq!((cap.window(&tiny), cap.in_flight(9)), (240_000, 0));
        let began = now;
        rounds(&mut cap, &mut now, 3, 500_000, false);
        assert_eq!(cap.window(&tiny), cap.window);
        cap.counted(began + PROBE_TIME, false);
        assert_eq!(cap.in_flight(9), 0);
        // And then the controller's is the window, for ten seconds.
        cap.counted(began + 2 * PROBE_TIME, false);
        assert_eq!((cap.window(&tiny), cap.in_flight(9)), (4800, 9));
        cap.counted(began + PROBE_EVERY, false);
        assert_eq!(cap.in_flight(9), 9);
        cap.counted(began + PROBE_EVERY + PROBE_TIME, false);
        assert_eq!(cap.in_flight(9), 0);
    }

    /// A controller that lets four packets be under way.
    #[derive(Clone)]
    struct Tiny;

    impl Controller for Tiny {
        fn on_congestion_event(&mut self, _: Instant, _: Instant, _: bool, _: u64) {}

        fn on_mtu_update(&mut self, _: u16) {}

        fn window(&self) -> u64 {
            4800
        }

        fn clone_box(&self) -> Box<dyn Controller> {
            Box::new(Self)
        }

        fn initial_window(&self) -> u64 {
            240_000
        }

        fn into_any(self: Box<Self>) -> Box<dyn std::any::Any> {
            self
        }
    }

    #[test]
    fn a_long_and_fast_line_is_full_in_a_few_rounds() {
        let (mut now, rate) = (Instant::now(), 125_000_000);
        let rtt = Duration::from_millis(50);
        let mut cap = Cap::new(now, MTU);
        cap.took(now, rtt, false, rtt);
        let mut count = 0;
        while cap.window < product(rate, rtt) || cap.window == u64::MAX {
            let window = match cap.window {
                u64::MAX => 240_000,
                window => window.max(240_000),
            };
            now += 2 * rtt;
            cap.count(now, (2 * window).min(product(rate, 2 * rtt)), false, rtt);
            count += 1;
            assert!(count < 10, "{}", cap.window);
        }
        // And then no more is under way than may wait.
        for _ in 0..4 {
            now += 2 * rtt;
            cap.count(now, product(rate, 2 * rtt), false, rtt);
        }
        assert!(cap.window < product(rate, rtt) * 4 / 3, "{}", cap.window);
    }

    #[test]
    fn a_slower_line_is_noticed_after_some_rounds_and_one_without_work_is_not_slower() {
        let mut now = Instant::now();
        let mut cap = cap(now);
        rounds(&mut cap, &mut now, 3, 1_000_000, false);
        let fast = cap.window;
        rounds(&mut cap, &mut now, 100, 100, true);
        assert_eq!(cap.window, fast);
        rounds(&mut cap, &mut now, 4 * ROUNDS, 500_000, false);
        assert!(cap.window < fast * 2 / 3);
        rounds(&mut cap, &mut now, 4 * ROUNDS, 1_000, false);
        assert_eq!(cap.window, SLOW_FLOOR);
    }

    #[test]
    fn the_window_of_a_slow_line_holds_what_the_pacer_lets_go_at_once() {
        let mut now = Instant::now();
        let mut cap = cap(now);
        cap.mtu(32_000);
        rounds(&mut cap, &mut now, 2 * ROUNDS, 1_000, false);
        assert_eq!(cap.window, 320_000);
    }

    #[test]
    fn a_short_path_is_not_taken_for_a_long_one_when_its_ends_are_busy() {
        let mut now = Instant::now();
        let mut cap = Cap::new(now, MTU);
        let busy = Duration::from_millis(8);
        cap.took(now, Duration::from_micros(100), false, busy);
        for _ in 0..20_000 {
            now += Duration::from_millis(1);
            cap.took(now, busy, false, busy);
            cap.count(now, 100_000, false, busy);
        }
        assert!(cap.least < LEAST_RTT && cap.dry.is_none());
        assert!(cap.window < 400_000, "{}", cap.window);
    }

    #[test]
    fn a_path_that_has_become_longer_or_shorter_is_noticed() {
        for millis in [5, 60, 200] {
            let mut now = Instant::now();
            let mut cap = cap(now);
            over(&mut cap, &mut now, 10_000_000, RTT, Duration::from_secs(5));
            let rtt = Duration::from_millis(millis);
            over(&mut cap, &mut now, 10_000_000, rtt, Duration::from_secs(60));
            assert!(
                cap.least >= rtt && cap.least < rtt + rtt / 5,
                "{:?}",
                cap.least
            );
            let holds = product(10_000_000, rtt).min(2_000_000);
            assert!(cap.window >= holds, "{millis}: {}", cap.window);
            assert!(cap.window < 2 * holds + 200_000, "{millis}: {}", cap.window);
        }
    }
}
