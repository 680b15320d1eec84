//! What both ends know of the load: the first byte of a stream says what it is for, and the bytes of
//! a long stream can be told from their place.

use std::hash::{DefaultHasher, Hasher};

/// The server answers every 64 bytes with the same.
pub(crate) const ECHO: u8 = 1;
/// Eight bytes with the sum over all streams follow, then the pattern; the server compares every
/// byte and answers with their number.
pub(crate) const COUNT: u8 = 2;
/// The server reads to the end and answers with the hash of what came.
pub(crate) const SHORT: u8 = 3;
/// The server holds the stream and does nothing.
pub(crate) const IDLE: u8 = 4;
/// The server answers with what it has seen: five numbers of eight bytes.
pub(crate) const ASK: u8 = 5;

pub(crate) const SMALL: usize = 64;
pub(crate) const DATAGRAM: usize = 1000;
/// With this code the server closes a connection whose client asks for the name `refused`.
pub(crate) const REFUSED: u32 = 7;

/// A prime: no piece of the usual sizes, lost or twice there, leaves the rest in place.
const PERIOD: usize = 65521;
const LONGEST: usize = 64 * 1024;

/// Bytes without an order, repeated for ever.
pub(crate) struct Pattern(Vec<u8>);

impl Pattern {
    pub(crate) fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut bytes: Vec<u8> = (0..PERIOD)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32) as u8
            })
            .collect();
        bytes.extend_from_within(..);
        bytes.extend_from_within(..LONGEST - PERIOD);
        Pattern(bytes)
    }

    /// At most `size` bytes from this place on.
    pub(crate) fn at(&self, place: u64, size: usize) -> &[u8] {
        let start = (place % PERIOD as u64) as usize;
        let end = (start + size).min(self.0.len());
        self.0.get(start..end).unwrap_or_default()
    }

    pub(crate) fn is(&self, mut place: u64, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let expected = self.at(place, bytes.len());
            let (first, rest) = bytes.split_at(expected.len());
            if first != expected {
                return false;
            }
            place += first.len() as u64;
            bytes = rest;
        }
        true
    }
}

pub(crate) fn hash(bytes: &[u8]) -> [u8; 8] {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish().to_be_bytes()
}
