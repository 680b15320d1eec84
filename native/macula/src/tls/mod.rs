//! TLS 1.3 configurations for both roles. One crypto provider, named explicitly everywhere: a
//! process-wide default belongs to the host program.

use std::sync::{Arc, OnceLock};

use rustler::{Atom, Encoder, Env, Term};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, RootCertStore};

use crate::tls::key_log::Secrets;
use crate::tls::resumption::client::{self, Kind, Kinds};
use crate::tls::resumption::server::{Resumption, never_resume};
use crate::vm::error::posix;
use crate::vm::messages::atoms;

pub(crate) mod identity_cert;
pub(crate) mod key_log;
mod late;
pub(crate) mod lean;
mod limits;
pub(crate) mod padding;
pub(crate) mod resumption;
mod retry;
pub(crate) mod session;
pub(crate) mod shown;
pub(crate) mod verify;
pub(crate) mod watched;

/// A certificate chain, leaf first, and its key.
pub(crate) struct Credentials {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

/// How a client checks the server.
pub(crate) enum Verify {
    /// The roots of the platform.
    System,
    /// These roots. A certificate listed itself is trusted as it is.
    Roots(Vec<CertificateDer<'static>>),
    /// The Ed25519 key of the leaf; names, dates and chain are ignored.
    PublicKey([u8; 32]),
    /// Anybody who can sign with the key of the certificate shown.
    None,
}

/// Whether a server asks for a client certificate.
#[derive(Clone)]
pub(crate) enum VerifyClient {
    No,
    Optional(Vec<CertificateDer<'static>>),
    Required(Vec<CertificateDer<'static>>),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("the certificate cannot be used: {0}")]
    Certificate(rustls::Error),
    #[error("the private key cannot be used")]
    Key,
    #[error("the private key does not belong to the certificate")]
    KeyMismatch,
    #[error("no usable root certificates")]
    Roots,
    #[error("for the server name {0}: {1}")]
    Host(String, Box<TlsError>),
    #[error("the file for secrets cannot be opened: {0}")]
    Secrets(std::io::Error),
}

impl Encoder for TlsError {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            TlsError::Certificate(rustls::Error::InvalidCertificate(error)) => {
                (atoms::bad_cert(), certificate_error(error)).encode(env)
            }
            TlsError::Certificate(_) => (atoms::bad_cert(), atoms::einval()).encode(env),
            TlsError::Key => (atoms::bad_key(), atoms::einval()).encode(env),
            TlsError::KeyMismatch => (atoms::bad_key(), atoms::key_mismatch()).encode(env),
            TlsError::Roots => (atoms::bad_cert(), atoms::unknown_ca()).encode(env),
            TlsError::Host(name, error) => {
                let name = crate::vm::error::binary(env, name.as_bytes());
                (atoms::bad_sni_host(), name, &**error).encode(env)
            }
            TlsError::Secrets(error) => {
                (atoms::bad_option(), atoms::sslkeylogfile(), posix(error)).encode(env)
            }
        }
    }
}

/// Why a certificate was refused, in the words of the ssl application where it has some.
pub(crate) fn certificate_error(error: &CertificateError) -> Atom {
    use CertificateError as E;
    match error {
        E::Expired | E::ExpiredContext { .. } => atoms::certificate_expired(),
        E::NotValidYet | E::NotValidYetContext { .. } => atoms::not_yet_valid(),
        E::Revoked => atoms::certificate_revoked(),
        E::UnknownIssuer => atoms::unknown_ca(),
        E::BadSignature => atoms::invalid_signature(),
        E::NotValidForName | E::NotValidForNameContext { .. } => atoms::hostname_check_failed(),
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => atoms::invalid_purpose(),
        E::BadEncoding => atoms::bad_encoding(),
        E::UnsupportedSignatureAlgorithmContext { .. }
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            atoms::unsupported_certificate()
        }
        E::UnknownRevocationStatus => atoms::unknown_revocation_status(),
        E::ApplicationVerificationFailure => atoms::pubkey_mismatch(),
        E::Other(other) => match other.0.downcast_ref() {
            // A self-signed certificate that calls itself a CA, and is not trusted.
            Some(webpki::Error::CaUsedAsEndEntity) => atoms::selfsigned_peer(),
            Some(webpki::Error::MaximumPathDepthExceeded) => atoms::max_path_length_reached(),
            _ => atoms::unknown(),
        },
        _ => atoms::unknown(),
    }
}

/// AES with 128 bits goes first: RFC 9001 requires it of everybody, and the larger key costs time with
/// every packet. A peer that offers something else alone gets that.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let make = || {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                cipher_suite::TLS13_AES_128_GCM_SHA256,
                cipher_suite::TLS13_AES_256_GCM_SHA384,
                cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            ..aws_lc_rs::default_provider()
        })
    };
    PROVIDER.get_or_init(make).clone()
}

/// With `defers` somebody else decides about the certificates of clients.
pub(crate) fn server_config(
    shown: &shown::Shown,
    client: VerifyClient,
    defers: bool,
    alpn: Vec<Vec<u8>>,
    secrets: &Secrets,
    resumption: &Resumption,
) -> Result<rustls::ServerConfig, TlsError> {
    let asks = !matches!(client, VerifyClient::No);
    let provider = provider();
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Certificate)?;
    let builder = match client {
        VerifyClient::No => builder.with_no_client_auth(),
        VerifyClient::Optional(roots) => {
            builder.with_client_cert_verifier(client_verifier(roots, false, defers, provider)?)
        }
        VerifyClient::Required(roots) => {
            builder.with_client_cert_verifier(client_verifier(roots, true, defers, provider)?)
        }
    };
    let resolver = Arc::new(session::Noting(Arc::new(shown.clone())));
    let mut config = builder.with_cert_resolver(resolver);
    config.alpn_protocols = alpn;
    if asks {
        never_resume(&mut config);
    } else {
        resumption.configure(&mut config);
    }
    if let Some(log) = secrets.log() {
        config.key_log = log;
    }
    Ok(config)
}

fn client_verifier(
    roots: Vec<CertificateDer<'static>>,
    mandatory: bool,
    defers: bool,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let checker = if defers && roots.is_empty() {
        None
    } else {
        let roots = Arc::new(store(roots)?);
        let builder = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
        let builder = if mandatory {
            builder
        } else {
            builder.allow_unauthenticated()
        };
        Some(builder.build().map_err(|_| TlsError::Roots)?)
    };
    match checker {
        Some(checker) if !defers => Ok(checker),
        checker => Ok(Arc::new(verify::Deferring {
            checker,
            mandatory,
            provider,
        })),
    }
}

/// What sessions of a client must have in common to be resumed by each other.
pub(crate) fn kind(
    server_name: &str,
    verify: &Verify,
    credentials: Option<&Credentials>,
    alpn: &[Vec<u8>],
) -> Kind {
    let none: &[&[u8]] = &[];
    let kinds = Kinds::new().with(server_name.as_bytes()).with_all(alpn);
    let kinds = match verify {
        Verify::System => kinds.with(b"system"),
        Verify::Roots(roots) => kinds.with(b"roots").with_all(roots),
        Verify::PublicKey(key) => kinds.with(b"key").with(key),
        Verify::None => kinds.with(b"none"),
    };
    match credentials {
        None => kinds.with_all(none),
        Some(own) => kinds.with_all(&own.chain).with(own.key.secret_der()),
    }
    .kind()
}

/// With a `kind`, sessions are kept and resumed.
pub(crate) fn client_config(
    verify: Verify,
    credentials: Option<Credentials>,
    alpn: Vec<Vec<u8>>,
    secrets: &Secrets,
    kind: Option<Kind>,
    defers: bool,
) -> Result<rustls::ClientConfig, TlsError> {
    let kept = kind.and_then(client::find);
    let mut config = match (kept, kind) {
        (Some(kept), _) => kept,
        (None, Some(kind)) => {
            client::keep(kind, new_client_config(verify, credentials, alpn, defers)?)
        }
        (None, None) => new_client_config(verify, credentials, alpn, defers)?,
    };
    if let Some(log) = secrets.log() {
        config.key_log = log;
    }
    Ok(config)
}

fn new_client_config(
    verify: Verify,
    credentials: Option<Credentials>,
    alpn: Vec<Vec<u8>>,
    defers: bool,
) -> Result<rustls::ClientConfig, TlsError> {
    let provider = provider();
    let checker: Arc<dyn ServerCertVerifier> = match verify {
        Verify::System => Arc::new(
            rustls_platform_verifier::Verifier::new(provider.clone())
                .map_err(|_| TlsError::Roots)?,
        ),
        Verify::Roots(roots) => {
            let listed = roots.clone();
            let chain = WebPkiServerVerifier::builder_with_provider(
                Arc::new(store(roots)?),
                provider.clone(),
            )
            .build()
            .map_err(|_| TlsError::Roots)?;
            Arc::new(verify::Listed {
                listed,
                chain,
                provider: provider.clone(),
            })
        }
        Verify::PublicKey(key) => Arc::new(verify::Pinned::new(key, provider.clone())),
        Verify::None => Arc::new(verify::Anybody {
            provider: provider.clone(),
        }),
    };
    let checker = verify::Recording {
        checker,
        defers,
        provider: provider.clone(),
    };
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Certificate)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(checker));
    let mut config = match credentials {
        None => builder.with_no_client_auth(),
        Some(own) => builder
            .with_client_auth_cert(own.chain, own.key)
            .map_err(credentials_error)?,
    };
    config.alpn_protocols = alpn;
    // A ticket would be kept for a configuration that serves one dial.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

fn store(roots: Vec<CertificateDer<'static>>) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    let (added, _ignored) = store.add_parsable_certificates(roots);
    if added == 0 {
        return Err(TlsError::Roots);
    }
    Ok(store)
}

fn credentials_error(error: rustls::Error) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch) => {
            TlsError::KeyMismatch
        }
        rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => {
            TlsError::Certificate(error)
        }
        _ => TlsError::Key,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
    use rustls::NamedGroup;
    use rustls::client::{
        self as tls_client, ClientSessionMemoryCache, ClientSessionStore, ResolvesClientCert,
        Tls12ClientSessionValue, Tls13ClientSessionValue,
    };
    use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
    use rustls::sign::CertifiedKey;

    use super::*;
    use crate::engine::transport::loopback::loopback;
    use crate::engine::transport::{Endpoint, tokio_timer};

    /// What a client keeps of its sessions, and how many tickets it got.
    #[derive(Debug)]
    struct Tickets(ClientSessionMemoryCache, AtomicUsize);

    impl ClientSessionStore for Tickets {
        fn set_kx_hint(&self, server: ServerName<'static>, group: NamedGroup) {
            self.0.set_kx_hint(server, group);
        }

        fn kx_hint(&self, server: &ServerName<'_>) -> Option<NamedGroup> {
            self.0.kx_hint(server)
        }

        fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

        fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
            None
        }

        fn remove_tls12_session(&self, _: &ServerName<'static>) {}

        fn insert_tls13_ticket(&self, server: ServerName<'static>, kept: Tls13ClientSessionValue) {
            self.1.fetch_add(1, Ordering::SeqCst);
            self.0.insert_tls13_ticket(server, kept);
        }

        fn take_tls13_ticket(
            &self,
            server: &ServerName<'static>,
        ) -> Option<Tls13ClientSessionValue> {
            self.0.take_tls13_ticket(server)
        }
    }

    /// A client that shows its certificate while it likes.
    #[derive(Debug)]
    struct Moody(Arc<CertifiedKey>, AtomicBool);

    impl ResolvesClientCert for Moody {
        fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
            self.1.load(Ordering::SeqCst).then(|| self.0.clone())
        }

        fn has_certs(&self) -> bool {
            true
        }
    }

    fn credentials() -> Credentials {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]);
        let made = made.expect("a certificate");
        Credentials {
            chain: vec![made.cert.der().clone()],
            key: PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into(),
        }
    }

    /// A stream's worth of use: what the server says after its handshake has arrived then.
    async fn talk(
        server: &Endpoint,
        client: &Endpoint,
        config: &quinn_proto::ClientConfig,
    ) -> Result<(), String> {
        let to = server.local_addr().map_err(|e| e.to_string())?;
        let here = async {
            let begun = client.connect_with(config.clone(), to, "localhost");
            let (connecting, stepper) = begun.map_err(|e| e.to_string())?;
            tokio::spawn(stepper);
            let connection = connecting.connected().await.map_err(|e| e.to_string())?;
            let mut recv = connection.accept_uni().await.map_err(|e| e.to_string())?;
            let said = recv.read_chunk(10, true).await.map_err(|e| e.to_string())?;
            said.is_some_and(|said| said.bytes == b"hello".as_ref())
                .then_some(())
                .ok_or_else(|| "not hello".to_owned())
        };
        let there = async {
            let incoming = server.accept().await.ok_or("closed")?;
            let (connecting, stepper) = incoming.accept().map_err(|e| e.to_string())?;
            tokio::spawn(stepper);
            let connection = connecting.connected().await.map_err(|e| e.to_string())?;
            let mut send = connection.open_uni().await.map_err(|e| e.to_string())?;
            send.write_all(b"hello").await.map_err(|e| e.to_string())?;
            send.finish().map_err(|e| e.to_string())?;
            let _ = send.stopped().await;
            Ok::<(), String>(())
        };
        let (here, there) = tokio::join!(here, there);
        here.and(there)
    }

    #[test]
    fn a_client_that_showed_its_certificate_once_must_show_it_again() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let (serving, showing) = (credentials(), credentials());
        let roots = vec![showing.chain[0].clone()];
        let tickets = resumption::server::Tickets::new(&[], 3600).expect("tickets");
        let server = server_config(
            &shown::Shown::new(serving, Vec::new()).expect("usable"),
            VerifyClient::Required(roots),
            false,
            vec![b"t".to_vec()],
            &Secrets::Nowhere,
            &Resumption::Tickets(tickets),
        );
        let server = server.expect("a server's configuration");
        assert_eq!(0, server.send_tls13_tickets);
        assert!(!server.session_storage.can_cache());
        assert!(!server.ticketer.enabled());
        assert_eq!(0, server.max_early_data_size);

        let tickets = Arc::new(Tickets(
            ClientSessionMemoryCache::new(8),
            AtomicUsize::new(0),
        ));
        let provider = provider();
        let key = provider.key_provider.load_private_key(showing.key);
        let key = CertifiedKey::new(showing.chain, key.expect("a key"));
        let resolver = Arc::new(Moody(Arc::new(key), AtomicBool::new(true)));
        let mut client = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verify::Anybody { provider }))
            .with_client_cert_resolver(resolver.clone());
        client.alpn_protocols = vec![b"t".to_vec()];
        client.resumption = tls_client::Resumption::store(tickets.clone());

        runtime.block_on(async {
            let crypto = QuicServerConfig::try_from(server).expect("QUIC");
            let served = quinn_proto::ServerConfig::with_crypto(Arc::new(crypto));
            let endpoint = |served| {
                let config = quinn_proto::EndpointConfig::default();
                let (endpoint, driver) = Endpoint::new(config, served, loopback(), tokio_timer);
                tokio::spawn(driver);
                endpoint
            };
            let (server, dialler) = (endpoint(Some(served)), endpoint(None));
            let crypto = QuicClientConfig::try_from(client).expect("QUIC");
            let client = quinn_proto::ClientConfig::new(Arc::new(crypto));

            assert_eq!(Ok(()), talk(&server, &dialler, &client).await);
            assert_eq!(0, tickets.1.load(Ordering::SeqCst), "tickets were given");
            resolver.1.store(false, Ordering::SeqCst);
            let refused = talk(&server, &dialler, &client).await;
            assert!(refused.is_err(), "a client without a certificate got in");
        });
    }
}
