//! Those who wait for something, first come first.
//!
//! Who has given up, or died, tells nobody, and is found by a look at all of them. That is taken when they are twice as
//! many as the last one has left, so that it costs each of them a constant time however many they are.

use std::collections::VecDeque;

/// So few may be gone without anybody having looked.
pub(crate) const FEW: usize = 16;

/// When a line is looked through for those who are gone: when it is twice as long as the last look has left it.
pub(crate) struct Look(usize);

impl Default for Look {
    fn default() -> Self {
        Look(FEW)
    }
}

impl Look {
    /// Takes those out who are gone, if it is time. To be called before the line gets longer.
    pub(crate) fn through<T>(&mut self, line: &mut VecDeque<T>, is_gone: impl Fn(&T) -> bool) {
        if line.len() >= self.0 {
            line.retain(|one| !is_gone(one));
            self.0 = FEW.max(2 * line.len());
        }
    }
}

pub(crate) struct Waiters<T> {
    line: VecDeque<T>,
    look: Look,
}

impl<T> Default for Waiters<T> {
    fn default() -> Self {
        Self {
            line: VecDeque::new(),
            look: Look::default(),
        }
    }
}

impl<T> Waiters<T> {
    /// One more, behind all others.
    pub(crate) fn join(&mut self, waiter: T, is_gone: impl Fn(&T) -> bool) {
        self.look.through(&mut self.line, is_gone);
        self.line.push_back(waiter);
    }

    /// The first of them, who waits no more.
    pub(crate) fn first(&mut self) -> Option<T> {
        self.line.pop_front()
    }

    /// All of them, who wait no more.
    pub(crate) fn all(&mut self) -> VecDeque<T> {
        std::mem::take(&mut self.line)
    }

    /// Those wait no more of whom this is true.
    pub(crate) fn take_out(&mut self, is_meant: impl Fn(&T) -> bool) -> VecDeque<T> {
        let (out, left) = self.all().into_iter().partition(is_meant);
        self.line = left;
        out
    }

    /// Those wait no more of whom this is false. It is asked of all, and should take no time.
    pub(crate) fn keep(&mut self, is_kept: impl FnMut(&mut T) -> bool) {
        self.line.retain_mut(is_kept);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.line.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn many_who_wait_are_looked_at_seldom() {
        let looks = Cell::new(0);
        let mut waiters = Waiters::default();
        for n in 0..10_000 {
            waiters.join(n, |_| {
                looks.set(looks.get() + 1);
                false
            });
        }
        assert!(looks.get() < 20_000, "{}", looks.get());
        assert_eq!(Some(0), waiters.first());
        assert_eq!(9_999, waiters.all().len());
        assert!(waiters.is_empty());
    }

    #[test]
    fn those_who_are_gone_are_few() {
        let mut waiters = Waiters::default();
        for n in 0..10_000 {
            // Every hundredth stays.
            waiters.join(n, |n| n % 100 != 0);
        }
        let left = waiters.take_out(|n| n % 100 == 0);
        assert_eq!(100, left.len());
        assert!(waiters.line.len() <= 100 + FEW, "{}", waiters.line.len());
    }
}
