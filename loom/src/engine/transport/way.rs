//! One packet leaves in a turn.

use std::sync::Arc;
use std::task::Context;
use std::time::Instant;

use quinn_proto as proto;

use crate::udp::asynchronous::AsyncUdpSocket;

pub(super) struct Way;

impl Way {
    pub(super) fn new(_: Arc<dyn AsyncUdpSocket>) -> Self {
        Way
    }

    pub(super) fn transmit(
        &mut self,
        proto: &mut proto::Connection,
        _: Instant,
        _: &mut Context<'_>,
    ) -> bool {
        if proto.queued == 0 {
            return false;
        }
        proto.queued -= 1;
        proto.sent += 1;
        true
    }

    pub(super) fn due(&self) -> Option<Instant> {
        None
    }
}
