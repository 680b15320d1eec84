//! Quinn alone, with what `bench/macula_bench_quic.erl` does over `macula_quic`: a 64-byte echo and
//! one long stream, between two processes on loopback.
//!
//! `quinn_bare ECHO_MS STREAM_BYTES [MAX_MTU]` starts its own server process and prints
//! `echo_p50_us`, `echo_p99_us` and `stream_mb_s`, one per line with its value.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::{ClientConfig, Endpoint, EndpointConfig, MtuDiscoveryConfig, ServerConfig};
use quinn::{Connection, TransportConfig, VarInt};
use quinn::{RecvStream, SendStream, default_runtime};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const ECHO_SIZE: usize = 64;
const CHUNK: usize = 64 * 1024;

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().collect();
    // One thread for each process, as macula_quic has on two cores.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    match args.get(1).map(String::as_str) {
        Some("server") => runtime.block_on(serve(max_mtu(args.get(2))?)),
        Some(echo_ms) => {
            let echo = Duration::from_millis(echo_ms.parse()?);
            let bytes = args
                .get(2)
                .ok_or("usage: ECHO_MS STREAM_BYTES [MAX_MTU]")?
                .parse()?;
            measure(&runtime, echo, bytes, args.get(3))
        }
        None => Err("usage: quinn_bare ECHO_MS STREAM_BYTES [MAX_MTU]".into()),
    }
}

fn max_mtu(arg: Option<&String>) -> Outcome<Option<u16>> {
    Ok(arg.map(|text| text.parse()).transpose()?)
}

fn measure(
    runtime: &tokio::runtime::Runtime,
    echo: Duration,
    bytes: u64,
    mtu: Option<&String>,
) -> Outcome<()> {
    let mut server = Command::new(std::env::current_exe()?)
        .arg("server")
        .args(mtu)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(server.stdout.take().ok_or("no output of the server")?).read_line(&mut line)?;
    let result = runtime.block_on(run_client(line.trim(), echo, bytes, max_mtu(mtu)?));
    // It ends at the end of its input, also when this process is killed.
    drop(server.stdin.take());
    server.wait()?;
    result
}

fn transport(mtu: Option<u16>) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    if let Some(max) = mtu {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(max);
        config.mtu_discovery_config(Some(discovery));
    }
    // As macula_quic has them.
    config.receive_window(VarInt::from_u32(64 << 20));
    config.stream_receive_window(VarInt::from_u32(2 << 20));
    config.send_window(10 << 20);
    Arc::new(config)
}

fn bind(server: Option<ServerConfig>, mtu: Option<u16>) -> Outcome<Endpoint> {
    let mut config = EndpointConfig::default();
    if let Some(max) = mtu {
        config.max_udp_payload_size(max)?;
    }
    let socket = std::net::UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let runtime = default_runtime().ok_or("no runtime")?;
    Ok(Endpoint::new(config, server, socket, runtime)?)
}

/// Echoes on every stream that opens with a 1, counts on every one that opens with a 2.
async fn serve(mtu: Option<u16>) -> Outcome<()> {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".into()])?;
    let cert = made.cert.der().clone();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let mut config = ServerConfig::with_single_cert(vec![cert.clone()], key)?;
    config.transport_config(transport(mtu));
    let endpoint = bind(Some(config), mtu)?;
    let hex: String = cert.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("{} {hex}", endpoint.local_addr()?.port());
    std::io::stdout().flush()?;
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            tokio::spawn(async move {
                let connection = incoming.await?;
                while let Ok((send, recv)) = connection.accept_bi().await {
                    tokio::spawn(answer(send, recv));
                }
                Outcome::Ok(())
            });
        }
    });
    tokio::task::spawn_blocking(|| std::io::stdin().lines().count()).await?;
    Ok(())
}

async fn answer(mut send: SendStream, mut recv: RecvStream) -> Outcome<()> {
    let mut kind = [0];
    recv.read_exact(&mut kind).await?;
    if kind[0] == 1 {
        let mut buffer = [0; ECHO_SIZE];
        while recv.read_exact(&mut buffer).await.is_ok() {
            send.write_all(&buffer).await?;
        }
    } else {
        let mut total = 0;
        while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
            total += chunk.bytes.len() as u64;
        }
        send.write_all(&total.to_be_bytes()).await?;
        send.finish()?;
        send.stopped().await?;
    }
    Ok(())
}

async fn run_client(server: &str, echo: Duration, bytes: u64, mtu: Option<u16>) -> Outcome<()> {
    let (port, hex) = server.split_once(' ').ok_or("the server did not start")?;
    let der = (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16))
        .collect::<Result<Vec<u8>, _>>()?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(der))?;
    let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
    config.transport_config(transport(mtu));
    let endpoint = bind(None, mtu)?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse()?));
    let connection = endpoint.connect_with(config, address, "localhost")?.await?;
    let (p50, p99) = echoes(&connection, echo).await?;
    println!("echo_p50_us {p50:.1}\necho_p99_us {p99:.1}");
    println!("stream_mb_s {:.1}", stream(&connection, bytes).await?);
    connection.close(0u32.into(), b"");
    endpoint.wait_idle().await;
    Ok(())
}

async fn echoes(connection: &Connection, duration: Duration) -> Outcome<(f64, f64)> {
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(&[1]).await?;
    let mut buffer = [7; ECHO_SIZE];
    let mut times = Vec::new();
    let start = Instant::now();
    // The first fifth warms up.
    while start.elapsed() < duration {
        let before = Instant::now();
        send.write_all(&buffer).await?;
        recv.read_exact(&mut buffer).await?;
        if start.elapsed() > duration / 5 {
            times.push(before.elapsed().as_secs_f64() * 1e6);
        }
    }
    times.sort_by(f64::total_cmp);
    let at = |part: usize| {
        times
            .get(times.len() * part / 100)
            .copied()
            .unwrap_or(f64::NAN)
    };
    Ok((at(50), at(99)))
}

async fn stream(connection: &Connection, bytes: u64) -> Outcome<f64> {
    let (mut send, mut recv) = connection.open_bi().await?;
    let start = Instant::now();
    send.write_all(&[2]).await?;
    let chunk = vec![7; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let size = left.min(CHUNK as u64) as usize;
        send.write_all(&chunk[..size]).await?;
        left -= size as u64;
    }
    send.finish()?;
    let mut total = [0; 8];
    recv.read_exact(&mut total).await?;
    if u64::from_be_bytes(total) != bytes {
        return Err("the server counted other bytes than were sent".into());
    }
    Ok(bytes as f64 / 1e6 / start.elapsed().as_secs_f64())
}
