//! What TLS says after the handshake, of any bytes: it is read the same in pieces of any size, and a server is told
//! nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quinn_proto::Side;

#[allow(dead_code)]
#[path = "../../native/macula/src/tls/late.rs"]
mod late;

use late::Late;

fuzz_target!(|data: &[u8]| {
    let Some((size, bytes)) = data.split_first() else {
        return;
    };
    let size = usize::from(*size).max(1);
    let whole = Late::default().read(Side::Client, bytes);
    let mut pieces = Late::default();
    let read: Result<Vec<()>, _> = bytes
        .chunks(size)
        .map(|piece| pieces.read(Side::Client, piece))
        .collect();
    assert_eq!(whole, read.map(drop));
    assert_eq!(bytes.is_empty(), Late::default().read(Side::Server, bytes).is_ok());
    // Whoever speaks of tickets alone is understood.
    let length = u32::try_from(bytes.len()).expect("short").to_be_bytes();
    let ticket = [&[4], &length[1..], bytes].concat();
    let mut late = Late::default();
    for piece in ticket.chunks(size) {
        assert_eq!(Ok(()), late.read(Side::Client, piece));
    }
});
