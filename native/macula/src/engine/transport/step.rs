//! What moves a connection on.

use std::any::Any;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use quinn_proto::{EndpointEvent, Event as ProtoEvent, StreamEvent};

use super::state::{Event, Guard, Shared, State, Told, internal};
use super::way::Way;
use crate::vm::tasks::{Fate, attempt};

/// Events of one turn: then what they bring about is sent.
const MAX_EVENTS: usize = 128;
/// After so much silence a peer is asked for a sign of life by which something is to be sent and waits for room. Room
/// may have been made known to where this side was before its address changed (RFC 9000, sections 4.1 and 9).
const SILENCE: Duration = Duration::from_secs(1);

/// Drives one connection until nothing is left of it; dropped before, it takes the connection along. A
/// future, for whoever has no other plan.
pub(crate) struct Stepper(Arc<Shared>);

/// A hold on a connection, whoever drives it.
#[derive(Clone)]
pub(crate) struct Hold(Arc<Shared>);

impl Hold {
    /// What becomes of the driving.
    pub(crate) fn fate(&self) -> &Arc<Fate> {
        &self.0.fate
    }

    /// Keeps something as long as QUIC knows the connection.
    pub(crate) fn keep(&self, guest: impl Any + Send) {
        self.0.keep(Some(Box::new(guest)));
    }
}

impl Stepper {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Stepper(shared)
    }

    pub(crate) fn hold(&self) -> Hold {
        Hold(self.0.clone())
    }

    /// Does what there is to do, up to a limit. Ready when the connection is over, also by a panic.
    pub(crate) fn step(&self, cx: &mut Context<'_>) -> Poll<()> {
        attempt(|| step(&self.0, self.0.lock(), cx)).unwrap_or(Poll::Ready(()))
    }

    /// As `step`, where nobody else has the connection in hand.
    pub(crate) fn try_step(&self, cx: &mut Context<'_>) -> Option<Poll<()>> {
        let stepped = attempt(|| Some(step(&self.0, self.0.try_lock()?, cx)));
        stepped.unwrap_or(Some(Poll::Ready(())))
    }
}

impl Future for Stepper {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.step(cx)
    }
}

impl Drop for Stepper {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        if state.error.is_none() {
            state.terminate(internal("given up"), &self.0.told);
        }
        let (way, timer) = (state.way.take(), state.timer.take());
        if state.is_broken || !state.proto.is_drained() {
            state
                .endpoint
                .push((state.handle, EndpointEvent::drained()));
        }
        drop(state);
        drop((way, timer));
        self.0.keep(None);
    }
}

fn step(shared: &Shared, mut guard: Guard<'_>, cx: &mut Context<'_>) -> Poll<()> {
    let state = &mut *guard;
    if state.is_broken {
        return Poll::Ready(());
    }
    shared.inbox.listen(cx.waker());
    let now = Instant::now();
    let mut again = true;
    for _ in 0..MAX_EVENTS {
        match shared.inbox.pop() {
            Some(Event::Proto(event)) => {
                state.heard = now;
                state.proto.handle_event(event);
            }
            Some(Event::Close(code, reason)) if !state.proto.is_closed() => {
                state.close(code, reason, &shared.told);
            }
            Some(Event::Close(..)) => {}
            Some(Event::EndpointLost) => {
                state.terminate(internal("the endpoint has ended"), &shared.told);
                return Poll::Ready(());
            }
            None => {
                again = false;
                break;
            }
        }
    }
    let Some(way) = &mut state.way else {
        return Poll::Ready(());
    };
    again |= way.transmit(&mut state.proto, now, cx);
    again |= expire(state, cx);
    while let Some(event) = state.proto.poll_endpoint_events() {
        state.endpoint.push((state.handle, event));
    }
    let mut writable = Vec::new();
    while let Some(event) = state.proto.poll() {
        match event {
            ProtoEvent::Stream(StreamEvent::Writable { id }) => writable.push(id),
            event => tell(state, event, &shared.told),
        }
    }
    state.shares.order(&mut writable);
    for id in writable {
        wake(state.writers.remove(&id));
    }
    if state.proto.is_drained() {
        return Poll::Ready(());
    }
    if again {
        shared.inbox.wake();
    }
    Poll::Pending
}

/// Looks at the clock, and sets the timer. True when there may be something new to be sent.
fn expire(state: &mut State, cx: &mut Context<'_>) -> bool {
    let answer = state.way.as_ref().and_then(Way::due);
    let silent = (!state.writers.is_empty()).then(|| state.heard + SILENCE);
    let others = answer.into_iter().chain(silent);
    let Some(due) = state.proto.poll_timeout().into_iter().chain(others).min() else {
        state.due = None;
        return false;
    };
    let timer = match &mut state.timer {
        Some(timer) => {
            if state.due != Some(due) {
                timer.as_mut().reset(due);
            }
            timer
        }
        None => state.timer.insert((state.make_timer)(due)),
    };
    state.due = Some(due);
    if timer.as_mut().poll(cx).is_pending() {
        return false;
    }
    state.due = None;
    let now = Instant::now();
    if silent.is_some_and(|silent| silent <= now) {
        state.heard = now;
        state.proto.ping();
    }
    state.proto.handle_timeout(now);
    true
}

fn tell(state: &mut State, event: ProtoEvent, told: &Told) {
    match event {
        ProtoEvent::HandshakeDataReady => {
            state.has_handshake_data = true;
            told.begun.notify_waiters();
        }
        ProtoEvent::Connected => {
            state.is_connected = true;
            told.begun.notify_waiters();
            if state.has_rejected_early() {
                state.wake_streams();
            }
        }
        ProtoEvent::ConnectionLost { reason } => state.terminate(reason, told),
        ProtoEvent::DatagramReceived => told.datagram.notify_waiters(),
        ProtoEvent::DatagramsUnblocked => told.datagram_room.notify_waiters(),
        ProtoEvent::Stream(event) => match event {
            StreamEvent::Opened { dir } => told.opened[dir as usize].notify_waiters(),
            StreamEvent::Available { dir } => told.available[dir as usize].notify_waiters(),
            StreamEvent::Readable { id } => wake(state.readers.remove(&id)),
            StreamEvent::Writable { id } => wake(state.writers.remove(&id)),
            StreamEvent::Finished { id } => wake(state.enders.remove(&id)),
            StreamEvent::Stopped { id, .. } => {
                wake(state.enders.remove(&id));
                wake(state.writers.remove(&id));
            }
        },
    }
}

fn wake(waker: Option<std::task::Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}
