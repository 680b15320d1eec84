//! Frames of the peering wire between terms and bytes, signed and verified on the way.
//!
//! What a field is called and what it may hold is told by the table of `macula_frame`, handed over
//! once by `frame_table`; no atom is made from anything a peer sends. Calls whose work is not
//! known to be short have a twin on a dirty CPU scheduler: they compute, bounded by one frame of
//! at most 16 MiB, and wait for nothing. The Erlang side calls the twin when the short one answers
//! `large`.

use crate::cbor::{self, Item, Malformed, Reader};
use crate::identity::{self, Identity};
use rustler::sys::ErlNifTerm;
use rustler::types::atom;
use rustler::types::map::MapIterator;
use rustler::types::tuple::{get_tuple, make_tuple};
use rustler::{
    Atom, Binary, Encoder, Env, NewBinary, NifResult, Resource, ResourceArc, Term, TermType,
};
use std::collections::HashMap;

/// The largest length a frame's prefix may hold.
const MAX_FRAME: usize = 0xff_ffff;
const PREFIX: usize = 4;
/// Bytes of input, or of output, that are worked through on a normal scheduler.
const SHORT: usize = 16 * 1024;
/// The same for the terms of a frame: a term costs about 30 ns in either direction.
const SHORT_TERMS: usize = 4 * 1024;
/// One signature, or one verification, in the same currency.
const SIGNATURE_TERMS: usize = 1024;

const DOMAIN: &[u8; 16] = b"macula-v2-frame\0";

mod atoms {
    rustler::atoms! {
        ok,
        error,
        undefined,
        text,
        any,
        bytes,
        map,
        array,
        peer,
        field,
        field_or_peer,
        none,
        first,
        existing,
        tagged,
        unchecked,
        unsigned,
        signature,
        publisher_sig,
        signature_invalid,
        bad_frame,
        frame_too_large,
        large,
        again,
        more,
        bad_table,
        not_encodable,
        too_deep,
        duplicate_key,
        bad_key,
        bad_text,
        text_undefined,
        bad_type,
        improper_list,
        integer_range,
        truncated,
        trailing_bytes,
        indefinite_length,
        unsupported_item,
        not_finite,
        not_a_map,
        enum_ = "enum",
    }
}

impl Encoder for Malformed {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::Truncated => atoms::truncated(),
            Self::TrailingBytes => atoms::trailing_bytes(),
            Self::TooDeep => atoms::too_deep(),
            Self::DuplicateKey => atoms::duplicate_key(),
            Self::BadKey => atoms::bad_key(),
            Self::Indefinite => atoms::indefinite_length(),
            Self::Unsupported => atoms::unsupported_item(),
            Self::NotFinite => atoms::not_finite(),
            Self::BadText => atoms::bad_text(),
            Self::NotAMap => atoms::not_a_map(),
        }
        .encode(env)
    }
}

/// Why a term has no place on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EncodeError {
    #[error("a term of a type that CBOR does not know")]
    BadType,
    #[error("an improper list")]
    ImproperList,
    #[error("an integer beyond 64 bits")]
    IntegerRange,
    #[error("text that is not UTF-8")]
    BadText,
    #[error("a map key that is neither text nor an integer")]
    BadKey,
    #[error("two keys become one on the wire")]
    DuplicateKey,
    #[error("the text \"undefined\", which older peers take for null")]
    TextUndefined,
    #[error("nested too deeply")]
    TooDeep,
    #[error("not a map")]
    NotAMap,
    #[error("more than 16777215 bytes")]
    TooLarge,
    #[error("more than a normal scheduler should do in one call")]
    Large,
}

impl Encoder for EncodeError {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        let why = match self {
            Self::Large => return atoms::large().encode(env),
            Self::TooLarge => return env.error_tuple(atoms::frame_too_large()),
            Self::BadType => atoms::bad_type(),
            Self::ImproperList => atoms::improper_list(),
            Self::IntegerRange => atoms::integer_range(),
            Self::BadText => atoms::bad_text(),
            Self::BadKey => atoms::bad_key(),
            Self::DuplicateKey => atoms::duplicate_key(),
            Self::TextUndefined => atoms::text_undefined(),
            Self::TooDeep => atoms::too_deep(),
            Self::NotAMap => atoms::not_a_map(),
        };
        env.error_tuple((atoms::not_encodable(), why))
    }
}

// ---- The table ---------------------------------------------------------------------------------

/// What the text inside a field may become.
enum Kind {
    /// Payload: text stays text.
    Any,
    /// Text that is one of these names becomes the atom.
    Names(HashMap<Box<str>, Atom>),
    Array(Box<Kind>),
    Map(HashMap<Box<str>, (Atom, Kind)>),
}

/// Whose key a frame of a type is signed with.
enum SignedBy {
    Peer,
    Field(Box<str>),
    FieldOrPeer(Box<str>),
}

struct Type {
    signed_by: SignedBy,
    fields: HashMap<Box<str>, Kind>,
}

/// The table of `macula_frame`, in the form both directions use.
pub(crate) struct Table {
    /// Every field name of every type.
    names: HashMap<Box<str>, Atom>,
    types: HashMap<Box<str>, Type>,
    unknown: Type,
    /// The encoded text of the atoms above, sorted by the atom.
    texts: Vec<(ErlNifTerm, Box<[u8]>)>,
}

#[rustler::resource_impl]
impl Resource for Table {}

impl Table {
    fn kind(&mut self, term: Term) -> NifResult<Kind> {
        if !term.is_tuple() {
            return Ok(Kind::Any);
        }
        let (tag, of): (Atom, Term) = term.decode()?;
        if tag == atoms::array() {
            Ok(Kind::Array(Box::new(self.kind(of)?)))
        } else if tag == atoms::enum_() {
            let mut names = HashMap::new();
            for name in of.decode::<Vec<Atom>>()? {
                names.insert(self.name(of.get_env(), name)?, name);
            }
            Ok(Kind::Names(names))
        } else if tag == atoms::map() {
            let mut fields = HashMap::new();
            for (name, kind) in of.decode::<Vec<(Atom, Term)>>()? {
                let text = self.name(of.get_env(), name)?;
                fields.insert(text, (name, self.kind(kind)?));
            }
            Ok(Kind::Map(fields))
        } else {
            Ok(Kind::Any)
        }
    }

    fn name(&mut self, env: Env, name: Atom) -> NifResult<Box<str>> {
        let text = name.to_term(env).atom_to_string()?;
        let mut encoded = Vec::with_capacity(text.len() + 1);
        cbor::write_scalar(&mut encoded, Item::Text(&text));
        self.texts
            .push((name.as_c_arg(), encoded.into_boxed_slice()));
        Ok(text.into_boxed_str())
    }

    fn text(&self, atom: ErlNifTerm) -> Option<&[u8]> {
        let at = self
            .texts
            .binary_search_by_key(&atom, |(atom, _)| *atom)
            .ok()?;
        Some(&self.texts[at].1)
    }

    fn of_type(&self, frame: &cbor::Frame) -> &Type {
        frame
            .text("frame_type")
            .and_then(|name| self.types.get(name))
            .unwrap_or(&self.unknown)
    }
}

type TypeTerm<'a> = (Atom, Term<'a>, Vec<(Atom, Term<'a>)>);

/// Takes the table over: `Types = [{Type, peer | {field | field_or_peer, Name}, [{Field, Kind}]}]`.
#[rustler::nif]
fn frame_table<'a>(
    env: Env<'a>,
    envelope: Vec<(Atom, Term<'a>)>,
    types: Vec<TypeTerm<'a>>,
) -> NifResult<ResourceArc<Table>> {
    let mut table = Table {
        names: HashMap::new(),
        types: HashMap::new(),
        unknown: Type {
            signed_by: SignedBy::Peer,
            fields: HashMap::new(),
        },
        texts: Vec::new(),
    };
    let fields = |table: &mut Table, list: &[(Atom, Term<'a>)]| -> NifResult<_> {
        let mut kinds = HashMap::new();
        for (name, kind) in list {
            let text = table.name(env, *name)?;
            table.names.insert(text.clone(), *name);
            kinds.insert(text, table.kind(*kind)?);
        }
        Ok(kinds)
    };
    table.unknown.fields = fields(&mut table, &envelope)?;
    for (name, signed_by, own) in types {
        let mut kinds = fields(&mut table, &envelope)?;
        kinds.extend(fields(&mut table, &own)?);
        let signed_by = match signed_by.decode::<(Atom, Atom)>() {
            Ok((rule, field)) if rule == atoms::field() => SignedBy::Field(table.name(env, field)?),
            Ok((_, field)) => SignedBy::FieldOrPeer(table.name(env, field)?),
            Err(_) => SignedBy::Peer,
        };
        let text = table.name(env, name)?;
        table.types.insert(
            text,
            Type {
                signed_by,
                fields: kinds,
            },
        );
    }
    table.texts.sort_by_key(|(atom, _)| *atom);
    table.texts.dedup_by_key(|(atom, _)| *atom);
    Ok(ResourceArc::new(table))
}

// ---- Terms to bytes ----------------------------------------------------------------------------

struct Writer<'t> {
    table: &'t Table,
    out: Vec<u8>,
    keys: Vec<u8>,
    /// Terms that may still be visited in this call.
    left: usize,
    max: usize,
    /// Whether the text "undefined" may be sent: older peers read it as null, and then find the
    /// signature invalid.
    undefined: bool,
}

impl<'t> Writer<'t> {
    fn new(table: &'t Table, reach: Reach) -> Self {
        let (left, max) = match reach {
            Reach::Short => (SHORT_TERMS, SHORT),
            // More than the wire allows, as the excess is found when the frame is put together.
            Reach::Long => (usize::MAX, MAX_FRAME + 64),
        };
        Self {
            table,
            out: Vec::with_capacity(256),
            keys: Vec::with_capacity(256),
            left,
            max,
            undefined: true,
        }
    }

    fn spend(&mut self, terms: usize) -> Result<(), EncodeError> {
        self.left = self.left.checked_sub(terms).ok_or(EncodeError::Large)?;
        if self.out.len() > self.max {
            Err(self.over())
        } else {
            Ok(())
        }
    }

    fn over(&self) -> EncodeError {
        if self.max > MAX_FRAME {
            EncodeError::TooLarge
        } else {
            EncodeError::Large
        }
    }

    fn blob(&mut self, item: Item, len: usize) -> Result<(), EncodeError> {
        if self.out.len() + len > self.max {
            return Err(self.over());
        }
        cbor::write_scalar(&mut self.out, item);
        Ok(())
    }

    fn term(&mut self, term: Term, depth: usize) -> Result<(), EncodeError> {
        self.spend(1)?;
        match term.get_type() {
            TermType::Atom if atoms::undefined() == term => {
                cbor::write_scalar(&mut self.out, Item::Null);
                Ok(())
            }
            TermType::Atom => {
                if let Some(text) = self.table.text(term.as_c_arg()) {
                    self.out.extend_from_slice(text);
                    return Ok(());
                }
                let text = atom_text(term)?;
                cbor::write_scalar(&mut self.out, Item::Text(&text));
                Ok(())
            }
            TermType::Binary => {
                // A bitstring that is no binary has no bytes to send.
                let bytes = Binary::from_term(term).map_err(|_| EncodeError::BadType)?;
                self.blob(Item::Bytes(&bytes), bytes.len())
            }
            TermType::Integer => {
                cbor::write_scalar(&mut self.out, integer(term)?);
                Ok(())
            }
            TermType::Float => {
                let float = term.decode().map_err(|_| EncodeError::BadType)?;
                cbor::write_scalar(&mut self.out, Item::Float(float));
                Ok(())
            }
            TermType::Tuple => {
                let bytes = tagged_text(term).ok_or(EncodeError::BadType)?;
                let text = std::str::from_utf8(&bytes).map_err(|_| EncodeError::BadText)?;
                if !self.undefined && text == "undefined" {
                    return Err(EncodeError::TextUndefined);
                }
                self.blob(Item::Text(text), bytes.len())
            }
            TermType::List => self.list(term, deeper(depth)?),
            TermType::Map => {
                let map = self.entries(term, |_| true)?;
                cbor::write_scalar(&mut self.out, Item::Map(map.entries.len() as u64));
                self.members(map, deeper(depth)?, |_, _| ())
            }
            _ => Err(EncodeError::BadType),
        }
    }

    fn list(&mut self, list: Term, depth: usize) -> Result<(), EncodeError> {
        let n = list.list_length().map_err(|_| EncodeError::ImproperList)?;
        if n > self.left {
            return Err(EncodeError::Large);
        }
        cbor::write_scalar(&mut self.out, Item::Array(n as u64));
        let mut rest = list;
        for _ in 0..n {
            let (head, tail) = rest
                .list_get_cell()
                .map_err(|_| EncodeError::ImproperList)?;
            self.term(head, depth)?;
            rest = tail;
        }
        Ok(())
    }

    /// Encodes the keys and puts them in wire order; the values wait.
    fn entries<'a>(
        &mut self,
        map: Term<'a>,
        keep: impl Fn(Term<'a>) -> bool,
    ) -> Result<Members<'a>, EncodeError> {
        let n = map.map_size().map_err(|_| EncodeError::NotAMap)?;
        self.spend(n)?;
        let base = self.keys.len();
        let mut entries = Vec::with_capacity(n);
        for (key, value) in MapIterator::new(map).ok_or(EncodeError::NotAMap)? {
            if keep(key) {
                let from = self.keys.len();
                self.key(key)?;
                entries.push(Member {
                    from,
                    to: self.keys.len(),
                    value,
                });
            }
        }
        let keys = &self.keys;
        entries.sort_unstable_by(|a, b| keys[a.from..a.to].cmp(&keys[b.from..b.to]));
        let same =
            |pair: &[Member]| keys[pair[0].from..pair[0].to] == keys[pair[1].from..pair[1].to];
        if entries.windows(2).any(same) {
            return Err(EncodeError::DuplicateKey);
        }
        Ok(Members { base, entries })
    }

    fn key(&mut self, key: Term) -> Result<(), EncodeError> {
        match key.get_type() {
            TermType::Integer => {
                cbor::write_scalar(&mut self.keys, integer(key)?);
            }
            TermType::Atom => match self.table.text(key.as_c_arg()) {
                Some(text) => self.keys.extend_from_slice(text),
                None => cbor::write_scalar(&mut self.keys, Item::Text(&atom_text(key)?)),
            },
            TermType::Binary | TermType::Tuple => {
                let bytes = match Binary::from_term(key) {
                    Ok(bytes) => bytes,
                    Err(_) => tagged_text(key).ok_or(EncodeError::BadKey)?,
                };
                if self.keys.len() + bytes.len() > self.max {
                    return Err(self.over());
                }
                let text = std::str::from_utf8(&bytes).map_err(|_| EncodeError::BadText)?;
                cbor::write_scalar(&mut self.keys, Item::Text(text));
            }
            _ => return Err(EncodeError::BadKey),
        }
        Ok(())
    }

    /// Writes keys and values; `before` sees each key with the place where it will stand.
    fn members<'a>(
        &mut self,
        map: Members<'a>,
        depth: usize,
        mut before: impl FnMut(&[u8], usize),
    ) -> Result<(), EncodeError> {
        for member in &map.entries {
            let key = &self.keys[member.from..member.to];
            before(key, self.out.len());
            self.out.extend_from_slice(key);
            self.term(member.value, depth)?;
        }
        self.keys.truncate(map.base);
        Ok(())
    }
}

struct Members<'a> {
    base: usize,
    entries: Vec<Member<'a>>,
}

struct Member<'a> {
    from: usize,
    to: usize,
    value: Term<'a>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Short,
    Long,
}

fn deeper(depth: usize) -> Result<usize, EncodeError> {
    if depth < cbor::MAX_DEPTH {
        Ok(depth + 1)
    } else {
        Err(EncodeError::TooDeep)
    }
}

fn tagged_text<'a>(term: Term<'a>) -> Option<Binary<'a>> {
    let (tag, bytes) = term.decode::<(Atom, Term)>().ok()?;
    if tag == atoms::text() {
        Binary::from_term(bytes).ok()
    } else {
        None
    }
}

fn integer<'a>(term: Term<'a>) -> Result<Item<'a>, EncodeError> {
    if let Ok(n) = term.decode::<u64>() {
        return Ok(Item::Uint(n));
    }
    let n = term
        .decode::<i128>()
        .map_err(|_| EncodeError::IntegerRange)?;
    u64::try_from(-1 - n)
        .map(Item::Nint)
        .map_err(|_| EncodeError::IntegerRange)
}

/// The name of any atom. The NIF interface of OTP 25 gives only the Latin-1 ones; the external
/// format has them all.
fn atom_text(atom: Term) -> Result<String, EncodeError> {
    if let Ok(text) = atom.atom_to_string() {
        return Ok(text);
    }
    const ATOM_UTF8: u8 = 118;
    const SMALL_ATOM_UTF8: u8 = 119;
    let external = atom.to_binary();
    let name = match external.as_slice() {
        [131, SMALL_ATOM_UTF8, _, name @ ..] => name,
        [131, ATOM_UTF8, _, _, name @ ..] => name,
        _ => return Err(EncodeError::BadText),
    };
    String::from_utf8(name.to_vec()).map_err(|_| EncodeError::BadText)
}

/// A frame as it is signed: the domain, then the canonical map without the signatures, with the
/// places at which those belong.
struct Body {
    message: Vec<u8>,
    entries: usize,
    map_at: usize,
    signature_at: usize,
    publisher_at: usize,
}

const SIGNATURE_KEY: &[u8] = b"\x69signature";
const PUBLISHER_KEY: &[u8] = b"\x6dpublisher_sig";

fn body(table: &Table, frame: Term, reach: Reach, undefined: bool) -> Result<Body, EncodeError> {
    let mut writer = Writer::new(table, reach);
    writer.undefined = undefined;
    writer.out.extend_from_slice(DOMAIN);
    let map = writer.entries(frame, |key| {
        atoms::signature() != key && atoms::publisher_sig() != key
    })?;
    let entries = map.entries.len();
    cbor::write_scalar(&mut writer.out, Item::Map(entries as u64));
    let map_at = writer.out.len();
    let (mut signature_at, mut publisher_at) = (None, None);
    writer.members(map, 1, |key, at| {
        if key > SIGNATURE_KEY {
            signature_at.get_or_insert(at);
        }
        if key > PUBLISHER_KEY {
            publisher_at.get_or_insert(at);
        }
    })?;
    let end = writer.out.len();
    Ok(Body {
        message: writer.out,
        entries,
        map_at,
        signature_at: signature_at.unwrap_or(end),
        publisher_at: publisher_at.unwrap_or(end),
    })
}

impl Body {
    /// The frame with its length and the given signatures; each is the encoded value.
    fn wire<'a>(
        &self,
        env: Env<'a>,
        signature: Option<&[u8]>,
        publisher: Option<&[u8]>,
    ) -> Result<Term<'a>, EncodeError> {
        let extra = usize::from(signature.is_some()) + usize::from(publisher.is_some());
        let mut head = Vec::with_capacity(9);
        cbor::write_scalar(&mut head, Item::Map((self.entries + extra) as u64));
        let signature = signature.map(|value| (SIGNATURE_KEY, value));
        let publisher = publisher.map(|value| (PUBLISHER_KEY, value));
        let size = |pair: &Option<(&[u8], &[u8])>| pair.map_or(0, |(k, v)| k.len() + v.len());
        let length =
            head.len() + self.message.len() - self.map_at + size(&signature) + size(&publisher);
        if length > MAX_FRAME {
            return Err(EncodeError::TooLarge);
        }
        let mut wire = NewBinary::new(env, PREFIX + length);
        let mut rest: &mut [u8] = wire.as_mut_slice();
        let mut put = |bytes: &[u8]| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(bytes.len());
            now.copy_from_slice(bytes);
            rest = later;
        };
        put(&(length as u32).to_be_bytes());
        put(&head);
        put(&self.message[self.map_at..self.signature_at]);
        for part in signature.iter().flat_map(|(k, v)| [k, v]) {
            put(part);
        }
        put(&self.message[self.signature_at..self.publisher_at]);
        for part in publisher.iter().flat_map(|(k, v)| [k, v]) {
            put(part);
        }
        put(&self.message[self.publisher_at..]);
        Ok(Binary::from(wire).encode(env))
    }
}

/// The encoded value of a field that no signature covers.
fn unsigned_field(
    table: &Table,
    frame: Term,
    name: Atom,
    reach: Reach,
) -> Result<Option<Vec<u8>>, EncodeError> {
    let Ok(value) = frame.map_get(name) else {
        return Ok(None);
    };
    let mut writer = Writer::new(table, reach);
    writer.term(value, 1)?;
    Ok(Some(writer.out))
}

fn encoded_signature(signature: &[u8; 64]) -> [u8; 66] {
    let mut value = [0; 66];
    value[0] = 0x58;
    value[1] = 64;
    value[2..].copy_from_slice(signature);
    value
}

fn encode<'a>(env: Env<'a>, table: &Table, frame: Term<'a>, reach: Reach) -> Term<'a> {
    let encoded = (|| {
        let signature = unsigned_field(table, frame, atoms::signature(), reach)?;
        let publisher = unsigned_field(table, frame, atoms::publisher_sig(), reach)?;
        body(table, frame, reach, true)?.wire(env, signature.as_deref(), publisher.as_deref())
    })();
    reply(env, encoded)
}

fn sign<'a>(
    env: Env<'a>,
    table: &Table,
    identity: &Identity,
    frame: Term<'a>,
    reach: Reach,
) -> Term<'a> {
    let signed = body(table, frame, reach, true).map(|body| {
        let signature = identity.sign(&body.message);
        Binary::from(NewBinary::from_slice(env, &signature)).encode(env)
    });
    reply(env, signed)
}

fn sign_encode<'a>(
    env: Env<'a>,
    table: &Table,
    identity: &Identity,
    frame: Term<'a>,
    undefined: bool,
    reach: Reach,
) -> Result<Term<'a>, EncodeError> {
    let publisher = unsigned_field(table, frame, atoms::publisher_sig(), reach)?;
    let body = body(table, frame, reach, undefined)?;
    let signature = encoded_signature(&identity.sign(&body.message));
    body.wire(env, Some(&signature), publisher.as_deref())
}

fn verify<'a>(
    env: Env<'a>,
    table: &Table,
    frame: Term<'a>,
    public: &[u8],
    reach: Reach,
) -> Term<'a> {
    let fixed = |name: Atom| {
        frame
            .map_get(name)
            .ok()
            .and_then(|v| Binary::from_term(v).ok())
    };
    let signature = fixed(atoms::signature());
    let signature = signature
        .as_ref()
        .map(Binary::as_slice)
        .and_then(|s| s.try_into().ok());
    let (Ok(public), Some(signature)) = (public.try_into(), signature) else {
        return env.error_tuple(atoms::bad_frame());
    };
    match body(table, frame, reach, true) {
        Ok(body) if identity::verify(public, &body.message, signature) => atoms::ok().encode(env),
        Ok(_) => env.error_tuple(atoms::signature_invalid()),
        Err(e) => e.encode(env),
    }
}

fn reply<'a>(env: Env<'a>, result: Result<Term<'a>, EncodeError>) -> Term<'a> {
    match result {
        Ok(term) => (atoms::ok(), term).encode(env),
        Err(e) => e.encode(env),
    }
}

#[rustler::nif]
fn frame_encode<'a>(env: Env<'a>, table: ResourceArc<Table>, frame: Term<'a>) -> Term<'a> {
    encode(env, &table, frame, Reach::Short)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn frame_encode_dirty<'a>(env: Env<'a>, table: ResourceArc<Table>, frame: Term<'a>) -> Term<'a> {
    encode(env, &table, frame, Reach::Long)
}

#[rustler::nif]
fn frame_sign<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    identity: ResourceArc<Identity>,
    frame: Term<'a>,
) -> Term<'a> {
    sign(env, &table, &identity, frame, Reach::Short)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn frame_sign_dirty<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    identity: ResourceArc<Identity>,
    frame: Term<'a>,
) -> Term<'a> {
    sign(env, &table, &identity, frame, Reach::Long)
}

#[rustler::nif]
fn frame_sign_encode<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    identity: ResourceArc<Identity>,
    frame: Term<'a>,
    undefined: bool,
) -> Term<'a> {
    // Tells the scheduler what its own accounting does not see.
    rustler::schedule::consume_timeslice(env, 3);
    reply(
        env,
        sign_encode(env, &table, &identity, frame, undefined, Reach::Short),
    )
}

#[rustler::nif(schedule = "DirtyCpu")]
fn frame_sign_encode_dirty<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    identity: ResourceArc<Identity>,
    frame: Term<'a>,
    undefined: bool,
) -> Term<'a> {
    reply(
        env,
        sign_encode(env, &table, &identity, frame, undefined, Reach::Long),
    )
}

/// Signs and encodes from the front of the list until a millisecond would be exceeded. Answers
/// `{Results, Rest}`; a frame that is too long for this way stands first in `Rest`.
#[rustler::nif]
fn frame_sign_encode_batch<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    identity: ResourceArc<Identity>,
    frames: Term<'a>,
    undefined: bool,
) -> NifResult<Term<'a>> {
    let mut rest = frames;
    let mut done = Vec::new();
    let mut budget = Budget::new(SHORT_TERMS * 2, SHORT);
    while let Ok((frame, tail)) = rest.list_get_cell() {
        match sign_encode(env, &table, &identity, frame, undefined, Reach::Short) {
            Err(EncodeError::Large) => break,
            result => {
                let size = result
                    .as_ref()
                    .ok()
                    .and_then(|t| Binary::from_term(*t).ok());
                done.push(reply(env, result));
                rest = tail;
                if !budget.spend(SIGNATURE_TERMS, size.map_or(0, |b| b.len())) {
                    break;
                }
            }
        }
    }
    rustler::schedule::consume_timeslice(env, 25);
    Ok((done, rest).encode(env))
}

#[rustler::nif]
fn frame_verify<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    frame: Term<'a>,
    public: Binary<'a>,
) -> Term<'a> {
    verify(env, &table, frame, &public, Reach::Short)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn frame_verify_dirty<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    frame: Term<'a>,
    public: Binary<'a>,
) -> Term<'a> {
    verify(env, &table, frame, &public, Reach::Long)
}

/// The canonical encoding of any term of the profile.
#[rustler::nif]
fn cbor_encode<'a>(env: Env<'a>, table: ResourceArc<Table>, term: Term<'a>) -> Term<'a> {
    encode_term(env, &table, term, Reach::Short)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn cbor_encode_dirty<'a>(env: Env<'a>, table: ResourceArc<Table>, term: Term<'a>) -> Term<'a> {
    encode_term(env, &table, term, Reach::Long)
}

fn encode_term<'a>(env: Env<'a>, table: &Table, term: Term<'a>, reach: Reach) -> Term<'a> {
    let mut writer = Writer::new(table, reach);
    let written = writer.term(term, 0);
    let binary = |()| Binary::from(NewBinary::from_slice(env, &writer.out)).encode(env);
    reply(env, written.map(binary))
}

// ---- Bytes to terms ----------------------------------------------------------------------------

/// Work left in one call.
struct Budget {
    terms: usize,
    bytes: usize,
}

impl Budget {
    fn new(terms: usize, bytes: usize) -> Self {
        Self { terms, bytes }
    }

    fn spend(&mut self, terms: usize, bytes: usize) -> bool {
        self.terms = self.terms.saturating_sub(terms);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.terms > 0 && self.bytes > 0
    }
}

struct Projection<'a, 't> {
    env: Env<'a>,
    table: &'t Table,
    /// The binary the bytes are part of, and where in it they begin.
    source: Binary<'a>,
    offset: usize,
    existing_atoms: bool,
    terms: usize,
}

impl<'a> Projection<'a, '_> {
    fn frame(&mut self, bytes: &[u8], of: &Type) -> Result<Term<'a>, Malformed> {
        let mut reader = Reader::new(bytes);
        let Item::Map(n) = reader.item()? else {
            return Err(Malformed::NotAMap);
        };
        let (mut keys, mut values) = (Vec::with_capacity(32), Vec::with_capacity(32));
        for _ in 0..n {
            let key = reader.key()?;
            let mut kind = &Kind::Any;
            keys.push(match key {
                cbor::Key::Text(name) => match self.table.names.get(name) {
                    Some(atom) => {
                        kind = of.fields.get(name).unwrap_or(kind);
                        atom.encode(self.env)
                    }
                    None => self.text(name, bytes),
                },
                key => self.integer_key(key),
            });
            values.push(self.value(&mut reader, bytes, kind)?);
        }
        self.map(&keys, &values)
    }

    fn value(
        &mut self,
        reader: &mut Reader,
        bytes: &[u8],
        kind: &Kind,
    ) -> Result<Term<'a>, Malformed> {
        self.terms += 1;
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
                let mut members = Vec::with_capacity(n.min(1024) as usize);
                for _ in 0..n {
                    members.push(self.value(reader, bytes, kind)?);
                }
                members.encode(self.env)
            }
            Item::Map(n) => {
                let size = n.min(1024) as usize;
                let (mut keys, mut values) = (Vec::with_capacity(size), Vec::with_capacity(size));
                for _ in 0..n {
                    let mut of = &Kind::Any;
                    keys.push(match (reader.key()?, kind) {
                        (cbor::Key::Text(name), Kind::Map(fields)) => match fields.get(name) {
                            Some((atom, kind)) => {
                                of = kind;
                                atom.encode(self.env)
                            }
                            None => self.text(name, bytes),
                        },
                        (cbor::Key::Text(name), _) => self.text(name, bytes),
                        (key, _) => self.integer_key(key),
                    });
                    values.push(self.value(reader, bytes, of)?);
                }
                self.map(&keys, &values)?
            }
        })
    }

    /// The keys are known to differ, so a refusal here has no cause but their merging.
    fn map(&self, keys: &[Term<'a>], values: &[Term<'a>]) -> Result<Term<'a>, Malformed> {
        Term::map_from_term_arrays(self.env, keys, values).map_err(|_| Malformed::DuplicateKey)
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
        if self.existing_atoms && text != "undefined" {
            if let Ok(atom) = Atom::existing_from_utf8_bytes(self.env, text.as_bytes()) {
                return atom.encode(self.env);
            }
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
            let mut terms = 0;
            match self.one(env, bytes, at + PREFIX, &mut terms) {
                Ok(item) => items.push(item),
                Err(e) => break env.error_tuple((atoms::bad_frame(), e)),
            }
            at += PREFIX + length;
            if let Check::Rule(_) = self.check {
                terms += SIGNATURE_TERMS * 2;
            }
            if self.one || !budget.spend(terms, length) {
                break atoms::again().encode(env);
            }
        };
        if reach == Reach::Short && !items.is_empty() {
            let signatures = if let Check::Rule(_) = self.check {
                items.len() * 4
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
        terms: &mut usize,
    ) -> Result<Term<'a>, Malformed> {
        let frame = cbor::Frame::scan(bytes)?;
        let mut projection = Projection {
            env,
            table: self.table,
            source: self.source,
            offset,
            existing_atoms: self.existing_atoms,
            terms: 0,
        };
        let term = projection.frame(bytes, self.table.of_type(&frame))?;
        *terms = projection.terms;
        Ok((term, verdict(env, self.table, &frame, &self.check)).encode(env))
    }
}

/// `Check` is `none`, `first` (no peer known yet) or the peer's key; `Text` is `tagged` or
/// `existing`; `Max` bounds the length of a frame.
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
    let [text, max, one] = options[..] else {
        return Err(rustler::Error::BadArg);
    };
    let parse = Parse {
        table,
        source,
        check,
        existing_atoms: atoms::existing() == text,
        max: max.decode::<usize>()?.min(MAX_FRAME),
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
    decode_term(env, &table, source, text)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn cbor_decode_dirty<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    source: Binary<'a>,
    text: Atom,
) -> Term<'a> {
    decode_term(env, &table, source, text)
}

fn decode_term<'a>(env: Env<'a>, table: &Table, source: Binary<'a>, text: Atom) -> Term<'a> {
    let mut projection = Projection {
        env,
        table,
        source,
        offset: 0,
        existing_atoms: text == atoms::existing(),
        terms: 0,
    };
    let bytes = source.as_slice();
    let decoded = cbor::validate(bytes)
        .and_then(|_| projection.value(&mut Reader::new(bytes), bytes, &Kind::Any));
    match decoded {
        Ok(term) => (atom::ok(), term).encode(env),
        Err(e) => env.error_tuple((atoms::bad_frame(), e)),
    }
}
