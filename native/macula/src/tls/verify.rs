//! Verifiers of certificates. Each of them checks the signature of the handshake: without
//! it a certificate, which is public, would prove nothing.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::certificate_error;
use super::session::{note_certificate, note_refusal};
use crate::vm::messages::atoms;
use rustler::Atom;

/// The DER of a SubjectPublicKeyInfo for Ed25519 (RFC 8410), up to the key itself.
const ED25519_SPKI: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];

/// The signature checks of a verifier that has a `provider`.
macro_rules! check_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.provider.signature_verification_algorithms;
            verify_tls12_signature(message, cert, dss, algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.provider.signature_verification_algorithms;
            verify_tls13_signature(message, cert, dss, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            let algorithms = &self.provider.signature_verification_algorithms;
            algorithms.supported_schemes()
        }
    };
}

/// Accepts whoever holds the key of the certificate shown.
#[derive(Debug)]
pub(crate) struct Anybody {
    pub(crate) provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    check_signatures!();
}

impl ClientCertVerifier for Anybody {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    check_signatures!();
}

/// Accepts the holder of one Ed25519 key.
#[derive(Debug)]
pub(crate) struct Pinned {
    spki: Vec<u8>,
    provider: Arc<CryptoProvider>,
}

impl Pinned {
    pub(crate) fn new(key: [u8; 32], provider: Arc<CryptoProvider>) -> Self {
        let spki = [ED25519_SPKI.as_slice(), &key].concat();
        Pinned { spki, provider }
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let shown = webpki::EndEntityCert::try_from(end_entity)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if shown.subject_public_key_info().as_ref() == self.spki {
            return Ok(ServerCertVerified::assertion());
        }
        // This error, and no certificate error, makes the alert handshake_failure (40).
        Err(Error::General(String::from("public key mismatch")))
    }

    check_signatures!();
}

/// Accepts chains to the given roots, and a leaf that is itself listed.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) listed: Vec<CertificateDer<'static>>,
    pub(crate) chain: Arc<WebPkiServerVerifier>,
    pub(crate) provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Listed {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.listed.iter().any(|cert| cert == end_entity) {
            // A self-signed certificate may call itself a CA, which no chain may end in.
            return webpki::EndEntityCert::try_from(end_entity)
                .and_then(|cert| cert.verify_is_valid_for_subject_name(server_name))
                .map(|()| ServerCertVerified::assertion())
                .map_err(|_| Error::InvalidCertificate(CertificateError::NotValidForName));
        }
        self.chain
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    check_signatures!();
}

/// Notes that another verifier was asked, and why it refused.
#[derive(Debug)]
pub(crate) struct Recording {
    pub(crate) checker: Arc<dyn ServerCertVerifier>,
    /// Somebody else decides, who is told of the refusal.
    pub(crate) defers: bool,
    pub(crate) provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Recording {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        note_certificate();
        let result = self.checker.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        if let Err(error) = &result {
            note_refusal(refusal(error));
            if self.defers {
                return Ok(ServerCertVerified::assertion());
            }
        }
        result
    }

    check_signatures!();
}

fn refusal(error: &Error) -> Atom {
    match error {
        Error::InvalidCertificate(error) => certificate_error(error),
        Error::General(_) => atoms::pubkey_mismatch(),
        _ => atoms::unknown(),
    }
}

/// Takes every client's certificate, and notes what another verifier, if there is one, has against it:
/// somebody else decides.
#[derive(Debug)]
pub(crate) struct Deferring {
    pub(crate) checker: Option<Arc<dyn ClientCertVerifier>>,
    pub(crate) mandatory: bool,
    pub(crate) provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for Deferring {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // The one who decides may trust others, too.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match &self.checker {
            Some(checker) => {
                if let Err(error) = checker.verify_client_cert(end_entity, intermediates, now) {
                    note_refusal(refusal(&error));
                }
            }
            // Nobody is trusted.
            None => note_refusal(atoms::unknown_ca()),
        }
        Ok(ClientCertVerified::assertion())
    }

    check_signatures!();
}
