//! How much of a link's user streams is under way.
//!
//! What they have written and the peer has not acknowledged is limited for all of them together, so that
//! what lanes may have under way is theirs alone. Streams of a lower number go first, equal ones in turn.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::vm::bell::Bell;

/// What one stream writes in its turn.
const PIECE: usize = 64 * 1024;
const LEAST: usize = 256 * 1024;
const MOST: usize = 5 * 1024 * 1024;

/// By priority, and by turn among equals.
type Place = (u8, u64);

pub(super) struct Room(Mutex<State>);

struct State {
    used: usize,
    cap: usize,
    turn: u64,
    waiting: BTreeMap<Place, Arc<Bell>>,
}

impl State {
    /// Whoever has waited longest of those that go first looks again.
    fn call(&self) {
        if self.used < self.cap
            && let Some((_, bell)) = self.waiting.first_key_value()
        {
            bell.ring();
        }
    }
}

impl Room {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Room(Mutex::new(State {
            used: 0,
            cap: LEAST,
            turn: 0,
            waiting: BTreeMap::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn used(&self) -> usize {
        self.lock().used
    }

    /// Follows what the path takes.
    pub(super) fn set_cap(&self, cap: usize) {
        let mut state = self.lock();
        state.cap = cap.clamp(LEAST, MOST);
        state.call();
    }

    fn release(&self, bytes: usize) {
        let mut state = self.lock();
        state.used -= bytes.min(state.used);
        state.call();
    }

    /// Bytes that were taken, until the peer has acknowledged them all.
    pub(super) fn track(self: &Arc<Self>, bytes: Bytes) -> Bytes {
        Bytes::from_owner(Tracked {
            bytes,
            room: self.clone(),
        })
    }
}

struct Tracked {
    bytes: Bytes,
    room: Arc<Room>,
}

impl AsRef<[u8]> for Tracked {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Tracked {
    /// On any thread, and with the connection locked.
    fn drop(&mut self) {
        self.room.release(self.bytes.len());
    }
}

/// One stream's claim to room.
pub(super) struct Ticket {
    room: Arc<Room>,
    priority: u8,
    place: Option<Place>,
    bell: Arc<Bell>,
}

impl Ticket {
    pub(super) fn new(room: &Arc<Room>, priority: u8, bell: &Arc<Bell>) -> Self {
        Ticket {
            room: room.clone(),
            priority,
            place: None,
            bell: bell.clone(),
        }
    }

    /// Takes up to so many bytes. None are left where 0 is the answer; then the bell rings.
    pub(super) fn take(&mut self, most: usize) -> usize {
        let mut state = self.room.lock();
        let mine = self.place.unwrap_or((self.priority, u64::MAX));
        let is_next = state
            .waiting
            .first_key_value()
            .is_none_or(|(first, _)| mine <= *first);
        if is_next && state.used < state.cap {
            if let Some(place) = self.place.take() {
                state.waiting.remove(&place);
            }
            let taken = most.min(PIECE);
            state.used += taken;
            state.call();
            return taken;
        }
        if self.place.is_none() {
            state.turn += 1;
            let place = (self.priority, state.turn);
            self.place = Some(place);
            state.waiting.insert(place, self.bell.clone());
            // Nobody calls where there is room, and another has been called already.
            state.call();
        }
        0
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            let mut state = self.room.lock();
            state.waiting.remove(&place);
            state.call();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::runtime;

    fn ticket(room: &Arc<Room>, priority: u8) -> Ticket {
        Ticket::new(room, priority, &runtime::dist().bell())
    }

    /// Takes all there is.
    fn fill(room: &Arc<Room>) -> Vec<Bytes> {
        let mut filler = ticket(room, 255);
        let mut taken = Vec::new();
        loop {
            match filler.take(usize::MAX) {
                0 => return taken,
                n => taken.push(room.track(Bytes::from(vec![0; n]))),
            }
        }
    }

    #[test]
    fn room_is_limited_and_comes_back_with_what_is_acknowledged() {
        let room = Room::new();
        let taken = fill(&room);
        assert_eq!(LEAST, room.used());
        let mut late = ticket(&room, 16);
        assert_eq!(0, late.take(10));
        drop(taken);
        assert_eq!(0, room.used());
        assert_eq!(10, late.take(10));
    }

    #[test]
    fn the_lower_number_goes_first_and_equal_ones_take_turns() {
        let room = Room::new();
        let mut taken = fill(&room);
        let (mut low, mut first, mut second) =
            (ticket(&room, 200), ticket(&room, 20), ticket(&room, 20));
        assert_eq!(0, low.take(PIECE));
        assert_eq!(0, first.take(PIECE));
        assert_eq!(0, second.take(PIECE));
        taken.pop();
        assert_eq!(0, low.take(PIECE));
        assert_eq!(0, second.take(PIECE));
        assert_eq!(PIECE, first.take(PIECE));
        drop(room.track(Bytes::from(vec![0; PIECE])));
        // Behind the other now.
        assert_eq!(0, first.take(PIECE));
        assert_eq!(0, low.take(PIECE));
        assert_eq!(PIECE, second.take(PIECE));
    }

    #[test]
    fn whoever_leaves_keeps_nobody_waiting() {
        let room = Room::new();
        let mut taken = fill(&room);
        let (mut first, mut second) = (ticket(&room, 20), ticket(&room, 30));
        assert_eq!(0, first.take(1));
        assert_eq!(0, second.take(1));
        taken.pop();
        drop(first);
        assert_eq!(1, second.take(1));
    }
}
