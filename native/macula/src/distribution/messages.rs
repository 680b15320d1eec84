//! Every message the distribution sends to a process, and nothing else.

use std::net::{IpAddr, SocketAddr};

use crate::engine::transport::ConnectionError;
use rustler::thread::is_scheduler_thread;
use rustler::{Atom, Encoder, Env, LocalPid, NewBinary, OwnedEnv, Reference, Term};

use super::send::queue::Hold;
use crate::vm::messages::dispatch;

mod atoms {
    rustler::atoms! {
        ok, error,
        closed, timeout, reset, refused, version_mismatch, too_many, protocol_error,
        tls_alert, transport_error, application_closed, internal_error,
        macula_dist_link, macula_dist_refused, macula_dist_data, macula_dist_closed,
        macula_dist_writable, macula_dist_free, macula_dist_socket, gone, replaced, failed,
    }
}

pub(crate) use atoms::{closed, error, ok};

/// Why a connection could not be made, or ended.
#[derive(Debug, Clone)]
pub(crate) enum Why {
    Closed,
    Timeout,
    Reset,
    Refused,
    /// What the system says, by its POSIX name.
    System(Atom),
    /// The peer broke this rule.
    Protocol(String),
    TooMany,
    Alert(u64),
    Transport(u64),
    Application(u64),
    Version,
    /// A task of ours has panicked.
    Internal,
}

impl From<&ConnectionError> for Why {
    fn from(e: &ConnectionError) -> Self {
        match e {
            ConnectionError::VersionMismatch => Why::Version,
            ConnectionError::TransportError(e) => Why::transport(e.code),
            ConnectionError::ConnectionClosed(e) => Why::transport(e.error_code),
            ConnectionError::ApplicationClosed(e) => Why::Application(e.error_code.into_inner()),
            ConnectionError::Reset => Why::Reset,
            ConnectionError::TimedOut => Why::Timeout,
            ConnectionError::LocallyClosed => Why::Closed,
            ConnectionError::CidsExhausted => Why::TooMany,
        }
    }
}

impl Why {
    fn transport(code: quinn_proto::TransportErrorCode) -> Self {
        const CONNECTION_REFUSED: u64 = 2;
        match u64::from(code) {
            code @ 0x100..0x200 => Why::Alert(code - 0x100),
            CONNECTION_REFUSED => Why::Refused,
            code => Why::Transport(code),
        }
    }
}

impl Encoder for Why {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Why::Closed => atoms::closed().encode(env),
            Why::Timeout => atoms::timeout().encode(env),
            Why::Reset => atoms::reset().encode(env),
            Why::Refused => atoms::refused().encode(env),
            Why::System(posix) => posix.encode(env),
            Why::Protocol(rule) => (atoms::protocol_error(), rule).encode(env),
            Why::TooMany => atoms::too_many().encode(env),
            Why::Version => atoms::version_mismatch().encode(env),
            Why::Internal => atoms::internal_error().encode(env),
            Why::Alert(alert) => (atoms::tls_alert(), alert).encode(env),
            Why::Transport(code) => (atoms::transport_error(), code).encode(env),
            Why::Application(code) => (atoms::application_closed(), code).encode(env),
        }
    }
}

/// `{{A, B, C, D}, Port}` and the like, as `inet` has it; with the number of the interface behind
/// them where the address counts on one link only.
pub(crate) fn address<'a>(env: Env<'a>, addr: SocketAddr) -> Term<'a> {
    let ip = match addr.ip() {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            (a, b, c, d).encode(env)
        }
        IpAddr::V6(ip) => {
            let parts: Vec<Term> = ip.segments().iter().map(|part| part.encode(env)).collect();
            rustler::types::tuple::make_tuple(env, &parts)
        }
    };
    match addr {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => (ip, v6.port(), v6.scope_id()).encode(env),
        _ => (ip, addr.port()).encode(env),
    }
}

/// A binary with these bytes.
pub(crate) fn binary<'a>(env: Env<'a>, bytes: &[u8]) -> Term<'a> {
    let mut binary = NewBinary::new(env, bytes.len());
    binary.as_mut_slice().copy_from_slice(bytes);
    binary.into()
}

/// The one answer to a request that takes time: `{Ref, Result}`. One that is dropped unanswered
/// says `{error, closed}`, or `{error, internal_error}` after a panic, so nobody waits for a task that
/// is gone.
pub(crate) struct Reply {
    pid: LocalPid,
    /// Empty once answered.
    waiting: Option<(OwnedEnv, rustler::env::SavedTerm)>,
}

impl Reply {
    pub(crate) fn new(pid: LocalPid, reference: Reference<'_>) -> Self {
        let env = OwnedEnv::new();
        let saved = env.save(reference);
        Self {
            pid,
            waiting: Some((env, saved)),
        }
    }

    pub(crate) fn send<F>(mut self, build: F)
    where
        F: for<'a> FnOnce(Env<'a>) -> Term<'a>,
    {
        self.answer(build);
    }

    fn answer<F>(&mut self, build: F)
    where
        F: for<'a> FnOnce(Env<'a>) -> Term<'a>,
    {
        if let Some((env, saved)) = &mut self.waiting {
            let saved = saved.clone();
            // A dead requester needs no answer.
            let _ = dispatch(env, &self.pid, |env| {
                (saved.load(env), build(env)).encode(env)
            });
            // Only now: where the building panics the requester is still to be answered.
            self.waiting = None;
        }
    }

    pub(crate) fn ok(self, bytes: &[u8]) {
        self.send(|env| (atoms::ok(), binary(env, bytes)).encode(env));
    }

    pub(crate) fn link(self, link: impl Encoder) {
        self.send(|env| (atoms::ok(), link).encode(env));
    }

    pub(crate) fn error(self, why: &Why) {
        self.send(|env| (atoms::error(), why).encode(env));
    }

    /// Forgets the request: the caller is told by the NIF's own result.
    pub(crate) fn forget(mut self) {
        self.waiting = None;
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let why = match std::thread::panicking() {
            // The result of a NIF that panics tells the caller.
            true if is_scheduler_thread() => return,
            true => Why::Internal,
            false => Why::Closed,
        };
        self.answer(|env| (atoms::error(), why).encode(env));
    }
}

/// `{macula_dist_link, Link, Address}`: a peer has made a connection; nothing is known of it yet.
pub(crate) fn link(pid: &LocalPid, link: impl Encoder, peer: SocketAddr) -> bool {
    dispatch(&mut OwnedEnv::new(), pid, |env| {
        (atoms::macula_dist_link(), link, address(env, peer)).encode(env)
    })
    .is_ok()
}

/// `{macula_dist_refused, Address, Why}`: somebody tried and did not get as far as a link.
pub(crate) fn refused(pid: &LocalPid, peer: SocketAddr, why: &Why) {
    let _ = dispatch(&mut OwnedEnv::new(), pid, |env| {
        (atoms::macula_dist_refused(), address(env, peer), why).encode(env)
    });
}

/// What becomes of a node's socket.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SocketNews {
    /// Another is looked for.
    Gone,
    Replaced,
    /// What serves it has failed, and begins anew.
    Failed,
}

/// `{macula_dist_socket, gone | replaced | failed, Address}`.
pub(crate) fn socket(pid: &LocalPid, news: SocketNews, local: SocketAddr) {
    let _ = dispatch(&mut OwnedEnv::new(), pid, |env| {
        let news = match news {
            SocketNews::Gone => atoms::gone(),
            SocketNews::Replaced => atoms::replaced(),
            SocketNews::Failed => atoms::failed(),
        };
        (atoms::macula_dist_socket(), news, address(env, local)).encode(env)
    });
}

/// `{macula_dist_data, Packets, Cost}`: packets in order; `Cost` is to be given back as credit.
pub(crate) fn data<F>(env: &mut OwnedEnv, pid: &LocalPid, cost: usize, build: F) -> bool
where
    F: for<'a> FnOnce(Env<'a>) -> Vec<Term<'a>>,
{
    dispatch(env, pid, |env| {
        (atoms::macula_dist_data(), build(env), cost).encode(env)
    })
    .is_ok()
}

/// The input process of a link. It is told once of the end, also where its link has ended before anybody
/// has taken note of it.
pub(crate) struct Input {
    pid: LocalPid,
    told: bool,
}

impl Input {
    pub(crate) fn new(pid: LocalPid) -> Self {
        Self { pid, told: false }
    }

    pub(crate) fn pid(&self) -> &LocalPid {
        &self.pid
    }

    /// `{macula_dist_closed, Why}`: the last message of a link, after all its data.
    pub(crate) fn close(mut self, why: &Why) {
        self.tell(why);
    }

    /// The result of its call tells the process.
    pub(crate) fn forget(mut self) {
        self.told = true;
    }

    fn tell(&mut self, why: &Why) {
        self.told = true;
        let _ = dispatch(&mut OwnedEnv::new(), &self.pid, |env| {
            (atoms::macula_dist_closed(), why).encode(env)
        });
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if !self.told {
            self.tell(&Why::Closed);
        }
    }
}

/// `macula_dist_writable`: the send queue has room again.
pub(crate) fn writable(pid: &LocalPid) {
    let _ = dispatch(&mut OwnedEnv::new(), pid, |env| {
        atoms::macula_dist_writable().encode(env)
    });
}

/// `{macula_dist_free, [{Number, Serial, Hold}]}`: these senders need not wait any longer.
pub(crate) fn free(pid: &LocalPid, holds: &[Hold]) {
    let numbers: Vec<(u32, u32, u64)> = holds.iter().map(|hold| hold.numbers()).collect();
    let _ = dispatch(&mut OwnedEnv::new(), pid, |env| {
        (atoms::macula_dist_free(), numbers).encode(env)
    });
}
