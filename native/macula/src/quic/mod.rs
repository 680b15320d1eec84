//! `macula_quic`: handles, their owners, and the messages they send.

use crate::engine::qlog;

pub(crate) mod congestion;
pub(crate) mod connection;
pub(crate) mod crowd;
pub(crate) mod dial;
pub(crate) mod listener;
pub(crate) mod options;
pub(crate) mod stream;
pub(crate) mod verdict;

/// Files of qlog that could not be written, and records that were lost.
#[rustler::nif]
fn qlog_failures() -> (u64, u64) {
    qlog::failures()
}
