//! Whose bytes wait to be sent, and who waits for that.
//!
//! The one who causes a queue waits, alone: a sender with more unsent bytes than the mark is *held* (its
//! process is suspended) until the queue has room for it. Held senders go on in the order in which they were
//! held, so many of them together keep little more in the queue than one of them alone.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

use super::super::classify::Sender;
use super::lane::Lane;

/// The least mark. The VM cuts messages into fragments of this size, and may suspend a sender between two.
pub(crate) const MIN_MARK: usize = 64 * 1024;
/// The largest mark: more in the queue gains nothing, however fast the path is.
pub(crate) const MAX_MARK: usize = 1024 * 1024;

/// With more than this in the queue everybody waits, whoever is held.
const MAX_UNSENT: usize = 128 * 1024 * 1024;

/// A process's numbers are given out one after the other, and nobody else chooses them.
#[derive(Default)]
pub(crate) struct Mixer(u64);

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(29) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

pub(crate) type Senders<V> = HashMap<Sender, V, BuildHasherDefault<Mixer>>;

#[derive(Debug, Default)]
struct Account {
    unsent: usize,
    held: bool,
    /// Held at some time since its bytes were all sent: it counts in `heavy`.
    heavy: bool,
    /// Let go, and nothing has come from it since.
    awaited: bool,
    /// Unsent bytes of the message in which it was held.
    excused: usize,
    /// Bytes of that message that are still to come.
    to_come: usize,
}

/// One time that a sender has to wait. Who lets it go says which: it may have to wait again already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Hold {
    pub(crate) sender: Sender,
    pub(crate) number: u64,
}

impl Hold {
    /// The process's two, and that of the hold.
    pub(crate) fn numbers(self) -> (u32, u32, u64) {
        let (number, serial) = self.sender.numbers();
        (number, serial, self.number)
    }
}

/// Bytes that belong to one sender, or to none.
#[derive(Debug)]
struct Run {
    sender: Option<Sender>,
    bytes: usize,
}

/// The accounts of all senders with bytes in the queue of a link.
#[derive(Debug)]
pub(crate) struct Ledger {
    mark: usize,
    /// Held senders go on when such a part of the mark is left.
    part: usize,
    /// Of each lane, in the order in which they will be sent.
    runs: [VecDeque<Run>; 2],
    accounts: Senders<Account>,
    /// Who waits, first come first.
    held: VecDeque<Hold>,
    holds: u64,
    /// To be told to wait.
    to_hold: Vec<Hold>,
    unsent: usize,
    /// Unsent bytes of those that have been held.
    heavy: usize,
    /// How many have been let go and have not sent since.
    awaited: usize,
    /// Unsent bytes of the messages in which senders were held.
    excused: usize,
    /// Whether the rest of such a message counts in `pressure`.
    counts_all: bool,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            mark: MIN_MARK,
            part: 2,
            runs: Default::default(),
            accounts: Senders::default(),
            held: VecDeque::new(),
            holds: 0,
            to_hold: Vec::new(),
            unsent: 0,
            heavy: 0,
            awaited: 0,
            excused: 0,
            counts_all: false,
        }
    }
}

impl Ledger {
    /// Of a single lane, in which everybody waits behind what is queued: there is less of it.
    pub(crate) fn of_one_lane() -> Self {
        Self {
            part: 4,
            counts_all: true,
            ..Self::default()
        }
    }

    /// The mark follows the path: what it takes in a moment should be there when it asks.
    pub(crate) fn set_mark(&mut self, mark: usize) {
        self.mark = mark.clamp(MIN_MARK, MAX_MARK);
    }

    pub(crate) fn mark(&self) -> usize {
        self.mark
    }

    pub(crate) fn unsent(&self) -> usize {
        self.unsent
    }

    /// The bytes that nobody waits for. A held sender adds no more than its message, which the VM has encoded as a
    /// whole and would keep instead: one message of each of a hundred senders is no reason to stop everybody.
    pub(crate) fn pressure(&self) -> usize {
        if self.unsent >= MAX_UNSENT || self.counts_all {
            self.unsent
        } else {
            self.unsent - self.excused
        }
    }

    /// Whether a sender is over the mark with so many bytes more.
    pub(crate) fn is_heavy(&self, sender: Sender, more: usize) -> bool {
        let unsent = self.accounts.get(&sender).map_or(0, |a| a.unsent);
        unsent + more > self.mark
    }

    /// Bytes have come into the queue of a lane, behind all others. `more` will follow: a sender of more
    /// than the mark is held at the beginning of its message, as the rest of many messages would fill the
    /// queue to its limit, at which the VM stops everybody.
    pub(crate) fn put(&mut self, lane: Lane, sender: Option<Sender>, bytes: usize, more: usize) {
        self.unsent += bytes;
        let runs = &mut self.runs[lane.index()];
        match runs.back_mut() {
            Some(last) if last.sender == sender => last.bytes += bytes,
            _ => runs.push_back(Run { sender, bytes }),
        }
        let Some(sender) = sender else {
            return;
        };
        let account = self.accounts.entry(sender).or_default();
        account.unsent += bytes;
        if account.heavy {
            self.heavy += bytes;
        }
        if account.awaited {
            account.awaited = false;
            self.awaited -= 1;
        }
        let expected = bytes.min(account.to_come);
        account.to_come -= expected;
        account.excused += expected;
        self.excused += expected;
        // A path that takes the largest mark in a moment takes the message, too.
        let rest = if self.mark < MAX_MARK { more } else { 0 };
        if account.unsent.saturating_add(rest) > self.mark && !account.held {
            account.held = true;
            self.excused += account.unsent - account.excused;
            account.excused = account.unsent;
            account.to_come = more;
            if !account.heavy {
                account.heavy = true;
                self.heavy += account.unsent;
            }
            self.holds += 1;
            let hold = Hold {
                sender,
                number: self.holds,
            };
            self.held.push_back(hold);
            self.to_hold.push(hold);
        }
    }

    /// Those over the mark that have not been told yet.
    pub(crate) fn hold(&mut self) -> Vec<Hold> {
        std::mem::take(&mut self.to_hold)
    }

    /// The first bytes of the queue of a lane have been sent.
    pub(crate) fn sent(&mut self, lane: Lane, mut bytes: usize) {
        while bytes > 0 {
            let Some(run) = self.runs[lane.index()].front_mut() else {
                return;
            };
            let part = run.bytes.min(bytes);
            let sender = run.sender;
            run.bytes -= part;
            bytes -= part;
            self.unsent -= part;
            if run.bytes == 0 {
                self.runs[lane.index()].pop_front();
            }
            if let Some(sender) = sender {
                self.pay(sender, part);
            }
        }
    }

    fn pay(&mut self, sender: Sender, bytes: usize) {
        let Some(account) = self.accounts.get_mut(&sender) else {
            return;
        };
        account.unsent -= bytes;
        let excused = bytes.min(account.excused);
        account.excused -= excused;
        self.excused -= excused;
        if account.heavy {
            self.heavy -= bytes;
        }
        if account.unsent == 0 && !account.held && !account.awaited {
            self.accounts.remove(&sender);
        }
    }

    /// Those who may go on.
    pub(crate) fn let_go(&mut self) -> Vec<Hold> {
        let mut free = Vec::new();
        while let Some(&hold) = self.held.front()
            && self.heavy + self.awaited * MIN_MARK <= self.mark / self.part
        {
            self.held.pop_front();
            if let Some(account) = self.accounts.get_mut(&hold.sender) {
                account.held = false;
                account.awaited = true;
                self.awaited += 1;
            }
            free.push(hold);
        }
        free
    }

    /// Those let go have had their time: others need not wait for them.
    pub(crate) fn forget_awaited(&mut self) {
        if self.awaited == 0 {
            return;
        }
        self.awaited = 0;
        self.accounts.retain(|_, account| {
            account.awaited = false;
            account.held || account.unsent > 0
        });
    }

    /// Somebody has been let go a moment ago and has not sent since.
    pub(crate) fn awaits(&self) -> bool {
        self.awaited > 0
    }

    /// Somebody is held, or has been let go a moment ago.
    pub(crate) fn is_at_work(&self) -> bool {
        !self.held.is_empty() || self.awaited > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const EXPRESS: Lane = Lane::Express;

    fn sender(number: u32) -> Sender {
        Sender::of(number, 0)
    }

    fn senders(holds: Vec<Hold>) -> Vec<Sender> {
        holds.into_iter().map(|hold| hold.sender).collect()
    }

    #[test]
    fn over_the_mark_a_sender_is_held_once_and_others_are_not() {
        let mut ledger = Ledger::default();
        ledger.put(EXPRESS, Some(sender(1)), MIN_MARK, 0);
        ledger.put(EXPRESS, Some(sender(2)), 10, 0);
        ledger.put(EXPRESS, None, MIN_MARK * 3, 0);
        assert!(ledger.hold().is_empty());
        ledger.put(EXPRESS, Some(sender(1)), 1, 0);
        ledger.put(EXPRESS, Some(sender(1)), 1, 0);
        assert_eq!(senders(ledger.hold()), vec![sender(1)]);
        ledger.put(EXPRESS, Some(sender(1)), 100_000, 0);
        assert!(ledger.hold().is_empty());
    }

    #[test]
    fn who_begins_a_message_larger_than_the_mark_is_held_at_its_beginning() {
        let mut ledger = Ledger::default();
        for number in 0..100 {
            ledger.put(EXPRESS, Some(sender(number)), MIN_MARK / 4, MIN_MARK);
            ledger.put(
                EXPRESS,
                Some(sender(200 + number)),
                MIN_MARK / 4,
                MIN_MARK / 4,
            );
        }
        let held = senders(ledger.hold());
        assert_eq!(held, (0..100).map(sender).collect::<Vec<_>>());
        ledger.sent(EXPRESS, ledger.unsent());
        let mut free = Vec::new();
        while ledger.is_at_work() {
            free.extend(senders(ledger.let_go()));
            ledger.forget_awaited();
        }
        assert_eq!(free, held);
    }

    #[test]
    fn the_messages_of_held_senders_stop_nobody_and_what_else_is_queued_does() {
        let mut ledger = Ledger::default();
        for number in 0..100 {
            ledger.put(Lane::Bulk, Some(sender(number)), MIN_MARK, 15 * MIN_MARK);
        }
        for number in 0..100 {
            ledger.put(Lane::Bulk, Some(sender(number)), 15 * MIN_MARK, 0);
        }
        assert_eq!((ledger.hold().len(), ledger.pressure()), (100, 0));
        // A held sender that cannot be suspended, and one that is not held.
        ledger.put(Lane::Bulk, Some(sender(0)), MIN_MARK, 15 * MIN_MARK);
        ledger.put(EXPRESS, Some(sender(100)), 10, 0);
        assert_eq!(ledger.pressure(), MIN_MARK + 10);
        // The first bytes of a sender are those of its message.
        ledger.sent(Lane::Bulk, 1600 * MIN_MARK);
        assert_eq!(ledger.pressure(), MIN_MARK + 10);
        ledger.sent(Lane::Bulk, MIN_MARK);
        ledger.sent(EXPRESS, 10);
        assert_eq!((ledger.pressure(), ledger.unsent()), (0, 0));
        ledger.put(Lane::Bulk, Some(sender(101)), MIN_MARK, MAX_UNSENT);
        ledger.put(Lane::Bulk, Some(sender(101)), MAX_UNSENT, 0);
        assert_eq!(ledger.pressure(), MAX_UNSENT + MIN_MARK);
    }

    #[test]
    fn a_fast_path_takes_whole_messages() {
        let mut ledger = Ledger::default();
        ledger.set_mark(MAX_MARK);
        ledger.put(EXPRESS, Some(sender(1)), MIN_MARK, MAX_MARK);
        assert!(ledger.hold().is_empty());
        ledger.put(EXPRESS, Some(sender(1)), MAX_MARK, 0);
        assert_eq!(senders(ledger.hold()), vec![sender(1)]);
    }

    #[test]
    fn on_one_lane_less_is_left_when_a_held_sender_goes_on() {
        let mut ledger = Ledger::of_one_lane();
        ledger.put(EXPRESS, Some(sender(1)), 2 * MIN_MARK, 0);
        ledger.sent(EXPRESS, MIN_MARK + MIN_MARK / 4 * 3 - 1);
        assert!(ledger.let_go().is_empty());
        ledger.sent(EXPRESS, 1);
        assert_eq!(senders(ledger.let_go()), vec![sender(1)]);
    }

    #[test]
    fn a_held_sender_goes_on_when_half_of_the_mark_is_left() {
        let mut ledger = Ledger::default();
        ledger.put(EXPRESS, Some(sender(1)), 2 * MIN_MARK, 0);
        ledger.sent(EXPRESS, MIN_MARK + MIN_MARK / 2 - 1);
        assert!(ledger.let_go().is_empty());
        ledger.sent(EXPRESS, 1);
        assert_eq!(senders(ledger.let_go()), vec![sender(1)]);
        assert!(ledger.let_go().is_empty());
        ledger.sent(EXPRESS, MIN_MARK / 2);
        assert_eq!(ledger.unsent(), 0);
        assert!(ledger.is_at_work());
        ledger.forget_awaited();
        assert!(!ledger.is_at_work() && ledger.accounts.is_empty());
    }

    #[test]
    fn small_senders_do_not_keep_a_held_one_waiting() {
        let mut ledger = Ledger::default();
        ledger.put(EXPRESS, Some(sender(1)), 2 * MIN_MARK, 0);
        for number in 2..100 {
            ledger.put(EXPRESS, Some(sender(number)), MIN_MARK / 2, 0);
        }
        ledger.sent(EXPRESS, 2 * MIN_MARK);
        assert_eq!(senders(ledger.let_go()), vec![sender(1)]);
    }

    #[test]
    fn of_many_held_senders_few_go_on_at_a_time_and_each_has_its_turn() {
        let mut ledger = Ledger::default();
        for number in 0..100 {
            ledger.put(EXPRESS, Some(sender(number)), MIN_MARK + 1, 0);
        }
        assert_eq!(ledger.hold().len(), 100);
        let mut turns = Vec::new();
        let mut most = 0;
        let mut first = true;
        while turns.len() < 300 {
            ledger.sent(EXPRESS, 10_000);
            let free = ledger.let_go();
            if !free.is_empty() {
                first = false;
            }
            for sender in senders(free) {
                turns.push(sender);
                ledger.put(EXPRESS, Some(sender), MIN_MARK + 1, 0);
            }
            if !first {
                most = most.max(ledger.unsent());
            }
        }
        assert!(most <= 2 * MIN_MARK, "{most}");
        for round in turns.chunks_exact(100) {
            assert_eq!(round.iter().collect::<HashSet<_>>().len(), 100);
        }
    }

    #[test]
    fn who_does_not_use_the_turn_keeps_nobody_from_it() {
        let mut ledger = Ledger::default();
        for number in 0..3 {
            ledger.put(EXPRESS, Some(sender(number)), MIN_MARK + 1, 0);
        }
        ledger.sent(EXPRESS, 3 * (MIN_MARK + 1));
        let mut free = Vec::new();
        for _ in 0..3 {
            free.extend(ledger.let_go());
            ledger.forget_awaited();
        }
        assert_eq!(senders(free), vec![sender(0), sender(1), sender(2)]);
        assert!(ledger.accounts.is_empty());
    }

    #[test]
    fn a_sender_is_heavy_by_what_is_unsent_and_what_is_to_come() {
        let mut ledger = Ledger::default();
        assert!(!ledger.is_heavy(sender(1), MIN_MARK));
        assert!(ledger.is_heavy(sender(1), MIN_MARK + 1));
        ledger.put(EXPRESS, Some(sender(1)), 1000, 0);
        assert!(!ledger.is_heavy(sender(1), MIN_MARK - 1000));
        assert!(ledger.is_heavy(sender(1), MIN_MARK - 999));
        assert!(!ledger.is_heavy(sender(2), MIN_MARK));
        ledger.sent(EXPRESS, 1000);
        assert!(!ledger.is_heavy(sender(1), MIN_MARK));
    }

    #[test]
    fn a_sender_whose_bytes_are_all_sent_has_no_account() {
        let mut ledger = Ledger::default();
        for number in 0..100_000 {
            let lane = Lane::ALL[number as usize % 2];
            ledger.put(lane, Some(sender(number)), 100, 0);
            assert!(ledger.accounts.contains_key(&sender(number)));
            // What is sent is of the sixth before it in its lane.
            ledger.sent(lane, if number < 12 { 0 } else { 100 });
            assert!(ledger.accounts.len() <= 12);
        }
        for lane in Lane::ALL {
            ledger.sent(lane, usize::MAX);
        }
        assert!(ledger.hold().is_empty() && !ledger.is_at_work());
        assert!(ledger.accounts.is_empty());
    }

    #[test]
    fn whatever_happens_bytes_are_counted_and_everybody_held_goes_on() {
        let mut random = 1u64;
        let mut next = move |below: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        for _ in 0..300 {
            let mut ledger = Ledger::default();
            let mut held = HashSet::new();
            let mut unsent = [0; 2];
            for _ in 0..400 {
                match next(6) {
                    0..3 => {
                        let who = (next(5) > 0).then(|| sender(next(8) as u32));
                        let bytes = next(3 * MIN_MARK as u64) as usize;
                        let lane = Lane::ALL[next(2) as usize];
                        ledger.put(lane, who, bytes, 0);
                        unsent[lane.index()] += bytes;
                        for hold in ledger.hold() {
                            assert!(held.insert(hold), "held twice");
                        }
                    }
                    3 => {
                        let bytes = next(4 * MIN_MARK as u64) as usize;
                        let lane = Lane::ALL[next(2) as usize];
                        ledger.sent(lane, bytes);
                        unsent[lane.index()] -= bytes.min(unsent[lane.index()]);
                    }
                    4 => {
                        for hold in ledger.let_go() {
                            assert!(held.remove(&hold), "let go twice");
                        }
                    }
                    _ if next(4) == 0 => ledger.set_mark(next(3 * MIN_MARK as u64) as usize),
                    _ => ledger.forget_awaited(),
                }
                assert_eq!(ledger.unsent(), unsent[0] + unsent[1]);
                assert!(
                    ledger
                        .accounts
                        .values()
                        .all(|account| account.unsent > 0 || account.held || account.awaited)
                );
            }
            for lane in Lane::ALL {
                ledger.sent(lane, unsent[lane.index()]);
            }
            while ledger.is_at_work() {
                for hold in ledger.let_go() {
                    assert!(held.remove(&hold));
                }
                ledger.forget_awaited();
            }
            assert!(held.is_empty());
            assert!(ledger.accounts.is_empty() && ledger.runs.iter().all(VecDeque::is_empty));
            assert_eq!((ledger.unsent, ledger.heavy), (0, 0));
        }
    }
}
