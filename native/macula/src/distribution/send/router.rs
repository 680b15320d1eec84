//! Which lane a packet goes into.
//!
//! A small message may overtake a large one that another process sent earlier, and nothing else changes its
//! place. Everything goes into the express lane, in the VM's own order, but for what *bulk* senders send: a
//! sender becomes bulk with the packet that brings its unsent bytes over the mark, and stays so until all it has
//! sent is reported delivered. Bulk never overtakes: before a bulk packet stands a *mark* where express has
//! moved, and the peer delivers the packet when the express lane has delivered so many.
//!
//! | packet | goes |
//! |--------|------|
//! | of a sender | into express, or into bulk with all that is the sender's |
//! | a later fragment | after the first one of its message |
//! | a `DOWN` from a process monitored by name, a refused spawn | into bulk: after all before it |
//! | anything unknown | into bulk; and what follows in express waits for it |
//!
//! When bulk holds nothing undelivered, express does for all of them.

use std::collections::HashMap;

use super::super::classify::{Class, Order, Part, Sender};
use super::lane::Lane;
use super::queue::Senders;

/// Where a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) lane: Lane,
    /// Stands before the packet: so many packets of the other lane come first.
    pub(crate) mark: Option<u64>,
    pub(crate) sender: Option<Sender>,
}

/// How a message that has begun goes on.
#[derive(Debug, Clone, Copy)]
struct Open {
    lane: Lane,
    sender: Option<Sender>,
    barrier: bool,
}

/// What a report of the peer can't say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReportError {
    #[error("{0} packets reported where {1} were sent")]
    NotSent(u64, u64),
    #[error("{0} packets reported after {1}")]
    Backwards(u64, u64),
}

/// Chooses lanes for the packets of a link, in the order in which the VM gives them.
#[derive(Debug)]
pub(crate) struct Router {
    /// One lane, and one order.
    single: bool,
    /// Messages whose last fragment has not been seen. A process has one at a time, so they are few.
    open: HashMap<u64, Open>,
    /// The last bulk packet of each bulk sender.
    bulk: Senders<u64>,
    /// Packets put into each lane.
    put: [u64; 2],
    /// The last mark in each lane.
    marked: [u64; 2],
    /// Bulk packets that the peer has delivered.
    delivered: u64,
    /// So many bulk packets come before all that goes into express from now on.
    barrier: u64,
}

impl Router {
    pub(crate) fn new(single: bool) -> Self {
        Self {
            single,
            open: HashMap::new(),
            bulk: Senders::default(),
            put: [0; 2],
            marked: [0; 2],
            delivered: 0,
            barrier: 0,
        }
    }

    /// `is_heavy` tells whether the sender's unsent bytes pass the mark with this packet.
    pub(crate) fn route(&mut self, class: &Class, is_heavy: impl FnOnce(Sender) -> bool) -> Route {
        let open = self.place(class, is_heavy);
        match class.part {
            Part::First { message, .. } => {
                self.open.insert(message, open);
            }
            Part::Next {
                message,
                last: true,
            } => {
                self.open.remove(&message);
            }
            _ => (),
        }
        let mark = match open.lane {
            Lane::Bulk => Some(self.put[0]),
            Lane::Express if self.barrier > self.delivered => Some(self.barrier),
            Lane::Express => None,
        };
        let marked = &mut self.marked[open.lane.index()];
        let mark = mark.filter(|mark| mark > marked);
        if let Some(mark) = mark {
            *marked = mark;
        }
        let put = &mut self.put[open.lane.index()];
        *put += 1;
        if open.lane == Lane::Bulk {
            if let Some(sender) = open.sender {
                self.bulk.insert(sender, *put);
            }
            if open.barrier {
                self.barrier = *put;
            }
        }
        Route {
            lane: open.lane,
            mark,
            sender: open.sender,
        }
    }

    fn place(&mut self, class: &Class, is_heavy: impl FnOnce(Sender) -> bool) -> Open {
        let unknown = Open {
            lane: self.behind_all(),
            sender: None,
            barrier: true,
        };
        match (class.part, class.order) {
            (Part::Next { message, .. }, _) => self.open.get(&message).copied().unwrap_or(unknown),
            (_, Order::Sender(sender)) => {
                let is_bulk = !self.single && (self.bulk.contains_key(&sender) || is_heavy(sender));
                Open {
                    lane: if is_bulk { Lane::Bulk } else { Lane::Express },
                    sender: Some(sender),
                    barrier: false,
                }
            }
            (_, Order::Fence) => Open {
                barrier: !class.may_lack_sender(),
                ..unknown
            },
        }
    }

    /// The lane of what comes after all that was sent before.
    fn behind_all(&self) -> Lane {
        if self.delivered < self.put[1] {
            Lane::Bulk
        } else {
            Lane::Express
        }
    }

    /// The peer reports so many bulk packets delivered, in all.
    pub(crate) fn delivered(&mut self, count: u64) -> Result<(), ReportError> {
        if count > self.put[1] {
            return Err(ReportError::NotSent(count, self.put[1]));
        }
        if count < self.delivered {
            return Err(ReportError::Backwards(count, self.delivered));
        }
        self.delivered = count;
        self.bulk.retain(|_, last| *last > count);
        Ok(())
    }

    /// The mark that stands at the end of the express lane: the end of that lane is the end of the link.
    pub(crate) fn last_mark(&self) -> Option<u64> {
        (self.put[1] > self.delivered.max(self.marked[0])).then_some(self.put[1])
    }
}

#[cfg(test)]
impl Router {
    /// Open messages, and bulk senders.
    pub(crate) fn remembered(&self) -> (usize, usize) {
        (self.open.len(), self.bulk.len())
    }
}
