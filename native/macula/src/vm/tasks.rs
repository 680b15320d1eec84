//! Tasks that fail alone.
//!
//! A panic unwinds the task it happens in, and the runtime tells nobody. So what a task does is run
//! contained, and the task itself outlives its panic to tell those that depend on it.
//!
//! A lock that a thread holds when it begins to panic is poisoned, unless the thread took the lock while it
//! unwound already. Quinn unwraps its locks, in destructors too, where a second panic while the first one
//! unwinds ends the VM. So the native threads work behind a panic of their own that never ends its unwinding:
//! no panic of theirs poisons a lock, and what Quinn drops meanwhile takes its locks as ever.

use std::cell::Cell;
use std::io::Write;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::panic::{self, AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::Once;
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
        // A panic that the runtime has caught in another task is over.
        PANICKING.set(false);
        match attempt(|| future.poll(cx)) {
            Ok(polled) => polled.map(Ok),
            Err(panicked) => Poll::Ready(Err(panicked)),
        }
    }
}

/// The same for what does not wait.
pub(crate) fn attempt<T>(act: impl FnOnce() -> T) -> Result<T, Panicked> {
    // A destructor tries something while a panic unwinds: that one goes on whatever becomes of the try.
    let before = PANICKING.get();
    catch_unwind(AssertUnwindSafe(act)).map_err(|_| {
        PANICKING.set(before);
        Panicked
    })
}

thread_local! {
    /// This thread works behind a panic.
    static BEHIND: Cell<bool> = const { Cell::new(false) };
    /// It has begun another one, and nothing of ours has caught that.
    static PANICKING: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic unwinds this thread. To be asked instead of `std::thread::panicking`, which says so
/// always on a thread that works behind a panic.
pub(crate) fn is_panicking() -> bool {
    std::thread::panicking() && (PANICKING.get() || !BEHIND.get())
}

/// Does the work of a thread behind a panic, so that no other panic poisons a lock.
pub(crate) fn work_unpoisoned(work: impl FnOnce()) {
    struct Work<F: FnOnce()>(Option<F>);

    impl<F: FnOnce()> Drop for Work<F> {
        fn drop(&mut self) {
            if let Some(work) = self.0.take() {
                work();
            }
        }
    }

    listen_for_panics();
    BEHIND.set(true);
    let _ = catch_unwind(AssertUnwindSafe(|| {
        let _work = Work(Some(work));
        // Nobody hears of this one.
        resume_unwind(Box::new(()));
    }));
}

/// Notes that a panic has begun. Behind a panic the standard report would be that of a panic
/// within a panic, with a whole backtrace, which takes a second to make: there the report is a short one.
fn listen_for_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            PANICKING.set(true);
            if BEHIND.get() {
                let thread = std::thread::current();
                let name = thread.name().unwrap_or_default();
                // Nobody may read it.
                let _ = writeln!(std::io::stderr(), "thread '{name}' {panic}");
            } else {
                report(panic);
            }
        }));
    });
}

/// Something of Quinn's whose destructor panics where Quinn has panicked before. A second panic while
/// the first one unwinds would end the VM.
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

/// Whether one of Quinn's drivers has panicked.
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

/// A driver as Quinn spawns them.
pub(crate) type Driving = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs one of Quinn's drivers.
pub(crate) async fn drive(driver: impl Future<Output = ()>, fate: &Fate) {
    if contain(driver).await.is_err() {
        fate.fail();
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

    /// As Quinn's driver of an endpoint is.
    struct Locked<'l>(&'l std::sync::Mutex<u32>);

    impl Drop for Locked<'_> {
        fn drop(&mut self) {
            *self.0.lock().expect("not poisoned") += 1;
        }
    }

    #[test]
    fn a_panic_of_a_native_thread_poisons_no_lock() {
        let lock = std::sync::Mutex::new(0);
        let work = || {
            assert!(!is_panicking());
            let ended = attempt(|| {
                let _driver = Locked(&lock);
                let _guard = lock.lock().expect("not poisoned");
                panic!("on purpose");
            });
            assert_eq!(Err::<(), _>(Panicked), ended);
            assert!(!is_panicking());
        };
        std::thread::scope(|scope| {
            let joined = scope.spawn(|| work_unpoisoned(work)).join();
            assert!(joined.is_ok());
        });
        assert_eq!(1, *lock.lock().expect("not poisoned"));
    }

    #[test]
    fn what_is_dropped_knows_of_the_panic_that_drops_it() {
        struct Seen<'s>(&'s AtomicBool);

        impl Drop for Seen<'_> {
            fn drop(&mut self) {
                // A destructor of its own panics, and is contained.
                drop(Held::new(Failing));
                self.0.store(is_panicking(), Ordering::Relaxed);
            }
        }

        struct Failing;

        impl Drop for Failing {
            fn drop(&mut self) {
                panic!("on purpose");
            }
        }

        for behind in [false, true] {
            let [panicked, ended] = [const { AtomicBool::new(false) }; 2];
            let work = || {
                let _ = attempt(|| {
                    let _seen = Seen(&panicked);
                    panic!("on purpose");
                });
                drop(Seen(&ended));
            };
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    if behind {
                        work_unpoisoned(work);
                    } else {
                        work();
                    }
                });
            });
            assert!(panicked.into_inner());
            assert!(!ended.into_inner());
        }
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
