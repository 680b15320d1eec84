//! What is read of a decrypted packet of QUIC beside QUIC, of any bytes: padding that is cut changes nothing that the
//! frames say, and the limits of streams never fall.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../native/macula/src/tls/limits.rs"]
mod limits;
#[allow(dead_code)]
#[path = "../../native/macula/src/tls/padding.rs"]
mod padding;

/// What `padding` is for.
mod watched {
    use bytes::BytesMut;

    pub(crate) trait Watch: Clone + Default + Send + Sync + 'static {
        fn has_decrypted(&self, payload: &mut BytesMut);
    }
}

const LONG: usize = 1_400;

fuzz_target!(|data: &[u8]| {
    let zeros = [0; LONG];
    for packet in [
        data,
        &[data, &zeros].concat(),
        &[&[1, 0x1f][..], &zeros, data].concat(),
    ] {
        let mut payload = BytesMut::from(packet);
        padding::cut(&mut payload);
        assert!(packet.starts_with(&payload));
        assert!(payload.len() == packet.len() || packet.len() >= LONG);
        assert!(packet[payload.len()..].iter().all(|byte| *byte == 0));
        assert!(payload.len() == packet.len() || payload.ends_with(&[0]));
        assert_eq!(read(&[packet]), read(&[&payload]));
        assert_eq!(read(&[packet]), read(&[packet, packet]));
    }
});

fn read(packets: &[&[u8]]) -> String {
    let limits = limits::Limits::default();
    for packet in packets {
        let before = limits.known();
        limits.read(packet);
        if let (Some(before), Some(now)) = (before, limits.known()) {
            assert!(before.iter().zip(now).all(|(then, now)| *then <= now));
        }
    }
    format!("{limits:?}")
}
