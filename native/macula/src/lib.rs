//! The native half of macula: registration only. What a NIF does stands in the module named after
//! it.

mod bell;
mod cbor;
mod connection;
mod crash;
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

/// What the VM asks a library for.
#[cfg(not(windows))]
#[unsafe(no_mangle)]
extern "C" fn nif_init() -> *const rustler::codegen_runtime::ErlNifEntry {
    rustler::entry(c"macula_nif")
}
