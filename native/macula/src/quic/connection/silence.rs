//! Whether the peer answers what is sent to it. QUIC sends again what is not acknowledged until the
//! connection is idle for too long; whoever wants to know sooner asks for it.

use std::time::Duration;

use crate::engine::transport::ConnectionStats;
use tokio::time::Instant;

use super::Connection;
use crate::vm::fault::{self, Point};

/// How often in its time the connection is looked at.
const LOOKS: u32 = 8;
const LEAST_PAUSE: Duration = Duration::from_millis(2);

/// Resolves when something sent has been without any answer for so long, and an eighth at most.
pub(super) async fn unanswered(connection: &Connection) {
    let Some(patience) = connection.patience else {
        return std::future::pending().await;
    };
    let pause = (patience / LOOKS).max(LEAST_PAUSE);
    let mut silence = Silence::default();
    loop {
        fault::pass(Point::Silence);
        let (now, seen) = (Instant::now(), Seen::of(&connection.quic.stats()));
        if silence.look(now, seen) >= patience {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

/// What a look shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Seen {
    /// Datagrams of the peer.
    received: u64,
    /// Frames that the peer must acknowledge.
    asked: u64,
}

impl Seen {
    fn of(stats: &ConnectionStats) -> Self {
        let tx = &stats.frame_tx;
        let asked = [
            tx.ack_frequency,
            tx.crypto,
            tx.data_blocked,
            tx.datagram,
            u64::from(tx.handshake_done),
            tx.immediate_ack,
            tx.max_data,
            tx.max_stream_data,
            tx.max_streams_bidi,
            tx.max_streams_uni,
            tx.new_connection_id,
            tx.new_token,
            tx.path_challenge,
            tx.path_response,
            tx.ping,
            tx.reset_stream,
            tx.retire_connection_id,
            tx.stream_data_blocked,
            tx.streams_blocked_bidi,
            tx.streams_blocked_uni,
            tx.stop_sending,
            tx.stream,
        ];
        Seen {
            received: stats.udp_rx.datagrams,
            asked: asked.iter().sum(),
        }
    }
}

/// Since when something waits for an answer.
#[derive(Debug, Default)]
struct Silence {
    /// As it was when the peer was heard last.
    heard: Seen,
    since: Option<Instant>,
}

impl Silence {
    /// How long something has waited.
    fn look(&mut self, now: Instant, seen: Seen) -> Duration {
        if seen.received != self.heard.received {
            // What was sent since, and is not acknowledged, is sent again and counted then.
            self.heard = seen;
            self.since = None;
        } else if seen.asked != self.heard.asked {
            let since = *self.since.get_or_insert(now);
            return now.saturating_duration_since(since);
        }
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_sent_and_not_answered_counts() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let seen = |received, asked| Seen { received, asked };
        let mut silence = Silence::default();
        assert_eq!(Duration::ZERO, silence.look(start, seen(3, 5)));
        // Nothing was sent: whoever says nothing need not be answered.
        assert_eq!(Duration::ZERO, silence.look(at(5000), seen(3, 5)));
        assert_eq!(Duration::ZERO, silence.look(at(6000), seen(3, 6)));
        assert_eq!(
            Duration::from_millis(500),
            silence.look(at(6500), seen(3, 7))
        );
        assert_eq!(
            Duration::from_millis(900),
            silence.look(at(6900), seen(3, 7))
        );
        // Any word of the peer will do.
        assert_eq!(Duration::ZERO, silence.look(at(7000), seen(4, 8)));
        assert_eq!(Duration::ZERO, silence.look(at(9000), seen(4, 8)));
    }
}
