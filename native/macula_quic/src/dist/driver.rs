//! Connections that can be driven from two places.
//!
//! Quinn drives a connection in a task: to send, a process would wake the native thread, and that
//! thread would send. For a small message the wake-up costs more than the sending. So the driver of
//! each link is kept where the process that sends can poll it too: the packet has left when the call
//! returns. Only when the native thread is not at it, and only so much at a time that the scheduler
//! is not kept: the rest is left to the native thread.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::net::UdpSocket;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime};
use tokio::time::{Sleep, sleep_until};

use super::socket;
use crate::bell::Bell;

/// Send calls one visit of a process may make.
const INLINE_SENDS: usize = 2;

type DriverFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The driver of one connection.
pub(crate) struct Driver {
    /// Empty once the connection is over.
    future: Mutex<Option<DriverFuture>>,
    wakes: Arc<Wakes>,
}

/// Who is told when the driver has something to do.
struct Wakes {
    task: Arc<Bell>,
    /// A process polls the driver right now, and looks at `again` when it is done.
    inline: AtomicBool,
    again: AtomicBool,
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.again.store(true, Ordering::SeqCst);
        if !self.inline.load(Ordering::SeqCst) {
            self.task.ring_here();
        }
    }
}

impl Driver {
    fn spawn(future: DriverFuture) -> Arc<Self> {
        let wakes = Arc::new(Wakes {
            task: Bell::dist(),
            inline: AtomicBool::new(false),
            again: AtomicBool::new(false),
        });
        let driver = Arc::new(Self {
            future: Mutex::new(Some(future)),
            wakes,
        });
        let task = driver.clone();
        crate::runtime::dist().spawn(async move {
            task.wakes.task.ring_here();
            loop {
                task.wakes.task.rung().await;
                let mut future = task.future.lock().unwrap_or_else(PoisonError::into_inner);
                if poll(&mut future, &task.wakes) {
                    return;
                }
            }
        });
        driver
    }

    /// Takes the driver for a visit from a process, unless somebody is at it.
    pub(crate) fn visit(&self) -> Option<Visit<'_>> {
        let future = match self.future.try_lock() {
            Ok(future) => future,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        self.wakes.inline.store(true, Ordering::SeqCst);
        Some(Visit {
            future,
            wakes: &self.wakes,
        })
    }
}

/// Polls a driver. True when its connection is over.
fn poll(future: &mut Option<DriverFuture>, wakes: &Arc<Wakes>) -> bool {
    wakes.again.store(false, Ordering::SeqCst);
    let waker = Waker::from(wakes.clone());
    let over = match future {
        Some(running) => running
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready(),
        None => true,
    };
    if over {
        *future = None;
    }
    over
}

/// A process at the driver.
pub(crate) struct Visit<'a> {
    future: MutexGuard<'a, Option<DriverFuture>>,
    wakes: &'a Arc<Wakes>,
}

impl Visit<'_> {
    /// Sends what there is to send, up to a limit.
    pub(crate) fn drive(&mut self) {
        SENDS_LEFT.set(Some(INLINE_SENDS));
        poll(&mut self.future, self.wakes);
        SENDS_LEFT.set(None);
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.wakes.inline.store(false, Ordering::SeqCst);
        // Whatever was woken meanwhile is the native thread's.
        if self.wakes.again.load(Ordering::SeqCst) || self.future.is_none() {
            self.wakes.task.ring();
        }
    }
}

thread_local! {
    /// On a thread of the VM during a visit: the send calls that are left.
    static SENDS_LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    /// Where the next driver goes that quinn spawns on this thread.
    static CAPTURED: RefCell<Option<Option<Arc<Driver>>>> = const { RefCell::new(None) };
}

/// Whether this is a visit from a process.
pub(crate) fn is_visit() -> bool {
    SENDS_LEFT.get().is_some()
}

/// Counts a send call of a visit. False when there have been enough of them.
pub(crate) fn may_send() -> bool {
    match SENDS_LEFT.get() {
        None => true,
        Some(0) => false,
        Some(left) => {
            SENDS_LEFT.set(Some(left - 1));
            true
        }
    }
}

/// Runs `make`, which makes a connection, and answers the driver quinn spawned for it.
pub(crate) fn capture<T>(make: impl FnOnce() -> T) -> (T, Option<Arc<Driver>>) {
    CAPTURED.set(Some(None));
    let made = make();
    (made, CAPTURED.take().flatten())
}

/// Quinn's view of the runtime.
#[derive(Debug)]
pub(crate) struct DistRuntime;

impl Runtime for DistRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _inside = crate::runtime::dist().enter();
        Box::pin(LazyTimer {
            due: at,
            armed: at,
            sleep: Box::pin(sleep_until(at.into())),
        })
    }

    fn spawn(&self, future: DriverFuture) {
        let capturing = CAPTURED.with_borrow(Option::is_some);
        if capturing {
            CAPTURED.set(Some(Some(Driver::spawn(future))));
        } else {
            crate::runtime::dist().spawn(future);
        }
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _inside = crate::runtime::dist().enter();
        socket::wrap(socket, None)
    }
}

/// A timer that is often set anew and seldom expires. Setting it to a later time costs nothing: it
/// wakes at the earlier one and sleeps on. Setting the runtime's own timer wakes the native thread.
#[derive(Debug)]
struct LazyTimer {
    due: Instant,
    armed: Instant,
    sleep: Pin<Box<Sleep>>,
}

impl LazyTimer {
    fn arm(&mut self) {
        self.armed = self.due;
        Sleep::reset(self.sleep.as_mut(), self.due.into());
    }
}

impl AsyncTimer for LazyTimer {
    fn reset(mut self: Pin<&mut Self>, at: Instant) {
        self.due = at;
        if at < self.armed {
            self.arm();
        }
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        while Future::poll(self.sleep.as_mut(), cx).is_ready() {
            if Instant::now() >= self.due {
                return Poll::Ready(());
            }
            self.arm();
        }
        Poll::Pending
    }
}
