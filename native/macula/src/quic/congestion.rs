//! A congestion controller that begins anew after silence.
//!
//! What a path took before says little of what it takes after a while. Quinn's controllers keep their window
//! however long nothing was sent.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};

/// Makes controllers that are replaced by fresh ones when nothing was sent for so long.
pub(crate) struct ForgetfulConfig {
    pub(crate) controllers: Arc<dyn ControllerFactory + Send + Sync>,
    pub(crate) after: Duration,
}

impl ControllerFactory for ForgetfulConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Forgetful {
            inner: self.controllers.clone().build(now, current_mtu),
            mtu: current_mtu,
            sent: now,
            config: self,
        })
    }
}

struct Forgetful {
    inner: Box<dyn Controller>,
    mtu: u16,
    /// When something was sent last.
    sent: Instant,
    config: Arc<ForgetfulConfig>,
}

impl Controller for Forgetful {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        if now.saturating_duration_since(self.sent) > self.config.after {
            self.inner = self.config.controllers.clone().build(now, self.mtu);
        }
        self.sent = now;
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
        self.mtu = new_mtu;
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Forgetful {
            inner: self.inner.clone_box(),
            mtu: self.mtu,
            sent: self.sent,
            config: self.config.clone(),
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use quinn_proto::congestion::CubicConfig;

    use super::*;

    #[test]
    fn the_window_begins_anew_after_silence_and_only_then() {
        let after = Duration::from_secs(1);
        let config = Arc::new(ForgetfulConfig {
            controllers: Arc::new(CubicConfig::default()),
            after,
        });
        let start = Instant::now();
        let mut controller = config.build(start, 1200);
        let first = controller.window();
        controller.on_sent(start, 1200, 0);
        controller.on_congestion_event(start, start, false, 1200);
        let shrunk = controller.window();
        assert!(shrunk < first);
        controller.on_sent(start + after, 1200, 1);
        assert_eq!(shrunk, controller.window());
        let later = start + after + after + Duration::from_millis(1);
        let mut copy = controller.clone_box();
        controller.on_sent(later, 1200, 2);
        assert_eq!(first, controller.window());
        // A copy is one of its own.
        assert_eq!(shrunk, copy.window());
        copy.on_sent(later, 1200, 2);
        assert_eq!(first, copy.window());
    }
}
