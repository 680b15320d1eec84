//! What a handshake shows beside its outcome. Quinn does not say whether a session was resumed, whether a
//! ticket has come, or why a verifier refused; rustls tells its verifiers, signers and stores, which do not know
//! of which connection. So the sessions that rustls makes are wrapped: while one of them reads, its thread
//! knows whose `Seen` it is.

use std::any::Any;
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::BytesMut;
use quinn_proto::crypto::rustls::HandshakeData;
use quinn_proto::crypto::{
    self, CryptoError, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey,
    UnsupportedVersion,
};
use quinn_proto::transport_parameters::TransportParameters;
use quinn_proto::{ConnectError, ConnectionId, Side, TransportError, VarInt};
use rustler::Atom;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme};
use tokio::sync::Notify;

use super::limits::Limits;
use super::padding;

/// What was seen of one handshake.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// A certificate was sent by the server, which a resumed session does without.
    full: AtomicBool,
    /// This end has keys for early data.
    early: AtomicBool,
    /// Why the certificate of the peer was refused.
    refusal: Mutex<Option<Atom>>,
    /// Tickets have come.
    tickets: Notify,
    /// The TLS alert by which this side ends the connection; 0 for none.
    alert: AtomicU8,
    /// The streams that the peer allows.
    limits: Limits,
}

/// What the peer sees beside an alert.
const REFUSED: &[u8] = b"certificate refused";

impl Seen {
    /// Of a handshake's data.
    pub(crate) fn within(data: Box<dyn Any>) -> Option<Arc<Self>> {
        Some(data.downcast::<Data>().ok()?.seen)
    }

    /// Whether the session was resumed, once the handshake is done.
    pub(crate) fn resumed(&self) -> bool {
        !self.full.load(Ordering::Acquire)
    }

    /// Whether this end sends, or a server reads, early data.
    pub(crate) fn has_early_keys(&self) -> bool {
        self.early.load(Ordering::Acquire)
    }

    pub(crate) fn refusal(&self) -> Option<Atom> {
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The code and the reason that, closed with, end the connection by a TLS alert (RFC 9001, section 4.8),
    /// although the handshake is done.
    ///
    /// QUIC lets an application send closes of its own kind alone. So it sends one of those, with the code of
    /// the alert, and the session makes one of the transport of it before the packet is encrypted.
    pub(crate) fn refuse(&self, alert: u8) -> (VarInt, Vec<u8>) {
        self.alert.store(alert, Ordering::Release);
        let code = 0x100 + u32::from(alert);
        // A byte more: that of the frame type, which closes of applications lack.
        (VarInt::from_u32(code), [REFUSED, b"."].concat())
    }

    /// How many streams the peer has allowed so far, bidirectional and unidirectional ones, once it has said.
    pub(crate) fn allowed_streams(&self) -> Option<[u64; 2]> {
        self.limits.known()
    }

    /// Returns when tickets have come since it returned before.
    pub(crate) async fn ticket(&self) {
        self.tickets.notified().await;
    }
}

thread_local! {
    static READING: RefCell<Option<Arc<Seen>>> = const { RefCell::new(None) };
}

fn note(what: impl FnOnce(&Seen)) {
    READING.with(|reading| {
        if let Some(seen) = &*reading.borrow() {
            what(seen);
        }
    });
}

/// The server's certificate is being verified.
pub(crate) fn note_certificate() {
    note(|seen| seen.full.store(true, Ordering::Release));
}

/// The server's certificate was refused.
pub(crate) fn note_refusal(why: Atom) {
    note(|seen| *seen.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(why));
}

/// A ticket has come.
pub(crate) fn note_ticket() {
    note(|seen| seen.tickets.notify_one());
}

/// What the handshake told, as Quinn's `HandshakeData`, and what was seen of it.
pub(crate) struct Data {
    pub(crate) told: HandshakeData,
    pub(crate) seen: Arc<Seen>,
}

struct Session {
    inner: Box<dyn crypto::Session>,
    seen: Arc<Seen>,
}

/// The thread reads for a session while this lives.
struct Reading;

impl Reading {
    fn of(seen: &Arc<Seen>) -> Self {
        READING.set(Some(seen.clone()));
        Reading
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        READING.set(None);
    }
}

impl crypto::Session for Session {
    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        self.inner.initial_keys(dst_cid, side)
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        let told = self.inner.handshake_data()?.downcast().ok()?;
        Some(Box::new(Data {
            told: *told,
            seen: self.seen.clone(),
        }))
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.inner.peer_identity()
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        let (header, packet) = self.inner.early_crypto()?;
        self.seen.early.store(true, Ordering::Release);
        Some((header, Watching::within(packet, &self.seen)))
    }

    fn early_data_accepted(&self) -> Option<bool> {
        self.inner.early_data_accepted()
    }

    fn is_handshaking(&self) -> bool {
        self.inner.is_handshaking()
    }

    fn read_handshake(&mut self, buf: &[u8]) -> Result<bool, TransportError> {
        let _reading = Reading::of(&self.seen);
        self.inner.read_handshake(buf)
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        let parameters = self.inner.transport_parameters()?;
        if let Some(parameters) = &parameters {
            self.seen.limits.begin(parameters);
        }
        Ok(parameters)
    }

    fn write_handshake(&mut self, buf: &mut Vec<u8>) -> Option<Keys> {
        let mut keys = self.inner.write_handshake(buf)?;
        keys.packet = Watching::pair(keys.packet, &self.seen);
        Some(keys)
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let keys = self.inner.next_1rtt_keys()?;
        Some(Watching::pair(keys, &self.seen))
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

/// A key that reads in the peer's packets how many streams it allows, and makes a close of the transport of one
/// of the application, where an alert ends the connection.
struct Watching {
    inner: Box<dyn PacketKey>,
    seen: Arc<Seen>,
}

impl Watching {
    fn within(inner: Box<dyn PacketKey>, seen: &Arc<Seen>) -> Box<dyn PacketKey> {
        let seen = seen.clone();
        Box::new(Watching { inner, seen })
    }

    fn pair(keys: KeyPair<Box<dyn PacketKey>>, seen: &Arc<Seen>) -> KeyPair<Box<dyn PacketKey>> {
        KeyPair {
            local: Watching::within(keys.local, seen),
            remote: Watching::within(keys.remote, seen),
        }
    }
}

/// CONNECTION_CLOSE of the transport (RFC 9000, section 19.19), and that of the application: the same but for
/// the type of the frame that was wrong, which no frame is here.
fn make_alert(payload: &mut [u8], alert: u8) {
    let length = REFUSED.len() as u8;
    let of_application = [&[0x1d, 0x41, alert, length + 1], REFUSED, b"."].concat();
    let of_transport = [&[0x1c, 0x41, alert, 0, length], REFUSED].concat();
    let at = payload
        .windows(of_application.len())
        .rposition(|window| window == of_application);
    if let Some(place) = at.and_then(|at| payload.get_mut(at..at + of_transport.len())) {
        place.copy_from_slice(&of_transport);
    }
}

impl PacketKey for Watching {
    fn encrypt(&self, packet: u64, buf: &mut [u8], header_len: usize) {
        let alert = self.seen.alert.load(Ordering::Acquire);
        if alert != 0 {
            let end = buf.len().saturating_sub(self.inner.tag_len());
            if let Some(payload) = buf.get_mut(header_len..end) {
                make_alert(payload, alert);
            }
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
        padding::cut(payload);
        self.seen.limits.read(payload);
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

/// For one dial.
pub(crate) struct Client<C> {
    pub(crate) inner: Arc<C>,
    pub(crate) seen: Arc<Seen>,
}

impl<C: crypto::ClientConfig> crypto::ClientConfig for Client<C> {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        server_name: &str,
        params: &TransportParameters,
    ) -> Result<Box<dyn crypto::Session>, ConnectError> {
        let inner = self.inner.clone();
        Ok(Box::new(Session {
            inner: inner.start_session(version, server_name, params)?,
            seen: self.seen.clone(),
        }))
    }
}

/// For all connections of a listener.
pub(crate) struct Server<C>(pub(crate) Arc<C>);

impl<C: crypto::ServerConfig> crypto::ServerConfig for Server<C> {
    fn initial_keys(
        &self,
        version: u32,
        dst_cid: &ConnectionId,
    ) -> Result<Keys, UnsupportedVersion> {
        self.0.initial_keys(version, dst_cid)
    }

    fn retry_tag(&self, version: u32, orig_dst_cid: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.0.retry_tag(version, orig_dst_cid, packet)
    }

    fn start_session(
        self: Arc<Self>,
        version: u32,
        params: &TransportParameters,
    ) -> Box<dyn crypto::Session> {
        Box::new(Session {
            inner: self.0.clone().start_session(version, params),
            seen: Arc::default(),
        })
    }
}

/// Has what a resolver answers note that it signs: a server signs in full handshakes alone.
#[derive(Debug)]
pub(crate) struct Noting(pub(crate) Arc<dyn ResolvesServerCert>);

impl ResolvesServerCert for Noting {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut key = CertifiedKey::clone(&*self.0.resolve(hello)?);
        key.key = Arc::new(NotingKey(key.key));
        Some(Arc::new(key))
    }

    fn only_raw_public_keys(&self) -> bool {
        self.0.only_raw_public_keys()
    }
}

#[derive(Debug)]
struct NotingKey(Arc<dyn SigningKey>);

impl SigningKey for NotingKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        note_certificate();
        self.0.choose_scheme(offered)
    }

    fn public_key(&self) -> Option<rustls::pki_types::SubjectPublicKeyInfoDer<'_>> {
        self.0.public_key()
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.0.algorithm()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_takes_the_place_of_a_close_and_of_nothing_else() {
        let before = b"\x02\x10\x00\x00\x10";
        let reason = b"certificate refused.";
        let close = [&[0x1d, 0x41, 42, 20], reason.as_slice()].concat();
        let mut payload = [before.as_slice(), &close, &[0, 0]].concat();
        make_alert(&mut payload, 42);
        let alert = [&[0x1c, 0x41, 42, 0, 19], REFUSED].concat();
        assert_eq!([before.as_slice(), &alert, &[0, 0]].concat(), payload);
        let mut other = [before.as_slice(), &close].concat();
        let same = other.clone();
        make_alert(&mut other, 48);
        assert_eq!(same, other);
        make_alert(&mut [], 42);
    }
}
