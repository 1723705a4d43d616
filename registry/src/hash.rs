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
pub(crate) fn key(tag: u8, bytes: &[u8]) -> u64 {
    finish(fold(u64::from(tag), bytes))
}

/// Checksum of bytes.
pub(crate) fn checksum(seed: u64, bytes: &[u8]) -> u64 {
    finish(fold(seed, bytes))
}

fn fold(seed: u64, bytes: &[u8]) -> u64 {
    let mut h = seed.wrapping_mul(K) ^ (bytes.len() as u64);
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        h = (h.rotate_left(23) ^ u64::from_le_bytes(*word)).wrapping_mul(K);
    }
    let mut last = [0u8; 8];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    (h.rotate_left(23) ^ u64::from_le_bytes(last)).wrapping_mul(K)
}

/// What one page adds to the digest of a snapshot; the digest is the sum, so it follows changes at their own cost.
pub(crate) fn contribution(id: u32, page: u64) -> u64 {
    finish(page ^ u64::from(id).wrapping_mul(K))
}
