//! The client: the work of each row, timed and checked.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use rustls_pki_types::CertificateDer;
use tokio::task::JoinSet;

use crate::load::{ASK, COUNT, DATAGRAM, ECHO, IDLE, Pattern, REFUSED, SHORT, SMALL, hash};
use crate::{Outcome, Settings, setup};

/// Connections or streams that are there before the idle ones are weighed.
const FIRST: usize = 50;
/// What a server answers before it has counted all may be out of date for so long.
const SETTLED: Duration = Duration::from_millis(300);

struct Client {
    settings: Settings,
    endpoint: Endpoint,
    server: SocketAddr,
    pids: [u32; 2],
}

pub(crate) async fn run(
    row: String,
    settings: Settings,
    line: String,
    pids: [u32; 2],
) -> Outcome<()> {
    let (port, hex) = line
        .trim()
        .split_once(' ')
        .ok_or("the server did not start")?;
    let der = (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16))
        .collect::<Result<Vec<u8>, _>>()?;
    let client = Client {
        endpoint: setup::client(&settings, CertificateDer::from(der))?,
        server: SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse()?)),
        settings,
        pids,
    };
    match row.as_str() {
        "echo" => client.echo().await?,
        "short" => client.short().await?,
        "datagrams" => client.datagrams().await?,
        "connections" => client.connections().await?,
        "bulk" => client.bulk().await?,
        "idle_connections" => client.idle_connections().await?,
        "idle_streams" => client.idle_streams().await?,
        _ => return Err(format!("no row {row}").into()),
    }
    client.endpoint.close(0u32.into(), b"");
    client.endpoint.wait_idle().await;
    Ok(())
}

impl Client {
    async fn connect(&self) -> Outcome<Connection> {
        Ok(self.endpoint.connect(self.server, "localhost")?.await?)
    }

    fn duration(&self) -> Duration {
        Duration::from_millis(self.settings.ms)
    }

    async fn echo(&self) -> Outcome<()> {
        let connection = self.connect().await?;
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        for _ in 0..self.settings.parallel {
            tasks.spawn(echoes(connection.clone(), begin, self.duration()));
        }
        let mut times = Vec::new();
        while let Some(done) = tasks.join_next().await {
            times.extend(done??);
        }
        // The first fifth is not counted.
        let rate = times.len() as f64 / (self.duration().as_secs_f64() * 0.8);
        times.sort_by(f64::total_cmp);
        let at = |part| times.get(times.len() * part / 100).copied();
        println!("p50_us {:.1}", at(50).ok_or("no echo")?);
        println!("p99_us {:.1}", at(99).ok_or("no echo")?);
        println!("per_second {rate:.1}");
        Ok(())
    }

    async fn short(&self) -> Outcome<()> {
        let connection = self.connect().await?;
        short_streams(&connection, self.settings.parallel, self.duration() / 5).await?;
        let cpu = self.cpu();
        let begin = Instant::now();
        let count = short_streams(&connection, self.settings.parallel, self.duration()).await?;
        println!(
            "per_second {:.1}",
            count as f64 / begin.elapsed().as_secs_f64()
        );
        if let (Some(before), Some(after)) = (cpu, self.cpu()) {
            println!("cpu_us {:.3}", (after - before) * 1e6 / count as f64);
        }
        Ok(())
    }

    async fn datagrams(&self) -> Outcome<()> {
        let connection = self.connect().await?;
        let pattern = Pattern::new();
        let deadline = Instant::now() + self.duration();
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        for _ in 0..self.settings.parallel {
            let connection = connection.clone();
            let rest = pattern.at(0, DATAGRAM - 8).to_vec();
            tasks.spawn(async move {
                let mut sent = 0u64;
                while Instant::now() < deadline {
                    let mut datagram = sent.to_be_bytes().to_vec();
                    datagram.extend_from_slice(&rest);
                    connection.send_datagram_wait(Bytes::from(datagram)).await?;
                    sent += 1;
                }
                Outcome::Ok(sent)
            });
        }
        let mut sent = 0;
        while let Some(done) = tasks.join_next().await {
            sent += done??;
        }
        let rate = sent as f64 / begin.elapsed().as_secs_f64();
        let mut seen = ask(&connection).await?;
        let mut changed = Instant::now();
        while seen.datagrams < sent && changed.elapsed() < SETTLED {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let newer = ask(&connection).await?;
            if newer.datagrams > seen.datagrams {
                changed = Instant::now();
            }
            seen = newer;
        }
        let left = connection.stats().frame_tx.datagram;
        let dropped = sent.saturating_sub(left) + seen.arrived.saturating_sub(seen.datagrams);
        println!("sent_per_second {rate:.1}");
        println!(
            "received_per_second {:.1}",
            seen.datagrams as f64 * 1e6 / seen.took.max(1) as f64
        );
        println!("dropped_percent {:.3}", percent(dropped, sent));
        println!(
            "lost_percent {:.3}",
            percent(left.saturating_sub(seen.arrived), sent)
        );
        Ok(())
    }

    /// The server closes every connection with a code, which the dialer waits for.
    async fn connections(&self) -> Outcome<()> {
        let begin = Instant::now();
        let deadline = begin + self.duration();
        let mut tasks = JoinSet::new();
        for _ in 0..self.settings.parallel {
            let (endpoint, server) = (self.endpoint.clone(), self.server);
            tasks.spawn(async move {
                let mut count = 0u64;
                while Instant::now() < deadline {
                    let connection = endpoint.connect(server, "refused")?.await?;
                    match connection.closed().await {
                        ConnectionError::ApplicationClosed(close)
                            if close.error_code == REFUSED.into() =>
                        {
                            count += 1;
                        }
                        error => return Err(error.into()),
                    }
                }
                Outcome::Ok(count)
            });
        }
        let mut count = 0;
        while let Some(done) = tasks.join_next().await {
            count += done??;
        }
        println!(
            "per_second {:.1}",
            count as f64 / begin.elapsed().as_secs_f64()
        );
        Ok(())
    }

    async fn bulk(&self) -> Outcome<()> {
        let connection = self.connect().await?;
        let pattern = Arc::new(Pattern::new());
        let Settings {
            bytes,
            chunk,
            parallel,
            ..
        } = self.settings;
        let each = bytes / parallel as u64;
        let cpu = self.cpu();
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        for _ in 0..parallel {
            tasks.spawn(stream(
                connection.clone(),
                pattern.clone(),
                each,
                parallel as u64,
                chunk,
            ));
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        let sent = (each * parallel as u64) as f64;
        println!("mb_s {:.1}", sent / 1e6 / begin.elapsed().as_secs_f64());
        if let (Some(before), Some(after)) = (cpu, self.cpu()) {
            println!("cpu_s_per_gb {:.3}", (after - before) * 1e9 / sent);
        }
        let seen = ask(&connection).await?;
        println!("fairness {:.3}", seen.fairness);
        println!("uneven {:.3}", seen.uneven);
        Ok(())
    }

    async fn idle_connections(&self) -> Outcome<()> {
        let mut held = Vec::new();
        for _ in 0..FIRST {
            held.push(self.idle_connection().await?);
        }
        let before = self.memory();
        for _ in 0..self.settings.count {
            held.push(self.idle_connection().await?);
        }
        self.tell_growth(before);
        Ok(())
    }

    /// One whose handshake the server is known to have finished.
    async fn idle_connection(&self) -> Outcome<Connection> {
        let connection = self.connect().await?;
        ask(&connection).await?;
        Ok(connection)
    }

    async fn idle_streams(&self) -> Outcome<()> {
        let connection = self.connect().await?;
        let mut held = Vec::new();
        hold(&connection, &mut held, FIRST).await?;
        let before = self.memory();
        hold(&connection, &mut held, FIRST + self.settings.count).await?;
        self.tell_growth(before);
        Ok(())
    }

    fn tell_growth(&self, before: Option<f64>) {
        if let (Some(before), Some(after)) = (before, self.memory()) {
            let each = (after - before) / self.settings.count as f64;
            println!("kb_each {each:.3}");
        }
    }

    /// Seconds of processor time that both ends have taken, where the system tells.
    fn cpu(&self) -> Option<f64> {
        let mut sum = 0.0;
        for pid in self.pids {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
            for field in [fields.get(11)?, fields.get(12)?] {
                sum += field.parse::<f64>().ok()? / 100.0;
            }
        }
        Some(sum)
    }

    /// Kilobytes resident in both ends, where the system tells.
    fn memory(&self) -> Option<f64> {
        let mut sum = 0.0;
        for pid in self.pids {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
            sum += line.split_whitespace().next()?.parse::<f64>().ok()? * 1024.0 / 1000.0;
        }
        Some(sum)
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole.max(1) as f64
}

async fn echoes(connection: Connection, begin: Instant, duration: Duration) -> Outcome<Vec<f64>> {
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(&[ECHO]).await?;
    let data = [7; SMALL];
    let mut buffer = [0; SMALL];
    let mut times = Vec::new();
    while begin.elapsed() < duration {
        let before = Instant::now();
        send.write_all(&data).await?;
        recv.read_exact(&mut buffer).await?;
        if buffer != data {
            return Err("another echo than was sent".into());
        }
        if begin.elapsed() > duration / 5 {
            times.push(before.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(times)
}

/// How many streams were opened, answered and closed.
async fn short_streams(
    connection: &Connection,
    parallel: usize,
    duration: Duration,
) -> Outcome<u64> {
    let deadline = Instant::now() + duration;
    let mut tasks = JoinSet::new();
    for task in 0..parallel {
        let connection = connection.clone();
        tasks.spawn(async move {
            let mut data = [task as u8; SMALL];
            data[0] = SHORT;
            let mut count = 0u64;
            while Instant::now() < deadline {
                data[8..16].copy_from_slice(&count.to_be_bytes());
                let (mut send, mut recv) = connection.open_bi().await?;
                send.write_all(&data).await?;
                send.finish()?;
                if recv.read_to_end(8).await? != hash(&data[1..]) {
                    return Err("other bytes than were sent".into());
                }
                count += 1;
            }
            Outcome::Ok(count)
        });
    }
    let mut count = 0;
    while let Some(done) = tasks.join_next().await {
        count += done??;
    }
    Ok(count)
}

async fn stream(
    connection: Connection,
    pattern: Arc<Pattern>,
    bytes: u64,
    streams: u64,
    chunk: usize,
) -> Outcome<()> {
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(&[COUNT]).await?;
    send.write_all(&(bytes * streams).to_be_bytes()).await?;
    send.write_all(&streams.to_be_bytes()).await?;
    let mut place = 0;
    while place < bytes {
        let size = (bytes - place).min(chunk as u64) as usize;
        let piece = pattern.at(place, size);
        send.write_all(piece).await?;
        place += piece.len() as u64;
    }
    send.finish()?;
    let mut total = [0; 8];
    recv.read_exact(&mut total).await?;
    if u64::from_be_bytes(total) != bytes {
        return Err("the server counted other bytes than were sent".into());
    }
    Ok(())
}

/// Opens idle streams until the server holds so many.
async fn hold(
    connection: &Connection,
    held: &mut Vec<(SendStream, RecvStream)>,
    count: usize,
) -> Outcome<()> {
    while held.len() < count {
        let (mut send, recv) = connection.open_bi().await?;
        send.write_all(&[IDLE]).await?;
        held.push((send, recv));
    }
    while ask(connection).await?.held < count as u64 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

struct Seen {
    held: u64,
    datagrams: u64,
    /// Microseconds from the first to the last datagram.
    took: u64,
    /// Datagrams that the server's Quinn has had.
    arrived: u64,
    fairness: f64,
    /// How far a stream was from an even share at most.
    uneven: f64,
}

async fn ask(connection: &Connection) -> Outcome<Seen> {
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(&[ASK]).await?;
    send.finish()?;
    let mut numbers = [0; 6];
    for number in &mut numbers {
        let mut bytes = [0; 8];
        recv.read_exact(&mut bytes).await?;
        *number = u64::from_be_bytes(bytes);
    }
    let [held, datagrams, took, arrived, fairness, uneven] = numbers;
    Ok(Seen {
        held,
        datagrams,
        took,
        arrived,
        fairness: fairness as f64 / 1e6,
        uneven: uneven as f64 / 1e6,
    })
}
