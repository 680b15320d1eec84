//! What drives QUIC, whoever uses it. Nothing here knows an Erlang term.

mod answering;
pub(crate) mod congestion;
pub(crate) mod endpoint;
pub(crate) mod opening;
pub(crate) mod parting;
pub(crate) mod qlog;
pub(crate) mod routed;
pub(crate) mod transport;
