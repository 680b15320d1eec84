//! The native half of macula: registration only. What a NIF does stands in the module named after
//! it.
//!
//! `vm` stands on nothing of ours, `udp` and `tls` on `vm`, `engine` on these; `quic`,
//! `distribution` and `peering` stand on these, and never on each other.

mod distribution;
mod engine;
mod peering;
mod quic;
#[cfg(test)]
mod rooms;
mod tls;
mod udp;
mod vm;

/// What the VM asks a library for.
#[cfg(not(windows))]
#[unsafe(no_mangle)]
extern "C" fn nif_init() -> *const rustler::codegen_runtime::ErlNifEntry {
    rustler::entry(c"macula_nif")
}
