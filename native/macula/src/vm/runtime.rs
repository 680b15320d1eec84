//! The tokio runtimes. Nothing here runs on a VM thread.
//!
//! Two of them: one for the public QUIC API, and one of a single thread for the distribution, so
//! that a busy user of the first never delays a net tick and a packet crosses no second thread.

use std::io;
use std::panic::catch_unwind;
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};

use tokio::runtime::{Builder, Handle, Runtime};

use crate::vm::boost;
use crate::vm::halt;

static QUIC: OnceLock<Runtime> = OnceLock::new();
static DIST: OnceLock<Handle> = OnceLock::new();
static STARTING: Mutex<()> = Mutex::new(());

/// Runs listeners, connections and streams of `macula_quic`. They are made after `start_quic`.
pub(crate) fn quic() -> &'static Handle {
    match start_quic() {
        Ok(handle) => handle,
        Err(e) => panic!("no threads for macula_quic: {e}"),
    }
}

/// Runs the distribution links, on one thread, with a scheduler that knows of no other: a wake-up
/// is cheaper so. Endpoints are made after `start_dist`.
pub(crate) fn dist() -> &'static Handle {
    match start_dist() {
        Ok(handle) => handle,
        Err(e) => panic!("no thread for macula_dist: {e}"),
    }
}

/// Starts the threads, unless they run. An error when the system has none to give; a later try may
/// succeed.
pub(crate) fn start_quic() -> io::Result<&'static Handle> {
    if let Some(runtime) = QUIC.get() {
        return Ok(runtime.handle());
    }
    let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(runtime) = QUIC.get() {
        return Ok(runtime.handle());
    }
    halt::prepare()?;
    // Asks the system, which opens files: once only.
    let workers = worker_threads();
    try_threads(workers)?;
    let built = catch_unwind(|| {
        Builder::new_multi_thread()
            .worker_threads(workers)
            .thread_name("macula-quic")
            .on_thread_start(step_back)
            .enable_all()
            .build()
    });
    // It panics when a thread that was to be had a moment ago is not any more.
    let runtime = built.unwrap_or_else(|_| Err(io::ErrorKind::WouldBlock.into()))?;
    Ok(QUIC.get_or_init(|| runtime).handle())
}

/// As `start_quic`, for the distribution.
pub(crate) fn start_dist() -> io::Result<&'static Handle> {
    if let Some(handle) = DIST.get() {
        return Ok(handle);
    }
    let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = DIST.get() {
        return Ok(handle);
    }
    halt::prepare()?;
    let runtime = Builder::new_current_thread()
        .enable_all()
        .on_thread_park(boost::park)
        .on_thread_unpark(boost::unpark)
        .build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name("macula-dist".to_owned())
        .spawn(move || {
            boost::start();
            runtime.block_on(std::future::pending::<()>())
        })?;
    Ok(DIST.get_or_init(|| handle))
}

/// Whether the system gives so many threads: the runtime's own attempt ends in a panic if not.
fn try_threads(count: usize) -> io::Result<()> {
    let mut held = Vec::with_capacity(count);
    for _ in 0..count {
        let (release, released) = mpsc::channel::<()>();
        let thread = std::thread::Builder::new().spawn(move || {
            // Ends when the other end is dropped.
            let _ = released.recv();
        })?;
        held.push((release, thread));
    }
    for (release, thread) in held {
        drop(release);
        // It has nothing to say.
        let _ = thread.join();
    }
    Ok(())
}

/// Lets the VM's schedulers go first where processors are short: a thread that has work for a hundred
/// connections would else take one away from a scheduler for as long as the system finds fair, which
/// is milliseconds. `MACULA_NICE` is how much less than theirs it gets, as of nice(1).
#[cfg(target_os = "linux")]
pub(crate) fn step_back() {
    const DEFAULT: libc::c_int = 5;
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
