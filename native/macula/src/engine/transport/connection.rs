//! A connection, for those that use it.

use std::any::Any;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn_proto::{self as proto, ConnectionError, ConnectionStats, Dir, Side, StreamId, VarInt};
use tokio::sync::Notify;

use super::errors::SendDatagramError;
use super::recv::RecvStream;
use super::send::SendStream;
use super::state::{Alive, Guard};
use super::way::Way;
use crate::engine::parting;
use crate::udp::asynchronous::AsyncUdpSocket;

/// The last one closes the connection, unless a stream is left.
#[derive(Clone)]
pub(crate) struct Connection(Arc<Alive>);

impl Connection {
    pub(super) fn new(alive: Arc<Alive>) -> Self {
        Connection(alive)
    }

    fn lock(&self) -> Guard<'_> {
        self.0.lock()
    }

    /// Waits until `look` finds something.
    async fn until<T>(
        &self,
        told: &Notify,
        mut look: impl FnMut(&mut Guard<'_>) -> Option<T>,
    ) -> T {
        loop {
            // Whatever happens from here on is heard.
            let told = told.notified();
            if let Some(found) = look(&mut self.lock()) {
                return found;
            }
            told.await;
        }
    }

    async fn open(&self, dir: Dir) -> Result<(StreamId, bool), ConnectionError> {
        let opened = self.until(&self.0.told.available[dir as usize], |state| {
            if let Some(error) = &state.error {
                return Some(Err(error.clone()));
            }
            let id = state.proto.streams().open(dir)?;
            Some(Ok((id, state.is_early())))
        });
        opened.await
    }

    async fn accept(&self, dir: Dir) -> Result<(StreamId, bool), ConnectionError> {
        let accepted = self.until(&self.0.told.opened[dir as usize], |state| {
            if let Some(error) = state.broken() {
                return Some(Err(error));
            }
            // What has come whole is there for a connection that is lost, too.
            match state.proto.streams().accept(dir) {
                Some(id) => Some(Ok((id, state.is_early()))),
                None => state.error.clone().map(Err),
            }
        });
        let accepted = accepted.await;
        // The peer may open another.
        self.0.wake();
        accepted
    }

    fn both(&self, (id, early): (StreamId, bool)) -> (SendStream, RecvStream) {
        let send = SendStream::new(self.0.clone(), id, early);
        (send, RecvStream::new(self.0.clone(), id, early))
    }

    pub(crate) async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        Ok(self.both(self.open(Dir::Bi).await?))
    }

    pub(crate) async fn open_uni(&self) -> Result<SendStream, ConnectionError> {
        let (id, early) = self.open(Dir::Uni).await?;
        Ok(SendStream::new(self.0.clone(), id, early))
    }

    pub(crate) async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        Ok(self.both(self.accept(Dir::Bi).await?))
    }

    pub(crate) async fn accept_uni(&self) -> Result<RecvStream, ConnectionError> {
        let (id, early) = self.accept(Dir::Uni).await?;
        Ok(RecvStream::new(self.0.clone(), id, early))
    }

    pub(crate) async fn read_datagram(&self) -> Result<Bytes, ConnectionError> {
        let datagram = self.until(&self.0.told.datagram, |state| {
            if let Some(error) = state.broken() {
                return Some(Err(error));
            }
            match state.proto.datagrams().recv() {
                Some(datagram) => Some(Ok(datagram)),
                None => state.error.clone().map(Err),
            }
        });
        datagram.await
    }

    /// Sends a datagram now; the oldest that wait are dropped for want of room.
    pub(crate) fn send_datagram(&self, data: Bytes) -> Result<(), SendDatagramError> {
        let mut state = self.lock();
        send_datagram(&mut state, data, true)?;
        drop(state);
        self.0.wake();
        Ok(())
    }

    /// Sends a datagram as soon as there is room.
    pub(crate) async fn send_datagram_wait(&self, data: Bytes) -> Result<(), SendDatagramError> {
        let mut waiting = Some(data);
        let sent = self.until(&self.0.told.datagram_room, |state| {
            let data = waiting.take()?;
            match send_datagram(state, data, false) {
                Ok(None) => Some(Ok(())),
                Ok(Some(data)) => {
                    waiting = Some(data);
                    None
                }
                Err(error) => Some(Err(error)),
            }
        });
        let sent = sent.await;
        if sent.is_ok() {
            self.0.wake();
        }
        sent
    }

    /// Nothing where the peer takes none.
    pub(crate) fn max_datagram_size(&self) -> Option<usize> {
        self.lock().proto.datagrams().max_size()
    }

    /// Completes when the connection is lost or closed.
    pub(crate) async fn closed(&self) -> ConnectionError {
        self.until(&self.0.told.closed, |state| state.error.clone())
            .await
    }

    pub(crate) fn close_reason(&self) -> Option<ConnectionError> {
        self.lock().error.clone()
    }

    pub(crate) fn close(&self, code: VarInt, reason: &[u8]) {
        let reason = Bytes::copy_from_slice(reason);
        let mut state = self.lock();
        state.close(code, reason, &self.0.told);
        drop(state);
        self.0.wake();
    }

    /// Has streams that wait for the connection's window take turns.
    pub(crate) fn take_turns(&self) {
        self.lock().shares.start();
    }

    pub(crate) fn side(&self) -> Side {
        self.lock().proto.side()
    }

    pub(crate) fn remote_address(&self) -> SocketAddr {
        self.lock().proto.remote_address()
    }

    /// Where the peer's packets go, if the system tells.
    pub(crate) fn local_ip(&self) -> Option<IpAddr> {
        self.lock().proto.local_ip()
    }

    pub(crate) fn rtt(&self) -> Duration {
        self.lock().proto.rtt()
    }

    pub(crate) fn stats(&self) -> ConnectionStats {
        let state = self.lock();
        let mut stats = state.proto.stats();
        stats.path.cwnd = parting::window(state.proto.congestion_state());
        stats
    }

    /// Of the TLS session: `Data` of whoever made the session.
    pub(crate) fn handshake_data(&self) -> Option<Box<dyn Any>> {
        self.lock().proto.crypto_session().handshake_data()
    }

    pub(crate) fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.lock().proto.crypto_session().peer_identity()
    }

    pub(crate) fn export_keying_material(
        &self,
        output: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), proto::crypto::ExportKeyingMaterialError> {
        let state = self.lock();
        let session = state.proto.crypto_session();
        session.export_keying_material(output, label, context)
    }

    /// Completes when the peer has let more streams be opened than when this was called.
    pub(crate) fn more_streams(&self) -> impl Future<Output = ()> + '_ {
        let [bi, uni] = &self.0.told.available;
        let (bi, uni) = (bi.notified(), uni.notified());
        async {
            tokio::select! {
                () = bi => {}
                () = uni => {}
            }
        }
    }

    /// The streams of the peer that are not over, bidirectional and unidirectional ones.
    pub(crate) fn remote_streams(&self) -> [u64; 2] {
        let mut state = self.lock();
        let streams = state.proto.streams();
        [Dir::Bi, Dir::Uni].map(|dir| streams.remote_open_streams(dir))
    }

    /// What the peer may send ahead, all streams together.
    pub(crate) fn set_receive_window(&self, window: VarInt) {
        self.lock().proto.set_receive_window(window);
        self.0.wake();
    }

    /// What is kept that the peer has not acknowledged.
    pub(crate) fn set_send_window(&self, window: u64) {
        self.lock().proto.set_send_window(window);
        self.0.wake();
    }

    pub(crate) fn set_max_concurrent_uni_streams(&self, count: VarInt) {
        let mut state = self.lock();
        state.proto.set_max_concurrent_streams(Dir::Uni, count);
        drop(state);
        self.0.wake();
    }

    pub(crate) fn set_max_concurrent_bi_streams(&self, count: VarInt) {
        let mut state = self.lock();
        state.proto.set_max_concurrent_streams(Dir::Bi, count);
        drop(state);
        self.0.wake();
    }

    /// As `set_max_concurrent_bi_streams`, and the peer is told in any case. QUIC by itself waits until an eighth of the
    /// number is free again.
    pub(crate) fn tell_max_concurrent_bi_streams(&self, count: VarInt) {
        let mut state = self.lock();
        // An eighth of nothing.
        for count in [VarInt::from_u32(0), count] {
            state.proto.set_max_concurrent_streams(Dir::Bi, count);
        }
        drop(state);
        self.0.wake();
    }

    /// Has the connection leave by another socket: the peer gets another connection id and a PING. Returns
    /// the socket of before, or nothing where the connection is over.
    pub(crate) fn leave_by(
        &self,
        socket: Arc<dyn AsyncUdpSocket>,
    ) -> Option<Arc<dyn AsyncUdpSocket>> {
        let mut state = self.lock();
        if state.is_broken {
            return None;
        }
        let before = std::mem::replace(state.way.as_mut()?, Way::new(socket));
        state.proto.local_address_changed();
        drop(state);
        self.0.wake();
        Some(before.socket)
    }
}

/// Gives back what there is no room for.
fn send_datagram(
    state: &mut Guard<'_>,
    data: Bytes,
    makes_room: bool,
) -> Result<Option<Bytes>, SendDatagramError> {
    if let Some(error) = &state.error {
        return Err(error.clone().into());
    }
    match state.proto.datagrams().send(data, makes_room) {
        Ok(()) => Ok(None),
        Err(proto::SendDatagramError::Blocked(data)) => Ok(Some(data)),
        Err(proto::SendDatagramError::UnsupportedByPeer) => {
            Err(SendDatagramError::UnsupportedByPeer)
        }
        Err(proto::SendDatagramError::Disabled) => Err(SendDatagramError::Disabled),
        Err(proto::SendDatagramError::TooLarge) => Err(SendDatagramError::TooLarge),
    }
}
