//! Changes of the addresses, of what a datagram may carry, and of how many streams there may be. QUIC has an event
//! for streams that the peer allows, and for nothing else. A connection whose owner wants to be told looks
//! for the rest from time to time.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustler::{Atom, Encoder, Env, ResourceArc, Term};
use tokio::sync::Notify;

use super::{Connection, Handle, Handshake, address, is_over};
use crate::vm::error::{binaries, binary};
use crate::vm::fault::{self, Point};
use crate::vm::messages::{Gone, atoms, event};
use crate::vm::tasks::contain;

mod names {
    rustler::atoms! {
        local_address_changed, dgram_state_changed, dgram_send_enabled, dgram_max_len,
        streams_available, peer_needs_streams, bidi_streams, unidi_streams,
        connected, peer_cert_received, is_resumed, alpns, cert, chain,
    }
}

/// The peer may allow streams one by one: those that it allows within this time are told together.
const GATHERED: Duration = Duration::from_millis(100);

pub(super) struct Shared {
    /// The streams of the peer that may be open at a time, bidirectional and unidirectional ones.
    allowed: [u64; 2],
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
    pub(super) fn new(allowed: [u64; 2]) -> Self {
        Shared {
            allowed,
            asked: Mutex::default(),
            changed: Notify::new(),
            started: AtomicBool::new(false),
        }
    }

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
    // Of the request for which the handshake was told.
    let mut told = 0;
    while !is_over(&connection.quic) {
        fault::pass(Point::Changes);
        let Asked { every, times } = *changes.asked();
        // Whatever the peer allows from here on is heard.
        let more = connection.quic.more_streams();
        if every.is_some() {
            if told != times && connection.session.is_done() {
                if tell_handshake(connection).is_err() {
                    return;
                }
                told = times;
            }
            let now = Seen::of(connection);
            let before = seen.filter(|(then, _)| *then == times);
            if now.tell(before.map(|(_, seen)| seen), connection).is_err() {
                return;
            }
            seen = Some((times, now));
        }
        let pause = async {
            let Some(every) = every else {
                return std::future::pending().await;
            };
            tokio::select! {
                () = tokio::time::sleep(every) => {}
                () = more => tokio::time::sleep(every.min(GATHERED)).await,
            }
        };
        tokio::select! {
            () = pause => {}
            () = changes.changed.notified() => {}
            () = connection.session.outcome(), if connection.session.is_pending() => {}
            _ = connection.quic.closed() => return,
        }
    }
}

fn tell_handshake(connection: &Connection) -> Result<(), Gone> {
    let handshake = Handshake::of(&connection.quic);
    let peer = connection.quic.remote_address();
    let local = connection.local_address();
    let shown = handshake.peer_certificates.clone();
    connection.owner.post(move |env, handle, _| {
        let alpns = match &handshake.protocol {
            // A charlist.
            Some(name) => name
                .iter()
                .map(|b| u32::from(*b))
                .collect::<Vec<_>>()
                .encode(env),
            None => atoms::undefined().encode(env),
        };
        let more = [
            (atoms::sockname(), address(env, local)),
            (names::is_resumed(), handshake.resumed.encode(env)),
            (names::alpns(), alpns),
        ];
        let props = [&handshake.known(env, peer)[..], &more].concat();
        let props = Term::map_from_pairs(env, &props).ok()?;
        Some(event(env, names::connected(), handle, props))
    })?;
    let Some(own) = shown.first().cloned() else {
        return Ok(());
    };
    connection.owner.post(move |env, handle, _| {
        let props = [
            (names::cert(), binary(env, &own)),
            (names::chain(), binaries(env, &shown)),
        ];
        let props = Term::map_from_pairs(env, &props).ok()?;
        Some(event(env, names::peer_cert_received(), handle, props))
    })
}

#[derive(Clone, Copy)]
struct Seen {
    peer: SocketAddr,
    local: SocketAddr,
    datagram: Option<usize>,
    /// Bidirectional and unidirectional streams, here and below.
    allowed: Option<[u64; 2]>,
    /// How often the peer has said that it may open no more.
    blocked: [u64; 2],
    /// Whether the peer has as many open as it may.
    full: [bool; 2],
}

impl Seen {
    fn of(connection: &Connection) -> Self {
        let received = connection.quic.stats().frame_rx;
        let [bi, uni] = connection.quic.remote_streams();
        let [most_bi, most_uni] = connection.changes.allowed;
        Seen {
            peer: connection.quic.remote_address(),
            local: connection.local_address(),
            datagram: connection.quic.max_datagram_size(),
            allowed: connection.session.allowed_streams(),
            blocked: [received.streams_blocked_bidi, received.streams_blocked_uni],
            full: [bi > 0 && bi >= most_bi, uni > 0 && uni >= most_uni],
        }
    }

    /// What an address was at first is no news; all else is.
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
        self.tell_streams(before, connection)
    }

    fn tell_streams(self, before: Option<Seen>, connection: &Connection) -> Result<(), Gone> {
        if let Some([bi, uni]) = self.allowed
            && before.is_none_or(|before| before.allowed != self.allowed)
        {
            let bi = connection.opening_bidi.left_of(bi);
            let uni = connection.opening_uni.left_of(uni);
            connection.owner.post(move |env, handle, _| {
                let keys = [names::bidi_streams(), names::unidi_streams()];
                let left = Term::map_from_arrays(env, &keys, &[bi, uni]).ok()?;
                Some(event(env, names::streams_available(), handle, left))
            })?;
        }
        let needs = [names::bidi_streams(), names::unidi_streams()];
        let now = self.blocked.into_iter().zip(self.full).zip(needs);
        let before = before.map_or([(0, false); 2], |before| {
            let ([bi, uni], [full_bi, full_uni]) = (before.blocked, before.full);
            [(bi, full_bi), (uni, full_uni)]
        });
        for (((blocked, full), what), (then_blocked, then_full)) in now.zip(before) {
            if blocked > then_blocked || (full && !then_full) {
                connection.owner.post(move |env, handle, _| {
                    let detail = what.encode(env);
                    Some(event(env, names::peer_needs_streams(), handle, detail))
                })?;
            }
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
