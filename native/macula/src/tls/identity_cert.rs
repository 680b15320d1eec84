//! The self-signed certificate of an Ed25519 identity, for peers that pin its key.

use std::net::IpAddr;

use ed25519_dalek::{Signer, SigningKey};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, PKCS_ED25519, PublicKeyData, SanType,
    SerialNumber, SignatureAlgorithm,
};
use rustler::{Binary, Encoder, Env, Term};
use zeroize::Zeroizing;

use crate::vm::error::binary;
use crate::vm::fault::{self, Point};
use crate::vm::messages::atoms;

const COMMON_NAME: &str = "Macula Identity";
const VALID_DAYS: i64 = 3650;
/// PKCS#8 version 1 of an Ed25519 key (RFC 8410, section 7), up to the seed.
const PKCS8_V1: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

#[derive(Debug, thiserror::Error)]
enum CertError {
    #[error("a key is 32 bytes")]
    BadKey,
    #[error("the private key does not belong to the public key")]
    KeyMismatch,
    /// The place of the name in the list: the name itself may be a key in a wrong place.
    #[error("name {0} is neither a name nor an address")]
    BadSan(usize),
    #[error("cannot make the certificate: {0}")]
    Encoding(#[from] rcgen::Error),
    #[error("the system gives no random bytes")]
    Random,
}

impl Encoder for CertError {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            CertError::BadKey => (atoms::bad_key(), atoms::einval()).encode(env),
            CertError::KeyMismatch => atoms::key_mismatch().encode(env),
            CertError::BadSan(place) => (atoms::bad_san(), place).encode(env),
            CertError::Encoding(_) | CertError::Random => atoms::internal_error().encode(env),
        }
    }
}

struct Identity {
    key: SigningKey,
    public: [u8; 32],
}

impl PublicKeyData for Identity {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

impl rcgen::SigningKey for Identity {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        Ok(self.key.sign(message).to_bytes().to_vec())
    }
}

/// `{ok, {CertPem, KeyPem}}` for a key pair and its subject alternative names.
#[rustler::nif]
fn tls_self_signed<'a>(
    env: Env<'a>,
    public: Binary,
    private: Binary,
    names: Vec<Binary>,
) -> Term<'a> {
    fault::pass(Point::Nif);
    match self_signed(&public, &private, &names) {
        Ok((cert, key)) => {
            let pems = (binary(env, cert.as_bytes()), binary(env, key.as_bytes()));
            (atoms::ok(), pems).encode(env)
        }
        Err(error) => (atoms::error(), error).encode(env),
    }
}

fn self_signed(
    public: &[u8],
    private: &[u8],
    names: &[Binary],
) -> Result<(String, Zeroizing<String>), CertError> {
    let seed: [u8; 32] = private.try_into().map_err(|_| CertError::BadKey)?;
    let seed = Zeroizing::new(seed);
    let public: [u8; 32] = public.try_into().map_err(|_| CertError::BadKey)?;
    let key = SigningKey::from_bytes(&seed);
    if key.verifying_key().to_bytes() != public {
        return Err(CertError::KeyMismatch);
    }
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, COMMON_NAME);
    params.serial_number = Some(serial()?);
    params.not_before = time::OffsetDateTime::now_utc();
    params.not_after = params.not_before + time::Duration::days(VALID_DAYS);
    for (place, name) in (1..).zip(names) {
        let san = san(name).ok_or(CertError::BadSan(place))?;
        params.subject_alt_names.push(san);
    }
    let cert = params.self_signed(&Identity { key, public })?;
    let pkcs8 = Zeroizing::new([PKCS8_V1.as_slice(), seed.as_slice()].concat());
    let lf = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    let key = pem::encode_config(&pem::Pem::new("PRIVATE KEY", pkcs8.as_slice()), lf);
    let cert = pem::encode_config(&pem::Pem::new("CERTIFICATE", cert.der().as_ref()), lf);
    Ok((cert, Zeroizing::new(key)))
}

/// Twenty random bytes that make a positive number (RFC 5280, section 4.1.2.2).
fn serial() -> Result<SerialNumber, CertError> {
    let mut bytes = [0; 20];
    super::provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| CertError::Random)?;
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn san(name: &[u8]) -> Option<SanType> {
    let text = std::str::from_utf8(name).ok()?;
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(SanType::IpAddress(address));
    }
    text.try_into().map(SanType::DnsName).ok()
}
