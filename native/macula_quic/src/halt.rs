//! The goodbye of a VM that halts.
//!
//! The system closes a TCP socket for a process that exits; nobody does that for QUIC, and the
//! peers would wait for their timeout. So the end of the process is hooked: a thread made beforehand
//! ends what is registered while the exiting thread waits a moment. The hook itself uses no
//! thread-local value, as those of the exiting thread may be gone.

use std::sync::{Arc, Condvar, Mutex, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Something whose peers are told when the VM halts.
pub(crate) trait Farewell: Send + Sync {
    /// Begins to end it, in order. Answers whether there is anything to wait for.
    fn begin(&self) -> bool;
    /// Everything has ended.
    fn is_over(&self) -> bool;
    /// Ends at once what has not.
    fn force(&self);
}

/// How long all of it may take to end in order.
const GOODBYE: Duration = Duration::from_millis(100);
/// How long the exiting thread waits for all of it.
const PATIENCE: Duration = Duration::from_millis(250);

#[derive(Default)]
struct Board {
    registered: Vec<Weak<dyn Farewell>>,
    exiting: bool,
    done: bool,
}

static BOARD: Mutex<Board> = Mutex::new(Board {
    registered: Vec::new(),
    exiting: false,
    done: false,
});
static CHANGED: Condvar = Condvar::new();
static HOOKED: Once = Once::new();

/// Says goodbye for it when the VM halts, if it lives then.
pub(crate) fn register(farewell: Weak<dyn Farewell>) {
    let mut board = BOARD.lock().unwrap_or_else(PoisonError::into_inner);
    board.registered.retain(|known| known.strong_count() > 0);
    board.registered.push(farewell);
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
    let registered: Vec<_> = board.registered.iter().filter_map(Weak::upgrade).collect();
    drop(board);
    say_goodbye(&registered);
    BOARD.lock().unwrap_or_else(PoisonError::into_inner).done = true;
    CHANGED.notify_all();
}

fn say_goodbye(registered: &[Arc<dyn Farewell>]) {
    let ending: Vec<_> = registered.iter().filter(|one| one.begin()).collect();
    if ending.is_empty() {
        return;
    }
    let until = Instant::now() + GOODBYE;
    while Instant::now() < until && ending.iter().any(|one| !one.is_over()) {
        std::thread::sleep(Duration::from_millis(2));
    }
    for one in ending {
        one.force();
    }
    // The last packets leave on threads of their own.
    std::thread::sleep(Duration::from_millis(5));
}
