//! Changes that QUIC has no event for: of the addresses, and of what a datagram may carry. A connection
//! whose owner wants to be told looks for them from time to time.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustler::{Atom, Encoder, Env, ResourceArc, Term};
use tokio::sync::Notify;

use super::{Connection, Handle, address, is_over};
use crate::vm::messages::{Gone, atoms, event};
use crate::vm::tasks::contain;

mod names {
    rustler::atoms! { local_address_changed, dgram_state_changed, dgram_send_enabled, dgram_max_len }
}

#[derive(Default)]
pub(super) struct Shared {
    asked: Mutex<Asked>,
    changed: Notify,
    started: AtomicBool,
}

#[derive(Clone, Copy, Default)]
struct Asked {
    /// How often to look; never without it.
    every: Option<Duration>,
    /// Whoever asks again is told anew.
    times: u64,
}

impl Shared {
    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Something has changed on this side.
    pub(super) fn look_now(&self) {
        self.changed.notify_one();
    }
}

/// Has the owner told of changes, which are looked for every so many milliseconds; 0: no more.
#[rustler::nif]
fn conn_tell_changes(handle: ResourceArc<Handle>, every: u64) -> Atom {
    let connection = &handle.connection;
    let changes = &connection.changes;
    let mut asked = changes.asked();
    asked.every = (every > 0).then(|| Duration::from_millis(every));
    asked.times += 1;
    drop(asked);
    if !changes.started.swap(true, Ordering::AcqRel) {
        connection.worker.start(serve(connection.clone()));
    }
    changes.changed.notify_one();
    atoms::ok()
}

async fn serve(connection: Arc<Connection>) {
    if contain(look(&connection)).await.is_err() {
        connection.fail();
    }
}

/// Without the handle, whose collection closes the connection, and ends this.
async fn look(connection: &Connection) {
    let changes = &connection.changes;
    let mut seen: Option<(u64, Seen)> = None;
    while !is_over(&connection.quic) {
        let Asked { every, times } = *changes.asked();
        if every.is_some() {
            let now = Seen::of(connection);
            let before = seen.filter(|(then, _)| *then == times);
            if now.tell(before.map(|(_, seen)| seen), connection).is_err() {
                return;
            }
            seen = Some((times, now));
        }
        let pause = async {
            match every {
                Some(every) => tokio::time::sleep(every).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = pause => {}
            () = changes.changed.notified() => {}
            _ = connection.quic.closed() => return,
        }
    }
}

#[derive(Clone, Copy)]
struct Seen {
    peer: SocketAddr,
    local: SocketAddr,
    datagram: Option<usize>,
}

impl Seen {
    fn of(connection: &Connection) -> Self {
        Seen {
            peer: connection.quic.remote_address(),
            local: connection.local_address(),
            datagram: connection.quic.max_datagram_size(),
        }
    }

    /// What an address was at first is no news; what datagrams may carry is.
    fn tell(self, before: Option<Seen>, connection: &Connection) -> Result<(), Gone> {
        if before.is_some_and(|before| before.peer != self.peer) {
            connection.owner.post(move |env, handle, _| {
                let detail = address(env, self.peer);
                Some(event(env, atoms::peer_address_changed(), handle, detail))
            })?;
        }
        if before.is_some_and(|before| before.local != self.local) {
            connection.owner.post(move |env, handle, _| {
                let detail = address(env, self.local);
                Some(event(env, names::local_address_changed(), handle, detail))
            })?;
        }
        if before.is_none_or(|before| before.datagram != self.datagram) {
            connection.owner.post(move |env, handle, _| {
                let detail = self.datagrams(env)?;
                Some(event(env, names::dgram_state_changed(), handle, detail))
            })?;
        }
        Ok(())
    }

    fn datagrams<'a>(self, env: Env<'a>) -> Option<Term<'a>> {
        let enabled = self.datagram.is_some().encode(env);
        let size = self.datagram.unwrap_or(0).encode(env);
        Term::map_from_pairs(
            env,
            &[
                (names::dgram_send_enabled(), enabled),
                (names::dgram_max_len(), size),
            ],
        )
        .ok()
    }
}
