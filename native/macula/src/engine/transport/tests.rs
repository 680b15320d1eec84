//! Two endpoints, over loopback and over a network in memory that loses, repeats and delays.

use std::any::Any;
use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_udp::{RecvMeta, Transmit};
use rustls_pki_types::PrivatePkcs8KeyDer;
use tokio::time::{sleep, timeout};

use super::connection::Connection;
use super::endpoint::Endpoint;
use super::errors::{ReadError, WriteError};
use super::loopback::{loopback, wrapped};
use super::recv::RecvStream;
use super::timer::tokio_timer;
use crate::engine::parting::Parting;
use crate::engine::routed::{MAX_BESIDE, Routed};
use crate::tls::verify::Anybody;
use crate::udp::asynchronous::{AsyncUdpSocket, UdpPoller};
use crate::udp::socket::Wrapped;
use quinn_proto::congestion::{Controller, ControllerFactory};
use quinn_proto::{
    ClientConfig, ConnectionError, EndpointConfig, IdleTimeout, ServerConfig, TransportConfig,
    VarInt,
};

const PATIENCE: Duration = Duration::from_secs(60);

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ended = runtime
        .expect("a runtime")
        .block_on(async { timeout(PATIENCE, test).await });
    ended.expect("in time");
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport.max_idle_timeout(IdleTimeout::try_from(Duration::from_secs(20)).ok());
    transport
}

fn configs(transport: Arc<TransportConfig>) -> (ClientConfig, ServerConfig) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]);
    let made = made.expect("a certificate");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody {
            provider: provider.clone(),
        }))
        .with_no_client_auth();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .expect("a usable certificate");
    let client = QuicClientConfig::try_from(client).expect("QUIC");
    let server = QuicServerConfig::try_from(server).expect("QUIC");
    let mut client = ClientConfig::new(Arc::new(client));
    let mut server = ServerConfig::with_crypto(Arc::new(server));
    client.transport_config(transport.clone());
    server.transport_config(transport);
    (client, server)
}

/// A client's endpoint and a server's.
struct Pair {
    client: Endpoint,
    server: Endpoint,
    config: ClientConfig,
    /// Of the client's driver.
    driver: tokio::task::JoinHandle<()>,
}

impl Pair {
    fn on(client: Arc<dyn AsyncUdpSocket>, server: Arc<dyn AsyncUdpSocket>) -> Self {
        Self::on_with(client, server, |_| ())
    }

    /// Both ends have a transport of this kind.
    fn on_with(
        client: Arc<dyn AsyncUdpSocket>,
        server: Arc<dyn AsyncUdpSocket>,
        change: impl FnOnce(&mut TransportConfig),
    ) -> Self {
        let mut transport = transport();
        change(&mut transport);
        let (config, served) = configs(Arc::new(transport));
        let (server, driver) =
            Endpoint::new(EndpointConfig::default(), Some(served), server, tokio_timer);
        tokio::spawn(driver);
        let (client, driver) = Endpoint::new(EndpointConfig::default(), None, client, tokio_timer);
        Pair {
            client,
            server,
            config,
            driver: tokio::spawn(driver),
        }
    }

    fn on_loopback() -> Self {
        Self::on(loopback(), loopback())
    }

    /// The server's socket stands for several. No connection ends while others are busy, however long that takes.
    #[cfg(target_os = "linux")]
    fn on_routed() -> (Self, Arc<Routed>) {
        let Wrapped { socket, port } = wrapped();
        let routed = Routed::new(socket, port);
        let never_idle = |transport: &mut TransportConfig| {
            transport.max_idle_timeout(None);
        };
        let pair = Self::on_with(loopback(), routed.clone(), never_idle);
        (pair, routed)
    }

    /// Both ends of a new connection.
    async fn connection(&self) -> (Connection, Connection) {
        self.connection_of(&self.client).await
    }

    async fn connection_of(&self, client: &Endpoint) -> (Connection, Connection) {
        let to = self.server.local_addr().expect("bound");
        let begun = client.connect_with(self.config.clone(), to, "localhost");
        let (connecting, stepper) = begun.expect("begun");
        tokio::spawn(stepper);
        let served = async {
            let incoming = self.server.accept().await.expect("one that comes");
            let (connecting, stepper) = incoming.accept().expect("let in");
            tokio::spawn(stepper);
            connecting.connected().await
        };
        let (here, there) = tokio::join!(connecting.connected(), served);
        (here.expect("connected"), there.expect("connected"))
    }
}

async fn read_all(mut recv: RecvStream) -> Result<Vec<u8>, ReadError> {
    let mut all = Vec::new();
    let mut room: [Bytes; 8] = std::array::from_fn(|_| Bytes::new());
    while let Some(count) = recv.read_chunks(&mut room).await? {
        for chunk in &room[..count] {
            all.extend_from_slice(chunk);
        }
    }
    Ok(all)
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|at| ((at * 31 + seed * 7) % 251) as u8)
        .collect()
}

/// What one side writes on several streams the other sends back on them.
async fn echo(here: &Connection, there: &Connection, streams: usize, len: usize) {
    let answering = there.clone();
    let answers = tokio::spawn(async move {
        for _ in 0..streams {
            let (mut send, recv) = answering.accept_bi().await.expect("a stream");
            tokio::spawn(async move {
                let all = read_all(recv).await.expect("whole");
                send.write_all(&all).await.expect("written");
                send.finish().expect("open");
            });
        }
    });
    let mut asking = Vec::new();
    for seed in 0..streams {
        let here = here.clone();
        asking.push(tokio::spawn(async move {
            let (mut send, recv) = here.open_bi().await.expect("opened");
            let data = pattern(len, seed);
            send.write_chunk(data.clone().into())
                .await
                .expect("written");
            send.finish().expect("open");
            assert_eq!(Ok(None), send.stopped().await);
            assert_eq!(Ok(data), read_all(recv).await);
        }));
    }
    for asked in asking {
        asked.await.expect("no panic");
    }
    answers.await.expect("no panic");
}

#[test]
fn streams_carry_what_is_written_both_ways() {
    run(async {
        let pair = Pair::on_loopback();
        let (here, there) = pair.connection().await;
        // More than the peer lets be open at a time.
        echo(&here, &there, 150, 3_000).await;
        echo(&there, &here, 3, 2_000_000).await;
        let mut uni = here.open_uni().await.expect("opened");
        uni.write_all(b"hello").await.expect("written");
        drop(uni);
        let recv = there.accept_uni().await.expect("a stream");
        assert_eq!(Ok(b"hello".to_vec()), read_all(recv).await);
    });
}

#[test]
fn streams_that_wait_for_one_window_take_turns() {
    const STREAMS: usize = 20;
    const SIZE: usize = 2 << 20;
    run(async {
        let pair = Pair::on_with(loopback(), loopback(), |transport| {
            transport.send_window(128 * 1024);
        });
        let (here, there) = pair.connection().await;
        here.take_turns();
        let read: Arc<[AtomicUsize; STREAMS]> = Arc::default();
        let (tell, mut half) = tokio::sync::mpsc::channel(1);
        for at in 0..STREAMS {
            let mut send = here.open_uni().await.expect("opened");
            tokio::spawn(async move { send.write_all(&vec![0; SIZE]).await });
            let (there, read, tell) = (there.clone(), read.clone(), tell.clone());
            tokio::spawn(async move {
                let mut recv = there.accept_uni().await.expect("a stream");
                while let Ok(Some(chunk)) = recv.read_chunk(SIZE, true).await {
                    read[at].fetch_add(chunk.bytes.len(), Ordering::Relaxed);
                    let shares: Vec<_> = read.iter().map(|at| at.load(Ordering::Relaxed)).collect();
                    if shares.iter().sum::<usize>() >= STREAMS * SIZE / 2 {
                        let _ = tell.try_send(shares);
                    }
                }
            });
        }
        let read = half.recv().await.expect("half of it");
        let shares = read.iter().map(|read| read * 100 / (SIZE / 2));
        let shares: Vec<_> = shares.collect();
        assert!(
            shares.iter().all(|share| (80..=120).contains(share)),
            "{shares:?}"
        );
    });
}

#[test]
fn a_reset_and_a_stop_reach_the_other_side() {
    run(async {
        let pair = Pair::on_loopback();
        let (here, there) = pair.connection().await;
        let (mut send, mut recv) = here.open_bi().await.expect("opened");
        send.write_all(b"x").await.expect("written");
        let (answer, mut heard) = there.accept_bi().await.expect("a stream");
        recv.stop(VarInt::from_u32(3)).expect("open");
        assert_eq!(Ok(Some(VarInt::from_u32(3))), answer.stopped().await);
        send.reset(VarInt::from_u32(4)).expect("open");
        assert_eq!(Ok(Some(VarInt::from_u32(4))), heard.received_reset().await);
        let read = heard.read_chunk(1, true).await.map(drop);
        assert_eq!(Err(ReadError::Reset(VarInt::from_u32(4))), read);
        // Dropped unread a stream is stopped.
        let (mut send, _recv) = here.open_bi().await.expect("opened");
        send.write_all(b"x").await.expect("written");
        drop(there.accept_bi().await.expect("a stream"));
        assert_eq!(Ok(Some(VarInt::from_u32(0))), send.stopped().await);
        let stopped = send.write_all(b"x").await;
        assert_eq!(Err(WriteError::Stopped(VarInt::from_u32(0))), stopped);
    });
}

#[test]
fn datagrams_go_both_ways_and_those_that_wait_find_room() {
    run(async {
        let pair = Pair::on_loopback();
        let (here, there) = pair.connection().await;
        let size = here.max_datagram_size().expect("taken by the peer");
        here.send_datagram(Bytes::from_static(b"one"))
            .expect("sent");
        assert_eq!(Ok(Bytes::from_static(b"one")), there.read_datagram().await);
        let there_too = there.clone();
        let reading = tokio::spawn(async move {
            let mut read = 0;
            while there_too
                .read_datagram()
                .await
                .is_ok_and(|one| one.len() > 3)
            {
                read += 1;
            }
            read
        });
        // More than there is room for.
        for _ in 0..3_000 {
            let sent = here.send_datagram_wait(Bytes::from(vec![1; size])).await;
            sent.expect("sent");
        }
        while !reading.is_finished() {
            here.send_datagram(Bytes::from_static(b"end"))
                .expect("sent");
            sleep(Duration::from_millis(1)).await;
        }
        assert!(reading.await.expect("no panic") > 0);
        assert!(here.send_datagram(Bytes::from(vec![1; 60_000])).is_err());
    });
}

#[test]
fn the_last_handle_closes_and_the_endpoint_ends_with_its_connections() {
    run(async {
        let pair = Pair::on_loopback();
        let (here, there) = pair.connection().await;
        let (mut send, recv) = here.open_bi().await.expect("opened");
        send.write_all(b"x").await.expect("written");
        drop((here, recv));
        assert!(there.close_reason().is_none(), "a stream is left");
        drop(send);
        let closed = there.closed().await;
        assert!(matches!(closed, ConnectionError::ApplicationClosed(_)));
        let Pair { client, driver, .. } = pair;
        client.wait_idle().await;
        assert!(!driver.is_finished());
        drop(client);
        driver.await.expect("no panic");
    });
}

#[cfg(target_os = "linux")]
#[test]
fn a_busy_connection_hears_by_a_socket_of_its_own_while_others_are_there() {
    run(async {
        let (pair, routed) = Pair::on_routed();
        let (client, server) = pair.connection().await;
        flood(&client, &server).await;
        assert_eq!(0, routed.beside());
        let (other, with) = pair.connection().await;
        flood(&client, &server).await;
        assert_eq!(1, routed.beside());
        // From the same address and port: it shares the socket, which serves as long as one of them lives.
        flood(&other, &with).await;
        assert_eq!(1, routed.beside());
        client.close(VarInt::from_u32(0), b"");
        client.closed().await;
        flood(&other, &with).await;
        assert_eq!(1, routed.beside());
        other.close(VarInt::from_u32(0), b"");
        drop((client, server, other, with));
        while routed.beside() > 0 {
            sleep(Duration::from_millis(1)).await;
        }
    });
}

#[cfg(target_os = "linux")]
#[test]
fn quiet_connections_leave_their_sockets_to_busy_ones() {
    run(async {
        let (pair, routed) = Pair::on_routed();
        let mut pairs = vec![(pair.connection().await, pair.client.clone())];
        for _ in 0..MAX_BESIDE {
            let (client, driver) =
                Endpoint::new(EndpointConfig::default(), None, loopback(), tokio_timer);
            tokio::spawn(driver);
            let connection = pair.connection_of(&client).await;
            pairs.push((connection, client));
        }
        // The last one finds all places taken, until others are quiet.
        for ((client, server), endpoint) in &pairs {
            let peer = endpoint.local_addr().expect("bound");
            while !routed.is_heard_beside(peer) {
                flood(client, server).await;
                assert!(routed.beside() <= MAX_BESIDE);
            }
        }
    });
}

/// Sends more than a connection that is not busy does, and compares.
#[cfg(target_os = "linux")]
async fn flood(from: &Connection, to: &Connection) {
    const SIZE: usize = 4 << 20;
    let data: Vec<u8> = (0..SIZE).map(|at| (at % 251) as u8).collect();
    let sent = async {
        let mut stream = from.open_uni().await.expect("opened");
        stream.write_all(&data).await.expect("written");
        stream.finish().expect("finished");
    };
    let received = async {
        let stream = to.accept_uni().await.expect("accepted");
        read_all(stream).await.expect("read")
    };
    let ((), received) = tokio::join!(sent, received);
    assert!(data == received);
}

#[test]
fn a_closed_endpoint_closes_its_connections_and_takes_none() {
    run(async {
        let pair = Pair::on_loopback();
        let (here, _there) = pair.connection().await;
        pair.server.close(VarInt::from_u32(9), b"gone");
        match here.closed().await {
            ConnectionError::ApplicationClosed(close) => {
                assert_eq!(VarInt::from_u32(9), close.error_code);
            }
            other => panic!("{other}"),
        }
        assert!(pair.server.accept().await.is_none());
        pair.server.wait_idle().await;
        assert_eq!(0, pair.server.open_connections());
    });
}

#[test]
fn an_incoming_connection_is_retried_ignored_and_refused() {
    run(async {
        let pair = Pair::on_loopback();
        let to = pair.server.local_addr().expect("bound");
        let config = pair.config.clone();
        let begun = pair.client.connect_with(config, to, "localhost");
        let (connecting, stepper) = begun.expect("begun");
        tokio::spawn(stepper);
        let deciding = async {
            let first = pair.server.accept().await.expect("one that comes");
            assert!(!first.remote_address_validated());
            // The client repeats its first packet.
            first.ignore();
            let second = pair.server.accept().await.expect("one that comes");
            assert!(second.retry().is_ok());
            let third = pair.server.accept().await.expect("one that comes");
            assert!(third.remote_address_validated());
            match third.retry() {
                Ok(()) => panic!("proven already"),
                Err(error) => error.into_incoming().refuse(),
            }
        };
        let (connected, ()) = tokio::join!(connecting.connected(), deciding);
        assert!(matches!(
            connected,
            Err(ConnectionError::ConnectionClosed(_))
        ));
    });
}

#[test]
fn a_stepper_that_is_given_up_takes_its_connection_alone() {
    run(async {
        let pair = Pair::on_loopback();
        let to = pair.server.local_addr().expect("bound");
        let config = pair.config.clone();
        let begun = pair.client.connect_with(config, to, "localhost");
        let (connecting, stepper) = begun.expect("begun");
        drop(stepper);
        assert!(connecting.connected().await.is_err());
        pair.client.wait_idle().await;
        let (here, there) = pair.connection().await;
        echo(&here, &there, 1, 1_000).await;
    });
}

/// A network in memory. Each of its sockets has an inbox.
#[derive(Debug)]
struct Net {
    inner: Mutex<Inner>,
    /// The next one to send panics.
    armed: AtomicBool,
}

#[derive(Debug)]
struct Inner {
    sockets: Vec<VecDeque<(SocketAddr, Vec<u8>)>>,
    wakers: Vec<Option<Waker>>,
    /// Of a generator of random numbers.
    seed: u64,
    /// Of a thousand datagrams so many are lost, and as many come twice or late.
    loss: u64,
    /// Those that are on a line with a delay: sender and receiver come before them.
    under_way: Option<Vec<(usize, usize, Vec<u8>)>>,
}

#[derive(Debug)]
struct NetSocket {
    net: Arc<Net>,
    at: usize,
}

impl Net {
    fn pair(seed: u64, loss: u64) -> (Arc<Self>, [Arc<dyn AsyncUdpSocket>; 2]) {
        let net = Arc::new(Net {
            inner: Mutex::new(Inner {
                sockets: vec![VecDeque::new(), VecDeque::new()],
                wakers: vec![None, None],
                seed,
                loss,
                under_way: None,
            }),
            armed: AtomicBool::new(false),
        });
        let socket = |at| {
            let net = net.clone();
            Arc::new(NetSocket { net, at }) as Arc<dyn AsyncUdpSocket>
        };
        let sockets = [socket(0), socket(1)];
        (net, sockets)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn random(&mut self, below: u64) -> u64 {
        self.seed = self
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) % below
    }

    fn put(&mut self, from: usize, to: usize, datagram: &[u8]) {
        let fate = self.random(1_000);
        if fate < self.loss {
            return;
        }
        if let Some(under_way) = &mut self.under_way {
            under_way.push((from, to, datagram.to_vec()));
            return;
        }
        let item = (address(from), datagram.to_vec());
        let inbox = &mut self.sockets[to];
        if fate < 2 * self.loss && !inbox.is_empty() {
            // Before one that was sent earlier.
            inbox.insert(inbox.len() - 1, item.clone());
        }
        if fate >= 3 * self.loss || fate < self.loss * 5 / 2 {
            self.sockets[to].push_back(item);
        } else {
            self.sockets[to].push_front(item);
        }
        if let Some(waker) = self.wakers[to].take() {
            waker.wake();
        }
    }
}

fn address(at: usize) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 1 + at as u16))
}

#[derive(Debug)]
struct Always;

impl UdpPoller for Always {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for NetSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Always)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        assert!(!self.net.armed.swap(false, Ordering::SeqCst), "on purpose");
        let to = usize::from(transmit.destination.port()) - 1;
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len());
        let mut net = self.net.lock();
        for datagram in transmit.contents.chunks(segment.max(1)) {
            net.put(self.at, to, datagram);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut net = self.net.lock();
        let mut count = 0;
        for (buffer, meta) in buffers.iter_mut().zip(metas) {
            let Some((from, datagram)) = net.sockets[self.at].pop_front() else {
                break;
            };
            buffer[..datagram.len()].copy_from_slice(&datagram);
            *meta = RecvMeta::default();
            meta.addr = from;
            meta.len = datagram.len();
            meta.stride = datagram.len();
            count += 1;
        }
        if count > 0 {
            return Poll::Ready(Ok(count));
        }
        net.wakers[self.at] = Some(cx.waker().clone());
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(address(self.at))
    }

    fn max_transmit_segments(&self) -> usize {
        4
    }

    fn max_receive_segments(&self) -> usize {
        1
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

#[test]
fn what_is_lost_repeated_and_out_of_order_arrives_whole() {
    for seed in 0..8 {
        run(async {
            let (_net, [client, server]) = Net::pair(seed, 30);
            let pair = Pair::on(client, server);
            let (here, there) = pair.connection().await;
            echo(&here, &there, 4, 200_000).await;
            assert!(here.stats().path.lost_packets > 0, "nothing was lost");
        });
    }
}

#[test]
fn a_panic_ends_its_connection_and_no_other_and_all_that_wait_are_told() {
    run(async {
        let (net, [client, server]) = Net::pair(1, 0);
        let pair = Pair::on(client, server);
        let (here, _there) = pair.connection().await;
        let (near, far) = pair.connection().await;
        let (mut send, mut recv) = here.open_bi().await.expect("opened");
        send.write_all(b"x").await.expect("written");
        // What is under way has gone.
        sleep(Duration::from_millis(200)).await;
        let (one, two, three, four) = (here.clone(), here.clone(), here.clone(), here.clone());
        let waiting = [
            tokio::spawn(async move { one.accept_bi().await.is_err() }),
            tokio::spawn(async move { two.read_datagram().await.is_err() }),
            tokio::spawn(async move { recv.read_chunk(1, true).await.is_err() }),
            tokio::spawn(async move {
                let _ = three.closed().await;
                true
            }),
            tokio::spawn(async move {
                while four.open_uni().await.is_ok() {}
                true
            }),
        ];
        tokio::task::yield_now().await;
        net.armed.store(true, Ordering::SeqCst);
        send.write_all(b"y").await.expect("written");
        for told in waiting {
            assert!(told.await.expect("no panic"));
        }
        assert!(!net.armed.load(Ordering::SeqCst));
        let error = here.close_reason().expect("an error");
        assert!(matches!(error, ConnectionError::TransportError(_)));
        // Whatever is done with it is answered.
        assert!(send.write_all(b"z").await.is_err());
        assert!(send.stopped().await.is_err());
        here.close(VarInt::from_u32(0), b"");
        let _ = (here.stats(), here.rtt(), here.remote_address());
        drop((send, here));
        echo(&near, &far, 3, 10_000).await;
        assert_eq!(1, pair.client.open_connections());
    });
}

#[test]
fn a_panic_of_an_endpoint_tells_its_connections() {
    run(async {
        let (net, [client, server]) = Net::pair(1, 0);
        let pair = Pair::on(client, server);
        let (here, _there) = pair.connection().await;
        sleep(Duration::from_millis(200)).await;
        // Too large for any buffer.
        net.lock().put(1, 0, &[0; 100_000]);
        let error = here.closed().await;
        assert!(matches!(error, ConnectionError::TransportError(_)));
        pair.client.wait_idle().await;
        assert!(pair.client.fate().has_failed());
        assert!(pair.client.accept().await.is_none());
        let config = pair.config.clone();
        let begun = pair.client.connect_with(config, address(1), "localhost");
        assert!(begun.is_err());
    });
}

#[test]
fn the_state_of_a_connection_is_small() {
    // What is beside the state of `quinn-proto`.
    let own = size_of::<super::state::Shared>() - size_of::<quinn_proto::Connection>();
    assert!(own < 1_200, "{own}");
    println!("{own} + {}", size_of::<quinn_proto::Connection>());
}

/// A controller whose window stays as it is.
#[derive(Clone)]
struct Fixed;

const FIXED_WINDOW: u64 = 4 * 1200;

impl Controller for Fixed {
    fn on_congestion_event(&mut self, _: Instant, _: Instant, _: bool, _: u64) {}

    fn on_mtu_update(&mut self, _: u16) {}

    fn window(&self) -> u64 {
        FIXED_WINDOW
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        FIXED_WINDOW
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl ControllerFactory for Fixed {
    fn build(self: Arc<Self>, _: Instant, _: u16) -> Box<dyn Controller> {
        Box::new(Fixed)
    }
}

#[test]
fn two_ends_whose_windows_are_full_do_not_wait_for_each_others_acknowledgements() {
    const ROUNDS: u64 = 20;
    // It takes nine a round; where each waits for a probe timeout, more than thirty.
    const MOST_TURNS: u64 = 16 * ROUNDS;
    run(async {
        let (net, [client, server]) = Net::pair(1, 0);
        let pair = Pair::on_with(client, server, |transport| {
            transport
                .congestion_controller_factory(Arc::new(Parting(Arc::new(Fixed))))
                .mtu_discovery_config(None);
        });
        let (here, there) = pair.connection().await;
        // What the handshake left has come.
        sleep(Duration::from_millis(200)).await;
        net.lock().under_way = Some(Vec::new());
        let mut turns = 0;
        for _ in 0..ROUNDS {
            let mut ends = tokio::task::JoinSet::new();
            for (from, to) in [(here.clone(), there.clone()), (there.clone(), here.clone())] {
                let data = vec![7; 2 * FIXED_WINDOW as usize];
                let len = data.len();
                ends.spawn(async move {
                    let mut send = from.open_uni().await.expect("opened");
                    send.write_all(&data).await.expect("written");
                    send.finish().expect("open");
                    let recv = to.accept_uni().await.expect("a stream");
                    assert_eq!(Ok(len), read_all(recv).await.map(|all| all.len()));
                    assert_eq!(Ok(None), send.stopped().await);
                });
            }
            // What both have sent in one turn comes in the next one. Turns are counted, not time, so that a slow
            // machine is not taken for a fault.
            while !ends.is_empty() {
                sleep(Duration::from_millis(1)).await;
                turns += 1;
                {
                    let mut net = net.lock();
                    let arrived = net.under_way.replace(Vec::new()).unwrap_or_default();
                    for (from, to, datagram) in arrived {
                        net.sockets[to].push_back((address(from), datagram));
                    }
                    for waker in net.wakers.iter_mut().filter_map(Option::take) {
                        waker.wake();
                    }
                }
                while let Some(ended) = ends.try_join_next() {
                    ended.expect("no panic");
                }
            }
        }
        assert!(turns < MOST_TURNS, "{turns}");
    });
}
