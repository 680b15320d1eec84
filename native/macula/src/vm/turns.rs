//! Work in turns. What waits for something most of the time needs no task for it: a task of the runtime gives turns to
//! all that was rung for, and between two turns each is its state alone.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::task::{RawWaker, RawWakerVTable, Waker};

use crate::vm::sync::atomic::{AtomicBool, Ordering};

/// Which half of a stream has the turn. Each has turns of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    Sending,
    Receiving,
}

pub(crate) trait Turns: Send + Sync + 'static {
    /// Has the half have a turn, once for all rings before that. From any thread; waits for nothing.
    fn ring(self: Arc<Self>, half: Half);

    /// Does what there is to do, in a thread of the runtime, and never twice at a time. Keeps its panics to itself.
    fn turn(self: Arc<Self>, half: Half);
}

/// Whether a half was rung for, and has not had its turn.
pub(crate) struct Rung(AtomicBool);

impl Rung {
    pub(crate) fn new() -> Self {
        Rung(AtomicBool::new(false))
    }

    /// Notes a ring. True for the first one, which is to bring a turn.
    pub(crate) fn ring(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// The turn begins, before it looks at anything: what comes after is a ring of its own.
    pub(crate) fn begin_turn(&self) {
        self.0.swap(false, Ordering::AcqRel);
    }
}

/// What rings for a half. Has no memory of its own.
pub(crate) fn waker<T: Turns>(turns: Arc<T>, half: Half) -> Waker {
    let table = match half {
        Half::Sending => &Table::<T>::SENDING,
        Half::Receiving => &Table::<T>::RECEIVING,
    };
    let raw = RawWaker::new(Arc::into_raw(turns).cast(), table);
    // SAFETY: what is behind the table takes the pointer for that of an `Arc<T>`, as it is, and owns one count of it;
    // `T` may be used by any thread.
    unsafe { Waker::from_raw(raw) }
}

struct Table<T>(T);

impl<T: Turns> Table<T> {
    const SENDING: RawWakerVTable = table::<T>(
        |turns| clone::<T>(turns, &Self::SENDING),
        |turns| unsafe { Arc::<T>::from_raw(turns.cast()) }.ring(Half::Sending),
        |turns| borrowed::<T>(turns).ring(Half::Sending),
    );
    const RECEIVING: RawWakerVTable = table::<T>(
        |turns| clone::<T>(turns, &Self::RECEIVING),
        |turns| unsafe { Arc::<T>::from_raw(turns.cast()) }.ring(Half::Receiving),
        |turns| borrowed::<T>(turns).ring(Half::Receiving),
    );
}

const fn table<T: Turns>(
    clone: unsafe fn(*const ()) -> RawWaker,
    wake: unsafe fn(*const ()),
    wake_by_ref: unsafe fn(*const ()),
) -> RawWakerVTable {
    RawWakerVTable::new(clone, wake, wake_by_ref, |turns| {
        // SAFETY: as in `waker`.
        drop(unsafe { Arc::<T>::from_raw(turns.cast()) });
    })
}

fn clone<T: Turns>(turns: *const (), table: &'static RawWakerVTable) -> RawWaker {
    RawWaker::new(Arc::into_raw(borrowed::<T>(turns)).cast(), table)
}

/// A count more.
fn borrowed<T: Turns>(turns: *const ()) -> Arc<T> {
    // SAFETY: as in `waker`; the count that this pointer stands for stays.
    let own = ManuallyDrop::new(unsafe { Arc::<T>::from_raw(turns.cast()) });
    Arc::clone(&own)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Rings(Mutex<Vec<Half>>);

    impl Turns for Rings {
        fn ring(self: Arc<Self>, half: Half) {
            self.0.lock().expect("a lock").push(half);
        }

        fn turn(self: Arc<Self>, _half: Half) {}
    }

    #[test]
    fn a_waker_rings_for_its_half_and_keeps_one_count() {
        let rings = Arc::new(Rings::default());
        let reader = waker(rings.clone(), Half::Receiving);
        let writer = waker(rings.clone(), Half::Sending);
        let another = writer.clone();
        assert_eq!(4, Arc::strong_count(&rings));
        reader.wake_by_ref();
        another.wake();
        assert_eq!(3, Arc::strong_count(&rings));
        writer.wake_by_ref();
        drop((reader, writer));
        assert_eq!(1, Arc::strong_count(&rings));
        let rung = rings.0.lock().expect("a lock").clone();
        assert_eq!(vec![Half::Receiving, Half::Sending, Half::Sending], rung);
    }
}
