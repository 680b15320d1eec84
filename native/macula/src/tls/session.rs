//! What a handshake shows beside its outcome. Quinn does not say whether a session was resumed, whether a
//! ticket has come, or why a verifier refused; rustls tells its verifiers, signers and stores, which do not know
//! of which connection. So the sessions that rustls makes are wrapped: while one of them reads, its thread
//! knows whose `Seen` it is.

use std::any::Any;
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::BytesMut;
use quinn_proto::VarInt;
use quinn_proto::crypto::rustls::HandshakeData;
use quinn_proto::transport_parameters::TransportParameters;
use rustler::Atom;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme};
use tokio::sync::Notify;

use super::limits::Limits;
use super::padding;
use super::watched::Watch;

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

/// Keeps what passes in a `Seen`, and reads in the peer's packets how many streams it allows.
#[derive(Clone, Default)]
pub(crate) struct Noticing(pub(crate) Arc<Seen>);

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

impl Watch for Noticing {
    fn read<T>(&self, read: impl FnOnce() -> T) -> T {
        let _reading = Reading::of(&self.0);
        read()
    }

    fn tell(&self, data: Box<dyn Any>) -> Option<Box<dyn Any>> {
        let told = data.downcast().ok()?;
        Some(Box::new(Data {
            told: *told,
            seen: self.0.clone(),
        }))
    }

    fn has_early_keys(&self) {
        self.0.early.store(true, Ordering::Release);
    }

    fn has_parameters(&self, parameters: &TransportParameters) {
        self.0.limits.begin(parameters);
    }

    /// Makes a close of the transport of one of the application, where an alert ends the connection.
    fn encrypts(&self, payload: &mut [u8]) {
        let alert = self.0.alert.load(Ordering::Acquire);
        if alert != 0 {
            make_alert(payload, alert);
        }
    }

    fn has_decrypted(&self, payload: &mut BytesMut) {
        padding::cut(payload);
        self.0.limits.read(payload);
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
