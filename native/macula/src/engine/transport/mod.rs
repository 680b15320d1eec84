//! QUIC connections and endpoints for async code, on `quinn-proto` (the protocol) and `quinn-udp` (the system).
//!
//! A connection is one state under one lock. Whoever uses the connection takes the lock for a moment; its
//! `Stepper` moves it on: takes what has come, sends, keeps the timer, and wakes who waits. A panic in there
//! ends this connection and no other.

mod connecting;
mod connection;
mod core;
mod endpoint;
mod errors;
mod inbox;
mod incoming;
#[cfg(test)]
pub(crate) mod loopback;
mod receive;
mod recv;
mod send;
mod shares;
mod state;
mod step;
#[cfg(test)]
mod tests;
mod timer;
mod traffic;
mod way;

pub(crate) use quinn_proto::{
    ClientConfig, ConnectError, ConnectionError, ConnectionId, ConnectionStats, EndpointConfig,
    IdleTimeout, MtuDiscoveryConfig, ServerConfig, Side, TransportConfig, TransportErrorCode,
    UdpStats, VarInt,
};

pub(crate) use connecting::{Connecting, ZeroRttAccepted};
pub(crate) use connection::Connection;
pub(crate) use endpoint::Endpoint;
pub(crate) use errors::{ReadError, ResetError, SendDatagramError, StoppedError, WriteError};
pub(crate) use incoming::Incoming;
pub(crate) use recv::RecvStream;
pub(crate) use send::SendStream;
pub(crate) use step::{Hold, Stepper};
pub(crate) use timer::{Timer, tokio_timer};
