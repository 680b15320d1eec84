//! What an endpoint, its driver and its incoming connections share.

use std::collections::{HashMap, VecDeque};
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use quinn_proto::{
    self as proto, ClientConfig, ConnectError, ConnectionError, ConnectionHandle, ServerConfig,
    Transmit, VarInt,
};
use tokio::sync::Notify;

use super::state::{EndpointInbox, Event, Shared};
use super::timer::MakeTimer;
use super::traffic::Traffic;
use super::way::{self, with_buffer};
use crate::udp::asynchronous::AsyncUdpSocket;
use crate::vm::tasks::{Fate, attempt};

pub(super) struct Core {
    state: Mutex<EndpointState>,
    /// From the connections.
    pub(super) inbox: Arc<EndpointInbox>,
    pub(super) socket: Arc<dyn AsyncUdpSocket>,
    make_timer: MakeTimer,
    /// There is an incoming connection, or there will be none any more.
    pub(super) arrived: Notify,
    /// No connection is left.
    pub(super) idle: Notify,
    pub(super) fate: Arc<Fate>,
}

pub(super) struct EndpointState {
    pub(super) proto: proto::Endpoint,
    pub(super) connections: HashMap<ConnectionHandle, Known>,
    pub(super) incoming: VecDeque<proto::Incoming>,
    /// How the connections are closed.
    pub(super) closing: Option<(VarInt, Bytes)>,
    /// Nothing is received any more.
    pub(super) is_lost: bool,
    /// Nobody uses the endpoint, connections apart.
    pub(super) is_left: bool,
}

/// A connection, as its endpoint has it.
pub(super) struct Known {
    pub(super) shared: Arc<Shared>,
    pub(super) traffic: Traffic,
}

impl Core {
    pub(super) fn new(
        proto: proto::Endpoint,
        socket: Arc<dyn AsyncUdpSocket>,
        make_timer: MakeTimer,
    ) -> Arc<Self> {
        Arc::new(Core {
            state: Mutex::new(EndpointState {
                proto,
                connections: HashMap::new(),
                incoming: VecDeque::new(),
                closing: None,
                is_lost: false,
                is_left: false,
            }),
            inbox: Arc::new(EndpointInbox::new()),
            socket,
            make_timer,
            arrived: Notify::new(),
            idle: Notify::new(),
            fate: Arc::default(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, EndpointState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(
        &self,
        state: &mut EndpointState,
        handle: ConnectionHandle,
        proto: proto::Connection,
    ) -> Arc<Shared> {
        let shared = Shared::new(
            proto,
            handle,
            self.inbox.clone(),
            self.socket.clone(),
            self.make_timer,
        );
        if let Some((code, reason)) = &state.closing {
            shared.inbox.push(Event::Close(*code, reason.clone()));
        }
        let known = Known {
            shared: shared.clone(),
            traffic: Traffic::default(),
        };
        state.connections.insert(handle, known);
        shared
    }

    pub(super) fn connect(
        &self,
        config: ClientConfig,
        to: std::net::SocketAddr,
        name: &str,
    ) -> Result<Arc<Shared>, ConnectError> {
        let mut state = self.lock();
        if state.is_lost || state.closing.is_some() {
            return Err(ConnectError::EndpointStopping);
        }
        let (handle, proto) = state.proto.connect(Instant::now(), config, to, name)?;
        Ok(self.begin(&mut state, handle, proto))
    }

    /// Lets a connection in, with a configuration of its own perhaps.
    pub(super) fn accept(
        &self,
        incoming: proto::Incoming,
        config: Option<Arc<ServerConfig>>,
    ) -> Result<Arc<Shared>, ConnectionError> {
        let mut state = self.lock();
        with_buffer(|buffer| {
            buffer.clear();
            let accepted = state.proto.accept(incoming, Instant::now(), buffer, config);
            match accepted {
                Ok((handle, proto)) => Ok(self.begin(&mut state, handle, proto)),
                Err(error) => {
                    if let Some(transmit) = error.response {
                        self.respond(&transmit, buffer);
                    }
                    Err(error.cause)
                }
            }
        })
    }

    pub(super) fn refuse(&self, incoming: proto::Incoming) {
        with_buffer(|buffer| {
            buffer.clear();
            let transmit = self.lock().proto.refuse(incoming, buffer);
            self.respond(&transmit, buffer);
        });
    }

    /// Has the client prove its address.
    pub(super) fn retry(&self, incoming: proto::Incoming) -> Result<(), proto::RetryError> {
        with_buffer(|buffer| {
            buffer.clear();
            let transmit = self.lock().proto.retry(incoming, buffer)?;
            self.respond(&transmit, buffer);
            Ok(())
        })
    }

    /// What does not leave at once is as good as lost on the way.
    pub(super) fn respond(&self, transmit: &Transmit, buffer: &[u8]) {
        if let Some(contents) = buffer.get(..transmit.size) {
            let _ = way::send(&*self.socket, transmit, contents);
        }
    }

    /// Ends everything, as nothing is received any more.
    pub(super) fn lose(&self) {
        let mut state = self.lock();
        state.is_lost = true;
        let connections = std::mem::take(&mut state.connections);
        let incoming = std::mem::take(&mut state.incoming);
        for incoming in incoming {
            // A panic may have left the state as it was at that moment.
            let _ = attempt(|| state.proto.ignore(incoming));
        }
        drop(state);
        for known in connections.into_values() {
            known.shared.inbox.push(Event::EndpointLost);
        }
        self.arrived.notify_waiters();
        self.idle.notify_waiters();
    }
}

/// Those that use an endpoint.
pub(super) struct User(pub(super) Arc<Core>);

impl Deref for User {
    type Target = Core;

    fn deref(&self) -> &Core {
        &self.0
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.lock().is_left = true;
        self.inbox.wake();
    }
}
