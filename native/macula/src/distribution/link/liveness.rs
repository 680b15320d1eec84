//! Whether the peer of a link is still there.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::engine::transport::VarInt;

use super::{CODE_END, Control, Link, Role};

/// A peer whose host says so often, for so long, that it has no such port, and that is not heard of
/// meanwhile, is gone.
const REFUSALS: u32 = 3;

const REFUSED_FOR: Duration = Duration::from_secs(1);

/// What is to be done after a look at a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    Nothing,
    /// A datagram that only a host without such a port answers.
    Knock,
}

/// The signs of life of the peer's transport.
pub(super) struct Watch {
    /// The smaller one of both ends: a peer is gone after this long without a sign.
    pub(super) liveness: Duration,
    /// None at the acceptor's end before the peer has proven itself.
    pub(super) next: Option<Instant>,
    /// Datagrams received at the last look.
    pub(super) heard: u64,
    /// Looks since then that found nothing new.
    pub(super) silent: u32,
}

/// Between two looks. The dialler asks for a sign of life at the second look that finds nothing new, and the
/// peer is gone at the next, which is the fourth after its last sign at most. The acceptor waits for one look
/// more, or for the end of the liveness time.
pub(super) fn turn(liveness: Duration) -> Duration {
    liveness * 2 / 9
}

/// Until the link is up its dialler looks this often: one that meets a node in the moment of its end is
/// to know at once, as the node that follows may be waiting for this very link.
pub(super) const EARLY: Duration = Duration::from_millis(500);

/// The peer's host has refused datagrams, and nothing has come from the peer since.
pub(super) struct Refusal {
    since: Instant,
    count: u32,
    /// Datagrams received before.
    heard: u64,
}

impl Link {
    pub(crate) fn next_look(&self) -> Option<Instant> {
        self.watch().next
    }

    /// Looks for signs of life, if that is due soon.
    pub(crate) fn look(&self) -> Look {
        let mut watch = self.watch();
        let is_up = self.started.load(Ordering::Acquire);
        let turn = if is_up { turn(watch.liveness) } else { EARLY };
        let now = Instant::now();
        let Some(due) = watch.next.filter(|due| *due <= now + turn / 4) else {
            return Look::Nothing;
        };
        watch.next = Some(now + turn);
        let heard = self.look_up().stats.udp_rx.datagrams;
        // After a stop of the whole process the peer's datagrams may still wait in the socket.
        let late = now.saturating_duration_since(due) >= turn / 2;
        if heard != watch.heard || late {
            watch.heard = heard;
            watch.silent = 0;
            return Look::Knock;
        }
        if !is_up {
            // The handshake has timeouts of its own: a dead peer's successor answers with a reset.
            if self.role == Role::Dialler {
                let _ = self.command(Control::Probe);
            }
            return Look::Nothing;
        }
        watch.silent += 1;
        match (self.role, watch.silent) {
            (_, 1) => Look::Knock,
            (Role::Dialler, 2) => {
                let _ = self.command(Control::Probe);
                Look::Nothing
            }
            (Role::Dialler, _) | (Role::Acceptor, 4..) => {
                self.connection.close(VarInt::from_u32(CODE_END), b"");
                Look::Nothing
            }
            (Role::Acceptor, _) => Look::Knock,
        }
    }

    /// A datagram to the peer was refused by its host. That may be made up: a peer that lives answers
    /// what it is sent now, and one that is gone has the rest refused, too. At the first refusal it
    /// answers how often to knock from now on.
    pub(crate) fn refused(&self) -> Option<Duration> {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        let heard = self.connection.stats().udp_rx.datagrams;
        let time = REFUSED_FOR.max(4 * self.connection.rtt());
        let mut refusal = self.refusal();
        match &mut *refusal {
            Some(known) if known.heard == heard => {
                known.count += 1;
                if known.count >= REFUSALS && known.since.elapsed() >= time {
                    self.connection.close(VarInt::from_u32(CODE_END), b"");
                }
                None
            }
            other => {
                *other = Some(Refusal {
                    since: Instant::now(),
                    count: 1,
                    heard,
                });
                let _ = self.command(Control::Probe);
                // One more than needed ends the link right after the time is over.
                Some(time / REFUSALS + Duration::from_millis(10))
            }
        }
    }

    /// Datagrams have been refused and nothing has been heard since.
    pub(crate) fn is_in_doubt(&self) -> bool {
        let heard = self.connection.stats().udp_rx.datagrams;
        !self.is_closed()
            && self
                .refusal()
                .as_ref()
                .is_some_and(|known| known.heard == heard)
    }
}
