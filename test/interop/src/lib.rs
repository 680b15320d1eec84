//! What the peers share: how they are told what to do, and how they say what came of it.
//!
//!     PEER server OPTIONS    serves until its standard input ends
//!     PEER client OPTIONS    obeys the lines of its standard input, each a JSON list
//!
//! The options are a JSON object, what is said are Erlang terms. A stream begins with a letter: `e` is
//! echoed, `h` answered with the SHA-256 of what follows it, `g` and a count of 8 bytes answered with so
//! many bytes, `r` and `s` with 8 bytes reset and stopped with that code, `x` with 8 bytes closes the
//! connection. A unidirectional stream is answered by another one with the SHA-256 of all of it, a
//! datagram by itself.

use std::io::Write;

use serde_json::Value;
use sha2::{Digest, Sha256};

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// What the test asks of a peer.
pub struct Options(Value);

impl Options {
    /// The role and the options of the command line.
    pub fn from_arguments() -> Result<(String, Self), Error> {
        let mut arguments = std::env::args().skip(1);
        let role = arguments.next().ok_or("no role")?;
        let options = serde_json::from_str(&arguments.next().ok_or("no options")?)?;
        Ok((role, Options(options)))
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.0[key].as_str()
    }

    pub fn is_set(&self, key: &str) -> bool {
        self.0[key].as_bool().unwrap_or(false)
    }

    pub fn port(&self) -> u16 {
        self.0["port"]
            .as_u64()
            .and_then(|port| port.try_into().ok())
            .unwrap_or(0)
    }

    pub fn alpn(&self) -> &str {
        self.text("alpn").unwrap_or("interop")
    }
}

/// A command with its arguments.
pub struct Command(Vec<Value>);

impl Command {
    pub fn parse(line: &str) -> Result<Self, Error> {
        Ok(Command(serde_json::from_str(line)?))
    }

    pub fn name(&self) -> &str {
        self.0.first().and_then(Value::as_str).unwrap_or("")
    }

    pub fn number(&self, index: usize) -> u64 {
        self.0.get(index).and_then(Value::as_u64).unwrap_or(0)
    }

    pub fn size(&self, index: usize) -> usize {
        self.number(index) as usize
    }

    pub fn text(&self, index: usize) -> &str {
        self.0.get(index).and_then(Value::as_str).unwrap_or("")
    }
}

/// Says `{What, Value}.` to the test.
pub fn say(what: &str, value: impl Into<Value>) {
    let mut out = std::io::stdout().lock();
    // A test that has gone away hears nothing.
    let _ = writeln!(out, "{{{what}, {}}}.", value.into());
    let _ = out.flush();
}

/// The bytes that all tests send.
pub fn block(size: usize) -> Vec<u8> {
    b"0123456789abcdef"
        .iter()
        .copied()
        .cycle()
        .take(size)
        .collect()
}

/// A letter and the bytes behind it.
pub fn lettered(letter: u8, rest: &[u8]) -> Vec<u8> {
    let mut data = vec![letter];
    data.extend_from_slice(rest);
    data
}

pub fn digest(data: &[u8]) -> Vec<u8> {
    Sha256::digest(data).to_vec()
}

/// The number behind the letter of a request, once it is all there.
pub fn number(request: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(request.get(1..9)?.try_into().ok()?))
}
