//! The order of signals through router and fence, whatever comes and whichever lane is faster.

use std::collections::{HashMap, VecDeque};

use super::super::classify::{Sender, classify};
use super::super::recv::fence::{Fence, FenceError};
use super::lane::Lane;
use super::router::{ReportError, Route, Router};

const NODE: &[u8] = b"\x77\x03a@b";

fn pid(number: u32) -> Vec<u8> {
    let numbers = [number.to_be_bytes(), [0; 4], [9; 4]].concat();
    [&[88], NODE, &numbers].concat()
}

fn reference() -> Vec<u8> {
    [&[90, 0, 3], NODE, &[9; 4], &[1; 12]].concat()
}

fn atom() -> Vec<u8> {
    b"\x77\x04name".to_vec()
}

fn control(op: u8, elements: &[Vec<u8>]) -> Vec<u8> {
    let mut packet = vec![0, 104, elements.len() as u8 + 1, 97, op];
    packet.extend(elements.concat());
    packet
}

fn whole(op: u8, elements: &[Vec<u8>]) -> Vec<u8> {
    [vec![131, 68], control(op, elements)].concat()
}

fn fragment(tag: u8, message: u64, left: u64, rest: &[u8]) -> Vec<u8> {
    let mut packet = vec![131, tag];
    packet.extend(message.to_be_bytes());
    packet.extend(left.to_be_bytes());
    packet.extend(rest);
    packet
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Operations that name a process as their sender.
const OF_A_PROCESS: [u8; 28] = [
    1, 3, 4, 6, 7, 8, 13, 16, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34,
    35, 36, 37,
];
/// And those of them that have a payload, which the VM may cut into fragments.
const WITH_A_PAYLOAD: [u8; 14] = [6, 16, 22, 23, 24, 25, 26, 27, 28, 29, 30, 33, 34, 37];

/// What stands in the control message after the operation. Monitors are of a process or of a name.
fn elements(op: u8, from: u32, by_name: bool) -> Vec<Vec<u8>> {
    let (from, to, token) = (pid(from), pid(1000), vec![97, 5]);
    let (none, flags) = (vec![119, 0], vec![97, 3]);
    let id = if by_name {
        vec![98, 0, 0, 1, 0]
    } else {
        vec![110, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    };
    let monitored = if by_name { atom() } else { to.clone() };
    match op {
        1 | 4 | 7 | 22 | 24 | 26 => vec![from, to],
        3 | 8 => vec![from, to, atom()],
        13 | 18 => vec![from, to, token, atom()],
        23 | 25 | 27 => vec![from, to, token],
        6 => vec![from, none, atom()],
        16 => vec![from, none, atom(), token],
        19 | 20 => vec![from, monitored, reference()],
        21 => vec![from, to, reference(), atom()],
        28 => vec![from, to, reference()],
        29 => vec![reference(), from, to, atom(), atom()],
        30 => vec![reference(), from, to, atom(), atom(), token],
        31 => vec![reference(), to, flags, from],
        32 => vec![reference(), to, flags, from, token],
        33 => vec![from, reference()],
        34 => vec![from, reference(), token],
        35 | 36 => vec![id, from, to],
        37 => vec![flags, from, to],
        _ => unreachable!("operation {op}"),
    }
}

/// A packet as the VM gives it, and what is true of it.
struct Given {
    packet: Vec<u8>,
    /// The process that sends it; none for a signal that has no process as its sender.
    from: Option<u32>,
    /// What goes by the order of its parts: all of a process, or the fragments of a message.
    order: Option<u64>,
    /// Comes after all that was sent before it.
    after_all: bool,
    /// No router knows what it is: all that is sent after it comes after it.
    unknown: bool,
    /// Brings its sender over the mark.
    heavy: bool,
}

/// What the VM gave, and where it went.
struct Sent {
    lane: Lane,
    given: Given,
}

enum Frame {
    Packet(usize),
    Mark(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    OfProcess,
    /// Has no process as its sender.
    OfNobody,
    Unknown,
}

/// The messages of one random run.
struct Vm {
    random: Random,
    /// The messages that have begun, by the process that names them: fragments that are left, and what they are of.
    open: HashMap<u64, (u64, Kind)>,
    /// Processes come and go: the first of those there are.
    first: u32,
}

impl Vm {
    fn new(seed: u64) -> Self {
        Self {
            random: Random(seed),
            open: HashMap::new(),
            first: 1,
        }
    }

    fn one_of(&mut self, operations: &[u8]) -> u8 {
        operations[self.random.below(operations.len() as u64) as usize]
    }

    fn packet(&mut self) -> Given {
        let from = self.first + self.random.below(12) as u32;
        if let Some(next) = self.next_fragment(from) {
            return next;
        }
        if self.random.below(40) == 0 && !self.open.contains_key(&u64::from(self.first)) {
            self.first += 1;
        }
        let kind = match self.random.below(22) {
            0 => Kind::OfNobody,
            1 => Kind::Unknown,
            _ => Kind::OfProcess,
        };
        let in_fragments = self.random.below(6) == 0;
        let by_name = self.random.below(2) == 0;
        let head = match kind {
            Kind::OfProcess => {
                let op = match self.random.below(3) {
                    0 => 22,
                    _ if in_fragments => self.one_of(&WITH_A_PAYLOAD),
                    _ => self.one_of(&OF_A_PROCESS),
                };
                control(op, &elements(op, from, by_name))
            }
            // A `DOWN` by name, with and without a payload, and a refused spawn.
            Kind::OfNobody => match self.random.below(4) {
                0 => control(21, &[atom(), pid(1000), reference(), atom()]),
                1 if !in_fragments => control(31, &[reference(), pid(1000), vec![97, 3], atom()]),
                2 if !in_fragments => {
                    control(32, &[reference(), pid(1000), vec![97, 3], atom(), atom()])
                }
                _ => control(28, &[atom(), pid(1000), reference()]),
            },
            Kind::Unknown => control(99, &[pid(from)]),
        };
        let packet = if in_fragments {
            let left = self.random.below(5) + 1;
            if left > 1 {
                self.open.insert(u64::from(from), (left - 1, kind));
            }
            fragment(69, u64::from(from) << 32, left, &head)
        } else if kind == Kind::Unknown {
            match self.random.below(3) {
                0 => [vec![131, 68], head].concat(),
                // Of a message that has not begun.
                1 => fragment(70, 77, 2, b""),
                _ => b"nonsense".to_vec(),
            }
        } else {
            [vec![131, 68], head].concat()
        };
        Given {
            heavy: self.random.below(if in_fragments { 2 } else { 8 }) == 0,
            after_all: kind != Kind::OfProcess,
            ..self.given(packet, from, kind)
        }
    }

    fn next_fragment(&mut self, from: u32) -> Option<Given> {
        let (left, kind) = self.open.get_mut(&u64::from(from))?;
        let (now, kind) = (*left, *kind);
        *left -= 1;
        if now == 1 {
            self.open.remove(&u64::from(from));
        }
        let packet = fragment(70, u64::from(from) << 32, now, b"rest");
        Some(self.given(packet, from, kind))
    }

    fn given(&self, packet: Vec<u8>, from: u32, kind: Kind) -> Given {
        let of_process = kind == Kind::OfProcess;
        Given {
            packet,
            from: of_process.then_some(from),
            // Nobody's have an order only as the fragments of one message.
            order: match kind {
                Kind::OfProcess => Some(u64::from(from)),
                _ => Some(u64::from(from) << 32),
            },
            after_all: false,
            unknown: kind == Kind::Unknown,
            heavy: false,
        }
    }
}

/// Sends at random, delivers at random, and reports at random. Answers in which order the packets came.
fn run(seed: u64, single: bool) -> (Vec<Sent>, Vec<usize>) {
    let mut vm = Vm::new(seed);
    let mut router = Router::new(single);
    let mut fence = Fence::default();
    let mut lanes: [VecDeque<Frame>; 2] = Default::default();
    let mut blocked = [false; 2];
    let mut sent: Vec<Sent> = Vec::new();
    let mut came = Vec::new();
    let mut bulk = BulkSenders::default();
    let steps = 200 + vm.random.below(300);
    // Which lane has the better line in this run.
    let bias = vm.random.below(9) + 1;
    let mut step = 0;
    while step < steps || lanes.iter().any(|lane| !lane.is_empty()) {
        step += 1;
        assert!(step < 100_000, "stuck");
        if step < steps && vm.random.below(2) == 0 {
            let given = vm.packet();
            let route = router.route(&classify(&given.packet), |_| given.heavy);
            assert_eq!(
                route.sender.map(|s| s.numbers().0),
                given.from,
                "{:?}",
                given.packet
            );
            bulk.put(&route);
            if let Some(mark) = route.mark {
                lanes[route.lane.index()].push_back(Frame::Mark(mark));
            }
            lanes[route.lane.index()].push_back(Frame::Packet(sent.len()));
            sent.push(Sent {
                lane: route.lane,
                given,
            });
        }
        let lane = if vm.random.below(10) < bias {
            Lane::Express
        } else {
            Lane::Bulk
        };
        if blocked[lane.index()] {
            blocked[lane.index()] = !fence.may_go(lane);
        } else {
            match lanes[lane.index()].pop_front() {
                Some(Frame::Packet(number)) => {
                    came.push(number);
                    fence.delivered(lane, 1);
                }
                Some(Frame::Mark(mark)) => {
                    let go = fence.mark(lane, mark).expect("an honest peer's mark");
                    blocked[lane.index()] = !go;
                }
                None => (),
            }
        }
        if vm.random.below(6) == 0 {
            let count = fence.count(Lane::Bulk);
            router.delivered(count).expect("an honest peer's report");
            bulk.delivered(count);
        }
        assert_eq!(
            router.remembered(),
            (vm.open.len(), bulk.0.len()),
            "seed {seed}"
        );
    }
    (sent, came)
}

/// Who has sent bulk that is not reported delivered: each with the number of its last packet.
#[derive(Default)]
struct BulkSenders(HashMap<Sender, u64>, u64);

impl BulkSenders {
    fn put(&mut self, route: &Route) {
        if route.lane == Lane::Bulk {
            self.1 += 1;
            if let Some(sender) = route.sender {
                self.0.insert(sender, self.1);
            }
        }
    }

    fn delivered(&mut self, count: u64) {
        self.0.retain(|_, last| *last > count);
    }
}

#[test]
fn every_order_that_is_promised_is_kept_whichever_lane_is_faster() {
    let (mut bulk, mut overtaken) = (0, 0);
    for seed in 0..3000 {
        let (sent, came) = run(seed, false);
        // Nothing is lost, and nothing comes twice.
        assert_eq!(came.len(), sent.len(), "seed {seed}");
        let mut place = vec![usize::MAX; sent.len()];
        for (at, number) in came.iter().enumerate() {
            place[*number] = at;
        }
        let mut last_of: HashMap<u64, usize> = HashMap::new();
        let mut last_express = 0;
        let mut latest = 0;
        let mut barrier = 0;
        for (number, packet) in sent.iter().enumerate() {
            let at = place[number];
            if let Some(order) = packet.given.order
                && let Some(before) = last_of.insert(order, at)
            {
                assert!(before < at, "seed {seed}: order of a sender, {number}");
            }
            match packet.lane {
                Lane::Express => last_express = last_express.max(at),
                Lane::Bulk => {
                    bulk += 1;
                    assert!(
                        at >= last_express,
                        "seed {seed}: bulk has overtaken, {number}"
                    );
                }
            }
            if packet.given.after_all {
                assert!(at >= latest, "seed {seed}: nobody's came early, {number}");
            }
            assert!(at >= barrier, "seed {seed}: past a barrier, {number}");
            if packet.given.unknown {
                barrier = barrier.max(at);
            }
            overtaken += usize::from(at < latest);
            latest = latest.max(at);
        }
    }
    // The runs are worth something.
    assert!(bulk > 10_000 && overtaken > 10_000, "{bulk} {overtaken}");
}

#[test]
fn one_lane_has_one_order() {
    for seed in 0..200 {
        let (sent, came) = run(seed, true);
        assert_eq!(came, (0..sent.len()).collect::<Vec<_>>());
    }
}

#[test]
fn without_bulk_everything_goes_express_and_nothing_is_marked() {
    let mut router = Router::new(false);
    for number in 0..1000 {
        for packet in [
            whole(22, &[pid(number), pid(1)]),
            whole(28, &[atom(), pid(1), reference()]),
            whole(99, &[]),
        ] {
            let route = router.route(&classify(&packet), |_| false);
            assert_eq!((route.lane, route.mark), (Lane::Express, None));
        }
    }
    assert_eq!(router.last_mark(), None);
}

#[test]
fn a_sender_is_bulk_until_all_it_sent_is_delivered() {
    let mut router = Router::new(false);
    let packet = classify(&whole(22, &[pid(1), pid(2)]));
    let other = classify(&whole(22, &[pid(3), pid(2)]));
    let lane = |router: &mut Router, class, heavy| router.route(class, |_| heavy).lane;
    assert_eq!(lane(&mut router, &packet, false), Lane::Express);
    assert_eq!(lane(&mut router, &packet, true), Lane::Bulk);
    assert_eq!(lane(&mut router, &packet, false), Lane::Bulk);
    assert_eq!(lane(&mut router, &other, false), Lane::Express);
    assert_eq!(router.delivered(1), Ok(()));
    assert_eq!(lane(&mut router, &packet, false), Lane::Bulk);
    assert_eq!(router.last_mark(), Some(3));
    assert_eq!(router.delivered(3), Ok(()));
    assert_eq!(router.last_mark(), None);
    assert_eq!(lane(&mut router, &packet, false), Lane::Express);
}

#[test]
fn marks_stand_only_where_express_has_moved() {
    let mut router = Router::new(false);
    let bulk = classify(&whole(22, &[pid(1), pid(2)]));
    let express = classify(&whole(22, &[pid(3), pid(2)]));
    let mut mark = |class, heavy| router.route(class, |_| heavy).mark;
    assert_eq!(mark(&bulk, true), None);
    assert_eq!(mark(&express, false), None);
    assert_eq!(mark(&bulk, true), Some(1));
    assert_eq!(mark(&bulk, true), None);
    assert_eq!(mark(&express, false), None);
    assert_eq!(mark(&bulk, true), Some(2));
    // The unknown is the fifth in bulk: what follows in express waits for it.
    let unknown = classify(&whole(99, &[]));
    assert_eq!(mark(&unknown, false), None);
    assert_eq!(mark(&express, false), Some(5));
    assert_eq!(mark(&express, false), None);
}

#[test]
fn express_does_not_wait_for_what_has_no_process_as_its_sender() {
    let refused = |op| whole(op, &[reference(), pid(1000), vec![97, 3], atom(), atom()]);
    for (packet, mark) in [
        (whole(21, &[atom(), pid(1000), reference(), atom()]), None),
        (whole(28, &[atom(), pid(1000), reference()]), None),
        (refused(31), None),
        (refused(32), None),
        (whole(22, &[atom(), pid(1000)]), Some(2)),
    ] {
        let mut router = Router::new(false);
        router.route(&classify(&whole(22, &[pid(1), pid(2)])), |_| true);
        let route = router.route(&classify(&packet), |_| false);
        assert_eq!((route.lane, route.sender), (Lane::Bulk, None));
        let after = router.route(&classify(&whole(22, &[pid(3), pid(2)])), |_| false);
        assert_eq!(
            (after.lane, after.mark),
            (Lane::Express, mark),
            "{packet:?}"
        );
    }
}

#[test]
fn reports_of_what_was_not_sent_are_refused() {
    let mut router = Router::new(false);
    assert_eq!(router.delivered(1), Err(ReportError::NotSent(1, 0)));
    for _ in 0..2 {
        router.route(&classify(&whole(22, &[pid(1), pid(2)])), |_| true);
    }
    assert_eq!(router.delivered(2), Ok(()));
    assert_eq!(router.delivered(1), Err(ReportError::Backwards(1, 2)));
}

#[test]
fn a_peer_that_breaks_the_rules_of_marks_is_found_out() {
    let mut fence = Fence::default();
    assert_eq!(fence.mark(Lane::Bulk, 0), Err(FenceError::Backwards(0, 0)));
    assert_eq!(fence.mark(Lane::Bulk, 5), Ok(false));
    fence.delivered(Lane::Express, 4);
    assert!(!fence.may_go(Lane::Bulk));
    assert!(fence.delivered(Lane::Express, 1));
    assert!(fence.may_go(Lane::Bulk));
    assert_eq!(fence.mark(Lane::Bulk, 5), Err(FenceError::Backwards(5, 5)));
    // Each waits for the other.
    let mut fence = Fence::default();
    assert_eq!(fence.mark(Lane::Bulk, 1), Ok(false));
    assert_eq!(fence.mark(Lane::Express, 1), Err(FenceError::Circle));
    // What is waited for can't come any more.
    let mut fence = Fence::default();
    assert_eq!(fence.mark(Lane::Express, 3), Ok(false));
    fence.delivered(Lane::Bulk, 2);
    assert_eq!(fence.ended(Lane::Bulk), Err(FenceError::Ended(3, 2)));
    let mut fence = Fence::default();
    assert_eq!(fence.ended(Lane::Bulk), Ok(()));
    assert_eq!(fence.mark(Lane::Express, 1), Err(FenceError::Ended(1, 0)));
}

/// Processes come and go for as long as a link lives.
#[test]
fn a_router_remembers_open_messages_and_bulk_senders_alone() {
    let mut router = Router::new(false);
    let mut vm = Vm::new(7);
    let mut bulk = BulkSenders::default();
    let mut most = 0;
    for _ in 0..20_000 {
        let given = vm.packet();
        bulk.put(&router.route(&classify(&given.packet), |_| given.heavy));
        if vm.random.below(50) == 0 {
            let count = bulk.1 - vm.random.below(bulk.1.min(5) + 1);
            if router.delivered(count).is_ok() {
                bulk.delivered(count);
            }
        }
        assert_eq!(router.remembered(), (vm.open.len(), bulk.0.len()));
        most = most.max(vm.open.len() + bulk.0.len());
    }
    assert_eq!(router.delivered(bulk.1), Ok(()));
    assert_eq!(router.remembered(), (vm.open.len(), 0));
    // Of more than a hundred processes few have an open message, or bulk under way.
    assert!(vm.first > 100 && most < 60, "{} {most}", vm.first);
}
