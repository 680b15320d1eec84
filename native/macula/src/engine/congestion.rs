//! One of Quinn's congestion controllers, with a change: what both rooms above have to say of a path is a
//! word about its window; the rest is the controller's own.

use std::any::Any;
use std::time::Instant;

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerMetrics};

/// What is different. Each part may be left as it is.
pub(crate) trait Change: Clone + Send + Sync + 'static {
    /// Something is about to be sent.
    fn sending(&mut self, _inner: &mut Box<dyn Controller>, _now: Instant) {}

    /// So many bytes have been acknowledged.
    fn acknowledged(
        &mut self,
        _now: Instant,
        _sent: Instant,
        _bytes: u64,
        _app_limited: bool,
        _rtt: &RttEstimator,
    ) {
    }

    /// What the controller is told to be under way when acknowledgements have been counted.
    fn in_flight(&self, in_flight: u64) -> u64 {
        in_flight
    }

    /// Acknowledgements have been counted.
    fn counted(&mut self, _now: Instant, _app_limited: bool) {}

    fn mtu(&mut self, _mtu: u16) {}

    fn window(&self, inner: &dyn Controller) -> u64 {
        inner.window()
    }
}

pub(crate) struct Changed<C> {
    pub(crate) inner: Box<dyn Controller>,
    pub(crate) change: C,
}

impl<C: Change> Controller for Changed<C> {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.change.sending(&mut self.inner, now);
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
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
        self.change.acknowledged(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        let in_flight = self.change.in_flight(in_flight);
        self.inner
            .on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
        self.change.counted(now, app_limited);
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
        self.change.mtu(new_mtu);
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.change.window(&*self.inner)
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = self.inner.metrics();
        metrics.congestion_window = self.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Changed {
            inner: self.inner.clone_box(),
            change: self.change.clone(),
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
