//! When a connection has to look at the clock.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::time::{Sleep, sleep_until};

/// A timer of a connection. Once it has expired it is set anew.
pub(crate) trait Timer: Send {
    fn reset(self: Pin<&mut Self>, at: Instant);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()>;
}

/// How an endpoint's connections make their timers.
pub(super) type MakeTimer = fn(Instant) -> Pin<Box<dyn Timer>>;

/// A timer of the runtime. To be called inside of it.
pub(crate) fn tokio_timer(at: Instant) -> Pin<Box<dyn Timer>> {
    Box::pin(sleep_until(at.into()))
}

impl Timer for Sleep {
    fn reset(self: Pin<&mut Self>, at: Instant) {
        Sleep::reset(self, at.into());
    }

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Future::poll(self, cx)
    }
}
