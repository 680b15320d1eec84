//! Who goes next among the streams that wait for the connection's window: the one that has had least of it.

use std::collections::BTreeMap;

use quinn_proto::StreamId;

/// What a stream writes in one turn while others wait.
const SHARE: usize = 512 * 1024;
/// What a stream is ahead of others at most: as much as one that was alone may have written at once.
const LEAD: u64 = 2 * 1024 * 1024;

#[derive(Default)]
pub(super) struct Shares {
    is_on: bool,
    /// Several waited when there was some last.
    are_several: bool,
    /// What the one that goes next had had before, by which new ones begin.
    now: u64,
    waiting: BTreeMap<StreamId, u64>,
}

/// What one stream has had.
#[derive(Default)]
pub(super) struct Had {
    all: u64,
    this_turn: usize,
}

impl Shares {
    pub(super) fn start(&mut self) {
        self.is_on = true;
    }

    /// What the stream may write now. Nothing: others go first.
    pub(super) fn allow(&self, had: &mut Had) -> Option<usize> {
        if !self.are_several {
            return Some(usize::MAX);
        }
        match SHARE.checked_sub(had.this_turn) {
            None | Some(0) => {
                had.this_turn = 0;
                None
            }
            most => most,
        }
    }

    /// The stream waits for the window.
    pub(super) fn wait(&mut self, id: StreamId, had: &mut Had) {
        if !self.is_on {
            return;
        }
        had.this_turn = 0;
        had.all = had.all.clamp(self.now, self.now.saturating_add(LEAD));
        self.waiting.insert(id, had.all);
    }

    pub(super) fn leave(&mut self, id: StreamId) {
        self.waiting.remove(&id);
    }

    /// Puts streams into their order as there is some of the window again. quinn-proto tells of those that wait from
    /// the last one on.
    pub(super) fn order(&mut self, writable: &mut Vec<StreamId>) {
        if !self.is_on || writable.is_empty() {
            return;
        }
        self.are_several = writable.len() > 1;
        let had = writable.drain(..).rev();
        let mut had: Vec<_> = had
            .map(|id| (self.waiting.remove(&id).unwrap_or(self.now), id))
            .collect();
        had.sort_by_key(|(had, _)| *had);
        self.now = self.now.max(had[0].0);
        writable.extend(had.iter().map(|(_, id)| id));
    }
}

impl Had {
    pub(super) fn add(&mut self, bytes: usize) {
        self.this_turn = self.this_turn.saturating_add(bytes);
        self.all = self.all.saturating_add(bytes as u64);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use quinn_proto::{Dir, Side};

    use super::*;

    fn stream(index: u64) -> StreamId {
        StreamId::new(Side::Client, Dir::Uni, index)
    }

    fn shares() -> Shares {
        let mut shares = Shares::default();
        shares.start();
        shares
    }

    fn ordered(shares: &mut Shares, told: &[u64]) -> Vec<u64> {
        let mut writable = told.iter().map(|index| stream(*index)).collect();
        shares.order(&mut writable);
        writable.iter().map(|id| id.index()).collect()
    }

    #[test]
    fn who_has_had_least_goes_first_and_of_equals_who_waits_longest() {
        let mut shares = shares();
        for (index, bytes) in [(0, 500), (1, 100), (2, 0), (3, 100)] {
            let mut had = Had::default();
            had.add(bytes);
            shares.wait(stream(index), &mut had);
        }
        assert_eq!(vec![2, 1, 3, 0], ordered(&mut shares, &[3, 2, 1, 0]));
    }

    #[test]
    fn a_new_stream_begins_where_the_others_are() {
        let mut shares = shares();
        let mut old = Had::default();
        for _ in 0..100 {
            old.add(SHARE);
            shares.wait(stream(0), &mut old);
            ordered(&mut shares, &[0]);
        }
        let mut new = Had::default();
        old.add(SHARE);
        shares.wait(stream(0), &mut old);
        shares.wait(stream(1), &mut new);
        assert_eq!(vec![1, 0], ordered(&mut shares, &[1, 0]));
        new.add(2 * SHARE);
        shares.wait(stream(0), &mut old);
        shares.wait(stream(1), &mut new);
        assert_eq!(vec![0, 1], ordered(&mut shares, &[1, 0]));
    }

    #[test]
    fn who_was_alone_waits_for_two_megabytes_of_each_of_the_others_at_most() {
        let mut shares = shares();
        let mut alone = Had::default();
        alone.add(1 << 30);
        shares.wait(stream(0), &mut alone);
        let mut new = Had::default();
        shares.wait(stream(1), &mut new);
        assert_eq!(vec![1, 0], ordered(&mut shares, &[1, 0]));
        shares.wait(stream(0), &mut alone);
        new.add(LEAD as usize);
        shares.wait(stream(1), &mut new);
        assert_eq!(vec![0, 1], ordered(&mut shares, &[1, 0]));
    }

    #[test]
    fn a_turn_is_a_share_among_several_and_everything_for_one() {
        let mut shares = shares();
        let mut had = Had::default();
        had.add(10 * SHARE);
        assert_eq!(Some(usize::MAX), shares.allow(&mut had));
        ordered(&mut shares, &[0, 1]);
        assert_eq!(None, shares.allow(&mut had));
        had.add(1000);
        assert_eq!(Some(SHARE - 1000), shares.allow(&mut had));
    }

    #[test]
    fn where_nobody_asks_for_turns_the_order_is_quinns() {
        let mut shares = Shares::default();
        let mut had = Had::default();
        had.add(10 * SHARE);
        shares.wait(stream(2), &mut had);
        assert_eq!(vec![2, 1], ordered(&mut shares, &[2, 1]));
        assert_eq!(Some(usize::MAX), shares.allow(&mut had));
    }
}
