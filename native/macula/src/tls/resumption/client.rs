//! What clients keep of their sessions: a configuration for each server name and each way to verify it, with
//! its tickets. rustls resumes a session only with the very verifier, and the very certificate of its own, that it
//! was made with.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::NamedGroup;
use rustls::client::{
    ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use rustls::pki_types::ServerName;
use sha2::{Digest, Sha256};

use crate::tls::session::note_ticket;

/// Configurations that are kept; those go that were not used for longest.
const CONFIGURATIONS: usize = 256;
/// Tickets that each of them keeps; the newest are used, and the oldest go.
const TICKETS: usize = 4;
/// For so long a certificate that was verified once counts, and the roots that were read for that.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// What sessions must have in common to share tickets.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Kind([u8; 32]);

/// Collects what makes a `Kind`.
pub(crate) struct Kinds(Sha256);

impl Kinds {
    pub(crate) fn new() -> Self {
        // Private keys go into it: nobody who sees the outcome is to try some.
        static SALT: LazyLock<[u8; 32]> = LazyLock::new(|| {
            let mut salt = [0; 32];
            // Without randomness there are no connections either.
            let _ = aws_lc_rs::rand::fill(&mut salt);
            salt
        });
        Kinds(Sha256::new_with_prefix(*SALT))
    }

    pub(crate) fn with(mut self, bytes: &[u8]) -> Self {
        self.0.update((bytes.len() as u64).to_be_bytes());
        self.0.update(bytes);
        self
    }

    pub(crate) fn with_all<B: AsRef<[u8]>>(self, all: &[B]) -> Self {
        let counted = self.with(&(all.len() as u64).to_be_bytes());
        all.iter()
            .fold(counted, |kinds, bytes| kinds.with(bytes.as_ref()))
    }

    pub(crate) fn kind(self) -> Kind {
        Kind(self.0.finalize().into())
    }
}

#[derive(Default)]
struct Kept {
    configurations: HashMap<Kind, Configuration>,
    uses: u64,
}

struct Configuration {
    config: rustls::ClientConfig,
    made: Instant,
    used: u64,
    /// Where the server was last.
    address: Option<SocketAddr>,
}

static KEPT_ONES: LazyLock<Mutex<Kept>> = LazyLock::new(Mutex::default);

impl Kept {
    fn find(&mut self, kind: Kind, now: Instant) -> Option<rustls::ClientConfig> {
        self.uses += 1;
        let found = self.configurations.get_mut(&kind)?;
        if now.saturating_duration_since(found.made) > KEPT {
            self.configurations.remove(&kind);
            return None;
        }
        found.used = self.uses;
        Some(found.config.clone())
    }

    fn keep(&mut self, kind: Kind, config: &rustls::ClientConfig, now: Instant) {
        if self.configurations.len() >= CONFIGURATIONS
            && let Some(oldest) = self.configurations.iter().min_by_key(|(_, kept)| kept.used)
        {
            let oldest = *oldest.0;
            self.configurations.remove(&oldest);
        }
        let kept = Configuration {
            config: config.clone(),
            made: now,
            used: self.uses,
            address: None,
        };
        self.configurations.insert(kind, kept);
    }
}

fn kept() -> MutexGuard<'static, Kept> {
    KEPT_ONES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The configuration with the tickets of this kind, if there is one.
pub(crate) fn find(kind: Kind) -> Option<rustls::ClientConfig> {
    kept().find(kind, Instant::now())
}

/// Keeps a configuration, which gets a place for tickets, unless another dial was faster: then that one is
/// used.
pub(crate) fn keep(kind: Kind, mut config: rustls::ClientConfig) -> rustls::ClientConfig {
    let now = Instant::now();
    let mut kept = kept();
    if let Some(found) = kept.find(kind, now) {
        return found;
    }
    config.resumption = Resumption::store(Arc::new(Tickets::default()));
    kept.keep(kind, &config, now);
    config
}

/// The server of this kind was reached there.
pub(crate) fn met(kind: Kind, address: SocketAddr) {
    if let Some(kept) = kept().configurations.get_mut(&kind) {
        kept.address = Some(address);
    }
}

/// Where the server of this kind was reached last.
pub(crate) fn address(kind: Kind) -> Option<SocketAddr> {
    kept().configurations.get(&kind)?.address
}

/// Tickets of one server: a `Kind` has one name.
#[derive(Debug, Default)]
struct Tickets(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    group: Option<NamedGroup>,
    tickets: VecDeque<Tls13ClientSessionValue>,
}

impl Tickets {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        self.lock().group = Some(group);
    }

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        self.lock().group
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        let mut held = self.lock();
        if held.tickets.len() >= TICKETS {
            held.tickets.pop_front();
        }
        held.tickets.push_back(ticket);
        drop(held);
        note_ticket();
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.lock().tickets.pop_back()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::key_log::Secrets;
    use crate::tls::{Verify, client_config};

    fn config() -> rustls::ClientConfig {
        client_config(
            Verify::None,
            None,
            vec![b"t".to_vec()],
            &Secrets::Nowhere,
            None,
            false,
        )
        .expect("a configuration")
    }

    fn kind(number: usize) -> Kind {
        Kinds::new().with(&number.to_be_bytes()).kind()
    }

    #[test]
    fn no_more_configurations_are_kept_and_for_no_longer() {
        let (mut kept, config, now) = (Kept::default(), config(), Instant::now());
        for number in 0..CONFIGURATIONS {
            kept.keep(kind(number), &config, now);
            assert!(kept.find(kind(number), now).is_some());
        }
        // The first one was used since.
        assert!(kept.find(kind(0), now).is_some());
        kept.keep(kind(CONFIGURATIONS), &config, now);
        assert_eq!(CONFIGURATIONS, kept.configurations.len());
        assert!(kept.find(kind(1), now).is_none());
        assert!(kept.find(kind(0), now).is_some());
        assert!(kept.find(kind(0), now + KEPT).is_some());
        assert!(
            kept.find(kind(0), now + KEPT + Duration::from_secs(1))
                .is_none()
        );
    }

    #[test]
    fn what_differs_makes_another_kind() {
        let kind =
            |parts: &[&[u8]], more: &[&[u8]]| Kinds::new().with_all(parts).with_all(more).kind().0;
        let all = [
            kind(&[b"ab"], &[]),
            kind(&[b"a", b"b"], &[]),
            kind(&[b"a"], &[b"b"]),
            kind(&[], &[b"a", b"b"]),
            kind(&[b"b", b"a"], &[]),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(!all[..at].contains(one), "{at}");
        }
        assert_eq!(all[1], kind(&[b"a", b"b"], &[]));
    }
}
