//! Receiving unreliable datagrams (RFC 9221). What nobody asked for stays with QUIC, which drops the
//! oldest when its buffer is full.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustler::{Atom, Encoder, Env, ResourceArc, Term};

use super::{Connection, Handle};
use crate::vm::active::Active;
use crate::vm::bell::Bell;
use crate::vm::error::binary;
use crate::vm::fault::{self, Point};
use crate::vm::messages::{atoms, event, passive};
use crate::vm::runtime::Worker;
use crate::vm::tasks::contain;

pub(super) struct Shared {
    active: Mutex<Active>,
    wake: Arc<Bell>,
    started: AtomicBool,
}

impl Shared {
    pub(super) fn new(worker: &Worker) -> Self {
        Shared {
            active: Mutex::new(Active::Off),
            wake: worker.bell(),
            started: AtomicBool::new(false),
        }
    }
}

/// Has datagrams delivered to the owner: `true`, `false`, `once`, or so many more. A count that comes to its end by
/// this, as it may by a negative number, is told to the owner.
#[rustler::nif]
fn conn_set_datagrams<'a>(env: Env<'a>, handle: ResourceArc<Handle>, mode: Term<'a>) -> Term<'a> {
    let connection = &handle.connection;
    let Some(request) = Active::decode(mode) else {
        return (atoms::error(), atoms::einval()).encode(env);
    };
    let mut active = connection
        .datagrams
        .active
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let Ok((mode, now_passive)) = active.change(request) else {
        return (atoms::error(), atoms::einval()).encode(env);
    };
    *active = mode;
    // Under the lock, as the task unpins under it. The caller's own reference keeps the destructor
    // from running here.
    if mode == Active::Off {
        connection.unpin();
    } else {
        // Messages are owed from here on.
        connection.owner.pin(&handle);
    }
    if now_passive {
        // Under the lock, so that no datagram comes between.
        connection.owner.post_from_nif(env, &handle, passive);
    }
    drop(active);
    if !connection.datagrams.started.swap(true, Ordering::AcqRel) {
        connection.worker.start(serve(connection.clone()));
    }
    connection.datagrams.wake.ring();
    atoms::ok().encode(env)
}

async fn serve(connection: Arc<Connection>) {
    if contain(deliver(&connection)).await.is_err() {
        connection.fail();
    }
}

impl Shared {
    /// Has the task look whether the connection is still there.
    pub(super) fn look(&self) {
        self.wake.ring();
    }
}

async fn deliver(connection: &Connection) {
    let shared = &connection.datagrams;
    loop {
        fault::pass(Point::Datagrams);
        let active = *shared.active.lock().unwrap_or_else(PoisonError::into_inner);
        if active == Active::Off {
            tokio::select! {
                () = shared.wake.rung() => continue,
                _ = connection.quic.closed() => return,
            }
        }
        let datagram = tokio::select! {
            datagram = connection.quic.read_datagram() => datagram,
            () = shared.wake.rung() => continue,
        };
        let Ok(datagram) = datagram else { return };
        let mut active = shared.active.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = matches!(*active, Active::Count(_));
        *active = active.after_message();
        let spent = *active == Active::Off;
        let posted = connection.owner.post(move |env, handle, _| {
            let data = binary(env, &datagram);
            Some(event(env, tag(), handle, data))
        });
        if spent {
            if counted {
                // The message before it has told whether the owner lives.
                let _ = connection.owner.post(passive);
            }
            connection.unpin();
        }
        drop(active);
        if posted.is_err() {
            return;
        }
    }
}

fn tag() -> Atom {
    atoms::dgram()
}
