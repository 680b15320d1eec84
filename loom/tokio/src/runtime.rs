//! A runtime of one thread.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};

use loom::sync::{Condvar, Mutex, MutexGuard};

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Of a runtime that runs where `run` is called.
#[derive(Clone, Default)]
pub struct Handle(Arc<Runtime>);

#[derive(Default)]
struct Runtime {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// A task that is polled is not in its place.
    tasks: Vec<Option<Task>>,
    woken: VecDeque<usize>,
    /// Threads outside of the runtime that may still wake something.
    outside: usize,
}

/// A thread outside of the runtime.
pub struct Outside(Handle);

struct Wakes {
    runtime: Handle,
    task: usize,
}

impl Handle {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// Adds a task. Before `run`, or from a task.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut state = self.lock();
        let id = state.tasks.len();
        state.tasks.push(Some(Box::pin(task)));
        state.woken.push_back(id);
    }

    /// Has the runtime run until this is dropped, and everything woken has had its turn.
    pub fn outside(&self) -> Outside {
        self.lock().outside += 1;
        Outside(self.clone())
    }

    /// Polls what is woken. Returns when nothing is, and nobody is left who could wake anything.
    pub fn run(&self) {
        while let Some((id, mut task)) = self.next() {
            let waker = Waker::from(Arc::new(Wakes {
                runtime: self.clone(),
                task: id,
            }));
            if task
                .as_mut()
                .poll(&mut Context::from_waker(&waker))
                .is_pending()
            {
                self.lock().tasks[id] = Some(task);
            }
        }
    }

    /// Tasks that have not ended.
    pub fn tasks(&self) -> usize {
        self.lock().tasks.iter().flatten().count()
    }

    /// Drops all tasks, as the end of a runtime does.
    pub fn end(&self) {
        let tasks = std::mem::take(&mut self.lock().tasks);
        drop(tasks);
    }

    fn next(&self) -> Option<(usize, Task)> {
        let mut state = self.lock();
        loop {
            while let Some(id) = state.woken.pop_front() {
                // One that has ended is woken in vain.
                if let Some(task) = state.tasks[id].take() {
                    return Some((id, task));
                }
            }
            if state.outside == 0 {
                return None;
            }
            state = self.0.changed.wait(state).unwrap();
        }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.0.lock().outside -= 1;
            self.0.0.changed.notify_one();
        }
    }
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        let mut state = self.runtime.lock();
        if !state.woken.contains(&self.task) {
            state.woken.push_back(self.task);
            drop(state);
            self.runtime.0.changed.notify_one();
        }
    }
}
