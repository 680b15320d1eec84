//! What users and the endpoint do to a connection, as the library's own code does it.

use std::sync::Arc;

use quinn_proto::{self as proto, ConnectionEvent, ConnectionHandle};

use super::inbox::Inbox;
use super::state::{Event, Shared};
use super::step::Stepper;

#[derive(Clone)]
pub(crate) struct Connection(Arc<Shared>);

pub(crate) fn connection() -> (Connection, Stepper) {
    let shared = Shared::new(
        proto::Connection::default(),
        ConnectionHandle(0),
        Arc::new(Inbox::new()),
        Arc::new(()),
        |_| unreachable!(),
    );
    (Connection(shared.clone()), Stepper::new(shared))
}

impl Connection {
    /// Has the connection's lock meanwhile.
    pub(crate) fn look<T>(&self, act: impl FnOnce(&mut proto::Connection) -> T) -> T {
        act(&mut self.0.lock().proto)
    }

    /// Writes what becomes a packet.
    pub(crate) fn write(&self) {
        self.look(|proto| proto.queued += 1);
        self.0.wake();
    }

    /// A packet has come.
    pub(crate) fn receive(&self) {
        self.0.inbox.push(Event::Proto(ConnectionEvent));
    }

    pub(crate) fn lose(&self) {
        self.0.inbox.push(Event::EndpointLost);
    }

    /// Packets to be sent, and packets sent.
    pub(crate) fn packets(&self) -> (usize, usize) {
        self.look(|proto| (proto.queued, proto.sent))
    }
}
