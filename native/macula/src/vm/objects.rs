//! How many native objects live, so that tests can prove that nothing leaks.

use std::sync::atomic::{AtomicI64, Ordering};

use rustler::{Encoder, Env, Term};

use crate::vm::messages::atoms;

static LISTENERS: AtomicI64 = AtomicI64::new(0);
static CONNECTIONS: AtomicI64 = AtomicI64::new(0);
static STREAMS: AtomicI64 = AtomicI64::new(0);
static LINKS: AtomicI64 = AtomicI64::new(0);
static DIST_ENDPOINTS: AtomicI64 = AtomicI64::new(0);
static PLACES: AtomicI64 = AtomicI64::new(0);

#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Listener,
    Connection,
    Stream,
    /// A link of the distribution, and the endpoint it is made on.
    Link,
    DistEndpoint,
    /// From which a user stream sends ahead of the first credit.
    Place,
}

impl Kind {
    fn counter(self) -> &'static AtomicI64 {
        match self {
            Kind::Listener => &LISTENERS,
            Kind::Connection => &CONNECTIONS,
            Kind::Stream => &STREAMS,
            Kind::Link => &LINKS,
            Kind::DistEndpoint => &DIST_ENDPOINTS,
            Kind::Place => &PLACES,
        }
    }
}

/// Counts the object it is a field of.
pub(crate) struct Counted(Kind);

impl Counted {
    pub(crate) fn new(kind: Kind) -> Self {
        kind.counter().fetch_add(1, Ordering::Relaxed);
        Counted(kind)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.counter().fetch_sub(1, Ordering::Relaxed);
    }
}

/// `[{listener | connection | stream | link | dist_endpoint | place, Count}]` of the inner states that live.
#[rustler::nif]
fn live_objects(env: Env<'_>) -> Term<'_> {
    [
        (atoms::listener(), LISTENERS.load(Ordering::Relaxed)),
        (atoms::connection(), CONNECTIONS.load(Ordering::Relaxed)),
        (atoms::stream(), STREAMS.load(Ordering::Relaxed)),
        (atoms::link(), LINKS.load(Ordering::Relaxed)),
        (
            atoms::dist_endpoint(),
            DIST_ENDPOINTS.load(Ordering::Relaxed),
        ),
        (atoms::place(), PLACES.load(Ordering::Relaxed)),
    ]
    .to_vec()
    .encode(env)
}
