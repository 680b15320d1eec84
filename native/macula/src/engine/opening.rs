//! How much may be under way while a connection begins.
//!
//! A server's first flight is in packets of two kinds, and those of the second are useless to a client
//! that misses one of the first. Where the first kind is lost, the congestion window shrinks below what
//! is under way; then Quinn repeats the second kind alone, as probes, and holds back what was lost, until
//! the handshake times out. So losses do not take the window below its initial size before so much has
//! been acknowledged. The client's own packets bound what a server sends to an address that is not proven.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};

/// Makes controllers of another kind that begin so.
pub(crate) struct Opening<F>(Arc<F>);

impl<F> Opening<F> {
    pub(crate) fn new(factory: F) -> Self {
        Opening(Arc::new(factory))
    }
}

impl<F: ControllerFactory> ControllerFactory for Opening<F> {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Begun {
            inner: self.0.clone().build(now, current_mtu),
            acknowledged: 0,
        })
    }
}

struct Begun {
    inner: Box<dyn Controller>,
    acknowledged: u64,
}

impl Controller for Begun {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.acknowledged = self.acknowledged.saturating_add(bytes);
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.inner
            .on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.inner
            .on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        let initial = self.inner.initial_window();
        if self.acknowledged < initial {
            self.inner.window().max(initial)
        } else {
            self.inner.window()
        }
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = self.inner.metrics();
        metrics.congestion_window = self.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Begun {
            inner: self.inner.clone_box(),
            acknowledged: self.acknowledged,
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self.inner.into_any()
    }
}

#[cfg(test)]
mod tests {
    use quinn_proto::congestion::CubicConfig;

    use super::*;

    #[test]
    fn losses_take_nothing_from_the_window_until_as_much_is_acknowledged() {
        let now = Instant::now();
        let mut begun = Begun {
            inner: Arc::new(CubicConfig::default()).build(now, 1200),
            acknowledged: 0,
        };
        let initial = begun.initial_window();
        begun.on_congestion_event(now, now, true, 1200);
        assert_eq!(begun.window(), initial);
        begun.acknowledged = initial - 1;
        assert_eq!(begun.clone_box().window(), initial);
        begun.acknowledged = initial;
        assert!(begun.window() < initial);
    }
}
