//! `macula_quic`: handles, their owners, and the messages they send.

pub(crate) mod congestion;
pub(crate) mod connection;
pub(crate) mod dial;
pub(crate) mod listener;
pub(crate) mod options;
pub(crate) mod stream;
