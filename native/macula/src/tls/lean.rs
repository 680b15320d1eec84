//! TLS sessions of QUIC (RFC 9001) that keep little. Quinn's own keep all of rustls for as long as their connection
//! lives, 5 to 6 KB of it; these keep the few things that a connection may ask for after its handshake. They have no
//! exporter then, and a client that keeps tickets keeps its session whole.

use std::any::Any;
use std::io::Cursor;
use std::sync::Arc;

use quinn_proto::crypto::rustls::HandshakeData;
use quinn_proto::crypto::{
    self, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey, UnsupportedVersion,
};
use quinn_proto::transport_parameters::TransportParameters;
use quinn_proto::{ConnectError, ConnectionId, Side, TransportError, TransportErrorCode};
use rustls::CipherSuite;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::quic::{
    ClientConnection, Connection, DirectionalKeys, KeyChange, Secrets, ServerConnection, Suite,
    Version,
};

use super::late::Late;
use super::retry;

/// The one version of QUIC that is spoken.
const V1: u32 = 1;

/// A configuration lacks what QUIC needs: TLS 1.3 with AES-128-GCM, and early data of any length or none.
#[derive(Debug)]
pub(crate) struct NotForQuic;

/// A client's configuration.
pub(crate) struct Client {
    config: Arc<rustls::ClientConfig>,
    initial: Suite,
    keeps_tickets: bool,
}

impl Client {
    pub(crate) fn new(
        config: Arc<rustls::ClientConfig>,
        keeps_tickets: bool,
    ) -> Result<Self, NotForQuic> {
        let initial = initial(config.crypto_provider())?;
        Ok(Client {
            config,
            initial,
            keeps_tickets,
        })
    }
}

impl crypto::ClientConfig for Client {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        server_name: &str,
        params: &TransportParameters,
    ) -> Result<Box<dyn crypto::Session>, ConnectError> {
        if version != V1 {
            return Err(ConnectError::UnsupportedVersion);
        }
        let invalid = || ConnectError::InvalidServerName(server_name.to_owned());
        let name = ServerName::try_from(server_name).map_err(|_| invalid())?;
        let tls = ClientConnection::new(
            self.config.clone(),
            Version::V1,
            name.to_owned(),
            encoded(params),
        );
        // The configuration is one for QUIC; a name is all that is left to be wrong.
        let tls = Connection::Client(tls.map_err(|_| invalid())?);
        Ok(Box::new(Session::new(
            tls,
            self.initial,
            self.keeps_tickets,
        )))
    }
}

/// A server's configuration.
pub(crate) struct Server {
    config: Arc<rustls::ServerConfig>,
    initial: Suite,
}

impl Server {
    pub(crate) fn new(config: rustls::ServerConfig) -> Result<Self, NotForQuic> {
        let initial = initial(config.crypto_provider())?;
        let config = Arc::new(config);
        // Sessions cannot fail to begin, so what would make them fail is found here.
        ServerConnection::new(config.clone(), Version::V1, Vec::new()).map_err(|_| NotForQuic)?;
        Ok(Server { config, initial })
    }
}

impl crypto::ServerConfig for Server {
    fn initial_keys(
        &self,
        version: u32,
        dst_cid: &ConnectionId,
    ) -> Result<Keys, UnsupportedVersion> {
        if version == V1 {
            Ok(initial_keys(&self.initial, dst_cid, Side::Server))
        } else {
            Err(UnsupportedVersion)
        }
    }

    fn retry_tag(&self, _version: u32, orig_dst_cid: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        retry::tag(orig_dst_cid, packet)
    }

    fn start_session(
        self: Arc<Self>,
        _version: u32,
        params: &TransportParameters,
    ) -> Box<dyn crypto::Session> {
        let tls = ServerConnection::new(self.config.clone(), Version::V1, encoded(params))
            .expect("a configuration that another session was made with");
        Box::new(Session::new(Connection::Server(tls), self.initial, false))
    }
}

struct Session {
    tls: Tls,
    initial: Suite,
    /// What the keys after the present ones are made of.
    next: Option<Secrets>,
    has_told: bool,
    keeps_tickets: bool,
}

enum Tls {
    Whole(Box<Connection>),
    Over(Box<Over>),
}

/// What is left of a session whose handshake is over.
struct Over {
    side: Side,
    protocol: Option<Vec<u8>>,
    server_name: Option<String>,
    peer: Option<Vec<CertificateDer<'static>>>,
    early_data_accepted: Option<bool>,
    /// The peer's, which a client's connection asks for when the session is over.
    parameters: Option<Box<[u8]>>,
    late: Late,
}

impl Session {
    fn new(tls: Connection, initial: Suite, keeps_tickets: bool) -> Self {
        Session {
            tls: Tls::Whole(Box::new(tls)),
            initial,
            next: None,
            has_told: false,
            keeps_tickets,
        }
    }

    fn shrink(&mut self) {
        let Tls::Whole(tls) = &self.tls else { return };
        if tls.is_handshaking() || self.keeps_tickets {
            return;
        }
        self.tls = Tls::Over(Box::new(Over {
            side: side(tls),
            protocol: protocol(tls),
            server_name: server_name(tls),
            peer: peer(tls),
            early_data_accepted: early_data_accepted(tls),
            parameters: tls.quic_transport_parameters().map(Box::from),
            late: Late::default(),
        }));
    }
}

impl crypto::Session for Session {
    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        initial_keys(&self.initial, dst_cid, side)
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        if !self.has_told {
            return None;
        }
        let (protocol, server_name) = match &self.tls {
            Tls::Whole(tls) => (protocol(tls), server_name(tls)),
            Tls::Over(over) => (over.protocol.clone(), over.server_name.clone()),
        };
        Some(Box::new(HandshakeData {
            protocol,
            server_name,
        }))
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        let peer = match &self.tls {
            Tls::Whole(tls) => peer(tls),
            Tls::Over(over) => over.peer.clone(),
        };
        Some(Box::new(peer?))
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        match &self.tls {
            Tls::Whole(tls) => {
                let keys = tls.zero_rtt_keys()?;
                Some((Box::new(keys.header), Box::new(keys.packet)))
            }
            Tls::Over(_) => None,
        }
    }

    fn early_data_accepted(&self) -> Option<bool> {
        match &self.tls {
            Tls::Whole(tls) => early_data_accepted(tls),
            Tls::Over(over) => over.early_data_accepted,
        }
    }

    fn is_handshaking(&self) -> bool {
        match &self.tls {
            Tls::Whole(tls) => tls.is_handshaking(),
            Tls::Over(_) => false,
        }
    }

    fn read_handshake(&mut self, buf: &[u8]) -> Result<bool, TransportError> {
        let tls = match &mut self.tls {
            Tls::Whole(tls) => tls,
            Tls::Over(over) => {
                let read = over.late.read(over.side, buf).map(|()| false);
                return read.map_err(|alert| {
                    let code = TransportErrorCode::crypto(alert.into());
                    ended(code, "a TLS message that QUIC does not have".to_owned())
                });
            }
        };
        if let Err(error) = tls.read_hs(buf) {
            let code = match tls.alert() {
                Some(alert) => TransportErrorCode::crypto(alert.into()),
                None => TransportErrorCode::PROTOCOL_VIOLATION,
            };
            return Err(ended(code, error.to_string()));
        }
        // rustls does not say when it has read what the handshake tells: a name or a protocol is the sign.
        let knows =
            tls.alpn_protocol().is_some() || server_name(tls).is_some() || !tls.is_handshaking();
        let tells = knows && !self.has_told;
        self.has_told |= knows;
        Ok(tells)
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        let (side, encoded) = match &self.tls {
            Tls::Whole(tls) => (side(tls), tls.quic_transport_parameters()),
            Tls::Over(over) => (over.side, over.parameters.as_deref()),
        };
        let parameters =
            encoded.map(|encoded| TransportParameters::read(side, &mut Cursor::new(encoded)));
        Ok(parameters.transpose()?)
    }

    fn write_handshake(&mut self, buf: &mut Vec<u8>) -> Option<Keys> {
        let Tls::Whole(tls) = &mut self.tls else {
            return None;
        };
        let before = buf.len();
        match tls.write_hs(buf) {
            Some(KeyChange::Handshake { keys }) => Some(pairs(keys.local, keys.remote)),
            Some(KeyChange::OneRtt { keys, next }) => {
                self.next = Some(next);
                Some(pairs(keys.local, keys.remote))
            }
            None => {
                // A server says something after the handshake: its tickets.
                if buf.len() == before {
                    self.shrink();
                }
                None
            }
        }
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let keys = self.next.as_mut()?.next_packet_keys();
        Some(KeyPair {
            local: Box::new(keys.local),
            remote: Box::new(keys.remote),
        })
    }

    fn is_valid_retry(&self, orig_dst_cid: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        let Some((token, tag)) = payload.split_last_chunk::<16>() else {
            return false;
        };
        // The tag guards against accidents, and its key is public: nothing is told by how long this takes.
        retry::tag(orig_dst_cid, &[header, token].concat()) == *tag
    }

    fn export_keying_material(
        &self,
        output: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        match &self.tls {
            Tls::Whole(tls) => tls
                .export_keying_material(output, label, Some(context))
                .map(|_| ())
                .map_err(|_| ExportKeyingMaterialError),
            Tls::Over(_) => Err(ExportKeyingMaterialError),
        }
    }
}

fn side(tls: &Connection) -> Side {
    match tls {
        Connection::Client(_) => Side::Client,
        Connection::Server(_) => Side::Server,
    }
}

fn protocol(tls: &Connection) -> Option<Vec<u8>> {
    tls.alpn_protocol().map(<[u8]>::to_vec)
}

fn server_name(tls: &Connection) -> Option<String> {
    match tls {
        Connection::Client(_) => None,
        Connection::Server(server) => server.server_name().map(str::to_owned),
    }
}

fn peer(tls: &Connection) -> Option<Vec<CertificateDer<'static>>> {
    let chain = tls.peer_certificates()?.iter();
    Some(chain.map(|shown| shown.clone().into_owned()).collect())
}

fn early_data_accepted(tls: &Connection) -> Option<bool> {
    match tls {
        Connection::Client(client) => Some(client.is_early_data_accepted()),
        Connection::Server(_) => None,
    }
}

/// An alert is a code of its own kind (RFC 9001, section 4.8).
fn ended(code: TransportErrorCode, reason: String) -> TransportError {
    TransportError {
        code,
        frame: None,
        reason,
    }
}

fn initial(provider: &rustls::crypto::CryptoProvider) -> Result<Suite, NotForQuic> {
    let suites = provider.cipher_suites.iter();
    suites
        .filter(|suite| suite.suite() == CipherSuite::TLS13_AES_128_GCM_SHA256)
        .find_map(|suite| suite.tls13()?.quic_suite())
        .ok_or(NotForQuic)
}

/// RFC 9001, section 5.2.
fn initial_keys(suite: &Suite, dst_cid: &ConnectionId, side: Side) -> Keys {
    let side = match side {
        Side::Client => rustls::Side::Client,
        Side::Server => rustls::Side::Server,
    };
    let keys = suite.keys(dst_cid, side, Version::V1);
    pairs(keys.local, keys.remote)
}

fn pairs(local: DirectionalKeys, remote: DirectionalKeys) -> Keys {
    Keys {
        header: KeyPair {
            local: Box::new(local.header),
            remote: Box::new(remote.header),
        },
        packet: KeyPair {
            local: Box::new(local.packet),
            remote: Box::new(remote.packet),
        },
    }
}

fn encoded(params: &TransportParameters) -> Vec<u8> {
    let mut bytes = Vec::new();
    params.write(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use quinn_proto::crypto::Session as _;
    use rustls::pki_types::PrivatePkcs8KeyDer;

    use super::*;
    use crate::tls::client_verifier;
    use crate::tls::verify::Anybody;

    /// A client's session and a server's, each with a certificate, and tickets for the client.
    fn pair(keeps_tickets: bool) -> (Session, Session) {
        let provider = crate::tls::provider();
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]);
        let made = made.expect("a certificate");
        let chain = || vec![made.cert.der().clone()];
        let key = || PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
        let versions = &[&rustls::version::TLS13];
        let mut client = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody {
                provider: provider.clone(),
            }))
            .with_client_auth_cert(chain(), key())
            .expect("a usable certificate");
        let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .expect("TLS 1.3")
            .with_client_cert_verifier(
                client_verifier(chain(), true, false, provider).expect("a verifier"),
            )
            .with_single_cert(chain(), key())
            .expect("a usable certificate");
        client.alpn_protocols = vec![b"lean".to_vec()];
        server.alpn_protocols = vec![b"lean".to_vec()];
        let client = Client::new(Arc::new(client), keeps_tickets).expect("a client of QUIC");
        let server = Server::new(server).expect("a server of QUIC");
        let params = encoded(&parameters());
        let name = ServerName::try_from("localhost").expect("a name");
        let dialled =
            ClientConnection::new(client.config.clone(), Version::V1, name, params.clone());
        let served = ServerConnection::new(server.config.clone(), Version::V1, params);
        (
            Session::new(
                Connection::Client(dialled.expect("a session")),
                client.initial,
                client.keeps_tickets,
            ),
            Session::new(
                Connection::Server(served.expect("a session")),
                server.initial,
                false,
            ),
        )
    }

    fn parameters() -> TransportParameters {
        // What quinn-proto makes of its own configuration is out of reach; a peer may leave all out.
        TransportParameters::read(Side::Client, &mut Cursor::new(Vec::new())).expect("defaults")
    }

    /// All that a side has to say, a level of keys at a time, and whether the last one was reached.
    fn say(session: &mut Session) -> Vec<Vec<u8>> {
        let mut said = Vec::new();
        loop {
            let mut bytes = Vec::new();
            let keys = session.write_handshake(&mut bytes);
            let silent = bytes.is_empty() && keys.is_none();
            if !bytes.is_empty() {
                said.push(bytes);
            }
            if silent {
                return said;
            }
        }
    }

    fn hear(session: &mut Session, said: &[Vec<u8>]) {
        for bytes in said {
            session.read_handshake(bytes).expect("a handshake");
        }
    }

    /// What the server said after the handshake.
    fn shake_hands(client: &mut Session, server: &mut Session) -> Vec<Vec<u8>> {
        hear(server, &say(client));
        hear(client, &say(server));
        hear(server, &say(client));
        let late = say(server);
        assert!(!client.is_handshaking() && !server.is_handshaking());
        late
    }

    #[test]
    fn a_session_keeps_what_is_asked_for_after_its_handshake() {
        let (mut client, mut server) = pair(false);
        let tickets = shake_hands(&mut client, &mut server);
        for session in [&client, &server] {
            assert!(matches!(session.tls, Tls::Over(_)));
            let told = session.handshake_data().expect("data");
            let told = told.downcast::<HandshakeData>().expect("of a handshake");
            assert_eq!(Some(b"lean".to_vec()), told.protocol);
            let peer = session.peer_identity().expect("a certificate");
            let peer = peer.downcast::<Vec<CertificateDer<'static>>>();
            assert_eq!(1, peer.expect("a chain").len());
            assert!(session.early_crypto().is_none());
            assert!(session.transport_parameters().is_ok_and(|of| of.is_some()));
        }
        assert_eq!(Some(false), client.early_data_accepted());
        assert_eq!(None, server.early_data_accepted());
        assert!(!tickets.is_empty(), "the server gave no tickets");
        hear(&mut client, &tickets);
    }

    #[test]
    fn a_session_goes_on_to_make_keys_that_the_peer_has_too() {
        let (mut client, mut server) = pair(false);
        shake_hands(&mut client, &mut server);
        for _ in 0..3 {
            let ours = client.next_1rtt_keys().expect("keys");
            let theirs = server.next_1rtt_keys().expect("keys");
            let mut packet = b"headpayload.................".to_vec();
            ours.local.encrypt(7, &mut packet, 4);
            let mut payload = bytes::BytesMut::from(&packet[4..]);
            let read = theirs.remote.decrypt(7, b"head", &mut payload);
            assert!(read.is_ok());
            assert!(payload.starts_with(b"payload"));
        }
    }

    #[test]
    fn a_client_that_keeps_tickets_keeps_its_session_whole() {
        let (mut client, mut server) = pair(true);
        let tickets = shake_hands(&mut client, &mut server);
        hear(&mut client, &tickets);
        assert!(matches!(client.tls, Tls::Whole(_)));
    }

    #[test]
    fn nothing_but_tickets_comes_after_a_handshake() {
        let (mut client, mut server) = pair(false);
        shake_hands(&mut client, &mut server);
        let unexpected = TransportErrorCode::crypto(10);
        // KeyUpdate (RFC 9001, section 6), CertificateRequest, and a ticket for the server.
        let refused = client.read_handshake(&[24, 0, 0, 1, 0]);
        assert_eq!(Some(unexpected), refused.err().map(|error| error.code));
        let refused = client.read_handshake(&[13, 0, 0, 0]);
        assert_eq!(Some(unexpected), refused.err().map(|error| error.code));
        let refused = server.read_handshake(&[4, 0, 0, 0]);
        assert_eq!(Some(unexpected), refused.err().map(|error| error.code));
        let too_long = client.read_handshake(&[4, 1, 0, 0]);
        assert_eq!(
            Some(TransportErrorCode::crypto(50)),
            too_long.err().map(|error| error.code)
        );
    }

    #[test]
    fn a_client_takes_the_retry_that_answers_its_packet_alone() {
        let (client, _) = pair(false);
        let id = ConnectionId::new(&[1; 8]);
        let tag = retry::tag(&id, b"header, token");
        let payload = [b"token".as_slice(), &tag].concat();
        assert!(client.is_valid_retry(&id, b"header, ", &payload));
        assert!(!client.is_valid_retry(&ConnectionId::new(&[2; 8]), b"header, ", &payload));
        assert!(!client.is_valid_retry(&id, b"header. ", &payload));
        assert!(!client.is_valid_retry(&id, b"", &tag[1..]));
    }
}
