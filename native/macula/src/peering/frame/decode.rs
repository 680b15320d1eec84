//! Bytes to terms: the frames of a buffer, with the verdict on their signatures.

use super::{
    Budget, DOMAIN, Kind, MAX_FRAME, PREFIX, Reach, SHORT, SHORT_TERMS, SIGNATURE_TERMS, SignedBy,
    Table, Type, atoms,
};
use crate::peering::cbor::{self, Item, Malformed, Reader};
use crate::peering::identity;
use rustler::sys::{ErlNifTerm, enif_make_list_from_array, enif_make_map_from_arrays};
use rustler::types::tuple::{get_tuple, make_tuple};
use rustler::{Atom, Binary, Encoder, Env, NewBinary, NifResult, ResourceArc, Term};
use std::mem::MaybeUninit;

struct Projection<'a, 't> {
    env: Env<'a>,
    table: &'t Table,
    /// The binary the bytes are part of, and where in it they begin.
    source: Binary<'a>,
    offset: usize,
    existing_atoms: bool,
}

impl<'a> Projection<'a, '_> {
    fn frame(&mut self, bytes: &[u8], of: &Type) -> Result<Term<'a>, Malformed> {
        let mut reader = Reader::new(bytes);
        let Item::Map(n) = reader.item()? else {
            return Err(Malformed::NotAMap);
        };
        let mut map = Members::new(n, bytes);
        for _ in 0..n {
            let key = reader.key()?;
            let mut kind = &Kind::Any;
            let key = match key {
                cbor::Key::Text(name) => match self.table.names.get(name) {
                    Some(atom) => {
                        kind = of.fields.get(name).unwrap_or(kind);
                        atom.encode(self.env)
                    }
                    None => self.key(name, bytes),
                },
                key => self.integer_key(key),
            };
            map.push(key, self.value(&mut reader, bytes, kind)?);
        }
        map.make(self.env)
    }

    fn value(
        &mut self,
        reader: &mut Reader,
        bytes: &[u8],
        kind: &Kind,
    ) -> Result<Term<'a>, Malformed> {
        Ok(match reader.item()? {
            Item::Uint(n) => n.encode(self.env),
            Item::Nint(n) => (-1 - i128::from(n)).encode(self.env),
            Item::Float(f) => f.encode(self.env),
            Item::Null => atoms::undefined().encode(self.env),
            Item::Bytes(b) => self.bytes(b, bytes),
            Item::Text(t) => match kind {
                Kind::Names(names) => match names.get(t) {
                    Some(atom) => atom.encode(self.env),
                    None => self.text(t, bytes),
                },
                _ => self.text(t, bytes),
            },
            Item::Array(n) => {
                let kind = match kind {
                    Kind::Array(of) => of,
                    _ => &Kind::Any,
                };
                let mut members = Vec::with_capacity(room(n, bytes));
                for _ in 0..n {
                    members.push(self.value(reader, bytes, kind)?.as_c_arg());
                }
                make_list(self.env, &members)
            }
            Item::Map(n) => {
                let mut map = Members::new(n, bytes);
                for _ in 0..n {
                    let mut of = &Kind::Any;
                    let key = match (reader.key()?, kind) {
                        (cbor::Key::Text(name), Kind::Map(fields)) => match fields.get(name) {
                            Some((atom, kind)) => {
                                of = kind;
                                atom.encode(self.env)
                            }
                            None => self.key(name, bytes),
                        },
                        (cbor::Key::Text(name), _) => self.key(name, bytes),
                        (key, _) => self.integer_key(key),
                    };
                    map.push(key, self.value(reader, bytes, of)?);
                }
                map.make(self.env)?
            }
        })
    }

    fn integer_key(&self, key: cbor::Key) -> Term<'a> {
        match key {
            cbor::Key::Nint(n) => (-1 - i128::from(n)).encode(self.env),
            cbor::Key::Uint(n) => n.encode(self.env),
            cbor::Key::Text(text) => text.encode(self.env),
        }
    }

    fn text(&self, text: &str, bytes: &[u8]) -> Term<'a> {
        // "undefined" as an atom would come back as null and break the signature.
        if text == "undefined" {
            (atoms::text(), self.bytes(text.as_bytes(), bytes)).encode(self.env)
        } else {
            self.key(text, bytes)
        }
    }

    /// Text as a key, where no null can stand.
    fn key(&self, text: &str, bytes: &[u8]) -> Term<'a> {
        if self.existing_atoms
            && let Ok(atom) = Atom::existing_from_utf8_bytes(self.env, text.as_bytes())
        {
            return atom.encode(self.env);
        }
        (atoms::text(), self.bytes(text.as_bytes(), bytes)).encode(self.env)
    }

    /// A part that is most of what was received refers to it; a small part is copied, so that it
    /// does not keep the rest alive.
    fn bytes(&self, part: &[u8], bytes: &[u8]) -> Term<'a> {
        if part.len() > 64 && part.len() >= self.source.len() / 4 {
            let at = self.offset + (part.as_ptr() as usize - bytes.as_ptr() as usize);
            if let Ok(sub) = self.source.make_subbinary(at, part.len()) {
                return sub.encode(self.env);
            }
        }
        Binary::from(NewBinary::from_slice(self.env, part)).encode(self.env)
    }
}

/// A container's length, which the first pass has found to be true; no more than there are bytes.
fn room(n: u64, bytes: &[u8]) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX).min(bytes.len())
}

/// The members of a map; a word each, as a large frame has millions of them.
struct Members {
    keys: Vec<ErlNifTerm>,
    values: Vec<ErlNifTerm>,
}

impl Members {
    fn new(n: u64, bytes: &[u8]) -> Self {
        let room = room(n, bytes);
        Self {
            keys: Vec::with_capacity(room),
            values: Vec::with_capacity(room),
        }
    }

    fn push(&mut self, key: Term, value: Term) {
        self.keys.push(key.as_c_arg());
        self.values.push(value.as_c_arg());
    }

    /// The keys are known to differ, so a refusal here has no cause but their merging.
    fn make<'a>(&self, env: Env<'a>) -> Result<Term<'a>, Malformed> {
        let mut map = MaybeUninit::uninit();
        // SAFETY: all terms were made in `env`, both arrays have the given length, and `map` is
        // written by a call that succeeds.
        let made = unsafe {
            enif_make_map_from_arrays(
                env.as_c_arg(),
                self.keys.as_ptr(),
                self.values.as_ptr(),
                self.keys.len().min(self.values.len()),
                map.as_mut_ptr(),
            )
        };
        if made == 0 {
            return Err(Malformed::DuplicateKey);
        }
        // SAFETY: the call has succeeded, so it has written a term of `env`.
        Ok(unsafe { Term::new(env, map.assume_init()) })
    }
}

fn make_list<'a>(env: Env<'a>, members: &[ErlNifTerm]) -> Term<'a> {
    // SAFETY: all terms were made in `env`; a frame has fewer bytes, and so members, than 2^32.
    unsafe {
        let list =
            enif_make_list_from_array(env.as_c_arg(), members.as_ptr(), members.len() as u32);
        Term::new(env, list)
    }
}

/// Whose signature is looked for.
enum Check<'k> {
    None,
    /// By the rule of the frame's type; `None` when no peer is known yet.
    Rule(Option<&'k [u8; 32]>),
}

fn verdict<'a>(env: Env<'a>, table: &Table, frame: &cbor::Frame, check: &Check) -> Term<'a> {
    let Check::Rule(peer) = check else {
        return atoms::unchecked().encode(env);
    };
    if !frame.has("signature") {
        return env.error_tuple(atoms::unsigned());
    }
    let public = match &table.of_type(frame).signed_by {
        SignedBy::Peer => *peer,
        SignedBy::Field(name) => frame.fixed(name),
        SignedBy::FieldOrPeer(name) if frame.has(name) => frame.fixed(name),
        SignedBy::FieldOrPeer(_) => *peer,
    };
    let (Some(public), Some(signature)) = (public, frame.fixed("signature")) else {
        return env.error_tuple(atoms::bad_frame());
    };
    let mut message = Vec::with_capacity(512);
    message.extend_from_slice(DOMAIN);
    match frame.write_signed(&mut message) {
        Ok(()) if identity::verify(public, &message, signature) => {
            let public = Binary::from(NewBinary::from_slice(env, public));
            (atoms::ok(), public).encode(env)
        }
        Ok(()) => env.error_tuple(atoms::signature_invalid()),
        Err(_) => env.error_tuple(atoms::bad_frame()),
    }
}

/// What a call to `frame_parse` is to do.
struct Parse<'a, 'k> {
    table: &'k Table,
    source: Binary<'a>,
    check: Check<'k>,
    existing_atoms: bool,
    max: usize,
    max_terms: usize,
    one: bool,
}

impl<'a> Parse<'a, '_> {
    /// Takes frames from `from` on. Answers `{Items, Next, Status}`: items are `{Frame, Verdict}`,
    /// `Next` is where the first unparsed frame begins, and the status is `again` (call again from
    /// there), `large` (call the dirty twin), `{more, Bytes}` or `{error, Reason}`.
    fn run(&self, env: Env<'a>, from: usize, reach: Reach) -> Term<'a> {
        let mut items = Vec::new();
        let mut at = from;
        let mut budget = Budget::new(SHORT_TERMS * 2, SHORT * 2);
        let status = loop {
            let rest = self.source.as_slice().get(at..).unwrap_or_default();
            let Some(prefix) = rest.first_chunk::<PREFIX>() else {
                break (atoms::more(), PREFIX - rest.len()).encode(env);
            };
            let length = u32::from_be_bytes(*prefix) as usize;
            if length > self.max {
                break env.error_tuple(atoms::frame_too_large());
            }
            let Some(bytes) = rest.get(PREFIX..PREFIX + length) else {
                break (atoms::more(), PREFIX + length - rest.len()).encode(env);
            };
            if reach == Reach::Short && length > SHORT {
                break atoms::large().encode(env);
            }
            let frame = match cbor::Frame::scan_bounded(bytes, self.max_terms) {
                Ok(frame) => frame,
                Err(e) => break env.error_tuple((atoms::bad_frame(), e)),
            };
            let mut terms = frame.cost();
            if reach == Reach::Short && terms > SHORT_TERMS {
                break atoms::large().encode(env);
            }
            if let Check::Rule(_) = self.check {
                terms += SIGNATURE_TERMS * 2;
            }
            // The first is always taken; one that is not is looked at again by the next call.
            if !items.is_empty() && !budget.allows(terms, length) {
                break atoms::again().encode(env);
            }
            match self.one(env, bytes, at + PREFIX, &frame) {
                Ok(item) => items.push(item),
                Err(e) => break env.error_tuple((atoms::bad_frame(), e)),
            }
            at += PREFIX + length;
            if self.one || !budget.spend(terms, length) {
                break atoms::again().encode(env);
            }
        };
        if reach == Reach::Short && !items.is_empty() {
            let signatures = if let Check::Rule(_) = self.check {
                items.len() * identity::VERIFY_PERCENT as usize
            } else {
                0
            };
            let percent = (1 + items.len() / 4 + signatures).min(50);
            rustler::schedule::consume_timeslice(env, percent as i32);
        }
        make_tuple(env, &[items.encode(env), at.encode(env), status])
    }

    fn one(
        &self,
        env: Env<'a>,
        bytes: &[u8],
        offset: usize,
        frame: &cbor::Frame,
    ) -> Result<Term<'a>, Malformed> {
        let mut projection = Projection {
            env,
            table: self.table,
            source: self.source,
            offset,
            existing_atoms: self.existing_atoms,
        };
        let term = projection.frame(bytes, self.table.of_type(frame))?;
        Ok((term, verdict(env, self.table, frame, &self.check)).encode(env))
    }
}

/// `Check` is `none`, `first` (no peer known yet) or the peer's key; `Text` is `tagged` or
/// `existing`; `Max` bounds the length of a frame, `MaxTerms` the bytes that its terms take.
#[allow(clippy::too_many_arguments)]
fn parse<'a>(
    env: Env<'a>,
    table: &Table,
    source: Binary<'a>,
    from: usize,
    check: Term<'a>,
    options: Term<'a>,
    reach: Reach,
) -> NifResult<Term<'a>> {
    let key = Binary::from_term(check).ok();
    let check = match &key {
        Some(key) => {
            let key = key
                .as_slice()
                .try_into()
                .map_err(|_| rustler::Error::BadArg)?;
            Check::Rule(Some(key))
        }
        None if atoms::first() == check => Check::Rule(None),
        None => Check::None,
    };
    let options = get_tuple(options)?;
    let [text, max, max_terms, one] = options[..] else {
        return Err(rustler::Error::BadArg);
    };
    let parse = Parse {
        table,
        source,
        check,
        existing_atoms: atoms::existing() == text,
        max: max.decode::<usize>()?.min(MAX_FRAME),
        max_terms: max_terms.decode()?,
        one: one.decode()?,
    };
    Ok(parse.run(env, from, reach))
}

#[rustler::nif]
fn frame_parse<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    source: Binary<'a>,
    from: usize,
    check: Term<'a>,
    options: Term<'a>,
) -> NifResult<Term<'a>> {
    parse(env, &table, source, from, check, options, Reach::Short)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn frame_parse_dirty<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    source: Binary<'a>,
    from: usize,
    check: Term<'a>,
    options: Term<'a>,
) -> NifResult<Term<'a>> {
    parse(env, &table, source, from, check, options, Reach::Long)
}

/// One item of the profile that fills the binary.
#[rustler::nif]
fn cbor_decode<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    source: Binary<'a>,
    text: Atom,
) -> Term<'a> {
    if source.len() > SHORT {
        return atoms::large().encode(env);
    }
    decode_term(env, &table, source, text, Reach::Short)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn cbor_decode_dirty<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    source: Binary<'a>,
    text: Atom,
) -> Term<'a> {
    decode_term(env, &table, source, text, Reach::Long)
}

fn decode_term<'a>(
    env: Env<'a>,
    table: &Table,
    source: Binary<'a>,
    text: Atom,
    reach: Reach,
) -> Term<'a> {
    let mut projection = Projection {
        env,
        table,
        source,
        offset: 0,
        existing_atoms: text == atoms::existing(),
    };
    let bytes = source.as_slice();
    let decoded = match cbor::measure(bytes, cbor::MAX_TERMS) {
        Ok((_, cost)) if reach == Reach::Short && cost > SHORT_TERMS => {
            return atoms::large().encode(env);
        }
        Ok(_) => projection.value(&mut Reader::new(bytes), bytes, &Kind::Any),
        Err(e) => Err(e),
    };
    match decoded {
        Ok(term) => (atoms::ok(), term).encode(env),
        Err(e) => env.error_tuple((atoms::bad_frame(), e)),
    }
}
