//! The entry points of user streams. Streams are named by their node and number; who calls is checked.

use std::sync::Arc;

use rustler::{Atom, Encoder, Env, ListIterator, LocalPid, NifResult, ResourceArc, Term};

use super::super::link::LinkHandle;
use super::super::nif::{number, reply};
use super::stream::{End, Plan, Refused, UserStream};
use super::{Carrier, atoms, enter, find, forget, usable};
use crate::engine::transport;
use crate::vm::active::Active;
use crate::vm::owner::TransferError;
use crate::vm::payload::iovec;

/// Of a stream that the peer has opened.
pub(super) const DEFAULT_PRIORITY: u8 = 128;
/// Streams that one call lists: it must not take long.
const LISTED: usize = 256;

/// OTP's handshake is complete: this is the link to the node.
#[rustler::nif]
fn dist_streams(link: ResourceArc<LinkHandle>, node: Atom) -> Atom {
    let link: Arc<dyn Carrier> = link.link.clone();
    enter(&link, node);
    atoms::ok()
}

/// Opens a stream that the caller owns; the answer is `{Ref, {ok, Number} | {error, Why}}`.
#[rustler::nif]
fn dist_stream_open<'a>(
    env: Env<'a>,
    node: Atom,
    reference: Term<'a>,
    tag: Atom,
    priority: Term<'a>,
    active: Term<'a>,
) -> NifResult<Term<'a>> {
    let priority: u8 = number(priority)?;
    let active = mode(active)?;
    let owner = env.pid();
    let link = match usable(node) {
        Ok(link) => link,
        Err(why) => return Ok(error(env, why.reason())),
    };
    let plan = move |id, name| Plan {
        id,
        name,
        priority,
        owner,
        active,
    };
    super::open(link, plan, tag, reply(env, reference)?);
    Ok(atoms::ok().encode(env))
}

/// The caller accepts streams that the node opens.
#[rustler::nif]
fn dist_stream_accept<'a>(
    env: Env<'a>,
    node: Atom,
    tag: Atom,
    active: Term<'a>,
) -> NifResult<Term<'a>> {
    let active = mode(active)?;
    Ok(match usable(node) {
        Ok(link) if link.streams().accept(&link, env, tag, active) => atoms::ok().encode(env),
        Ok(_) => error(env, atoms::not_connected()),
        Err(why) => error(env, why.reason()),
    })
}

#[rustler::nif]
fn dist_stream_stop_accepting(env: Env<'_>, node: Atom) -> Atom {
    if let Some(link) = find(node)
        && let Some(acceptor) = link.streams().take_acceptor(env.pid())
    {
        forget(&acceptor, env);
    }
    atoms::ok()
}

/// Queues the binaries of an iovec, and the end after them. With too much in the queue the answer is
/// `full`, or with a reference `wait`: `{Ref, {ok, _}}` says when to try again, and `{Ref, {error, Why}}` that the
/// stream is over.
#[rustler::nif]
fn dist_stream_send<'a>(
    env: Env<'a>,
    node: Atom,
    stream: u64,
    reference: Term<'a>,
    data: ListIterator<'a>,
    fin: bool,
) -> NifResult<Term<'a>> {
    let (binaries, size) = iovec(data)?;
    let stream = match named(env, node, stream) {
        Ok(stream) => stream,
        Err(error) => return Ok(error),
    };
    let waits = !reference.is_atom();
    let waiter = || waits.then(|| reply(env, reference).ok()).flatten();
    let pushed = stream.inner.push(env.pid(), &binaries, size, fin, waiter);
    Ok(match pushed {
        Ok(()) => atoms::ok().encode(env),
        Err(Refused::Full) if waits => atoms::wait().encode(env),
        Err(Refused::Full) => atoms::full().encode(env),
        Err(refused) => error(env, refused),
    })
}

#[rustler::nif]
fn dist_stream_reset(env: Env<'_>, node: Atom, stream: u64, code: u64) -> NifResult<Term<'_>> {
    let code = transport::VarInt::from_u64(code).map_err(|_| rustler::Error::BadArg)?;
    Ok(owned(env, node, stream, |stream| {
        stream.inner.cut(End::Reset(code));
        Ok(())
    }))
}

/// `Mode` is a boolean, `once`, or a number to add to what is left.
#[rustler::nif]
fn dist_stream_set_active<'a>(
    env: Env<'a>,
    node: Atom,
    stream: u64,
    active: Term<'a>,
) -> NifResult<Term<'a>> {
    let active = mode(active)?;
    Ok(owned(env, node, stream, |stream| {
        stream
            .inner
            .set_active(env, active, stream)
            .map_err(|_| atoms::einval())
    }))
}

/// The answer has the tag of the messages that wait in the caller's mailbox, and what the second step needs:
/// the stream may be over by then.
#[rustler::nif]
fn dist_stream_begin_transfer(env: Env<'_>, node: Atom, stream: u64, to: LocalPid) -> Term<'_> {
    let stream = match named(env, node, stream) {
        Ok(stream) => stream,
        Err(error) => return error,
    };
    match stream.inner.owner.begin_transfer(env, &stream, to) {
        Ok(()) => (atoms::ok(), stream.inner.name.tag, stream).encode(env),
        Err(TransferError::NotOwner) => error(env, atoms::not_owner()),
        Err(TransferError::NoProcess) => error(env, atoms::noproc()),
    }
}

#[rustler::nif]
fn dist_stream_commit_transfer(env: Env<'_>, stream: ResourceArc<UserStream>) -> Atom {
    if !stream.inner.owner.commit_transfer(env, &stream) {
        stream.inner.cut(End::Abandoned);
    }
    atoms::ok()
}

/// `[{{Tag, Node, Number}, {StreamId, Owner, Priority}, RecvFin, SendFin}]` of some streams in the order of
/// their numbers, from this number on; none of them where there is none.
#[rustler::nif]
fn dist_stream_list(env: Env<'_>, node: Atom, from: u64) -> Vec<Term<'_>> {
    let streams = find(node).map(|link| link.streams().some(from, LISTED));
    let streams = streams.unwrap_or_default();
    streams
        .iter()
        .map(|stream| stream.inner.info(env))
        .collect()
}

fn mode(term: Term) -> NifResult<Active> {
    Active::decode(term).ok_or(rustler::Error::BadArg)
}

fn error<'a>(env: Env<'a>, reason: impl Encoder) -> Term<'a> {
    (atoms::error(), reason).encode(env)
}

fn named(env: Env<'_>, node: Atom, stream: u64) -> Result<ResourceArc<UserStream>, Term<'_>> {
    let link = find(node).ok_or_else(|| error(env, atoms::not_connected()))?;
    let stream = link.streams().get(stream);
    stream.ok_or_else(|| error(env, atoms::unknown_stream()))
}

/// For the owner alone.
fn owned<'a>(
    env: Env<'a>,
    node: Atom,
    stream: u64,
    act: impl FnOnce(&ResourceArc<UserStream>) -> Result<(), Atom>,
) -> Term<'a> {
    match named(env, node, stream) {
        Ok(stream) if stream.inner.owner.pid() != env.pid() => error(env, atoms::not_owner()),
        Ok(stream) => match act(&stream) {
            Ok(()) => atoms::ok().encode(env),
            Err(reason) => error(env, reason),
        },
        Err(error) => error,
    }
}
