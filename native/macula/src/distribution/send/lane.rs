//! The two lanes of a link.

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Lane {
    Express,
    Bulk,
}

impl Lane {
    pub(crate) const ALL: [Lane; 2] = [Lane::Express, Lane::Bulk];

    pub(crate) fn index(self) -> usize {
        self as usize
    }

    pub(crate) fn other(self) -> Lane {
        match self {
            Lane::Express => Lane::Bulk,
            Lane::Bulk => Lane::Express,
        }
    }

    /// The lane of a preamble.
    pub(crate) fn of(number: u16) -> Option<Lane> {
        Lane::ALL.get(usize::from(number)).copied()
    }
}
