//! What a process says of a peer's certificates, once the handshake is done and before anybody has the
//! connection. The process has its time: nothing waits for it but the task of this one connection.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustler::{Atom, Encoder, LocalPid, Resource, ResourceArc};
use rustls::pki_types::CertificateDer;
use tokio::sync::oneshot;

use crate::engine::transport::{Connection, VarInt};
use crate::tls::session::Seen;
use crate::vm::error::binary;
use crate::vm::fault::{self, Point};
use crate::vm::messages::{self, Gone, atoms};

mod names {
    rustler::atoms! { verify, stop }
}

/// The TLS alert `internal_error`: nobody has said anything.
pub(crate) const UNDECIDED: u8 = 80;

/// What the process holds until it answers. Where it dies before, this is dropped, which is a no.
struct Question(Mutex<Option<oneshot::Sender<u8>>>);

#[rustler::resource_impl(name = "macula_question")]
impl Resource for Question {}

/// Asks whether a connection may stay; no, with the TLS alert that the peer is to see. A peer without
/// certificates is not asked about. The process has so long.
pub(crate) async fn ask(
    verifier: LocalPid,
    connection: &Connection,
    limit: Option<Duration>,
) -> Result<(), u8> {
    let identity = connection.peer_identity();
    let chain = identity.and_then(|chain| chain.downcast::<Vec<CertificateDer<'static>>>().ok());
    let Some(chain) = chain.filter(|chain| !chain.is_empty()) else {
        return Ok(());
    };
    fault::pass(Point::Verdict);
    let refused = seen(connection).and_then(|seen| seen.refusal());
    let (answer, answered) = oneshot::channel();
    let question = ResourceArc::new(Question(Mutex::new(Some(answer))));
    let asked = messages::send(&verifier, move |env| {
        let ders: Vec<_> = chain.iter().map(|der| binary(env, der)).collect();
        let within = match limit.and_then(|limit| u32::try_from(limit.as_millis()).ok()) {
            Some(within) => within.encode(env),
            None => atoms::infinity().encode(env),
        };
        let native = refused.unwrap_or(atoms::ok());
        Some((names::verify(), question, ders, native, within).encode(env))
    });
    if asked == Err(Gone) {
        return Err(UNDECIDED);
    }
    match answered.await {
        Ok(0) => Ok(()),
        Ok(alert) => Err(alert),
        Err(_) => Err(UNDECIDED),
    }
}

/// Ends a connection so that its peer sees the alert.
pub(crate) fn refuse(connection: &Connection, alert: u8) {
    let (code, reason) = match seen(connection) {
        Some(seen) => seen.refuse(alert),
        None => (VarInt::from_u32(0), Vec::new()),
    };
    connection.close(code, &reason);
}

/// What was seen of the handshake of a connection.
pub(crate) fn seen(connection: &Connection) -> Option<Arc<Seen>> {
    Seen::within(connection.handshake_data()?)
}

/// The process is not needed any more.
pub(crate) fn release(verifier: LocalPid) {
    // It may be dead.
    let _ = messages::send(&verifier, |env| Some(names::stop().encode(env)));
}

/// The answer: 0, or the TLS alert of a refusal. Only the first one counts.
#[rustler::nif]
fn verdict_tell(question: ResourceArc<Question>, alert: u8) -> Atom {
    let mut waiting = question.0.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(answer) = waiting.take() {
        // Nobody may wait any more.
        let _ = answer.send(alert);
    }
    atoms::ok()
}
