//! The UDP socket below the distribution's endpoint: as any other, but processes may send on it too,
//! and threads of the VM are not to be kept.

use std::io;
use std::net::UdpSocket;
use std::sync::Arc;

use quinn::AsyncUdpSocket;

use super::endpoint::MAX_DATAGRAM;
use super::{boost, driver};
use crate::socket::Pace;

pub(crate) use crate::socket::{Refusals, bind_any as bind, mapped, plain};

#[derive(Debug)]
struct Visits;

impl Pace for Visits {
    fn is_slow() -> bool {
        driver::is_visit()
    }

    fn may_send() -> bool {
        driver::may_send()
    }

    fn moved(bytes: usize) {
        boost::moved(bytes);
    }
}

/// Must be called inside the runtime.
pub(crate) fn wrap(
    socket: UdpSocket,
    refusals: Option<Refusals>,
) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    crate::socket::wrap::<Visits>(socket, MAX_DATAGRAM, refusals).map(|wrapped| wrapped.socket)
}
