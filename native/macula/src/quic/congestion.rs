//! A congestion controller that begins anew after silence.
//!
//! What a path took before says little of what it takes after a while. Quinn's controllers keep their window
//! however long nothing was sent.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::congestion::{Controller, ControllerFactory};

use crate::engine::congestion::{Change, Changed};

/// Makes controllers that are replaced by fresh ones when nothing was sent for so long.
pub(crate) struct ForgetfulConfig {
    pub(crate) controllers: Arc<dyn ControllerFactory + Send + Sync>,
    pub(crate) after: Duration,
}

impl ControllerFactory for ForgetfulConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Changed {
            inner: self.controllers.clone().build(now, current_mtu),
            change: Forgetful {
                mtu: current_mtu,
                sent: now,
                config: self,
            },
        })
    }
}

#[derive(Clone)]
struct Forgetful {
    mtu: u16,
    /// When something was sent last.
    sent: Instant,
    config: Arc<ForgetfulConfig>,
}

impl Change for Forgetful {
    fn sending(&mut self, inner: &mut Box<dyn Controller>, now: Instant) {
        if now.saturating_duration_since(self.sent) > self.config.after {
            *inner = self.config.controllers.clone().build(now, self.mtu);
        }
        self.sent = now;
    }

    fn mtu(&mut self, mtu: u16) {
        self.mtu = mtu;
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
