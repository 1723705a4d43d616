//! A Bloom filter over how the paths of a route table's part begin: a part is not looked for when none of its routes can
//! take the path. Asking costs a few instructions, finding a part and reading it a hundred times as many.

use crate::encode::Cursor;
use crate::hash;
use crate::route::{Route, TextMatch};
use crate::wire::varint;

const SEED: u64 = 3;

/// Which bits, of so many, stand for a hash.
fn probes(hash: u64, bits: usize) -> [usize; 2] {
    let of = |half: u64| (half.wrapping_mul(bits as u64) >> 32) as usize;
    [of(hash & 0xffff_ffff), of(hash >> 32)]
}

/// The filter's bytes: to which length paths are cut, then the bits. A length of 0 stands for routes that say too little
/// of how a path begins.
pub(crate) fn write(routes: &[&Route]) -> Vec<u8> {
    let beginnings: Option<Vec<&[u8]>> = routes
        .iter()
        .map(|route| match &route.path {
            TextMatch::Exact(text) | TextMatch::Prefix(text) if !route.ignore_case => Some(text.as_bytes()),
            _ => None,
        })
        .collect();
    let beginnings = beginnings.unwrap_or_default();
    let shortest = beginnings.iter().map(|text| text.len()).min().unwrap_or_default();
    let length = u8::try_from(shortest).unwrap_or(u8::MAX);
    let mut out = vec![length];
    if length == 0 {
        return out;
    }
    // A byte for each route: with two probes one part in twenty is read in vain.
    let mut bits = vec![0u8; beginnings.len()];
    let count = bits.len() * 8;
    for text in beginnings {
        let hash = hash::checksum(SEED, text.get(..usize::from(length)).unwrap_or(text));
        for probe in probes(hash, count) {
            if let Some(byte) = bits.get_mut(probe / 8) {
                *byte |= 1 << (probe % 8);
            }
        }
    }
    varint(&mut out, bits.len());
    out.extend_from_slice(&bits);
    out
}

/// A path that filters are asked about. The hash of one beginning is kept, since parts mostly cut paths alike.
pub(crate) struct Beginning<'q> {
    path: Option<&'q [u8]>,
    known: (usize, u64),
}

impl<'q> Beginning<'q> {
    /// `None`: a connection, which has no path.
    pub(crate) fn new(path: Option<&'q [u8]>) -> Self {
        Beginning { path, known: (0, 0) }
    }

    /// Reads a filter: may a route of its part take the path?
    pub(crate) fn may_be_taken(&mut self, c: &mut Cursor<'_>) -> Option<bool> {
        let length = usize::from(c.u8()?);
        if length == 0 {
            return Some(true);
        }
        let bits = c.bytes()?;
        let Some(beginning) = self.path.and_then(|path| path.get(..length)) else { return Some(false) };
        if self.known.0 != length {
            self.known = (length, hash::checksum(SEED, beginning));
        }
        let is_set = |probe: usize| bits.get(probe / 8).is_some_and(|byte| byte & (1 << (probe % 8)) != 0);
        Some(probes(self.known.1, bits.len() * 8).into_iter().all(is_set))
    }
}
