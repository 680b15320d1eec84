//! The native half of macula: registration only. What a NIF does stands in the module named after
//! it.

use rustler::{Env, Term};

mod bell;
mod cbor;
mod connection;
mod dial;
mod dist;
mod endpoint;
mod error;
mod frame;
mod halt;
mod identity;
mod listener;
mod messages;
#[cfg(test)]
mod no_vm;
mod objects;
mod options;
mod owner;
mod payload;
mod reply;
mod runtime;
mod socket;
mod stream;
mod tls;

fn load(_env: Env, _info: Term) -> bool {
    true
}

rustler::init!("macula_quic_nif", load = load);
