//! The class of a packet of the distribution, of any bytes: what was found at its beginning holds whatever
//! follows, and only what begins as a packet does is given to a sender.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../native/macula/src/distribution/classify.rs"]
mod classify;

use classify::{Order, Part};

fuzz_target!(|data: &[u8]| {
    // So that few inputs are none at all.
    let whole = [&[131, 68, 0, 104][..], data].concat();
    let fragment = [&[131, 69][..], data].concat();
    for packet in [data, &whole, &fragment] {
        let class = classify::classify(packet);
        let Order::Sender(_) = class.order else {
            continue;
        };
        assert!(class.operation.is_some() && packet[0] == 131);
        assert!(matches!(class.part, Part::Whole | Part::First { .. }));
        assert_eq!(class, classify::classify(&[packet, b"more"].concat()));
        // The shortest beginning with a sender has that one.
        let shortest = (0..=packet.len())
            .map(|len| classify::classify(&packet[..len]))
            .find(|class| class.order != Order::Fence);
        assert_eq!(Some(class), shortest);
    }
});
