//! What a process may do while it is at the driver of a connection: a scheduler is not to be kept.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

/// Send calls one visit of a process may make.
const INLINE_SENDS: usize = 2;

thread_local! {
    /// On a thread of the VM during a visit: the send calls that are left.
    static SENDS_LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// A process has visited a driver since the watch looked last.
static VISITED: AtomicBool = AtomicBool::new(false);

/// A process is at a driver.
pub(crate) fn note_visit() {
    VISITED.store(true, Ordering::Relaxed);
}

/// Whether processes send.
pub(crate) fn has_visited() -> bool {
    VISITED.load(Ordering::Relaxed)
}

/// Begins to ask anew whether processes send.
pub(crate) fn forget_visits() {
    VISITED.store(false, Ordering::Relaxed);
}

/// A limit on the send calls of a visit, until it is dropped.
pub(crate) struct Limit;

impl Limit {
    pub(crate) fn set() -> Self {
        SENDS_LEFT.set(Some(INLINE_SENDS));
        Limit
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        SENDS_LEFT.set(None);
    }
}

/// Whether this is a visit from a process.
pub(crate) fn is_visit() -> bool {
    SENDS_LEFT.get().is_some()
}

/// Counts a send call of a visit. False when there have been enough of them.
pub(crate) fn may_send() -> bool {
    match SENDS_LEFT.get() {
        None => true,
        Some(0) => false,
        Some(left) => {
            SENDS_LEFT.set(Some(left - 1));
            true
        }
    }
}
