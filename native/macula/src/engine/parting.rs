//! A close that the peer hears of whatever is under way.
//!
//! `quinn-proto` sends a CONNECTION_CLOSE only where the congestion window and the pacer have room for stream data
//! that waits, and acknowledgements that arrive behind the close make no room any more. So a connection that
//! is closed amid bulk would leave without a word, and its peer would notice by a timeout. RFC 9002, section
//! 7, holds back nothing but what counts as in flight, which a CONNECTION_CLOSE does not. So the window of a
//! connection that is being closed has no bound: QUIC sends nothing else from then on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use quinn_proto::congestion::{Controller, ControllerFactory};

use super::answering::{self, UNBOUNDED};
use super::congestion::{Change, Changed};

/// Makes controllers of another kind that let a close pass, and acknowledgements (`answering`).
pub(crate) struct Parting(pub(crate) Arc<dyn ControllerFactory + Send + Sync>);

impl ControllerFactory for Parting {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Changed {
            inner: self.0.clone().build(now, current_mtu),
            change: Leave::default(),
        })
    }
}

/// Whether the connection is being closed; copies of a controller share it.
#[derive(Clone, Default)]
struct Leave(Arc<AtomicBool>);

impl Change for Leave {
    fn window(&self, inner: &dyn Controller) -> u64 {
        if self.0.load(Ordering::Relaxed) {
            UNBOUNDED
        } else {
            answering::window(inner.window())
        }
    }
}

/// To be said to the controller of a connection before that is closed. Does nothing to one that `Parting` has
/// not made.
pub(crate) fn leave(controller: &dyn Controller) {
    let copy = controller.clone_box().into_any();
    if let Ok(copy) = copy.downcast::<Changed<Leave>>() {
        copy.change.0.store(true, Ordering::Relaxed);
    }
}

/// The congestion window: the controller's own, also when its connection is closed.
pub(crate) fn window(controller: &dyn Controller) -> u64 {
    let copy = controller.clone_box().into_any();
    copy.downcast::<Changed<Leave>>()
        .map_or_else(|_| controller.window(), |copy| copy.inner.window())
}

#[cfg(test)]
mod tests {
    use quinn_proto::congestion::CubicConfig;

    use super::*;

    #[test]
    fn a_copy_opens_the_window_of_its_original() {
        let parting = Arc::new(Parting(Arc::new(CubicConfig::default())));
        let controller = parting.build(Instant::now(), 1200);
        let before = controller.window();
        leave(controller.as_ref());
        assert_eq!(UNBOUNDED, controller.window());
        assert_eq!(before, window(controller.as_ref()));
    }
}
