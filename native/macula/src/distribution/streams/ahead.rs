//! Who may send ahead of the first credit: each stream a little, some streams of a link more.
//!
//! A stream that nobody reads holds what it has sent. So that ten thousand of them hold little, only so many have
//! places from which they send `INITIAL_CREDIT`. The peer says when a place is free: by credit, which it gives as soon
//! as its owner was given `FIRST` bytes, or when its receiving half is over.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::vm::bell::Bell;
use crate::vm::objects::{Counted, Kind};

/// What each stream may send before the first credit.
pub(super) const FIRST: u64 = 512;
const PLACES: usize = 128;

#[derive(Default)]
pub(super) struct Ahead(Mutex<State>);

#[derive(Default)]
struct State {
    /// QUIC's numbers.
    holders: BTreeMap<u64, Counted>,
    /// By turn; and the turns by QUIC's numbers.
    waiting: BTreeMap<u64, Arc<Bell>>,
    turns: BTreeMap<u64, u64>,
    turn: u64,
}

impl State {
    /// The next one looks again.
    fn call(&self) {
        if self.holders.len() < PLACES
            && let Some((_, bell)) = self.waiting.first_key_value()
        {
            bell.ring();
        }
    }

    fn leave(&mut self, id: u64) {
        if let Some(turn) = self.turns.remove(&id) {
            self.waiting.remove(&turn);
            self.call();
        }
    }
}

impl Ahead {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the stream has a place. If not, the bell rings when it is the stream's turn.
    pub(super) fn take(&self, id: u64, bell: &Arc<Bell>) -> bool {
        let mut state = self.lock();
        if state.holders.contains_key(&id) {
            return true;
        }
        let turn = state.turns.get(&id).copied().unwrap_or(u64::MAX);
        let first = state.waiting.first_key_value();
        if state.holders.len() < PLACES && first.is_none_or(|(first, _)| turn <= *first) {
            state.holders.insert(id, Counted::new(Kind::Place));
            state.leave(id);
            return true;
        }
        if turn == u64::MAX {
            state.turn += 1;
            let turn = state.turn;
            state.turns.insert(id, turn);
            state.waiting.insert(turn, bell.clone());
        }
        false
    }

    /// The peer has told of the stream, which needs no place any more.
    pub(super) fn give_back(&self, id: u64) {
        let mut state = self.lock();
        state.leave(id);
        if state.holders.remove(&id).is_some() {
            state.call();
        }
    }

    /// The stream is over, or waits no more. A place that it has is the peer's to give back.
    pub(super) fn leave(&self, id: u64) {
        self.lock().leave(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::runtime;

    fn full() -> Ahead {
        let ahead = Ahead::default();
        let bell = runtime::dist().bell();
        for id in 0..PLACES as u64 {
            assert!(ahead.take(id, &bell));
        }
        ahead
    }

    #[test]
    fn so_many_streams_have_places_and_keep_them() {
        let ahead = full();
        let bell = runtime::dist().bell();
        assert!(ahead.take(0, &bell));
        assert!(!ahead.take(1000, &bell));
        ahead.give_back(5);
        assert!(ahead.take(1000, &bell));
        assert!(!ahead.take(5, &bell));
    }

    #[test]
    fn who_waits_longest_goes_first_and_who_leaves_keeps_nobody_waiting() {
        let ahead = full();
        let bell = runtime::dist().bell();
        for id in [1000, 1001, 1002] {
            assert!(!ahead.take(id, &bell));
        }
        ahead.give_back(7);
        assert!(!ahead.take(1001, &bell));
        ahead.leave(1000);
        assert!(!ahead.take(1002, &bell));
        assert!(ahead.take(1001, &bell));
        // Told twice, or of one that has none: nothing becomes free.
        ahead.give_back(7);
        ahead.give_back(5000);
        assert!(!ahead.take(1002, &bell));
    }
}
