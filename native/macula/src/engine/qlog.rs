//! Logs of connections in qlog's format (JSON text sequences, RFC 7464), a file for each. `quinn-proto` writes them
//! where it drives a connection, and a disk may be slow: so what is written waits in memory, within bounds,
//! for a thread of its own.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use quinn_proto::RandomConnectionIdGenerator;
use quinn_proto::{ConnectionId, ConnectionIdGenerator, QlogConfig, QlogStream, TransportConfig};

use crate::vm::fault::{self, Point};
use crate::vm::tasks::attempt;

/// Bytes of one connection that may wait for the disk. Records beyond are lost, and their number logged.
const WAITING: usize = 1 << 20;
/// Files whose names differ by their number alone: connection ids are the clients' choice.
const NAMESAKES: usize = 100;

/// The longest id there is.
const MAX_CID_SIZE: usize = 20;

/// Files that could not be written.
static FAILED: AtomicU64 = AtomicU64::new(0);
/// Records that found no room, or no file.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Files that could not be written, and records that are lost.
pub(crate) fn failures() -> (u64, u64) {
    (FAILED.load(Ordering::Relaxed), LOST.load(Ordering::Relaxed))
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    Client,
    Server,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Side::Client => "client",
            Side::Server => "server",
        }
    }
}

/// A directory in which files can be made.
#[derive(Debug, Clone)]
pub(crate) struct Directory {
    path: Arc<Path>,
    writer: mpsc::Sender<Arc<Log>>,
}

impl Directory {
    /// Fails, at once, where no file can be made.
    pub(crate) fn open(path: &str) -> io::Result<Self> {
        static PROBES: AtomicU64 = AtomicU64::new(0);
        let number = PROBES.fetch_add(1, Ordering::Relaxed);
        let name = format!(".qlog-{}-{number}", std::process::id());
        let probe = Path::new(path).join(name);
        create(&probe)?;
        fs::remove_file(&probe)?;
        Ok(Directory {
            path: Path::new(path).into(),
            writer: writer()?,
        })
    }

    /// The log of a new connection: `ID-client.sqlog` or `ID-server.sqlog`, with the id to which the
    /// client's first packet goes.
    pub(crate) fn log(&self, id: &ConnectionId, side: Side) -> Option<QlogStream> {
        let sink = Sink {
            log: Arc::new(Log {
                path: self.path.join(format!("{id}-{}", side.name())),
                state: Mutex::default(),
            }),
            writer: self.writer.clone(),
            record: Vec::new(),
            begun: Instant::now(),
        };
        let mut config = QlogConfig::default();
        config
            .writer(Box::new(sink))
            .title(Some(String::from("macula_quic")))
            .description(Some(String::from(side.name())));
        config.into_stream()
    }
}

/// Has connections with this configuration, which is to be one, write its log.
pub(crate) fn attach(config: &mut Arc<TransportConfig>, log: Option<QlogStream>) {
    if let Some(config) = Arc::get_mut(config) {
        config.qlog_stream(log);
    }
}

/// An id for the first packet of a client to go to (RFC 9000, section 7.2).
pub(crate) fn first_id() -> ConnectionId {
    RandomConnectionIdGenerator::new(MAX_CID_SIZE).generate_cid()
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    // It says who talks to whom.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// The thread that writes, started by the first who needs it.
fn writer() -> io::Result<mpsc::Sender<Arc<Log>>> {
    static WRITER: Mutex<Option<mpsc::Sender<Arc<Log>>>> = Mutex::new(None);
    let mut writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(writer) = &*writer {
        return Ok(writer.clone());
    }
    let (sender, logs) = mpsc::channel::<Arc<Log>>();
    std::thread::Builder::new()
        .name(String::from("macula_qlog"))
        .spawn(move || {
            // Each log is in this queue once at most.
            for log in logs {
                log.write();
            }
        })?;
    Ok(writer.insert(sender).clone())
}

/// One file, and what waits for it.
#[derive(Debug)]
struct Log {
    /// Without its extension.
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whole records.
    waiting: Vec<u8>,
    /// Records that found no room since the last one that did.
    lost: u64,
    /// The thread is to look, or looks.
    called: bool,
    file: Option<File>,
    failed: bool,
}

impl Log {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the thread write a record, or counts it as lost. True if the thread must be called.
    fn push(&self, record: &[u8], since: Instant) -> bool {
        let mut state = self.state();
        if state.failed || state.waiting.len() + record.len() > WAITING {
            state.lost += 1;
            LOST.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        state.tell_lost(since);
        state.waiting.extend_from_slice(record);
        !std::mem::replace(&mut state.called, true)
    }

    fn write(&self) {
        loop {
            let mut state = self.state();
            let waiting = std::mem::take(&mut state.waiting);
            if waiting.is_empty() {
                state.called = false;
                return;
            }
            let file = state.file.take();
            drop(state);
            // A panic is the end of this log alone: the thread is that of all.
            let written = attempt(|| self.append(file, &waiting))
                .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
            let mut state = self.state();
            match written {
                Ok(file) => state.file = Some(file),
                Err(_) => {
                    state.failed = true;
                    FAILED.fetch_add(1, Ordering::Relaxed);
                    // What has come meanwhile finds no file either, which is told once.
                    let late = std::mem::take(&mut state.waiting);
                    let bytes = waiting.iter().chain(&late);
                    let records = bytes.filter(|byte| **byte == b'\n').count();
                    LOST.fetch_add(records as u64, Ordering::Relaxed);
                }
            }
        }
    }

    fn append(&self, file: Option<File>, records: &[u8]) -> io::Result<File> {
        fault::pass(Point::Qlog);
        let mut file = match file {
            Some(file) => file,
            None => self.create()?,
        };
        file.write_all(records)?;
        Ok(file)
    }

    fn create(&self) -> io::Result<File> {
        for number in 1..NAMESAKES {
            let mut name = self.path.clone().into_os_string();
            if number > 1 {
                name.push(format!("-{number}"));
            }
            name.push(".sqlog");
            match create(Path::new(&name)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                created => return created,
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }
}

impl State {
    /// Tells it in the file, if there is one.
    fn tell_lost(&mut self, since: Instant) {
        if self.failed {
            return;
        }
        let lost = std::mem::take(&mut self.lost);
        if lost > 0 {
            let time = since.elapsed().as_secs_f64() * 1000.0;
            let record = format!(
                "\u{1e}{{\"time\":{time:.3},\"name\":\"macula:records_lost\",\"data\":{{\"count\":{lost}}}}}\n"
            );
            self.waiting.extend_from_slice(record.as_bytes());
        }
    }
}

/// What records are written to. Records come in pieces, and go on as a whole.
struct Sink {
    log: Arc<Log>,
    writer: mpsc::Sender<Arc<Log>>,
    record: Vec<u8>,
    begun: Instant,
}

impl Sink {
    fn call(&self) {
        // Fails only once the thread has ended: then the bound holds, and the rest is lost.
        let _ = self.writer.send(self.log.clone());
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.record.extend_from_slice(bytes);
        // There is none within a record: JSON escapes it.
        if bytes.last() == Some(&b'\n') {
            if self.log.push(&self.record, self.begun) {
                self.call();
            }
            self.record.clear();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        let mut state = self.log.state();
        state.tell_lost(self.begun);
        let call = !state.waiting.is_empty() && !std::mem::replace(&mut state.called, true);
        drop(state);
        if call {
            self.call();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sink(path: PathBuf) -> (Sink, mpsc::Receiver<Arc<Log>>) {
        let (writer, logs) = mpsc::channel();
        let log = Arc::new(Log {
            path,
            state: Mutex::default(),
        });
        let begun = Instant::now();
        let record = Vec::new();
        (
            Sink {
                log,
                writer,
                record,
                begun,
            },
            logs,
        )
    }

    fn directory(name: &str) -> io::Result<PathBuf> {
        let dir = std::env::temp_dir().join(format!("macula-qlog-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    #[test]
    fn records_wait_within_bounds_and_the_lost_are_counted() -> io::Result<()> {
        let dir = directory("bounds")?;
        let (mut sink, logs) = sink(dir.join("log"));
        let record = [vec![b'x'; 1023], vec![b'\n']].concat();
        for _ in 0..1024 + 10 {
            sink.write_all(&record)?;
        }
        assert_eq!(sink.log.state().waiting.len(), WAITING);
        logs.try_recv().map_err(io::Error::other)?.write();
        assert!(logs.try_recv().is_err(), "a log is in the queue once");
        sink.write_all(&record)?;
        drop(sink);
        logs.try_recv().map_err(io::Error::other)?.write();
        let written = fs::read_to_string(dir.join("log.sqlog"))?;
        assert_eq!(written.lines().count(), 1024 + 2);
        assert!(written.contains("\"data\":{\"count\":10}"));
        fs::remove_dir_all(dir)
    }

    #[test]
    fn a_file_that_fails_is_counted_once_whatever_comes_meanwhile() -> io::Result<()> {
        const FILES: u64 = 2000;
        let gone = directory("gone")?.join("nowhere");
        let (failed, lost) = failures();
        for number in 0..FILES {
            let (mut sink, logs) = sink(gone.join(number.to_string()));
            let writer = std::thread::spawn(move || logs.iter().for_each(|log| log.write()));
            for _ in 0..20 {
                sink.write_all(b"x\n")?;
            }
            drop(sink);
            writer.join().expect("no panic");
        }
        let (now_failed, now_lost) = failures();
        assert_eq!((FILES, 20 * FILES), (now_failed - failed, now_lost - lost));
        Ok(())
    }

    #[test]
    fn a_record_in_pieces_goes_on_as_a_whole() -> io::Result<()> {
        let dir = directory("pieces")?;
        let (mut sink, logs) = sink(dir.join("log"));
        sink.write_all(b"\x1e{\"a\":")?;
        assert!(logs.try_recv().is_err());
        sink.write_all(b"1}\n")?;
        logs.try_recv().map_err(io::Error::other)?.write();
        assert_eq!(fs::read(dir.join("log.sqlog"))?, b"\x1e{\"a\":1}\n");
        fs::remove_dir_all(dir)
    }

    #[test]
    fn namesakes_do_not_meet() -> io::Result<()> {
        let dir = directory("namesakes")?;
        for _ in 0..2 {
            let (mut sink, logs) = sink(dir.join("log"));
            sink.write_all(b"record\n")?;
            logs.try_recv().map_err(io::Error::other)?.write();
        }
        for name in ["log.sqlog", "log-2.sqlog"] {
            assert_eq!(fs::read(dir.join(name))?, b"record\n");
        }
        fs::remove_dir_all(dir)
    }
}
