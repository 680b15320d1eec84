//! A connection whose handshake is not done.

use std::any::Any;
use std::sync::Arc;

use quinn_proto::ConnectionError;

use super::connection::Connection;
use super::state::{Alive, Guard, Shared};
use super::step::Stepper;

/// Dropped, the connection is closed.
pub(crate) struct Connecting(Arc<Alive>);

/// Whether early data was accepted, once the handshake is done.
pub(crate) struct ZeroRttAccepted(Arc<Shared>);

/// What uses a connection that begins, and what drives the connection.
pub(super) fn begin(shared: Arc<Shared>) -> (Connecting, Stepper) {
    let stepper = Stepper::new(shared.clone());
    (Connecting(Arc::new(Alive(shared))), stepper)
}

/// Waits for something of the handshake.
async fn until<T>(shared: &Shared, mut look: impl FnMut(&Guard<'_>) -> Option<T>) -> T {
    loop {
        // Whatever happens from here on is heard.
        let told = shared.told.begun.notified();
        if let Some(found) = look(&shared.lock()) {
            return found;
        }
        told.await;
    }
}

impl Connecting {
    /// Completes when the handshake is done.
    pub(crate) async fn connected(self) -> Result<Connection, ConnectionError> {
        until(&self.0, |state| match &state.error {
            _ if state.is_connected && !state.is_broken => Some(Ok(())),
            Some(error) => Some(Err(error.clone())),
            None => None,
        })
        .await?;
        Ok(Connection::new(self.0))
    }

    /// Completes when the session has shown its data.
    pub(crate) async fn handshake_data(&mut self) -> Result<Box<dyn Any>, ConnectionError> {
        until(&self.0, |state| {
            if let Some(error) = &state.error {
                return Some(Err(error.clone()));
            }
            let session = state.proto.crypto_session();
            session
                .handshake_data()
                .filter(|_| state.has_handshake_data)
                .map(Ok)
        })
        .await
    }

    /// A connection before its handshake is done, where this end has keys for early data or is the server.
    pub(crate) fn into_0rtt(self) -> Result<(Connection, ZeroRttAccepted), Self> {
        let state = self.0.lock();
        let can = !state.is_broken && (state.proto.has_0rtt() || state.proto.side().is_server());
        drop(state);
        if can {
            let accepted = ZeroRttAccepted(self.0.0.clone());
            Ok((Connection::new(self.0), accepted))
        } else {
            Err(self)
        }
    }
}

impl ZeroRttAccepted {
    /// False also where the connection is lost before.
    pub(crate) async fn outcome(self) -> bool {
        until(&self.0, |state| match &state.error {
            _ if state.is_connected && !state.is_broken => Some(state.proto.accepted_0rtt()),
            Some(_) => Some(false),
            None => None,
        })
        .await
    }
}
