//! Merges the lanes of a link into one order.
//!
//! A mark in a lane says how many packets of the other lane come before what follows it. A lane that waits is
//! not read, so the transport's flow control holds the peer.

use super::super::send::lane::Lane;

/// A peer that breaks the rules of marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FenceError {
    #[error("a mark of {0} after one of {1}")]
    Backwards(u64, u64),
    #[error("lanes that wait for each other")]
    Circle,
    #[error("a mark of {0} where the other lane has ended with {1}")]
    Ended(u64, u64),
}

#[derive(Debug, Default)]
struct Side {
    delivered: u64,
    mark: u64,
    waits: bool,
    ended: bool,
}

/// How far the lanes of a link are.
#[derive(Debug, Default)]
pub(crate) struct Fence([Side; 2]);

impl Fence {
    /// A lane has come to a mark, and all before it is delivered. True when it may go on.
    pub(crate) fn mark(&mut self, lane: Lane, mark: u64) -> Result<bool, FenceError> {
        let side = &mut self.0[lane.index()];
        if mark <= side.mark {
            return Err(FenceError::Backwards(mark, side.mark));
        }
        side.mark = mark;
        side.waits = true;
        self.check(lane)?;
        Ok(self.may_go(lane))
    }

    /// Tells whether a lane that has come to a mark may go on. When it may, it is taken to do so.
    pub(crate) fn may_go(&mut self, lane: Lane) -> bool {
        if self.is_reached(lane) {
            self.0[lane.index()].waits = false;
        }
        !self.0[lane.index()].waits
    }

    /// Packets of a lane have been delivered. True when the other lane waited for them.
    pub(crate) fn delivered(&mut self, lane: Lane, count: u64) -> bool {
        self.0[lane.index()].delivered += count;
        self.0[lane.other().index()].waits && self.is_reached(lane.other())
    }

    /// Nothing more comes in a lane.
    pub(crate) fn ended(&mut self, lane: Lane) -> Result<(), FenceError> {
        self.0[lane.index()].ended = true;
        self.check(lane.other())
    }

    /// Packets of a lane that have been delivered.
    pub(crate) fn count(&self, lane: Lane) -> u64 {
        self.0[lane.index()].delivered
    }

    fn is_reached(&self, lane: Lane) -> bool {
        self.0[lane.other().index()].delivered >= self.0[lane.index()].mark
    }

    /// What a lane waits for can still come.
    fn check(&self, lane: Lane) -> Result<(), FenceError> {
        let side = &self.0[lane.index()];
        let other = &self.0[lane.other().index()];
        if !side.waits || self.is_reached(lane) {
            return Ok(());
        }
        if other.ended {
            return Err(FenceError::Ended(side.mark, other.delivered));
        }
        if other.waits && !self.is_reached(lane.other()) {
            return Err(FenceError::Circle);
        }
        Ok(())
    }
}
