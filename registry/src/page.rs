//! A page: some rows, found by their hash, with a header and a checksum.
//!
//! ```text
//! 0  magic "PTLN"
//! 4  format, u16
//! 6  number of rows, u16
//! 8  checksum of everything else, u64
//! 16 slots: for each row u16 of its hash, then u16 offset, ascending
//!    rows: tag, key length and key, value length and value
//! ```
//!
//! Pages are the leaves of a binary trie over the hashes of keys: page 1 holds everything until that is larger than
//! [`PAGE_LIMIT`]; then pages 2 and 3 hold the halves by the hash's first bit, and so on. Which pages there are follows
//! from the rows alone, so equal rows give equal bytes, and one changed row changes one page.

use thiserror::Error;

use crate::encode::Cursor;
use crate::hash;

/// Version of everything in this module and in the rows; a reader of another version refuses the page.
pub const FORMAT: u16 = 1;
/// A page larger than this is split, unless it holds a single row.
pub const PAGE_LIMIT: usize = 1024;
/// Largest page, in bytes: offsets have 16 bits.
pub const PAGE_MAX: usize = 65_535;
/// Deepest page; below it a page may exceed [`PAGE_LIMIT`].
pub const MAX_DEPTH: u32 = 23;

const MAGIC: [u8; 4] = *b"PTLN";
const HEADER: usize = 16;
const SLOT: usize = 4;

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
pub(crate) fn size(rows: &[Packed]) -> usize {
    HEADER + rows.iter().map(|r| SLOT + r.bytes.len()).sum::<usize>()
}

fn fingerprint(hash: u64) -> u16 {
    hash as u16
}

/// Writes a page. The rows are sorted by (hash, bytes) and fit [`PAGE_MAX`].
pub(crate) fn write(rows: &[Packed]) -> Vec<u8> {
    let mut out = Vec::with_capacity(size(rows));
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&FORMAT.to_le_bytes());
    out.extend_from_slice(&(rows.len() as u16).to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    let mut sorted: Vec<&Packed> = rows.iter().collect();
    sorted.sort_by_key(|r| (fingerprint(r.hash), r.hash));
    let mut at = HEADER + SLOT * rows.len();
    for row in &sorted {
        out.extend_from_slice(&fingerprint(row.hash).to_le_bytes());
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
    if c.take(SLOT * usize::from(rows)).is_none() || page.len() > PAGE_MAX {
        return Err(short);
    }
    let (got, expected) = (digest(page), u64::from_le_bytes(sum));
    if got != expected {
        return Err(FormatError::Checksum { id, got, expected });
    }
    Ok(got)
}

/// The slots of a page.
fn slots(page: &[u8]) -> &[[u8; SLOT]] {
    let rows = page.get(6..8).and_then(|b| b.first_chunk::<2>()).map_or(0, |b| u16::from_le_bytes(*b));
    page.get(HEADER..HEADER + SLOT * usize::from(rows)).map_or(&[], |s| s.as_chunks::<SLOT>().0)
}

fn row_at(page: &[u8], slot: [u8; SLOT]) -> Option<(u8, &[u8], &[u8])> {
    let [_, _, low, high] = slot;
    parts(page.get(usize::from(u16::from_le_bytes([low, high]))..)?)
}

/// Tag, key and value of the row that begins here.
pub(crate) fn parts(row: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let mut c = Cursor(row);
    Some((c.u8()?, c.bytes()?, c.bytes()?))
}

/// The value under a key.
pub(crate) fn find<'p>(page: &'p [u8], hash: u64, tag: u8, key: &[u8]) -> Option<&'p [u8]> {
    let wanted = fingerprint(hash).to_le_bytes();
    slots(page).iter().filter(|[a, b, ..]| [*a, *b] == wanted).find_map(|slot| {
        let (t, k, value) = row_at(page, *slot)?;
        (t == tag && k == key).then_some(value)
    })
}

/// The rows of a page, to write it again.
pub(crate) fn rows(page: &[u8]) -> Vec<Packed> {
    let mut rows: Vec<Packed> =
        slots(page).iter().filter_map(|slot| row_at(page, *slot)).map(|(t, k, v)| Packed::new(t, k, v)).collect();
    rows.sort();
    rows
}

/// Does the page of this id hold keys of this hash?
pub(crate) fn covers(id: u32, hash: u64) -> bool {
    let depth = id.ilog2();
    depth == 0 || (hash >> (64 - depth)) as u32 == id - (1 << depth)
}
