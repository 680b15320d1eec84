//! The native half of macula: registration only. What a NIF does stands in the module named after it.

use rustler::{Env, Term};

mod cbor;
mod dist;
mod frame;
mod identity;
#[cfg(test)]
mod no_vm;
mod runtime;

fn load(_env: Env, _info: Term) -> bool {
    true
}

rustler::init!("macula_quic_nif", load = load);
