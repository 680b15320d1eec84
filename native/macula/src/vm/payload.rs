//! Payloads across the VM boundary, with one copy at most.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rustler::{Binary, Encoder, Env, ListIterator, OwnedBinary, OwnedEnv, Term};

/// From this size on an Erlang binary is kept alive and sent in place; below, copying it is
/// cheaper than an environment of its own.
const IN_PLACE: usize = 4096;

/// Keeps binaries of the VM alive where they are, for native threads to read. Whoever lets go of the
/// last of them releases them all.
pub(crate) struct Keeper(Arc<Mutex<OwnedEnv>>);

impl Keeper {
    pub(crate) fn new() -> Self {
        Keeper(Arc::new(Mutex::new(OwnedEnv::new())))
    }

    pub(crate) fn keep(&self, binary: &Binary) -> Bytes {
        let env = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = env.run(|env| {
            // A reference counted binary is not moved by being copied to another environment.
            Binary::from_term(binary.to_term(env)).map(|kept| (kept.as_ptr(), kept.len()))
        });
        drop(env);
        match kept {
            Ok((data, len)) => Bytes::from_owner(Kept {
                _keeper: self.0.clone(),
                data,
                len,
            }),
            Err(_) => Bytes::copy_from_slice(binary),
        }
    }
}

/// A binary of the VM. It lives as long as the environment it is in.
struct Kept {
    _keeper: Arc<Mutex<OwnedEnv>>,
    data: *const u8,
    len: usize,
}

// SAFETY: a binary term is immutable, and an environment may be freed on any thread.
unsafe impl Send for Kept {}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `data` points into a binary of the environment that `_keeper` holds.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

/// What the queue of a stream takes: bytes in place, or a piece to be copied.
pub(crate) enum Piece<'a> {
    Held(Bytes),
    Small(&'a [u8]),
}

pub(crate) fn piece<'a>(binary: &Binary<'a>) -> Piece<'a> {
    if binary.len() < IN_PLACE {
        return Piece::Small(binary.as_slice());
    }
    Piece::Held(Keeper::new().keep(binary))
}

/// The binaries of an iovec, and their size together.
pub(crate) fn iovec<'a>(
    list: ListIterator<'a>,
) -> Result<(Vec<Binary<'a>>, usize), rustler::Error> {
    let mut binaries = Vec::new();
    let mut size = 0;
    for term in list {
        let binary = Binary::from_term(term)?;
        size += binary.len();
        binaries.push(binary);
    }
    Ok((binaries, size))
}

/// Bytes on their way into the VM: copied once, outside of any lock.
pub(crate) fn gather<'b>(chunks: impl Iterator<Item = &'b [u8]>, size: usize) -> OwnedBinary {
    let mut binary = OwnedBinary::new(size);
    let mut rest = binary.as_mut_slice();
    for chunk in chunks {
        let take = chunk.len().min(rest.len());
        let (head, tail) = rest.split_at_mut(take);
        head.copy_from_slice(&chunk[..take]);
        rest = tail;
    }
    binary
}

pub(crate) fn release(env: Env<'_>, binary: OwnedBinary) -> Term<'_> {
    Binary::from_owned(binary, env).encode(env)
}
