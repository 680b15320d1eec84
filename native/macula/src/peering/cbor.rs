//! The CBOR profile of the peering wire: what is well formed, and the one canonical form of it.
//!
//! Nothing here knows the VM, so the fuzzer and the unit tests drive the same code as the NIFs.
//! No tree is built: a frame is validated in one pass over its bytes, and turned into the canonical
//! form, or into terms, in a second. The first pass keeps four bytes for each key of the maps that are
//! open, at most twice the frame's own size, and counts the memory that the terms will take, so that a
//! frame is refused before it costs more than that.

use minicbor::data::Type;
use minicbor::{Decoder, Encoder};
use std::convert::Infallible;

/// Containers inside containers; the wire sets no bound, so this one keeps recursion harmless.
pub(crate) const MAX_DEPTH: usize = 64;

/// What the terms of one frame may take, in bytes; the link's `max_terms` sets another bound.
pub(crate) const MAX_TERMS: usize = 64 * 1024 * 1024;

/// Fields that are not covered by a frame's signature.
const UNSIGNED: [&str; 2] = ["signature", "publisher_sig"];

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("the item ends before its last byte")]
    Truncated,
    #[error("bytes follow the item")]
    TrailingBytes,
    #[error("containers are nested too deeply")]
    TooDeep,
    #[error("a map has the same key twice")]
    DuplicateKey,
    #[error("a map key is neither text nor an integer")]
    BadKey,
    #[error("a length is indefinite")]
    Indefinite,
    #[error("a tag, boolean, undefined or other simple value")]
    Unsupported,
    #[error("a float that is not a finite number")]
    NotFinite,
    #[error("text that is not UTF-8")]
    BadText,
    #[error("the item is not a map")]
    NotAMap,
    #[error("the terms would take more memory than is allowed")]
    TooManyTerms,
}

/// One head with what it directly carries; the members of a container follow it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Item<'b> {
    Uint(u64),
    /// The value is `-1 - n`.
    Nint(u64),
    Float(f64),
    Bytes(&'b [u8]),
    Text(&'b str),
    Array(u64),
    Map(u64),
    Null,
}

/// Reads items and remembers whether every one of them was in its shortest form, and how much work it
/// is, and how much memory it takes, to make terms of them.
pub(crate) struct Reader<'b> {
    decoder: Decoder<'b>,
    canonical: bool,
    cost: usize,
    size: usize,
    max_size: usize,
    /// Where the keys of the maps that are open begin, those of the innermost last.
    keys: Vec<u32>,
}

impl Item<'_> {
    /// The work of making a term of it, in units of some 30 ns. A map's members are counted twice for
    /// being put in order.
    fn cost(&self) -> usize {
        match self {
            Item::Uint(_) | Item::Nint(_) | Item::Float(_) | Item::Null | Item::Array(_) => 1,
            Item::Text(_) | Item::Bytes(_) => 2,
            Item::Map(n) => usize::try_from(*n)
                .unwrap_or(usize::MAX)
                .saturating_mul(2)
                .saturating_add(3),
        }
    }

    /// The bytes that the term takes on a heap, or beside it, of a 64-bit virtual machine; of a
    /// container those for its members' places. Never less than it really takes.
    pub(crate) fn size(&self) -> usize {
        const SMALL: u64 = 1 << 59;
        let blob = |len: usize| match len {
            0..=64 => 16 + len.div_ceil(8) * 8,
            _ => 96 + len,
        };
        match self {
            Item::Null => 0,
            Item::Uint(n) | Item::Nint(n) if *n < SMALL => 0,
            Item::Uint(_) | Item::Nint(_) | Item::Float(_) => 16,
            Item::Bytes(b) => blob(b.len()),
            Item::Text(t) => 24 + blob(t.len()),
            Item::Array(n) => times(*n, 16),
            Item::Map(n @ 0..=32) => 32 + times(*n, 16),
            Item::Map(n) => times(*n, 40),
        }
    }
}

fn times(n: u64, each: usize) -> usize {
    usize::try_from(n)
        .unwrap_or(usize::MAX)
        .saturating_mul(each)
}

impl<'b> Reader<'b> {
    pub(crate) fn new(bytes: &'b [u8]) -> Self {
        Self::bounded(bytes, usize::MAX)
    }

    /// Refuses what would take more memory as terms.
    pub(crate) fn bounded(bytes: &'b [u8], max_size: usize) -> Self {
        Self {
            decoder: Decoder::new(bytes),
            canonical: true,
            cost: 0,
            size: 0,
            max_size,
            keys: Vec::new(),
        }
    }

    pub(crate) fn position(&self) -> usize {
        self.decoder.position()
    }

    fn left(&self) -> usize {
        self.decoder.input().len() - self.decoder.position()
    }

    /// Refuses bytes behind what was read.
    fn end(&self) -> Result<(), Malformed> {
        match self.left() {
            0 => Ok(()),
            _ => Err(Malformed::TrailingBytes),
        }
    }

    pub(crate) fn item(&mut self) -> Result<Item<'b>, Malformed> {
        let item = self.next()?;
        self.cost = self.cost.saturating_add(item.cost());
        // A length that is only claimed is no reason: the missing members are found out first.
        self.size = self.size.saturating_add(match item {
            Item::Array(n) | Item::Map(n) if n > self.left() as u64 => 0,
            item => item.size(),
        });
        if self.size > self.max_size {
            return Err(Malformed::TooManyTerms);
        }
        Ok(item)
    }

    fn next(&mut self) -> Result<Item<'b>, Malformed> {
        let start = self.decoder.position();
        // Whatever the decoder still refuses after the type is known is a missing byte.
        let cut = |_| Malformed::Truncated;
        let (item, head) = match self.decoder.datatype().map_err(cut)? {
            Type::U8 | Type::U16 | Type::U32 | Type::U64 => {
                let n = self.decoder.u64().map_err(cut)?;
                (Item::Uint(n), n)
            }
            Type::I8 | Type::I16 | Type::I32 | Type::I64 | Type::Int => {
                let int = i128::from(self.decoder.int().map_err(cut)?);
                let n = u64::try_from(-1 - int).map_err(|_| Malformed::Truncated)?;
                (Item::Nint(n), n)
            }
            Type::Bytes => {
                let bytes = self.decoder.bytes().map_err(cut)?;
                (Item::Bytes(bytes), bytes.len() as u64)
            }
            Type::String => {
                let text = self.text()?;
                (Item::Text(text), text.len() as u64)
            }
            Type::Array => {
                let n = self
                    .decoder
                    .array()
                    .map_err(cut)?
                    .ok_or(Malformed::Indefinite)?;
                (Item::Array(n), n)
            }
            Type::Map => {
                let n = self
                    .decoder
                    .map()
                    .map_err(cut)?
                    .ok_or(Malformed::Indefinite)?;
                (Item::Map(n), n)
            }
            Type::Null => {
                self.decoder.null().map_err(cut)?;
                return Ok(Item::Null);
            }
            Type::F16 | Type::F32 | Type::F64 => return self.float(),
            Type::BytesIndef
            | Type::StringIndef
            | Type::ArrayIndef
            | Type::MapIndef
            | Type::Break => return Err(Malformed::Indefinite),
            _ => return Err(Malformed::Unsupported),
        };
        let body = match item {
            Item::Bytes(b) => b.len(),
            Item::Text(t) => t.len(),
            _ => 0,
        };
        if self.decoder.position() - start != head_len(head) + body {
            self.canonical = false;
        }
        Ok(item)
    }

    /// The decoder tells text that is cut from text that is not UTF-8 only by its message, so the
    /// bytes are taken first.
    fn text(&mut self) -> Result<&'b str, Malformed> {
        match self.decoder.str() {
            Ok(text) => Ok(text),
            Err(e) if e.is_end_of_input() => Err(Malformed::Truncated),
            Err(_) => Err(Malformed::BadText),
        }
    }

    fn float(&mut self) -> Result<Item<'b>, Malformed> {
        let cut = |_| Malformed::Truncated;
        let start = self.decoder.position();
        let value = match self.decoder.datatype().map_err(cut)? {
            Type::F64 => self.decoder.f64().map_err(cut)?,
            Type::F32 => {
                self.canonical = false;
                f64::from(self.decoder.f32().map_err(cut)?)
            }
            _ => {
                self.canonical = false;
                let half = self.decoder.input().get(start + 1..start + 3);
                let half = half.ok_or(Malformed::Truncated)?;
                self.decoder.set_position(start + 3);
                half_to_f64(u16::from_be_bytes([half[0], half[1]]))
            }
        };
        if value.is_finite() {
            Ok(Item::Float(value))
        } else {
            Err(Malformed::NotFinite)
        }
    }

    /// Passes over one value, checking all of it.
    fn skip(&mut self, depth: usize) -> Result<(), Malformed> {
        match self.item()? {
            Item::Array(n) => {
                let depth = deeper(depth)?;
                for _ in 0..n {
                    self.skip(depth)?;
                }
                Ok(())
            }
            Item::Map(n) => {
                let depth = deeper(depth)?;
                let mut keys = self.open_map();
                for _ in 0..n {
                    self.next_key(&mut keys)?;
                    self.skip(depth)?;
                }
                self.close_map(keys)
            }
            _ => Ok(()),
        }
    }

    fn open_map(&self) -> Keys<'b> {
        Keys {
            base: self.keys.len(),
            last: None,
            sorted: true,
        }
    }

    fn next_key(&mut self, keys: &mut Keys<'b>) -> Result<(), Malformed> {
        let at = u32::try_from(self.position()).map_err(|_| Malformed::TooManyTerms)?;
        let key = self.key()?;
        if keys.last.is_some_and(|last| last >= key) {
            keys.sorted = false;
        }
        keys.last = Some(key);
        self.keys.push(at);
        Ok(())
    }

    /// Whether the keys came in order is remembered; an error when one came twice.
    fn close_map(&mut self, keys: Keys) -> Result<(), Malformed> {
        if !keys.sorted {
            self.canonical = false;
            let bytes = self.decoder.input();
            let seen = &mut self.keys[keys.base..];
            seen.sort_unstable_by(|a, b| raw_key(bytes, *a).cmp(&raw_key(bytes, *b)));
            let same = |pair: &[u32]| raw_key(bytes, pair[0]) == raw_key(bytes, pair[1]);
            if seen.windows(2).any(same) {
                return Err(Malformed::DuplicateKey);
            }
        }
        self.keys.truncate(keys.base);
        Ok(())
    }

    pub(crate) fn key(&mut self) -> Result<Key<'b>, Malformed> {
        match self.item()? {
            Item::Uint(n) => Ok(Key::Uint(n)),
            Item::Nint(n) => Ok(Key::Nint(n)),
            Item::Text(text) => Ok(Key::Text(text)),
            _ => Err(Malformed::BadKey),
        }
    }

    /// Copies one value that `skip` has accepted, in the canonical form.
    fn canonicalise(&mut self, out: &mut Vec<u8>) -> Result<(), Malformed> {
        match self.item()? {
            Item::Array(n) => {
                put(out, |e| e.array(n).map(|_| ()));
                for _ in 0..n {
                    self.canonicalise(out)?;
                }
            }
            Item::Map(n) => {
                put(out, |e| e.map(n).map(|_| ()));
                let start = out.len();
                // The keys' encodings differ, and none is the beginning of another: so the entries are
                // in the order of their keys when they are in their own.
                let mut entries: Vec<(u32, u32)> = Vec::new();
                let mut sorted = true;
                for _ in 0..n {
                    let key = self.key()?;
                    let from = out.len();
                    key.write(out);
                    self.canonicalise(out)?;
                    if let Some(&(before, _)) = entries.last() {
                        sorted &= out[start + before as usize..from] < out[from..];
                    }
                    let place = |at: usize| u32::try_from(at - start);
                    match (place(from), place(out.len())) {
                        (Ok(from), Ok(to)) => entries.push((from, to)),
                        _ => return Err(Malformed::TooManyTerms),
                    }
                }
                if !sorted {
                    let unsorted = out.split_off(start);
                    let entry = |&(from, to): &(u32, u32)| &unsorted[from as usize..to as usize];
                    entries.sort_unstable_by(|a, b| entry(a).cmp(entry(b)));
                    for place in &entries {
                        out.extend_from_slice(entry(place));
                    }
                }
            }
            scalar => write_scalar(out, scalar),
        }
        Ok(())
    }
}

/// A map key, ordered as its canonical encoding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key<'b> {
    Uint(u64),
    Nint(u64),
    Text(&'b str),
}

impl Key<'_> {
    /// The encoding begins with the major type, then comes the shortest length, then the bytes; so
    /// this order is the bytewise order of the encoded keys.
    fn rank(&self) -> (u8, u64, &[u8]) {
        match self {
            Key::Uint(n) => (0, *n, &[]),
            Key::Nint(n) => (1, *n, &[]),
            Key::Text(t) => (3, t.len() as u64, t.as_bytes()),
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        let item = match *self {
            Key::Uint(n) => Item::Uint(n),
            Key::Nint(n) => Item::Nint(n),
            Key::Text(t) => Item::Text(t),
        };
        write_scalar(out, item);
    }
}

impl Ord for Key<'_> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank().cmp(&other.rank())
    }
}

impl PartialOrd for Key<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// The keys of one map that is being read: those seen begin at `base` of the reader's. They are sorted
/// only when they did not come sorted.
struct Keys<'b> {
    base: usize,
    last: Option<Key<'b>>,
    sorted: bool,
}

/// The key at a place where one was read: as its rank, without looking at the text again.
fn raw_key(bytes: &[u8], at: u32) -> (u8, u64, &[u8]) {
    let rest = bytes.get(at as usize..).unwrap_or_default();
    let Some((&first, rest)) = rest.split_first() else {
        return (0, 0, &[]);
    };
    let long = match first & 0x1f {
        24 => 1,
        25 => 2,
        26 => 4,
        27 => 8,
        _ => 0,
    };
    let (head, rest) = rest.split_at(long.min(rest.len()));
    let n = match long {
        0 => u64::from(first & 0x1f),
        _ => head.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)),
    };
    match first >> 5 {
        3 => {
            let len = usize::try_from(n).unwrap_or(usize::MAX).min(rest.len());
            (3, n, &rest[..len])
        }
        major => (major, n, &[]),
    }
}

/// A frame whose bytes are known to be one well-formed map.
pub(crate) struct Frame<'b> {
    bytes: &'b [u8],
    /// Where the entries begin, in the order in which they came.
    entries: Vec<u32>,
    canonical: bool,
    cost: usize,
}

impl<'b> Frame<'b> {
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn scan(bytes: &'b [u8]) -> Result<Self, Malformed> {
        Self::scan_bounded(bytes, usize::MAX)
    }

    /// Refuses a frame that would take more memory as terms.
    pub(crate) fn scan_bounded(bytes: &'b [u8], max_size: usize) -> Result<Self, Malformed> {
        let mut reader = Reader::bounded(bytes, max_size);
        let Item::Map(n) = reader.item()? else {
            return Err(Malformed::NotAMap);
        };
        // A claimed length allocates little until its members are there.
        reader.keys.reserve(n.min(32) as usize);
        let mut keys = reader.open_map();
        for _ in 0..n {
            reader.next_key(&mut keys)?;
            reader.skip(1)?;
        }
        let entries = if keys.sorted {
            std::mem::take(&mut reader.keys)
        } else {
            reader.keys.clone()
        };
        reader.close_map(keys)?;
        // The last check, as in `measure`: both refuse the same bytes for the same reason.
        reader.end()?;
        Ok(Self {
            bytes,
            entries,
            canonical: reader.canonical,
            cost: reader.cost,
        })
    }

    /// The work of making a term of it, as of an item.
    pub(crate) fn cost(&self) -> usize {
        self.cost
    }

    fn field(&self, name: &str) -> Option<Item<'b>> {
        let wanted = Key::Text(name);
        let entry = |at: &&u32| raw_key(self.bytes, **at) == wanted.rank();
        let at = *self.entries.iter().find(entry)?;
        let mut reader = Reader::new(self.bytes.get(at as usize..)?);
        reader.key().ok()?;
        reader.item().ok()
    }

    pub(crate) fn text(&self, name: &str) -> Option<&'b str> {
        match self.field(name)? {
            Item::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.field(name).is_some()
    }

    pub(crate) fn fixed<const N: usize>(&self, name: &str) -> Option<&'b [u8; N]> {
        match self.field(name)? {
            Item::Bytes(bytes) => bytes.try_into().ok(),
            _ => None,
        }
    }

    /// Appends what the signature covers: the canonical map without the signatures.
    pub(crate) fn write_signed(&self, out: &mut Vec<u8>) -> Result<(), Malformed> {
        let covered = |at: u32| {
            let key = raw_key(self.bytes, at);
            !UNSIGNED.iter().any(|name| Key::Text(name).rank() == key)
        };
        let kept = self.entries.iter().filter(|at| covered(**at)).count();
        put(out, |e| e.map(kept as u64).map(|_| ()));
        if self.canonical {
            let ends = self.entries.iter().skip(1).map(|at| *at as usize);
            for (at, end) in self.entries.iter().zip(ends.chain([self.bytes.len()])) {
                if covered(*at) {
                    out.extend_from_slice(&self.bytes[*at as usize..end]);
                }
            }
            return Ok(());
        }
        let mut entries: Vec<u32> = self.entries.clone();
        entries.retain(|at| covered(*at));
        entries.sort_unstable_by(|a, b| raw_key(self.bytes, *a).cmp(&raw_key(self.bytes, *b)));
        for at in entries {
            let mut reader = Reader::new(&self.bytes[at as usize..]);
            reader.key()?.write(out);
            reader.canonicalise(out)?;
        }
        Ok(())
    }
}

/// The canonical form of one well-formed item that fills `bytes`.
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) fn canonical(bytes: &[u8]) -> Result<Vec<u8>, Malformed> {
    let mut out = Vec::with_capacity(bytes.len());
    validate(bytes)?;
    Reader::new(bytes).canonicalise(&mut out)?;
    Ok(out)
}

/// One well-formed item that fills `bytes`; true when it is in the canonical form.
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) fn validate(bytes: &[u8]) -> Result<bool, Malformed> {
    Ok(measure(bytes, usize::MAX)?.0)
}

/// The same, and the work of making a term of it, as of an item; with a bound on what it takes as one.
pub(crate) fn measure(bytes: &[u8], max_size: usize) -> Result<(bool, usize), Malformed> {
    let mut reader = Reader::bounded(bytes, max_size);
    reader.skip(0)?;
    reader.end()?;
    Ok((reader.canonical, reader.cost))
}

pub(crate) fn write_scalar(out: &mut Vec<u8>, item: Item) {
    put(out, |e| {
        match item {
            Item::Uint(n) => e.u64(n)?,
            Item::Nint(n) => return negative(e, n),
            Item::Float(f) => e.f64(f)?,
            Item::Bytes(b) => e.bytes(b)?,
            Item::Text(t) => e.str(t)?,
            Item::Array(n) => e.array(n)?,
            Item::Map(n) => e.map(n)?,
            Item::Null => e.null()?,
        };
        Ok(())
    });
}

fn negative(e: &mut Encoder<&mut Vec<u8>>, n: u64) -> EncodeResult {
    // -1 - n of any 64-bit n is in the type's range, so the other branch is never taken.
    match minicbor::data::Int::try_from(-1 - i128::from(n)) {
        Ok(int) => e.int(int).map(|_| ()),
        Err(_) => Ok(()),
    }
}

type EncodeResult = Result<(), minicbor::encode::Error<Infallible>>;

/// Writing into a vector cannot fail.
fn put(out: &mut Vec<u8>, write: impl FnOnce(&mut Encoder<&mut Vec<u8>>) -> EncodeResult) {
    let _infallible = write(&mut Encoder::new(out));
}

fn deeper(depth: usize) -> Result<usize, Malformed> {
    if depth < MAX_DEPTH {
        Ok(depth + 1)
    } else {
        Err(Malformed::TooDeep)
    }
}

fn head_len(n: u64) -> usize {
    match n {
        0..=23 => 1,
        24..=0xff => 2,
        0x100..=0xffff => 3,
        0x1_0000..=0xffff_ffff => 5,
        _ => 9,
    }
}

fn half_to_f64(half: u16) -> f64 {
    let sign = if half & 0x8000 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((half >> 10) & 0x1f);
    let fraction = f64::from(half & 0x3ff);
    sign * match exponent {
        0 => fraction * 2f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + fraction) * 2f64.powi(exponent - 25),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let text = text.replace(' ', "");
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
            .collect()
    }

    fn same(text: &str) {
        assert_eq!(canonical(&hex(text)), Ok(hex(text)), "{text}");
        assert_eq!(validate(&hex(text)), Ok(true), "{text}");
    }

    fn becomes(from: &str, to: &str) {
        assert_eq!(canonical(&hex(from)), Ok(hex(to)), "{from}");
        assert_eq!(validate(&hex(from)), Ok(false), "{from}");
    }

    fn refused(text: &str, why: Malformed) {
        assert_eq!(validate(&hex(text)), Err(why), "{text}");
        assert_eq!(canonical(&hex(text)), Err(why), "{text}");
    }

    #[test]
    fn canonical_items_stay_as_they_are() {
        for text in [
            "00",
            "17",
            "1818",
            "18ff",
            "190100",
            "1a00010000",
            "1b0000000100000000",
            "1bffffffffffffffff",
            "20",
            "37",
            "3818",
            "3bffffffffffffffff",
            "40",
            "4100",
            "60",
            "6161",
            "62c3a9",
            "80",
            "820102",
            "a0",
            "a10100",
            "a20100616100",
            "f6",
            "fb3ff8000000000000",
            "fb8000000000000000",
        ] {
            same(text);
        }
    }

    #[test]
    fn other_forms_become_canonical() {
        becomes("1800", "00");
        becomes("1b0000000000000017", "17");
        becomes("3800", "20");
        becomes("580141", "4141");
        becomes("780161", "6161");
        becomes("9800", "80");
        becomes("b800", "a0");
        becomes("f93e00", "fb3ff8000000000000");
        becomes("f90001", "fb3e70000000000000");
        becomes("fa3fc00000", "fb3ff8000000000000");
        becomes("a2616201616102", "a2616102616201");
        becomes("a261610120f6", "a220f6616101");
        becomes(
            "a2626161016162a2616202616101",
            "a26162a261610161620262616101",
        );
    }

    #[test]
    fn everything_else_is_refused() {
        refused("", Malformed::Truncated);
        refused("18", Malformed::Truncated);
        refused("4201", Malformed::Truncated);
        refused("8201", Malformed::Truncated);
        refused("a101", Malformed::Truncated);
        refused("9bffffffffffffffff", Malformed::Truncated);
        refused("5bffffffffffffffff", Malformed::Truncated);
        refused("0000", Malformed::TrailingBytes);
        refused("9fff", Malformed::Indefinite);
        refused("bfff", Malformed::Indefinite);
        refused("5fff", Malformed::Indefinite);
        refused("ff", Malformed::Indefinite);
        refused("f5", Malformed::Unsupported);
        refused("f7", Malformed::Unsupported);
        refused("c000", Malformed::Unsupported);
        refused("e0", Malformed::Unsupported);
        refused("f97e00", Malformed::NotFinite);
        refused("f97c00", Malformed::NotFinite);
        refused("fa7f800000", Malformed::NotFinite);
        refused("fb7ff8000000000000", Malformed::NotFinite);
        refused("61ff", Malformed::BadText);
        refused("a1416101", Malformed::BadKey);
        refused("a2616101616102", Malformed::DuplicateKey);
        refused("a20001180002", Malformed::DuplicateKey);
    }

    #[test]
    fn depth_is_bounded() {
        let mut deep = vec![0x81; MAX_DEPTH];
        deep.push(0);
        assert_eq!(validate(&deep), Ok(true));
        deep.insert(0, 0x81);
        assert_eq!(validate(&deep), Err(Malformed::TooDeep));
    }

    #[test]
    fn what_would_take_much_memory_as_terms_is_refused_before_it_does() {
        let array = |n: usize| {
            let mut bytes = vec![0x9a];
            bytes.extend_from_slice(&(n as u32).to_be_bytes());
            bytes.resize(bytes.len() + n, 0);
            bytes
        };
        assert!(measure(&array(1000), 16_000).is_ok());
        assert_eq!(measure(&array(1000), 15_999), Err(Malformed::TooManyTerms));
        // A length that is not true is truncated, whatever it would have taken.
        let claimed = hex("9bffffffffffffffff");
        assert_eq!(measure(&claimed, 100), Err(Malformed::Truncated));
    }

    #[test]
    fn unsorted_maps_inside_each_other_are_put_in_order() {
        becomes(
            "a2 6162 a2 6164 01 6163 a2 1818 00 01 00 6161 82 a2 02 00 01 00 f6",
            "a2 6161 82 a2 01 00 02 00 f6 6162 a2 6163 a2 01 00 1818 00 6164 01",
        );
        refused(
            "a2 6162 a2 6164 01 6164 00 6161 00",
            Malformed::DuplicateKey,
        );
        refused("a3 6162 00 6161 00 6162 00", Malformed::DuplicateKey);
        refused("a3 6162 00 6161 00 780162 00", Malformed::DuplicateKey);
        refused("a3 21 00 20 00 3801 00", Malformed::DuplicateKey);
    }

    #[test]
    fn a_frame_is_refused_for_the_reason_that_an_item_is_refused_for() {
        for (text, why) in [
            ("a1 6161 00 00", Malformed::TrailingBytes),
            ("a2 6161 00 6161 00", Malformed::DuplicateKey),
            // Of several reasons the one that a reader comes to first.
            ("a2 6161 00 6161 00 00", Malformed::DuplicateKey),
            ("a2 6162 00 6161 a2 00 00 00 00 00", Malformed::DuplicateKey),
            ("a2 6161 00 6161", Malformed::Truncated),
        ] {
            refused(text, why);
            assert_eq!(Frame::scan(&hex(text)).err(), Some(why), "{text}");
        }
    }

    #[test]
    fn a_signature_covers_the_canonical_map_without_the_signatures() {
        let signed = |text: &str| {
            let bytes = hex(text);
            let mut out = Vec::new();
            Frame::scan(&bytes).unwrap().write_signed(&mut out).unwrap();
            out
        };
        // {"a": 1, "signature": h'00'} in both orders, and with a long head.
        assert_eq!(signed("a2616101697369676e61747572654100"), hex("a1616101"));
        assert_eq!(
            signed("a2697369676e61747572654100616118 01"),
            hex("a1616101")
        );
    }
}
