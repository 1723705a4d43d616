//! Hashing of keys and pages: 64-bit multiplications only, since those are single instructions in WebAssembly too.
//! Both guard against accidents, not against an adversary: the stream's TLS does that.

const K: u64 = 0x9e37_79b9_7f4a_7c15;

fn finish(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// Hash of a row key. The tag keeps kinds of rows apart.
#[inline]
pub(crate) fn key(tag: u8, bytes: &[u8]) -> u64 {
    finish(fold(u64::from(tag), bytes))
}

/// Checksum of bytes.
pub(crate) fn checksum(seed: u64, bytes: &[u8]) -> u64 {
    finish(fold(seed, bytes))
}

#[inline]
fn fold(seed: u64, bytes: &[u8]) -> u64 {
    let mut h = seed.wrapping_mul(K) ^ (bytes.len() as u64);
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        h = (h.rotate_left(23) ^ u64::from_le_bytes(*word)).wrapping_mul(K);
    }
    (h.rotate_left(23) ^ tail(bytes, rest)).wrapping_mul(K)
}

/// What is left after whole words. Where there is a whole word to overlap with it is read in one piece: a loop over
/// bytes costs more than everything else here.
fn tail(bytes: &[u8], rest: &[u8]) -> u64 {
    match bytes.last_chunk::<8>() {
        Some(_) if rest.is_empty() => 0,
        Some(last) => u64::from_le_bytes(*last) >> (8 * (8 - rest.len())),
        None => rest.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    }
}

/// What one page adds to the digest of a snapshot; the digest is the sum, so it follows changes at their own cost.
pub(crate) fn contribution(id: u32, page: u64) -> u64 {
    finish(page ^ u64::from(id).wrapping_mul(K))
}
