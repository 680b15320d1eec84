//! How a server knows a session again.
//!
//! Without early data a ticket is the session itself, sealed with a key that other servers may have, too; so the server keeps
//! nothing. With early data a ticket is a number of a session that the server keeps, and forgets when it is
//! used: so nobody can have early data read twice (RFC 8446, section 8.1). A client that shows a certificate is not known again: the session would stand for a certificate
//! whose chain and dates nobody has looked at since.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::error::Unspecified;
use aws_lc_rs::hmac;
use rustls::server::{ProducesTickets, StoresServerSessions};

const NAME: usize = 16;
const TIME: usize = 8;

/// How sessions are resumed with a listener.
#[derive(Debug, Clone)]
pub(crate) enum Resumption {
    Never,
    Tickets(Arc<Tickets>),
    /// With early data.
    Sessions(Arc<Sessions>),
}

impl Resumption {
    /// Says so to rustls.
    pub(crate) fn configure(&self, config: &mut rustls::ServerConfig) {
        never_resume(config);
        match self {
            Resumption::Never => {}
            Resumption::Tickets(tickets) => {
                config.send_tls13_tickets = PER_HANDSHAKE;
                config.ticketer = tickets.clone();
            }
            Resumption::Sessions(sessions) => {
                config.send_tls13_tickets = PER_HANDSHAKE;
                config.session_storage = sessions.clone();
                // QUIC has no other value (RFC 9001, section 4.6.1): flow control bounds early data.
                config.max_early_data_size = u32::MAX;
            }
        }
    }
}

/// Every handshake is a full one. A client that resumes a session shows no certificate: the server
/// would take the word of an earlier handshake for it, and look at no chain and no date again.
pub(crate) fn never_resume(config: &mut rustls::ServerConfig) {
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.max_early_data_size = 0;
}

/// A client that connects twice at a time needs two.
const PER_HANDSHAKE: usize = 2;

/// Sessions that are kept until they are resumed; the oldest go.
pub(crate) struct Sessions {
    lifetime: Duration,
    most: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    sessions: HashMap<Vec<u8>, (Instant, Vec<u8>)>,
    /// In the order in which they came, also of some that are gone.
    order: VecDeque<Vec<u8>>,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").finish_non_exhaustive()
    }
}

impl Sessions {
    pub(crate) fn new(most: usize, lifetime: u32) -> Arc<Self> {
        Arc::new(Sessions {
            lifetime: Duration::from_secs(lifetime.into()),
            most,
            kept: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, number: Vec<u8>, session: Vec<u8>, now: Instant) {
        let mut kept = self.lock();
        // What was used leaves its place in the order behind.
        while kept.order.len() >= self.most
            && let Some(oldest) = kept.order.pop_front()
        {
            kept.sessions.remove(&oldest);
        }
        kept.order.push_back(number.clone());
        kept.sessions.insert(number, (now, session));
    }

    fn give(&self, number: &[u8], now: Instant) -> Option<Vec<u8>> {
        let (made, session) = self.lock().sessions.remove(number)?;
        (now.saturating_duration_since(made) <= self.lifetime).then_some(session)
    }
}

impl StoresServerSessions for Sessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.keep(key, value, Instant::now());
        true
    }

    /// For TLS 1.2, which has sessions that are used again.
    fn get(&self, _key: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.give(key, Instant::now())
    }

    fn can_cache(&self) -> bool {
        true
    }
}

/// Makes tickets, and opens them.
pub(crate) struct Tickets {
    lifetime: u32,
    keys: RwLock<Keys>,
}

/// The first one seals, all of them open.
struct Keys {
    keys: Vec<Key>,
    /// When the first one is too old; keys that were given stay.
    renewed_at: Option<u64>,
}

struct Key {
    name: [u8; NAME],
    sealing: RandomizedNonceKey,
}

impl std::fmt::Debug for Tickets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tickets").finish_non_exhaustive()
    }
}

impl Key {
    fn new(secret: &[u8]) -> Result<Self, Unspecified> {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let sealing = hmac::sign(&secret, b"macula ticket key");
        let named = hmac::sign(&secret, b"macula ticket name");
        let mut name = [0; NAME];
        name.copy_from_slice(&named.as_ref()[..NAME]);
        Ok(Key {
            name,
            sealing: RandomizedNonceKey::new(&AES_256_GCM_SIV, sealing.as_ref())?,
        })
    }

    fn random() -> Result<Self, Unspecified> {
        let mut secret = [0; 32];
        aws_lc_rs::rand::fill(&mut secret)?;
        Key::new(&secret)
    }
}

impl Tickets {
    /// With these secrets, or with one of its own that it renews.
    pub(crate) fn new(secrets: &[&[u8]], lifetime: u32) -> Result<Arc<Self>, Unspecified> {
        let keys = if secrets.is_empty() {
            Keys {
                keys: vec![Key::random()?],
                renewed_at: Some(seconds() + u64::from(lifetime)),
            }
        } else {
            given(secrets)?
        };
        Ok(Arc::new(Tickets {
            lifetime,
            keys: RwLock::new(keys),
        }))
    }

    /// These secrets from now on; tickets that were made with others are not known any more.
    pub(crate) fn rotate(&self, secrets: &[&[u8]]) -> Result<(), Unspecified> {
        let keys = given(secrets)?;
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(())
    }

    fn seal(&self, plain: &[u8], now: u64) -> Option<Vec<u8>> {
        self.renew(now);
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let key = keys.keys.first()?;
        let mut sealed = [&now.to_be_bytes(), plain].concat();
        let nonce = key
            .sealing
            .seal_in_place_append_tag(Aad::from(key.name), &mut sealed)
            .ok()?;
        Some([key.name.as_slice(), nonce.as_ref(), &sealed].concat())
    }

    fn open(&self, ticket: &[u8], now: u64) -> Option<Vec<u8>> {
        let (name, rest) = ticket.split_at_checked(NAME)?;
        let (nonce, sealed) = rest.split_at_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let key = keys.keys.iter().find(|key| key.name == name)?;
        let mut sealed = sealed.to_vec();
        let plain = key
            .sealing
            .open_in_place(nonce, Aad::from(key.name), &mut sealed)
            .ok()?;
        let (made, plain) = plain.split_at_checked(TIME)?;
        let made = u64::from_be_bytes(made.try_into().ok()?);
        // The clock of another server may be ahead.
        (now.saturating_sub(made) <= u64::from(self.lifetime)).then(|| plain.to_vec())
    }

    /// A key of our own seals for the lifetime of a ticket, and opens for another one.
    fn renew(&self, now: u64) {
        let due = |keys: &Keys| keys.renewed_at.is_some_and(|at| at <= now);
        if !due(&self.keys.read().unwrap_or_else(PoisonError::into_inner)) {
            return;
        }
        // Without randomness the old key serves on.
        let Ok(key) = Key::random() else { return };
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        if due(&keys) {
            keys.keys.insert(0, key);
            keys.keys.truncate(2);
            keys.renewed_at = Some(now + u64::from(self.lifetime));
        }
    }
}

fn given(secrets: &[&[u8]]) -> Result<Keys, Unspecified> {
    let keys: Result<Vec<Key>, Unspecified> =
        secrets.iter().map(|secret| Key::new(secret)).collect();
    Ok(Keys {
        keys: keys?,
        renewed_at: None,
    })
}

/// Since 1970.
fn seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or(Duration::ZERO).as_secs()
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.lifetime
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.seal(plain, seconds())
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.open(cipher, seconds())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u32 = 3600;

    fn tickets(secrets: &[&[u8]]) -> Arc<Tickets> {
        Tickets::new(secrets, HOUR).expect("tickets")
    }

    #[test]
    fn servers_with_a_secret_in_common_open_each_others_tickets() {
        let (a, b) = ([1; 32], [2; 32]);
        let (one, other) = (tickets(&[&a, &b]), tickets(&[&b]));
        let sealed = other.seal(b"session", 1000).expect("a ticket");
        assert_eq!(Some(b"session".to_vec()), one.open(&sealed, 1001));
        let sealed = one.seal(b"session", 1000).expect("a ticket");
        assert_eq!(None, other.open(&sealed, 1001));
        other.rotate(&[&b, &a]).expect("other secrets");
        assert_eq!(Some(b"session".to_vec()), other.open(&sealed, 1001));
        other.rotate(&[&b]).expect("other secrets");
        assert_eq!(None, other.open(&sealed, 1001));
    }

    #[test]
    fn a_session_is_given_once_and_in_its_lifetime() {
        let (sessions, now) = (Sessions::new(3, HOUR), Instant::now());
        let number = |n: u8| vec![n; 32];
        for n in 0..5 {
            sessions.keep(number(n), vec![n], now);
        }
        assert_eq!(3, sessions.lock().sessions.len());
        assert_eq!(None, sessions.give(&number(1), now));
        assert_eq!(Some(vec![2]), sessions.give(&number(2), now));
        assert_eq!(None, sessions.give(&number(2), now));
        let lifetime = Duration::from_secs(HOUR.into());
        assert_eq!(Some(vec![3]), sessions.give(&number(3), now + lifetime));
        let late = now + lifetime + Duration::from_secs(1);
        assert_eq!(None, sessions.give(&number(4), late));
        for n in 0..200 {
            sessions.keep(number(n), vec![n], now);
            assert_eq!(Some(vec![n]), sessions.give(&number(n), now));
            assert!(sessions.lock().order.len() <= 3);
        }
    }

    #[test]
    fn a_ticket_ends_with_its_lifetime() {
        let tickets = tickets(&[&[1; 32]]);
        let sealed = tickets.seal(b"session", 1000).expect("a ticket");
        assert!(tickets.open(&sealed, 1000 + u64::from(HOUR)).is_some());
        assert!(tickets.open(&sealed, 1001 + u64::from(HOUR)).is_none());
    }

    #[test]
    fn a_changed_ticket_is_none() {
        let tickets = tickets(&[&[1; 32]]);
        let sealed = tickets.seal(b"session", 1000).expect("a ticket");
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(None, tickets.open(&changed, 1000), "byte {at}");
            assert_eq!(None, tickets.open(&sealed[..at], 1000), "{at} bytes");
        }
    }

    #[test]
    fn keys_of_our_own_are_renewed_and_given_ones_stay() {
        let own = tickets(&[]);
        let now = seconds();
        let later = |hours: u32| now + u64::from(hours * HOUR) + 1;
        let sealed = own.seal(b"session", now).expect("a ticket");
        let next = own.seal(b"session", later(1)).expect("a ticket");
        assert_ne!(sealed[..NAME], next[..NAME]);
        // The key before opens what is still alive.
        assert!(own.open(&sealed, now + 1).is_some());
        own.seal(b"session", later(2)).expect("a ticket");
        assert!(own.open(&sealed, now + 1).is_none());
        assert!(own.open(&next, later(1)).is_some());

        let given = tickets(&[&[1; 32]]);
        let sealed = given.seal(b"session", now).expect("a ticket");
        let next = given.seal(b"session", later(9)).expect("a ticket");
        assert_eq!(sealed[..NAME], next[..NAME]);
    }
}
