//! Sessions of TLS that are watched: what QUIC asks of a session or of a key goes on to the one inside, and a
//! `Watch` sees it pass.

use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;

use bytes::BytesMut;
use quinn_proto::crypto::{
    self, CryptoError, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey,
    UnsupportedVersion,
};
use quinn_proto::transport_parameters::TransportParameters;
use quinn_proto::{ConnectError, ConnectionId, Side, TransportError};

/// Of one connection. Whatever is left out passes as it is.
pub(crate) trait Watch: Clone + Default + Send + Sync + 'static {
    /// Has the session read a part of the handshake.
    fn read<T>(&self, read: impl FnOnce() -> T) -> T {
        read()
    }

    /// What the session tells of its handshake, on the way to those who ask.
    fn tell(&self, data: Box<dyn Any>) -> Option<Box<dyn Any>> {
        Some(data)
    }

    /// This end has keys for early data.
    fn has_early_keys(&self) {}

    /// The peer's.
    fn has_parameters(&self, _parameters: &TransportParameters) {}

    /// The payload of a packet that is about to be encrypted.
    fn encrypts(&self, _payload: &mut [u8]) {}

    /// The payload of a packet of the peer.
    fn has_decrypted(&self, payload: &mut BytesMut);
}

/// A client's configuration.
pub(crate) struct Client<C, W> {
    inner: Arc<C>,
    watch: W,
}

impl<C, W> Client<C, W> {
    /// All connections that are made with the configuration have this one watch.
    pub(crate) fn new(inner: C, watch: W) -> Self {
        let inner = Arc::new(inner);
        Client { inner, watch }
    }
}

impl<C: crypto::ClientConfig, W: Watch> crypto::ClientConfig for Client<C, W> {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        server_name: &str,
        params: &TransportParameters,
    ) -> Result<Box<dyn crypto::Session>, ConnectError> {
        let inner = self.inner.clone();
        Ok(Box::new(Session {
            inner: inner.start_session(version, server_name, params)?,
            watch: self.watch.clone(),
        }))
    }
}

/// A server's configuration.
pub(crate) struct Server<C, W> {
    inner: Arc<C>,
    watch: PhantomData<fn() -> W>,
}

impl<C, W> Server<C, W> {
    /// Each connection that is made with the configuration has a watch of its own.
    pub(crate) fn new(inner: C) -> Self {
        Server {
            inner: Arc::new(inner),
            watch: PhantomData,
        }
    }
}

impl<C: crypto::ServerConfig, W: Watch> crypto::ServerConfig for Server<C, W> {
    fn initial_keys(
        &self,
        version: u32,
        dst_cid: &ConnectionId,
    ) -> Result<Keys, UnsupportedVersion> {
        self.inner.initial_keys(version, dst_cid)
    }

    fn retry_tag(&self, version: u32, orig_dst_cid: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.inner.retry_tag(version, orig_dst_cid, packet)
    }

    fn start_session(
        self: Arc<Self>,
        version: u32,
        params: &TransportParameters,
    ) -> Box<dyn crypto::Session> {
        Box::new(Session {
            inner: self.inner.clone().start_session(version, params),
            watch: W::default(),
        })
    }
}

struct Session<W> {
    inner: Box<dyn crypto::Session>,
    watch: W,
}

impl<W: Watch> Session<W> {
    fn key(&self, inner: Box<dyn PacketKey>) -> Box<dyn PacketKey> {
        let watch = self.watch.clone();
        Box::new(Key { inner, watch })
    }

    fn keys(&self, keys: KeyPair<Box<dyn PacketKey>>) -> KeyPair<Box<dyn PacketKey>> {
        KeyPair {
            local: self.key(keys.local),
            remote: self.key(keys.remote),
        }
    }
}

impl<W: Watch> crypto::Session for Session<W> {
    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        self.inner.initial_keys(dst_cid, side)
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        self.watch.tell(self.inner.handshake_data()?)
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.inner.peer_identity()
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        let (header, packet) = self.inner.early_crypto()?;
        self.watch.has_early_keys();
        Some((header, self.key(packet)))
    }

    fn early_data_accepted(&self) -> Option<bool> {
        self.inner.early_data_accepted()
    }

    fn is_handshaking(&self) -> bool {
        self.inner.is_handshaking()
    }

    fn read_handshake(&mut self, buf: &[u8]) -> Result<bool, TransportError> {
        self.watch.read(|| self.inner.read_handshake(buf))
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        let parameters = self.inner.transport_parameters()?;
        if let Some(parameters) = &parameters {
            self.watch.has_parameters(parameters);
        }
        Ok(parameters)
    }

    fn write_handshake(&mut self, buf: &mut Vec<u8>) -> Option<Keys> {
        let Keys { header, packet } = self.inner.write_handshake(buf)?;
        let packet = self.keys(packet);
        Some(Keys { header, packet })
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let keys = self.inner.next_1rtt_keys()?;
        Some(self.keys(keys))
    }

    fn is_valid_retry(&self, orig_dst_cid: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        self.inner.is_valid_retry(orig_dst_cid, header, payload)
    }

    fn export_keying_material(
        &self,
        output: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        self.inner.export_keying_material(output, label, context)
    }
}

struct Key<W> {
    inner: Box<dyn PacketKey>,
    watch: W,
}

impl<W: Watch> PacketKey for Key<W> {
    fn encrypt(&self, packet: u64, buf: &mut [u8], header_len: usize) {
        let end = buf.len().saturating_sub(self.inner.tag_len());
        if let Some(payload) = buf.get_mut(header_len..end) {
            self.watch.encrypts(payload);
        }
        self.inner.encrypt(packet, buf, header_len);
    }

    fn decrypt(
        &self,
        packet: u64,
        header: &[u8],
        payload: &mut BytesMut,
    ) -> Result<(), CryptoError> {
        self.inner.decrypt(packet, header, payload)?;
        self.watch.has_decrypted(payload);
        Ok(())
    }

    fn tag_len(&self) -> usize {
        self.inner.tag_len()
    }

    fn confidentiality_limit(&self) -> u64 {
        self.inner.confidentiality_limit()
    }

    fn integrity_limit(&self) -> u64 {
        self.inner.integrity_limit()
    }
}
