//! What others leave for whoever drives a connection or an endpoint. The lock is held for a push or a pop
//! alone, and an empty inbox has no memory of its own.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::task::Waker;

use crate::vm::sync::{Mutex, MutexGuard};

pub(super) struct Inbox<T>(Mutex<Inner<T>>);

struct Inner<T> {
    waiting: VecDeque<T>,
    /// Of the driver; taken by the first that wakes it.
    waker: Option<Waker>,
}

impl<T> Inbox<T> {
    pub(super) fn new() -> Self {
        Inbox(Mutex::new(Inner {
            waiting: VecDeque::new(),
            waker: None,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, item: T) {
        let mut inner = self.lock();
        inner.waiting.push_back(item);
        wake(inner);
    }

    /// As `push`, unless so many wait already.
    pub(super) fn push_within(&self, item: T, limit: usize) {
        let mut inner = self.lock();
        if inner.waiting.len() < limit {
            inner.waiting.push_back(item);
        }
        wake(inner);
    }

    /// Has the driver look, though nothing is left for it.
    pub(super) fn wake(&self) {
        wake(self.lock());
    }

    /// The driver wants to be woken from now on. To be said before it looks.
    pub(super) fn listen(&self, waker: &Waker) {
        let mut inner = self.lock();
        if !inner.waker.as_ref().is_some_and(|w| w.will_wake(waker)) {
            inner.waker = Some(waker.clone());
        }
    }

    pub(super) fn pop(&self) -> Option<T> {
        let mut inner = self.lock();
        let item = inner.waiting.pop_front();
        if inner.waiting.is_empty() {
            inner.waiting = VecDeque::new();
        }
        item
    }
}

/// Not under the lock: a waker may do anything.
fn wake<T>(mut inner: MutexGuard<'_, Inner<T>>) {
    let waker = inner.waker.take();
    drop(inner);
    if let Some(waker) = waker {
        waker.wake();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_first_of_a_burst_wakes_the_driver_and_an_empty_inbox_has_no_memory() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let inbox = Inbox::new();
        inbox.push(1);
        inbox.listen(&Waker::from(count.clone()));
        inbox.push(2);
        inbox.push_within(3, 3);
        inbox.push_within(4, 3);
        assert_eq!(1, count.0.load(Ordering::Relaxed));
        let taken: Vec<_> = std::iter::from_fn(|| inbox.pop()).collect();
        assert_eq!(vec![1, 2, 3], taken);
        assert_eq!(0, inbox.lock().waiting.capacity());
        inbox.listen(&Waker::from(count.clone()));
        inbox.wake();
        inbox.wake();
        assert_eq!(2, count.0.load(Ordering::Relaxed));
    }
}
