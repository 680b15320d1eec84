//! Why something cannot be done with a connection or a stream.

use quinn_proto::{ConnectionError, VarInt};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WriteError {
    #[error("stopped by the peer: {0}")]
    Stopped(VarInt),
    #[error("connection lost: {0}")]
    ConnectionLost(#[from] ConnectionError),
    #[error("the stream is over")]
    ClosedStream,
    #[error("early data was not accepted")]
    ZeroRttRejected,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("reset by the peer: {0}")]
    Reset(VarInt),
    #[error("connection lost: {0}")]
    ConnectionLost(#[from] ConnectionError),
    #[error("the stream is over")]
    ClosedStream,
    #[error("read out of order before")]
    IllegalOrderedRead,
    #[error("early data was not accepted")]
    ZeroRttRejected,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ResetError {
    #[error("connection lost: {0}")]
    ConnectionLost(#[from] ConnectionError),
    #[error("early data was not accepted")]
    ZeroRttRejected,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StoppedError {
    #[error("connection lost: {0}")]
    ConnectionLost(#[from] ConnectionError),
    #[error("early data was not accepted")]
    ZeroRttRejected,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SendDatagramError {
    #[error("the peer takes no datagrams")]
    UnsupportedByPeer,
    #[error("datagrams are disabled")]
    Disabled,
    #[error("too large")]
    TooLarge,
    #[error("connection lost: {0}")]
    ConnectionLost(#[from] ConnectionError),
}
