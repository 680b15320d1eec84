//! Dialling: all addresses of the peer, at the pace of RFC 8305, one deadline over everything.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::transport::{
    ClientConfig, ConnectError, ConnectionError, ConnectionId, TransportConfig, TransportErrorCode,
};
use rustler::{Atom, Binary, Encoder, Env, LocalPid, NifMap, NifResult, Term};
use tokio::task::JoinSet;

use crate::engine::routed::Movable;
use crate::engine::{endpoint, qlog, transport};
use crate::quic::connection::{Begun, Connection, Early, Terms, Way};
use crate::quic::options::{self, Secrets, Transport};
use crate::quic::stream::Watermarks;
use crate::quic::verdict;
use crate::tls::resumption::client::{self, Kind};
use crate::tls::session::{Noticing, Seen};
use crate::tls::{self, TlsError, Verify, lean, watched};
use crate::udp::ask::{self, Pace};
use crate::udp::{address, aimed};
use crate::vm::error::{Ended, alert, connect_error, posix};
use crate::vm::fault::{self, Point};
use crate::vm::messages::{Gone, atoms};
use crate::vm::reply::Reply;
use crate::vm::runtime::{self, Worker};
use crate::vm::tasks::{Fate, Held, attempt};

rustler::atoms! { system, roots, pubkey }

/// The Connection Attempt Delay that RFC 8305, section 5, recommends.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// How often a handshake that shows a client certificate is looked at.
const CONFIRM_POLL: Duration = Duration::from_millis(1);
/// Whether anybody has the port.
const ASK: Pace = Pace {
    first: Duration::from_millis(30),
    pause: Duration::from_millis(300),
    longest: Duration::from_secs(2),
};

#[derive(NifMap)]
struct Options<'a> {
    /// In the order they are to be tried.
    addresses: Vec<String>,
    port: u16,
    server_name: String,
    alpn: Vec<Binary<'a>>,
    verify: Atom,
    cacerts: Vec<Binary<'a>>,
    pubkey: Binary<'a>,
    cert: Vec<Binary<'a>>,
    key_kind: Atom,
    key: Binary<'a>,
    local_address: String,
    local_port: u16,
    keylog: bool,
    sslkeylogfile: String,
    high_watermark: usize,
    low_watermark: usize,
    disconnect_timeout: u64,
    migration: bool,
    /// The process that is asked about the server's certificates, if any is.
    verifier: Vec<LocalPid>,
    resumption: bool,
    early_data: bool,
    early_timeout: u64,
    transport: Transport,
}

#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("not an address: {0}")]
    Address(String),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("no qlog: {0}")]
    Qlog(io::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the peer's certificate was refused")]
    Refused(Atom),
    #[error("the peer's certificate was refused by the user, with alert {0}")]
    Judged(u8),
    #[error("no common application protocol")]
    Alpn(Vec<Vec<u8>>),
    #[error(transparent)]
    Lost(ConnectionError),
    #[error("internal error")]
    Failed,
}

impl From<endpoint::DialError> for DialError {
    fn from(error: endpoint::DialError) -> Self {
        match error {
            endpoint::DialError::Io(error) => DialError::Io(error),
            endpoint::DialError::Connect(error) => DialError::Connect(error),
        }
    }
}

impl Encoder for DialError {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            DialError::Address(_) => atoms::einval().encode(env),
            DialError::Tls(error) => error.encode(env),
            DialError::Qlog(error) => {
                (atoms::bad_option(), atoms::qlog_dir(), posix(error)).encode(env)
            }
            DialError::Io(error) => posix(error).encode(env),
            DialError::Connect(error) => connect_error(error).encode(env),
            DialError::Refused(why) => (atoms::bad_cert(), *why).encode(env),
            DialError::Judged(code) => {
                let name = alert(TransportErrorCode::crypto(*code));
                (atoms::bad_cert(), name.unwrap_or(atoms::unknown())).encode(env)
            }
            DialError::Alpn(offered) => {
                let offered: Vec<Term> = offered
                    .iter()
                    .map(|protocol| crate::vm::error::binary(env, protocol))
                    .collect();
                (atoms::alpn_mismatch(), offered).encode(env)
            }
            DialError::Lost(ConnectionError::ConnectionClosed(close))
                if close.error_code == TransportErrorCode::CONNECTION_REFUSED =>
            {
                atoms::connection_refused().encode(env)
            }
            DialError::Lost(error) => Ended(error).encode(env),
            DialError::Failed => atoms::internal_error().encode(env),
        }
    }
}

struct Plan {
    addresses: Result<VecDeque<SocketAddr>, DialError>,
    local: Result<Option<SocketAddr>, DialError>,
    server_name: String,
    alpn: Vec<Vec<u8>>,
    verify: Verify,
    credentials: Option<Result<tls::Credentials, TlsError>>,
    secrets: Secrets,
    verifier: Option<LocalPid>,
    migration: bool,
    terms: Terms,
    resumption: bool,
    /// The handshake has so long where early data is sent, if that is wanted.
    early: Option<Option<Duration>>,
    transport: Transport,
}

impl Options<'_> {
    /// Copied out of the VM.
    fn plan(self) -> NifResult<Plan> {
        let cacerts = options::certificates(&self.cacerts);
        let verify = if self.verify == system() {
            Verify::System
        } else if self.verify == roots() {
            Verify::Roots(cacerts)
        } else if self.verify == pubkey() {
            let key = self.pubkey.as_slice().try_into();
            Verify::PublicKey(key.map_err(|_| rustler::Error::BadArg)?)
        } else {
            Verify::None
        };
        let local = &self.local_address;
        Ok(Plan {
            addresses: self
                .addresses
                .iter()
                .map(|text| socket_address(text, self.port))
                .collect(),
            local: if local.is_empty() {
                Ok(None)
            } else {
                socket_address(local, self.local_port).map(Some)
            },
            server_name: self.server_name,
            alpn: self.alpn.iter().map(|p| p.as_slice().to_vec()).collect(),
            verify,
            credentials: (!self.cert.is_empty())
                .then(|| options::credentials(&self.cert, self.key_kind, &self.key)),
            secrets: Secrets::new(self.keylog, self.sslkeylogfile),
            verifier: self.verifier.first().copied(),
            migration: self.migration,
            terms: Terms::new(
                Watermarks {
                    high: self.high_watermark,
                    low: self.low_watermark,
                },
                self.disconnect_timeout,
                self.transport.streams(),
            ),
            resumption: self.resumption,
            early: self
                .early_data
                .then(|| options::patience(self.early_timeout)),
            transport: self.transport,
        })
    }
}

#[rustler::nif]
fn conn_dial<'a>(env: Env<'a>, reference: Term<'a>, options: Options<'a>) -> NifResult<Term<'a>> {
    if runtime::start_quic().is_err() {
        return Ok((atoms::error(), atoms::eagain()).encode(env));
    }
    let plan = options.plan()?;
    let (reply, operation) = Reply::about(env, reference, ());
    let worker = runtime::quic();
    worker.spawn(run(plan, worker, reply));
    Ok(operation.encode(env))
}

/// Dials, and tells the caller.
async fn run(plan: Plan, worker: &'static Worker, reply: Reply) {
    let (terms, migration) = (plan.terms, plan.migration);
    // A caller that gave up takes all attempts down with it.
    let dialled = tokio::select! {
        dialled = dial(plan) => dialled,
        () = reply.cancelled() => return,
    };
    let Dialled {
        quic,
        bound,
        fate,
        begun,
        movable,
    } = match dialled {
        Ok(dialled) => dialled,
        Err(error) => return reply.error(error),
    };
    let caller = reply.caller();
    let connection = Connection::new((*quic).clone(), worker, fate, caller, bound, terms, begun);
    connection.may_move(match movable {
        Some(movable) if migration => Way::Open(movable),
        _ => Way::Disabled,
    });
    let giving = connection.giving();
    let sent = reply.send(|env| match connection.make(env, caller) {
        Ok(handle) => (atoms::ok(), handle).encode(env),
        Err(Gone) => (atoms::error(), atoms::closed()).encode(env),
    });
    drop(giving);
    if sent.is_err() {
        let _ = attempt(|| quic.close(transport::VarInt::from_u32(0), b""));
    }
}

fn socket_address(text: &str, port: u16) -> Result<SocketAddr, DialError> {
    address::parse(text, port).ok_or_else(|| DialError::Address(text.to_owned()))
}

async fn dial(plan: Plan) -> Result<Dialled, DialError> {
    fault::pass(Point::Dial);
    let mut addresses = plan.addresses?;
    let local = plan.local?;
    let credentials = plan.credentials.transpose()?;
    let shows_certificate = credentials.is_some();
    let defers = plan.verifier.is_some();
    let (verify, alpn, secrets) = (plan.verify, plan.alpn.clone(), plan.secrets);
    let kind = plan
        .resumption
        .then(|| tls::kind(&plan.server_name, &verify, credentials.as_ref(), &alpn));
    let kept = kind.filter(|_| secrets.go_nowhere()).and_then(client::find);
    let config = match kept {
        Some(kept) => kept,
        None => {
            // The roots of the platform are read from files, and secrets go to one.
            let built = tokio::task::spawn_blocking(move || {
                tls::client_config(verify, credentials, alpn, &secrets.open()?, kind, defers)
            });
            built.await.map_err(|_| DialError::Failed)??
        }
    };
    // Early data is for the server that gave the ticket.
    let known = kind
        .filter(|_| plan.early.is_some())
        .and_then(client::address)
        .and_then(|known| addresses.iter().position(|to| *to == known));
    let mut early = plan.early.filter(|_| known.is_some());
    if let Some(known) = known {
        addresses.swap(0, known);
    }
    let window = plan.transport.receive_window();
    let config = Crypto {
        tls: Arc::new(config),
        transport: plan.transport.config(true, window),
        kind,
        id: None,
    };
    let logs = match plan.transport.qlog_dir().map(str::to_owned) {
        None => None,
        Some(path) => {
            let opened = tokio::task::spawn_blocking(move || qlog::Directory::open(&path));
            let opened = opened.await.map_err(|_| DialError::Failed)?;
            Some(opened.map_err(DialError::Qlog)?)
        }
    };

    let mut attempts = JoinSet::new();
    // The last reason, should all attempts fail.
    let mut failure = DialError::Io(io::Error::from(io::ErrorKind::InvalidInput));
    loop {
        if let Some(to) = addresses.pop_front() {
            let (mut config, name) = (config.clone(), plan.server_name.clone());
            if let Some(logs) = &logs {
                let id = qlog::first_id();
                config.id = Some(id);
                config.transport = plan.transport.config(true, window);
                qlog::attach(&mut config.transport, logs.log(&id, qlog::Side::Client));
            }
            let max_mtu = plan.transport.max_mtu;
            let early = early.take();
            attempts.spawn(async move {
                let dialled = try_one(to, local, max_mtu, config, &name, early).await?;
                if shows_certificate && dialled.begun.early.is_none() {
                    confirmed(&dialled.quic).await?;
                }
                Ok(dialled)
            });
        } else if attempts.is_empty() {
            return Err(explain(failure, &plan.alpn));
        }
        let delay = async {
            if addresses.is_empty() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(ATTEMPT_DELAY).await;
        };
        tokio::select! {
            done = attempts.join_next() => match done {
                Some(Ok(Ok(connected))) => return judged(connected, plan.verifier).await,
                Some(Ok(Err(error))) => failure = error,
                Some(Err(_)) => failure = DialError::Failed,
                None => {}
            },
            () = delay => {}
        }
    }
}

/// Asks the process that decides about the server's certificates.
async fn judged(dialled: Dialled, verifier: Option<LocalPid>) -> Result<Dialled, DialError> {
    let Some(verifier) = verifier else {
        return Ok(dialled);
    };
    let quic = &dialled.quic;
    let alert = tokio::select! {
        verdict = verdict::ask(verifier, quic, None) => match verdict {
            Ok(()) => return Ok(dialled),
            Err(alert) => alert,
        },
        error = quic.closed() => return Err(DialError::Lost(error)),
    };
    // Before that the close would go out with keys of the handshake, too, as another one.
    confirmed(quic).await?;
    verdict::refuse(quic, alert);
    Err(DialError::Judged(alert))
}

/// A connection that is made, from which address, and what becomes of that.
struct Dialled {
    quic: Held<transport::Connection>,
    bound: SocketAddr,
    fate: Arc<Fate>,
    begun: Begun,
    movable: Option<Movable>,
}

/// What all attempts of a dial are made with.
#[derive(Clone)]
struct Crypto {
    tls: Arc<rustls::ClientConfig>,
    transport: Arc<TransportConfig>,
    kind: Option<Kind>,
    /// Where the first packet goes to, if that is the name of a log.
    id: Option<ConnectionId>,
}

impl Crypto {
    /// For QUIC, with what is seen of the peer.
    fn client(self, early: bool) -> Result<(ClientConfig, Arc<Seen>), DialError> {
        let Crypto {
            mut tls,
            transport,
            kind,
            id,
        } = self;
        if early {
            Arc::make_mut(&mut tls).enable_early_data = true;
        }
        let tls = lean::Client::new(tls, kind.is_some())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let seen = Arc::<Seen>::default();
        let tls = watched::Client::new(tls, Noticing(seen.clone()));
        let mut config = ClientConfig::new(Arc::new(tls));
        config.transport_config(transport);
        if let Some(id) = id {
            config.initial_dst_cid_provider(Arc::new(move || id));
        }
        Ok((config, seen))
    }
}

async fn try_one(
    to: SocketAddr,
    local: Option<SocketAddr>,
    max_mtu: u16,
    config: Crypto,
    server_name: &str,
    early: Option<Option<Duration>>,
) -> Result<Dialled, DialError> {
    fault::pass(Point::Attempt);
    let asked = to;
    // Answers come from where the link's address is, and QUIC expects them from where it has sent to.
    let to = match (to, local) {
        (SocketAddr::V6(v6), Some(local)) if v6.scope_id() == 0 => {
            address::on_link_of(to.ip(), to.port(), local)
        }
        _ => to,
    };
    let kind = config.kind;
    let (config, seen) = config.client(early.is_some())?;
    let endpoint::Dial {
        connecting,
        driver,
        endpoint,
        own,
        movable,
    } = endpoint::dial(to, local, max_mtu, &config, server_name)?;
    let bound = endpoint.local_addr()?;
    let fate = driver.fate();
    if let Some(port) = own {
        // With the connection, whoever holds its handle.
        tokio::spawn(async move {
            endpoint.wait_idle().await;
            port.free();
        });
    }
    let begun = |early| Begun {
        seen: seen.clone(),
        resumption: kind.is_some(),
        early,
    };
    let connecting = match early {
        None => connecting,
        Some(within) => match connecting.into_0rtt() {
            Ok((quic, accepted)) => {
                let early = Early::begin(&quic, accepted, within, |_| {});
                return Ok(Dialled {
                    quic: Held::new(quic),
                    bound,
                    fate,
                    begun: begun(Some(early)),
                    movable,
                });
            }
            Err(connecting) => connecting,
        },
    };
    tokio::select! {
        biased;
        connected = connecting.connected() => match connected {
            Ok(quic) => {
                if let Some(kind) = kind {
                    client::met(kind, asked);
                }
                Ok(Dialled {
                    quic: Held::new(quic),
                    bound,
                    fate,
                    begun: begun(None),
                    movable,
                })
            }
            Err(_) if fate.has_failed() => Err(DialError::Failed),
            Err(ConnectionError::TransportError(error)) => Err(match seen.refusal() {
                Some(why) => DialError::Refused(why),
                None => DialError::Lost(ConnectionError::TransportError(error)),
            }),
            Err(error) => Err(DialError::Lost(error)),
        },
        () = fate.failed() => Err(DialError::Failed),
        error = refusal(to, local) => Err(DialError::Io(error)),
    }
}

/// Waits for the server to confirm the handshake (RFC 9001, section 4.1.2). Before that it may
/// still refuse our certificate, which a TLS 1.3 client has sent last. QUIC has no event for it.
async fn confirmed(connection: &transport::Connection) -> Result<(), DialError> {
    loop {
        if connection.stats().frame_rx.handshake_done > 0 {
            return Ok(());
        }
        tokio::select! {
            error = connection.closed() => return Err(DialError::Lost(error)),
            () = tokio::time::sleep(CONFIRM_POLL) => {}
        }
    }
}

/// Resolves when the system says that nobody can be reached at an address.
async fn refusal(to: SocketAddr, local: Option<SocketAddr>) -> io::Error {
    // With the link it is on.
    let from = local.unwrap_or_else(|| aimed::any(to));
    ask::refusal(from, to, ASK).await
}

/// Says what the alert alone does not.
fn explain(error: DialError, offered: &[Vec<u8>]) -> DialError {
    match &error {
        DialError::Lost(ConnectionError::ConnectionClosed(close))
            if alert(close.error_code) == Some(atoms::no_application_protocol()) =>
        {
            DialError::Alpn(offered.to_vec())
        }
        _ => error,
    }
}
