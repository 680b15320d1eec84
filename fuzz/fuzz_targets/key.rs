//! A file of a key, of any bytes: what is read of it is read again from both forms in which it is written.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../native/macula/src/peering/key_file.rs"]
mod key_file;

fuzz_target!(|data: &[u8]| {
    // So that few inputs are none at all.
    let framed = [
        &b"-----BEGIN PRIVATE KEY-----"[..],
        data,
        b"-----END PRIVATE KEY-----",
    ]
    .concat();
    for file in [data, &framed] {
        let Some(found) = key_file::parse(file) else {
            continue;
        };
        let public = found.public.unwrap_or([7; 32]);
        let ours = key_file::parse(&key_file::encode(&public, &found.seed)).expect("our own form");
        assert_eq!((&*ours.seed, ours.public), (&*found.seed, Some(public)));
        let pem = key_file::parse(key_file::pem(&found.seed).as_bytes()).expect("a PEM");
        assert_eq!((&*pem.seed, pem.public), (&*found.seed, None));
    }
});
