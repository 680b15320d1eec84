//! A probe of a path's MTU is a PING and thousands of bytes of PADDING (RFC 9000, section 14.4), which
//! quinn-proto reads one by one: about an eighth of what a new link cost. Whoever decrypts such a packet
//! leaves one byte of the padding, which says the same.

use bytes::BytesMut;

use super::watched::Watch;

/// A shorter packet costs little.
const LONG: usize = 1_400;
/// The frames of a byte that a probe begins with, at most.
const FRAMES: usize = 4;

const PADDING: u8 = 0x00;
const PING: u8 = 0x01;
const IMMEDIATE_ACK: u8 = 0x1f;

/// Leaves one byte of PADDING in a long packet that has nothing else behind a PING.
pub(super) fn cut(payload: &mut BytesMut) {
    if payload.len() < LONG {
        return;
    }
    let is_short = |frame: &&u8| matches!(**frame, PING | IMMEDIATE_ACK);
    let frames = payload.iter().take(FRAMES).take_while(is_short).count();
    if is_padding(&payload[frames..]) {
        payload.truncate(frames + 1);
    }
}

/// Looks at many bytes at a time. Most packets have something else in the first of them.
fn is_padding(bytes: &[u8]) -> bool {
    bytes.first() == Some(&PADDING)
        && bytes
            .chunks(64)
            .all(|some| some.iter().fold(0, |all, byte| all | byte) == PADDING)
}

/// Has sessions pass padding quickly.
#[derive(Clone, Default)]
pub(crate) struct Passing;

impl Watch for Passing {
    fn has_decrypted(&self, payload: &mut BytesMut) {
        cut(payload);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left_of(begin: &[u8], zeros: usize, end: &[u8]) -> Vec<u8> {
        let payload = [begin, &vec![0; zeros], end].concat();
        let mut payload = BytesMut::from(payload.as_slice());
        cut(&mut payload);
        payload.to_vec()
    }

    #[test]
    fn a_probe_is_read_as_a_ping_and_one_byte_of_padding() {
        assert_eq!(vec![PING, PADDING], left_of(&[PING], 32_000, &[]));
        assert_eq!(
            vec![PING, IMMEDIATE_ACK, PADDING],
            left_of(&[PING, IMMEDIATE_ACK], 32_000, &[])
        );
        assert_eq!(vec![PADDING], left_of(&[], 32_000, &[]));
    }

    #[test]
    fn what_is_no_probe_stays_as_it_is() {
        // A stream to the packet's end, and one with a length: their zeros are data.
        for begin in [
            &[0x08, 0x04][..],
            &[PING, 0x08, 0x04],
            &[PING, 0x0a, 0x04, 0x7d, 0x00],
            &[0x02, 0x05, 0x00, 0x00, 0x00],
            &[0x30],
        ] {
            let whole = [begin, &vec![0; 32_000]].concat();
            assert_eq!(whole, left_of(begin, 32_000, &[]), "{begin:x?}");
        }
        // Something at the end, at each place of a look.
        for zeros in 32_000..32_070 {
            assert_eq!(zeros + 2, left_of(&[PING], zeros, &[PING]).len());
        }
        assert_eq!(vec![PING; 2_000], left_of(&[PING; 2_000], 0, &[]));
        assert_eq!(1_001, left_of(&[PING], 1_000, &[]).len());
        assert!(left_of(&[], 0, &[]).is_empty());
    }
}
