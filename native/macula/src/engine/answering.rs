//! Acknowledgements that leave whatever is under way.
//!
//! `quinn-proto` puts acknowledgements into the packets of the data that waits, and makes such a packet only where
//! the congestion window and the pacer have room. Where both ends have more under way than their windows are, each
//! waits for the other's acknowledgements, until a probe timeout makes one packet: bulk both ways stands still again
//! and again, and for seconds where a node was stopped, as the packets that waited for the node count as slow ones.
//! RFC 9002, section 7, holds no acknowledgement back, and RFC 9000, section 13.2.1, wants one within the delay that
//! was announced. So where data is held back, and the peer has sent something since the last packet left, one packet
//! leaves beyond the window. Acknowledgements cannot leave without the data, so there are only some such packets in a
//! round trip.

use std::cell::Cell;
use std::time::{Duration, Instant};

use quinn_proto::{Connection, FrameStats, Transmit};

/// More than is ever under way, and little enough to be multiplied.
pub(super) const UNBOUNDED: u64 = u32::MAX as u64;

/// The peer waits for so long, a quarter of a round trip within these bounds. The larger one is the delay that
/// `quinn-proto` announces.
const LEAST_DELAY: Duration = Duration::from_millis(1);
const LONGEST_DELAY: Duration = Duration::from_millis(25);

thread_local! {
    /// Somebody has looked at the window of the connection that this thread drives.
    static ASKED: Cell<bool> = const { Cell::new(false) };
    /// The window has no bound.
    static OPEN: Cell<bool> = const { Cell::new(false) };
}

/// The window of a controller whose own is `window`.
pub(super) fn window(window: u64) -> u64 {
    ASKED.set(true);
    if OPEN.get() { UNBOUNDED } else { window }
}

/// Opens the window for as long as this lives.
struct Opened;

impl Opened {
    fn new() -> Self {
        OPEN.set(true);
        Opened
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        OPEN.set(false);
    }
}

/// What a connection owes its peer.
#[derive(Default)]
pub(super) struct Answering {
    /// What has come that is to be acknowledged, at the last look.
    heard: u64,
    /// When some of that had come, and the window held everything back.
    since: Option<Instant>,
    due: Option<Instant>,
}

impl Answering {
    /// When a packet is to leave beyond the window.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Something has left, with all acknowledgements that waited, or nothing waits.
    pub(super) fn answered(&mut self) {
        self.since = None;
        self.due = None;
    }

    /// Asks for packets, `first` where nothing has left in this turn.
    pub(super) fn poll_transmit(
        &mut self,
        proto: &mut Connection,
        now: Instant,
        most: usize,
        buffer: &mut Vec<u8>,
        first: bool,
    ) -> Option<Transmit> {
        ASKED.set(false);
        let transmit = proto.poll_transmit(now, most, buffer);
        // Only data that waits makes it look at the window.
        let is_held = transmit.is_none() && ASKED.get();
        if !is_held {
            self.answered();
            return transmit;
        }
        let heard = to_be_acknowledged(&proto.stats().frame_rx);
        let is_new = std::mem::replace(&mut self.heard, heard) != heard;
        if !first {
            self.answered();
            return None;
        }
        if is_new {
            self.since.get_or_insert(now);
        }
        let since = self.since?;
        let due = since + (proto.rtt() / 4).clamp(LEAST_DELAY, LONGEST_DELAY);
        if now < due {
            self.due = Some(due);
            return None;
        }
        self.answered();
        let _opened = Opened::new();
        proto.poll_transmit(now, 1, buffer)
    }
}

/// Frames of the peer that make a packet one that is to be acknowledged.
fn to_be_acknowledged(frames: &FrameStats) -> u64 {
    // Those that do not come among bulk, or not alone, are left out.
    [
        frames.stream,
        frames.datagram,
        frames.ping,
        frames.crypto,
        frames.immediate_ack,
        frames.max_data,
        frames.max_stream_data,
        frames.max_streams_bidi,
        frames.max_streams_uni,
        frames.reset_stream,
        frames.stop_sending,
        frames.new_connection_id,
        frames.retire_connection_id,
        frames.stream_data_blocked,
        frames.data_blocked,
    ]
    .into_iter()
    .fold(0, u64::wrapping_add)
}
