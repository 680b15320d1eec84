//! No timer is ever set.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

pub(crate) trait Timer: Send {
    fn reset(self: Pin<&mut Self>, at: Instant);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()>;
}

pub(super) type MakeTimer = fn(Instant) -> Pin<Box<dyn Timer>>;
