//! A client's connection that moves to another address of its own (RFC 9000, section 9).

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustler::{Encoder, Env, NifResult, ResourceArc, Term};

use super::{Connection, Handle, address};
use crate::engine::routed::{Movable, MoveError};
use crate::udp::address::parse;
use crate::vm::error::posix;
use crate::vm::fault::{self, Point};
use crate::vm::messages::atoms;
use crate::vm::reply::Reply;
use crate::vm::tasks::contain;

mod names {
    rustler::atoms! { not_a_client }
}

/// Where a connection is bound, and how it moves.
pub(super) struct Shared {
    bound: Mutex<SocketAddr>,
    way: Mutex<Way>,
}

#[derive(Clone)]
pub(crate) enum Way {
    /// A server stays where it is.
    Server,
    /// An option says so.
    Disabled,
    Open(Movable),
    /// The connection has ended.
    Closed,
}

impl Shared {
    pub(super) fn new(bound: SocketAddr) -> Self {
        Shared {
            bound: Mutex::new(bound),
            way: Mutex::new(Way::Server),
        }
    }

    pub(super) fn bound(&self) -> SocketAddr {
        *self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn way(&self) -> MutexGuard<'_, Way> {
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The endpoint ends with its last connection, whoever still holds a handle.
    pub(super) fn close(&self) {
        let way = std::mem::replace(&mut *self.way(), Way::Closed);
        drop(way);
    }
}

impl Connection {
    /// Of a client: how it can move.
    pub(crate) fn may_move(&self, way: Way) {
        *self.migration.way() = way;
    }

    async fn leave_from(self: &Arc<Self>, from: Option<SocketAddr>) -> Result<SocketAddr, Why> {
        fault::pass(Point::Connection);
        let way = self.migration.way().clone();
        let movable = match way {
            Way::Server => return Err(Why::Server),
            Way::Disabled => return Err(Why::Disabled),
            Way::Closed => return Err(Why::Ended),
            Way::Open(movable) => movable,
        };
        let mut any = self.migration.bound();
        any.set_port(0);
        let bound = movable.leave_from(&self.quic, from.unwrap_or(any)).await?;
        *self
            .migration
            .bound
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = bound;
        Ok(bound)
    }
}

#[derive(Debug, thiserror::Error)]
enum Why {
    #[error("a server does not move")]
    Server,
    #[error("disabled by an option")]
    Disabled,
    #[error("the connection has ended")]
    Ended,
    #[error(transparent)]
    Moving(#[from] MoveError),
}

impl Encoder for Why {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Why::Server => names::not_a_client(),
            Why::Disabled => atoms::disabled(),
            Why::Ended | Why::Moving(MoveError::Ended) => atoms::closed(),
            Why::Moving(MoveError::Family) => atoms::eafnosupport(),
            Why::Moving(MoveError::Unanswered) => atoms::timeout(),
            Why::Moving(MoveError::Io(error)) => posix(error),
        }
        .encode(env)
    }
}

/// Moves to a local address, or to another port. Answered when the peer has answered there, with where the
/// connection leaves now.
#[rustler::nif]
fn conn_migrate<'a>(
    env: Env<'a>,
    handle: ResourceArc<Handle>,
    reference: Term<'a>,
    local: String,
    port: u16,
) -> NifResult<Term<'a>> {
    let from = match local.is_empty() {
        true => None,
        false => Some(parse(&local, port).ok_or(rustler::Error::BadArg)?),
    };
    let (reply, operation) = Reply::about(env, reference, handle.clone());
    let connection = handle.connection.clone();
    connection.worker.start(async move {
        let moved = tokio::select! {
            moved = contain(connection.leave_from(from)) => moved,
            // What was begun is taken back.
            () = reply.cancelled() => return,
        };
        match moved {
            Ok(Ok(_)) => {
                connection.changes.look_now();
                let local = connection.local_address();
                // Who gave up waiting is not told.
                let _ = reply.send(|env| (atoms::ok(), address(env, local)).encode(env));
            }
            Ok(Err(why)) => reply.error(why),
            Err(_) => reply.error(atoms::internal_error()),
        }
    });
    Ok(operation.encode(env))
}
