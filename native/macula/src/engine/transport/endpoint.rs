//! An endpoint, for those that use it.

use std::io;
use std::net::{SocketAddr, SocketAddrV6};
use std::sync::Arc;

use bytes::Bytes;
use quinn_proto::{
    self as proto, ClientConfig, ConnectError, EndpointConfig, ServerConfig, VarInt,
};

use super::connecting::{self, Connecting};
use super::core::{Core, User};
use super::incoming::Incoming;
use super::receive::EndpointDriver;
use super::state::Event;
use super::step::Stepper;
use super::timer::MakeTimer;
use crate::udp::asynchronous::AsyncUdpSocket;
use crate::vm::tasks::Fate;

/// Lives as long as somebody has this, or one of its connections is left.
#[derive(Clone)]
pub(crate) struct Endpoint(Arc<User>);

impl Endpoint {
    /// An endpoint and its driver, a future to be run.
    pub(crate) fn new(
        config: EndpointConfig,
        server: Option<ServerConfig>,
        socket: Arc<dyn AsyncUdpSocket>,
        make_timer: MakeTimer,
    ) -> (Self, EndpointDriver) {
        let config = Arc::new(config);
        let (server, finds_mtu) = (server.map(Arc::new), !socket.may_fragment());
        let proto = proto::Endpoint::new(config.clone(), server, finds_mtu, None);
        let core = Core::new(proto, socket, make_timer);
        let driver = EndpointDriver::new(core.clone(), &config);
        (Endpoint(Arc::new(User(core))), driver)
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.socket.local_addr()
    }

    /// What becomes of the driver.
    pub(crate) fn fate(&self) -> &Arc<Fate> {
        &self.0.fate
    }

    /// Begins a connection. The stepper is to be driven.
    pub(crate) fn connect_with(
        &self,
        config: ClientConfig,
        to: SocketAddr,
        name: &str,
    ) -> Result<(Connecting, Stepper), ConnectError> {
        let local = self.local_addr();
        let to = match (to, local) {
            (SocketAddr::V6(_), Ok(SocketAddr::V4(_))) => {
                return Err(ConnectError::InvalidRemoteAddress(to));
            }
            (SocketAddr::V4(v4), Ok(SocketAddr::V6(_))) => {
                SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into()
            }
            _ => to,
        };
        let shared = self.0.connect(config, to, name)?;
        Ok(connecting::begin(shared))
    }

    /// The next incoming connection. Nothing once the endpoint is closed or lost.
    pub(crate) async fn accept(&self) -> Option<Incoming> {
        loop {
            // Whatever happens from here on is heard.
            let arrived = self.0.arrived.notified();
            {
                let mut state = self.0.lock();
                if state.is_lost {
                    return None;
                }
                if let Some(incoming) = state.incoming.pop_front() {
                    return Some(Incoming::new(incoming, self.0.clone()));
                }
                if state.closing.is_some() {
                    return None;
                }
            }
            arrived.await;
        }
    }

    /// For connections that come from now on; nothing has the endpoint take none.
    pub(crate) fn set_server_config(&self, config: Option<ServerConfig>) {
        let mut state = self.0.lock();
        state.proto.set_server_config(config.map(Arc::new));
    }

    /// Closes all connections, and takes none any more.
    pub(crate) fn close(&self, code: VarInt, reason: &[u8]) {
        let reason = Bytes::copy_from_slice(reason);
        let mut state = self.0.lock();
        state.closing = Some((code, reason.clone()));
        let known = state.connections.values();
        let connections: Vec<_> = known.map(|known| known.shared.clone()).collect();
        drop(state);
        for shared in connections {
            shared.inbox.push(Event::Close(code, reason.clone()));
        }
        self.0.arrived.notify_waiters();
    }

    pub(crate) fn open_connections(&self) -> usize {
        self.0.lock().connections.len()
    }

    /// Completes when no connection is left.
    pub(crate) async fn wait_idle(&self) {
        loop {
            let idle = self.0.idle.notified();
            if self.0.lock().connections.is_empty() {
                return;
            }
            idle.await;
        }
    }
}
