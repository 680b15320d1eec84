//! Ed25519 identities. A private key lives in a resource, so the VM can neither print nor copy it,
//! and its memory is wiped when the last reference goes.

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use rustler::{
    Atom, Binary, Encoder, Env, LocalPid, NewBinary, OwnedEnv, Resource, ResourceArc, Term,
};
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use zeroize::Zeroizing;

use super::key_file;
use crate::vm::fault::{self, Point};
use crate::vm::messages;
use crate::vm::tasks::attempt;

/// No key file is larger; a wrong path must not fill the memory.
const MAX_FILE: u64 = 64 * 1024;
/// A hash has no more bits to solve for.
const MAX_BITS: u32 = 256;

/// What one operation takes of a process's turn, of about a millisecond. The scheduler's own
/// accounting does not see it; twice of what it takes on an idle machine, so that a turn of nothing
/// else stays below a millisecond on a slower one.
pub(crate) const SIGN_PERCENT: i32 = 6;
pub(crate) const VERIFY_PERCENT: i32 = 9;

mod atoms {
    rustler::atoms! {
        ok,
        error,
        key,
        pem,
        bad_seed,
        bad_bits,
        bad_key_file,
        bad_mode,
        key_mismatch,
        cancelled,
        no_randomness,
        enoent,
        eacces,
        eexist,
        enospc,
        eisdir,
        enotdir,
        erofs,
        eio,
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    #[error("a seed has 32 bytes")]
    BadSeed,
    #[error("the puzzle has 0 to 256 bits")]
    BadBits,
    #[error("neither a key file nor a PEM with an Ed25519 key")]
    BadKeyFile,
    #[error("others may read the key file (mode {0:o})")]
    BadMode(u32),
    #[error("the public key in the file belongs to another seed")]
    KeyMismatch,
    #[error("the search was cancelled")]
    Cancelled,
    #[error("the system gives no random bytes")]
    NoRandomness,
    #[error("internal error")]
    Panicked,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Encoder for IdentityError {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::BadSeed => atoms::bad_seed().encode(env),
            Self::BadBits => atoms::bad_bits().encode(env),
            Self::BadKeyFile => atoms::bad_key_file().encode(env),
            Self::BadMode(mode) => (atoms::bad_mode(), mode).encode(env),
            Self::KeyMismatch => atoms::key_mismatch().encode(env),
            Self::Cancelled => atoms::cancelled().encode(env),
            Self::NoRandomness => atoms::no_randomness().encode(env),
            Self::Panicked => messages::atoms::internal_error().encode(env),
            Self::Io(e) => posix(e).encode(env),
        }
    }
}

fn posix(e: &io::Error) -> Atom {
    match e.kind() {
        io::ErrorKind::NotFound => atoms::enoent(),
        io::ErrorKind::PermissionDenied => atoms::eacces(),
        io::ErrorKind::AlreadyExists => atoms::eexist(),
        io::ErrorKind::StorageFull => atoms::enospc(),
        io::ErrorKind::IsADirectory => atoms::eisdir(),
        io::ErrorKind::NotADirectory => atoms::enotdir(),
        io::ErrorKind::ReadOnlyFilesystem => atoms::erofs(),
        _ => atoms::eio(),
    }
}

type Reply<T> = Result<T, IdentityError>;

/// `SigningKey` wipes itself when dropped.
pub(crate) struct Identity {
    key: SigningKey,
}

#[rustler::resource_impl]
impl Resource for Identity {}

impl Identity {
    fn from_seed(seed: &[u8]) -> Reply<Self> {
        let seed: &[u8; 32] = seed.try_into().map_err(|_| IdentityError::BadSeed)?;
        Ok(Self {
            key: SigningKey::from_bytes(seed),
        })
    }

    fn random() -> Reply<Self> {
        let mut seed = Zeroizing::new([0u8; 32]);
        getrandom::fill(&mut *seed).map_err(|_| IdentityError::NoRandomness)?;
        Self::from_seed(&*seed)
    }

    pub(crate) fn public(&self) -> [u8; 32] {
        self.key.verifying_key().to_bytes()
    }

    pub(crate) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.key.sign(message).to_bytes()
    }

    fn pem(&self) -> Zeroizing<String> {
        key_file::pem(&Zeroizing::new(self.key.to_bytes()))
    }

    fn parse(file: &[u8]) -> Reply<Self> {
        let found = key_file::parse(file).ok_or(IdentityError::BadKeyFile)?;
        let identity = Self {
            key: SigningKey::from_bytes(&found.seed),
        };
        match found.public {
            Some(public) if public != identity.public() => Err(IdentityError::KeyMismatch),
            _ => Ok(identity),
        }
    }

    fn load(path: &Path) -> Reply<Self> {
        let mut options = OpenOptions::new();
        options.read(true);
        // To open a pipe would wait for somebody who writes to it.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
        let file = options.open(path)?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(io::Error::from(io::ErrorKind::IsADirectory).into());
        }
        if !metadata.is_file() {
            return Err(IdentityError::BadKeyFile);
        }
        check_mode(&metadata)?;
        // At once as large as it gets: what grows leaves copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_FILE as usize + 1));
        file.take(MAX_FILE).read_to_end(&mut bytes)?;
        Self::parse(&bytes)
    }

    /// Writes beside the target and renames, so a crash leaves the old file or the new one.
    fn save(&self, path: &Path, format: Format) -> Reply<()> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(256));
        match format {
            Format::Key => {
                let seed = Zeroizing::new(self.key.to_bytes());
                bytes.extend_from_slice(&key_file::encode(&self.public(), &seed));
            }
            Format::Pem => bytes.extend_from_slice(self.pem().as_bytes()),
        }
        let mut unique = [0u8; 8];
        getrandom::fill(&mut unique).map_err(|_| IdentityError::NoRandomness)?;
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{:016x}.tmp", u64::from_ne_bytes(unique)));
        let temporary = Path::new(&name);
        let written = write_private(temporary, &bytes).and_then(|()| fs::rename(temporary, path));
        if written.is_err() {
            // The error that matters is the one in hand.
            let _absent = fs::remove_file(temporary);
        }
        Ok(written?)
    }
}

#[derive(Clone, Copy)]
enum Format {
    Key,
    Pem,
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(unix)]
fn check_mode(meta: &fs::Metadata) -> Reply<()> {
    let mode = std::os::unix::fs::PermissionsExt::mode(&meta.permissions()) & 0o7777;
    if mode & 0o077 == 0 {
        Ok(())
    } else {
        Err(IdentityError::BadMode(mode))
    }
}

#[cfg(not(unix))]
fn check_mode(_meta: &fs::Metadata) -> Reply<()> {
    Ok(())
}

thread_local! {
    // Frames come in runs from one peer, and unpacking a key is a tenth of a verification.
    static LAST_KEY: Cell<Option<VerifyingKey>> = const { Cell::new(None) };
}

/// Strict verification: keys of small order and signatures with a second encoding are refused.
pub(crate) fn verify(public: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> bool {
    let key = match LAST_KEY.get() {
        Some(key) if key.as_bytes() == public => key,
        _ => match VerifyingKey::from_bytes(public) {
            Ok(key) => key,
            Err(_) => return false,
        },
    };
    LAST_KEY.set(Some(key));
    key.verify_strict(message, &Signature::from_bytes(signature))
        .is_ok()
}

pub(crate) fn puzzle_bits(public: &[u8]) -> u32 {
    let mut bits = 0;
    for byte in Sha256::digest(public) {
        bits += byte.leading_zeros();
        if byte != 0 {
            break;
        }
    }
    bits
}

/// A running search; losing the last reference stops it.
struct Search {
    stop: Arc<AtomicBool>,
}

#[rustler::resource_impl]
impl Resource for Search {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, _monitor: rustler::Monitor) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Drop for Search {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn search(bits: u32, stop: &AtomicBool) -> Reply<Identity> {
    fault::pass(Point::Search);
    while !stop.load(Ordering::Relaxed) {
        let identity = Identity::random()?;
        if puzzle_bits(&identity.public()) >= bits {
            return Ok(identity);
        }
    }
    Err(IdentityError::Cancelled)
}

/// Starts the search on a native thread. It ends with `{Tag, {ok, Identity} | {error, Reason}}` to
/// the caller, unless the caller is gone.
#[rustler::nif]
fn identity_search<'a>(env: Env<'a>, bits: u32, tag: Term<'a>) -> Term<'a> {
    if bits > MAX_BITS {
        return env.error_tuple(IdentityError::BadBits);
    }
    let owner = env.pid();
    let stop = Arc::new(AtomicBool::new(false));
    let handle = ResourceArc::new(Search { stop: stop.clone() });
    let reply = OwnedEnv::new();
    let tag = reply.save(tag);
    if handle.monitor(Some(env), &owner).is_none() {
        return env.error_tuple(IdentityError::Cancelled);
    }
    let searching = std::thread::Builder::new().name("macula-search".to_owned());
    let started = searching.spawn(move || {
        crate::vm::runtime::step_back();
        let found = attempt(|| search(bits, &stop)).unwrap_or(Err(IdentityError::Panicked));
        let mut reply = reply;
        // The owner may have died meanwhile; nobody else waits for this.
        let _gone = messages::dispatch(&mut reply, &owner, |env| {
            let result = match found {
                Ok(identity) => (atoms::ok(), ResourceArc::new(identity)).encode(env),
                Err(e) => (atoms::error(), e).encode(env),
            };
            (tag.load(env), result).encode(env)
        });
    });
    if started.is_err() {
        return env.error_tuple(messages::atoms::eagain());
    }
    (atoms::ok(), handle).encode(env)
}

#[rustler::nif]
fn identity_cancel(search: ResourceArc<Search>) -> Atom {
    search.stop.store(true, Ordering::Relaxed);
    atoms::ok()
}

#[rustler::nif]
fn identity_from_seed<'a>(env: Env<'a>, seed: Binary<'a>) -> Term<'a> {
    answer(env, Identity::from_seed(&seed))
}

// A dirty I/O scheduler: it reads one small local file, so that the secret never passes through
// the VM's memory.
#[rustler::nif(schedule = "DirtyIo")]
fn identity_load<'a>(env: Env<'a>, path: Binary<'a>) -> Term<'a> {
    answer(env, os_path(&path).and_then(|path| Identity::load(&path)))
}

#[rustler::nif]
fn identity_from_pem<'a>(env: Env<'a>, pem: Binary<'a>) -> Term<'a> {
    answer(env, Identity::parse(&pem))
}

// As above.
#[rustler::nif(schedule = "DirtyIo")]
fn identity_save<'a>(
    env: Env<'a>,
    identity: ResourceArc<Identity>,
    path: Binary<'a>,
    format: Atom,
) -> Term<'a> {
    let format = if format == atoms::pem() {
        Format::Pem
    } else {
        Format::Key
    };
    match os_path(&path).and_then(|path| identity.save(&path, format)) {
        Ok(()) => atoms::ok().encode(env),
        Err(e) => env.error_tuple(e),
    }
}

#[rustler::nif]
fn identity_public<'a>(env: Env<'a>, identity: ResourceArc<Identity>) -> Binary<'a> {
    binary(env, &identity.public())
}

#[rustler::nif]
fn identity_seed<'a>(env: Env<'a>, identity: ResourceArc<Identity>) -> Binary<'a> {
    binary(env, &*Zeroizing::new(identity.key.to_bytes()))
}

#[rustler::nif]
fn identity_pem<'a>(env: Env<'a>, identity: ResourceArc<Identity>) -> Binary<'a> {
    binary(env, identity.pem().as_bytes())
}

#[rustler::nif]
fn identity_sign<'a>(
    env: Env<'a>,
    identity: ResourceArc<Identity>,
    message: Binary<'a>,
) -> Binary<'a> {
    rustler::schedule::consume_timeslice(env, SIGN_PERCENT);
    binary(env, &identity.sign(&message))
}

#[rustler::nif]
fn identity_verify(env: Env, public: Binary, message: Binary, signature: Binary) -> bool {
    rustler::schedule::consume_timeslice(env, VERIFY_PERCENT);
    check(&public, &message, &signature)
}

// A dirty CPU scheduler for messages so long that hashing them takes more than a millisecond: it
// computes, bounded by its argument, and waits for nothing.
#[rustler::nif(schedule = "DirtyCpu")]
fn identity_sign_dirty<'a>(
    env: Env<'a>,
    identity: ResourceArc<Identity>,
    message: Binary<'a>,
) -> Binary<'a> {
    binary(env, &identity.sign(&message))
}

// As above.
#[rustler::nif(schedule = "DirtyCpu")]
fn identity_verify_dirty(public: Binary, message: Binary, signature: Binary) -> bool {
    check(&public, &message, &signature)
}

#[rustler::nif]
fn identity_puzzle_bits(public: Binary) -> u32 {
    puzzle_bits(&public)
}

fn check(public: &[u8], message: &[u8], signature: &[u8]) -> bool {
    match (public.try_into(), signature.try_into()) {
        (Ok(public), Ok(signature)) => verify(public, message, signature),
        _ => false,
    }
}

fn answer(env: Env, identity: Reply<Identity>) -> Term {
    match identity {
        Ok(identity) => (atoms::ok(), ResourceArc::new(identity)).encode(env),
        Err(e) => env.error_tuple(e),
    }
}

fn binary<'a>(env: Env<'a>, bytes: &[u8]) -> Binary<'a> {
    NewBinary::from_slice(env, bytes).into()
}

#[cfg(unix)]
fn os_path(bytes: &[u8]) -> Reply<std::path::PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    Ok(std::ffi::OsStr::from_bytes(bytes).into())
}

#[cfg(not(unix))]
fn os_path(bytes: &[u8]) -> Reply<std::path::PathBuf> {
    let text = std::str::from_utf8(bytes);
    text.map(Into::into)
        .map_err(|_| IdentityError::Io(io::ErrorKind::InvalidFilename.into()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn example() -> Identity {
        let seed: Vec<u8> = (0..32).collect();
        Identity::from_seed(&seed).unwrap()
    }

    #[test]
    fn the_pem_of_a_key_is_pkcs8_version_1() {
        assert_eq!(
            example().pem().as_str(),
            "-----BEGIN PRIVATE KEY-----\n\
             MC4CAQAwBQYDK2VwBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f\n\
             -----END PRIVATE KEY-----\n"
        );
    }

    #[test]
    fn a_pem_is_read_back() {
        let read = Identity::parse(example().pem().as_bytes()).unwrap();
        assert_eq!(read.public(), example().public());
    }

    #[test]
    fn a_pem_may_be_wrapped_and_stand_behind_others() {
        let pem = example().pem();
        let wrapped = pem.replace("BCIE", "B\r\n C\tIE");
        let behind = format!("-----BEGIN X-----\nAAAA\n-----END X-----\n{wrapped}");
        let read = Identity::parse(behind.as_bytes()).unwrap();
        assert_eq!(read.public(), example().public());
        for broken in ["B!IE", "B=IE", ""] {
            let bad = pem.replace("BCIE", broken);
            assert!(matches!(
                Identity::parse(bad.as_bytes()),
                Err(IdentityError::BadKeyFile)
            ));
        }
        let cut = pem.split("-----END").next().unwrap();
        assert!(Identity::parse(cut.as_bytes()).is_err());
    }

    #[test]
    fn a_signature_holds_for_its_message_only() {
        let signature = example().sign(b"one");
        assert!(verify(&example().public(), b"one", &signature));
        assert!(!verify(&example().public(), b"two", &signature));
        assert!(!verify(&[0; 32], b"one", &signature));
    }

    #[test]
    fn a_search_solves_the_puzzle_or_stops() {
        let stop = AtomicBool::new(false);
        assert!(puzzle_bits(&search(6, &stop).unwrap().public()) >= 6);
        stop.store(true, Ordering::Relaxed);
        assert!(matches!(search(256, &stop), Err(IdentityError::Cancelled)));
    }
}
