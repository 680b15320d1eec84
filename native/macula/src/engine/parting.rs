//! A close that the peer hears of whatever is under way.
//!
//! Quinn sends a CONNECTION_CLOSE only where the congestion window and the pacer have room for stream data
//! that waits, and acknowledgements that arrive behind the close make no room any more. So a connection that
//! is closed amid bulk would leave without a word, and its peer would notice by a timeout. RFC 9002, section
//! 7, holds back nothing but what counts as in flight, which a CONNECTION_CLOSE does not. So the window of a
//! connection that is being closed has no bound: Quinn sends nothing else from then on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use quinn::{Connection, VarInt};
use quinn_proto::congestion::{Controller, ControllerFactory};

use super::congestion::{Change, Changed};

/// More than is ever under way, and little enough to be multiplied.
const UNBOUNDED: u64 = u32::MAX as u64;

/// Makes controllers of another kind that let a close pass.
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
            inner.window()
        }
    }
}

/// Closes a connection whose controllers are made by `Parting`.
pub(crate) fn close(connection: &Connection, code: VarInt, reason: &[u8]) {
    let controller = connection.congestion_state().into_any();
    if let Ok(controller) = controller.downcast::<Changed<Leave>>() {
        controller.change.0.store(true, Ordering::Relaxed);
    }
    connection.close(code, reason);
}

/// The congestion window of a connection whose statistics show `shown`: the controller's own, also when the
/// connection is closed.
pub(crate) fn window(connection: &Connection, shown: u64) -> u64 {
    if shown != UNBOUNDED {
        return shown;
    }
    let controller = connection.congestion_state().into_any();
    controller
        .downcast::<Changed<Leave>>()
        .map_or(shown, |controller| controller.inner.window())
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
        let copy = controller.clone_box().into_any();
        let Ok(copy) = copy.downcast::<Changed<Leave>>() else {
            panic!("another controller");
        };
        assert_eq!(before, copy.window());
        copy.change.0.store(true, Ordering::Relaxed);
        assert_eq!(UNBOUNDED, controller.window());
    }
}
