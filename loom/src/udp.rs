//! No packet leaves.

pub(crate) mod asynchronous {
    pub(crate) trait AsyncUdpSocket: Send + Sync {}

    impl AsyncUdpSocket for () {}
}
