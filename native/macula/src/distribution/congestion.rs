//! How much of a link's data is under way.
//!
//! BBR keeps a line busy that loses packets, but Quinn's takes the bursts in which acknowledgements come
//! for the rate of the line. Its window then is many times what the line takes, its queue runs over, and
//! whatever is sent next waits for both. So BBR's window is capped here by what has really been
//! acknowledged: the best rate of the last rounds over the least round trip, and a quarter more, which
//! is enough to find out that the line takes more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{BbrConfig, Controller, ControllerFactory};

use crate::engine::congestion::{Change, Changed};

/// The cap is never lower: so much is on its way in any short burst.
const FLOOR: u64 = 256 * 1024;
/// Beside the part of the product of rate and round trip: a line that takes little is searched faster.
const MORE: u64 = 32 * 1024;
/// Rounds of which the best counts.
const ROUNDS: usize = 6;
/// A round, two round trips, is at least as long as this: acknowledgements come in bursts.
const LEAST_ROUND: Duration = Duration::from_millis(10);
/// On a path with a shorter round trip than this the schedulers and the threads are the longer way.
const LEAST_RTT: Duration = Duration::from_millis(2);

/// Makes BBR with a cap.
#[derive(Debug, Default)]
pub(crate) struct CappedBbrConfig(Arc<BbrConfig>);

impl ControllerFactory for CappedBbrConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Changed {
            inner: self.0.clone().build(now, current_mtu),
            change: Cap::new(now),
        })
    }
}

/// The best rate of the last rounds.
#[derive(Debug, Clone)]
struct Cap {
    since: Instant,
    acknowledged: u64,
    /// Bytes per second of each round.
    rounds: VecDeque<u64>,
    window: u64,
}

impl Cap {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            acknowledged: 0,
            rounds: VecDeque::with_capacity(ROUNDS + 1),
            window: u64::MAX,
        }
    }

    /// Counts what has been acknowledged.
    fn count(&mut self, now: Instant, bytes: u64, idle: bool, rtt: Duration, least: Duration) {
        self.acknowledged += bytes;
        let took = now.saturating_duration_since(self.since);
        if took < (2 * rtt).max(LEAST_ROUND) {
            return;
        }
        let rate = (u128::from(self.acknowledged) * 1_000_000 / took.as_micros().max(1)) as u64;
        self.since = now;
        self.acknowledged = 0;
        // With nothing to send a round says nothing of the line.
        if idle && self.rounds.iter().any(|round| *round >= rate) {
            return;
        }
        self.rounds.push_back(rate);
        if self.rounds.len() > ROUNDS {
            self.rounds.pop_front();
        }
        let best = self.rounds.iter().copied().max().unwrap_or(rate);
        let product = u128::from(best) * least.max(LEAST_RTT).as_micros() / 1_000_000;
        let window = u64::try_from(product + product / 4).unwrap_or(u64::MAX);
        self.window = window.saturating_add(MORE).max(FLOOR);
    }
}

impl Change for Cap {
    fn acknowledged(&mut self, now: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.count(now, bytes, app_limited, rtt.get(), rtt.min());
    }

    fn window(&self, inner: &dyn Controller) -> u64 {
        inner.window().min(self.window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(20);

    /// Round trips of 20 ms in which so many bytes are acknowledged, in pieces.
    fn rounds(cap: &mut Cap, now: &mut Instant, count: usize, bytes: u64, idle: bool) {
        for _ in 0..count * 20 {
            *now += Duration::from_millis(1);
            cap.count(*now, bytes / 20, idle, RTT, RTT);
        }
    }

    #[test]
    fn the_window_is_a_quarter_more_than_the_line_holds() {
        let mut now = Instant::now();
        let mut cap = Cap::new(now);
        assert_eq!(cap.window, u64::MAX);
        rounds(&mut cap, &mut now, 3, 500_000, false);
        assert!((625_000..=700_000).contains(&cap.window), "{}", cap.window);
    }

    #[test]
    fn a_slower_line_is_noticed_after_some_rounds_and_one_without_work_is_not_slower() {
        let mut now = Instant::now();
        let mut cap = Cap::new(now);
        rounds(&mut cap, &mut now, 3, 1_000_000, false);
        let fast = cap.window;
        rounds(&mut cap, &mut now, 100, 100, true);
        assert_eq!(cap.window, fast);
        rounds(&mut cap, &mut now, 2 * ROUNDS + 2, 500_000, false);
        assert!(cap.window < fast * 2 / 3);
        rounds(&mut cap, &mut now, 2 * ROUNDS + 2, 1_000, false);
        assert_eq!(cap.window, FLOOR);
    }
}
