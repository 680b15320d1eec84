//! The secrets of TLS, for tools that decrypt what was captured.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use rustls::KeyLog;

/// Where the secrets of connections go.
#[derive(Debug, Clone, Default)]
pub(crate) enum Secrets {
    #[default]
    Nowhere,
    /// The file that `SSLKEYLOGFILE` names.
    Environment,
    File(Arc<SecretsFile>),
}

impl Secrets {
    /// What rustls is told to log to, if to anything.
    pub(crate) fn log(&self) -> Option<Arc<dyn KeyLog>> {
        match self {
            Secrets::Nowhere => None,
            Secrets::Environment => Some(Arc::new(rustls::KeyLogFile::new())),
            Secrets::File(file) => Some(file.clone()),
        }
    }

    /// Appends to a file, which is made if there is none. Nobody but its owner may read it then.
    pub(crate) fn file(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        Ok(Secrets::File(Arc::new(SecretsFile(options.open(path)?))))
    }
}

/// A file to which lines are appended, also by others at the same time.
#[derive(Debug)]
pub(crate) struct SecretsFile(File);

impl KeyLog for SecretsFile {
    fn log(&self, label: &str, client_random: &[u8], secret: &[u8]) {
        let line = format!("{label} {} {}\n", hex(client_random), hex(secret));
        // In one piece, so that lines of several writers do not mix. A full disk costs the log, and no
        // connection.
        let _ = (&self.0).write_all(line.as_bytes());
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
