//! Waking a native task from a thread of the VM.
//!
//! To wake a task from outside of its runtime takes locks that the runtime's own threads use all the
//! time. Where processors are few, one of those may have lost its processor with such a lock in hand,
//! and a scheduler of the VM would wait until it runs again: milliseconds. So whoever rings a bell
//! leaves it in a queue without locks, and a task of the runtime rings it there. Only a ring that
//! finds that task asleep wakes it from outside, when nobody else is at work.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};

use crate::vm::runtime;

/// Rings that are passed on before other tasks have their turn.
const TURN: usize = 64;

/// What one task of one of the runtimes waits for.
pub(crate) struct Bell {
    notify: Notify,
    /// Rung, and not yet passed on.
    rung: AtomicBool,
    queue: &'static Queue,
}

impl Bell {
    /// Of a task of `macula_quic`.
    pub(crate) fn quic() -> Arc<Self> {
        static QUEUE: OnceLock<Queue> = OnceLock::new();
        Self::new(QUEUE.get_or_init(|| Queue::new(runtime::quic())))
    }

    /// Of a task of the distribution.
    pub(crate) fn dist() -> Arc<Self> {
        static QUEUE: OnceLock<Queue> = OnceLock::new();
        Self::new(QUEUE.get_or_init(|| Queue::new(runtime::dist())))
    }

    fn new(queue: &'static Queue) -> Arc<Self> {
        Arc::new(Bell {
            notify: Notify::new(),
            rung: AtomicBool::new(false),
            queue,
        })
    }

    /// Wakes the task, now or when it waits next. Waits for nothing.
    pub(crate) fn ring(self: &Arc<Self>) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // Fails only when the runtime is gone, and the task with it.
            let _ = self.queue.0.send(self.clone());
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

/// Rings on their way into a runtime. No bell is in it twice, which bounds it.
struct Queue(mpsc::UnboundedSender<Arc<Bell>>);

impl Queue {
    fn new(runtime: &Handle) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        runtime.spawn(pass_on(receiver));
        Queue(sender)
    }
}

async fn pass_on(mut rings: mpsc::UnboundedReceiver<Arc<Bell>>) {
    let mut bells = Vec::with_capacity(TURN);
    while rings.recv_many(&mut bells, TURN).await > 0 {
        for bell in bells.drain(..) {
            // Before the task looks: what comes after is a ring of its own.
            bell.rung.swap(false, Ordering::AcqRel);
            bell.ring_here();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_never_lost() {
        let bell = Bell::quic();
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
