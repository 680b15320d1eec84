//! Processes that get connections as messages, in turn.

use std::collections::VecDeque;

use crate::vm::waiters::Look;

pub(super) struct Armed<P> {
    /// With how many each still wants, where that is limited.
    turn: VecDeque<(P, Option<u64>)>,
    look: Look,
}

impl<P> Default for Armed<P> {
    fn default() -> Self {
        Armed {
            turn: VecDeque::new(),
            look: Look::default(),
        }
    }
}

impl<P: Copy + PartialEq> Armed<P> {
    /// The process gets so many from now on, or all that come. A dead one tells nobody.
    pub(super) fn arm(&mut self, pid: P, count: Option<u64>, is_dead: impl Fn(P) -> bool) {
        if let Some((_, left)) = self.turn.iter_mut().find(|(armed, _)| *armed == pid) {
            *left = count;
            return;
        }
        self.look
            .through(&mut self.turn, |(armed, _)| is_dead(*armed));
        self.turn.push_back((pid, count));
    }

    /// Whose turn it is. Counted before the process has it, which may arm again at once; and it stays armed until
    /// `served` or `is_gone`, so that arming again finds it.
    pub(super) fn next(&mut self) -> Option<P> {
        let (pid, left) = self.turn.front_mut()?;
        let pid = *pid;
        if let Some(left) = left {
            *left = left.saturating_sub(1);
        }
        self.turn.rotate_left(1);
        Some(pid)
    }

    /// The process has got its turn. True if it was the last one.
    pub(super) fn served(&mut self, pid: P) -> bool {
        self.remove(|(armed, left)| *armed == pid && *left == Some(0))
    }

    /// The process is dead. True if it was armed.
    pub(super) fn is_gone(&mut self, pid: P) -> bool {
        self.remove(|(armed, _)| *armed == pid)
    }

    fn remove(&mut self, is_meant: impl Fn(&(P, Option<u64>)) -> bool) -> bool {
        let at = self.turn.iter().position(is_meant);
        at.and_then(|at| self.turn.remove(at)).is_some()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.turn.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::waiters::FEW;

    #[test]
    fn each_gets_as_many_as_it_wants_in_turn() {
        let mut armed = Armed::default();
        armed.arm(1, Some(2), |_| false);
        armed.arm(2, None, |_| false);
        let mut turns = Vec::new();
        for _ in 0..6 {
            let pid = armed.next().expect("one");
            turns.push((pid, armed.served(pid)));
        }
        let expected = [
            (1, false),
            (2, false),
            (1, true),
            (2, false),
            (2, false),
            (2, false),
        ];
        assert_eq!(expected, turns[..]);
        assert!(armed.is_gone(2));
        assert!(!armed.is_gone(2));
        assert!(armed.is_empty());
    }

    #[test]
    fn who_arms_again_while_served_goes_on() {
        let mut armed = Armed::default();
        armed.arm(1, Some(1), |_| false);
        assert_eq!(Some(1), armed.next());
        armed.arm(1, Some(1), |_| false);
        assert!(!armed.served(1));
        assert_eq!(Some(1), armed.next());
        assert!(armed.served(1));
    }

    #[test]
    fn the_dead_are_few() {
        let mut armed = Armed::default();
        for n in 0..10_000 {
            // Every hundredth lives.
            armed.arm(n, Some(1), |n| n % 100 != 0);
        }
        assert!(armed.turn.len() <= 2 * 100 + FEW, "{}", armed.turn.len());
    }
}
