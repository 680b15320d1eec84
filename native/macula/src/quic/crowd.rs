//! How many connections a listener has at a time, in all and from one address, and how many of an address
//! it takes in a second.
//!
//! An address that has not proven itself may be another's (RFC 9000, section 8.1). So it gets half of what it could
//! have, and for the rest it must prove itself by a Retry, which costs nothing: whoever sends under
//! the address of another takes nothing of the other half.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::udp::socket::plain;

/// Addresses that are remembered at a time, beside those that have connections.
const REMEMBERED: usize = 16_384;
/// How often a full table is searched for addresses that need not be remembered.
const SEARCH: Duration = Duration::from_secs(1);

/// The options; `None` is without limit.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Limits {
    pub(crate) total: Option<usize>,
    pub(crate) per_address: Option<usize>,
    /// Connections in a second, and at once.
    pub(crate) rate: Option<(u32, u32)>,
}

impl Limits {
    /// Whether there is anything to count.
    pub(crate) fn are_some(&self) -> bool {
        self.total.is_some() || self.per_address.is_some() || self.rate.is_some()
    }
}

pub(crate) struct Crowd {
    limits: Limits,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    total: usize,
    addresses: HashMap<IpAddr, Known>,
    searched: Option<Instant>,
    /// When all that were remembered had connections.
    crowded: Option<Instant>,
}

struct Known {
    connections: usize,
    /// What is left of the burst, and when it was so.
    tokens: f64,
    at: Instant,
}

/// What becomes of a newcomer.
pub(crate) enum Admission {
    Taken(Place),
    /// The address must be proven first.
    Unproven,
    Full,
}

/// The place of one connection, given back when it is dropped.
pub(crate) struct Place {
    crowd: Arc<Crowd>,
    address: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.crowd.lock();
        table.total = table.total.saturating_sub(1);
        let known = table.addresses.get_mut(&self.address);
        if let Some(known) = known {
            known.connections = known.connections.saturating_sub(1);
            if known.connections == 0 && self.crowd.limits.rate.is_none() {
                table.addresses.remove(&self.address);
            }
        }
    }
}

/// An IPv4 address, or the network that an IPv6 address is in: whoever has one there has all of them.
fn network(of: SocketAddr) -> IpAddr {
    match plain(of).ip() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

impl Crowd {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Crowd {
            limits,
            table: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `proven`: the address is, or cannot be.
    pub(crate) fn admit(self: &Arc<Self>, from: SocketAddr, proven: bool) -> Admission {
        self.admit_at(from, proven, Instant::now())
    }

    fn admit_at(self: &Arc<Self>, from: SocketAddr, proven: bool, now: Instant) -> Admission {
        let limits = self.limits;
        let address = network(from);
        let mut table = self.lock();
        if limits.total.is_some_and(|total| table.total >= total) {
            return Admission::Full;
        }
        let burst = limits.rate.map_or(0.0, |(_, burst)| f64::from(burst));
        if !table.addresses.contains_key(&address) {
            if table.addresses.len() >= REMEMBERED {
                table.make_room(limits, proven, now);
            }
            // Whoever invents addresses makes nobody be forgotten.
            if table.addresses.len() >= REMEMBERED && !proven {
                return Admission::Unproven;
            }
        }
        let known = table.addresses.entry(address).or_insert(Known {
            connections: 0,
            tokens: burst,
            at: now,
        });
        known.refill(limits, now);
        let used = |most: f64, used: f64| match (used + 1.0 > most, used * 2.0 >= most) {
            (true, _) => Some(true),
            (false, half) => half.then_some(false),
        };
        let by_count = limits
            .per_address
            .and_then(|most| used(most as f64, known.connections as f64));
        let by_rate = limits
            .rate
            .and_then(|_| used(burst, burst - known.tokens.min(burst)));
        if !proven && (by_count.is_some() || by_rate.is_some()) {
            return Admission::Unproven;
        }
        if by_count == Some(true) || by_rate == Some(true) {
            return Admission::Full;
        }
        known.connections += 1;
        if limits.rate.is_some() {
            known.tokens -= 1.0;
        }
        table.total += 1;
        Admission::Taken(Place {
            crowd: self.clone(),
            address,
        })
    }
}

impl Known {
    fn refill(&mut self, limits: Limits, now: Instant) {
        if let Some((rate, burst)) = limits.rate {
            let passed = now.saturating_duration_since(self.at).as_secs_f64();
            self.tokens = (self.tokens + passed * f64::from(rate)).min(f64::from(burst));
            self.at = now;
        }
    }
}

impl Table {
    /// Forgets addresses that have no connection, and all of their burst again; where that makes no room for
    /// one that is proven, any that have no connection.
    fn make_room(&mut self, limits: Limits, proven: bool, now: Instant) {
        let burst = limits.rate.map_or(0.0, |(_, burst)| f64::from(burst));
        if self.searched.is_none_or(|then| now >= then + SEARCH) {
            self.searched = Some(now);
            self.addresses.retain(|_, known| {
                known.refill(limits, now);
                known.connections > 0 || known.tokens < burst
            });
        }
        let crowded = self.crowded.is_some_and(|then| now < then + SEARCH);
        if proven && self.addresses.len() >= REMEMBERED && !crowded {
            let mut left = REMEMBERED / 8;
            self.addresses.retain(|_, known| {
                let goes = known.connections == 0 && left > 0;
                left -= usize::from(goes);
                !goes
            });
            self.crowded = (left == REMEMBERED / 8).then_some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(ip: &str) -> SocketAddr {
        SocketAddr::new(ip.parse().expect("an address"), 1)
    }

    fn name(admission: &Admission) -> &'static str {
        match admission {
            Admission::Taken(_) => "taken",
            Admission::Unproven => "unproven",
            Admission::Full => "full",
        }
    }

    #[test]
    fn an_address_has_half_unproven_and_the_rest_proven() {
        let crowd = Crowd::new(Limits {
            per_address: Some(4),
            ..Limits::default()
        });
        let one = at("192.0.2.1");
        let mut places = Vec::new();
        for (proven, wanted) in [
            (false, "taken"),
            (false, "taken"),
            (false, "unproven"),
            (true, "taken"),
            (true, "taken"),
            (true, "full"),
            (false, "unproven"),
        ] {
            let admission = crowd.admit(one, proven);
            assert_eq!(wanted, name(&admission));
            places.push(admission);
        }
        // Others have theirs; the same address in another spelling is the same.
        assert_eq!("taken", name(&crowd.admit(at("192.0.2.2"), false)));
        assert_eq!("full", name(&crowd.admit(at("::ffff:192.0.2.1"), true)));
        drop(places);
        assert_eq!("taken", name(&crowd.admit(one, false)));
        assert!(crowd.lock().addresses.is_empty());
    }

    #[test]
    fn a_network_of_ipv6_is_one_address() {
        let crowd = Crowd::new(Limits {
            per_address: Some(1),
            ..Limits::default()
        });
        let place = crowd.admit(at("2001:db8::1"), true);
        assert_eq!("taken", name(&place));
        assert_eq!("full", name(&crowd.admit(at("2001:db8::2"), true)));
        assert_eq!("taken", name(&crowd.admit(at("2001:db8:0:1::1"), true)));
    }

    #[test]
    fn a_burst_comes_back_with_time() {
        let crowd = Crowd::new(Limits {
            rate: Some((10, 20)),
            ..Limits::default()
        });
        let (one, now) = (at("192.0.2.1"), Instant::now());
        // Connections that end give nothing back.
        let taken = |proven, now| {
            (0..100)
                .filter(|_| name(&crowd.admit_at(one, proven, now)) == "taken")
                .count()
        };
        assert_eq!(10, taken(false, now));
        assert_eq!(10, taken(true, now));
        assert_eq!(0, taken(true, now));
        assert_eq!(5, taken(true, now + Duration::from_millis(500)));
        assert_eq!(20, taken(true, now + Duration::from_secs(60)));
    }

    #[test]
    fn the_total_is_that_of_all_addresses() {
        let crowd = Crowd::new(Limits {
            total: Some(2),
            ..Limits::default()
        });
        let places = ["192.0.2.1", "192.0.2.2"].map(|ip| crowd.admit(at(ip), false));
        assert!(places.iter().all(|place| name(place) == "taken"));
        assert_eq!("full", name(&crowd.admit(at("192.0.2.3"), true)));
        drop(places);
        assert_eq!("taken", name(&crowd.admit(at("192.0.2.3"), true)));
    }

    #[test]
    fn a_table_full_of_connections_is_searched_now_and_then() {
        let crowd = Crowd::new(Limits {
            rate: Some((1, 1)),
            ..Limits::default()
        });
        let now = Instant::now();
        let admit = |n: u32, now| {
            let ip = IpAddr::from((0x0a00_0000 + n).to_be_bytes());
            crowd.admit_at(SocketAddr::new(ip, 1), true, now)
        };
        let full = REMEMBERED as u32;
        let mut places: Vec<_> = (0..=full).map(|n| admit(n, now)).collect();
        assert!(places.iter().all(|place| name(place) == "taken"));
        let remembered = || crowd.lock().addresses.len();
        assert_eq!(REMEMBERED + 1, remembered());
        // It is not looked for at once, as it would be for each newcomer.
        places.pop();
        places.push(admit(full + 1, now));
        assert_eq!(REMEMBERED + 2, remembered());
        places.push(admit(full + 2, now + SEARCH));
        assert_eq!(REMEMBERED + 2, remembered());
    }

    #[test]
    fn invented_addresses_take_no_more_memory() {
        let crowd = Crowd::new(Limits {
            rate: Some((1, 4)),
            ..Limits::default()
        });
        let now = Instant::now();
        for n in 0..3 * REMEMBERED as u32 {
            let ip = IpAddr::from((0x0a00_0000 + n).to_be_bytes());
            crowd.admit_at(SocketAddr::new(ip, 1), false, now);
        }
        assert!(crowd.lock().addresses.len() <= REMEMBERED);
        // Whoever proves an address comes in all the same.
        assert_eq!("taken", name(&crowd.admit_at(at("192.0.2.1"), true, now)));
        assert!(crowd.lock().addresses.len() <= REMEMBERED);
    }
}
