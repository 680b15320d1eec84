//! One worker, which is the thread that calls `run`.

use std::future::Future;
use std::sync::Arc;

use tokio::runtime::{Handle, Outside};

use crate::vm::bell::{Bell, Queue};

loom::lazy_static! {
    static ref DIST: Worker = Worker::new();
}

pub(crate) struct Worker {
    handle: Handle,
    errands: Queue,
}

pub(crate) fn dist() -> &'static Worker {
    &DIST
}

impl Worker {
    fn new() -> Self {
        let handle = Handle::default();
        let errands = Queue::new(&handle);
        Worker { handle, errands }
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(task);
    }

    pub(crate) fn errands(&self) -> &Queue {
        &self.errands
    }

    pub(crate) fn bell(&self) -> Arc<Bell> {
        self.errands.bell()
    }

    /// For a thread beside the worker.
    pub(crate) fn outside(&self) -> Outside {
        self.handle.outside()
    }

    /// Works until nothing is left to do, and nobody is outside.
    pub(crate) fn run(&self) {
        self.handle.run();
    }

    /// Tasks that have not ended.
    pub(crate) fn tasks(&self) -> usize {
        self.handle.tasks()
    }

    pub(crate) fn end(&self) {
        self.handle.end();
    }
}

/// Starts a scheduler, or another thread that is not the worker.
pub(crate) fn beside(act: impl FnOnce() + Send + 'static) {
    let outside = dist().outside();
    loom::thread::spawn(move || {
        act();
        drop(outside);
    });
}
