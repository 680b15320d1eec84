//! Tasks that fail alone.
//!
//! A panic unwinds the task it happens in, and the runtime tells nobody. So what a task does is run
//! contained, and the task itself outlives its panic to tell those that depend on it. Locks outlive the panic
//! of whoever holds them: none of ours is refused for being poisoned.

use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::Notify;

/// The pause before a task begins anew, and how far it grows where the task fails again and again.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What was run has panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Panicked;

/// Runs a future to its end, or to its panic. What the future borrowed can be used after that; what it
/// owned is dropped.
pub(crate) fn contain<F: Future>(future: F) -> Contained<F> {
    Contained(future)
}

/// Written out, as an `async` function would keep room for the future twice, and a stream has two of them.
#[must_use]
pub(crate) struct Contained<F>(F);

impl<F: Future> Future for Contained<F> {
    type Output = Result<F::Output, Panicked>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // SAFETY: the future is pinned with this, is moved by nobody, and has no other way out.
        let future = unsafe { self.map_unchecked_mut(|contained| &mut contained.0) };
        match attempt(|| future.poll(cx)) {
            Ok(polled) => polled.map(Ok),
            Err(panicked) => Poll::Ready(Err(panicked)),
        }
    }
}

/// The same for what does not wait.
pub(crate) fn attempt<T>(act: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(act)).map_err(|_| Panicked)
}

/// Something of QUIC whose destructor is not trusted: a second panic while a first one unwinds would end the
/// VM.
pub(crate) struct Held<T>(ManuallyDrop<T>);

impl<T> Held<T> {
    pub(crate) fn new(value: T) -> Self {
        Held(ManuallyDrop::new(value))
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Held<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        // SAFETY: dropped here alone, and not used after it.
        let _ = attempt(|| unsafe { ManuallyDrop::drop(&mut self.0) });
    }
}

/// Whether the driving of a connection, or of an endpoint, has panicked.
#[derive(Debug, Default)]
pub(crate) struct Fate {
    failed: AtomicBool,
    told: Notify,
}

impl Fate {
    pub(crate) fn fail(&self) {
        self.failed.store(true, Ordering::Release);
        self.told.notify_waiters();
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Completes when the driver has panicked, if ever.
    pub(crate) async fn failed(&self) {
        loop {
            let told = self.told.notified();
            if self.has_failed() {
                return;
            }
            told.await;
        }
    }
}

/// Runs what serves many, and begins anew after a panic: those many must not lose what serves them.
pub(crate) async fn keep_up<F: Future<Output = ()>>(mut begin: impl FnMut() -> F) {
    let mut pause = FIRST_PAUSE;
    while contain(begin()).await.is_err() {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build();
        runtime.expect("a runtime").block_on(future)
    }

    #[test]
    fn a_panic_is_an_answer_and_leaves_what_was_borrowed() {
        let mut kept = vec![1];
        let ended = block_on(contain(async {
            kept.push(2);
            tokio::task::yield_now().await;
            assert!(kept.is_empty(), "on purpose");
        }));
        assert_eq!(Err(Panicked), ended);
        assert_eq!(vec![1, 2], kept);
        assert_eq!(Ok(5), block_on(contain(async { 5 })));
        assert_eq!(Ok(5), attempt(|| 5));
        assert_eq!(Err(Panicked), attempt(|| panic!("on purpose")));
    }

    #[test]
    fn what_serves_many_begins_anew_until_it_ends() {
        let runs = AtomicU32::new(0);
        block_on(keep_up(|| async {
            assert!(runs.fetch_add(1, Ordering::Relaxed) >= 2, "on purpose");
        }));
        assert_eq!(3, runs.load(Ordering::Relaxed));
    }
}
