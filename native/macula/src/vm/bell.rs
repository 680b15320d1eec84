//! Waking a native task from a thread of the VM.
//!
//! To wake a task from outside of its runtime takes locks that the runtime's own threads use all the
//! time. Where processors are few, one of those may have lost its processor with such a lock in hand,
//! and a scheduler of the VM would wait until it runs again: milliseconds. So whoever rings a bell
//! leaves it in a queue without locks, and a task of the runtime rings it there. Only a ring that
//! finds that task asleep wakes it from outside, when nobody else is at work.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};

use crate::vm::fault::{self, Point};
use crate::vm::sync::Instant;
use crate::vm::sync::atomic::{AtomicBool, Ordering};
use crate::vm::tasks::contain;
use crate::vm::turns::{Half, Turns};

/// Rings that are passed on before other tasks have their turn.
const TURN: usize = 64;
/// So long turns follow each other before other tasks have theirs, one turn longer at most.
const TURNS: Duration = Duration::from_micros(200);

/// What one task of a runtime waits for.
pub(crate) struct Bell {
    notify: Notify,
    /// Rung, and not yet passed on.
    rung: AtomicBool,
    queue: Queue,
}

impl Bell {
    /// Wakes the task, now or when it waits next. Waits for nothing.
    pub(crate) fn ring(self: &Arc<Self>) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            self.queue.put(Errand::Ring(self.clone()));
        }
    }

    /// The same from a thread of the runtime.
    pub(crate) fn ring_here(&self) {
        self.notify.notify_one();
    }

    pub(crate) async fn rung(&self) {
        self.notify.notified().await;
    }
}

/// What a thread of the VM leaves for a runtime.
enum Errand {
    Ring(Arc<Bell>),
    Turn(Arc<dyn Turns>, Half),
    Run(Box<dyn FnOnce() + Send>),
}

/// Errands on their way into a runtime, without locks. No bell is in it twice; work is that of calls, whose
/// callers mostly wait for it, and is done in the runtime's next turn.
#[derive(Clone)]
pub(crate) struct Queue(mpsc::UnboundedSender<Errand>);

impl Queue {
    /// Of the runtime. To be made once for each.
    pub(crate) fn new(runtime: &Handle) -> Self {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        runtime.spawn(async move {
            let mut turn = Vec::with_capacity(TURN);
            // All tasks depend on this one.
            while contain(pass_on(&mut receiver, &mut turn)).await.is_err() {}
        });
        Queue(sender)
    }

    /// What one task of the runtime waits for.
    pub(crate) fn bell(&self) -> Arc<Bell> {
        Arc::new(Bell {
            notify: Notify::new(),
            rung: AtomicBool::new(false),
            queue: self.clone(),
        })
    }

    /// Has a short piece of work done by the runtime, in turn with the rings. Waits for nothing.
    pub(crate) fn run(&self, work: impl FnOnce() + Send + 'static) {
        self.put(Errand::Run(Box::new(work)));
    }

    /// Gives a turn, in order with the rings. Waits for nothing.
    pub(crate) fn turn(&self, turns: Arc<dyn Turns>, half: Half) {
        self.put(Errand::Turn(turns, half));
    }

    fn put(&self, errand: Errand) {
        // Fails only when the runtime is gone, and all of its tasks.
        let _ = self.0.send(errand);
    }
}

/// Passes on what is left of a turn, the last one first, then what comes.
async fn pass_on(errands: &mut mpsc::UnboundedReceiver<Errand>, turn: &mut Vec<Errand>) {
    loop {
        let mut begun = None;
        while let Some(errand) = turn.last() {
            fault::pass(Point::Bell);
            if let Errand::Ring(bell) = errand {
                // Before the task looks: what comes after is a ring of its own.
                bell.rung.swap(false, Ordering::AcqRel);
                bell.ring_here();
            }
            match turn.pop() {
                Some(Errand::Run(work)) => work(),
                Some(Errand::Turn(turns, half)) => {
                    let since = *begun.get_or_insert_with(Instant::now);
                    turns.turn(half);
                    if since.elapsed() > TURNS {
                        begun = None;
                        give_way().await;
                    }
                }
                Some(Errand::Ring(_)) | None => {}
            }
        }
        if begun.is_some() && !errands.is_empty() {
            give_way().await;
        }
        if errands.recv_many(turn, TURN).await == 0 {
            return;
        }
        turn.reverse();
    }
}

/// Lets the other tasks that are woken have their turn.
async fn give_way() {
    let mut has_given = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut has_given, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::vm::runtime;

    #[test]
    fn a_ring_is_never_lost() {
        let bell = runtime::quic().bell();
        let (done, finished) = std::sync::mpsc::channel();
        let waiter = bell.clone();
        let rings = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let seen = rings.clone();
        runtime::quic().spawn(async move {
            // Each ring is answered before the next: one that is lost stops everything.
            for expected in 1..=10_000 {
                while seen.load(Ordering::SeqCst) < expected {
                    waiter.rung().await;
                }
                let _ = done.send(());
            }
        });
        for _ in 0..10_000 {
            rings.fetch_add(1, Ordering::SeqCst);
            bell.ring();
            let answered = finished.recv_timeout(std::time::Duration::from_secs(10));
            assert_eq!(Ok(()), answered);
        }
    }
}
