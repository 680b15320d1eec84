//! What a server shows of itself: a certificate for everybody, and others for the names that clients ask
//! for (RFC 6066, section 3).

use std::collections::HashMap;
use std::sync::Arc;

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::{Credentials, TlsError, credentials_error, provider};

/// Names are in lower case; one that begins with `*.` stands for every name with one label in its place.
#[derive(Debug, Clone)]
pub(crate) struct Shown {
    default: Arc<CertifiedKey>,
    hosts: Arc<HashMap<String, Arc<CertifiedKey>>>,
}

impl Shown {
    pub(crate) fn new(
        default: Credentials,
        hosts: Vec<(String, Credentials)>,
    ) -> Result<Self, TlsError> {
        Ok(Shown {
            default: certified(default)?,
            hosts: by_name(hosts)?,
        })
    }

    /// The same with other certificates, where there are some.
    pub(crate) fn changed(
        &self,
        default: Option<Credentials>,
        hosts: Option<Vec<(String, Credentials)>>,
    ) -> Result<Self, TlsError> {
        Ok(Shown {
            default: match default {
                Some(default) => certified(default)?,
                None => self.default.clone(),
            },
            hosts: match hosts {
                Some(hosts) => by_name(hosts)?,
                None => self.hosts.clone(),
            },
        })
    }

    fn of(&self, name: &str) -> &Arc<CertifiedKey> {
        let name = name.to_ascii_lowercase();
        let wild = || {
            let (_, parent) = name.split_once('.')?;
            self.hosts.get(&format!("*.{parent}"))
        };
        self.hosts.get(&name).or_else(wild).unwrap_or(&self.default)
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(match hello.server_name() {
            Some(name) => self.of(name).clone(),
            None => self.default.clone(),
        })
    }
}

/// Checks that the key belongs to the certificate.
fn certified(credentials: Credentials) -> Result<Arc<CertifiedKey>, TlsError> {
    CertifiedKey::from_der(credentials.chain, credentials.key, &provider())
        .map(Arc::new)
        .map_err(credentials_error)
}

fn by_name(
    hosts: Vec<(String, Credentials)>,
) -> Result<Arc<HashMap<String, Arc<CertifiedKey>>>, TlsError> {
    let hosts = hosts
        .into_iter()
        .map(|(name, credentials)| match certified(credentials) {
            Ok(certified) => Ok((name, certified)),
            Err(error) => Err(TlsError::Host(name, Box::new(error))),
        });
    Ok(Arc::new(hosts.collect::<Result<_, _>>()?))
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::PrivatePkcs8KeyDer;

    use super::*;

    fn credentials() -> Credentials {
        let made = rcgen::generate_simple_self_signed(vec!["x".to_owned()]).expect("made");
        Credentials {
            chain: vec![made.cert.der().clone()],
            key: PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into(),
        }
    }

    #[test]
    fn a_name_goes_before_a_pattern_and_a_pattern_has_one_label() {
        let hosts = ["a.example.org", "*.example.org"];
        let hosts = hosts.map(|name| (name.to_owned(), credentials()));
        let shown = Shown::new(credentials(), hosts.into()).expect("usable");
        let is = |name: &str, of: Option<&str>| {
            let wanted = of.map_or(&shown.default, |of| &shown.hosts[of]);
            assert!(Arc::ptr_eq(shown.of(name), wanted), "{name}");
        };
        is("a.example.org", Some("a.example.org"));
        is("A.Example.ORG", Some("a.example.org"));
        is("b.example.org", Some("*.example.org"));
        is("example.org", None);
        is("c.b.example.org", None);
        is("example", None);
    }

    #[test]
    fn a_key_of_another_certificate_is_told_with_its_name() {
        let (one, other) = (credentials(), credentials());
        let crossed = Credentials {
            chain: one.chain,
            key: other.key,
        };
        let refused = Shown::new(credentials(), vec![("a.example.org".to_owned(), crossed)]);
        let Err(TlsError::Host(name, error)) = refused else {
            panic!("taken");
        };
        assert_eq!("a.example.org", name);
        assert!(matches!(*error, TlsError::KeyMismatch));
    }
}
