//! Frames of the peering wire between terms and bytes, signed and verified on the way.
//!
//! What a field is called and what it may hold is told by the table of `macula_frame`, handed over
//! once by `frame_table`; no atom is made from anything a peer sends. Calls whose work is not
//! known to be short have a twin on a dirty CPU scheduler: they compute, bounded by one frame of
//! at most 16 MiB, and wait for nothing. The Erlang side calls the twin when the short one answers
//! `large`.

use crate::peering::cbor::{self, Item, Malformed};
use rustler::sys::ErlNifTerm;
use rustler::{Atom, Encoder, Env, NifResult, Resource, ResourceArc, Term};
use std::collections::HashMap;

mod decode;
mod encode;

/// The largest length a frame's prefix may hold.
const MAX_FRAME: usize = 0xff_ffff;
const PREFIX: usize = 4;
/// Bytes of input, or of output, that are worked through on a normal scheduler.
const SHORT: usize = 8 * 1024;
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
        too_many_terms,
        float,
        negative_integer,
        integer_key,
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
            Self::TooManyTerms => atoms::too_many_terms(),
        }
        .encode(env)
    }
}

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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Short,
    Long,
}

/// Work left in one call.
struct Budget {
    terms: usize,
    bytes: usize,
}

impl Budget {
    fn new(terms: usize, bytes: usize) -> Self {
        Self { terms, bytes }
    }

    /// Whether there is as much left.
    fn allows(&self, terms: usize, bytes: usize) -> bool {
        self.terms >= terms && self.bytes >= bytes
    }

    fn spend(&mut self, terms: usize, bytes: usize) -> bool {
        self.terms = self.terms.saturating_sub(terms);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.terms > 0 && self.bytes > 0
    }
}
