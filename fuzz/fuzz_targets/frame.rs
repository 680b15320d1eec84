//! The decoder of the peering wire on any bytes: it neither panics nor loops, and what it accepts
//! has one canonical form that it accepts again.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../native/macula/src/peering/cbor.rs"]
mod cbor;

fuzz_target!(|data: &[u8]| {
    let valid = cbor::validate(data);
    let canonical = cbor::canonical(data);
    match (valid, &canonical) {
        (Ok(is_canonical), Ok(bytes)) => {
            assert_eq!(is_canonical, bytes == data);
            assert_eq!(cbor::validate(bytes), Ok(true));
            assert_eq!(cbor::canonical(bytes).as_ref(), Ok(bytes));
        }
        (Err(a), Err(b)) => assert_eq!(a, *b),
        _ => panic!("validated and rewritten differently"),
    }
    match cbor::Frame::scan(data) {
        Ok(frame) => {
            // What is signed does not depend on the form that travelled.
            let signed = signed(&frame);
            let rewritten = canonical.expect("a frame is well formed");
            let again = cbor::Frame::scan(&rewritten).expect("its canonical form is a frame");
            assert_eq!(signed, self::signed(&again));
            // Nothing that is signed is lost, and no signature is in it.
            let inner = cbor::Frame::scan(&signed).expect("what is signed is a map");
            assert!(!inner.has("signature") && !inner.has("publisher_sig"));
            assert_eq!(frame.text("frame_type"), inner.text("frame_type"));
            assert_eq!(frame.fixed::<32>("node_id"), inner.fixed::<32>("node_id"));
        }
        Err(cbor::Malformed::NotAMap) => assert_ne!(data.first().map(|b| b >> 5), Some(5)),
        Err(why) => assert_eq!(valid.err().unwrap_or(why), why, "depth is counted differently"),
    }
});

fn signed(frame: &cbor::Frame) -> Vec<u8> {
    let mut out = Vec::new();
    frame.write_signed(&mut out).expect("a scanned frame can be written");
    out
}
