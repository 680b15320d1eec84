//! Who gets a handshake, and the handshake itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::engine::transport::{ConnectionError, Incoming, VarInt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Listener, Ready, always, auto, never};
use crate::engine::endpoint::Driver;
use crate::quic::connection::{Early, Outcome};
use crate::quic::crowd::{Admission, Place};
use crate::quic::verdict;
use crate::tls::resumption::server::Resumption;
use crate::tls::session::Seen;
use crate::vm::fault::{self, Point};
use crate::vm::runtime::Worker;
use crate::vm::tasks::Held;

impl Listener {
    /// Refuses a connection, unless the listener was unlocked meanwhile: then the client asks again.
    pub(super) fn turn_away(&self, incoming: Incoming) {
        if self.locked.load(Ordering::Acquire) {
            self.refuse(incoming);
        } else {
            incoming.ignore();
        }
    }

    fn refuse(&self, incoming: Incoming) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        incoming.refuse();
    }

    /// Under load an address must prove itself before it gets a handshake (RFC 9000, section 8.1).
    pub(super) fn admit(
        &self,
        incoming: Incoming,
        slots: &Semaphore,
    ) -> Option<(Incoming, Option<Place>)> {
        let busy = slots.available_permits() < self.limits.handshakes / 2;
        let wanted = self.limits.retry == always() || (self.limits.retry == auto() && busy);
        let provable = incoming.may_retry() && !incoming.remote_address_validated();
        // One that comes again with a proof is looked at then.
        let mut incoming = match wanted && provable {
            true => retried(incoming)?,
            false => incoming,
        };
        let Some(crowd) = &self.crowd else {
            return Some((incoming, None));
        };
        let proven = !provable || self.limits.retry == never();
        let mut admission = crowd.admit(incoming.remote_address(), proven);
        if let Admission::Unproven = admission {
            incoming = retried(incoming)?;
            admission = crowd.admit(incoming.remote_address(), true);
        }
        match admission {
            Admission::Taken(place) => Some((incoming, Some(place))),
            Admission::Unproven | Admission::Full => {
                self.refuse(incoming);
                None
            }
        }
    }
}

/// Has a client prove its address; answers the connection where that cannot be asked.
fn retried(incoming: Incoming) -> Option<Incoming> {
    match incoming.retry() {
        Ok(()) => None,
        Err(error) => Some(error.into_incoming()),
    }
}

/// One of the handshakes in progress.
struct InProgress(Arc<Listener>);

impl InProgress {
    fn new(listener: Arc<Listener>) -> Self {
        listener.handshakes.fetch_add(1, Ordering::Relaxed);
        InProgress(listener)
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.handshakes.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) async fn handshake(
    listener: Arc<Listener>,
    incoming: Incoming,
    place: Option<Place>,
    worker: &'static Worker,
    slot: OwnedSemaphorePermit,
) {
    let begun = match &listener.logging {
        Some(logging) => {
            let config = logging.config(&incoming);
            incoming.accept_with(config)
        }
        None => incoming.accept(),
    };
    let Ok((mut connecting, stepper)) = begun else {
        return;
    };
    let driver = Driver::spawn(stepper);
    if let Some(place) = place {
        driver.keep(place);
    }
    let in_progress = InProgress::new(listener.clone());
    let begin = Instant::now();
    let done = tokio::time::timeout(listener.limits.handshake_timeout, async {
        fault::pass(Point::Handshake);
        if let Resumption::Sessions(_) = listener.resumption {
            // An error is told again below.
            let data = connecting.handshake_data().await;
            if data.is_ok_and(|data| Seen::within(data).is_some_and(|seen| seen.has_early_keys())) {
                connecting = match connecting.into_0rtt() {
                    Ok((connection, done)) => return Ok((connection, Some(done))),
                    Err(connecting) => connecting,
                };
            }
        }
        let connection = connecting.connected().await?;
        if let Resumption::Sessions(_) = listener.resumption {
            connection.set_receive_window(listener.limits.window);
        }
        Ok((connection, None))
    });
    let (connection, early) = match done.await {
        Ok(Ok((connection, None))) => (connection, None),
        // Handed out before its handshake is done, which has its time and its place all the same.
        Ok(Ok((connection, Some(done)))) => {
            let (quic, window) = (connection.clone(), listener.limits.window);
            let left = listener
                .limits
                .handshake_timeout
                .saturating_sub(begin.elapsed());
            let early = Early::begin(&connection, done, Some(left), move |outcome| {
                drop((in_progress, slot));
                if outcome == Outcome::Accepted {
                    quic.set_receive_window(window);
                }
            });
            (connection, Some(early))
        }
        Ok(Err(ConnectionError::ConnectionClosed(_) | ConnectionError::ApplicationClosed(_))) => {
            // QUIC sets no timer for a connection whose very first packet closes it, and keeps it.
            driver.abandon();
            return;
        }
        // Whoever does not finish it is of no interest to the owner.
        _ => return,
    };
    if let Some(verifier) = listener.verifier {
        // Nobody has the connection before, so nothing of it is delivered.
        let limit = listener.limits.handshake_timeout;
        let left = limit.saturating_sub(begin.elapsed());
        let verdict = tokio::select! {
            verdict = verdict::ask(verifier, &connection, Some(left)) => verdict,
            // Its time is up, or the client has gone.
            () = tokio::time::sleep(left) => Err(verdict::UNDECIDED),
            _ = connection.closed() => return,
        };
        if let Err(alert) = verdict {
            return verdict::refuse(&connection, alert);
        }
    }
    listener.established.fetch_add(1, Ordering::Relaxed);
    let mut state = listener.lock();
    if state.stopping {
        drop(state);
        connection.close(VarInt::from_u32(0), b"listener closed");
        return;
    }
    state.ready.push_back(Ready {
        quic: Held::new(connection),
        fate: driver.fate(),
        worker,
        early,
    });
    drop(state);
    listener.changed.notify_one();
}
