//! UDP sockets: what the system does with datagrams, and what a refused one means.

#[cfg(target_os = "linux")]
mod option;
mod refused;
pub(crate) mod socket;
