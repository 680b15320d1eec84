//! In place of `quinn-proto`: a connection that counts what is to be sent and what was.

use std::time::Instant;

use bytes::Bytes;

#[derive(Default)]
pub struct Connection {
    /// Packets to be sent.
    pub queued: usize,
    pub sent: usize,
    is_closed: bool,
}

impl Connection {
    /// A packet to be answered has come.
    pub fn handle_event(&mut self, _: ConnectionEvent) {
        self.queued += 1;
    }

    pub fn close(&mut self, _: Instant, _: VarInt, _: Bytes) {
        self.is_closed = true;
    }

    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    pub fn is_drained(&self) -> bool {
        self.is_closed
    }

    pub fn poll(&mut self) -> Option<Event> {
        None
    }

    pub fn poll_endpoint_events(&mut self) -> Option<EndpointEvent> {
        None
    }

    pub fn poll_timeout(&mut self) -> Option<Instant> {
        None
    }

    pub fn handle_timeout(&mut self, _: Instant) {}

    pub fn ping(&mut self) {}

    pub fn congestion_state(&self) -> Congestion {
        Congestion
    }

    pub fn side(&self) -> Side {
        Side
    }

    pub fn is_handshaking(&self) -> bool {
        false
    }

    pub fn accepted_0rtt(&self) -> bool {
        false
    }
}

pub struct Congestion;

/// This end is the server.
pub struct Side;

impl Side {
    pub fn is_client(&self) -> bool {
        false
    }
}

pub struct ConnectionEvent;

#[derive(Clone, Copy)]
pub struct ConnectionHandle(pub usize);

pub struct EndpointEvent;

impl EndpointEvent {
    pub fn drained() -> Self {
        EndpointEvent
    }
}

pub enum Event {
    HandshakeDataReady,
    Connected,
    ConnectionLost { reason: ConnectionError },
    Stream(StreamEvent),
    DatagramReceived,
    DatagramsUnblocked,
}

pub enum StreamEvent {
    Opened { dir: Dir },
    Readable { id: StreamId },
    Writable { id: StreamId },
    Finished { id: StreamId },
    Stopped { id: StreamId, error_code: VarInt },
    Available { dir: Dir },
}

#[derive(Clone, Copy)]
pub enum Dir {
    Bi,
    Uni,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(pub u64);

#[derive(Clone, Copy)]
pub struct VarInt(pub u32);

impl VarInt {
    pub fn from_u32(n: u32) -> Self {
        VarInt(n)
    }
}

#[derive(Clone)]
pub enum ConnectionError {
    TransportError(TransportError),
    LocallyClosed,
}

#[derive(Clone)]
pub struct TransportError {
    pub code: TransportErrorCode,
    pub frame: Option<u64>,
    pub reason: String,
}

#[derive(Clone, Copy)]
pub struct TransportErrorCode(pub u64);

impl TransportErrorCode {
    pub const INTERNAL_ERROR: Self = TransportErrorCode(1);
}
