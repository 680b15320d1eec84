//! What a packet of the distribution is: who sent it, and what that means for its order.
//!
//! Erlang keeps the order of signals from one process to another. A link with several lanes keeps
//! more: everything one process sends goes into one lane. So a packet's lane is chosen by its
//! sender, which is read here from the control message, without decoding more than must be passed
//! over. What has no process as its sender is a fence: it is delivered after all that was sent
//! before it, in every lane, and before all that is sent after it.
//!
//! | packet | its order |
//! |--------|-----------|
//! | a signal with a pid as sender | after all that pid sent before |
//! | a spawn reply that names the new process | as if that process had sent it: first of all |
//! | a later fragment | in the lane of its message's first fragment |
//! | a `DOWN` of a process monitored by name, a refused spawn, anything unknown | fence |

// With one lane everything is in order; the lanes to come ask this module.
#![cfg_attr(not(test), expect(dead_code))]

use std::collections::HashMap;

/// The process a packet belongs to. Only processes of the own node send on a link, so their number
/// and serial tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Sender {
    number: u32,
    serial: u32,
}

/// How a packet is ordered against others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// After all this process sent before.
    Sender(Sender),
    /// After everything, before everything.
    Fence,
}

/// Which part of a message a packet is. The VM names a message in fragments by its sender's pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Whole,
    First { message: u64 },
    Next { message: u64, last: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Class {
    pub(crate) part: Part,
    pub(crate) order: Order,
    /// The operation of the control message, where it can be read.
    pub(crate) operation: Option<u8>,
}

const VERSION: u8 = 131;
const DIST_HEADER: u8 = 68;
const FIRST_FRAGMENT: u8 = 69;
const NEXT_FRAGMENT: u8 = 70;

/// Operations, by the position of the sender in their control message.
mod op {
    /// Link and exit, sends to a name, group leader and exit/2, monitors and downs, sends to a
    /// process and to an alias; with and without a trace token or a payload.
    pub(super) const SENDER_FIRST: [u8; 21] = [
        1, 3, 4, 6, 7, 8, 13, 16, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 33, 34,
    ];
    /// The first element is a request, an id or flags; then comes the sender.
    pub(super) const SENDER_SECOND: [u8; 5] = [29, 30, 35, 36, 37];
    /// `{Op, Request, To, Flags, Result}`.
    pub(super) const SPAWN_REPLY: [u8; 2] = [31, 32];
}

/// Tells what a packet is. Only its beginning is looked at, which may be all that is given.
pub(crate) fn classify(packet: &[u8]) -> Class {
    let fence = |part| Class {
        part,
        order: Order::Fence,
        operation: None,
    };
    let mut terms = Terms(packet);
    let part = match (terms.byte(), terms.byte()) {
        (Some(VERSION), Some(DIST_HEADER)) => Part::Whole,
        (Some(VERSION), Some(FIRST_FRAGMENT)) => match (terms.word(), terms.word()) {
            // The only fragment is the last one too: nothing will follow it.
            (Some(_), Some(1)) => Part::Whole,
            (Some(message), Some(_)) => Part::First { message },
            _ => return fence(Part::Whole),
        },
        (Some(VERSION), Some(NEXT_FRAGMENT)) => match (terms.word(), terms.word()) {
            (Some(message), Some(left)) => {
                return fence(Part::Next {
                    message,
                    last: left == 1,
                });
            }
            _ => return fence(Part::Whole),
        },
        _ => return fence(Part::Whole),
    };
    // The atom cache needs one strict order; it is never negotiated.
    if terms.byte() != Some(0) {
        return fence(part);
    }
    let Some(operation) = terms.tuple().and_then(|_arity| terms.small_integer()) else {
        return fence(part);
    };
    let sender = if op::SENDER_FIRST.contains(&operation) {
        terms.pid()
    } else if op::SENDER_SECOND.contains(&operation) {
        terms.skip().and_then(|()| terms.pid())
    } else if op::SPAWN_REPLY.contains(&operation) {
        (0..3)
            .try_for_each(|_| terms.skip())
            .and_then(|()| terms.pid())
    } else {
        None
    };
    Class {
        part,
        order: sender.map_or(Order::Fence, Order::Sender),
        operation: Some(operation),
    }
}

/// The lane a sender starts in. The numbers of processes are consecutive, so they are mixed well.
pub(crate) fn lane_of(sender: Sender, lanes: u16) -> u16 {
    let key = u64::from(sender.serial) << 32 | u64::from(sender.number);
    let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed >> 32).wrapping_mul(u64::from(lanes.max(1))) >> 32) as u16
}

/// Where a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    Lane(u16),
    /// Into this lane, as the first packet of a new epoch.
    Fence(u16),
}

/// Chooses lanes for the packets of a link, in the order the VM gives them.
#[derive(Debug)]
pub(crate) struct Router {
    lanes: u16,
    /// The lane of each message whose last fragment has not been seen.
    open: HashMap<u64, u16>,
}

impl Router {
    pub(crate) fn new(lanes: u16) -> Self {
        Self {
            lanes,
            open: HashMap::new(),
        }
    }

    pub(crate) fn route(&mut self, packet: &[u8]) -> Route {
        let class = classify(packet);
        if let Part::Next { message, last } = class.part {
            let lane = if last {
                self.open.remove(&message)
            } else {
                self.open.get(&message).copied()
            };
            // A fragment of nothing: the VM never sends one, and a peer must see it in order.
            return lane.map_or(Route::Fence(0), Route::Lane);
        }
        let (lane, route) = match class.order {
            Order::Sender(sender) => {
                let lane = lane_of(sender, self.lanes);
                (lane, Route::Lane(lane))
            }
            Order::Fence => (0, Route::Fence(0)),
        };
        if let Part::First { message } = class.part {
            self.open.insert(message, lane);
        }
        route
    }
}

/// Reads terms of the external format off the front of some bytes.
struct Terms<'a>(&'a [u8]);

impl Terms<'_> {
    fn take(&mut self, len: usize) -> Option<&[u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn word(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn tuple(&mut self) -> Option<u8> {
        (self.byte()? == 104).then(|| self.byte())?
    }

    fn small_integer(&mut self) -> Option<u8> {
        (self.byte()? == 97).then(|| self.byte())?
    }

    fn pid(&mut self) -> Option<Sender> {
        if self.byte()? != 88 {
            return None;
        }
        self.skip()?;
        let number = u32::from_be_bytes(self.array()?);
        let serial = u32::from_be_bytes(self.array()?);
        self.take(4)?;
        Some(Sender { number, serial })
    }

    /// Passes over one term of those that stand before a sender.
    fn skip(&mut self) -> Option<()> {
        let len = match self.byte()? {
            // Integers.
            97 => 1,
            98 => 4,
            110 => usize::from(self.byte()?) + 1,
            // Atoms.
            119 | 115 => usize::from(self.byte()?),
            118 | 100 => usize::from(u16::from_be_bytes(self.array()?)),
            // A pid and a reference: the node's name, then numbers.
            88 => {
                self.skip()?;
                12
            }
            90 => {
                let words = u16::from_be_bytes(self.array()?);
                self.skip()?;
                4 + 4 * usize::from(words)
            }
            _ => return None,
        };
        self.take(len).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &[u8] = b"\x77\x03a@b";

    fn pid(number: u32) -> Vec<u8> {
        [
            &[88],
            NODE,
            &number.to_be_bytes(),
            &0u32.to_be_bytes(),
            &[9, 9, 9, 9],
        ]
        .concat()
    }

    fn reference() -> Vec<u8> {
        [&[90, 0, 3], NODE, &[9; 4], &[1; 12]].concat()
    }

    fn atom(name: &str) -> Vec<u8> {
        [&[119, name.len() as u8], name.as_bytes()].concat()
    }

    fn whole(op: u8, elements: &[Vec<u8>]) -> Vec<u8> {
        let mut packet = vec![131, 68, 0, 104, elements.len() as u8 + 1, 97, op];
        packet.extend(elements.concat());
        packet
    }

    fn sender(number: u32) -> Order {
        Order::Sender(Sender { number, serial: 0 })
    }

    fn order(op: u8, elements: &[Vec<u8>]) -> Order {
        classify(&whole(op, elements)).order
    }

    #[test]
    fn every_operation_with_a_process_as_sender_is_ordered_by_it() {
        let (from, to) = (pid(7), pid(8));
        for op in [1, 3, 7, 8, 19, 20, 21, 22, 24, 26, 28] {
            assert_eq!(
                order(op, &[from.clone(), to.clone()]),
                sender(7),
                "operation {op}"
            );
        }
        assert_eq!(order(6, &[from.clone(), atom(""), atom("name")]), sender(7));
        assert_eq!(order(33, &[from.clone(), reference()]), sender(7));
        assert_eq!(
            order(29, &[reference(), from.clone(), to.clone()]),
            sender(7)
        );
        assert_eq!(
            order(37, &[vec![98, 0, 0, 1, 0], from.clone(), to.clone()]),
            sender(7)
        );
    }

    #[test]
    fn an_unlink_is_ordered_by_its_sender_whatever_the_size_of_its_id() {
        for id in [
            vec![97, 1],
            vec![98, 0, 0, 1, 0],
            vec![110, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8],
        ] {
            for op in [35, 36] {
                assert_eq!(order(op, &[id.clone(), pid(7), pid(8)]), sender(7));
            }
        }
    }

    #[test]
    fn a_spawn_reply_belongs_to_the_process_it_announces() {
        let flags = vec![97, 3];
        let reply = |result| order(31, &[reference(), pid(7), flags.clone(), result]);
        assert_eq!(reply(pid(9)), sender(9));
        assert_eq!(reply(atom("system_limit")), Order::Fence);
    }

    #[test]
    fn a_down_of_a_registered_name_is_a_fence() {
        assert_eq!(
            order(28, &[atom("name"), pid(8), reference()]),
            Order::Fence
        );
        assert_eq!(
            order(21, &[atom("name"), pid(8), reference()]),
            Order::Fence
        );
    }

    #[test]
    fn the_unknown_and_the_broken_are_fences() {
        assert_eq!(order(99, &[pid(7)]), Order::Fence);
        assert_eq!(order(2, &[atom(""), pid(8)]), Order::Fence);
        let send = whole(22, &[pid(7), pid(8)]);
        for len in 0..17 {
            assert_eq!(classify(&send[..len]).order, Order::Fence, "{len} bytes");
        }
        // A packet with references into an atom cache, and one without a distribution header.
        let mut cached = send.clone();
        cached[2] = 1;
        assert_eq!(classify(&cached).order, Order::Fence);
        assert_eq!(classify(b"p\x83h").order, Order::Fence);
    }

    #[test]
    fn what_the_vm_sends_is_understood() {
        // `Pid ! hi` as OTP 25 has it.
        let packet = [
            131, 68, 0, 104, 3, 97, 22, 88, 119, 16, 97, 50, 49, 48, 53, 49, 64, 49, 50, 55, 46,
            48, 46, 48, 46, 49, 0, 0, 0, 96, 0, 0, 0, 0, 61, 153, 130, 57, 88, 119, 17, 98, 49, 56,
            49, 48, 53, 49, 64, 49, 50, 55, 46, 48, 46, 48, 46, 49, 0, 0, 0, 94, 0, 0, 0, 0, 55,
            213, 33, 199, 119, 2, 104, 105,
        ];
        let class = classify(&packet);
        assert_eq!(class.part, Part::Whole);
        assert_eq!(class.order, sender(96));
        assert_eq!(class.operation, Some(22));
    }

    fn fragment(tag: u8, message: u64, left: u64) -> Vec<u8> {
        let mut packet = vec![131, tag];
        packet.extend(message.to_be_bytes());
        packet.extend(left.to_be_bytes());
        if tag == FIRST_FRAGMENT {
            packet.extend(&whole(22, &[pid(7), pid(8)])[2..]);
        }
        packet
    }

    #[test]
    fn fragments_follow_the_first_of_their_message() {
        let mut router = Router::new(16);
        let first = router.route(&fragment(FIRST_FRAGMENT, 5, 3));
        assert_eq!(
            first,
            Route::Lane(lane_of(
                Sender {
                    number: 7,
                    serial: 0
                },
                16
            ))
        );
        assert_eq!(router.route(&fragment(NEXT_FRAGMENT, 5, 2)), first);
        assert_eq!(router.route(&fragment(NEXT_FRAGMENT, 5, 1)), first);
        assert!(router.open.is_empty());
        assert_eq!(
            router.route(&fragment(NEXT_FRAGMENT, 5, 1)),
            Route::Fence(0)
        );
        // A message of one fragment leaves nothing open.
        assert_eq!(router.route(&fragment(FIRST_FRAGMENT, 6, 1)), first);
        assert!(router.open.is_empty());
    }

    #[test]
    fn all_a_process_sends_goes_into_one_lane_and_processes_spread() {
        let mut router = Router::new(16);
        let mut seen = std::collections::HashSet::new();
        for number in 0..1000 {
            let to_pid = router.route(&whole(22, &[pid(number), pid(1)]));
            let to_name = router.route(&whole(6, &[pid(number), atom(""), atom("name")]));
            let spawn = router.route(&whole(29, &[reference(), pid(number), pid(1)]));
            assert_eq!(to_pid, to_name);
            assert_eq!(to_pid, spawn);
            let Route::Lane(lane) = to_pid else {
                panic!("a fence")
            };
            assert!(lane < 16);
            seen.insert(lane);
        }
        assert_eq!(seen.len(), 16);
    }

    #[test]
    fn one_lane_takes_everything() {
        for number in 0..100 {
            assert_eq!(lane_of(Sender { number, serial: 3 }, 1), 0);
        }
    }
}
