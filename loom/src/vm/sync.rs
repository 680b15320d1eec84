//! In place of the library's `vm::sync`: the same of loom's types.

use std::ops::{Deref, DerefMut};
use std::sync::{LockResult, PoisonError, TryLockError, TryLockResult};

use loom::sync::atomic::AtomicUsize;
use loom::sync::atomic::Ordering::Relaxed;

/// Time stands still.
#[derive(Clone, Copy)]
pub(crate) struct Instant;

impl Instant {
    pub(crate) fn now() -> Self {
        Instant
    }

    pub(crate) fn elapsed(&self) -> std::time::Duration {
        std::time::Duration::ZERO
    }
}

pub(crate) struct Mutex<T> {
    /// Loom does not try a lock just before it is free unless its release is an access to something.
    ends: AtomicUsize,
    inner: loom::sync::Mutex<T>,
}

pub(crate) struct MutexGuard<'m, T> {
    ends: &'m AtomicUsize,
    inner: loom::sync::MutexGuard<'m, T>,
}

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Mutex {
            ends: AtomicUsize::new(0),
            inner: loom::sync::Mutex::new(value),
        }
    }

    #[track_caller]
    pub(crate) fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        match self.inner.lock() {
            Ok(inner) => Ok(self.guard(inner)),
            Err(poisoned) => Err(PoisonError::new(self.guard(poisoned.into_inner()))),
        }
    }

    #[track_caller]
    pub(crate) fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
        self.ends.fetch_add(0, Relaxed);
        match self.inner.try_lock() {
            Ok(inner) => Ok(self.guard(inner)),
            Err(TryLockError::WouldBlock) => Err(TryLockError::WouldBlock),
            Err(TryLockError::Poisoned(poisoned)) => Err(TryLockError::Poisoned(PoisonError::new(
                self.guard(poisoned.into_inner()),
            ))),
        }
    }

    fn guard<'m>(&'m self, inner: loom::sync::MutexGuard<'m, T>) -> MutexGuard<'m, T> {
        MutexGuard {
            ends: &self.ends,
            inner,
        }
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.ends.fetch_add(1, Relaxed);
        }
    }
}

pub(crate) mod atomic {
    use loom::sync::atomic::fence;

    pub(crate) use std::sync::atomic::Ordering;

    /// Loom takes SeqCst for AcqRel, and knows it of fences alone.
    fn ordered<T>(order: Ordering, act: impl FnOnce() -> T) -> T {
        if order != Ordering::SeqCst {
            return act();
        }
        fence(order);
        let result = act();
        fence(order);
        result
    }

    pub(crate) struct AtomicBool(loom::sync::atomic::AtomicBool);

    impl AtomicBool {
        pub(crate) fn new(value: bool) -> Self {
            AtomicBool(loom::sync::atomic::AtomicBool::new(value))
        }

        #[track_caller]
        pub(crate) fn load(&self, order: Ordering) -> bool {
            ordered(order, || self.0.load(order))
        }

        #[track_caller]
        pub(crate) fn store(&self, value: bool, order: Ordering) {
            ordered(order, || self.0.store(value, order));
        }

        #[track_caller]
        pub(crate) fn swap(&self, value: bool, order: Ordering) -> bool {
            ordered(order, || self.0.swap(value, order))
        }
    }

    pub(crate) struct AtomicUsize(loom::sync::atomic::AtomicUsize);

    impl AtomicUsize {
        pub(crate) fn new(value: usize) -> Self {
            AtomicUsize(loom::sync::atomic::AtomicUsize::new(value))
        }

        #[track_caller]
        pub(crate) fn load(&self, order: Ordering) -> usize {
            ordered(order, || self.0.load(order))
        }

        #[track_caller]
        pub(crate) fn fetch_add(&self, n: usize, order: Ordering) -> usize {
            ordered(order, || self.0.fetch_add(n, order))
        }

        #[track_caller]
        pub(crate) fn fetch_sub(&self, n: usize, order: Ordering) -> usize {
            ordered(order, || self.0.fetch_sub(n, order))
        }
    }
}
