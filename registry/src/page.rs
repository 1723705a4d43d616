//! A page: some rows, found by their hash, with a header and a checksum.
//!
//! ```text
//! 0  magic "PTLN"
//! 4  format, u16
//! 6  number of rows, u16
//! 8  checksum of everything else, u64
//! 16 one byte of each row's hash, ascending; zeros up to a multiple of 16
//!    offset of each row, u16
//!    rows: tag, key length and key, value length and value
//! ```
//!
//! Pages are the leaves of a binary trie over the hashes of keys: page 1 holds everything until that is larger than
//! [`PAGE_LIMIT`]; then pages 2 and 3 hold the halves by the hash's first bit, and so on. Which pages there are follows
//! from the rows alone, so equal rows give equal bytes, and one changed row changes one page.

use thiserror::Error;

use crate::encode::Cursor;
use crate::hash;

/// Version of everything in this module and in the rows, raised with each change of them; a reader of another version
/// refuses the page.
pub const FORMAT: u16 = 6;
/// A page larger than this is split, unless it holds a single row.
pub const PAGE_LIMIT: usize = 1024;
/// Largest page, in bytes: offsets have 16 bits.
pub const PAGE_MAX: usize = 65_535;
/// Deepest page; below it a page may exceed [`PAGE_LIMIT`].
pub const MAX_DEPTH: u32 = 23;

const MAGIC: [u8; 4] = *b"PTLN";
const HEADER: usize = 16;
/// Fingerprints are compared so many at once.
const GROUP: usize = 16;

/// What is wrong with a page, or with a set of pages.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FormatError {
    /// Too short for what it says it holds.
    #[error("page {id} is cut short: {got} bytes")]
    Short {
        /// Page.
        id: u32,
        /// Its length.
        got: usize,
    },
    /// Not a page.
    #[error("page {id} does not begin with the magic number")]
    Magic {
        /// Page.
        id: u32,
    },
    /// Written by another version.
    #[error("page {id} has format {got}, expected {FORMAT}")]
    Version {
        /// Page.
        id: u32,
        /// Its format.
        got: u16,
    },
    /// Damaged.
    #[error("page {id} has checksum {got:016x}, expected {expected:016x}")]
    Checksum {
        /// Page.
        id: u32,
        /// The bytes' checksum.
        got: u64,
        /// What the header says.
        expected: u64,
    },
    /// An id that no page may have.
    #[error("page id {id} is out of range")]
    Id {
        /// Page.
        id: u32,
    },
    /// Pages overlap or leave a gap.
    #[error("the pages do not fit together at page {id}")]
    Cover {
        /// Page.
        id: u32,
    },
    /// Not the snapshot that was announced.
    #[error("snapshot has digest {got:016x}, expected {expected:016x}")]
    Digest {
        /// What the pages give.
        got: u64,
        /// What was announced.
        expected: u64,
    },
}

/// A row on its way into a page.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Packed {
    pub(crate) hash: u64,
    /// Tag, key length and key, value length and value.
    pub(crate) bytes: Vec<u8>,
}

impl Packed {
    pub(crate) fn new(tag: u8, key: &[u8], value: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(key.len() + value.len() + 5);
        bytes.push(tag);
        for part in [key, value] {
            let mut n = part.len();
            while n >= 0x80 {
                bytes.push((n & 0x7f) as u8 | 0x80);
                n >>= 7;
            }
            bytes.push(n as u8);
            bytes.extend_from_slice(part);
        }
        Packed { hash: hash::key(tag, key), bytes }
    }
}

/// Size of the page that would hold these rows.
pub(crate) fn size<'r>(rows: impl IntoIterator<Item = &'r Packed>) -> usize {
    let (count, bytes) = rows.into_iter().fold((0, 0), |(count, bytes), row| (count + 1, bytes + row.bytes.len()));
    index(count) + bytes
}

/// Where the rows begin.
fn index(rows: usize) -> usize {
    HEADER + rows.next_multiple_of(GROUP) + 2 * rows
}

fn fingerprint(hash: u64) -> u8 {
    hash as u8
}

/// The two bits that stand for a key among those of a page's rows: with one, half as many again of the names that no page
/// holds would look as if it did.
pub(crate) fn row_bits(hash: u64) -> u64 {
    let print = fingerprint(hash);
    1 << (print % 64) | 1 << (print.wrapping_mul(0x9d) >> 2)
}

/// The bits of all of a page's rows.
pub(crate) fn all_row_bits(page: &[u8]) -> u64 {
    let Some((prints, offsets)) = slots(page) else { return 0 };
    let rows = prints.iter().flatten().take(offsets.len());
    rows.fold(0, |bits, print| bits | row_bits(u64::from(*print)))
}

/// Writes a page. The rows are sorted by (hash, bytes) and fit [`PAGE_MAX`].
pub(crate) fn write(rows: &[Packed]) -> Vec<u8> {
    let mut out = Vec::with_capacity(size(rows));
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&FORMAT.to_le_bytes());
    out.extend_from_slice(&(rows.len() as u16).to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    let mut sorted: Vec<&Packed> = rows.iter().collect();
    sorted.sort_by_key(|r| fingerprint(r.hash));
    out.extend(sorted.iter().map(|row| fingerprint(row.hash)));
    out.resize(HEADER + rows.len().next_multiple_of(GROUP), 0);
    let mut at = index(rows.len());
    for row in &sorted {
        out.extend_from_slice(&(at as u16).to_le_bytes());
        at += row.bytes.len();
    }
    sorted.iter().for_each(|row| out.extend_from_slice(&row.bytes));
    let sum = digest(&out).to_le_bytes();
    if let Some(place) = out.get_mut(8..16) {
        place.copy_from_slice(&sum);
    }
    out
}

/// The digest that the header of a checked page states.
pub(crate) fn stated(page: &[u8]) -> u64 {
    page.get(8..16).and_then(|b| b.first_chunk::<8>()).map_or(0, |b| u64::from_le_bytes(*b))
}

/// The checksum of a page, which also names its contents.
pub fn digest(page: &[u8]) -> u64 {
    let (head, rest) = page.split_at_checked(8).unwrap_or((page, &[]));
    let body = rest.get(8..).unwrap_or_default();
    hash::checksum(hash::checksum(1, head), body)
}

/// Checks a page as a whole and returns its digest.
pub(crate) fn check(id: u32, page: &[u8]) -> Result<u64, FormatError> {
    let short = FormatError::Short { id, got: page.len() };
    if id == 0 || id.ilog2() > MAX_DEPTH {
        return Err(FormatError::Id { id });
    }
    let mut c = Cursor(page);
    let (Some(magic), Some(format), Some(rows), Some(sum)) =
        (c.array::<4>(), c.array().map(u16::from_le_bytes), c.array().map(u16::from_le_bytes), c.array())
    else {
        return Err(short);
    };
    if magic != MAGIC {
        return Err(FormatError::Magic { id });
    }
    if format != FORMAT {
        return Err(FormatError::Version { id, got: format });
    }
    if page.len() < index(usize::from(rows)) || page.len() > PAGE_MAX {
        return Err(short);
    }
    let (got, expected) = (digest(page), u64::from_le_bytes(sum));
    if got != expected {
        return Err(FormatError::Checksum { id, got, expected });
    }
    Ok(got)
}

/// Fingerprints, in groups, and offsets.
type Slots<'p> = (&'p [[u8; GROUP]], &'p [[u8; 2]]);

/// Fingerprints and offsets of a page.
fn slots(page: &[u8]) -> Option<Slots<'_>> {
    let (head, rest) = page.split_first_chunk::<HEADER>()?;
    let [_, _, _, _, _, _, low, high, ..] = *head;
    let rows = usize::from(u16::from_le_bytes([low, high]));
    let (prints, rest) = rest.split_at_checked(rows.next_multiple_of(GROUP))?;
    Some((prints.as_chunks().0, rest.get(..2 * rows)?.as_chunks().0))
}

fn row_at(page: &[u8], offset: [u8; 2]) -> Option<&[u8]> {
    page.get(usize::from(u16::from_le_bytes(offset))..)
}

/// Tag, key and value of the row that begins here.
pub(crate) fn parts(row: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let mut c = Cursor(row);
    Some((c.u8()?, c.bytes()?, c.bytes()?))
}

/// A bit for each of a group's fingerprints that is the wanted one. No branch depends on the page: nearly every page has
/// one group, and a branch on a page that is not in the cache yet stops everything behind it.
#[inline]
fn same(prints: [u8; GROUP], wanted: u8) -> u32 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let wanted = u64::from_le_bytes([wanted; 8]);
    let mut bits = 0;
    for word in prints.as_chunks::<8>().0.iter().rev() {
        let differing = u64::from_le_bytes(*word) ^ wanted;
        // The top bit of each byte that is zero; then those bits side by side.
        let zero = !((differing & LOW).wrapping_add(LOW) | differing | LOW);
        bits = bits << 8 | (zero >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56;
    }
    bits as u32
}

/// Key and value of the row that begins here, if it has this key.
#[inline]
fn under<'p>(row: &'p [u8], tag: u8, key: &[u8]) -> Option<(&'p [u8], &'p [u8])> {
    let mut c = Cursor(row);
    if c.u8()? != tag {
        return None;
    }
    let held = c.bytes()?;
    if held != key {
        return None;
    }
    Some((held, c.bytes()?))
}

/// The key as the page holds it, and its value.
#[inline]
pub(crate) fn find<'p>(page: &'p [u8], hash: u64, tag: u8, key: &[u8]) -> Option<(&'p [u8], &'p [u8])> {
    let (prints, offsets) = slots(page)?;
    for (group, prints) in prints.iter().enumerate() {
        let mut same = same(*prints, fingerprint(hash));
        while same != 0 {
            let at = group * GROUP + same.trailing_zeros() as usize;
            let row = offsets.get(at).and_then(|offset| row_at(page, *offset));
            if let Some(found) = row.and_then(|row| under(row, tag, key)) {
                return Some(found);
            }
            same &= same - 1;
        }
    }
    None
}

/// The rows of a page, to write it again.
pub(crate) fn rows(page: &[u8]) -> Vec<Packed> {
    let offsets = slots(page).map_or(&[][..], |(_, offsets)| offsets);
    let mut rows: Vec<Packed> =
        offsets.iter().filter_map(|at| parts(row_at(page, *at)?)).map(|(t, k, v)| Packed::new(t, k, v)).collect();
    rows.sort();
    rows
}

/// Does the page of this id hold keys of this hash?
pub(crate) fn covers(id: u32, hash: u64) -> bool {
    let depth = id.ilog2();
    depth == 0 || (hash >> (64 - depth)) as u32 == id - (1 << depth)
}
