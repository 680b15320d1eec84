//! A timer that is often set anew and seldom expires. Setting it to a later time costs nothing: it
//! wakes at the earlier one and sleeps on. Setting the runtime's own timer wakes the native thread.
//! Where no process sends, it is the native thread itself that sets a timer, and one useless wake-up
//! less is worth more.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::time::{Sleep, sleep_until};

use super::visit::{has_visited, is_visit};
use crate::engine::transport::Timer;

/// A timer that moves this far is set at once where no process sends.
const MUCH_LATER: Duration = Duration::from_millis(500);

struct LazyTimer {
    due: Instant,
    armed: Instant,
    sleep: Pin<Box<Sleep>>,
}

/// Makes the timer of a connection, on any thread.
pub(crate) fn lazy_timer(at: Instant) -> Pin<Box<dyn Timer>> {
    let _inside = crate::vm::runtime::dist().handle().enter();
    Box::pin(LazyTimer {
        due: at,
        armed: at,
        sleep: Box::pin(sleep_until(at.into())),
    })
}

impl LazyTimer {
    fn arm(&mut self) {
        self.armed = self.due;
        Sleep::reset(self.sleep.as_mut(), self.due.into());
    }
}

impl Timer for LazyTimer {
    fn reset(mut self: Pin<&mut Self>, at: Instant) {
        self.due = at;
        let much_later = at.saturating_duration_since(self.armed) >= MUCH_LATER;
        if at < self.armed {
            self.arm();
        } else if much_later && !is_visit() && !has_visited() {
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
