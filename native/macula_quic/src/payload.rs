//! Payloads across the VM boundary, with one copy at most.

use bytes::Bytes;
use rustler::{Binary, Encoder, Env, ListIterator, OwnedBinary, OwnedEnv, Term};

/// From this size on an Erlang binary is kept alive and sent in place; below, copying it is
/// cheaper than an environment of its own.
const IN_PLACE: usize = 4096;

/// A binary of the VM that a native thread reads. It lives as long as the environment it is in.
struct Held {
    _env: OwnedEnv,
    data: *const u8,
    len: usize,
}

// SAFETY: a binary term is immutable, and an environment may be freed on any thread.
unsafe impl Send for Held {}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `data` points into a reference counted binary that `_env` keeps.
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
    Piece::Held(hold(binary))
}

/// Keeps a binary alive, in place.
pub(crate) fn hold(binary: &Binary) -> Bytes {
    let env = OwnedEnv::new();
    let (data, len) = env.run(|inner| {
        let copy = binary.to_term(inner);
        match copy.decode::<Binary>() {
            Ok(copy) => (copy.as_ptr(), copy.len()),
            Err(_) => (std::ptr::NonNull::<u8>::dangling().as_ptr().cast_const(), 0),
        }
    });
    Bytes::from_owner(Held {
        _env: env,
        data,
        len,
    })
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
