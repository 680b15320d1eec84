//! A session's ticket, of any bytes: one that was sealed is opened, and nothing else is.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use rustls::server::ProducesTickets;

#[allow(dead_code)]
#[path = "../../native/macula/src/tls/resumption/server.rs"]
mod server;

use server::Tickets;

static TICKETS: LazyLock<Arc<Tickets>> =
    LazyLock::new(|| Tickets::new(&[b"one secret", b"another one"], 3600).expect("made"));

fuzz_target!(|data: &[u8]| {
    assert_eq!(None, TICKETS.decrypt(data));
    let sealed = TICKETS.encrypt(data).expect("sealed");
    assert_eq!(Some(data), TICKETS.decrypt(&sealed).as_deref());
    // In any place another byte, and without its end.
    let Some((place, byte)) = data.split_first_chunk::<2>().map(|(place, rest)| {
        let place = usize::from(u16::from_be_bytes(*place));
        (place % sealed.len(), rest.first().copied().unwrap_or(1))
    }) else {
        return;
    };
    let mut other = sealed.clone();
    other[place] ^= byte;
    assert_eq!(byte == 0, TICKETS.decrypt(&other).is_some());
    assert_eq!(None, TICKETS.decrypt(&sealed[..place]));
    // With the name of its key what follows is looked at.
    assert_eq!(None, TICKETS.decrypt(&[&sealed[..16], data].concat()));
});
