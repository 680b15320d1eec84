//! A peer on s2n-quic with s2n-tls.

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use macula_interop::{Command, Error, Options, block, digest, lettered, number, say};
use s2n_quic::client::Connect;
use s2n_quic::connection::{Error as ConnectionError, Handle};
use s2n_quic::provider::datagram::default::{Endpoint, Receiver, Sender};
use s2n_quic::provider::endpoint_limits::{ConnectionAttempt, Limiter, Outcome};
use s2n_quic::provider::event::{ConnectionInfo, ConnectionMeta, Subscriber, events};
use s2n_quic::provider::tls;
use s2n_quic::provider::tls::default::callbacks::{
    ConnectionFuture, SessionTicket, SessionTicketCallback, VerifyHostNameCallback,
};
use s2n_quic::provider::tls::default::config::ConnectionInitializer;
use s2n_quic::provider::tls::default::connection::Connection as TlsConnection;
use s2n_quic::provider::tls::default::error::Error as TlsError;
use s2n_quic::stream::{
    BidirectionalStream, Error as StreamError, PeerStream, ReceiveStream, SendStream,
};
use s2n_quic::{Client, Connection, Server};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::watch;

/// A command that has not come to its end by then fails.
const PATIENCE: Duration = Duration::from_secs(40);
/// What a server seals its tickets with.
const TICKET_KEY: [u8; 32] = [7; 32];
/// How often a stream is written to that the other side is to stop.
const BEAT: Duration = Duration::from_millis(5);

/// What has happened that no other call tells.
#[derive(Clone, Default)]
struct Seen {
    retries: Arc<AtomicU64>,
    key_updates: Arc<AtomicU64>,
}

impl Subscriber for Seen {
    type ConnectionContext = ();

    fn create_connection_context(&mut self, _: &ConnectionMeta, _: &ConnectionInfo) {}

    fn on_packet_received(
        &mut self,
        (): &mut (),
        _: &ConnectionMeta,
        event: &events::PacketReceived,
    ) {
        if matches!(event.packet_header, events::PacketHeader::Retry { .. }) {
            self.retries.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn on_key_update(&mut self, (): &mut (), _: &ConnectionMeta, event: &events::KeyUpdate) {
        if matches!(event.key_type, events::KeyType::OneRtt { generation, .. } if generation > 0) {
            self.key_updates.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Sends every client back for a token first, where that is asked for.
struct Gate(bool);

impl Limiter for Gate {
    fn on_connection_attempt(&mut self, _: &ConnectionAttempt) -> Outcome {
        if self.0 {
            Outcome::retry()
        } else {
            Outcome::allow()
        }
    }
}

/// Clients have no name to verify.
struct AnyName;

impl VerifyHostNameCallback for AnyName {
    fn verify_host_name(&self, _: &str) -> bool {
        true
    }
}

/// What a client has to resume a session with.
#[derive(Clone)]
struct Ticket {
    data: Vec<u8>,
    /// Whether the connection that brought the ticket had resumed a session itself.
    resumed: bool,
}

/// Keeps the latest ticket that came.
struct Keep(watch::Sender<Option<Ticket>>);

impl SessionTicketCallback for Keep {
    fn on_session_ticket(&self, connection: &mut TlsConnection, ticket: &SessionTicket) {
        let mut data = vec![0; ticket.len().unwrap_or(0)];
        // A ticket that cannot be read is as good as none: the test hears that none came.
        if ticket.data(&mut data).is_ok() {
            let resumed = connection.resumed();
            self.0.send_replace(Some(Ticket { data, resumed }));
        }
    }
}

/// Shows the server a ticket of an earlier connection.
struct Show(Ticket);

impl ConnectionInitializer for Show {
    fn initialize_connection(
        &self,
        connection: &mut TlsConnection,
    ) -> Result<Option<Pin<Box<dyn ConnectionFuture>>>, TlsError> {
        connection.set_session_ticket(&self.0.data)?;
        Ok(None)
    }
}

/// Waits for the ticket that a connection brings.
async fn ticket(tickets: &mut watch::Receiver<Option<Ticket>>) -> Result<Ticket, Error> {
    let came = tickets.wait_for(Option::is_some).await?;
    Ok(came.clone().ok_or("no ticket")?)
}

fn datagrams() -> Result<Endpoint, Error> {
    Ok(Endpoint::builder()
        .with_send_capacity(1000)?
        .with_recv_capacity(1000)?
        .build()
        .map_err(|never: Infallible| match never {})?)
}

fn path<'a>(options: &'a Options, key: &str) -> Result<&'a Path, Error> {
    Ok(Path::new(
        options.text(key).ok_or_else(|| format!("no {key}"))?,
    ))
}

fn code(value: u64) -> s2n_quic::application::Error {
    s2n_quic::application::Error::new(value).unwrap_or(s2n_quic::application::Error::UNKNOWN)
}

/// How the other side ended what it sends, and all of that.
async fn rest(stream: &mut ReceiveStream) -> Result<(Value, Vec<u8>), Error> {
    let mut all = Vec::new();
    loop {
        match stream.receive().await {
            Ok(Some(data)) => all.extend_from_slice(&data),
            Ok(None) => return Ok(("fin".into(), all)),
            Err(StreamError::StreamReset { error, .. }) => return Ok(((*error).into(), all)),
            Err(error) => return Err(error.into()),
        }
    }
}

async fn answer(stream: BidirectionalStream, data: Vec<u8>) -> Result<(Value, Vec<u8>), Error> {
    let (mut receive, mut send) = stream.split();
    let sending = tokio::spawn(async move {
        send.send(data.into()).await?;
        send.finish()
    });
    let came = rest(&mut receive).await?;
    sending.await??;
    Ok(came)
}

async fn send_datagram(handle: &Handle, data: Vec<u8>) -> Result<(), Error> {
    handle
        .datagram_mut(|sender: &mut Sender| sender.send_datagram(data.into()))?
        .map_err(|error| format!("{error:?}").into())
}

async fn receive_datagram(handle: &Handle) -> Result<Bytes, Error> {
    poll_fn(|cx| {
        match handle.datagram_mut(|receiver: &mut Receiver| receiver.poll_recv_datagram(cx)) {
            Ok(Poll::Ready(Ok(data))) => Poll::Ready(Ok(data)),
            Ok(Poll::Ready(Err(error))) => Poll::Ready(Err(format!("{error:?}").into())),
            Ok(Poll::Pending) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error.into())),
        }
    })
    .await
}

/// The error that the other side closed the connection with, as a test compares it.
fn closed(error: &ConnectionError) -> Value {
    match error {
        ConnectionError::Application { error, .. } => json!([**error, true]),
        ConnectionError::Transport { code, .. } => json!([code.as_u64(), false]),
        ConnectionError::Closed { .. } => json!([0, true]),
        other => json!([other.to_string(), false]),
    }
}

async fn obey(
    handle: &mut Handle,
    acceptor: &mut s2n_quic::connection::StreamAcceptor,
    seen: &Seen,
    tickets: &mut watch::Receiver<Option<Ticket>>,
    command: &Command,
) -> Result<Value, Error> {
    Ok(match command.name() {
        "info" => json!([String::from_utf8_lossy(&handle.application_protocol()?), 1]),
        "resumed" => ticket(tickets).await?.resumed.into(),
        "retried" => json!(seen.retries.load(Ordering::Relaxed) > 0),
        "key_updates" => json!(seen.key_updates.load(Ordering::Relaxed)),
        "echo" => {
            let data = lettered(b'e', &block(command.size(2)));
            let mut asked = Vec::new();
            for _ in 0..command.size(1) {
                let stream = handle.open_bidirectional_stream().await?;
                asked.push(tokio::spawn(answer(stream, data.clone())));
            }
            let mut all = true;
            for one in asked {
                all &= one.await?? == ("fin".into(), data.clone());
            }
            all.into()
        }
        "up" => {
            let data = block(command.size(1));
            let stream = handle.open_bidirectional_stream().await?;
            let (end, came) = answer(stream, lettered(b'h', &data)).await?;
            json!([end, came == digest(&data)])
        }
        "down" => {
            let stream = handle.open_bidirectional_stream().await?;
            let request = lettered(b'g', &command.number(1).to_be_bytes());
            let (end, came) = answer(stream, request).await?;
            json!([end, came == block(command.size(1))])
        }
        "uni" => {
            let (count, data) = (command.size(1), block(command.size(2)));
            let opener = handle.clone();
            let bytes = Bytes::from(data.clone());
            let sending = tokio::spawn(async move {
                let mut opener = opener;
                for _ in 0..count {
                    let mut stream = opener.open_send_stream().await?;
                    stream.send(bytes.clone()).await?;
                    stream.finish()?;
                }
                Ok::<_, Error>(())
            });
            let mut all = true;
            for _ in 0..count {
                let back = acceptor.accept_receive_stream().await?;
                let mut back = back.ok_or("the connection has ended")?;
                all &= rest(&mut back).await? == ("fin".into(), digest(&data));
            }
            sending.await??;
            all.into()
        }
        "empty" => {
            let stream = handle.open_bidirectional_stream().await?;
            let (mut receive, mut send) = stream.split();
            send.finish()?;
            let (end, came) = rest(&mut receive).await?;
            json!([end, came.is_empty()])
        }
        "hold" => {
            // The other side ends it when it likes to.
            let stream = handle.open_bidirectional_stream().await?;
            tokio::spawn(answer(stream, b"w".to_vec()));
            "held".into()
        }
        "half" => {
            // The end comes alone, and later than the data.
            let data = block(1000);
            let stream = handle.open_bidirectional_stream().await?;
            let (mut receive, mut send) = stream.split();
            send.send(lettered(b'h', &data).into()).await?;
            send.flush().await?;
            answer(handle.open_bidirectional_stream().await?, b"e".to_vec()).await?;
            send.finish()?;
            let (end, came) = rest(&mut receive).await?;
            json!([end, came == digest(&data)])
        }
        "reset" => {
            let mut stream = handle.open_bidirectional_stream().await?;
            let request = lettered(b'r', &command.number(1).to_be_bytes());
            stream.send(request.into()).await?;
            let (mut receive, _send) = stream.split();
            rest(&mut receive).await?.0
        }
        "stop" => {
            let mut stream = handle.open_bidirectional_stream().await?;
            let request = lettered(b's', &command.number(1).to_be_bytes());
            stream.send(request.into()).await?;
            loop {
                match stream.send(Bytes::from_static(b"x")).await {
                    Ok(()) => tokio::time::sleep(BEAT).await,
                    Err(StreamError::StreamReset { error, .. }) => break (*error).into(),
                    Err(error) => return Err(error.into()),
                }
            }
        }
        "abort" => {
            let mut stream = handle.open_bidirectional_stream().await?;
            stream.send(lettered(b'e', &block(100)).into()).await?;
            let mut came = 0;
            while came < 101 {
                came += stream.receive().await?.ok_or("the stream has ended")?.len();
            }
            stream.reset(code(command.number(1)))?;
            stream.stop_sending(code(command.number(1) + 1))?;
            "aborted".into()
        }
        "datagrams" => {
            let data = block(command.size(1));
            send_datagram(handle, data.clone()).await?;
            (receive_datagram(handle).await? == data).into()
        }
        "ask_close" => {
            let stream = handle.open_bidirectional_stream().await?;
            let request = lettered(b'x', &command.number(1).to_be_bytes());
            match answer(stream, request).await {
                Ok(_) => "not closed".into(),
                Err(_) => match acceptor.accept().await {
                    Ok(_) => json!([0, true]),
                    Err(error) => closed(&error),
                },
            }
        }
        "close" => {
            handle.close(code(command.number(1)));
            "closed".into()
        }
        other => format!("no command {other}").into(),
    })
}

/// An endpoint for one connection, which resumes the session of `shown`, and the tickets that come to it.
fn endpoint(
    options: &Options,
    seen: &Seen,
    shown: Option<Ticket>,
) -> Result<(Client, watch::Receiver<Option<Ticket>>), Error> {
    let (keep, tickets) = watch::channel(None);
    let mut tls = tls::default::Client::builder()
        .with_empty_trust_store()?
        .with_certificate(path(options, "ca")?)?
        .with_application_protocols([options.alpn()])?
        .with_max_cert_chain_depth(20)?;
    if options.is_set("mtls") {
        tls = tls.with_client_identity(path(options, "cert")?, path(options, "key")?)?;
    }
    if options.is_set("resume") {
        tls.config_mut().set_session_ticket_callback(Keep(keep))?;
    }
    if let Some(shown) = shown {
        tls.config_mut().set_connection_initializer(Show(shown))?;
    }
    let client = Client::builder()
        .with_tls(tls.build()?)?
        .with_datagram(datagrams()?)?
        .with_event(seen.clone())?
        .with_io("127.0.0.1:0")?
        .start()?;
    Ok((client, tickets))
}

/// The ticket of a first connection, which is then closed.
async fn first_ticket(options: &Options, to: Connect) -> Result<Ticket, Error> {
    let (client, mut tickets) = endpoint(options, &Seen::default(), None)?;
    let mut connection = client.connect(to).await?;
    answer(connection.open_bidirectional_stream().await?, b"e".to_vec()).await?;
    let came = ticket(&mut tickets).await?;
    connection.close(code(0));
    Ok(came)
}

async fn client(options: Options) -> Result<(), Error> {
    let to = SocketAddr::from(([127, 0, 0, 1], options.port()));
    let to = Connect::new(to).with_server_name("localhost");
    let shown = if options.is_set("resume") {
        let first = first_ticket(&options, to.clone());
        Some(tokio::time::timeout(PATIENCE, first).await??)
    } else {
        None
    };
    let seen = Seen::default();
    let (client, mut tickets) = endpoint(&options, &seen, shown)?;
    let connection = match client.connect(to).await {
        Ok(connection) => connection,
        Err(error) => {
            say("refused", closed(&error));
            return Ok(());
        }
    };
    say("connected", true);
    let (mut handle, mut acceptor) = connection.split();
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let command = Command::parse(&line)?;
        let done = obey(&mut handle, &mut acceptor, &seen, &mut tickets, &command);
        match tokio::time::timeout(PATIENCE, done).await? {
            Ok(result) => say("result", result),
            Err(error) => say("failed", error.to_string()),
        }
    }
    Ok(())
}

async fn serve_stream(handle: Handle, stream: PeerStream) -> Result<(), Error> {
    match stream {
        PeerStream::Receive(mut receive) => {
            let (_, all) = rest(&mut receive).await?;
            let mut handle = handle;
            let mut back = handle.open_send_stream().await?;
            back.send(digest(&all).into()).await?;
            back.finish()?;
        }
        PeerStream::Bidirectional(stream) => {
            let (receive, send) = stream.split();
            serve_request(handle, receive, send).await?;
        }
    }
    Ok(())
}

async fn serve_request(
    handle: Handle,
    mut receive: ReceiveStream,
    mut send: SendStream,
) -> Result<(), Error> {
    let mut data = Vec::new();
    loop {
        let new = receive.receive().await?;
        data.extend_from_slice(new.as_deref().unwrap_or(&[]));
        match data.first() {
            None if new.is_none() => return Ok(send.finish()?),
            Some(b'e') => {
                send.send(std::mem::take(&mut data).into()).await?;
                while let Some(more) = receive.receive().await? {
                    send.send(more).await?;
                }
                return Ok(send.finish()?);
            }
            Some(b'h') if new.is_none() => {
                send.send(digest(&data[1..]).into()).await?;
                return Ok(send.finish()?);
            }
            Some(letter @ (b'g' | b'r' | b's' | b'x')) => {
                if let Some(number) = number(&data) {
                    match letter {
                        b'g' => {
                            send.send(block(number as usize).into()).await?;
                            send.finish()?;
                        }
                        b'r' => send.reset(code(number))?,
                        b's' => receive.stop_sending(code(number))?,
                        _ => handle.close(code(number)),
                    }
                    if *letter == b'g' {
                        return Ok(());
                    }
                    // A stream that is dropped is ended with codes of its own.
                    std::future::pending::<()>().await;
                }
            }
            _ => {}
        }
        if new.is_none() {
            return Ok(());
        }
    }
}

async fn serve(connection: Connection) {
    let (handle, mut acceptor) = connection.split();
    let echoing = handle.clone();
    tokio::spawn(async move {
        while let Ok(data) = receive_datagram(&echoing).await {
            if send_datagram(&echoing, data.to_vec()).await.is_err() {
                return;
            }
        }
    });
    loop {
        match acceptor.accept().await {
            Ok(Some(stream)) => {
                let handle = handle.clone();
                tokio::spawn(async move {
                    // The other side learns of an error by the end of the stream.
                    let _ = serve_stream(handle, stream).await;
                });
            }
            Ok(None) => {
                say("closed", json!([0, true]));
                return;
            }
            Err(error) => {
                say("closed", closed(&error));
                return;
            }
        }
    }
}

async fn server(options: Options) -> Result<(), Error> {
    let mut tls = tls::default::Server::builder()
        .with_certificate(path(&options, "cert")?, path(&options, "key")?)?
        .with_application_protocols([options.alpn()])?;
    tls.config_mut()
        .add_session_ticket_key(b"interop", &TICKET_KEY, SystemTime::now())?;
    if options.is_set("mtls") {
        tls = tls
            .with_empty_trust_store()?
            .with_client_authentication()?
            .with_trusted_certificate(path(&options, "ca")?)?
            .with_verify_host_name_callback(AnyName)?;
    }
    let seen = Seen::default();
    let mut server = Server::builder()
        .with_tls(tls.build()?)?
        .with_datagram(datagrams()?)?
        .with_endpoint_limits(Gate(options.is_set("retry")))?
        .with_event(seen.clone())?
        .with_io("127.0.0.1:0")?
        .start()?;
    say("listening", server.local_addr()?.port());
    tokio::spawn(async move {
        while let Some(connection) = server.accept().await {
            tokio::spawn(serve(connection));
        }
    });
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        match Command::parse(&line)?.name() {
            "key_updates" => say("result", seen.key_updates.load(Ordering::Relaxed)),
            other => say("failed", format!("no command {other}")),
        }
    }
    Ok(())
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
