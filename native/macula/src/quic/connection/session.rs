//! What the owner is told about the session of TLS: that it was resumed, that tickets have come, and what has
//! become of early data.

use std::sync::Arc;
use std::time::Duration;

use rustler::{Atom, Encoder, Env};
use tokio::sync::watch;

use super::Connection;
use crate::engine::transport::{self, VarInt, ZeroRttAccepted};
use crate::quic::verdict;
use crate::tls::session::Seen;
use crate::vm::error::binary;
use crate::vm::fault::{self, Point};
use crate::vm::messages::event;
use crate::vm::tasks::{Held, attempt, contain};

pub(super) mod names {
    rustler::atoms! { resumed, nst_received, early_data, pending, accepted, rejected, none }
}

/// How a connection was made.
pub(crate) struct Begun {
    pub(crate) seen: Arc<Seen>,
    /// A client that keeps tickets.
    pub(crate) resumption: bool,
    /// The connection was there before its handshake was done.
    pub(crate) early: Option<Early>,
}

impl Begun {
    /// With a listener.
    pub(crate) fn accepted(quic: &transport::Connection, early: Option<Early>) -> Self {
        Begun {
            seen: verdict::seen(quic).unwrap_or_default(),
            resumption: false,
            early,
        }
    }
}

/// What has become of a handshake that early data was sent in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Pending,
    Accepted,
    /// The handshake is done, and the server has not read what was sent before.
    Rejected,
    /// It took too long.
    Late,
    /// The connection was lost meanwhile.
    Lost,
}

impl Outcome {
    fn name(self) -> Atom {
        match self {
            Outcome::Pending => names::pending(),
            Outcome::Accepted => names::accepted(),
            Outcome::Rejected => names::rejected(),
            Outcome::Late | Outcome::Lost => names::none(),
        }
    }
}

/// Knows the outcome once there is one.
#[derive(Debug, Clone)]
pub(crate) struct Early(watch::Receiver<Outcome>);

impl Early {
    /// Waits for the end of a handshake, no longer than `within`. `end` is called first.
    pub(crate) fn begin(
        quic: &transport::Connection,
        accepted: ZeroRttAccepted,
        within: Option<Duration>,
        end: impl FnOnce(Outcome) + Send + 'static,
    ) -> Self {
        let (tell, told) = watch::channel(Outcome::Pending);
        let quic = Held::new(quic.clone());
        tokio::spawn(async move {
            let late = async {
                match within {
                    Some(within) => tokio::time::sleep(within).await,
                    None => std::future::pending().await,
                }
            };
            let outcome = tokio::select! {
                biased;
                accepted = accepted.outcome() => match attempt(|| (quic.close_reason(), quic.side())) {
                    // A server has no connection early unless it reads what comes early.
                    Ok((None, side)) if accepted || side.is_server() => Outcome::Accepted,
                    Ok((None, _)) => Outcome::Rejected,
                    _ => Outcome::Lost,
                },
                () = late => Outcome::Late,
            };
            // A panic in there ends nothing of this.
            let _ = attempt(|| end(outcome));
            tell.send_replace(outcome);
            if outcome == Outcome::Late {
                let _ = attempt(|| quic.close(VarInt::from_u32(0), b"handshake timeout"));
            }
        });
        Early(told)
    }

    /// What has become of it, if anything was sent early.
    pub(crate) fn name(early: Option<&Self>) -> Atom {
        early.map_or(names::none(), |early| early.now().name())
    }

    fn now(&self) -> Outcome {
        *self.0.borrow()
    }

    async fn outcome(&self) -> Outcome {
        let mut told = self.0.clone();
        let outcome = told.wait_for(|outcome| *outcome != Outcome::Pending);
        // Nobody will tell: the task is gone with its runtime.
        outcome.await.map_or(Outcome::Lost, |outcome| *outcome)
    }
}

pub(super) struct Shared {
    begun: Begun,
    client: bool,
}

impl Shared {
    pub(super) fn new(begun: Begun, client: bool) -> Self {
        Shared { begun, client }
    }

    /// Known to a server from the beginning, and to a client when the handshake is done.
    pub(super) fn resumed(&self) -> bool {
        (!self.client || self.is_done()) && self.begun.seen.resumed()
    }

    /// The connection was there before the end of its handshake, which is to come.
    pub(super) fn is_pending(&self) -> bool {
        let early = self.begun.early.as_ref();
        early.is_some_and(|early| early.now() == Outcome::Pending)
    }

    /// The handshake has ended well.
    pub(super) fn is_done(&self) -> bool {
        let early = self.begun.early.as_ref();
        early.is_none_or(|early| matches!(early.now(), Outcome::Accepted | Outcome::Rejected))
    }

    /// How many streams the peer has allowed so far, bidirectional and unidirectional ones, once it has said.
    pub(super) fn allowed_streams(&self) -> Option<[u64; 2]> {
        self.begun.seen.allowed_streams()
    }

    pub(super) fn early_data(&self) -> Atom {
        Early::name(self.begun.early.as_ref())
    }

    pub(super) fn begins_early(&self) -> bool {
        self.client && self.begun.early.is_some()
    }

    /// The handshake has not ended in time.
    pub(super) fn is_late(&self) -> bool {
        let early = self.begun.early.as_ref();
        early.is_some_and(|early| early.now() == Outcome::Late)
    }

    /// Returns when the handshake is done, or has failed.
    pub(super) async fn outcome(&self) {
        if let Some(early) = &self.begun.early {
            early.outcome().await;
        }
    }
}

/// The owner has the connection, and is told what follows.
pub(super) fn begin(connection: &Arc<Connection>) {
    fault::pass(Point::SessionBegin);
    let session = &connection.session;
    let early = session.begun.early.is_some();
    // A client that has sent early data does not know yet.
    if !session.begins_early() {
        tell_resumed(connection);
    }
    if session.begun.resumption || early {
        connection.worker.start(serve(connection.clone()));
    }
}

fn tell_resumed(connection: &Connection) {
    if connection.session.resumed() {
        // No server here puts data into its tickets. A dead owner needs no message.
        let _ = connection
            .owner
            .post(|env, handle, _| Some(event(env, names::resumed(), handle, false.encode(env))));
    }
}

async fn serve(connection: Arc<Connection>) {
    if contain(tell(&connection)).await.is_err() {
        connection.fail();
    }
}

/// Without the handle, whose collection closes the connection, and ends this.
async fn tell(connection: &Connection) {
    fault::pass(Point::Session);
    let session = &connection.session;
    if let Some(early) = &session.begun.early {
        let outcome = early.outcome().await;
        if !matches!(outcome, Outcome::Accepted | Outcome::Rejected) {
            return;
        }
        if outcome == Outcome::Rejected {
            connection.opening_bidi.forget();
            connection.opening_uni.forget();
        }
        if session.client {
            tell_resumed(connection);
        }
        // A dead owner needs no message.
        let _ = connection.owner.post(move |env, handle, _| {
            Some(event(env, names::early_data(), handle, outcome.name()))
        });
    }
    if session.begun.resumption {
        tell_tickets(connection).await;
    }
}

async fn tell_tickets(connection: &Connection) {
    loop {
        tokio::select! {
            () = connection.session.begun.seen.ticket() => {}
            _ = connection.quic.closed() => return,
        }
        let told = connection.owner.post(|env: Env, handle, _| {
            let ticket = binary(env, b"");
            Some(event(env, names::nst_received(), handle, ticket))
        });
        if told.is_err() {
            return;
        }
    }
}
