//! UDP sockets: what the system does with datagrams, what a refused one means, and what becomes of a
//! socket that is gone.

pub(crate) mod address;
pub(crate) mod aimed;
pub(crate) mod ask;
pub(crate) mod asynchronous;
#[cfg(unix)]
mod beside;
#[cfg(unix)]
mod denied;
#[cfg(unix)]
mod errors;
#[cfg(target_os = "linux")]
mod option;
mod refused;
pub(crate) mod socket;
#[cfg(unix)]
mod watched;
pub(crate) mod wrap;
