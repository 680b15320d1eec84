//! What the owner is told about the session of TLS: that it was resumed, and that tickets have come.

use std::sync::Arc;

use rustler::Encoder;

use super::Connection;
use crate::tls::session::Seen;
use crate::vm::error::binary;
use crate::vm::messages::event;
use crate::vm::tasks::contain;

pub(super) mod names {
    rustler::atoms! { resumed, nst_received }
}

/// How a connection was made.
pub(crate) struct Begun {
    pub(crate) seen: Arc<Seen>,
    /// A client that keeps tickets.
    pub(crate) resumption: bool,
}

impl Begun {
    /// With a listener.
    pub(crate) fn accepted(quinn: &quinn::Connection) -> Self {
        Begun {
            seen: Seen::of(quinn).unwrap_or_default(),
            resumption: false,
        }
    }
}

pub(super) struct Shared {
    begun: Begun,
}

impl Shared {
    pub(super) fn new(begun: Begun) -> Self {
        Shared { begun }
    }

    pub(super) fn resumed(&self) -> bool {
        self.begun.seen.resumed()
    }
}

/// The owner has the connection, and is told what follows.
pub(super) fn begin(connection: &Arc<Connection>) {
    let session = &connection.session;
    if session.resumed() {
        // No server here puts data into its tickets. A dead owner needs no message.
        let _ = connection
            .owner
            .post(|env, handle, _| Some(event(env, names::resumed(), handle, false.encode(env))));
    }
    if session.begun.resumption {
        connection.worker.start(serve(connection.clone()));
    }
}

async fn serve(connection: Arc<Connection>) {
    if contain(tell_tickets(&connection)).await.is_err() {
        connection.fail();
    }
}

/// Without the handle, whose collection closes the connection, and ends this.
async fn tell_tickets(connection: &Connection) {
    loop {
        tokio::select! {
            () = connection.session.begun.seen.ticket() => {}
            _ = connection.quinn.closed() => return,
        }
        let told = connection.owner.post(|env, handle, _| {
            let ticket = binary(env, b"");
            Some(event(env, names::nst_received(), handle, ticket))
        });
        if told.is_err() {
            return;
        }
    }
}
