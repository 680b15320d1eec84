//! How the packets of one connection leave: its socket, and what the socket has refused for now.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use quinn_proto::{self as proto, Transmit};
use quinn_udp as udp;

use crate::engine::answering::Answering;
use crate::udp::asynchronous::{AsyncUdpSocket, UdpPoller};

/// Datagrams that the system separates, at most.
const MAX_SEGMENTS: usize = 10;
/// Datagrams of one turn: others have theirs then.
const MAX_DATAGRAMS: usize = 20;
/// A buffer that has grown beyond this is not kept.
const MAX_KEPT: usize = 1 << 20;

thread_local! {
    /// Room for the packets of whichever connection this thread drives.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Runs `act` with the thread's buffer.
pub(super) fn with_buffer<T>(act: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    let mut buffer = BUFFER.take();
    let result = act(&mut buffer);
    if buffer.capacity() <= MAX_KEPT {
        BUFFER.set(buffer);
    }
    result
}

pub(super) struct Way {
    pub(super) socket: Arc<dyn AsyncUdpSocket>,
    poller: Pin<Box<dyn UdpPoller>>,
    /// Packets that are made and have not left.
    kept: Option<(Transmit, Box<[u8]>)>,
    answering: Answering,
}

/// What has become of a batch of packets.
enum Sent {
    Yes,
    /// The task is woken when there is room.
    Wait,
    /// The socket refused after it had announced room.
    Again,
}

impl Way {
    pub(super) fn new(socket: Arc<dyn AsyncUdpSocket>) -> Self {
        Way {
            poller: socket.clone().create_io_poller(),
            socket,
            kept: None,
            answering: Answering::default(),
        }
    }

    /// Sends what there is to send. True when there may be more.
    pub(super) fn transmit(
        &mut self,
        proto: &mut proto::Connection,
        now: Instant,
        cx: &mut Context<'_>,
    ) -> bool {
        let mut sent = 0;
        if let Some((transmit, contents)) = self.kept.take() {
            match self.send(&transmit, &contents, cx) {
                Sent::Yes => sent += datagrams(&transmit),
                Sent::Wait => {
                    self.kept = Some((transmit, contents));
                    return false;
                }
                Sent::Again => {
                    self.kept = Some((transmit, contents));
                    return true;
                }
            }
        }
        with_buffer(|buffer| {
            let most = self.socket.max_transmit_segments().clamp(1, MAX_SEGMENTS);
            while sent < MAX_DATAGRAMS {
                buffer.clear();
                buffer.reserve(usize::from(proto.current_mtu()));
                let first = sent == 0;
                let polled = self
                    .answering
                    .poll_transmit(proto, now, most, buffer, first);
                let Some(transmit) = polled else {
                    return false;
                };
                match self.send(&transmit, &buffer[..transmit.size], cx) {
                    Sent::Yes => sent += datagrams(&transmit),
                    Sent::Wait => {
                        self.keep(transmit, buffer);
                        return false;
                    }
                    Sent::Again => {
                        self.keep(transmit, buffer);
                        return true;
                    }
                }
            }
            true
        })
    }

    /// When there is something to be sent, whatever QUIC's own timers say.
    pub(super) fn due(&self) -> Option<Instant> {
        match self.kept {
            Some(_) => None,
            None => self.answering.due(),
        }
    }

    fn keep(&mut self, transmit: Transmit, buffer: &[u8]) {
        let contents = buffer[..transmit.size].into();
        self.kept = Some((transmit, contents));
    }

    fn send(&mut self, transmit: &Transmit, contents: &[u8], cx: &mut Context<'_>) -> Sent {
        // The socket is asked right before each call: so it learns of which connection that is. An error
        // shows itself in the call.
        if self.poller.as_mut().poll_writable(cx).is_pending() {
            return Sent::Wait;
        }
        match send(&*self.socket, transmit, contents) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                match self.poller.as_mut().poll_writable(cx) {
                    Poll::Pending => Sent::Wait,
                    Poll::Ready(_) => Sent::Again,
                }
            }
            // Any other error is as good as a loss on the way.
            _ => Sent::Yes,
        }
    }
}

fn datagrams(transmit: &Transmit) -> usize {
    transmit
        .segment_size
        .map_or(1, |segment| transmit.size.div_ceil(segment.max(1)))
}

/// Hands packets to a socket.
pub(super) fn send(
    socket: &dyn AsyncUdpSocket,
    transmit: &Transmit,
    contents: &[u8],
) -> io::Result<()> {
    socket.try_send(&udp::Transmit {
        destination: transmit.destination,
        ecn: transmit
            .ecn
            .and_then(|ecn| udp::EcnCodepoint::from_bits(ecn as u8)),
        contents,
        segment_size: transmit.segment_size,
        src_ip: transmit.src_ip,
    })
}
