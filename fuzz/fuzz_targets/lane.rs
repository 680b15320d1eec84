//! What comes on the streams of a link, as any bytes in pieces of any length: it is taken apart in the same way
//! wherever it was cut, nothing is lost or added, and a length that is only announced takes no memory.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../native/macula/src/distribution/frame.rs"]
mod frame;

use frame::{Assembler, FrameError, Head, Said, Sink, Splitter, Whole};

const MAX: usize = 1 << 24;

fuzz_target!(|data: &[u8]| {
    if let Some(header) = data.first_chunk::<4>()
        && let Ok(Head::Packet(len)) = frame::parse_header(*header, MAX)
    {
        assert!(len <= MAX);
        assert_eq!(frame::packet_header(len), Ok(*header));
    }
    if let Some(bytes) = data.first_chunk::<8>()
        && let Ok(lane) = frame::parse_preamble(*bytes)
    {
        assert_eq!(frame::preamble(lane), *bytes);
    }
    let Some((cut, data)) = data.split_first() else {
        return;
    };
    let step = usize::from(*cut).max(1);
    let whole = control(data, data.len().max(1));
    assert_eq!(whole, control(data, step));
    assert!(data.starts_with(&whole.0));
    // A lane begins with its number, which few inputs have.
    for begin in [&[][..], &frame::preamble(1)] {
        let data = [begin, data].concat();
        let whole = lane(&data, data.len().max(1));
        assert_eq!(whole, lane(&data, step));
        assert!(data.starts_with(&whole.0));
    }
});

/// The frames of a control stream written again, and how it ends.
fn control(data: &[u8], step: usize) -> (Vec<u8>, Option<FrameError>) {
    let (mut splitter, mut again) = (Splitter::default(), Vec::new());
    for chunk in data.chunks(step) {
        splitter.push(chunk);
        loop {
            match splitter.next(MAX) {
                Ok(Some(Whole::Packet(packet))) => write_packet(&mut again, &[&packet]),
                Ok(Some(Whole::Mark(number))) => again.extend(frame::mark(number)),
                Ok(Some(Whole::Credit { stream, limit })) => {
                    again.extend(frame::credit(stream, limit));
                }
                Ok(None) => break,
                Err(error) => return (again, Some(error)),
            }
        }
    }
    (again, None)
}

fn write_packet(again: &mut Vec<u8>, parts: &[&[u8]]) {
    let len = parts.iter().map(|part| part.len()).sum();
    again.extend(frame::packet_header(len).expect("it came with one"));
    parts.iter().for_each(|part| again.extend(*part));
}

#[derive(Default)]
struct Again(Vec<u8>);

impl Sink for Again {
    type Large = Vec<u8>;

    fn alloc(&mut self, len: usize) -> Vec<u8> {
        assert!(len <= 1 << 20);
        vec![0; len]
    }

    fn grow(&mut self, packet: &mut Vec<u8>, len: usize) {
        packet.resize(len, 0);
    }

    fn large(&mut self, packet: Vec<u8>) {
        write_packet(&mut self.0, &[&packet]);
    }

    fn small(&mut self, parts: &[&[u8]]) {
        write_packet(&mut self.0, parts);
    }
}

/// The same of a lane.
fn lane(data: &[u8], step: usize) -> (Vec<u8>, Option<FrameError>) {
    let (mut assembler, mut again) = (Assembler::new(MAX), Again::default());
    for mut chunk in data.chunks(step) {
        loop {
            match assembler.push(&mut chunk, &mut again) {
                Ok(Some(Said::Lane(number))) => again.0.extend(frame::preamble(number)),
                Ok(Some(Said::Mark(mark))) => again.0.extend(frame::mark(mark)),
                Ok(None) => break,
                Err(error) => return (again.0, Some(error)),
            }
        }
    }
    (again.0, None)
}
