//! An address as any text: what it is shown as is read as the same one.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../native/macula/src/udp/address.rs"]
mod address;

fuzz_target!(|data: &[u8]| {
    let Some((text, port)) = data.split_last_chunk() else {
        return;
    };
    let port = u16::from_be_bytes(*port);
    let text = String::from_utf8_lossy(text);
    let Some(parsed) = address::parse(&text, port) else {
        return;
    };
    assert_eq!(parsed.port(), port);
    let shown = address::text(parsed);
    // An interface that there is goes by its name, and a peer in IPv4 as what it is.
    if !shown.contains('%') {
        let again = address::parse(&shown, port).expect("what is shown");
        assert_eq!(again.ip(), parsed.ip().to_canonical());
    }
    let with_port = address::text_with_port(parsed);
    let end = format!(":{port}");
    let host = with_port.strip_suffix(&end).expect("its port");
    assert_eq!(host.trim_matches(['[', ']']), shown);
    assert_eq!(host.starts_with('['), shown.contains(':'));
});
