//! The password-authenticated key exchange over the cookie (SPAKE2 over Ed25519's group; RFC 9382
//! describes the protocol, with other points and another transcript).
//!
//! A share says nothing about the cookie, and a peer that answers one has one guess: the key that comes
//! out is the same at both ends only where both cookies are.

use std::sync::{Mutex, PoisonError};

use rustler::{Atom, Binary, Encoder, Env, Error, NifResult, Resource, ResourceArc, Term};
use spake2::{Ed25519Group, Identity, Password, Spake2};

use super::messages;

mod atoms {
    rustler::atoms! { dialler, acceptor, bad_share }
}

const DIALLER: &[u8] = b"macula-dist/1 dialler";
const ACCEPTOR: &[u8] = b"macula-dist/1 acceptor";

/// The secret half of an exchange, until the peer's share has come.
struct Exchange(Mutex<Option<Spake2<Ed25519Group>>>);

#[rustler::resource_impl]
impl Resource for Exchange {}

/// Begins an exchange: what this end keeps, and its share for the peer.
#[rustler::nif]
fn dist_exchange<'a>(env: Env<'a>, role: Atom, cookie: Binary<'a>) -> NifResult<Term<'a>> {
    let cookie = Password::new(cookie.as_slice());
    let (dialler, acceptor) = (Identity::new(DIALLER), Identity::new(ACCEPTOR));
    let (kept, share) = if role == atoms::dialler() {
        Spake2::start_a(&cookie, &dialler, &acceptor)
    } else if role == atoms::acceptor() {
        Spake2::start_b(&cookie, &dialler, &acceptor)
    } else {
        return Err(Error::BadArg);
    };
    let kept = ResourceArc::new(Exchange(Mutex::new(Some(kept))));
    Ok((kept, messages::binary(env, &share)).encode(env))
}

/// Ends an exchange with the peer's share: `{ok, Key}`. An exchange ends once.
#[rustler::nif]
fn dist_exchange_key<'a>(
    env: Env<'a>,
    exchange: ResourceArc<Exchange>,
    share: Binary<'a>,
) -> NifResult<Term<'a>> {
    let kept = exchange
        .0
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    match kept.ok_or(Error::BadArg)?.finish(&share) {
        Ok(key) => Ok((messages::ok(), messages::binary(env, &key)).encode(env)),
        Err(_) => Ok((messages::error(), atoms::bad_share()).encode(env)),
    }
}
