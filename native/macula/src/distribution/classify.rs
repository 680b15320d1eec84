//! What a packet of the distribution is: which part of a message, and who sent it.
//!
//! Erlang keeps the order of signals from one process to another, and programs lean on more. So a packet's
//! place is chosen by its sender (`send::router`), which is read here from the control message, without
//! decoding more than must be passed over.
//!
//! | packet | its sender |
//! |--------|------------|
//! | a signal with a pid as sender | that process |
//! | a spawn reply that names the new process | the new process: this is the first it sends |
//! | a later fragment | that of its message's first fragment |
//! | a `DOWN` of a process monitored by name, a refused spawn, anything unknown | none: a fence |

/// The process a packet belongs to. Only processes of the own node send on a link, so their number
/// and serial tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Sender {
    number: u32,
    serial: u32,
}

impl Sender {
    #[cfg(test)]
    pub(crate) fn of(number: u32, serial: u32) -> Self {
        Self { number, serial }
    }

    /// As they stand in the pid.
    pub(crate) fn numbers(self) -> (u32, u32) {
        (self.number, self.serial)
    }
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
    /// `left` counts this one, too.
    First {
        message: u64,
        left: u64,
    },
    Next {
        message: u64,
        last: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Class {
    pub(crate) part: Part,
    pub(crate) order: Order,
    /// The operation of the control message, where it can be read.
    pub(crate) operation: Option<u8>,
}

impl Class {
    /// A process that has no pid here, or none at all, may send this.
    pub(crate) fn may_lack_sender(&self) -> bool {
        self.operation
            .is_some_and(|operation| op::MAY_LACK_SENDER.contains(&operation))
    }
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
    /// A `DOWN` of a process monitored by name, and a refused spawn.
    pub(super) const MAY_LACK_SENDER: [u8; 4] = [21, 28, 31, 32];
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
            (Some(message), Some(left)) => Part::First { message, left },
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
        for op in [
            1, 3, 4, 7, 8, 13, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
        ] {
            assert_eq!(
                order(op, &[from.clone(), to.clone()]),
                sender(7),
                "operation {op}"
            );
        }
        for op in [6, 16] {
            assert_eq!(
                order(op, &[from.clone(), atom(""), atom("name")]),
                sender(7)
            );
        }
        for op in [33, 34] {
            assert_eq!(order(op, &[from.clone(), reference()]), sender(7));
        }
        for op in [29, 30] {
            assert_eq!(
                order(op, &[reference(), from.clone(), to.clone()]),
                sender(7)
            );
        }
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
        for op in [31, 32] {
            let reply = |result| order(op, &[reference(), pid(7), flags.clone(), result]);
            assert_eq!(reply(pid(9)), sender(9));
            assert_eq!(reply(atom("system_limit")), Order::Fence);
        }
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
}
