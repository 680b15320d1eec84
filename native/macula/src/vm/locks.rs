//! Locks that outlive a panic of whoever held them.

use std::sync::TryLockError;

use crate::vm::sync::{Mutex, MutexGuard};

/// Takes a lock that nobody holds. Waits for nothing.
pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}
