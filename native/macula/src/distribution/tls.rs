//! The TLS side of the distribution: certificates made in memory, TLS 1.3 only, hybrid
//! post-quantum key exchange, both sides with a certificate.
//!
//! The certificates are self-signed and prove nothing about who the peer is: that is the work of
//! the proofs over the session's exporter value (`macula_dist_trust`). They do bind the session to a
//! key, so the verifier checks the CertificateVerify signature and nothing else.

use std::sync::Arc;

use crate::engine::transport::Connection;
use quinn_proto::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use rustls::crypto::{CryptoProvider, aws_lc_rs as provider};
use rustls_pki_types::PrivatePkcs8KeyDer;

use crate::tls::padding::Passing;
use crate::tls::resumption::server::never_resume;
use crate::tls::verify::Anybody;
use crate::tls::watched;

/// The one protocol spoken on a distribution link.
pub(crate) const ALPN: &[u8] = b"macula-dist/1";
/// The same, by those that know user streams.
pub(crate) const ALPN_STREAMS: &[u8] = b"macula-dist/1+streams";
/// Sent as server name; the node's own name travels encrypted, in the first frame.
pub(crate) const SERVER_NAME: &str = "macula-dist";
/// What every link is encrypted with, for people.
pub(crate) const CIPHER: &str = "TLS_AES_128_GCM_SHA256";
pub(crate) const KEY_EXCHANGE: &str = "X25519MLKEM768";
/// Label of the exporter value both proofs are bound to.
pub(crate) const EXPORTER_LABEL: &[u8] = b"EXPORTER-macula-dist-1";

/// Label of the exporter value that the numbers of user streams begin with.
pub(crate) const STREAMS_LABEL: &[u8] = b"EXPORTER-macula-dist-1 streams";

#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("tls: {0}")]
    Rustls(#[from] rustls::Error),
    #[error("no initial cipher suite")]
    InitialSuite(#[from] quinn_proto::crypto::rustls::NoInitialCipherSuite),
}

/// One identity in both roles.
pub(crate) struct Configs {
    pub(crate) client: Arc<watched::Client<QuicClientConfig, Passing>>,
    pub(crate) server: Arc<watched::Server<QuicServerConfig, Passing>>,
}

/// Whether both ends of a connection know user streams.
pub(crate) fn knows_streams(connection: &Connection) -> bool {
    connection
        .handshake_data()
        .and_then(|data| data.downcast::<HandshakeData>().ok())
        .and_then(|data| data.protocol)
        .is_some_and(|protocol| protocol == ALPN_STREAMS)
}

/// Makes a fresh key and certificate and the configurations that use them.
pub(crate) fn configs(streams: bool) -> Result<Configs, TlsError> {
    // What stands first is taken where both ends know it.
    let protocols: Vec<Vec<u8>> = [ALPN_STREAMS, ALPN][usize::from(!streams)..]
        .iter()
        .map(|name| name.to_vec())
        .collect();
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
    let mut params = rcgen::CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, SERVER_NAME);
    let cert = params.self_signed(&key)?.der().clone();
    let key = || PrivatePkcs8KeyDer::from(key.serialize_der()).into();

    let provider = Arc::new(crypto_provider());
    let verifier = Arc::new(Anybody {
        provider: provider.clone(),
    });

    let mut client = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_client_auth_cert(vec![cert.clone()], key())?;
    client.alpn_protocols = protocols.clone();
    // Without resumption every link has a full key exchange and an exporter value of its own.
    client.resumption = rustls::client::Resumption::disabled();

    let mut server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![cert], key())?;
    server.alpn_protocols = protocols;
    never_resume(&mut server);

    Ok(Configs {
        client: Arc::new(watched::Client::new(
            QuicClientConfig::try_from(client)?,
            Passing,
        )),
        server: Arc::new(watched::Server::new(QuicServerConfig::try_from(server)?)),
    })
}

fn crypto_provider() -> CryptoProvider {
    let base = provider::default_provider();
    CryptoProvider {
        // One of each, and both ends are ours: nothing to negotiate down to. QUIC's first packets
        // need this suite in any case, and the group is the hybrid post-quantum one.
        cipher_suites: vec![provider::cipher_suite::TLS13_AES_128_GCM_SHA256],
        kx_groups: vec![provider::kx_group::X25519MLKEM768],
        ..base
    }
}
