//! The peers that have connected and not yet proven themselves.
//!
//! How many are dealt with at a time is limited, in total and for each address. A peer that knows the
//! cookie needs a few milliseconds, so a newcomer takes the place of the one that has had the longest
//! time, among those of the address that holds the most places. An address that floods the node
//! displaces its own connections first.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Strangers that are dealt with at a time.
pub(crate) const MAX_STRANGERS: usize = 256;
/// And of one address.
const MAX_PER_ADDRESS: usize = 128;
/// Newcomers of one address in a period.
const RATE: u32 = 512;
const PERIOD: Duration = Duration::from_secs(1);
/// Addresses whose rate is known at a time.
const MAX_RATES: usize = 4096;

#[derive(Default)]
pub(crate) struct Strangers(Mutex<Table>);

#[derive(Default)]
struct Table {
    /// Oldest first.
    queue: VecDeque<(IpAddr, Arc<Notify>)>,
    rates: HashMap<IpAddr, u32>,
    since: Option<Instant>,
}

/// A place among them, given back when it is dropped.
pub(crate) struct Slot {
    strangers: Arc<Strangers>,
    /// Told when the place is given to another.
    pub(crate) evicted: Arc<Notify>,
}

impl Strangers {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn count(&self) -> usize {
        self.lock().queue.len()
    }
}

impl Table {
    /// Whether one more of this address may come now.
    fn is_within_rate(&mut self, addr: IpAddr, now: Instant) -> bool {
        if self
            .since
            .is_none_or(|since| now.duration_since(since) >= PERIOD)
        {
            self.since = Some(now);
            self.rates.clear();
        }
        if self.rates.len() >= MAX_RATES && !self.rates.contains_key(&addr) {
            return false;
        }
        let count = self.rates.entry(addr).or_default();
        *count += 1;
        *count <= RATE
    }

    /// The place that a newcomer of this address takes, if there is none that is free.
    fn victim(&self, newcomer: IpAddr) -> Option<usize> {
        let of = |addr| {
            self.queue
                .iter()
                .filter(|(other, _)| *other == addr)
                .count()
        };
        let crowded = if of(newcomer) >= MAX_PER_ADDRESS {
            newcomer
        } else if self.queue.len() >= MAX_STRANGERS {
            self.most_frequent()?
        } else {
            return None;
        };
        self.queue.iter().position(|(addr, _)| *addr == crowded)
    }

    fn most_frequent(&self) -> Option<IpAddr> {
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        for (addr, _) in &self.queue {
            *counts.entry(*addr).or_default() += 1;
        }
        counts
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .map(|(addr, _)| addr)
    }
}

impl Slot {
    /// None when too many of this address have come lately.
    pub(crate) fn take(strangers: &Arc<Strangers>, addr: IpAddr) -> Option<Slot> {
        let evicted = Arc::new(Notify::new());
        let mut table = strangers.lock();
        if !table.is_within_rate(addr, Instant::now()) {
            return None;
        }
        if let Some(place) = table.victim(addr)
            && let Some((_, victim)) = table.queue.remove(place)
        {
            victim.notify_one();
        }
        table.queue.push_back((addr, evicted.clone()));
        drop(table);
        Some(Slot {
            strangers: strangers.clone(),
            evicted,
        })
    }

    /// Completes when the place is given to another.
    pub(crate) fn evicted(&self) -> Arc<Notify> {
        self.evicted.clone()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.strangers
            .lock()
            .queue
            .retain(|(_, one)| !Arc::ptr_eq(one, &self.evicted));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    fn is_evicted(slot: &Slot) -> bool {
        let mut notified = std::pin::pin!(slot.evicted.notified());
        let waker = std::task::Waker::noop();
        notified
            .as_mut()
            .poll(&mut std::task::Context::from_waker(waker))
            .is_ready()
    }

    #[test]
    fn an_address_that_floods_displaces_its_own() {
        let strangers = Arc::new(Strangers::default());
        let take = |n| Slot::take(&strangers, address(n)).expect("within the rate");
        let honest = take(1);
        let flood: Vec<_> = (0..400).map(|_| take(2)).collect();
        assert!(!is_evicted(&honest));
        assert!(is_evicted(&flood[0]));
        assert!(!is_evicted(&flood[399]));
        assert_eq!(strangers.count(), MAX_PER_ADDRESS + 1);
        let evicted = flood.iter().filter(|slot| is_evicted(slot)).count();
        // `notified` takes the notice: the first was asked before.
        assert_eq!(evicted, 400 - MAX_PER_ADDRESS - 1);
    }

    #[test]
    fn all_addresses_together_have_a_limit() {
        let strangers = Arc::new(Strangers::default());
        let take = |n| Slot::take(&strangers, address(n)).expect("within the rate");
        let single = take(1);
        let crowds: Vec<_> = (0..600).map(|i| take(2 + (i % 3) as u8)).collect();
        assert_eq!(strangers.count(), MAX_STRANGERS);
        assert!(!is_evicted(&single));
        drop(crowds);
        assert_eq!(strangers.count(), 1);
        drop(single);
        assert_eq!(strangers.count(), 0);
    }

    #[test]
    fn one_address_comes_only_so_often() {
        let strangers = Arc::new(Strangers::default());
        for _ in 0..RATE {
            assert!(Slot::take(&strangers, address(1)).is_some());
        }
        assert!(Slot::take(&strangers, address(1)).is_none());
        assert!(Slot::take(&strangers, address(2)).is_some());
        strangers.lock().since = Instant::now().checked_sub(PERIOD);
        assert!(Slot::take(&strangers, address(1)).is_some());
    }
}
