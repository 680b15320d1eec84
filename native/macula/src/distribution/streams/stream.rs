//! One user stream: what its two halves share, and what its owner is told.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::engine::transport::VarInt;
use bytes::{Bytes, BytesMut};
use rustler::{
    Atom, Binary, Encoder, Env, LocalPid, Monitor, OwnedEnv, Resource, ResourceArc, Term,
};

use super::super::messages::Reply;
use super::room::Ticket;
use super::{Carrier, INITIAL_CREDIT, Streams, ahead, atoms};
use crate::vm::active::{Active, OutOfRange};
use crate::vm::bell::Bell;
use crate::vm::messages::Gone;
use crate::vm::objects::{Counted, Kind};
use crate::vm::owner::Owner;
use crate::vm::payload::{Piece, gather, piece, release};
use crate::vm::runtime;

/// A stream takes nothing more with its part of this in its queue, within these limits; those that wait go on below
/// half of it.
const QUEUED: usize = 64 * 1024 * 1024;
const HIGH: (usize, usize) = (16 * 1024, 256 * 1024);
/// Small sends are gathered in pieces of this size.
const GATHER: usize = 64 * 1024;

/// What the VM knows of a stream, to watch its owner. Pinned until the stream is over.
pub(crate) struct UserStream {
    pub(super) inner: Arc<Inner>,
}

#[rustler::resource_impl]
impl Resource for UserStream {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, monitor: Monitor) {
        if self.inner.owner.is_down(monitor) {
            self.inner.cut(End::Abandoned);
        }
    }
}

pub(super) struct Inner {
    pub(super) link: Arc<dyn Carrier>,
    /// QUIC's number.
    pub(super) id: u64,
    pub(super) name: Name,
    pub(super) priority: u8,
    pub(super) owner: Owner<UserStream>,
    pub(super) send_bell: Arc<Bell>,
    pub(super) recv_bell: Arc<Bell>,
    state: Mutex<State>,
    _counted: Counted,
}

/// How the stream is called in messages: `{Tag, Node, Number}`.
#[derive(Clone, Copy)]
pub(super) struct Name {
    pub(super) tag: Atom,
    pub(super) node: Atom,
    pub(super) number: u64,
}

impl Name {
    fn event<'a>(self, env: Env<'a>, event: impl Encoder) -> Term<'a> {
        (self.tag, (self.tag, self.node, self.number), event).encode(env)
    }
}

/// How a stream ends that does not end in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// By one of both sides.
    Reset(VarInt),
    /// The link is gone.
    Lost,
    /// The owner is dead.
    Abandoned,
    /// A task has panicked.
    Failed,
}

struct State {
    chunks: VecDeque<Bytes>,
    gathered: BytesMut,
    /// Bytes that QUIC has not taken yet.
    queued: usize,
    finish: bool,
    waiting: Vec<Reply>,
    /// Bytes taken out of the queue, and how many the peer has room for.
    sent: u64,
    limit: u64,
    /// The peer has told of the stream: it takes no place any more.
    told: bool,
    /// The peer wants no more.
    stopped: Option<VarInt>,
    send_over: bool,
    active: Active,
    recv_fin: bool,
    recv_over: bool,
    end: Option<End>,
}

impl State {
    fn flush(&mut self) {
        if !self.gathered.is_empty() {
            let gathered = self.gathered.split().freeze();
            self.chunks.push_back(gathered);
        }
    }

    /// Why nothing is sent on a stream that does not end in order.
    fn refusal(&self) -> Option<Refused> {
        match (self.stopped, self.end) {
            (Some(code), _) | (None, Some(End::Reset(code))) => Some(Refused::Reset(code)),
            (None, Some(End::Lost)) => Some(Refused::Lost),
            (None, Some(End::Abandoned | End::Failed)) => Some(Refused::Closed),
            (None, None) => None,
        }
    }
}

/// Why nothing can be sent, or asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    NotOwner,
    Full,
    Closed,
    /// The link is gone.
    Lost,
    Reset(VarInt),
}

impl Encoder for Refused {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Refused::NotOwner => atoms::not_owner().encode(env),
            Refused::Full => atoms::full().encode(env),
            Refused::Closed => atoms::closed().encode(env),
            Refused::Lost => atoms::not_connected().encode(env),
            Refused::Reset(code) => (atoms::reset(), code.into_inner()).encode(env),
        }
    }
}

/// What the sending half does next.
pub(super) enum SendStep {
    Write(Bytes),
    Finish,
    Idle,
    Cut(VarInt),
    Lost,
}

/// What the receiving half does next.
pub(super) enum RecvStep {
    Deliver,
    Read,
    Idle,
    Cut(VarInt),
    Lost,
}

/// What a stream is made of.
pub(super) struct Plan {
    pub(super) id: u64,
    pub(super) name: Name,
    pub(super) priority: u8,
    pub(super) owner: LocalPid,
    pub(super) active: Active,
}

impl Inner {
    /// `Gone` where the owner is dead, or the link.
    pub(super) fn make(link: &Arc<dyn Carrier>, plan: &Plan) -> Result<Arc<Inner>, Gone> {
        let worker = runtime::dist();
        let inner = Arc::new(Inner {
            link: link.clone(),
            id: plan.id,
            name: plan.name,
            priority: plan.priority,
            owner: Owner::nameless(plan.owner),
            send_bell: worker.bell(),
            recv_bell: worker.bell(),
            state: Mutex::new(State {
                chunks: VecDeque::new(),
                gathered: BytesMut::new(),
                queued: 0,
                finish: false,
                waiting: Vec::new(),
                sent: 0,
                limit: ahead::FIRST,
                told: false,
                stopped: None,
                send_over: false,
                active: plan.active,
                recv_fin: false,
                recv_over: false,
                end: None,
            }),
            _counted: Counted::new(Kind::Stream),
        });
        let handle = ResourceArc::new(UserStream {
            inner: inner.clone(),
        });
        OwnedEnv::new().run(|env| inner.owner.attach(env, &handle, plan.owner))?;
        inner.owner.pin(&handle);
        if !link.streams().add(&handle) {
            drop(inner.owner.take_pin());
            return Err(Gone);
        }
        Ok(inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn streams(&self) -> &Streams {
        self.link.streams()
    }

    /// Ends the stream, unless it is ending so.
    pub(super) fn cut(&self, end: End) {
        self.lock().end.get_or_insert(end);
        self.send_bell.ring();
        self.recv_bell.ring();
    }

    pub(super) fn is_cut(&self) -> bool {
        self.lock().end.is_some()
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lock().end == Some(End::Lost)
    }

    // --- sending ---

    /// Asks the table of the link's streams, so it is called where it matters alone.
    fn high(&self) -> usize {
        let (least, most) = HIGH;
        (QUEUED / self.link.streams().count().max(1)).clamp(least, most)
    }

    pub(super) fn push(
        &self,
        caller: LocalPid,
        data: &[Binary],
        size: usize,
        fin: bool,
        wait: impl FnOnce() -> Option<Reply>,
    ) -> Result<(), Refused> {
        if self.owner.pid() != caller {
            return Err(Refused::NotOwner);
        }
        let mut state = self.lock();
        if let Some(refused) = state.refusal() {
            return Err(refused);
        }
        if state.finish && size == 0 && fin {
            return Ok(());
        }
        if state.finish || state.send_over {
            return Err(Refused::Closed);
        }
        if size > 0 && state.queued >= HIGH.0 && state.queued >= self.high() {
            state.waiting.extend(wait());
            return Err(Refused::Full);
        }
        for binary in data {
            match piece(binary) {
                Piece::Small(bytes) => {
                    state.gathered.extend_from_slice(bytes);
                    if state.gathered.len() >= GATHER {
                        state.flush();
                    }
                }
                Piece::Held(bytes) => {
                    state.flush();
                    state.chunks.push_back(bytes);
                }
            }
        }
        state.queued += size;
        state.finish = fin;
        drop(state);
        self.send_bell.ring();
        Ok(())
    }

    /// The peer has room for so many bytes.
    pub(super) fn granted(&self, limit: u64) {
        let mut state = self.lock();
        state.limit = state.limit.max(limit);
        state.told = true;
        drop(state);
        self.send_bell.ring();
    }

    pub(super) fn send_step(&self, ticket: &mut Ticket) -> SendStep {
        let mut state = self.lock();
        match state.end {
            Some(End::Reset(code)) => return SendStep::Cut(code),
            Some(End::Failed) => return SendStep::Cut(VarInt::from_u32(0)),
            Some(End::Lost) => return SendStep::Lost,
            // What was finished is still delivered.
            Some(End::Abandoned) if !state.finish => return SendStep::Cut(VarInt::from_u32(0)),
            Some(End::Abandoned) | None => (),
        }
        if state.chunks.is_empty() {
            state.flush();
        }
        let all = state.sent + state.chunks.front().map_or(0, Bytes::len) as u64;
        if !state.told
            && state.limit == ahead::FIRST
            && all > state.limit
            && self.streams().ahead.take(self.id, &self.send_bell)
        {
            state.limit = INITIAL_CREDIT;
        }
        let credit = state.limit - state.sent;
        let Some(front) = state.chunks.front_mut() else {
            return match state.finish {
                true => SendStep::Finish,
                false => SendStep::Idle,
            };
        };
        let most = front
            .len()
            .min(usize::try_from(credit).unwrap_or(usize::MAX));
        let taken = match most {
            0 => 0,
            most => ticket.take(most),
        };
        if taken == 0 {
            return SendStep::Idle;
        }
        let bytes = front.split_to(taken);
        if front.is_empty() {
            state.chunks.pop_front();
        }
        state.sent += taken as u64;
        SendStep::Write(bytes)
    }

    /// QUIC took some bytes: those that wait look again.
    pub(super) fn written(&self, bytes: usize) {
        let mut state = self.lock();
        state.queued -= bytes.min(state.queued);
        if state.waiting.is_empty() || state.queued > self.high() / 2 {
            return;
        }
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for reply in waiting {
            reply.ok(&[]);
        }
    }

    /// The peer wants no more.
    pub(super) fn stopped(&self, code: VarInt) {
        self.lock().stopped.get_or_insert(code);
    }

    pub(super) fn send_over(&self) {
        let mut state = self.lock();
        state.send_over = true;
        state.chunks.clear();
        state.gathered = BytesMut::new();
        state.queued = 0;
        let waiting = std::mem::take(&mut state.waiting);
        let over = state.recv_over;
        let refused = state.refusal().unwrap_or(Refused::Closed);
        drop(state);
        self.streams().ahead.leave(self.id);
        for reply in waiting {
            reply.send(|env| (atoms::error(), refused).encode(env));
        }
        if over {
            self.over();
        }
    }

    // --- receiving ---

    pub(super) fn recv_step(&self, has_some: bool) -> RecvStep {
        let state = self.lock();
        match state.end {
            Some(End::Reset(code)) => RecvStep::Cut(code),
            Some(End::Failed | End::Abandoned) => RecvStep::Cut(VarInt::from_u32(0)),
            Some(End::Lost) => RecvStep::Lost,
            None if state.active == Active::Off => RecvStep::Idle,
            None if has_some => RecvStep::Deliver,
            None => RecvStep::Read,
        }
    }

    /// Tells the owner of data, unless the owner wants none now. False when nothing was told.
    pub(super) fn deliver<'b>(
        &self,
        chunks: impl Iterator<Item = &'b [u8]>,
        size: usize,
        fin: bool,
        force: bool,
    ) -> bool {
        let data = gather(chunks, size);
        let name = self.name;
        let mut state = self.lock();
        if state.active == Active::Off && !force {
            return false;
        }
        let counted = matches!(state.active, Active::Count(_));
        state.active = state.active.after_message();
        state.recv_fin |= fin;
        // A dead owner needs no message: the stream ends.
        let _ = self.owner.post(move |env, _, _| {
            let data = release(env, data);
            Some(name.event(env, (atoms::data(), data, fin)))
        });
        if counted && state.active == Active::Off && !fin {
            let _ = self
                .owner
                .post(move |env, _, _| Some(name.event(env, atoms::passive())));
        }
        true
    }

    pub(super) fn set_active(
        &self,
        env: Env,
        request: Active,
        handle: &ResourceArc<UserStream>,
    ) -> Result<(), OutOfRange> {
        let mut state = self.lock();
        let (active, is_spent) = state.active.change(request)?;
        state.active = active;
        if is_spent {
            let name = self.name;
            self.owner.post_from_nif(env, handle, move |env, _, _| {
                Some(name.event(env, atoms::passive()))
            });
        }
        drop(state);
        self.recv_bell.ring();
        Ok(())
    }

    /// The owner has had all of it.
    pub(super) fn is_read(&self) -> bool {
        self.lock().recv_fin
    }

    pub(super) fn recv_over(&self) {
        let mut state = self.lock();
        state.recv_over = true;
        let over = state.send_over;
        drop(state);
        if over {
            self.over();
        }
    }

    // --- both ---

    /// Both halves are over.
    fn over(&self) {
        self.streams().remove(self);
        let state = self.lock();
        let (end, stopped) = (state.end, state.stopped);
        drop(state);
        let name = self.name;
        self.owner.post_terminal(move |env, _, _| {
            let reset = |code: VarInt| name.event(env, (atoms::reset(), code.into_inner()));
            Some(match (end, stopped) {
                (Some(End::Reset(code)), _) | (None, Some(code)) => reset(code),
                (Some(End::Failed), _) => {
                    name.event(env, (atoms::closed(), atoms::internal_error()))
                }
                (Some(End::Lost | End::Abandoned), _) => {
                    name.event(env, (atoms::closed(), atoms::noconnection()))
                }
                (None, None) => name.event(env, atoms::closed()),
            })
        });
    }

    /// For people, and for the caller who wants its own.
    pub(super) fn info<'a>(&self, env: Env<'a>) -> Term<'a> {
        let state = self.lock();
        let (recv_fin, send_fin) = (state.recv_fin, state.finish);
        drop(state);
        let name = (self.name.tag, self.name.node, self.name.number);
        let facts = (self.id, self.owner.pid(), self.priority);
        (name, facts, recv_fin, send_fin).encode(env)
    }
}
