//! The tokio runtimes. Nothing here runs on a VM thread.
//!
//! Two of them: one for the public QUIC API, and one of a single thread for the distribution, so
//! that a busy user of the first never delays a net tick and a packet crosses no second thread.

use std::sync::OnceLock;
use tokio::runtime::{Builder, Handle, Runtime};

/// Runs listeners, connections and streams of `macula_quic`.
pub(crate) fn quic() -> &'static Handle {
    static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();
    handle(&RUNTIME, worker_threads(), "macula-quic")
}

/// Runs the distribution links, on one thread.
pub(crate) fn dist() -> &'static Handle {
    static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();
    handle(&RUNTIME, 1, "macula-dist")
}

fn handle(
    cell: &'static OnceLock<Option<Runtime>>,
    threads: usize,
    name: &'static str,
) -> &'static Handle {
    let runtime = cell.get_or_init(|| {
        Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name(name)
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

/// Half of the cores, as the schedulers need theirs; `MACULA_THREADS` overrides it.
fn worker_threads() -> usize {
    let asked = std::env::var("MACULA_THREADS")
        .ok()
        .and_then(|n| n.parse::<usize>().ok());
    let cores = std::thread::available_parallelism().map_or(2, |n| n.get());
    asked.unwrap_or(cores / 2).clamp(1, 64)
}
