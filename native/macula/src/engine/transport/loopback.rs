//! A socket of this host's own, for tests.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use crate::udp::asynchronous::AsyncUdpSocket;
use crate::udp::socket::{Replace, Unpaced, WrapOptions, Wrapped, bind};
use crate::udp::wrap::wrap;

pub(crate) fn loopback() -> Arc<dyn AsyncUdpSocket> {
    wrapped().socket
}

pub(crate) fn wrapped() -> Wrapped {
    let socket = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("bound");
    let options = WrapOptions {
        max_datagram: 1472,
        news: None,
        replace: Replace {
            bind: Box::new(bind),
            any_port: true,
            within: None,
        },
        inspects: false,
    };
    wrap::<Unpaced>(socket, options).expect("wrapped")
}
