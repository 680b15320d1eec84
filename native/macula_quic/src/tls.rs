//! TLS 1.3 configurations for both roles. One crypto provider, named explicitly everywhere: a
//! process-wide default belongs to the host program.

use std::sync::{Arc, Mutex};

use rustler::{Atom, Encoder, Env, Term};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, RootCertStore};

use crate::messages::atoms;

pub(crate) mod identity_cert;
pub(crate) mod verify;

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
            _ => atoms::unknown(),
        },
        _ => atoms::unknown(),
    }
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

pub(crate) fn server_config(
    credentials: Credentials,
    client: VerifyClient,
    alpn: Vec<Vec<u8>>,
    key_log: bool,
) -> Result<rustls::ServerConfig, TlsError> {
    let provider = provider();
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Certificate)?;
    let builder = match client {
        VerifyClient::No => builder.with_no_client_auth(),
        VerifyClient::Optional(roots) => {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(store(roots)?), provider)
                    .allow_unauthenticated()
                    .build();
            builder.with_client_cert_verifier(verifier.map_err(|_| TlsError::Roots)?)
        }
        VerifyClient::Required(roots) => {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(store(roots)?), provider)
                    .build();
            builder.with_client_cert_verifier(verifier.map_err(|_| TlsError::Roots)?)
        }
    };
    let mut config = builder
        .with_single_cert(credentials.chain, credentials.key)
        .map_err(credentials_error)?;
    config.alpn_protocols = alpn;
    config.max_early_data_size = 0;
    if key_log {
        config.key_log = Arc::new(rustls::KeyLogFile::new());
    }
    Ok(config)
}

/// Where a client's verifier leaves the reason of a refusal: the handshake itself keeps an alert.
pub(crate) type Refusal = Arc<Mutex<Option<Atom>>>;

pub(crate) fn client_config(
    verify: Verify,
    credentials: Option<Credentials>,
    alpn: Vec<Vec<u8>>,
    key_log: bool,
) -> Result<(rustls::ClientConfig, Refusal), TlsError> {
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
    let refusal = Refusal::default();
    let checker = verify::Recording {
        checker,
        refusal: refusal.clone(),
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
    if key_log {
        config.key_log = Arc::new(rustls::KeyLogFile::new());
    }
    Ok((config, refusal))
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
