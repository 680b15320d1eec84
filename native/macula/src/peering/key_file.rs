//! Files of keys: our own, and PKCS#8 in a PEM text. Whoever reads a seed here wipes it.

use zeroize::Zeroizing;

/// What the key file begins with; then come the public key and the seed.
const MAGIC: &[u8; 14] = b"macula-v2-key\0";
const KEY_FILE: usize = MAGIC.len() + 32 + 32;
/// PKCS#8 version 1 of an Ed25519 key, up to the seed.
const PKCS8_V1: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];
/// The part every version of it has before the seed.
const PKCS8_ED25519: [u8; 11] = [
    0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

pub(crate) type Seed = Zeroizing<[u8; 32]>;

/// What a file says.
pub(crate) struct Found {
    pub(crate) seed: Seed,
    /// Which is to be the seed's. Not in a PEM.
    pub(crate) public: Option<[u8; 32]>,
}

/// A whole file of our own form.
pub(crate) fn encode(public: &[u8; 32], seed: &[u8; 32]) -> Zeroizing<Vec<u8>> {
    let mut file = Zeroizing::new(Vec::with_capacity(KEY_FILE));
    file.extend_from_slice(MAGIC);
    file.extend_from_slice(public);
    file.extend_from_slice(seed);
    file
}

/// The same key as PKCS#8, version 1.
pub(crate) fn pem(seed: &[u8; 32]) -> Zeroizing<String> {
    // At once as large as it gets: what grows leaves copies behind.
    let mut der = Zeroizing::new(Vec::with_capacity(PKCS8_V1.len() + seed.len()));
    der.extend_from_slice(&PKCS8_V1);
    der.extend_from_slice(seed);
    let mut pem = Zeroizing::new(String::with_capacity(128));
    pem.push_str("-----BEGIN PRIVATE KEY-----\n");
    base64(&der, &mut pem);
    pem.push_str("\n-----END PRIVATE KEY-----\n");
    pem
}

/// Nothing in what is neither.
pub(crate) fn parse(file: &[u8]) -> Option<Found> {
    match file.strip_prefix(MAGIC) {
        Some(keys) if file.len() == KEY_FILE => {
            let (public, seed) = keys.split_first_chunk()?;
            Some(Found {
                seed: Zeroizing::new(seed.try_into().ok()?),
                public: Some(*public),
            })
        }
        _ => Some(Found {
            seed: parse_pkcs8(&from_pem(file)?)?,
            public: None,
        }),
    }
}

/// Version 1 ends with the seed; version 2 may add attributes and the public key.
fn parse_pkcs8(der: &[u8]) -> Option<Seed> {
    let at = der
        .windows(PKCS8_ED25519.len())
        .position(|w| w == PKCS8_ED25519)?;
    let seed = der[at + PKCS8_ED25519.len()..].first_chunk()?;
    Some(Zeroizing::new(*seed))
}

/// One line is enough for the 48 bytes of a key.
fn base64(bytes: &[u8], out: &mut String) {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for chunk in bytes.chunks(3) {
        let group =
            chunk.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            if i <= chunk.len() {
                out.push(char::from(ALPHABET[(group >> (18 - 6 * i)) as usize & 63]));
            } else {
                out.push('=');
            }
        }
    }
}

/// The bytes of the first `PRIVATE KEY` in a PEM text. No copy of them is left behind.
fn from_pem(file: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    const BEGIN: &[u8] = b"-----BEGIN PRIVATE KEY-----";
    const END: &[u8] = b"-----END PRIVATE KEY-----";
    let at = |text: &[u8], mark: &[u8]| text.windows(mark.len()).position(|w| w == mark);
    let body = &file[at(file, BEGIN)? + BEGIN.len()..];
    let body = &body[..at(body, END)?];
    let mut der = Zeroizing::new(Vec::with_capacity(body.len()));
    let (mut group, mut bits, mut ended) = (0u32, 0u32, false);
    for byte in body {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => {
                ended = true;
                continue;
            }
            b' ' | b'\t' | b'\r' | b'\n' => continue,
            _ => return None,
        };
        if ended {
            return None;
        }
        group = group << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            der.push((group >> bits & 0xff) as u8);
        }
    }
    Some(der)
}
