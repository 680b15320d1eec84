//! As the library's `engine`.

pub(crate) mod transport;

pub(crate) mod parting {
    pub(crate) fn leave(_: quinn_proto::Congestion) {}
}
