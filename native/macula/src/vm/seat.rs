//! What keeps the state of a half between its turns.

use std::sync::{Mutex, PoisonError};
use std::task::Poll;

use crate::vm::tasks::{Panicked, attempt};
use crate::vm::turns::Rung;

/// The state of a half from its first turn to its last.
pub(crate) struct Seat<S> {
    /// For the turns alone, which follow each other. Nothing before the first, and once the half is over.
    state: Mutex<Option<S>>,
    rung: Rung,
}

impl<S> Seat<S> {
    pub(crate) fn new() -> Self {
        Seat {
            state: Mutex::new(None),
            rung: Rung::new(),
        }
    }

    /// Gives the half what it has turns with. The caller rings for the first one.
    pub(crate) fn take(&self, state: S) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
    }

    /// Notes a ring. True for the first one, which is to bring a turn.
    pub(crate) fn ring(&self) -> bool {
        self.rung.ring()
    }

    /// A turn. If it is the last one, by its word or by a panic, the state leaves the seat.
    pub(crate) fn turn(
        &self,
        serve: impl FnOnce(&mut S) -> Poll<()>,
    ) -> Option<(S, Result<(), Panicked>)> {
        self.rung.begin_turn();
        let mut seat = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = seat.as_mut()?;
        let served = match attempt(|| serve(state)) {
            Ok(Poll::Pending) => return None,
            Ok(Poll::Ready(())) => Ok(()),
            Err(panicked) => Err(panicked),
        };
        seat.take().map(|state| (state, served))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_stays_until_its_last_turn() {
        let seat = Seat::new();
        assert!(seat.turn(|_: &mut i32| Poll::Ready(())).is_none());
        seat.take(1);
        assert!(seat.ring());
        assert!(!seat.ring());
        let pending = seat.turn(|state| {
            *state += 1;
            Poll::Pending
        });
        assert_eq!(None, pending);
        assert!(seat.ring());
        assert_eq!(Some((2, Ok(()))), seat.turn(|_| Poll::Ready(())));
        assert_eq!(None, seat.turn(|_| Poll::Ready(())));
    }

    #[test]
    fn a_panic_ends_the_turns_and_leaves_the_state() {
        let seat = Seat::new();
        seat.take(1);
        assert_eq!(
            Some((1, Err(Panicked))),
            seat.turn(|_| panic!("on purpose"))
        );
        assert_eq!(None, seat.turn(|_| Poll::Ready(())));
    }
}
