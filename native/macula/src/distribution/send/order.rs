//! The order of signals through router and fence, whatever comes and whichever lane is faster.

use std::collections::{HashMap, HashSet, VecDeque};

use super::super::classify::{Sender, classify};
use super::super::recv::fence::{Fence, FenceError};
use super::lane::Lane;
use super::router::{ReportError, Router};

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

/// What the VM gave, in its order.
#[derive(Debug, Clone)]
struct Sent {
    lane: Lane,
    /// The process whose order counts.
    from: Option<u32>,
    /// Comes after all that was sent before it.
    after_all: bool,
    /// All that is sent after it comes after it.
    barrier: bool,
}

enum Frame {
    Packet(usize),
    Mark(u64),
}

/// The messages of one random run.
struct Vm {
    random: Random,
    /// Fragments that are left of a process's message, and what the message is.
    open: HashMap<u32, u64>,
    message: u64,
}

impl Vm {
    /// A packet, and whose it is: `None` is nobody's, and `unknown` what no router knows.
    fn packet(&mut self) -> (Vec<u8>, Option<u32>, bool, bool) {
        let from = self.random.below(12) as u32 + 1;
        if let Some(left) = self.open.get_mut(&from) {
            let (id, now) = (u64::from(from) << 32, *left);
            *left -= 1;
            if now == 1 {
                self.open.remove(&from);
            }
            return (fragment(70, id, now, b"rest"), Some(from), false, false);
        }
        let to = pid(1000);
        let own = |packet| (packet, Some(from), false, false);
        match self.random.below(22) {
            0 => own(whole(1, &[pid(from), to])),
            1 => own(whole(35, &[vec![98, 0, 0, 1, 0], pid(from), to])),
            2 => own(whole(3, &[pid(from), to, atom()])),
            3 => own(whole(19, &[pid(from), to, reference()])),
            4 => own(whole(20, &[pid(from), atom(), reference()])),
            5 => own(whole(21, &[pid(from), to, reference(), atom()])),
            6 => own(whole(29, &[reference(), pid(from), to, atom()])),
            7 => own(whole(31, &[reference(), to, vec![97, 3], pid(from)])),
            8 => own(whole(33, &[pid(from), reference()])),
            9 => own(whole(6, &[pid(from), vec![119, 0], atom()])),
            10 => own(whole(37, &[vec![97, 1], pid(from), to])),
            // Nobody's: a `DOWN` by name, a refused spawn.
            11 => (whole(28, &[atom(), to, reference()]), None, false, false),
            12 => (
                whole(31, &[reference(), to, vec![97, 3], atom()]),
                None,
                false,
                false,
            ),
            13 => match self.random.below(3) {
                0 => (whole(99, &[pid(from)]), None, true, false),
                1 => (fragment(70, 77, 2, b""), None, true, false),
                _ => (b"nonsense".to_vec(), None, true, false),
            },
            14..17 => {
                self.message += 1;
                let left = self.random.below(5) + 1;
                if left > 1 {
                    self.open.insert(from, left - 1);
                }
                let head = control(22, &[pid(from), to]);
                (
                    fragment(69, u64::from(from) << 32, left, &head),
                    Some(from),
                    false,
                    self.random.below(2) == 0,
                )
            }
            _ => (
                whole(22, &[pid(from), to]),
                Some(from),
                false,
                self.random.below(8) == 0,
            ),
        }
    }
}

/// Sends at random, delivers at random, and reports at random. Answers in which order the packets came.
fn run(seed: u64, single: bool) -> (Vec<Sent>, Vec<usize>, usize) {
    let mut vm = Vm {
        random: Random(seed),
        open: HashMap::new(),
        message: 0,
    };
    let mut router = Router::new(single);
    let mut fence = Fence::default();
    let mut lanes: [VecDeque<Frame>; 2] = Default::default();
    let mut blocked = [false; 2];
    let mut sent: Vec<Sent> = Vec::new();
    let mut came = Vec::new();
    let mut most_open = 0;
    let steps = 200 + vm.random.below(300);
    // Which lane has the better line in this run.
    let bias = vm.random.below(9) + 1;
    let mut step = 0;
    while step < steps || lanes.iter().any(|lane| !lane.is_empty()) {
        step += 1;
        assert!(step < 100_000, "stuck");
        if step < steps && vm.random.below(2) == 0 {
            let (packet, from, unknown, heavy) = vm.packet();
            let route = router.route(&classify(&packet), |_| heavy);
            assert_eq!(route.sender.map(|s| s.numbers().0), from, "{packet:?}");
            if let Some(mark) = route.mark {
                lanes[route.lane.index()].push_back(Frame::Mark(mark));
            }
            lanes[route.lane.index()].push_back(Frame::Packet(sent.len()));
            sent.push(Sent {
                lane: route.lane,
                from,
                after_all: from.is_none(),
                barrier: unknown,
            });
            most_open = most_open.max(vm.open.len());
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
            router
                .delivered(fence.count(Lane::Bulk))
                .expect("an honest peer's report");
        }
    }
    (sent, came, most_open)
}

#[test]
fn every_order_that_is_promised_is_kept_whichever_lane_is_faster() {
    let (mut bulk, mut overtaken) = (0, 0);
    for seed in 0..3000 {
        let (sent, came, _) = run(seed, false);
        // Nothing is lost, and nothing comes twice.
        assert_eq!(came.len(), sent.len(), "seed {seed}");
        let mut place = vec![usize::MAX; sent.len()];
        for (at, number) in came.iter().enumerate() {
            place[*number] = at;
        }
        let mut last_of: HashMap<u32, usize> = HashMap::new();
        let mut last_express = 0;
        let mut latest = 0;
        let mut barrier = 0;
        for (number, packet) in sent.iter().enumerate() {
            let at = place[number];
            if let Some(from) = packet.from
                && let Some(before) = last_of.insert(from, at)
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
            if packet.after_all {
                assert!(at >= latest, "seed {seed}: nobody's came early, {number}");
            }
            assert!(at >= barrier, "seed {seed}: past a barrier, {number}");
            if packet.barrier {
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
        let (sent, came, _) = run(seed, true);
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

#[test]
fn what_a_router_remembers_goes_with_what_it_remembers_it_for() {
    let mut router = Router::new(false);
    let mut vm = Vm {
        random: Random(7),
        open: HashMap::new(),
        message: 0,
    };
    let mut senders = HashSet::new();
    let mut bulk = 0;
    for _ in 0..20_000 {
        let (packet, from, ..) = vm.packet();
        senders.extend(from);
        let heavy = vm.random.below(2) == 0;
        let route = router.route(&classify(&packet), |_: Sender| heavy);
        bulk += u64::from(route.lane == Lane::Bulk);
        let (open, heavy) = router.remembered();
        assert!(open <= senders.len() && heavy <= senders.len());
    }
    assert_eq!(router.delivered(bulk), Ok(()));
    assert_eq!(router.remembered().1, 0);
}
