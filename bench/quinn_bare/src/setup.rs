//! Endpoints with the options that macula_quic has.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, MtuDiscoveryConfig, ServerConfig, TokioRuntime,
    TransportConfig, VarInt,
};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use socket2::{Domain, Socket, Type};

use crate::{Outcome, Settings};

const SOCKET_BUFFER: usize = 4 << 20;
/// The second one asks the server to close the connection.
const NAMES: [&str; 2] = ["localhost", "refused"];
const ALPN: &[u8] = b"macula-bench";

fn provider(settings: &Settings) -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    if settings.aes128 {
        let preferred = rustls::CipherSuite::TLS13_AES_128_GCM_SHA256;
        provider
            .cipher_suites
            .sort_by_key(|suite| suite.suite() != preferred);
    }
    Arc::new(provider)
}

fn transport(settings: &Settings) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    if let Some(max) = settings.mtu {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(max);
        config.mtu_discovery_config(Some(discovery));
    }
    config.receive_window(VarInt::from_u32(64 << 20));
    config.stream_receive_window(VarInt::from_u32(2 << 20));
    config.send_window(10 << 20);
    // Quinn has a place for each of them from the beginning of a connection.
    config.max_concurrent_bidi_streams(VarInt::from_u32(settings.streams));
    config.datagram_receive_buffer_size(Some(1 << 20));
    config.datagram_send_buffer_size(1 << 20);
    Arc::new(config)
}

fn bind(settings: &Settings, server: Option<ServerConfig>) -> Outcome<Endpoint> {
    let mut config = EndpointConfig::default();
    if let Some(max) = settings.mtu {
        config.max_udp_payload_size(max)?;
    }
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    let runtime = Arc::new(TokioRuntime);
    Ok(Endpoint::new(config, server, socket.into(), runtime)?)
}

/// A server's endpoint with a certificate of its own.
pub(crate) fn server(settings: &Settings) -> Outcome<(Endpoint, CertificateDer<'static>)> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
    let cert = rcgen::CertificateParams::new(NAMES.map(String::from))?.self_signed(&key)?;
    let cert = cert.der().clone();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut tls = rustls::ServerConfig::builder_with_provider(provider(settings))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![cert.clone()], key)?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.send_tls13_tickets = 0;
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(transport(settings));
    Ok((bind(settings, Some(config))?, cert))
}

/// A client's endpoint that trusts this certificate. Every handshake is a full one.
pub(crate) fn client(settings: &Settings, cert: CertificateDer<'static>) -> Outcome<Endpoint> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(cert)?;
    let mut tls = rustls::ClientConfig::builder_with_provider(provider(settings))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = rustls::client::Resumption::disabled();
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(transport(settings));
    let mut endpoint = bind(settings, None)?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}
