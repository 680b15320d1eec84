//! The goodbye of a VM that halts.
//!
//! The system closes a TCP socket for a process that exits; nobody does that for QUIC, and the
//! peers would wait for their timeout. So the end of the process is hooked: a thread made beforehand
//! ends the links while the exiting thread waits a moment. The hook itself uses no thread-local
//! value, as those of the exiting thread may be gone.

use std::sync::{Arc, Condvar, Mutex, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::endpoint::DistEndpoint;

/// How long the links may take to end.
const GOODBYE: Duration = Duration::from_millis(100);
/// How long the exiting thread waits for all of it.
const PATIENCE: Duration = Duration::from_millis(250);

#[derive(Default)]
struct Board {
    endpoints: Vec<Weak<DistEndpoint>>,
    exiting: bool,
    done: bool,
}

static BOARD: Mutex<Board> = Mutex::new(Board {
    endpoints: Vec::new(),
    exiting: false,
    done: false,
});
static CHANGED: Condvar = Condvar::new();
static HOOKED: Once = Once::new();

/// The endpoint's links end when the VM halts.
pub(crate) fn register(endpoint: &Arc<DistEndpoint>) {
    let mut board = BOARD.lock().unwrap_or_else(PoisonError::into_inner);
    board
        .endpoints
        .retain(|endpoint| endpoint.strong_count() > 0);
    board.endpoints.push(Arc::downgrade(endpoint));
    drop(board);
    HOOKED.call_once(|| {
        let watcher = std::thread::Builder::new()
            .name("macula-halt".to_owned())
            .spawn(watch);
        if watcher.is_ok() {
            hook();
        }
    });
}

#[cfg(unix)]
fn hook() {
    // SAFETY: the library is never unmapped, so the function stays where it is.
    unsafe {
        libc::atexit(at_exit);
    }
}

#[cfg(not(unix))]
fn hook() {}

extern "C" fn at_exit() {
    let mut board = BOARD.lock().unwrap_or_else(PoisonError::into_inner);
    board.exiting = true;
    CHANGED.notify_all();
    let until = Instant::now() + PATIENCE;
    while !board.done {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        board = CHANGED
            .wait_timeout(board, left)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}

fn watch() {
    let mut board = BOARD.lock().unwrap_or_else(PoisonError::into_inner);
    while !board.exiting {
        board = CHANGED.wait(board).unwrap_or_else(PoisonError::into_inner);
    }
    let endpoints: Vec<_> = board.endpoints.iter().filter_map(Weak::upgrade).collect();
    drop(board);
    say_goodbye(&endpoints);
    BOARD.lock().unwrap_or_else(PoisonError::into_inner).done = true;
    CHANGED.notify_all();
}

fn say_goodbye(endpoints: &[Arc<DistEndpoint>]) {
    let links: Vec<_> = endpoints
        .iter()
        .flat_map(|endpoint| endpoint.links())
        .collect();
    if links.is_empty() {
        return;
    }
    for link in &links {
        link.stop();
    }
    let until = Instant::now() + GOODBYE;
    while Instant::now() < until && links.iter().any(|link| !link.is_closed()) {
        std::thread::sleep(Duration::from_millis(2));
    }
    for endpoint in endpoints {
        endpoint.close_now();
    }
    // The last packets leave on the endpoint's own thread.
    std::thread::sleep(Duration::from_millis(5));
}
