//! How much may be under way while a connection begins.
//!
//! A server's first flight is in packets of two kinds, and those of the second are useless to a client
//! that misses one of the first. Where the first kind is lost, the congestion window shrinks below what
//! is under way; then Quinn repeats the second kind alone, as probes, and holds back what was lost, until
//! the handshake times out. So losses do not take the window below its initial size before so much has
//! been acknowledged. The client's own packets bound what a server sends to an address that is not proven.

use std::sync::Arc;
use std::time::Instant;

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory};

use super::congestion::{Change, Changed};

/// Makes controllers of another kind that begin so.
pub(crate) struct Opening<F>(Arc<F>);

impl<F> Opening<F> {
    pub(crate) fn new(factory: F) -> Self {
        Opening(Arc::new(factory))
    }
}

impl<F: ControllerFactory> ControllerFactory for Opening<F> {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Changed {
            inner: self.0.clone().build(now, current_mtu),
            change: Begun(0),
        })
    }
}

/// Bytes acknowledged so far.
#[derive(Clone)]
struct Begun(u64);

impl Change for Begun {
    fn acknowledged(
        &mut self,
        _now: Instant,
        _sent: Instant,
        bytes: u64,
        _app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        self.0 = self.0.saturating_add(bytes);
    }

    fn window(&self, inner: &dyn Controller) -> u64 {
        let initial = inner.initial_window();
        if self.0 < initial {
            inner.window().max(initial)
        } else {
            inner.window()
        }
    }
}

#[cfg(test)]
mod tests {
    use quinn_proto::congestion::CubicConfig;

    use super::*;

    #[test]
    fn losses_take_nothing_from_the_window_until_as_much_is_acknowledged() {
        let now = Instant::now();
        let mut begun = Changed {
            inner: Arc::new(CubicConfig::default()).build(now, 1200),
            change: Begun(0),
        };
        let initial = begun.initial_window();
        begun.on_congestion_event(now, now, true, 1200);
        assert_eq!(begun.window(), initial);
        begun.change.0 = initial - 1;
        assert_eq!(begun.clone_box().window(), initial);
        begun.change.0 = initial;
        assert!(begun.window() < initial);
    }
}
