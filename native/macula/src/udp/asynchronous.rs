//! What QUIC needs of a UDP socket.

use std::fmt::Debug;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn_udp::{RecvMeta, Transmit};

/// A socket that one task receives on, and that many send on.
pub(crate) trait AsyncUdpSocket: Debug + Send + Sync {
    /// What one of those that send waits with.
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>>;

    /// Sends one datagram, or several that the system separates. `WouldBlock` says that there is no room.
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()>;

    /// Receives datagrams, or has the task woken when there may be some.
    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>>;

    /// Has what a peer sends to an address of this socket come by another one, as long as that one lives: the one
    /// that does so already, if there is one. It is received from here all the same, and is ahead of nothing of
    /// other peers. `QuotaExceeded` when there are as many as there may be.
    fn part(
        &self,
        _peer: SocketAddr,
        _local: Option<IpAddr>,
    ) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn local_addr(&self) -> io::Result<SocketAddr>;

    /// Datagrams that one call may send.
    fn max_transmit_segments(&self) -> usize;

    /// Datagrams that one buffer may receive.
    fn max_receive_segments(&self) -> usize;

    /// Whether the network may take datagrams apart.
    fn may_fragment(&self) -> bool;
}

/// Waits for leave to send.
pub(crate) trait UdpPoller: Debug + Send {
    /// To be asked before each call, and after one that was refused.
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}
