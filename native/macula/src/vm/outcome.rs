//! What becomes of an operation: it is answered or given up, whichever comes first.

use std::sync::PoisonError;

use tokio::sync::Notify;

use crate::vm::sync::{Mutex, MutexGuard};

#[derive(PartialEq, Eq, Clone, Copy)]
enum State {
    Pending,
    Answered,
    Cancelled,
}

pub(crate) struct Outcome {
    state: Mutex<State>,
    given_up: Notify,
}

impl Outcome {
    pub(crate) fn new() -> Self {
        Outcome {
            state: Mutex::new(State::Pending),
            given_up: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `false` if it is answered already: then the answer is out.
    pub(crate) fn cancel(&self) -> bool {
        let mut state = self.lock();
        if *state == State::Answered {
            return false;
        }
        *state = State::Cancelled;
        drop(state);
        self.given_up.notify_one();
        true
    }

    /// Answers by `act`. Nothing if that was done before, or nobody waits any more.
    pub(crate) fn answer<T>(&self, act: impl FnOnce() -> T) -> Option<T> {
        let mut state = self.lock();
        if *state != State::Pending {
            return None;
        }
        let result = act();
        // Only now: where `act` panics the caller is still to be answered.
        *state = State::Answered;
        Some(result)
    }

    /// The caller is told in another way.
    pub(crate) fn forget(&self) {
        *self.lock() = State::Answered;
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        *self.lock() == State::Cancelled
    }

    /// Hears of it from now on.
    pub(crate) fn given_up(&self) -> impl Future<Output = ()> + Send + '_ {
        self.given_up.notified()
    }
}
