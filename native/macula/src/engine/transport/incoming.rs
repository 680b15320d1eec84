//! A connection that somebody else begins, and that nobody has let in yet.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use quinn_proto::{self as proto, ConnectionError, ConnectionId, ServerConfig};

use super::connecting::{self, Connecting};
use super::core::User;
use super::step::Stepper;

/// Dropped, the connection is refused.
pub(crate) struct Incoming {
    /// There until it is decided about.
    inner: Option<proto::Incoming>,
    known: Known,
    endpoint: Arc<User>,
}

/// What the first packet shows.
#[derive(Clone, Copy)]
struct Known {
    local_ip: Option<IpAddr>,
    remote_address: SocketAddr,
    is_validated: bool,
    may_retry: bool,
    orig_dst_cid: ConnectionId,
}

/// A client whose address is proven already.
pub(crate) struct RetryError(Box<Incoming>);

impl RetryError {
    pub(crate) fn into_incoming(self) -> Incoming {
        *self.0
    }
}

impl Incoming {
    pub(super) fn new(inner: proto::Incoming, endpoint: Arc<User>) -> Self {
        Incoming {
            known: Known {
                local_ip: inner.local_ip(),
                remote_address: inner.remote_address(),
                is_validated: inner.remote_address_validated(),
                may_retry: inner.may_retry(),
                orig_dst_cid: *inner.orig_dst_cid(),
            },
            inner: Some(inner),
            endpoint,
        }
    }

    /// Lets the connection in. The stepper is to be driven.
    pub(crate) fn accept(self) -> Result<(Connecting, Stepper), ConnectionError> {
        self.accept_as(None)
    }

    pub(crate) fn accept_with(
        self,
        config: Arc<ServerConfig>,
    ) -> Result<(Connecting, Stepper), ConnectionError> {
        self.accept_as(Some(config))
    }

    fn accept_as(
        mut self,
        config: Option<Arc<ServerConfig>>,
    ) -> Result<(Connecting, Stepper), ConnectionError> {
        match self.inner.take() {
            Some(incoming) => Ok(connecting::begin(self.endpoint.accept(incoming, config)?)),
            None => Err(ConnectionError::LocallyClosed),
        }
    }

    pub(crate) fn refuse(self) {}

    /// Has the client prove its address first.
    pub(crate) fn retry(mut self) -> Result<(), RetryError> {
        let Some(incoming) = self.inner.take() else {
            return Ok(());
        };
        self.endpoint.retry(incoming).map_err(|error| {
            self.inner = Some(error.into_incoming());
            RetryError(Box::new(self))
        })
    }

    /// Answers nothing; the client asks again.
    pub(crate) fn ignore(mut self) {
        if let Some(incoming) = self.inner.take() {
            self.endpoint.lock().proto.ignore(incoming);
        }
    }

    /// Where the client's packets go, if the system tells.
    pub(crate) fn local_ip(&self) -> Option<IpAddr> {
        self.known.local_ip
    }

    pub(crate) fn remote_address(&self) -> SocketAddr {
        self.known.remote_address
    }

    pub(crate) fn remote_address_validated(&self) -> bool {
        self.known.is_validated
    }

    pub(crate) fn may_retry(&self) -> bool {
        self.known.may_retry
    }

    /// Where the client's first packet went.
    pub(crate) fn orig_dst_cid(&self) -> ConnectionId {
        self.known.orig_dst_cid
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(incoming) = self.inner.take() {
            self.endpoint.refuse(incoming);
        }
    }
}
