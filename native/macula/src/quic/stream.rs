//! Streams: the handle, its NIFs, and what its two halves share.
//!
//! Each half is served in turns by the worker of its connection. NIFs only write down what is wanted, and ring for
//! a turn: no NIF ever takes the connection's lock.
//!
//! What ends a stream: both halves are over (finished and acknowledged, read to the end, reset,
//! stopped, or the connection is lost): then the owner gets `stream_closed`, once. When the owner
//! dies, what it has not finished is reset; when the handle is collected, it is finished. Both stop
//! reading.

mod home;
mod read;
mod write;

pub(crate) use home::{Home, Keep};

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use crate::engine::transport::{ConnectionError, RecvStream, SendStream, VarInt};
use rustler::{
    Atom, Binary, Encoder, Env, ListIterator, LocalPid, Monitor, Resource, ResourceArc, Term,
};

use crate::quic::options::varint;
use crate::vm::active::Active;
use crate::vm::error::{self, Ended};
use crate::vm::messages::{Gone, atoms, event};
use crate::vm::objects::{Counted, Kind};
use crate::vm::owner::{Owner, TransferError};
use crate::vm::reply::{Reply, Subject};
use crate::vm::tasks::{Held, attempt};
use crate::vm::turns::{self, Half, Turns};

/// The handle.
pub(crate) struct Stream {
    inner: Arc<Inner>,
    _keep: Arc<dyn Keep>,
}

#[rustler::resource_impl]
impl Resource for Stream {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, monitor: Monitor) {
        if self.inner.owner.is_down(monitor) {
            self.inner.abandon();
        }
    }
}

impl Subject for ResourceArc<Stream> {
    fn cancelled(&self) {
        self.inner.read.cancelled();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.inner.leave();
    }
}

pub(crate) struct Inner {
    pub(crate) owner: Owner<Stream>,
    write: write::Shared,
    read: read::Shared,
    id: u64,
    open_halves: AtomicU8,
    /// Closed by its user: pinned until it is over.
    closing: AtomicBool,
    /// A turn of a half has panicked.
    failed: AtomicBool,
    /// Why the connection took the stream down, if it did.
    lost: Mutex<Option<Box<ConnectionError>>>,
    /// It was early data, which the peer did not take.
    rejected: AtomicBool,
    connection: Arc<dyn Home>,
    _counted: Counted,
}

impl Turns for Inner {
    fn ring(self: Arc<Self>, half: Half) {
        match half {
            Half::Sending => self.write.ring(),
            Half::Receiving => self.read.ring(),
        }
    }

    fn turn(self: Arc<Self>, half: Half) {
        let waker = turns::waker(self.clone(), half);
        let mut cx = Context::from_waker(&waker);
        // A half that fails has said so before.
        let _ = attempt(|| match half {
            Half::Sending => write::turn(&self, &mut cx),
            Half::Receiving => read::turn(&self, &mut cx),
        });
    }
}

/// How much a stream queues natively before its senders wait, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watermarks {
    pub(crate) high: usize,
    pub(crate) low: usize,
}

/// A stream as QUIC gives it: one half may be missing.
pub(crate) struct Halves {
    pub(crate) send: Option<Held<SendStream>>,
    pub(crate) recv: Option<Held<RecvStream>>,
    pub(crate) id: u64,
}

/// Nobody has got it: the peer must not take its end for that of a stream that was finished, as it
/// would when QUIC drops it.
impl Drop for Halves {
    fn drop(&mut self) {
        if let Some(send) = &mut self.send {
            // Fails only on a stream that is closed.
            let _ = attempt(|| send.reset(VarInt::from_u32(0)));
        }
    }
}

impl Halves {
    pub(crate) fn bi((send, recv): (SendStream, RecvStream)) -> Self {
        let id = u64::from(VarInt::from(send.id()));
        Halves {
            send: Some(Held::new(send)),
            recv: Some(Held::new(recv)),
            id,
        }
    }

    pub(crate) fn uni_out(send: SendStream) -> Self {
        let id = u64::from(VarInt::from(send.id()));
        Halves {
            send: Some(Held::new(send)),
            recv: None,
            id,
        }
    }

    pub(crate) fn uni_in(recv: RecvStream) -> Self {
        let id = u64::from(VarInt::from(recv.id()));
        Halves {
            send: None,
            recv: Some(Held::new(recv)),
            id,
        }
    }
}

/// Makes the handle of a stream for `owner`, and starts what serves it. `Gone` if the owner is
/// dead: then the stream is reset.
pub(crate) fn make<'a>(
    env: Env<'a>,
    connection: Arc<dyn Home>,
    keep: Arc<dyn Keep>,
    mut halves: Halves,
    owner: LocalPid,
    active: Active,
    priority: i32,
) -> Result<Term<'a>, Gone> {
    let open = u8::from(halves.send.is_some()) + u8::from(halves.recv.is_some());
    let inner = Arc::new_cyclic(|inner| Inner {
        owner: Owner::new(owner),
        write: write::Shared::new(
            inner.clone(),
            halves.send.is_some(),
            connection.watermarks(),
            priority,
        ),
        read: read::Shared::new(inner.clone(), halves.recv.is_some(), active),
        id: halves.id,
        open_halves: AtomicU8::new(open),
        closing: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        lost: Mutex::new(None),
        rejected: AtomicBool::new(false),
        connection: connection.clone(),
        _counted: Counted::new(Kind::Stream),
    });
    let handle = ResourceArc::new(Stream {
        inner: inner.clone(),
        _keep: keep.clone(),
    });
    inner.owner.attach(env, &handle, owner)?;
    let (send, recv) = (halves.send.take(), halves.recv.take());
    if recv.is_some() && active != Active::Off {
        inner.owner.pin(&handle);
    }
    let term = handle.encode(env);
    connection.keep_up_with(inner.id, &inner);
    if let Some(send) = send {
        // What is sent is delivered before the connection may go.
        inner.write.start(send, keep);
    }
    if let Some(recv) = recv {
        inner.read.start(recv);
    }
    Ok(term)
}

impl Inner {
    /// The owner is dead. Runs on VM threads.
    fn abandon(&self) {
        self.write
            .reset(VarInt::from_u32(0), write::Reset::UnlessFinished);
        self.read.stop(VarInt::from_u32(0));
    }

    /// Nobody holds the stream. What was sent is still delivered: when the collector comes is not the sender's to
    /// know. But for the peer an end would make a whole of what a close cuts off.
    fn leave(&self) {
        if self.connection.is_closed_here() {
            self.abandon();
        } else {
            self.write.finish();
            self.read.stop(VarInt::from_u32(0));
        }
    }

    /// Ready at once, or, where the user has closed the connection, when QUIC has done so: what a stream says of its
    /// end must not come before that. True when the peer is still to be told of the end.
    fn may_tell_end(&self, poll_over: impl FnOnce() -> Poll<()>) -> Poll<bool> {
        if !self.connection.is_closed_here() || self.failed() {
            return Poll::Ready(true);
        }
        poll_over().map(|()| false)
    }

    /// Has the worker give a half its turn.
    fn has_turn(self: Arc<Self>, half: Half) {
        let worker = self.connection.worker();
        worker.turn(self, half);
    }

    /// The peer has not taken what was sent early: there is no such stream for the peer.
    fn reject(&self) {
        self.rejected.store(true, Ordering::Release);
    }

    /// A half has failed, and the other one ends with it, or both have.
    pub(crate) fn fail(&self) {
        self.failed.store(true, Ordering::Release);
        self.write.reset(VarInt::from_u32(0), write::Reset::Always);
        self.read.stop(VarInt::from_u32(0));
    }

    fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire) || self.connection.has_failed()
    }

    /// Pins the handle until the stream is over.
    fn closing(&self, handle: &ResourceArc<Stream>) {
        self.closing.store(true, Ordering::Release);
        self.owner.pin(handle);
    }

    /// Unpins the handle as its reader has nothing more to promise.
    fn take_pin(&self) -> Option<ResourceArc<Stream>> {
        if self.closing.load(Ordering::Acquire) {
            return None;
        }
        self.owner.take_pin()
    }

    /// One half is over.
    fn half_over(&self, lost: Option<Box<ConnectionError>>) {
        if let Some(error) = lost {
            let error = Box::new(self.connection.ended(*error));
            *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
        if self.open_halves.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        self.connection.is_over(self.id, self);
        self.read.tell_end(&self.owner);
        let lost = self
            .lost
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let failed = self.failed();
        let rejected = self.rejected.load(Ordering::Acquire);
        let closing = self.closing.load(Ordering::Acquire);
        self.owner.post_terminal(move |env, handle, _| {
            let reason = match &lost {
                Some(error) => Ended(error).encode(env),
                None if rejected => atoms::early_data_rejected().encode(env),
                None if failed => atoms::internal_error().encode(env),
                None => atoms::normal().encode(env),
            };
            let status = match &lost {
                Some(error) => error::status(error),
                None if rejected => atoms::early_data_rejected(),
                None if failed => atoms::internal_error(),
                None => atoms::success(),
            };
            let of_connection = |asked: fn(&ConnectionError) -> bool| {
                lost.as_deref().is_some_and(asked).encode(env)
            };
            let info = Term::map_from_pairs(
                env,
                &[
                    (atoms::reason(), reason),
                    (atoms::is_conn_shutdown(), lost.is_some().encode(env)),
                    (atoms::is_app_closing(), closing.encode(env)),
                    (
                        atoms::is_shutdown_by_app(),
                        of_connection(error::closed_by_application),
                    ),
                    (
                        atoms::is_closed_remotely(),
                        of_connection(error::closed_remotely),
                    ),
                    (atoms::status(), status.encode(env)),
                    (
                        atoms::error(),
                        lost.as_deref().map_or(0, error::code).encode(env),
                    ),
                ],
            )
            .ok()?;
            Some(event(env, atoms::stream_closed(), handle, info))
        });
    }

    fn is_bidirectional(&self) -> bool {
        self.id & 0x2 == 0
    }

    fn is_opened_by_server(&self) -> bool {
        self.id & 0x1 == 1
    }
}

/// Queues the binaries of an iovec. `Mode` says what to do over the high-water mark: `wait` until
/// it drained, `busy` with a message later, or `now`, which is `full`. `Fin` finishes the stream after
/// them.
#[rustler::nif]
fn stream_send<'a>(
    env: Env<'a>,
    stream: ResourceArc<Stream>,
    reference: Term<'a>,
    data: ListIterator<'a>,
    fin: bool,
    mode: Atom,
) -> rustler::NifResult<Term<'a>> {
    let (binaries, size) = crate::vm::payload::iovec(data)?;
    let inner = &stream.inner;
    let mut wait = None;
    let full = || {
        if mode == atoms::now() {
            return None;
        }
        Some(if mode == atoms::wait() {
            let (reply, operation) = Reply::about(env, reference, stream.clone());
            wait = Some(operation);
            write::Waiter::Answer(reply)
        } else {
            write::Waiter::Promise(env.pid())
        })
    };
    let is_open = !inner.connection.is_closed_here();
    let result = match inner.write.push(is_open, &binaries, size, fin, full) {
        Ok(()) => {
            inner.connection.queued(size);
            atoms::ok().encode(env)
        }
        Err(write::PushError::Full) => match wait {
            Some(operation) => (atoms::wait(), operation).encode(env),
            None if mode == atoms::now() => atoms::full().encode(env),
            None => (atoms::error(), atoms::busy()).encode(env),
        },
        Err(write::PushError::Stopped(code)) => {
            (atoms::error(), (atoms::stopped(), code.into_inner())).encode(env)
        }
        Err(write::PushError::Failed) => (atoms::error(), atoms::internal_error()).encode(env),
        Err(write::PushError::Rejected) => {
            (atoms::error(), atoms::early_data_rejected()).encode(env)
        }
        Err(write::PushError::Closed) => (atoms::error(), atoms::closed()).encode(env),
    };
    Ok(result)
}

/// Asks for exactly `len` bytes, or for what there is if `len` is 0. With `now` the answer is `timeout`
/// where these bytes have not come yet: only the half's turn knows.
#[rustler::nif]
fn stream_recv<'a>(
    env: Env<'a>,
    stream: ResourceArc<Stream>,
    reference: Term<'a>,
    len: usize,
    now: bool,
) -> Term<'a> {
    let (reply, operation) = Reply::about(env, reference, stream.clone());
    match stream.inner.read.request(reply, len, now) {
        Ok(()) => (atoms::ok(), operation).encode(env),
        Err((reply, reason)) => {
            reply.forget();
            (atoms::error(), reason).encode(env)
        }
    }
}

/// `Mode` is a boolean, `once`, or a number to add to what is left.
#[rustler::nif]
fn stream_set_active<'a>(env: Env<'a>, stream: ResourceArc<Stream>, mode: Term<'a>) -> Term<'a> {
    let inner = &stream.inner;
    let result = match Active::decode(mode) {
        Some(change) => inner.read.set_active(env, change, &stream),
        None => Err(atoms::einval()),
    };
    match result {
        Ok(()) => atoms::ok().encode(env),
        Err(reason) => (atoms::error(), reason).encode(env),
    }
}

#[rustler::nif]
fn stream_set_priority(stream: ResourceArc<Stream>, priority: i32) -> bool {
    stream.inner.write.set_priority(priority)
}

/// How much the stream queues natively before its senders wait, and down to how much.
#[rustler::nif]
fn stream_set_watermarks(stream: ResourceArc<Stream>, high: usize, low: usize) -> bool {
    stream.inner.write.set_watermarks(Watermarks { high, low })
}

/// The peer learns of the stream before anything is sent on it.
#[rustler::nif]
fn stream_announce(stream: ResourceArc<Stream>) -> bool {
    stream.inner.write.announce()
}

/// The owner is told when the peer has acknowledged all that was sent before.
#[rustler::nif]
fn stream_tell_delivered(env: Env<'_>, stream: ResourceArc<Stream>) -> bool {
    match stream.inner.write.tell_delivered() {
        write::Delivery::Awaited => true,
        write::Delivery::Done => stream
            .inner
            .owner
            .post_from_nif(env, &stream, write::delivered),
        write::Delivery::CutOff => false,
    }
}

/// Finishes sending what is queued, and stops reading.
#[rustler::nif]
fn stream_close(stream: ResourceArc<Stream>) -> Atom {
    // The message that it is closed is owed even if the handle is dropped now.
    stream.inner.closing(&stream);
    stream.inner.write.finish();
    stream.inner.read.stop(VarInt::from_u32(0));
    atoms::ok()
}

/// Any of: `finish`, `reset` with a code, `stop` with a code.
#[rustler::nif]
fn stream_shutdown(
    stream: ResourceArc<Stream>,
    finish: bool,
    reset: bool,
    stop: bool,
    code: u64,
) -> Atom {
    let inner = &stream.inner;
    if reset {
        inner.write.reset(varint(code), write::Reset::Always);
    } else if finish {
        inner.write.finish();
    }
    if stop {
        inner.read.stop(varint(code));
    }
    atoms::ok()
}

#[rustler::nif]
fn stream_begin_transfer<'a>(env: Env<'a>, stream: ResourceArc<Stream>, to: LocalPid) -> Term<'a> {
    begun(env, stream.inner.owner.begin_transfer(env, &stream, to))
}

#[rustler::nif]
fn stream_commit_transfer(env: Env, stream: ResourceArc<Stream>) -> Atom {
    if !stream.inner.owner.commit_transfer(env, &stream) {
        stream.inner.abandon();
    }
    atoms::ok()
}

pub(crate) fn begun(env: Env<'_>, result: Result<(), TransferError>) -> Term<'_> {
    match result {
        Ok(()) => atoms::ok().encode(env),
        Err(TransferError::NotOwner) => (atoms::error(), atoms::not_owner()).encode(env),
        Err(TransferError::NoProcess) => (atoms::error(), atoms::noproc()).encode(env),
    }
}

#[rustler::nif]
fn stream_info<'a>(env: Env<'a>, stream: ResourceArc<Stream>) -> rustler::NifResult<Term<'a>> {
    let inner = &stream.inner;
    let direction = if inner.is_bidirectional() {
        atoms::bidirectional()
    } else {
        atoms::unidirectional()
    };
    let initiator = if inner.is_opened_by_server() {
        atoms::server()
    } else {
        atoms::client()
    };
    let state = if inner.owner.has_ended() {
        atoms::closed()
    } else {
        atoms::open()
    };
    Term::map_from_pairs(
        env,
        &[
            (atoms::handle(), atoms::stream().encode(env)),
            (atoms::state(), state.encode(env)),
            (atoms::stream_id(), inner.id.encode(env)),
            (atoms::direction(), direction.encode(env)),
            (atoms::initiator(), initiator.encode(env)),
            (atoms::owner(), inner.owner.pid().encode(env)),
            (atoms::active(), inner.read.active().encode(env)),
            (atoms::send_pend(), inner.write.queued().encode(env)),
        ],
    )
}

/// Whether a term is a live handle of a stream.
#[rustler::nif]
fn stream_is(term: Term) -> bool {
    term.decode::<ResourceArc<Stream>>().is_ok()
}

/// The binaries of a send, as the write half takes them.
type Pieces<'p, 'a> = &'p [Binary<'a>];
