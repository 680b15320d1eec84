//! The goodbye of a VM that halts or crashes.
//!
//! The system closes a TCP socket for a process that exits, and the VM those of its drivers before it
//! writes a crash dump; nobody does that for QUIC, and the peers would wait for their timeout. So both
//! are hooked: a thread made beforehand ends what is registered while the exiting thread waits a
//! moment. The hooks take no lock and use no thread-local value: whoever had the lock may never run
//! again, and the values of the exiting thread may be gone.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::Thread;
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

/// What the VM is doing.
const RUNNING: u8 = 0;
const HALTING: u8 = 1;
const CRASHING: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(RUNNING);
static DONE: AtomicBool = AtomicBool::new(false);
static WATCHER: OnceLock<Thread> = OnceLock::new();
static REGISTERED: Mutex<Vec<Weak<dyn Farewell>>> = Mutex::new(Vec::new());

/// Makes the thread and the hook, unless they are there. An error when the system has no thread.
pub(crate) fn prepare() -> io::Result<()> {
    static PREPARING: Mutex<()> = Mutex::new(());
    let _one = PREPARING.lock().unwrap_or_else(PoisonError::into_inner);
    if WATCHER.get().is_none() {
        let watcher = std::thread::Builder::new()
            .name("macula-halt".to_owned())
            .spawn(watch)?;
        // Nobody else sets it, as this is locked.
        let _ = WATCHER.set(watcher.thread().clone());
        hook();
    }
    Ok(())
}

/// The VM halts or crashes, and nothing new is to begin.
pub(crate) fn is_leaving() -> bool {
    STATE.load(Ordering::Acquire) != RUNNING
}

/// Says goodbye for it when the VM halts, if it lives then.
pub(crate) fn register(farewell: Weak<dyn Farewell>) {
    let mut registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    registered.retain(|known| known.strong_count() > 0);
    registered.push(farewell);
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
    leave(HALTING);
}

/// The VM is about to write a crash dump: its schedulers stand still, perhaps for minutes.
pub(crate) fn crash() {
    leave(CRASHING);
}

fn leave(state: u8) {
    // The first reason counts: after a crash dump the VM exits.
    let first = STATE.compare_exchange(RUNNING, state, Ordering::AcqRel, Ordering::Acquire);
    let Some(watcher) = WATCHER.get() else { return };
    if first.is_err() {
        return;
    }
    watcher.unpark();
    let until = Instant::now() + PATIENCE;
    while !DONE.load(Ordering::Acquire) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn watch() {
    while STATE.load(Ordering::Acquire) == RUNNING {
        std::thread::park();
    }
    let registered: Vec<_> = REGISTERED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .iter()
        .filter_map(Weak::upgrade)
        .collect();
    if STATE.load(Ordering::Acquire) == CRASHING {
        // No process takes part any more.
        for one in &registered {
            one.force();
        }
        std::thread::sleep(Duration::from_millis(5));
    } else {
        say_goodbye(&registered);
    }
    DONE.store(true, Ordering::Release);
    // What is registered is not dropped: its end may need what the VM is tearing down.
    std::mem::forget(registered);
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
