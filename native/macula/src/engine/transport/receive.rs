//! What drives an endpoint: datagrams go to their connections.

use std::cell::Cell;
use std::io::{self, IoSliceMut};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn_proto::{ConnectionHandle, DatagramEvent, EcnCodepoint, EndpointConfig, EndpointEvent};
use quinn_udp::{BATCH_SIZE, RecvMeta};

use super::core::{Core, EndpointState};
use super::state::Event;
use super::traffic::{Apart, Busy, QUIET};
use super::way::with_buffer;
use crate::vm::tasks::attempt;

/// So long datagrams are received in one turn, at most one call longer.
const TURN: Duration = Duration::from_micros(50);
/// Events of the connections in one turn.
const MAX_EVENTS: usize = 1024;
/// Datagrams that wait for one connection. The system would drop them, too.
const MAX_WAITING: usize = 16 * 1024;

thread_local! {
    /// Room for what whichever endpoint of this thread receives.
    static ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Runs until nobody uses the endpoint and no connection is left, or until the socket or this fails. Dropped
/// before, it takes all connections along.
pub(crate) struct EndpointDriver {
    core: Arc<Core>,
    /// Of the largest batch of datagrams that one call brings in one buffer.
    buffer: usize,
    /// When quiet connections among those that have one were looked for.
    looked: Option<Instant>,
}

impl EndpointDriver {
    pub(super) fn new(core: Arc<Core>, config: &EndpointConfig) -> Self {
        let largest = usize::try_from(config.get_max_udp_payload_size()).unwrap_or(usize::MAX);
        let buffer = largest.min(64 * 1024) * core.socket.max_receive_segments();
        EndpointDriver {
            core,
            buffer,
            looked: None,
        }
    }

    fn run(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.core.inbox.listen(cx.waker());
        let mut again = self.hear();
        let mut room = ROOM.take();
        let received = self.receive(&mut room, cx);
        ROOM.set(room);
        match received {
            Ok(more) => again |= more,
            Err(error) => return Poll::Ready(Err(error)),
        }
        let state = self.core.lock();
        if state.is_left && state.connections.is_empty() {
            return Poll::Ready(Ok(()));
        }
        drop(state);
        if again {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Takes what the connections have left. True when there may be more.
    fn hear(&self) -> bool {
        for _ in 0..MAX_EVENTS {
            match self.core.inbox.pop() {
                Some((handle, event)) => self.take(handle, event),
                None => return false,
            }
        }
        true
    }

    fn take(&self, handle: ConnectionHandle, event: EndpointEvent) {
        let mut state = self.core.lock();
        let drained = event.is_drained();
        let gone = drained.then(|| state.connections.remove(&handle));
        // A connection that has left its end twice is gone the first time.
        if let Some(None) = gone {
            return;
        }
        if drained && state.connections.is_empty() {
            self.core.idle.notify_waiters();
        }
        let answer = state.proto.handle_event(handle, event);
        let known = state.connections.get(&handle);
        let shared = known.map(|known| known.shared.clone());
        drop(state);
        drop(gone);
        if let (Some(shared), Some(event)) = (shared, answer) {
            shared.inbox.push(Event::Proto(event));
        }
    }

    /// Takes what the system has. True when there may be more.
    fn receive(&mut self, room: &mut Vec<u8>, cx: &mut Context<'_>) -> io::Result<bool> {
        let whole = self.buffer * BATCH_SIZE;
        if room.len() < whole {
            room.resize(whole, 0);
        }
        let begun = Instant::now();
        let mut now = begun;
        while now - begun < TURN {
            let mut metas = [RecvMeta::default(); BATCH_SIZE];
            let mut parts = room[..whole].chunks_mut(self.buffer);
            let mut buffers: [IoSliceMut<'_>; BATCH_SIZE] =
                std::array::from_fn(|_| IoSliceMut::new(parts.next().unwrap_or_default()));
            let count = match self.core.socket.poll_recv(cx, &mut buffers, &mut metas) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Ok(count)) => count,
                // An answer of the network to something that was sent.
                Poll::Ready(Err(e)) if e.kind() == io::ErrorKind::ConnectionReset => continue,
                Poll::Ready(Err(error)) => return Err(error),
            };
            now = Instant::now();
            let mut busy = None;
            let mut state = self.core.lock();
            for (meta, buffer) in metas.iter().zip(&buffers).take(count) {
                // One copy for all that came in one buffer.
                let mut received = BytesMut::from(buffer.get(..meta.len).unwrap_or_default());
                while !received.is_empty() {
                    let len = meta.stride.clamp(1, received.len());
                    let now_busy = self.datagram(&mut state, now, meta, received.split_to(len));
                    busy = now_busy.or(busy);
                }
            }
            drop(state);
            if let Some(busy) = busy {
                self.part(&busy, now);
            }
        }
        Ok(true)
    }

    /// Hands a datagram on. Returns the connection that has become busy with it, and that has neighbours.
    fn datagram(
        &self,
        state: &mut EndpointState,
        now: Instant,
        meta: &RecvMeta,
        data: BytesMut,
    ) -> Option<Busy> {
        let ecn = meta.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn as u8));
        with_buffer(|buffer| {
            buffer.clear();
            let event = state
                .proto
                .handle(now, meta.addr, meta.dst_ip, ecn, data, buffer);
            match event {
                Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                    let has_neighbours = state.connections.len() > 1;
                    let known = state.connections.get_mut(&handle)?;
                    let inbox = &known.shared.inbox;
                    inbox.push_within(Event::Proto(event), MAX_WAITING);
                    let busy = known.traffic.count(now, meta.addr) && has_neighbours;
                    return busy.then_some(Busy {
                        handle,
                        peer: meta.addr,
                        local: meta.dst_ip,
                    });
                }
                Some(DatagramEvent::NewConnection(incoming)) => {
                    if state.closing.is_some() || state.is_left {
                        let transmit = state.proto.refuse(incoming, buffer);
                        self.core.respond(&transmit, buffer);
                    } else {
                        state.incoming.push_back(incoming);
                        self.core.arrived.notify_waiters();
                    }
                }
                Some(DatagramEvent::Response(transmit)) => self.core.respond(&transmit, buffer),
                None => {}
            }
            None
        })
    }

    /// Has a busy connection hear by a socket of its own: what waits for it in the system is then ahead of
    /// nobody else's packets. Where there is none to be had, all stays as it is.
    fn part(&mut self, busy: &Busy, now: Instant) {
        let mut socket = self.core.socket.part(busy.peer, busy.local);
        let is_full = |error: &io::Error| error.kind() == io::ErrorKind::QuotaExceeded;
        if socket.as_ref().is_err_and(is_full) {
            self.make_room(now);
            socket = self.core.socket.part(busy.peer, busy.local);
        }
        let Ok(socket) = socket else { return };
        let apart = Apart {
            peer: busy.peer,
            _socket: socket,
        };
        let mut state = self.core.lock();
        let known = state.connections.get_mut(&busy.handle);
        let before = known.and_then(|known| known.traffic.part(Some(apart)));
        drop(state);
        drop(before);
    }

    /// Takes their sockets from connections that are quiet again.
    fn make_room(&mut self, now: Instant) {
        if self.looked.is_some_and(|looked| now - looked < QUIET) {
            return;
        }
        self.looked = Some(now);
        let mut state = self.core.lock();
        let traffic = state
            .connections
            .values_mut()
            .map(|known| &mut known.traffic);
        let quiet: Vec<_> = traffic
            .filter(|traffic| traffic.is_quiet(now))
            .filter_map(|traffic| traffic.part(None))
            .collect();
        drop(state);
        drop(quiet);
    }
}

impl Future for EndpointDriver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match attempt(|| self.run(cx)) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(_)) => Poll::Ready(()),
            Err(_) => {
                self.core.fate.fail();
                Poll::Ready(())
            }
        }
    }
}

impl Drop for EndpointDriver {
    fn drop(&mut self) {
        self.core.lose();
    }
}
