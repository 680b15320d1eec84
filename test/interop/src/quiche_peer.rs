//! A peer on quiche.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use macula_interop::{Command, Error, Options, block, digest, lettered, number, say};
use quiche::{ConnectionId, Shutdown};
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines, Stdin};
use tokio::net::UdpSocket;

const MAX_DATAGRAM: usize = 1350;
/// What is asked for with the first packet.
const EARLY: &[u8] = b"eearly";
/// As BoringSSL has it.
const EARLY_DATA_ACCEPTED: u32 = 2;
/// A command that has not come to its end by then fails.
const PATIENCE: Duration = Duration::from_secs(40);

/// How the peer ended its side of a stream.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Fin,
    Reset(u64),
}

impl End {
    fn value(self) -> Value {
        match self {
            End::Fin => "fin".into(),
            End::Reset(code) => code.into(),
        }
    }
}

struct Outgoing {
    data: Vec<u8>,
    sent: usize,
    fin: bool,
    fin_sent: bool,
}

/// A connection and what has come over it.
struct Peer {
    quic: quiche::Connection,
    serving: bool,
    next_bidi: u64,
    next_uni: u64,
    received: HashMap<u64, Vec<u8>>,
    ended: HashMap<u64, End>,
    stopped: HashMap<u64, u64>,
    served: HashSet<u64>,
    outgoing: HashMap<u64, Outgoing>,
    datagrams: Vec<Vec<u8>>,
    said_closed: bool,
}

impl Peer {
    fn new(quic: quiche::Connection, serving: bool) -> Self {
        let first = u64::from(serving);
        Peer {
            quic,
            serving,
            next_bidi: first,
            next_uni: first | 2,
            received: HashMap::new(),
            ended: HashMap::new(),
            stopped: HashMap::new(),
            served: HashSet::new(),
            outgoing: HashMap::new(),
            datagrams: Vec::new(),
            said_closed: false,
        }
    }

    fn open(&mut self, data: Vec<u8>, fin: bool, uni: bool) -> u64 {
        let next = if uni {
            &mut self.next_uni
        } else {
            &mut self.next_bidi
        };
        let id = *next;
        *next += 4;
        self.put(id, &data, fin);
        id
    }

    fn put(&mut self, id: u64, data: &[u8], fin: bool) {
        let outgoing = self.outgoing.entry(id).or_insert(Outgoing {
            data: Vec::new(),
            sent: 0,
            fin: false,
            fin_sent: false,
        });
        outgoing.data.extend_from_slice(data);
        outgoing.fin |= fin;
    }

    /// Takes what has come, answers it where the peer serves, and hands on what waits to be sent.
    fn turn(&mut self) {
        // quiche forgets a stream once its end is read, and with it that it was stopped.
        self.send();
        let mut buffer = [0; 65536];
        let readable: Vec<u64> = self.quic.readable().collect();
        for id in readable {
            let mut new = Vec::new();
            loop {
                match self.quic.stream_recv(id, &mut buffer) {
                    Ok((length, fin)) => {
                        new.extend_from_slice(&buffer[..length]);
                        if fin {
                            self.ended.insert(id, End::Fin);
                            break;
                        }
                    }
                    Err(quiche::Error::StreamReset(code)) => {
                        self.ended.insert(id, End::Reset(code));
                        break;
                    }
                    Err(_) => break,
                }
            }
            self.received.entry(id).or_default().extend_from_slice(&new);
            let mine = (id & 1 == 1) == self.serving;
            if self.serving && !mine {
                self.serve(id, &new);
            }
        }
        while let Ok(length) = self.quic.dgram_recv(&mut buffer) {
            if self.serving {
                let _ = self.quic.dgram_send(&buffer[..length]);
            }
            self.datagrams.push(buffer[..length].to_vec());
        }
        self.send();
    }

    fn send(&mut self) {
        let mut done = Vec::new();
        let mut ids: Vec<u64> = self.outgoing.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            let Some(out) = self.outgoing.get_mut(&id) else {
                continue;
            };
            if out.sent < out.data.len() || (out.fin && !out.fin_sent) {
                match self.quic.stream_send(id, &out.data[out.sent..], out.fin) {
                    Ok(length) => {
                        out.sent += length;
                        out.fin_sent = out.fin && out.sent == out.data.len();
                    }
                    Err(quiche::Error::StreamStopped(code)) => {
                        self.stopped.insert(id, code);
                        done.push(id);
                    }
                    Err(_) => {}
                }
            } else if let Err(quiche::Error::StreamStopped(code)) = self.quic.stream_capacity(id) {
                self.stopped.insert(id, code);
                done.push(id);
            }
            if out.fin_sent {
                done.push(id);
            }
        }
        for id in done {
            self.outgoing.remove(&id);
        }
    }

    fn serve(&mut self, id: u64, new: &[u8]) {
        let fin = self.ended.get(&id) == Some(&End::Fin);
        let data = self.received.entry(id).or_default();
        let letter = data.first().copied();
        if id & 2 == 2 {
            if fin {
                let answer = digest(data);
                self.open(answer, true, true);
            }
        } else if letter == Some(b'e') {
            // What was echoed need not be kept.
            data.truncate(1);
            self.put(id, new, fin);
        } else if letter == Some(b'h') {
            if fin {
                let answer = digest(&data[1..]);
                self.put(id, &answer, true);
            }
        } else if let (Some(letter), Some(number)) = (letter, number(data)) {
            if !self.served.insert(id) {
                return;
            }
            // A stream that has ended already needs no end.
            let _ = match letter {
                b'g' => {
                    self.put(id, &block(number as usize), true);
                    Ok(())
                }
                b'r' => self.quic.stream_shutdown(id, Shutdown::Write, number),
                b's' => self.quic.stream_shutdown(id, Shutdown::Read, number),
                _ => self.quic.close(true, number, b"asked to"),
            };
        } else if letter.is_none() && fin {
            self.put(id, b"", true);
        }
    }

    /// The error that the other side closed the connection with, as a test compares it.
    fn closed(&self) -> Option<Value> {
        let error = self.quic.peer_error()?;
        Some(json!([
            error.error_code,
            error.is_app,
            String::from_utf8_lossy(&error.reason)
        ]))
    }

    fn say_closed(&mut self) {
        if let (false, Some(closed)) = (self.said_closed, self.closed()) {
            self.said_closed = true;
            say("closed", closed);
        }
    }

    fn has_come(&self, id: u64, expected: &[u8]) -> bool {
        self.ended.get(&id) == Some(&End::Fin)
            && self.received.get(&id).map(Vec::as_slice) == Some(expected)
    }
}

/// Asked after each turn; answers once the command has come to its end.
type Pending = Box<dyn FnMut(&mut Peer) -> Option<Value>>;

fn begin(peer: &mut Peer, command: &Command) -> Pending {
    match command.name() {
        "info" => Box::new(|peer| {
            Some(json!([
                String::from_utf8_lossy(peer.quic.application_proto()),
                1
            ]))
        }),
        "resumed" => Box::new(|peer| Some(peer.quic.is_resumed().into())),
        "early" => Box::new(|peer| {
            peer.ended.get(&0)?;
            let accepted = peer.quic.early_data_reason() == EARLY_DATA_ACCEPTED;
            Some(json!([peer.has_come(0, EARLY), accepted]))
        }),
        "certificate" => Box::new(|peer| Some(peer.quic.peer_cert().map(<[u8]>::len).into())),
        "echo" => {
            let data = lettered(b'e', &block(command.size(2)));
            let count = command.size(1);
            let mut opened = Vec::new();
            Box::new(move |peer| {
                while opened.len() < count && peer.quic.peer_streams_left_bidi() > waiting(peer, 0)
                {
                    opened.push(peer.open(data.clone(), true, false));
                }
                let all =
                    opened.len() == count && opened.iter().all(|id| peer.ended.contains_key(id));
                all.then(|| opened.iter().all(|id| peer.has_come(*id, &data)).into())
            })
        }
        "up" => {
            let data = block(command.size(1));
            let id = peer.open(lettered(b'h', &data), true, false);
            Box::new(move |peer| {
                let end = peer.ended.get(&id)?.value();
                Some(json!([end, peer.has_come(id, &digest(&data))]))
            })
        }
        "down" => {
            let size = command.size(1);
            let id = peer.open(
                lettered(b'g', &command.number(1).to_be_bytes()),
                true,
                false,
            );
            Box::new(move |peer| {
                let end = peer.ended.get(&id)?.value();
                Some(json!([end, peer.has_come(id, &block(size))]))
            })
        }
        "uni" => {
            let (count, data) = (command.size(1), block(command.size(2)));
            let before: HashSet<u64> = peer.ended.keys().copied().collect();
            let mut opened = 0;
            Box::new(move |peer| {
                while opened < count && peer.quic.peer_streams_left_uni() > waiting(peer, 2) {
                    peer.open(data.clone(), true, true);
                    opened += 1;
                }
                let fresh: Vec<u64> = peer
                    .ended
                    .keys()
                    .copied()
                    .filter(|id| id & 3 == 3 && !before.contains(id))
                    .collect();
                (fresh.len() == count).then(|| {
                    fresh
                        .iter()
                        .all(|id| peer.has_come(*id, &digest(&data)))
                        .into()
                })
            })
        }
        "empty" => {
            let id = peer.open(Vec::new(), true, false);
            Box::new(move |peer| {
                let end = peer.ended.get(&id)?.value();
                Some(json!([end, peer.has_come(id, b"")]))
            })
        }
        "hold" => {
            // The other side ends it when it likes to.
            peer.open(b"w".to_vec(), true, false);
            Box::new(|_peer| Some("held".into()))
        }
        "half" => {
            // The end comes alone, and later than the data.
            let data = block(1000);
            let id = peer.open(lettered(b'h', &data), false, false);
            let other = peer.open(b"e".to_vec(), true, false);
            let mut finished = false;
            Box::new(move |peer| {
                if !finished && peer.ended.contains_key(&other) {
                    finished = true;
                    peer.put(id, b"", true);
                }
                let end = peer.ended.get(&id)?.value();
                Some(json!([end, peer.has_come(id, &digest(&data))]))
            })
        }
        "reset" => {
            let id = peer.open(
                lettered(b'r', &command.number(1).to_be_bytes()),
                false,
                false,
            );
            Box::new(move |peer| Some(peer.ended.get(&id)?.value()))
        }
        "stop" => {
            let id = peer.open(
                lettered(b's', &command.number(1).to_be_bytes()),
                false,
                false,
            );
            Box::new(move |peer| Some((*peer.stopped.get(&id)?).into()))
        }
        "abort" => {
            let code = command.number(1);
            let id = peer.open(lettered(b'e', &block(100)), false, false);
            Box::new(move |peer| {
                (peer.received.get(&id)?.len() == 101).then(|| {
                    peer.outgoing.remove(&id);
                    let _ = peer.quic.stream_shutdown(id, Shutdown::Write, code);
                    let _ = peer.quic.stream_shutdown(id, Shutdown::Read, code + 1);
                    "aborted".into()
                })
            })
        }
        "datagrams" => {
            let data = block(command.size(1));
            let before = peer.datagrams.len();
            let sent = peer.quic.dgram_send(&data);
            Box::new(move |peer| match sent {
                Ok(()) => Some((*peer.datagrams.get(before)? == data).into()),
                Err(error) => Some(error.to_string().into()),
            })
        }
        "ask_close" => {
            peer.open(
                lettered(b'x', &command.number(1).to_be_bytes()),
                true,
                false,
            );
            Box::new(|peer| peer.closed())
        }
        "close" => {
            let _ = peer
                .quic
                .close(true, command.number(1), command.text(2).as_bytes());
            Box::new(|_peer| Some("closed".into()))
        }
        other => {
            let other = format!("no command {other}");
            Box::new(move |_peer| Some(other.clone().into()))
        }
    }
}

/// Streams of a kind that were opened here and of which quiche knows nothing yet.
fn waiting(peer: &Peer, kind: u64) -> u64 {
    peer.outgoing
        .iter()
        .filter(|(id, out)| **id & 2 == kind && out.sent == 0 && !out.fin_sent)
        .count() as u64
}

fn config(options: &Options, serving: bool) -> Result<quiche::Config, Error> {
    let version = if options.is_set("vn") {
        // Of those that are kept for a server to refuse (RFC 9000, section 15).
        0xbaba_baba
    } else {
        quiche::PROTOCOL_VERSION
    };
    let mut config = quiche::Config::new(version)?;
    config.set_application_protos(&[options.alpn().as_bytes()])?;
    if let (Some(cert), Some(key)) = (options.text("cert"), options.text("key")) {
        config.load_cert_chain_from_pem_file(cert)?;
        config.load_priv_key_from_pem_file(key)?;
    }
    if let Some(ca) = options.text("ca") {
        config.load_verify_locations_from_file(ca)?;
    }
    config.verify_peer(!serving || options.is_set("mtls"));
    config.set_max_idle_timeout(20_000);
    config.set_max_recv_udp_payload_size(65527);
    config.set_max_send_udp_payload_size(MAX_DATAGRAM);
    config.set_initial_max_data(10_000_000);
    config.set_initial_max_stream_data_bidi_local(1_000_000);
    config.set_initial_max_stream_data_bidi_remote(1_000_000);
    config.set_initial_max_stream_data_uni(1_000_000);
    config.set_initial_max_streams_bidi(100);
    config.set_initial_max_streams_uni(100);
    config.set_enable_send_streams_blocked(true);
    config.set_active_connection_id_limit(4);
    config.enable_dgram(true, 1000, 1000);
    if options.is_set("early") {
        config.enable_early_data();
    }
    Ok(config)
}

struct Net {
    socket: UdpSocket,
    local: SocketAddr,
    random: SystemRandom,
}

impl Net {
    async fn bind(port: u16) -> Result<Self, Error> {
        let socket = UdpSocket::bind(("127.0.0.1", port)).await?;
        let local = socket.local_addr()?;
        Ok(Net {
            socket,
            local,
            random: SystemRandom::new(),
        })
    }

    fn id(&self) -> Result<ConnectionId<'static>, Error> {
        let mut id = vec![0; quiche::MAX_CONN_ID_LEN];
        self.random.fill(&mut id).map_err(|_| "no randomness")?;
        Ok(ConnectionId::from_vec(id))
    }

    /// Sends what a connection has to send, and gives it ids to be reached by.
    async fn flush(&self, peer: &mut Peer) -> Result<Vec<ConnectionId<'static>>, Error> {
        let mut ids = Vec::new();
        while peer.quic.is_established() && peer.quic.scids_left() > 0 {
            let id = self.id()?;
            let mut token = [0; 16];
            self.random.fill(&mut token).map_err(|_| "no randomness")?;
            if peer
                .quic
                .new_scid(&id, u128::from_be_bytes(token), false)
                .is_err()
            {
                break;
            }
            ids.push(id);
        }
        while peer.quic.path_event_next().is_some() {}
        let mut packet = [0; 65535];
        while let Ok((length, info)) = peer.quic.send(&mut packet) {
            self.socket.send_to(&packet[..length], info.to).await?;
        }
        Ok(ids)
    }
}

fn stdin() -> Lines<BufReader<Stdin>> {
    BufReader::new(tokio::io::stdin()).lines()
}

async fn client(options: Options) -> Result<(), Error> {
    let net = Net::bind(0).await?;
    let mut config = config(&options, false)?;
    let to = SocketAddr::from(([127, 0, 0, 1], options.port()));
    let session = if options.is_set("resume") {
        Some(session(&net, to, &mut config).await?)
    } else {
        None
    };
    let quic = quiche::connect(Some("localhost"), &net.id()?, net.local, to, &mut config)?;
    let mut peer = Peer::new(quic, false);
    if let Some(session) = session {
        peer.quic.set_session(&session)?;
    }
    if options.is_set("early") {
        // The keys of early data come with the first packet.
        net.flush(&mut peer).await?;
        if peer.quic.is_in_early_data() {
            peer.open(EARLY.to_vec(), true, false);
        }
    }
    let mut lines = stdin();
    let mut pending: Option<(Instant, Pending)> = None;
    let mut connected = false;
    let mut packet = vec![0; 65535];
    loop {
        peer.turn();
        if !connected && peer.quic.is_established() {
            connected = true;
            say("connected", true);
        }
        if let Some((since, command)) = &mut pending {
            match command(&mut peer) {
                Some(result) => {
                    say("result", result);
                    pending = None;
                }
                None if since.elapsed() > PATIENCE => return Err("a command takes too long".into()),
                None => {}
            }
            // It may have put something.
            peer.send();
        }
        net.flush(&mut peer).await?;
        if peer.quic.is_closed() {
            if !connected {
                let ours = peer
                    .quic
                    .local_error()
                    .map(|error| json!([error.error_code, error.is_app]));
                say("refused", peer.closed().or(ours).unwrap_or_default());
            }
            if pending.is_none() {
                return Ok(());
            }
        }
        let timeout = peer.quic.timeout().unwrap_or(PATIENCE).min(PATIENCE);
        tokio::select! {
            read = net.socket.recv_from(&mut packet) => {
                let (length, from) = read?;
                let info = quiche::RecvInfo { from, to: net.local };
                let _ = peer.quic.recv(&mut packet[..length], info);
            }
            line = lines.next_line(), if connected && pending.is_none() => match line? {
                Some(line) => {
                    let command = Command::parse(&line)?;
                    pending = Some((Instant::now(), begin(&mut peer, &command)));
                }
                None => return Ok(()),
            },
            () = tokio::time::sleep(timeout) => peer.quic.on_timeout(),
        }
    }
}

/// The session of a first connection, which is then closed.
async fn session(net: &Net, to: SocketAddr, config: &mut quiche::Config) -> Result<Vec<u8>, Error> {
    let quic = quiche::connect(Some("localhost"), &net.id()?, net.local, to, config)?;
    let mut peer = Peer::new(quic, false);
    let mut packet = vec![0; 65535];
    let mut session = None;
    while !peer.quic.is_closed() {
        if let (None, Some(new)) = (&session, peer.quic.session()) {
            session = Some(new.to_vec());
            peer.quic.close(true, 0, b"")?;
        }
        net.flush(&mut peer).await?;
        let timeout = peer.quic.timeout().unwrap_or(PATIENCE).min(PATIENCE);
        tokio::select! {
            read = net.socket.recv_from(&mut packet) => {
                let (length, from) = read?;
                let info = quiche::RecvInfo { from, to: net.local };
                let _ = peer.quic.recv(&mut packet[..length], info);
            }
            () = tokio::time::sleep(timeout) => peer.quic.on_timeout(),
        }
    }
    Ok(session.ok_or("no ticket has come")?)
}

async fn server(options: Options) -> Result<(), Error> {
    let net = Net::bind(0).await?;
    let mut config = config(&options, true)?;
    say("listening", net.local.port());
    let mut lines = stdin();
    let mut peers: HashMap<usize, Peer> = HashMap::new();
    let mut ids: HashMap<ConnectionId<'static>, usize> = HashMap::new();
    let mut next = 0;
    let mut packet = vec![0; 65535];
    loop {
        for (key, peer) in &mut peers {
            peer.turn();
            for id in net.flush(peer).await? {
                ids.insert(id, *key);
            }
            peer.say_closed();
        }
        peers.retain(|_, peer| !peer.quic.is_closed());
        let timeouts = peers.values().filter_map(|peer| peer.quic.timeout());
        let timeout = timeouts.min().unwrap_or(PATIENCE).min(PATIENCE);
        tokio::select! {
            read = net.socket.recv_from(&mut packet) => {
                let (length, from) = read?;
                if let Some(new) = receive(&net, &options, &mut config, &mut packet[..length], from,
                                           &mut peers, &ids).await? {
                    ids.insert(new.quic.source_id().into_owned(), next);
                    peers.insert(next, new);
                    next += 1;
                }
            }
            line = lines.next_line() => if line?.is_none() {
                return Ok(());
            },
            () = tokio::time::sleep(timeout) => for peer in peers.values_mut() {
                peer.quic.on_timeout();
            },
        }
    }
}

/// Hands a packet to its connection. The first one of a connection begins that, or is answered.
async fn receive(
    net: &Net,
    options: &Options,
    config: &mut quiche::Config,
    packet: &mut [u8],
    from: SocketAddr,
    peers: &mut HashMap<usize, Peer>,
    ids: &HashMap<ConnectionId<'static>, usize>,
) -> Result<Option<Peer>, Error> {
    let Ok(header) = quiche::Header::from_slice(packet, quiche::MAX_CONN_ID_LEN) else {
        return Ok(None);
    };
    let info = quiche::RecvInfo {
        from,
        to: net.local,
    };
    if let Some(peer) = ids.get(&header.dcid).and_then(|key| peers.get_mut(key)) {
        let _ = peer.quic.recv(packet, info);
        return Ok(None);
    }
    // A client repeats its first packet, which bears an id of its own.
    if let Some(peer) = peers.values_mut().find(|peer| !peer.quic.is_established()) {
        let _ = peer.quic.recv(packet, info);
        return Ok(None);
    }
    if header.ty != quiche::Type::Initial {
        return Ok(None);
    }
    let mut answer = [0; MAX_DATAGRAM];
    if !quiche::version_is_supported(header.version) || options.is_set("v2") {
        let length = quiche::negotiate_version(&header.scid, &header.dcid, &mut answer)?;
        if options.is_set("v2") {
            // The one version that is left to name is none of ours: 2 (RFC 9369).
            let at = length - 4;
            let named = answer[..length]
                .windows(4)
                .position(|v| v == [0, 0, 0, 1])
                .unwrap_or(at);
            answer[named..named + 4].copy_from_slice(&0x6b33_43cf_u32.to_be_bytes());
        }
        net.socket.send_to(&answer[..length], from).await?;
        return Ok(None);
    }
    let token = header.token.as_deref().unwrap_or(&[]);
    if options.is_set("retry") && token.is_empty() {
        // The id of the first packet is all that a token has to keep here.
        let id = net.id()?;
        let length = quiche::retry(
            &header.scid,
            &header.dcid,
            &id,
            &header.dcid,
            header.version,
            &mut answer,
        )?;
        net.socket.send_to(&answer[..length], from).await?;
        return Ok(None);
    }
    let first = ConnectionId::from_ref(token);
    let (id, first) = if options.is_set("retry") {
        (header.dcid.clone(), Some(&first))
    } else {
        (net.id()?, None)
    };
    let quic = quiche::accept(&id, first, net.local, from, config)?;
    let mut peer = Peer::new(quic, true);
    let _ = peer.quic.recv(packet, info);
    Ok(Some(peer))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let (role, options) = Options::from_arguments()?;
    match role.as_str() {
        "server" => server(options).await,
        "client" => client(options).await,
        other => Err(format!("no role {other}").into()),
    }
}
