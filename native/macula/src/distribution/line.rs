//! Two ends of a link on an emulated line, which has a clock of its own: what windows and congestion control make
//! of a path, however busy the machine is.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn_proto::{
    ClientConfig, Connection, ConnectionHandle, DatagramEvent, Dir, Endpoint, EndpointConfig,
    StreamId, VarInt,
};

use super::endpoint::{Way, server_config, transport};
use super::link::Rules;
use super::link::write::send_window;
use super::tls::{self, SERVER_NAME};

/// Each end looks at what has come and at its timers so often.
const TURN: Duration = Duration::from_micros(50);
/// Payload of a datagram on Ethernet, and the headers around it.
const MTU: u16 = 1_472;
const HEADERS: usize = 28;
/// The default of a lane.
const WINDOW: u32 = 8 * 1024 * 1024;
/// A link surveys its path so often.
const SURVEY: Duration = Duration::from_millis(10);

#[derive(Clone, Copy)]
struct Line {
    /// Bytes per second.
    rate: u64,
    round_trip: Duration,
    /// Bytes that wait at its beginning; what comes beyond them is lost.
    queue: u64,
    /// One packet of so many is lost; 0 for none.
    loses: u64,
}

/// One direction.
struct Wire {
    line: Line,
    under_way: VecDeque<(Instant, BytesMut)>,
    /// When all that waits at its beginning has left.
    free: Instant,
    seen: u64,
}

impl Wire {
    fn new(line: Line, now: Instant) -> Self {
        Wire {
            line,
            under_way: VecDeque::new(),
            free: now,
            seen: 0,
        }
    }

    fn put(&mut self, now: Instant, datagram: &[u8]) {
        // An even mix of the numbers of packets.
        self.seen += 1;
        let mixed = self.seen.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let is_lost = self.line.loses > 0 && mixed.is_multiple_of(self.line.loses);
        let begins = self.free.max(now);
        let queued = (begins - now).as_micros() as u64 * self.line.rate / 1_000_000;
        if is_lost || queued > self.line.queue {
            return;
        }
        let size = (datagram.len() + HEADERS) as u64;
        self.free = begins + Duration::from_nanos(size * 1_000_000_000 / self.line.rate);
        let arrives = self.free + self.line.round_trip / 2;
        self.under_way
            .push_back((arrives, BytesMut::from(datagram)));
    }

    fn take(&mut self, now: Instant) -> Option<BytesMut> {
        let (arrives, _) = self.under_way.front()?;
        if *arrives > now {
            return None;
        }
        self.under_way.pop_front().map(|(_, datagram)| datagram)
    }
}

struct End {
    endpoint: Endpoint,
    connection: Option<(ConnectionHandle, Connection)>,
    peer: SocketAddr,
    buffer: Vec<u8>,
    surveyed: Instant,
}

impl End {
    fn turn(&mut self, now: Instant, comes: &mut Wire, leaves: &mut Wire) {
        while let Some(datagram) = comes.take(now) {
            self.buffer.clear();
            let event =
                self.endpoint
                    .handle(now, self.peer, None, None, datagram, &mut self.buffer);
            match event {
                Some(DatagramEvent::ConnectionEvent(_, event)) => self.at().handle_event(event),
                Some(DatagramEvent::NewConnection(incoming)) => {
                    let accepted = self.endpoint.accept(incoming, now, &mut self.buffer, None);
                    self.connection = Some(accepted.map_err(|e| e.cause).expect("accepted"));
                }
                _ => (),
            }
        }
        let Some((handle, connection)) = &mut self.connection else {
            return;
        };
        if connection.poll_timeout().is_some_and(|due| due <= now) {
            connection.handle_timeout(now);
        }
        while connection.poll().is_some() {}
        if now - self.surveyed >= SURVEY {
            self.surveyed = now;
            let path = connection.stats().path;
            connection.set_send_window(send_window(path.cwnd, path.lost_packets > 0, false));
        }
        loop {
            self.buffer.clear();
            let Some(transmit) = connection.poll_transmit(now, 10, &mut self.buffer) else {
                break;
            };
            let segment = transmit.segment_size.unwrap_or(transmit.size);
            for datagram in self.buffer[..transmit.size].chunks(segment) {
                leaves.put(now, datagram);
            }
        }
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(event) = self.endpoint.handle_event(*handle, event) {
                connection.handle_event(event);
            }
        }
    }

    fn at(&mut self) -> &mut Connection {
        &mut self.connection.as_mut().expect("a connection").1
    }
}

/// What one lane has carried between two moments, in bytes per second, and how long a packet waited at the
/// beginning of the line in the median.
struct Carried {
    rate: u64,
    waited: Duration,
}

fn carry(line: Line, from: Duration, to: Duration) -> Carried {
    let begun = Instant::now();
    let mut now = begun;
    let rules = Rules {
        liveness: Duration::from_secs(10),
        single: false,
        streams: 0,
        window: WINDOW,
    };
    let configs = tls::configs(false).expect("configurations");
    let transport = || transport(rules, true, Way::Far(MTU));
    let server = server_config(&configs, transport());
    let mut client = ClientConfig::new(configs.client);
    client.transport_config(Arc::new(transport()));
    let [dials, listens] = [1, 2].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let endpoint = |server| Endpoint::new(Arc::new(EndpointConfig::default()), server, true, None);
    let end = |endpoint, peer| End {
        endpoint,
        connection: None,
        peer,
        buffer: Vec::new(),
        surveyed: begun,
    };
    let mut sender = end(endpoint(None), listens);
    let mut receiver = end(endpoint(Some(Arc::new(server))), dials);
    let dialled = sender.endpoint.connect(now, client, listens, SERVER_NAME);
    sender.connection = Some(dialled.expect("dialled"));
    let (mut there, mut back) = (Wire::new(line, now), Wire::new(line, now));
    let (mut lane, mut read, mut waits) = (None, 0, Vec::new());
    let mut read_before = 0;
    let data = vec![0; 1 << 16];
    while now < begun + to {
        now += TURN;
        if now - begun >= from {
            waits.push(there.free.saturating_duration_since(now));
        } else {
            read_before = read;
        }
        receiver.turn(now, &mut there, &mut back);
        if let Some((_, connection)) = &mut receiver.connection {
            read += drain(connection);
            if lane.is_none() && !connection.is_handshaking() {
                // As a link does once its peer is trusted.
                connection.set_max_concurrent_streams(Dir::Uni, VarInt::from_u32(2));
                connection.set_receive_window(VarInt::MAX);
            }
        }
        let connection = sender.at();
        lane = lane.or_else(|| connection.streams().open(Dir::Uni));
        if let Some(lane) = lane {
            while connection.send_stream(lane).write(&data).is_ok() {}
        }
        sender.turn(now, &mut back, &mut there);
    }
    waits.sort_unstable();
    Carried {
        rate: (read - read_before) * 1000 / (to - from).as_millis() as u64,
        waited: waits[waits.len() / 2],
    }
}

/// Reads all that has come; how much it was.
fn drain(connection: &mut Connection) -> u64 {
    let lane = StreamId::new(quinn_proto::Side::Client, Dir::Uni, 0);
    let mut stream = connection.recv_stream(lane);
    let Ok(mut chunks) = stream.read(true) else {
        return 0;
    };
    let mut read = 0;
    while let Ok(Some(chunk)) = chunks.next(usize::MAX) {
        read += chunk.bytes.len() as u64;
    }
    let _ = chunks.finalize();
    read
}

#[test]
fn a_lane_fills_its_path() {
    for (rate, round_trip, queue, loses, part) in [
        // A gigabit a second over 50 ms, 200 megabits over 20, and with one packet of a hundred lost; 50 over 200.
        (125_000_000, 50, 3_000_000, 0, 93),
        (25_000_000, 20, 500_000, 0, 93),
        (25_000_000, 20, 500_000, 100, 80),
        (6_250_000, 200, 500_000, 0, 85),
    ] {
        let round_trip = Duration::from_millis(round_trip);
        let line = Line {
            rate,
            round_trip,
            queue,
            loses,
        };
        let carried = carry(line, Duration::from_secs(3), Duration::from_secs(6));
        println!(
            "{} of {rate} B/s over {round_trip:?}, {:?} in the queue",
            carried.rate, carried.waited
        );
        assert!(
            carried.rate * 100 >= rate * part,
            "{} of {rate}",
            carried.rate
        );
        assert!(carried.waited <= round_trip, "{:?}", carried.waited);
    }
}
