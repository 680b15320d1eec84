//! How many streams the peer lets this side open (RFC 9000, section 4.6). Quinn keeps the number to itself, so
//! whoever decrypts the peer's packets reads it.

use std::sync::atomic::{AtomicU64, Ordering};

use quinn_proto::transport_parameters::TransportParameters;

/// The number of streams that the peer allows in the life of the connection, bidirectional and unidirectional
/// ones, and one more; 0 as long as it is not known.
#[derive(Debug, Default)]
pub(crate) struct Limits([AtomicU64; 2]);

const INITIAL_MAX_STREAMS_BIDI: u64 = 0x08;
const INITIAL_MAX_STREAMS_UNI: u64 = 0x09;

impl Limits {
    /// Bidirectional and unidirectional streams, once the peer has said.
    pub(crate) fn known(&self) -> Option<[u64; 2]> {
        let [bi, uni] = &self.0;
        let bi = bi.load(Ordering::Acquire).checked_sub(1)?;
        Some([bi, uni.load(Ordering::Acquire).checked_sub(1)?])
    }

    /// The peer's parameters: these count from the beginning.
    pub(super) fn begin(&self, parameters: &TransportParameters) {
        let mut encoded = Vec::with_capacity(256);
        parameters.write(&mut encoded);
        let begun = initial(&encoded);
        for (limit, initial) in self.0.iter().zip(begun) {
            limit.store(initial + 1, Ordering::Release);
        }
    }

    /// The frames of one packet. A limit never falls.
    pub(super) fn read(&self, frames: &[u8]) {
        let mut reader = Reader(frames);
        while reader.frame(|dir, count| {
            if let Some(limit) = self.0.get(dir) {
                limit.fetch_max(count.saturating_add(1), Ordering::AcqRel);
            }
        }) == Some(())
        {}
    }
}

fn initial(parameters: &[u8]) -> [u64; 2] {
    let (mut bi, mut uni) = (0, 0);
    let mut reader = Reader(parameters);
    while let Some((id, value)) = reader.parameter() {
        let value = Reader(value).number().unwrap_or(0);
        match id {
            INITIAL_MAX_STREAMS_BIDI => bi = value,
            INITIAL_MAX_STREAMS_UNI => uni = value,
            _ => {}
        }
    }
    [bi, uni]
}

struct Reader<'p>(&'p [u8]);

impl<'p> Reader<'p> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// An integer of variable length (RFC 9000, section 16).
    fn number(&mut self) -> Option<u64> {
        let first = self.byte()?;
        let begun = u64::from(first & 0x3f);
        if first < 0x40 {
            return Some(begun);
        }
        let more = (1usize << (first >> 6)) - 1;
        let rest = self.take(more as u64)?;
        Some(rest.iter().fold(begun, |n, b| n << 8 | u64::from(*b)))
    }

    fn take(&mut self, length: u64) -> Option<&'p [u8]> {
        let length = usize::try_from(length).ok()?;
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    /// Goes past so many integers: their first bytes tell where they end.
    fn numbers(&mut self, count: u64) -> Option<()> {
        (0..count).try_for_each(|_| {
            let first = *self.0.first()?;
            self.0 = self.0.get(1 << (first >> 6)..)?;
            Some(())
        })
    }

    /// Bytes behind their length.
    fn text(&mut self) -> Option<&'p [u8]> {
        let length = self.number()?;
        self.take(length)
    }

    fn parameter(&mut self) -> Option<(u64, &'p [u8])> {
        Some((self.number()?, self.text()?))
    }

    /// Goes past a frame (RFC 9000, section 19), and tells what it says of streams. Nothing at the end, and
    /// where a frame is not known, with which QUIC ends the connection.
    fn frame(&mut self, tell: impl FnOnce(usize, u64)) -> Option<()> {
        let kind = self.number()?;
        match kind {
            0x00 => self.padding(),
            // PING, IMMEDIATE_ACK, HANDSHAKE_DONE
            0x01 | 0x1f | 0x1e => {}
            0x02 | 0x03 => self.ack(kind == 0x03)?,
            // RESET_STREAM, STOP_SENDING
            0x04 => self.numbers(3)?,
            0x05 => self.numbers(2)?,
            // CRYPTO, NEW_TOKEN
            0x06 => {
                self.numbers(1)?;
                self.text()?;
            }
            0x07 => {
                self.text()?;
            }
            0x08..=0x0f => self.stream(kind)?,
            // MAX_DATA, MAX_STREAM_DATA
            0x10 => self.numbers(1)?,
            0x11 => self.numbers(2)?,
            // MAX_STREAMS
            0x12 | 0x13 => tell(usize::from(kind == 0x13), self.number()?),
            // DATA_BLOCKED, STREAM_DATA_BLOCKED, STREAMS_BLOCKED
            0x14 | 0x16 | 0x17 => self.numbers(1)?,
            0x15 => self.numbers(2)?,
            // NEW_CONNECTION_ID, RETIRE_CONNECTION_ID
            0x18 => {
                self.numbers(2)?;
                let length = self.byte()?;
                self.take(u64::from(length) + 16)?;
            }
            0x19 => self.numbers(1)?,
            // PATH_CHALLENGE, PATH_RESPONSE
            0x1a | 0x1b => {
                self.take(8)?;
            }
            // CONNECTION_CLOSE
            0x1c => {
                self.numbers(2)?;
                self.text()?;
            }
            0x1d => {
                self.numbers(1)?;
                self.text()?;
            }
            // DATAGRAM
            0x31 => {
                self.text()?;
            }
            // ACK_FREQUENCY
            0xaf => self.numbers(4)?,
            // A DATAGRAM that fills the packet, and others.
            _ => return None,
        }
        Some(())
    }

    /// Goes past what follows a byte of padding: a probe of the path's MTU has thousands.
    fn padding(&mut self) {
        while let Some((block, rest)) = self.0.split_first_chunk::<32>() {
            if *block != [0; 32] {
                return;
            }
            self.0 = rest;
        }
    }

    fn ack(&mut self, counts_ecn: bool) -> Option<()> {
        self.numbers(2)?;
        let ranges = self.number()?;
        self.numbers(ranges.checked_mul(2)?.checked_add(1)?)?;
        if counts_ecn {
            self.numbers(3)?;
        }
        Some(())
    }

    fn stream(&mut self, kind: u64) -> Option<()> {
        if kind & 0x02 == 0 {
            // To the end of the packet.
            return None;
        }
        self.numbers(if kind & 0x04 == 0 { 1 } else { 2 })?;
        self.text().map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(frames: &[&[u8]]) -> [u64; 2] {
        let limits = Limits([AtomicU64::new(1), AtomicU64::new(1)]);
        limits.read(&frames.concat());
        limits.known().expect("known")
    }

    #[test]
    fn nothing_is_known_before_the_peer_has_said() {
        assert_eq!(None, Limits::default().known());
    }

    #[test]
    fn the_parameters_of_the_peer_are_read() {
        let parameters = [0x01, 0x01, 0x05, 0x08, 0x02, 0x40, 0x64, 0x09, 0x01, 0x07];
        assert_eq!([100, 7], initial(&parameters));
        assert_eq!([0, 0], initial(&[]));
        assert_eq!([100, 0], initial(&parameters[..8]));
    }

    #[test]
    fn a_limit_is_read_behind_each_other_frame() {
        let others: &[&[u8]] = &[
            &[0x00, 0x00],
            &[0x00; 79],
            &[0x01],
            &[0x02, 0x05, 0x00, 0x01, 0x00, 0x01, 0x01],
            &[0x03, 0x05, 0x00, 0x00, 0x01, 0x01, 0x02, 0x03],
            &[0x04, 0x01, 0x02, 0x03],
            &[0x05, 0x01, 0x02],
            &[0x06, 0x00, 0x02, 0x12, 0x3f],
            &[0x07, 0x02, 0x12, 0x3f],
            &[0x0a, 0x01, 0x02, 0x12, 0x3f],
            &[0x0f, 0x01, 0x04, 0x02, 0x12, 0x3f],
            &[0x10, 0x3f],
            &[0x11, 0x01, 0x3f],
            &[0x14, 0x3f],
            &[0x15, 0x01, 0x3f],
            &[0x16, 0x3f],
            &[0x17, 0x3f],
            &[0x19, 0x01],
            &[0x1a, 0x12, 0x3f, 3, 4, 5, 6, 7, 8],
            &[0x1b, 0x12, 0x3f, 3, 4, 5, 6, 7, 8],
            &[0x1c, 0x01, 0x02, 0x02, 0x12, 0x3f],
            &[0x1d, 0x01, 0x02, 0x12, 0x3f],
            &[0x1e],
            &[0x1f],
            &[0x31, 0x02, 0x12, 0x3f],
            &[0x40, 0xaf, 0x01, 0x02, 0x03, 0x04],
        ];
        for other in others {
            assert_eq!([9, 0], after(&[other, &[0x12, 9]]), "{other:x?}");
        }
        let id = [&[0x18, 0x01, 0x00, 0x02, 0x12, 0x3f], [0x12; 16].as_slice()].concat();
        assert_eq!([0, 9], after(&[&id, &[0x13, 9]]));
        assert_eq!(
            [300, 9],
            after(&[&others.concat(), &[0x12, 0x41, 0x2c, 0x13, 9]])
        );
    }

    #[test]
    fn what_fills_the_packet_is_no_limit() {
        assert_eq!([0, 0], after(&[&[0x08, 0x01], &[0x12, 9]]));
        assert_eq!([0, 0], after(&[&[0x0c, 0x01, 0x05], &[0x12, 9]]));
        assert_eq!([0, 0], after(&[&[0x30], &[0x12, 9]]));
    }

    #[test]
    fn a_limit_never_falls() {
        assert_eq!([9, 4], after(&[&[0x12, 9, 0x12, 8, 0x13, 4, 0x13, 4]]));
    }

    #[test]
    fn any_bytes_end_the_reading() {
        let all: Vec<u8> = (0..=255).cycle().take(1024).collect();
        for start in 0..256 {
            for end in start..start + 40 {
                after(&[&all[start..end]]);
            }
        }
        after(&[&[0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]]);
        after(&[&[
            0x02, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        ]]);
    }
}
