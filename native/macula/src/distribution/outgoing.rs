//! The send queue of a link: packets from the VM, as frames, until the transport takes them.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use rustler::{Binary, LocalPid, NifResult, Term};

use super::classify::{self, Class, Part};
use super::frame::{self, FrameError};
use super::send::lane::Lane;
use super::send::queue::{Hold, Ledger};
use super::send::router::{ReportError, Route, Router};
use crate::vm::payload::Keeper;

/// Over this the output process stops pulling from the VM, which then suspends the senders.
const HIGH_WATER: usize = 4 * 1024 * 1024;
/// The same where small messages go past what is queued, for what does not belong to held senders.
const HIGH_WATER_LANES: usize = 16 * 1024 * 1024;
/// Under this it is told to go on.
const LOW_WATER: usize = 256 * 1024;
/// The same where small messages go past what is queued: they must not wait in the VM's queue instead.
const LOW_WATER_LANES: usize = 12 * 1024 * 1024;
/// Bytes of a mark.
const MARK: usize = frame::MARK;
/// A part of this size and more is not copied but kept alive where it is.
const ZERO_COPY: usize = 16 * 1024;
/// Copied frames are gathered in pieces of up to this size: the transport walks a list of pieces
/// for every packet it makes, so pieces must not be small.
const PIECE: usize = 64 * 1024;

/// So much of a packet tells its sender, whatever the names of the nodes are.
const HEAD: usize = 1024;

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Pushed {
    Ok,
    /// Taken, and the queue is full now: wait for `macula_dist_writable`.
    Busy,
    Closed,
}

/// Who is to be told that there is room.
#[derive(Default)]
pub(crate) struct Room {
    /// The output process, when the VM's packets may be taken again.
    pub(crate) writable: Option<LocalPid>,
    /// The output process, and the senders that go on.
    pub(crate) free: Option<(LocalPid, Vec<Hold>)>,
}

struct Queue {
    pieces: [VecDeque<Bytes>; 2],
    router: Router,
    ledger: Ledger,
    /// Who sends, and holds senders.
    output: Option<LocalPid>,
    /// Who waits for room.
    waiter: Option<LocalPid>,
    high_water: usize,
    low_water: usize,
    closed: bool,
}

pub(crate) struct Outgoing {
    queue: Mutex<Queue>,
}

impl Outgoing {
    /// `single` is one lane, and one order.
    pub(crate) fn new(single: bool) -> Self {
        Self {
            queue: Mutex::new(Queue {
                pieces: Default::default(),
                router: Router::new(single),
                ledger: if single {
                    Ledger::of_one_lane()
                } else {
                    Ledger::default()
                },
                output: None,
                waiter: None,
                high_water: if single { HIGH_WATER } else { HIGH_WATER_LANES },
                low_water: if single { LOW_WATER } else { LOW_WATER_LANES },
                closed: false,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Chooses the lane of a packet of `len` bytes, and enters it into the ledger. To be pushed soon.
    fn route(&self, class: &Class, len: usize) -> Route {
        let mut queue = self.lock();
        let Queue { router, ledger, .. } = &mut *queue;
        let whole = match class.part {
            // The VM cuts messages into pieces of the same size.
            Part::First { left, .. } => (left as usize).max(1).saturating_mul(len),
            _ => len,
        };
        let route = router.route(class, |sender| ledger.is_heavy(sender, whole));
        let mark = if route.mark.is_some() { MARK } else { 0 };
        ledger.put(
            route.lane,
            route.sender,
            frame::HEADER + len + mark,
            whole - len,
        );
        route
    }

    /// Adds frames. `pid` is told when there is room again, if the answer is `Busy`.
    /// Also answers the senders that must wait now.
    pub(crate) fn push(&self, frames: Frames, pid: LocalPid) -> (Pushed, Vec<Hold>) {
        let mut queue = self.lock();
        if queue.closed {
            return (Pushed::Closed, Vec::new());
        }
        queue.output = Some(pid);
        for (queued, pieces) in queue.pieces.iter_mut().zip(frames.pieces) {
            queued.extend(pieces);
        }
        let hold = queue.ledger.hold();
        if queue.ledger.pressure() >= queue.high_water {
            queue.waiter = Some(pid);
            return (Pushed::Busy, hold);
        }
        (Pushed::Ok, hold)
    }

    /// Moves up to `bytes.len()` pieces out. Their bytes count until `written` is called.
    pub(crate) fn take(&self, lane: Lane, into: &mut [Bytes]) -> usize {
        let mut queue = self.lock();
        let mut count = 0;
        for slot in into.iter_mut() {
            let Some(piece) = queue.pieces[lane.index()].pop_front() else {
                break;
            };
            *slot = piece;
            count += 1;
        }
        count
    }

    /// Returns pieces that the transport did not take.
    pub(crate) fn put_back(&self, lane: Lane, pieces: &mut [Bytes]) {
        let mut queue = self.lock();
        for piece in pieces.iter_mut().rev() {
            queue.pieces[lane.index()].push_front(std::mem::take(piece));
        }
    }

    /// The transport has taken `bytes`. True when there may be somebody to be told of it.
    pub(crate) fn written(&self, lane: Lane, bytes: usize) -> bool {
        let mut queue = self.lock();
        queue.ledger.sent(lane, bytes);
        queue.waiter.is_some() || queue.ledger.is_at_work()
    }

    /// Who is to be told that there is room.
    pub(crate) fn room(&self) -> Room {
        let mut queue = self.lock();
        let writable = if queue.ledger.pressure() <= queue.low_water {
            queue.waiter.take()
        } else {
            None
        };
        let free = queue.ledger.let_go();
        let free = match queue.output {
            Some(output) if !free.is_empty() => Some((output, free)),
            _ => None,
        };
        Room { writable, free }
    }

    /// The peer has delivered so many bulk packets.
    pub(crate) fn delivered(&self, count: u64) -> Result<(), ReportError> {
        self.lock().router.delivered(count)
    }

    /// The mark at the end of the express lane.
    pub(crate) fn last_mark(&self) -> Option<u64> {
        self.lock().router.last_mark()
    }

    /// The senders that were let go have had their time.
    pub(crate) fn forget_awaited(&self) {
        self.lock().ledger.forget_awaited();
    }

    /// Somebody has got room and has not used it yet.
    pub(crate) fn awaits(&self) -> bool {
        self.lock().ledger.awaits()
    }

    pub(crate) fn set_mark(&self, mark: usize) {
        self.lock().ledger.set_mark(mark);
    }

    pub(crate) fn mark(&self) -> usize {
        self.lock().ledger.mark()
    }

    /// Nothing more is taken.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().pieces.iter().all(VecDeque::is_empty)
    }

    /// Something waits for this lane.
    pub(crate) fn is_wanted(&self, lane: Lane) -> bool {
        !self.lock().pieces[lane.index()].is_empty()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.lock().ledger.unsent()
    }
}

/// The beginning of a packet, which tells what the packet is.
#[derive(Default)]
struct Head {
    class: Option<Class>,
    bytes: Vec<u8>,
}

impl Head {
    /// Adds a part of a packet of `len` bytes. The first part is nearly always enough.
    fn add(&mut self, part: &[u8], len: usize) {
        if self.class.is_some() {
            return;
        }
        if self.bytes.is_empty() && (part.len() >= HEAD || part.len() == len) {
            self.class = Some(classify::classify(part));
            return;
        }
        let more = HEAD - self.bytes.len();
        self.bytes.extend_from_slice(&part[..part.len().min(more)]);
        if self.bytes.len() == HEAD {
            self.class = Some(classify::classify(&self.bytes));
        }
    }

    fn class(self) -> Class {
        self.class
            .unwrap_or_else(|| classify::classify(&self.bytes))
    }
}

/// Frames ready to be queued, of each lane.
#[derive(Default)]
pub(crate) struct Frames {
    pieces: [Vec<Bytes>; 2],
    pub(crate) bytes: usize,
    pub(crate) count: usize,
}

impl Frames {
    pub(crate) fn is_express(&self) -> bool {
        self.pieces[Lane::Bulk.index()].is_empty()
    }
}

/// Builds frames from what `erlang:dist_ctrl_get_data/1` gives.
pub(crate) struct Framer<'o> {
    outgoing: &'o Outgoing,
    frames: Frames,
    /// Copied frames of each lane.
    copied: [BytesMut; 2],
    /// Of the binaries that are not copied, all of a batch together.
    keeper: Option<Keeper>,
}

impl<'o> Framer<'o> {
    pub(crate) fn new(outgoing: &'o Outgoing) -> Self {
        Self {
            outgoing,
            frames: Frames::default(),
            copied: Default::default(),
            keeper: None,
        }
    }

    /// One packet of `len` bytes in `parts`, binaries that add up to it.
    pub(crate) fn packet<'a>(
        &mut self,
        len: usize,
        parts: impl Iterator<Item = Term<'a>>,
    ) -> NifResult<()> {
        let header = frame::packet_header(len).map_err(|_: FrameError| rustler::Error::BadArg)?;
        let parts: Vec<Binary<'a>> = parts.map(Binary::from_term).collect::<NifResult<_>>()?;
        let mut head = Head::default();
        let mut seen = 0;
        for part in &parts {
            head.add(part, len);
            seen += part.len();
        }
        if seen != len {
            return Err(rustler::Error::BadArg);
        }
        let route = self.outgoing.route(&head.class(), len);
        if let Some(mark) = route.mark {
            self.copy(route.lane, &frame::mark(mark), len);
        }
        self.copy(route.lane, &header, len);
        for part in &parts {
            if part.len() >= ZERO_COPY {
                self.flush(route.lane);
                self.keep(route.lane, part);
            } else {
                self.copy(route.lane, part, 0);
            }
        }
        self.frames.count += 1;
        Ok(())
    }

    fn copy(&mut self, lane: Lane, bytes: &[u8], expected: usize) {
        if self.copied[lane.index()].len() + bytes.len() > PIECE {
            self.flush(lane);
        }
        let piece = &mut self.copied[lane.index()];
        if piece.capacity() == piece.len() {
            piece.reserve((bytes.len() + expected).clamp(256, PIECE));
        }
        piece.put_slice(bytes);
    }

    fn keep(&mut self, lane: Lane, part: &Binary<'_>) {
        let bytes = self.keeper.get_or_insert_with(Keeper::new).keep(part);
        self.frames.bytes += bytes.len();
        self.frames.pieces[lane.index()].push(bytes);
    }

    fn flush(&mut self, lane: Lane) {
        let copied = &mut self.copied[lane.index()];
        if !copied.is_empty() {
            let piece = copied.split().freeze();
            self.frames.bytes += piece.len();
            self.frames.pieces[lane.index()].push(piece);
        }
    }

    pub(crate) fn finish(mut self) -> Frames {
        for lane in Lane::ALL {
            self.flush(lane);
        }
        self.frames
    }
}
