//! The frames and identities of `macula_peering`.

pub(crate) mod cbor;
pub(crate) mod frame;
pub(crate) mod identity;
mod key_file;
