//! Frames: how packets lie in a stream.
//!
//! Every stream of a link carries frames: a 32-bit big-endian header, then the payload. The two
//! upper bits of the header are the kind, the other 30 the payload's length:
//!
//! | kind | payload |
//! |------|---------|
//! | 0    | one distribution packet (an empty one is a tick) |
//! | 1    | a mark: 64 bits. In a lane: so many packets of the other lane come before what follows. On the
//!          control stream: so many packets of the bulk lane are delivered; 0 says nothing and serves as a probe |
//! | 2    | on the control stream alone: credit. 64 bits, the number of a user stream, and 64 bits, how many
//!          bytes of that stream may be sent in all. With the control stream's own number: somebody waits for a
//!          stream, and so many of this end's are open |
//! | 3    | reserved; receiving one ends the link |
//!
//! A lane begins with a preamble that names the layout's version and the lane's number: 0 is express, 1 bulk.

use std::borrow::BorrowMut;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Length of a frame's header.
pub(crate) const HEADER: usize = 4;
/// The longest payload a header can tell.
pub(crate) const MAX_PAYLOAD: usize = (1 << 30) - 1;
/// Length of a lane's preamble.
pub(crate) const PREAMBLE: usize = 8;

const KIND_SHIFT: u32 = 30;
const KIND_PACKET: u32 = 0;
const KIND_MARK: u32 = 1;
const KIND_CREDIT: u32 = 2;
const MARK_LEN: usize = 8;
const CREDIT_LEN: usize = 16;
/// The number of the control stream. It needs no credit, and who does not know what a frame of credit with this number
/// means takes it for that of a stream that is over.
pub(crate) const CONTROL: u64 = 0;
const MAGIC: u32 = 0x6d61_6c6e;
const VERSION: u16 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("reserved frame kind {0}")]
    Kind(u32),
    #[error("frame of {0} bytes where at most {1} are allowed")]
    TooLong(usize, usize),
    #[error("mark of {0} bytes")]
    MarkLength(usize),
    #[error("credit of {0} bytes")]
    CreditLength(usize),
    #[error("not a lane of this version")]
    Preamble,
}

/// What a header announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Head {
    Packet(usize),
    Mark,
    Credit,
}

/// The header of a packet of `len` bytes.
pub(crate) fn packet_header(len: usize) -> Result<[u8; HEADER], FrameError> {
    if len > MAX_PAYLOAD {
        return Err(FrameError::TooLong(len, MAX_PAYLOAD));
    }
    Ok((KIND_PACKET << KIND_SHIFT | len as u32).to_be_bytes())
}

/// Length of a whole mark.
pub(crate) const MARK: usize = HEADER + MARK_LEN;

/// A whole mark.
pub(crate) fn mark(number: u64) -> [u8; MARK] {
    let mut mark = [0; MARK];
    mark[..HEADER].copy_from_slice(&(KIND_MARK << KIND_SHIFT | MARK_LEN as u32).to_be_bytes());
    mark[HEADER..].copy_from_slice(&number.to_be_bytes());
    mark
}

/// Length of a whole frame of credit.
pub(crate) const CREDIT: usize = HEADER + CREDIT_LEN;

/// A whole frame of credit.
pub(crate) fn credit(stream: u64, limit: u64) -> [u8; CREDIT] {
    let mut credit = [0; CREDIT];
    credit[..HEADER]
        .copy_from_slice(&(KIND_CREDIT << KIND_SHIFT | CREDIT_LEN as u32).to_be_bytes());
    credit[HEADER..HEADER + 8].copy_from_slice(&stream.to_be_bytes());
    credit[HEADER + 8..].copy_from_slice(&limit.to_be_bytes());
    credit
}

/// Reads a header.
pub(crate) fn parse_header(header: [u8; HEADER], max: usize) -> Result<Head, FrameError> {
    let word = u32::from_be_bytes(header);
    let len = (word & MAX_PAYLOAD as u32) as usize;
    match word >> KIND_SHIFT {
        KIND_PACKET if len <= max => Ok(Head::Packet(len)),
        KIND_PACKET => Err(FrameError::TooLong(len, max)),
        KIND_MARK if len == MARK_LEN => Ok(Head::Mark),
        KIND_MARK => Err(FrameError::MarkLength(len)),
        KIND_CREDIT if len == CREDIT_LEN => Ok(Head::Credit),
        KIND_CREDIT => Err(FrameError::CreditLength(len)),
        kind => Err(FrameError::Kind(kind)),
    }
}

/// What a lane begins with.
pub(crate) fn preamble(lane: u16) -> [u8; PREAMBLE] {
    let mut bytes = [0; PREAMBLE];
    bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&VERSION.to_be_bytes());
    bytes[6..].copy_from_slice(&lane.to_be_bytes());
    bytes
}

/// The lane's number, from its preamble.
pub(crate) fn parse_preamble(bytes: [u8; PREAMBLE]) -> Result<u16, FrameError> {
    let mut bytes = &bytes[..];
    if bytes.get_u32() != MAGIC || bytes.get_u16() != VERSION {
        return Err(FrameError::Preamble);
    }
    Ok(bytes.get_u16())
}

/// A frame of a control stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Whole {
    Packet(Bytes),
    Mark(u64),
    Credit { stream: u64, limit: u64 },
}

/// Takes whole frames out of the bytes of a control stream, where frames are few and small.
#[derive(Debug, Default)]
pub(crate) struct Splitter {
    buffer: BytesMut,
}

impl Splitter {
    pub(crate) fn push(&mut self, chunk: &[u8]) {
        self.buffer.put_slice(chunk);
    }

    /// The next whole frame; a packet of at most `max` bytes.
    pub(crate) fn next(&mut self, max: usize) -> Result<Option<Whole>, FrameError> {
        let Some(header) = self.buffer.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let head = parse_header(*header, max)?;
        let len = match head {
            Head::Packet(len) => len,
            Head::Mark => MARK_LEN,
            Head::Credit => CREDIT_LEN,
        };
        if self.buffer.len() < HEADER + len {
            return Ok(None);
        }
        self.buffer.advance(HEADER);
        let mut payload = self.buffer.split_to(len).freeze();
        Ok(Some(match head {
            Head::Packet(_) => Whole::Packet(payload),
            Head::Mark => Whole::Mark(payload.get_u64()),
            Head::Credit => Whole::Credit {
                stream: payload.get_u64(),
                limit: payload.get_u64(),
            },
        }))
    }
}

/// Where the packets that a lane carries are put.
pub(crate) trait Sink {
    /// A buffer for one packet that is worth an allocation of its own.
    type Large: BorrowMut<[u8]>;

    fn alloc(&mut self, len: usize) -> Self::Large;
    /// Makes a buffer larger that is full.
    fn grow(&mut self, packet: &mut Self::Large, len: usize);
    /// A large packet is complete.
    fn large(&mut self, packet: Self::Large);
    /// A small packet, to be copied.
    fn small(&mut self, parts: &[&[u8]]);
}

/// Packets of this size and more get a buffer of their own: the VM keeps a received binary instead
/// of copying out of it only when it needs most of it.
pub(crate) const LARGE: usize = 512;

/// A header may tell more than ever comes: the buffer of a packet begins with at most so much, and doubles as it
/// fills. Nodes send fragments of 64 KiB.
const ANNOUNCED: usize = 1024 * 1024;

/// What a lane says beside its packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Said {
    /// Its number.
    Lane(u16),
    /// What follows waits for so many packets of the other lane.
    Mark(u64),
}

/// Takes a lane apart without ever copying a byte twice.
#[derive(Debug)]
pub(crate) struct Assembler<L> {
    state: State<L>,
    max: usize,
}

#[derive(Debug)]
enum State<L> {
    Preamble {
        seen: usize,
        bytes: [u8; PREAMBLE],
    },
    Header {
        seen: usize,
        bytes: [u8; HEADER],
    },
    Mark {
        seen: usize,
        bytes: [u8; MARK_LEN],
    },
    Small {
        len: usize,
        bytes: Vec<u8>,
    },
    Large {
        filled: usize,
        len: usize,
        packet: L,
    },
}

impl<L> State<L> {
    const fn header() -> Self {
        State::Header {
            seen: 0,
            bytes: [0; HEADER],
        }
    }
}

impl<L: BorrowMut<[u8]>> Assembler<L> {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            state: State::Preamble {
                seen: 0,
                bytes: [0; PREAMBLE],
            },
            max,
        }
    }

    /// Takes what is in `chunk`, up to the first that the lane says beside its packets.
    pub(crate) fn push<S: Sink<Large = L>>(
        &mut self,
        chunk: &mut &[u8],
        sink: &mut S,
    ) -> Result<Option<Said>, FrameError> {
        while !chunk.is_empty() {
            match &mut self.state {
                State::Preamble { seen, bytes } => {
                    if fill(bytes, seen, chunk) {
                        let lane = parse_preamble(*bytes)?;
                        self.state = State::header();
                        return Ok(Some(Said::Lane(lane)));
                    }
                }
                State::Header { seen, bytes } => {
                    if fill(bytes, seen, chunk) {
                        let head = parse_header(*bytes, self.max)?;
                        self.begin(head, chunk, sink)?;
                    }
                }
                State::Mark { seen, bytes } => {
                    if fill(bytes, seen, chunk) {
                        let mark = u64::from_be_bytes(*bytes);
                        self.state = State::header();
                        return Ok(Some(Said::Mark(mark)));
                    }
                }
                State::Small { len, bytes } => {
                    let take = (*len - bytes.len()).min(chunk.len());
                    if bytes.len() + take == *len {
                        sink.small(&[bytes, &chunk[..take]]);
                        self.state = State::header();
                    } else {
                        bytes.extend_from_slice(&chunk[..take]);
                    }
                    chunk.advance(take);
                }
                State::Large {
                    filled,
                    len,
                    packet,
                } => {
                    let mut room = packet.borrow().len();
                    if *filled == room {
                        room = (room * 2).min(*len);
                        sink.grow(packet, room);
                    }
                    let take = (room - *filled).min(chunk.len());
                    packet.borrow_mut()[*filled..*filled + take].copy_from_slice(&chunk[..take]);
                    *filled += take;
                    chunk.advance(take);
                    if *filled == *len
                        && let State::Large { packet, .. } =
                            std::mem::replace(&mut self.state, State::header())
                    {
                        sink.large(packet);
                    }
                }
            }
        }
        Ok(None)
    }

    /// A header is complete. The usual small packet is complete in this chunk too.
    fn begin<S: Sink<Large = L>>(
        &mut self,
        head: Head,
        chunk: &mut &[u8],
        sink: &mut S,
    ) -> Result<(), FrameError> {
        self.state = match head {
            Head::Credit => return Err(FrameError::Kind(KIND_CREDIT)),
            Head::Mark => State::Mark {
                seen: 0,
                bytes: [0; MARK_LEN],
            },
            Head::Packet(len) if len >= LARGE => State::Large {
                filled: 0,
                len,
                packet: sink.alloc(len.min(ANNOUNCED)),
            },
            Head::Packet(len) if len <= chunk.len() => {
                sink.small(&[&chunk[..len]]);
                chunk.advance(len);
                State::header()
            }
            Head::Packet(len) => State::Small {
                len,
                bytes: Vec::with_capacity(len),
            },
        };
        Ok(())
    }
}

/// Fills a fixed buffer; tells whether it is full now.
fn fill<const N: usize>(bytes: &mut [u8; N], seen: &mut usize, chunk: &mut &[u8]) -> bool {
    let take = (N - *seen).min(chunk.len());
    bytes[*seen..*seen + take].copy_from_slice(&chunk[..take]);
    *seen += take;
    chunk.advance(take);
    *seen == N
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    enum Got {
        Packet(Vec<u8>),
        Mark(u64),
    }

    #[derive(Default)]
    struct Log(Vec<Got>);

    impl Sink for Log {
        type Large = Vec<u8>;
        fn alloc(&mut self, len: usize) -> Vec<u8> {
            vec![0; len]
        }
        fn grow(&mut self, packet: &mut Vec<u8>, len: usize) {
            packet.resize(len, 0);
        }
        fn large(&mut self, packet: Vec<u8>) {
            self.0.push(Got::Packet(packet));
        }
        fn small(&mut self, parts: &[&[u8]]) {
            self.0.push(Got::Packet(parts.concat()));
        }
    }

    /// Takes all of a chunk; answers the lane, when the chunk tells it.
    fn push_all(
        assembler: &mut Assembler<Vec<u8>>,
        mut chunk: &[u8],
        log: &mut Log,
    ) -> Result<Option<u16>, FrameError> {
        let mut lane = None;
        while let Some(said) = assembler.push(&mut chunk, log)? {
            match said {
                Said::Lane(number) => lane = Some(number),
                Said::Mark(mark) => log.0.push(Got::Mark(mark)),
            }
        }
        Ok(lane)
    }

    fn packet(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + len) as u8).collect()
    }

    fn stream(lens: &[usize]) -> Vec<u8> {
        let mut bytes = preamble(3).to_vec();
        for (i, len) in lens.iter().enumerate() {
            bytes.extend(packet_header(*len).expect("fits"));
            bytes.extend(packet(*len));
            if i == 1 {
                bytes.extend(mark(42));
            }
        }
        bytes
    }

    fn expected(lens: &[usize]) -> Vec<Got> {
        let mut all: Vec<Got> = lens.iter().map(|len| Got::Packet(packet(*len))).collect();
        if lens.len() > 1 {
            all.insert(2, Got::Mark(42));
        }
        all
    }

    #[test]
    fn packets_come_out_whole_wherever_the_stream_is_cut() {
        let lens = [0, 1, 4, 100, LARGE - 1, LARGE, LARGE + 1, 10_000, 0, 3];
        let bytes = stream(&lens);
        for cut in [1, 2, 3, 5, 7, 64, 1000, 4096, bytes.len()] {
            let mut assembler = Assembler::new(MAX_PAYLOAD);
            let mut log = Log::default();
            let mut lane = None;
            for chunk in bytes.chunks(cut) {
                lane = push_all(&mut assembler, chunk, &mut log)
                    .expect("valid")
                    .or(lane);
            }
            assert_eq!(lane, Some(3));
            assert_eq!(log.0, expected(&lens), "cut at {cut}");
        }
    }

    #[test]
    fn a_buffer_grows_with_what_has_come() {
        let lens = [ANNOUNCED - 1, ANNOUNCED, ANNOUNCED + 1, 3 * ANNOUNCED + 7];
        let bytes = stream(&lens);
        for cut in [4096, 1_000_000, bytes.len()] {
            let mut assembler = Assembler::new(MAX_PAYLOAD);
            let mut log = Log::default();
            for chunk in bytes.chunks(cut) {
                push_all(&mut assembler, chunk, &mut log).expect("valid");
            }
            assert_eq!(log.0, expected(&lens), "cut at {cut}");
        }
        let mut assembler = Assembler::new(MAX_PAYLOAD);
        let mut bytes = preamble(0).to_vec();
        bytes.extend(packet_header(MAX_PAYLOAD).expect("fits"));
        bytes.extend(packet(ANNOUNCED + 1));
        push_all(&mut assembler, &bytes, &mut Log::default()).expect("valid");
        let State::Large { packet, .. } = &assembler.state else {
            panic!("{:?}", assembler.state);
        };
        assert_eq!(packet.len(), 2 * ANNOUNCED);
    }

    #[test]
    fn an_empty_packet_at_the_end_of_a_chunk_is_delivered_at_once() {
        let mut assembler = Assembler::new(MAX_PAYLOAD);
        let mut log = Log::default();
        push_all(&mut assembler, &stream(&[0]), &mut log).expect("valid");
        assert_eq!(log.0, vec![Got::Packet(vec![])]);
    }

    #[test]
    fn reserved_kinds_wrong_marks_and_long_packets_are_refused() {
        let parse = |word: u32| parse_header(word.to_be_bytes(), 1000);
        assert_eq!(parse(2 << 30), Err(FrameError::CreditLength(0)));
        assert_eq!(parse(2 << 30 | 16), Ok(Head::Credit));
        assert_eq!(parse(3 << 30 | 8), Err(FrameError::Kind(3)));
        assert_eq!(parse(1 << 30 | 7), Err(FrameError::MarkLength(7)));
        assert_eq!(parse(1001), Err(FrameError::TooLong(1001, 1000)));
        assert_eq!(parse(1000), Ok(Head::Packet(1000)));
        assert!(packet_header(MAX_PAYLOAD).is_ok());
        assert!(packet_header(MAX_PAYLOAD + 1).is_err());
    }

    #[test]
    fn credit_is_for_the_control_stream_alone() {
        let mut splitter = Splitter::default();
        splitter.push(&credit(8, 1 << 40));
        assert_eq!(
            splitter.next(0),
            Ok(Some(Whole::Credit {
                stream: 8,
                limit: 1 << 40
            }))
        );
        let mut bytes = preamble(0).to_vec();
        bytes.extend(credit(8, 1));
        let mut assembler = Assembler::new(MAX_PAYLOAD);
        assert_eq!(
            push_all(&mut assembler, &bytes, &mut Log::default()),
            Err(FrameError::Kind(2))
        );
    }

    #[test]
    fn a_stream_that_is_no_lane_is_refused() {
        let mut assembler = Assembler::new(MAX_PAYLOAD);
        let mut log = Log::default();
        assert_eq!(
            push_all(&mut assembler, b"GET / HTTP/1.1", &mut log),
            Err(FrameError::Preamble)
        );
    }

    #[test]
    fn the_splitter_gives_one_frame_at_a_time() {
        let mut splitter = Splitter::default();
        let mut bytes = Vec::new();
        for len in [3usize, 0, 5] {
            bytes.extend(packet_header(len).expect("fits"));
            bytes.extend(packet(len));
        }
        splitter.push(&bytes[..6]);
        assert_eq!(splitter.next(100), Ok(None));
        splitter.push(&bytes[6..]);
        assert_eq!(
            splitter.next(100).expect("valid"),
            Some(Whole::Packet(Bytes::from(packet(3))))
        );
        assert_eq!(
            splitter.next(100).expect("valid"),
            Some(Whole::Packet(Bytes::new()))
        );
        assert_eq!(
            splitter.next(100).expect("valid"),
            Some(Whole::Packet(Bytes::from(packet(5))))
        );
        assert_eq!(splitter.next(100), Ok(None));
        splitter.push(&packet_header(101).expect("fits"));
        assert_eq!(splitter.next(100), Err(FrameError::TooLong(101, 100)));
    }
}
