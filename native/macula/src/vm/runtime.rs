//! The native threads that work, each with a tokio runtime of its own. None of them is a VM thread.
//!
//! A runtime of one thread knows of no other: a task that wakes another of the same thread takes no
//! lock and wakes no thread, and what a turn of tasks has written leaves in one go. `macula_quic` has
//! some workers; a connection stays with one of them. The distribution has one of its own, so that a
//! busy user of the others never delays a net tick.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::vm::bell::{Bell, Queue};
use crate::vm::boost;
use crate::vm::halt;
use crate::vm::turns::{Half, Turns};

/// Tasks that run before the thread looks for packets and timers, while it has tasks. One that is busy runs for up
/// to a millisecond, and so long others would wait.
const LOOK_AT_SYSTEM: u32 = 8;
/// And before the thread looks for what others have left, schedulers of the VM among them.
const LOOK_AT_OTHERS: u32 = 4;

static QUIC: OnceLock<Vec<Worker>> = OnceLock::new();
static DIST: OnceLock<Worker> = OnceLock::new();
static STARTING: Mutex<()> = Mutex::new(());

/// A thread and its runtime.
pub(crate) struct Worker {
    handle: Handle,
    errands: Queue,
}

impl Worker {
    /// A task for this worker, from any thread. A thread of the VM leaves it in the queue for errands,
    /// as the runtime's own entrance has a lock.
    pub(crate) fn start(&'static self, task: impl Future<Output = ()> + Send + 'static) {
        if Handle::try_current().is_ok() {
            self.handle.spawn(task);
        } else {
            self.errands.run(move || {
                self.handle.spawn(task);
            });
        }
    }

    /// A task for this worker.
    pub(crate) fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.handle.spawn(task)
    }

    /// Waits until the worker has run all tasks that are woken now, but no longer than this. Not for a thread of
    /// the VM.
    pub(crate) fn have_turn(&self, limit: Duration) {
        let (done, had) = mpsc::sync_channel(1);
        self.handle.spawn(async move {
            // A task that was woken may wake another.
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
            // Nobody may be waiting any longer.
            let _ = done.try_send(());
        });
        let _ = had.recv_timeout(limit);
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Gives a turn, from any thread.
    pub(crate) fn turn(&self, turns: Arc<dyn Turns>, half: Half) {
        self.errands.turn(turns, half);
    }

    /// Returns when all rings and turns that were left for the worker until now have been passed on.
    pub(crate) async fn passed_on(&self) {
        let (done, passed) = oneshot::channel();
        self.errands.run(move || {
            // Nobody may be waiting any longer.
            let _ = done.send(());
        });
        // Fails only when the runtime is gone.
        let _ = passed.await;
    }

    /// What one task of this worker waits for.
    pub(crate) fn bell(&self) -> Arc<Bell> {
        self.errands.bell()
    }
}

/// A worker of `macula_quic`, each in its turn. They are there after `start_quic`.
pub(crate) fn quic() -> &'static Worker {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    match start_quic() {
        Ok(workers) => &workers[TURN.fetch_add(1, Ordering::Relaxed) % workers.len()],
        Err(e) => panic!("no threads for macula_quic: {e}"),
    }
}

/// The worker of the distribution. Endpoints are made after `start_dist`.
pub(crate) fn dist() -> &'static Worker {
    match start_dist() {
        Ok(worker) => worker,
        Err(e) => panic!("no thread for macula_dist: {e}"),
    }
}

/// One that runs, if any does.
pub(crate) fn running() -> Option<&'static Worker> {
    DIST.get()
        .or_else(|| QUIC.get().and_then(|workers| workers.first()))
}

/// Starts the threads, unless they run. An error when the system has none to give; a later try may
/// succeed.
pub(crate) fn start_quic() -> io::Result<&'static [Worker]> {
    if let Some(workers) = QUIC.get() {
        return Ok(workers);
    }
    let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(workers) = QUIC.get() {
        return Ok(workers);
    }
    halt::prepare()?;
    let mut workers = Vec::new();
    for _ in 0..worker_threads() {
        match start("macula-quic", Builder::new_current_thread(), step_back) {
            Ok(worker) => workers.push(worker),
            // Fewer do as well.
            Err(_) if !workers.is_empty() => break,
            Err(e) => return Err(e),
        }
    }
    Ok(QUIC.get_or_init(|| workers))
}

/// As `start_quic`, for the distribution.
pub(crate) fn start_dist() -> io::Result<&'static Worker> {
    if let Some(worker) = DIST.get() {
        return Ok(worker);
    }
    let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(worker) = DIST.get() {
        return Ok(worker);
    }
    halt::prepare()?;
    let mut builder = Builder::new_current_thread();
    builder
        .on_thread_park(boost::park)
        .on_thread_unpark(boost::unpark);
    let worker = start("macula-dist", builder, boost::start)?;
    Ok(DIST.get_or_init(|| worker))
}

/// Starts one thread. An error when the system has none to give.
fn start(name: &str, mut builder: Builder, first: fn()) -> io::Result<Worker> {
    builder
        .event_interval(LOOK_AT_SYSTEM)
        .global_queue_interval(LOOK_AT_OTHERS);
    let runtime: Runtime = builder.enable_all().build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            first();
            runtime.block_on(std::future::pending::<()>());
        })?;
    let errands = Queue::new(&handle);
    Ok(Worker { handle, errands })
}

/// Lets the VM's schedulers go a little ahead where processors are short: a thread that has work for a hundred
/// connections would else take one away from a scheduler for as long as the system finds fair, which
/// is milliseconds. `MACULA_NICE` is how much less than theirs it gets, as of nice(1).
#[cfg(target_os = "linux")]
pub(crate) fn step_back() {
    const DEFAULT: libc::c_int = 1;
    let asked = std::env::var("MACULA_NICE")
        .ok()
        .and_then(|n| n.parse().ok());
    let increment = asked.unwrap_or(DEFAULT).clamp(0, 19);
    // SAFETY: these take no pointers. Here a thread has a priority of its own: 0 is this one, which has
    // that of whichever thread made it, and the first is the VM's. A system that refuses leaves it.
    unsafe {
        let vm = libc::getpriority(libc::PRIO_PROCESS, libc::getpid() as libc::id_t);
        libc::setpriority(libc::PRIO_PROCESS, 0, (vm + increment).min(19));
    }
}

/// Elsewhere a priority is that of the whole process.
#[cfg(not(target_os = "linux"))]
pub(crate) fn step_back() {}

/// Half of the cores, as the schedulers need theirs; `MACULA_THREADS` overrides it.
fn worker_threads() -> usize {
    let asked = std::env::var("MACULA_THREADS")
        .ok()
        .and_then(|n| n.parse::<usize>().ok());
    let cores = std::thread::available_parallelism().map_or(2, |n| n.get());
    asked.unwrap_or(cores / 2).clamp(1, 64)
}
