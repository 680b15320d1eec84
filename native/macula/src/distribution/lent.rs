//! What a task of the native thread lends to processes. Neither side waits for the other: a process that finds
//! it taken leaves its work to the task, and a task that finds it taken is rung when it is free.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, PoisonError};

use crate::vm::bell::Bell;
use crate::vm::locks::try_lock;
use crate::vm::sync::atomic::{AtomicBool, Ordering};
use crate::vm::sync::{Mutex, MutexGuard};

pub(crate) struct Lent<T> {
    value: Mutex<T>,
    over: Over,
}

/// What the end of a loan is about.
struct Over {
    /// The task found it taken, and is to be rung.
    passed: AtomicBool,
    task: Arc<Bell>,
}

impl<T> Lent<T> {
    pub(crate) fn new(value: T, task: Arc<Bell>) -> Self {
        Lent {
            value: Mutex::new(value),
            over: Over {
                passed: AtomicBool::new(false),
                task,
            },
        }
    }

    /// For the task, where it is at its beginning or its end. Waits.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the task. Where a process has it, the bell rings when it is free.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        try_lock(&self.value).or_else(|| {
            self.over.passed.store(true, Ordering::SeqCst);
            // Whoever had it may have looked before that.
            try_lock(&self.value)
        })
    }

    /// For a process, where nobody has it.
    pub(crate) fn borrow(&self) -> Option<Loan<'_, T>> {
        try_lock(&self.value).map(|value| Loan {
            value,
            _end: End(&self.over),
        })
    }
}

/// In the hands of a process.
pub(crate) struct Loan<'l, T> {
    // Free before its end is told: fields are dropped in this order.
    value: MutexGuard<'l, T>,
    _end: End<'l>,
}

impl<T> Deref for Loan<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Loan<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

struct End<'l>(&'l Over);

impl Drop for End<'_> {
    fn drop(&mut self) {
        if self.0.passed.swap(false, Ordering::SeqCst) {
            self.0.task.ring();
        }
    }
}
