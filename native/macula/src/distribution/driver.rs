//! Connections that can be driven from two places.
//!
//! Quinn drives a connection in a task: to send, a process would wake the native thread, and that
//! thread would send. For a small message the wake-up costs more than the sending. So the driver of
//! each link is kept where the process that sends can poll it too: the packet has left when the call
//! returns. Only when the native thread is not at it, and only so much at a time that the scheduler
//! is not kept: the rest is left to the native thread.

use std::future::Future;
use std::io;
use std::net::UdpSocket;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime};
use tokio::time::{Sleep, sleep_until};

use super::socket::{self, SocketOptions};
use super::visit::{Limit, is_visit};
use crate::engine::capture::Captured;
use crate::vm::bell::Bell;
use crate::vm::locks::try_lock;
use crate::vm::tasks::{Fate, attempt, contain};

/// A timer that moves this far is set at once where no process sends.
const MUCH_LATER: Duration = Duration::from_millis(500);

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
    /// Processes that poll the driver right now, or have just done so, and look at `again` after that.
    inline: AtomicUsize,
    /// The driver has something to do.
    again: AtomicBool,
    fate: Fate,
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.again.store(true, Ordering::SeqCst);
        if self.inline.load(Ordering::SeqCst) == 0 {
            self.task.ring_here();
        }
    }
}

impl Driver {
    fn spawn(future: DriverFuture) -> Arc<Self> {
        let wakes = Arc::new(Wakes {
            task: crate::vm::runtime::dist().bell(),
            inline: AtomicUsize::new(0),
            again: AtomicBool::new(false),
            fate: Fate::default(),
        });
        let driver = Arc::new(Self {
            future: Mutex::new(Some(future)),
            wakes,
        });
        let task = driver.clone();
        crate::vm::runtime::dist().spawn(async move {
            task.wakes.task.ring_here();
            loop {
                task.wakes.task.rung().await;
                if task.run() {
                    return;
                }
            }
        });
        driver
    }

    /// Polls on the native thread. True when the connection is over. The thread serves all links: it
    /// waits for no process that the system has taken off its processor in the middle of a visit.
    fn run(&self) -> bool {
        loop {
            if let Some(mut future) = try_lock(&self.future) {
                return poll(&mut future, &self.wakes);
            }
            self.wakes.again.store(true, Ordering::SeqCst);
            if self.wakes.inline.load(Ordering::SeqCst) > 0 {
                // The visit rings at its end.
                return false;
            }
        }
    }

    /// Sends what there is to send, now. To be called on the native thread.
    pub(crate) fn send_now(&self) {
        if self.run() {
            // The task has to know.
            self.wakes.task.ring_here();
        }
    }

    pub(crate) fn fate(&self) -> &Fate {
        &self.wakes.fate
    }

    /// Ends a connection that nothing is left to do for. To be called on the native thread.
    pub(crate) fn abandon(&self) {
        if let Some(mut future) = try_lock(&self.future) {
            *future = None;
        }
        self.wakes.task.ring_here();
    }

    /// Takes the driver for a visit from a process, unless somebody is at it or the native thread is
    /// about to be: what has arrived meanwhile is for that thread to deal with.
    pub(crate) fn visit(&self) -> Option<Visit<'_>> {
        if self.wakes.again.load(Ordering::SeqCst) {
            return None;
        }
        // Counted before the lock is taken: whoever finds it taken finds the visit.
        self.wakes.inline.fetch_add(1, Ordering::SeqCst);
        let visit = Visit {
            future: try_lock(&self.future),
            wakes: &self.wakes,
        };
        VISITED.store(true, Ordering::Relaxed);
        visit.future.is_some().then_some(visit)
    }
}

/// Polls a driver. True when its connection is over.
fn poll(future: &mut Option<DriverFuture>, wakes: &Arc<Wakes>) -> bool {
    wakes.again.store(false, Ordering::SeqCst);
    let waker = Waker::from(wakes.clone());
    let over = match future {
        Some(running) => {
            let polled = attempt(|| running.as_mut().poll(&mut Context::from_waker(&waker)));
            if polled.is_err() {
                wakes.fate.fail();
            }
            !matches!(polled, Ok(Poll::Pending))
        }
        None => true,
    };
    if over {
        *future = None;
    }
    over
}

/// A process at the driver.
pub(crate) struct Visit<'a> {
    /// Empty at its end.
    future: Option<MutexGuard<'a, Option<DriverFuture>>>,
    wakes: &'a Arc<Wakes>,
}

impl Visit<'_> {
    /// Sends what there is to send, up to a limit.
    pub(crate) fn drive(&mut self) {
        if let Some(future) = &mut self.future {
            let _limit = Limit::set();
            poll(future, self.wakes);
        }
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let over = self.future.take().is_some_and(|future| future.is_none());
        self.wakes.inline.fetch_sub(1, Ordering::SeqCst);
        // Whatever was woken meanwhile is the native thread's.
        if over || self.wakes.again.load(Ordering::SeqCst) {
            self.wakes.task.ring();
        }
    }
}

thread_local! {
    static CAPTURED: Captured<Arc<Driver>> = const { Captured::new() };
}

/// Runs `make`, which makes a connection, and answers the driver quinn spawned for it.
pub(crate) fn capture<T>(make: impl FnOnce() -> T) -> (T, Option<Arc<Driver>>) {
    CAPTURED.with(|captured| captured.during(make))
}

/// Quinn's view of the runtime, with the fate of the endpoint's driver.
#[derive(Debug)]
pub(crate) struct DistRuntime(pub(crate) Arc<Fate>);

impl Runtime for DistRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _inside = crate::vm::runtime::dist().handle().enter();
        Box::pin(LazyTimer {
            due: at,
            armed: at,
            sleep: Box::pin(sleep_until(at.into())),
        })
    }

    fn spawn(&self, future: DriverFuture) {
        CAPTURED.with(|captured| {
            if captured.is_wanted() {
                captured.put(Driver::spawn(future));
            } else {
                let fate = self.0.clone();
                crate::vm::runtime::dist().spawn(async move {
                    // One that nothing is left to do for ends, too, and nobody asks then.
                    let _ = contain(future).await;
                    fate.fail();
                });
            }
        });
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _inside = crate::vm::runtime::dist().handle().enter();
        socket::wrap(socket, SocketOptions::default(), true, None).map(|wrapped| wrapped.socket)
    }
}

/// A process has visited a driver since the watch looked last.
static VISITED: AtomicBool = AtomicBool::new(false);

/// Begins to ask anew whether processes send.
pub(crate) fn forget_visits() {
    VISITED.store(false, Ordering::Relaxed);
}

/// A timer that is often set anew and seldom expires. Setting it to a later time costs nothing: it
/// wakes at the earlier one and sleeps on. Setting the runtime's own timer wakes the native thread.
/// Where no process sends, it is the native thread itself that sets a timer, and one useless wake-up
/// less is worth more.
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
        let much_later = at.saturating_duration_since(self.armed) >= MUCH_LATER;
        if at < self.armed {
            self.arm();
        } else if much_later && !is_visit() && !VISITED.load(Ordering::Relaxed) {
            self.armed = at;
            // To reset the runtime's timer to a later time would leave the earlier wake-up in place.
            self.sleep.set(sleep_until(at.into()));
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
