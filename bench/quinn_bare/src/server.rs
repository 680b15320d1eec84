//! The server: does with a stream what its first byte says, and counts datagrams.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use quinn::{Connection, RecvStream, SendStream};

use crate::load::{ASK, COUNT, DATAGRAM, ECHO, IDLE, Pattern, REFUSED, SHORT, SMALL, hash};
use crate::{Outcome, Settings, setup};

/// What the server has seen, over all connections.
struct Seen {
    pattern: Pattern,
    held: AtomicU64,
    datagrams: AtomicU64,
    /// First and last datagram.
    times: Mutex<Option<(Instant, Instant)>>,
    bytes: AtomicU64,
    /// Of each stream that is counted.
    streams: Mutex<Vec<Arc<AtomicU64>>>,
    /// Jain's index, and the largest deviation from the mean, when half of all bytes were there, in millionths.
    fairness: OnceLock<[u64; 2]>,
}

pub(crate) async fn serve(settings: Settings) -> Outcome<()> {
    let (endpoint, cert) = setup::server(&settings)?;
    let hex: String = cert.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("{} {hex}", endpoint.local_addr()?.port());
    std::io::stdout().flush()?;
    let seen = Arc::new(Seen {
        pattern: Pattern::new(),
        held: AtomicU64::new(0),
        datagrams: AtomicU64::new(0),
        times: Mutex::new(None),
        bytes: AtomicU64::new(0),
        streams: Mutex::new(Vec::new()),
        fairness: OnceLock::new(),
    });
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let seen = seen.clone();
            tokio::spawn(async move {
                let connection = incoming.await?;
                if is_refused(&connection) {
                    connection.close(REFUSED.into(), b"");
                    return Ok(());
                }
                tokio::spawn(count_datagrams(connection.clone(), seen.clone()));
                while let Ok((send, recv)) = connection.accept_bi().await {
                    tokio::spawn(answer(connection.clone(), send, recv, seen.clone()));
                }
                Outcome::Ok(())
            });
        }
    });
    tokio::task::spawn_blocking(|| std::io::stdin().lines().count()).await?;
    Ok(())
}

/// A client that wants to see the end of its connection asks for this name.
fn is_refused(connection: &Connection) -> bool {
    connection
        .handshake_data()
        .and_then(|data| data.downcast::<quinn::crypto::rustls::HandshakeData>().ok())
        .is_some_and(|data| data.server_name.as_deref() == Some("refused"))
}

async fn answer(
    connection: Connection,
    mut send: SendStream,
    mut recv: RecvStream,
    seen: Arc<Seen>,
) -> Outcome<()> {
    let mut first = [0];
    recv.read_exact(&mut first).await?;
    match first {
        [ECHO] => {
            let mut buffer = [0; SMALL];
            while recv.read_exact(&mut buffer).await.is_ok() {
                send.write_all(&buffer).await?;
            }
        }
        [COUNT] => {
            let total = count(&mut recv, &seen).await?;
            send.write_all(&total.to_be_bytes()).await?;
            send.finish()?;
            send.stopped().await?;
        }
        [SHORT] => {
            let rest = recv.read_to_end(SMALL).await?;
            send.write_all(&hash(&rest)).await?;
            send.finish()?;
        }
        [IDLE] => {
            seen.held.fetch_add(1, Relaxed);
            let held = (send, recv);
            connection.closed().await;
            drop(held);
        }
        [ASK] => {
            let times = *seen.times.lock().unwrap_or_else(PoisonError::into_inner);
            let took = times.map_or(0, |(first, last)| (last - first).as_micros() as u64);
            let [fairness, uneven] = seen.fairness.get().copied().unwrap_or_default();
            let numbers = [
                seen.held.load(Relaxed),
                seen.datagrams.load(Relaxed),
                took,
                connection.stats().frame_rx.datagram,
                fairness,
                uneven,
            ];
            for number in numbers {
                send.write_all(&number.to_be_bytes()).await?;
            }
            send.finish()?;
        }
        _ => return Err("a stream of no known kind".into()),
    }
    Ok(())
}

async fn count(recv: &mut RecvStream, seen: &Seen) -> Outcome<u64> {
    let (mut all, mut number) = ([0; 8], [0; 8]);
    recv.read_exact(&mut all).await?;
    recv.read_exact(&mut number).await?;
    let half = u64::from_be_bytes(all) / 2;
    let number = u64::from_be_bytes(number);
    let own = Arc::new(AtomicU64::new(0));
    seen.streams
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(own.clone());
    let mut total = 0;
    while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
        if !seen.pattern.is(total, &chunk.bytes) {
            return Err("other bytes than were sent".into());
        }
        let size = chunk.bytes.len() as u64;
        total += size;
        own.store(total, Relaxed);
        let before = seen.bytes.fetch_add(size, Relaxed);
        if before < half && before + size >= half {
            let _ = seen.fairness.set(fairness(seen, number));
        }
    }
    Ok(total)
}

/// With the streams of which nothing has come yet.
fn fairness(seen: &Seen, number: u64) -> [u64; 2] {
    let streams = seen.streams.lock().unwrap_or_else(PoisonError::into_inner);
    let bytes: Vec<f64> = streams.iter().map(|n| n.load(Relaxed) as f64).collect();
    let sum: f64 = bytes.iter().sum();
    let squares: f64 = bytes.iter().map(|n| n * n).sum();
    let number = number as f64;
    let not_begun = if (bytes.len() as f64) < number {
        1.0
    } else {
        0.0
    };
    let furthest = bytes.iter().map(|n| (n * number / sum - 1.0).abs());
    let furthest = furthest.fold(not_begun, f64::max);
    [sum * sum / (number * squares), furthest].map(|part| (1e6 * part) as u64)
}

/// Counts those that are whole: eight bytes of a number, then the pattern.
async fn count_datagrams(connection: Connection, seen: Arc<Seen>) {
    while let Ok(datagram) = connection.read_datagram().await {
        if datagram.len() == DATAGRAM && seen.pattern.is(0, &datagram[8..]) {
            seen.datagrams.fetch_add(1, Relaxed);
            let now = Instant::now();
            seen.times
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert((now, now))
                .1 = now;
        }
    }
}
