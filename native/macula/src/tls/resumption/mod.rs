//! Sessions that are resumed (RFC 8446, section 2.2): tickets of servers, and what clients keep of them.

pub(crate) mod client;
pub(crate) mod server;
