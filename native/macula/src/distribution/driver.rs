//! Connections that can be driven from two places.
//!
//! Where a task alone drives a connection, a process that sends wakes the native thread, and that
//! thread sends. For a small message the wake-up costs more than the sending. So the stepper of
//! each link is kept where the process that sends can use it too: the packet has left when the call
//! returns. Only when the native thread is not at it, and only so much at a time that the scheduler
//! is not kept: the rest is left to the native thread.

use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use super::visit::{Limit, note_visit};
use crate::engine::transport::{Hold, Stepper};
use crate::vm::bell::Bell;
use crate::vm::locks::try_lock;
use crate::vm::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::vm::sync::{Mutex, MutexGuard};
use crate::vm::tasks::Fate;

/// The driver of one connection.
pub(crate) struct Driver {
    /// Empty once the connection is over.
    stepper: Mutex<Option<Stepper>>,
    wakes: Arc<Wakes>,
    hold: Hold,
}

/// Who is told when the driver has something to do.
struct Wakes {
    task: Arc<Bell>,
    /// Processes that poll the driver right now, or have just done so, and look at `again` after that.
    inline: AtomicUsize,
    /// The driver has something to do.
    again: AtomicBool,
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.again.store(true, Ordering::SeqCst);
        if self.inline.load(Ordering::SeqCst) == 0 {
            self.task.ring_here();
        }
    }
}

impl Driver {
    /// Drives a connection from now on.
    pub(crate) fn spawn(stepper: Stepper) -> Arc<Self> {
        let wakes = Arc::new(Wakes {
            task: crate::vm::runtime::dist().bell(),
            inline: AtomicUsize::new(0),
            again: AtomicBool::new(false),
        });
        let driver = Arc::new(Self {
            hold: stepper.hold(),
            stepper: Mutex::new(Some(stepper)),
            wakes,
        });
        let task = driver.clone();
        crate::vm::runtime::dist().spawn(async move {
            task.wakes.task.ring_here();
            loop {
                task.wakes.task.rung().await;
                if task.run() {
                    return;
                }
            }
        });
        driver
    }

    /// Polls on the native thread. True when the connection is over. The thread serves all links: it
    /// waits for no process that the system has taken off its processor in the middle of a visit.
    fn run(&self) -> bool {
        loop {
            if let Some(mut stepper) = try_lock(&self.stepper) {
                return step(&mut stepper, &self.wakes, |stepper, cx| stepper.step(cx));
            }
            self.wakes.again.store(true, Ordering::SeqCst);
            if self.wakes.inline.load(Ordering::SeqCst) > 0 {
                // The visit rings at its end.
                return false;
            }
        }
    }

    /// Sends what there is to send, now. To be called on the native thread.
    pub(crate) fn send_now(&self) {
        if self.run() {
            // The task has to know.
            self.wakes.task.ring_here();
        }
    }

    pub(crate) fn fate(&self) -> &Fate {
        self.hold.fate()
    }

    /// Ends a connection that nothing is left to do for. To be called on the native thread.
    pub(crate) fn abandon(&self) {
        if let Some(mut stepper) = try_lock(&self.stepper) {
            *stepper = None;
        }
        self.wakes.task.ring_here();
    }

    /// Takes the driver for a visit from a process, unless somebody is at it or the native thread is
    /// about to be: what has arrived meanwhile is for that thread to deal with.
    pub(crate) fn visit(&self) -> Option<Visit<'_>> {
        if self.wakes.again.load(Ordering::SeqCst) {
            return None;
        }
        // Counted before the lock is taken: whoever finds it taken finds the visit.
        self.wakes.inline.fetch_add(1, Ordering::SeqCst);
        let visit = Visit {
            stepper: try_lock(&self.stepper),
            wakes: &self.wakes,
        };
        note_visit();
        visit.stepper.is_some().then_some(visit)
    }
}

/// Moves a connection on. True when the connection is over.
fn step(
    place: &mut Option<Stepper>,
    wakes: &Arc<Wakes>,
    act: impl FnOnce(&Stepper, &mut Context<'_>) -> Poll<()>,
) -> bool {
    wakes.again.store(false, Ordering::SeqCst);
    let waker = Waker::from(wakes.clone());
    let over = match place {
        Some(stepper) => act(stepper, &mut Context::from_waker(&waker)).is_ready(),
        None => true,
    };
    if over {
        *place = None;
    }
    over
}

/// A process at the driver.
pub(crate) struct Visit<'a> {
    /// Empty at its end.
    stepper: Option<MutexGuard<'a, Option<Stepper>>>,
    wakes: &'a Arc<Wakes>,
}

impl Visit<'_> {
    /// Sends what there is to send, up to a limit.
    pub(crate) fn drive(&mut self) {
        if let Some(stepper) = &mut self.stepper {
            let _limit = Limit::set();
            step(stepper, self.wakes, |stepper, cx| {
                stepper.try_step(cx).unwrap_or_else(|| {
                    // Somebody looks at the connection: the native thread goes on.
                    cx.waker().wake_by_ref();
                    Poll::Pending
                })
            });
        }
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let over = self.stepper.take().is_some_and(|stepper| stepper.is_none());
        self.wakes.inline.fetch_sub(1, Ordering::SeqCst);
        // Whatever was woken meanwhile is the native thread's.
        if over || self.wakes.again.load(Ordering::SeqCst) {
            self.wakes.task.ring();
        }
    }
}
