//! Quinn alone: the work of `bench/macula_bench_quic.erl` without a VM, between two processes on
//! loopback.
//!
//! `quinn_bare ROW [KEY=VALUE ...]` starts its own server process, does the work of one row and
//! prints its measures, one per line: the name and the value. The keys and their defaults are in
//! [`Settings`].

mod client;
mod load;
mod server;
mod setup;

use std::error::Error;
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use tokio::runtime::{Builder, Runtime};

pub(crate) type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// What a row does, and how Quinn is set up for it.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// How long a row lasts that ends by time.
    pub(crate) ms: u64,
    /// How many bytes go, over all streams together.
    pub(crate) bytes: u64,
    /// How many bytes one send takes.
    pub(crate) chunk: usize,
    /// How many streams, senders or dialers work at the same time.
    pub(crate) parallel: usize,
    /// How many idle connections or streams are counted.
    pub(crate) count: usize,
    /// How many streams a client may have open.
    pub(crate) streams: u32,
    /// One thread that runs all, or a runtime with one worker beside the main thread.
    pub(crate) current_thread: bool,
    /// AES-128-GCM preferred, or Quinn's own order, which begins with AES-256-GCM.
    pub(crate) aes128: bool,
    /// The largest UDP payload looked for, where that is not Quinn's default.
    pub(crate) mtu: Option<u16>,
}

impl Settings {
    fn parse(args: &[String]) -> Outcome<Self> {
        let mut settings = Settings {
            ms: 1000,
            bytes: 1 << 30,
            chunk: 64 * 1024,
            parallel: 1,
            count: 1000,
            streams: 100,
            current_thread: true,
            aes128: true,
            mtu: None,
        };
        for arg in args {
            match arg.split_once('=').ok_or("KEY=VALUE is wanted")? {
                ("ms", value) => settings.ms = value.parse()?,
                ("bytes", value) => settings.bytes = value.parse()?,
                ("chunk", value) => settings.chunk = value.parse()?,
                ("parallel", value) => settings.parallel = value.parse()?,
                ("count", value) => settings.count = value.parse()?,
                ("streams", value) => settings.streams = value.parse()?,
                ("runtime", "current") => settings.current_thread = true,
                ("runtime", "multi") => settings.current_thread = false,
                ("cipher", "aes128") => settings.aes128 = true,
                ("cipher", "aes256") => settings.aes128 = false,
                ("mtu", value) => settings.mtu = Some(value.parse()?),
                _ => return Err(format!("unknown: {arg}").into()),
            }
        }
        Ok(settings)
    }

    fn runtime(&self) -> Outcome<Runtime> {
        let mut builder = if self.current_thread {
            Builder::new_current_thread()
        } else {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(1);
            builder
        };
        Ok(builder.enable_all().build()?)
    }

    /// Runs the work on a worker of the runtime. The thread of `block_on` is none: what it waits for
    /// costs a hand-over between threads each time.
    fn run(&self, work: impl Future<Output = Outcome<()>> + Send + 'static) -> Outcome<()> {
        let runtime = self.runtime()?;
        runtime.block_on(async move { tokio::spawn(work).await? })
    }
}

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (row, rest) = args
        .split_first()
        .ok_or("usage: quinn_bare ROW [KEY=VALUE ...]")?;
    let settings = Settings::parse(rest)?;
    if row == "server" {
        return settings.run(server::serve(settings.clone()));
    }
    let mut server = Command::new(std::env::current_exe()?)
        .arg("server")
        .args(rest)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(server.stdout.take().ok_or("no output of the server")?).read_line(&mut line)?;
    let pids = [std::process::id(), server.id()];
    let result = settings.run(client::run(row.clone(), settings.clone(), line, pids));
    // The server ends at the end of its input, also when this process is killed.
    drop(server.stdin.take());
    server.wait()?;
    result
}
