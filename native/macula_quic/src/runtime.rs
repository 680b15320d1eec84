//! The tokio runtimes. Nothing here runs on a VM thread.
//!
//! Two of them: one for the public QUIC API, and one of a single thread for the distribution, so
//! that a busy user of the first never delays a net tick and a packet crosses no second thread.

use crate::dist::boost;
use std::sync::OnceLock;
use tokio::runtime::{Builder, Handle, Runtime};

/// Runs listeners, connections and streams of `macula_quic`.
pub(crate) fn quic() -> &'static Handle {
    static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();
    handle(&RUNTIME, "macula-quic")
}

/// Runs the distribution links, on one thread, with a scheduler that knows of no other: a wake-up
/// is cheaper so.
pub(crate) fn dist() -> &'static Handle {
    const NAME: &str = "macula-dist";
    static HANDLE: OnceLock<Option<Handle>> = OnceLock::new();
    let handle = HANDLE.get_or_init(|| {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .on_thread_park(boost::park)
            .on_thread_unpark(boost::unpark)
            .build()
            .ok()?;
        let handle = runtime.handle().clone();
        std::thread::Builder::new()
            .name(NAME.to_owned())
            .spawn(move || {
                boost::start();
                runtime.block_on(std::future::pending::<()>())
            })
            .ok()?;
        Some(handle)
    });
    match handle {
        Some(handle) => handle,
        None => panic!("cannot start the {NAME} thread"),
    }
}

fn handle(cell: &'static OnceLock<Option<Runtime>>, name: &'static str) -> &'static Handle {
    let runtime = cell.get_or_init(|| {
        Builder::new_multi_thread()
            // Asks the system, which opens files: once only.
            .worker_threads(worker_threads())
            .thread_name(name)
            .on_thread_start(step_back)
            .enable_all()
            .build()
            .ok()
    });
    match runtime {
        Some(runtime) => runtime.handle(),
        // The system gives no thread. A NIF turns the panic into an Erlang exception.
        None => panic!("cannot start the {name} threads"),
    }
}

/// Lets the VM's schedulers go first where processors are short: a thread that has work for a hundred
/// connections would else take one away from a scheduler for as long as the system finds fair, which
/// is milliseconds. `MACULA_NICE` is how much less than theirs it gets, as of nice(1).
#[cfg(target_os = "linux")]
fn step_back() {
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
fn step_back() {}

/// Half of the cores, as the schedulers need theirs; `MACULA_THREADS` overrides it.
fn worker_threads() -> usize {
    let asked = std::env::var("MACULA_THREADS")
        .ok()
        .and_then(|n| n.parse::<usize>().ok());
    let cores = std::thread::available_parallelism().map_or(2, |n| n.get());
    asked.unwrap_or(cores / 2).clamp(1, 64)
}
