//! The state of one connection, under its lock, and who is told of what becomes of it.

use std::any::Any;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::Waker;
use std::time::Instant;

use bytes::Bytes;
use quinn_proto::{
    self as proto, ConnectionError, ConnectionEvent, ConnectionHandle, EndpointEvent, StreamId,
    TransportError, TransportErrorCode, VarInt,
};
use tokio::sync::Notify;

use super::inbox::Inbox;
use super::shares::Shares;
use super::timer::{MakeTimer, Timer};
use super::way::Way;
use crate::engine::parting;
use crate::udp::asynchronous::AsyncUdpSocket;
use crate::vm::locks::try_lock;
use crate::vm::sync::{Mutex, MutexGuard};
use crate::vm::tasks::Fate;

/// What is left for a connection.
pub(super) enum Event {
    Proto(ConnectionEvent),
    Close(VarInt, Bytes),
    /// Nothing is received or sent for it any more.
    EndpointLost,
}

/// What connections leave for their endpoint.
pub(super) type EndpointInbox = Inbox<(ConnectionHandle, EndpointEvent)>;

/// A connection, as all that use or drive it share it.
pub(crate) struct Shared {
    state: Mutex<State>,
    pub(super) inbox: Inbox<Event>,
    pub(super) told: Told,
    pub(super) fate: Arc<Fate>,
    /// Something that lives as long as the connection does for QUIC.
    guest: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Who waits for what, streams apart.
#[derive(Default)]
pub(super) struct Told {
    /// The handshake has shown its data, is done, or has failed.
    pub(super) begun: Notify,
    pub(super) closed: Notify,
    /// The peer lets streams be opened, bidirectional and unidirectional ones.
    pub(super) available: [Notify; 2],
    /// The peer has opened some.
    pub(super) opened: [Notify; 2],
    pub(super) datagram: Notify,
    pub(super) datagram_room: Notify,
}

pub(super) struct State {
    pub(super) proto: proto::Connection,
    pub(super) handle: ConnectionHandle,
    pub(super) endpoint: Arc<EndpointInbox>,
    /// Nothing once the connection is over.
    pub(super) way: Option<Way>,
    pub(super) make_timer: MakeTimer,
    pub(super) timer: Option<Pin<Box<dyn Timer>>>,
    /// What the timer is set to.
    pub(super) due: Option<Instant>,
    /// When a packet came last, or was asked for.
    pub(super) heard: Instant,
    pub(super) has_handshake_data: bool,
    pub(super) is_connected: bool,
    pub(super) shares: Shares,
    pub(super) error: Option<ConnectionError>,
    /// A panic has left the state as it was at that moment.
    pub(super) is_broken: bool,
    /// One waits for each stream and kind.
    pub(super) readers: BTreeMap<StreamId, Waker>,
    pub(super) writers: BTreeMap<StreamId, Waker>,
    pub(super) enders: BTreeMap<StreamId, Waker>,
}

/// The error of a connection that ends for a failure of this side.
pub(super) fn internal(reason: &str) -> ConnectionError {
    ConnectionError::TransportError(TransportError {
        code: TransportErrorCode::INTERNAL_ERROR,
        frame: None,
        reason: reason.to_owned(),
    })
}

impl Shared {
    pub(super) fn new(
        proto: proto::Connection,
        handle: ConnectionHandle,
        endpoint: Arc<EndpointInbox>,
        socket: Arc<dyn AsyncUdpSocket>,
        make_timer: MakeTimer,
    ) -> Arc<Self> {
        Arc::new(Shared {
            state: Mutex::new(State {
                proto,
                handle,
                endpoint,
                way: Some(Way::new(socket)),
                make_timer,
                timer: None,
                due: None,
                heard: Instant::now(),
                has_handshake_data: false,
                is_connected: false,
                shares: Shares::default(),
                error: None,
                is_broken: false,
                readers: BTreeMap::new(),
                writers: BTreeMap::new(),
                enders: BTreeMap::new(),
            }),
            inbox: Inbox::new(),
            told: Told::default(),
            fate: Arc::default(),
            guest: Mutex::new(None),
        })
    }

    /// Takes the lock, for a moment.
    pub(super) fn lock(&self) -> Guard<'_> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Guard::new(state, self)
    }

    /// As `lock`, where nobody has it.
    pub(super) fn try_lock(&self) -> Option<Guard<'_>> {
        try_lock(&self.state).map(|state| Guard::new(state, self))
    }

    /// Has the driver send what there is to send.
    pub(super) fn wake(&self) {
        self.inbox.wake();
    }

    /// Keeps something, or lets it go.
    pub(super) fn keep(&self, guest: Option<Box<dyn Any + Send>>) {
        let mut place = self.guest.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *place, guest);
        drop(place);
        drop(before);
    }
}

/// The lock in hand. Where a panic takes it away, the connection is lost.
pub(super) struct Guard<'s> {
    state: MutexGuard<'s, State>,
    shared: &'s Shared,
    /// A panic that has nothing to do with the connection unwinds already.
    unwinds: bool,
}

impl<'s> Guard<'s> {
    fn new(state: MutexGuard<'s, State>, shared: &'s Shared) -> Self {
        Guard {
            state,
            shared,
            unwinds: std::thread::panicking(),
        }
    }
}

impl Deref for Guard<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Guard<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if !self.unwinds && std::thread::panicking() {
            self.state.is_broken = true;
            // Whoever is told finds the reason.
            self.shared.fate.fail();
            self.state.terminate(internal("a panic"), &self.shared.told);
            self.shared.wake();
        }
    }
}

impl State {
    /// Notes why the connection is over, the first reason, and tells all that wait.
    pub(super) fn terminate(&mut self, reason: ConnectionError, told: &Told) {
        self.error.get_or_insert(reason);
        self.wake_streams();
        told.begun.notify_waiters();
        for pair in [&told.available, &told.opened] {
            for notify in pair {
                notify.notify_waiters();
            }
        }
        told.datagram.notify_waiters();
        told.datagram_room.notify_waiters();
        told.closed.notify_waiters();
    }

    pub(super) fn close(&mut self, code: VarInt, reason: Bytes, told: &Told) {
        if !self.is_broken {
            parting::leave(self.proto.congestion_state());
            self.proto.close(Instant::now(), code, reason);
        }
        self.terminate(ConnectionError::LocallyClosed, told);
    }

    /// Wakes all that wait for streams.
    pub(super) fn wake_streams(&mut self) {
        for waiting in [&mut self.readers, &mut self.writers, &mut self.enders] {
            for (_, waker) in std::mem::take(waiting) {
                waker.wake();
            }
        }
    }

    /// The error of a state with which nothing may be done any more.
    pub(super) fn broken(&self) -> Option<ConnectionError> {
        self.error.clone().filter(|_| self.is_broken)
    }

    /// Whether what began as early data has not been accepted.
    pub(super) fn has_rejected_early(&self) -> bool {
        self.proto.side().is_client() && !self.proto.is_handshaking() && !self.proto.accepted_0rtt()
    }

    /// Whether a stream that begins now carries early data.
    pub(super) fn is_early(&self) -> bool {
        self.proto.side().is_client() && self.proto.is_handshaking()
    }
}

/// Those that use the connection. The last of them closes it.
pub(super) struct Alive(pub(super) Arc<Shared>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0
            .inbox
            .push(Event::Close(VarInt::from_u32(0), Bytes::new()));
    }
}

impl Deref for Alive {
    type Target = Arc<Shared>;

    fn deref(&self) -> &Arc<Shared> {
        &self.0
    }
}
