//! Who gets what arrives: the modes of a stream, as `inet:setopts/2` has them for sockets.

use rustler::{Atom, Encoder, Env, Term};

use crate::vm::messages::atoms;

/// What `{active, N}` may count to, as in `inet:setopts/2`.
const MAX_ACTIVE: i64 = 32767;

/// Who asked for data, beside those who wait for it in a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Active {
    Off,
    On,
    Once,
    /// So many messages; as a request, to be added to what is left.
    Count(i64),
}

/// A count outside of its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutOfRange;

impl Active {
    pub(crate) fn decode(term: Term) -> Option<Active> {
        if let Ok(on) = term.decode::<bool>() {
            return Some(if on { Active::On } else { Active::Off });
        }
        if let Ok(count) = term.decode::<i64>() {
            return Some(Active::Count(count));
        }
        (term.decode::<Atom>().ok()? == atoms::once()).then_some(Active::Once)
    }

    /// The mode after a request, and whether a count has come to its end by the request, as it may by a
    /// negative number.
    pub(crate) fn change(self, request: Active) -> Result<(Active, bool), OutOfRange> {
        let Active::Count(more) = request else {
            return Ok((request, false));
        };
        let left = if let Active::Count(left) = self {
            left
        } else {
            0
        };
        match left.saturating_add(more) {
            sum if sum > MAX_ACTIVE || !(-MAX_ACTIVE - 1..=MAX_ACTIVE).contains(&more) => {
                Err(OutOfRange)
            }
            sum if sum <= 0 => Ok((Active::Off, true)),
            sum => Ok((Active::Count(sum), false)),
        }
    }

    /// The mode after one message.
    pub(crate) fn after_message(self) -> Active {
        match self {
            Active::Off | Active::Once | Active::Count(..=1) => Active::Off,
            Active::On => Active::On,
            Active::Count(n) => Active::Count(n - 1),
        }
    }
}

impl Encoder for Active {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Active::Off => false.encode(env),
            Active::On => true.encode(env),
            Active::Once => atoms::once().encode(env),
            Active::Count(left) => left.encode(env),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_and_end() {
        let two = Active::Off.change(Active::Count(2));
        assert_eq!(Ok((Active::Count(2), false)), two);
        assert_eq!(
            Ok((Active::Count(5), false)),
            Active::Count(2).change(Active::Count(3))
        );
        assert_eq!(
            Ok((Active::Off, true)),
            Active::Count(2).change(Active::Count(-2))
        );
        assert_eq!(
            Err(OutOfRange),
            Active::Count(1).change(Active::Count(MAX_ACTIVE))
        );
        assert_eq!(
            Err(OutOfRange),
            Active::Off.change(Active::Count(-MAX_ACTIVE - 2))
        );
        assert_eq!(Ok((Active::Once, false)), Active::On.change(Active::Once));
        assert_eq!(Active::Count(1), Active::Count(2).after_message());
        assert_eq!(Active::Off, Active::Count(1).after_message());
        assert_eq!(Active::Off, Active::Once.after_message());
        assert_eq!(Active::On, Active::On.after_message());
    }
}
