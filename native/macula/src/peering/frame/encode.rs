//! Terms to bytes: the canonical encoding of a frame, with its signature.

use super::{
    Budget, DOMAIN, MAX_FRAME, PREFIX, Reach, SHORT, SHORT_TERMS, SIGNATURE_TERMS, Table, atoms,
};
use crate::peering::cbor::{self, Item};
use crate::peering::identity::{self, Identity};
use rustler::types::map::MapIterator;
use rustler::{
    Atom, Binary, Decoder, Encoder, Env, NewBinary, NifResult, ResourceArc, Term, TermType,
};

/// What the name of an atom that no field bears costs, in terms.
const UNKNOWN_ATOM_TERMS: usize = 4;

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
    #[error("a float, which peers of macula before 7.0 cannot read")]
    Float,
    #[error("a negative integer, which peers of macula before 4.7 cannot read")]
    NegativeInteger,
    #[error("an integer as a key, which old peers cannot read")]
    IntegerKey,
    #[error("the terms would take more memory than a receiver allows")]
    TooManyTerms,
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
            Self::Float => atoms::float(),
            Self::NegativeInteger => atoms::negative_integer(),
            Self::IntegerKey => atoms::integer_key(),
            Self::TooManyTerms => atoms::too_many_terms(),
            Self::TooDeep => atoms::too_deep(),
            Self::NotAMap => atoms::not_a_map(),
        };
        env.error_tuple((atoms::not_encodable(), why))
    }
}

/// What may be sent, as Erlang gives it: `{TextUndefined, NewerTerms, MaxTerms}`.
#[derive(Clone, Copy)]
struct Allow {
    /// The text "undefined": older peers read it as null, and then find the signature invalid.
    undefined: bool,
    /// What the decoders of older peers stop at for good: floats, negative integers, integer keys.
    newer: bool,
    /// The bytes that a receiver may take for the terms.
    terms: usize,
}

impl Allow {
    const ALL: Self = Self {
        undefined: true,
        newer: true,
        terms: usize::MAX,
    };
}

impl<'a> Decoder<'a> for Allow {
    fn decode(term: Term<'a>) -> NifResult<Self> {
        let (undefined, newer, terms) = term.decode()?;
        Ok(Self {
            undefined,
            newer,
            terms,
        })
    }
}

struct Writer<'t> {
    table: &'t Table,
    out: Vec<u8>,
    keys: Vec<u8>,
    /// Terms that may still be visited in this call.
    left: usize,
    max: usize,
    allow: Allow,
    /// What the terms will take at the other end, as `Item::size` counts it.
    size: usize,
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
            allow: Allow::ALL,
            size: 0,
        }
    }

    fn count(&mut self, item: &Item) -> Result<(), EncodeError> {
        self.take(item.size())
    }

    /// The name of a field, which may arrive as text; given with its head, so never less.
    fn count_name(&mut self, encoded: &[u8]) -> Result<(), EncodeError> {
        self.take(24 + Item::Bytes(encoded).size())
    }

    fn take(&mut self, size: usize) -> Result<(), EncodeError> {
        self.size = self.size.saturating_add(size);
        if self.size > self.allow.terms {
            Err(EncodeError::TooManyTerms)
        } else {
            Ok(())
        }
    }

    fn integer<'a>(&mut self, term: Term<'a>) -> Result<Item<'a>, EncodeError> {
        let item = integer(term)?;
        if !self.allow.newer && matches!(item, Item::Nint(_)) {
            return Err(EncodeError::NegativeInteger);
        }
        self.count(&item)?;
        Ok(item)
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
        self.count(&item)?;
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
                    self.count_name(text)?;
                    self.out.extend_from_slice(text);
                    return Ok(());
                }
                self.spend(UNKNOWN_ATOM_TERMS)?;
                let text = atom_text(term)?;
                self.count(&Item::Text(&text))?;
                cbor::write_scalar(&mut self.out, Item::Text(&text));
                Ok(())
            }
            TermType::Binary => {
                // A bitstring that is no binary has no bytes to send.
                let bytes = Binary::from_term(term).map_err(|_| EncodeError::BadType)?;
                self.blob(Item::Bytes(&bytes), bytes.len())
            }
            TermType::Integer => {
                let item = self.integer(term)?;
                cbor::write_scalar(&mut self.out, item);
                Ok(())
            }
            TermType::Float => {
                if !self.allow.newer {
                    return Err(EncodeError::Float);
                }
                self.count(&Item::Float(0.0))?;
                let float = term.decode().map_err(|_| EncodeError::BadType)?;
                cbor::write_scalar(&mut self.out, Item::Float(float));
                Ok(())
            }
            TermType::Tuple => {
                let bytes = tagged_text(term).ok_or(EncodeError::BadType)?;
                let text = std::str::from_utf8(&bytes).map_err(|_| EncodeError::BadText)?;
                if !self.allow.undefined && text == "undefined" {
                    return Err(EncodeError::TextUndefined);
                }
                self.blob(Item::Text(text), bytes.len())
            }
            TermType::List => self.list(term, deeper(depth)?),
            TermType::Map => {
                let map = self.entries(term, |_| true)?;
                let head = Item::Map(map.entries.len() as u64);
                self.count(&head)?;
                cbor::write_scalar(&mut self.out, head);
                self.members(map, deeper(depth)?, |_, _| ())
            }
            _ => Err(EncodeError::BadType),
        }
    }

    fn list(&mut self, list: Term, depth: usize) -> Result<(), EncodeError> {
        // Not by asking for its length, which walks through all of it.
        let mut rest = list;
        let mut n = 0;
        while !rest.is_empty_list() {
            let (_, tail) = rest
                .list_get_cell()
                .map_err(|_| EncodeError::ImproperList)?;
            n += 1;
            if n > self.left {
                return Err(EncodeError::Large);
            }
            rest = tail;
        }
        let head = Item::Array(n as u64);
        self.count(&head)?;
        cbor::write_scalar(&mut self.out, head);
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
                if !self.allow.newer {
                    return Err(EncodeError::IntegerKey);
                }
                let item = self.integer(key)?;
                cbor::write_scalar(&mut self.keys, item);
            }
            TermType::Atom => match self.table.text(key.as_c_arg()) {
                Some(text) => {
                    self.count_name(text)?;
                    self.keys.extend_from_slice(text);
                }
                None => {
                    let text = atom_text(key)?;
                    self.count(&Item::Text(&text))?;
                    cbor::write_scalar(&mut self.keys, Item::Text(&text));
                }
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
                self.count(&Item::Text(text))?;
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

fn body(table: &Table, frame: Term, reach: Reach, allow: Allow) -> Result<Body, EncodeError> {
    let mut writer = Writer::new(table, reach);
    writer.allow = allow;
    writer.out.extend_from_slice(DOMAIN);
    let map = writer.entries(frame, |key| {
        atoms::signature() != key && atoms::publisher_sig() != key
    })?;
    // Those that were passed over, in other words: as texts they would stand on the wire twice.
    let named = |member: &Member| {
        let key = &writer.keys[member.from..member.to];
        key == SIGNATURE_KEY || key == PUBLISHER_KEY
    };
    if map.entries.iter().any(named) {
        return Err(EncodeError::DuplicateKey);
    }
    let entries = map.entries.len();
    // With both signatures, which may be added.
    writer.count(&Item::Map(entries as u64 + 2))?;
    for name in [SIGNATURE_KEY, PUBLISHER_KEY] {
        writer.count_name(name)?;
        writer.count(&Item::Bytes(&[0; 64]))?;
    }
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

fn encode<'a>(
    env: Env<'a>,
    table: &Table,
    frame: Term<'a>,
    allow: Allow,
    reach: Reach,
) -> Term<'a> {
    let encoded = (|| {
        let signature = unsigned_field(table, frame, atoms::signature(), reach)?;
        let publisher = unsigned_field(table, frame, atoms::publisher_sig(), reach)?;
        body(table, frame, reach, allow)?.wire(env, signature.as_deref(), publisher.as_deref())
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
    let signed = body(table, frame, reach, Allow::ALL).map(|body| {
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
    allow: Allow,
    reach: Reach,
) -> Result<Term<'a>, EncodeError> {
    let publisher = unsigned_field(table, frame, atoms::publisher_sig(), reach)?;
    let body = body(table, frame, reach, allow)?;
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
    match body(table, frame, reach, Allow::ALL) {
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
fn frame_encode<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    frame: Term<'a>,
    allow: Allow,
) -> Term<'a> {
    encode(env, &table, frame, allow, Reach::Short)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn frame_encode_dirty<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    frame: Term<'a>,
    allow: Allow,
) -> Term<'a> {
    encode(env, &table, frame, allow, Reach::Long)
}

#[rustler::nif]
fn frame_sign<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    identity: ResourceArc<Identity>,
    frame: Term<'a>,
) -> Term<'a> {
    rustler::schedule::consume_timeslice(env, identity::SIGN_PERCENT);
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
    allow: Allow,
) -> Term<'a> {
    rustler::schedule::consume_timeslice(env, identity::SIGN_PERCENT);
    reply(
        env,
        sign_encode(env, &table, &identity, frame, allow, Reach::Short),
    )
}

#[rustler::nif(schedule = "DirtyCpu")]
fn frame_sign_encode_dirty<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    identity: ResourceArc<Identity>,
    frame: Term<'a>,
    allow: Allow,
) -> Term<'a> {
    reply(
        env,
        sign_encode(env, &table, &identity, frame, allow, Reach::Long),
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
    allow: Allow,
) -> NifResult<Term<'a>> {
    let mut rest = frames;
    let mut done = Vec::new();
    let mut budget = Budget::new(SHORT_TERMS * 2, SHORT);
    while let Ok((frame, tail)) = rest.list_get_cell() {
        match sign_encode(env, &table, &identity, frame, allow, Reach::Short) {
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
    let percent = (done.len() as i32 * identity::SIGN_PERCENT).clamp(1, 100);
    rustler::schedule::consume_timeslice(env, percent);
    Ok((done, rest).encode(env))
}

#[rustler::nif]
fn frame_verify<'a>(
    env: Env<'a>,
    table: ResourceArc<Table>,
    frame: Term<'a>,
    public: Binary<'a>,
) -> Term<'a> {
    rustler::schedule::consume_timeslice(env, identity::VERIFY_PERCENT);
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
