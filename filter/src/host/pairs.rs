//! Maps as the ABI carries them: a count, the lengths of all names and values, then the names and values, each closed
//! by a NUL. Numbers are 32 bits, little endian. Read in place.

use std::fmt;

/// A map whose bytes contradict its lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("map is shorter than its lengths say")
    }
}

/// Iterator over the pairs of a map; after an error it ends.
#[derive(Debug, Clone)]
pub struct Pairs<'b> {
    lengths: &'b [u8],
    data: &'b [u8],
}

impl<'b> Pairs<'b> {
    /// Reads a map. No bytes at all are an empty map.
    pub fn new(map: &'b [u8]) -> Result<Self, Malformed> {
        if map.is_empty() {
            return Ok(Pairs { lengths: map, data: map });
        }
        let (count, rest) = map.split_first_chunk::<4>().ok_or(Malformed)?;
        let size = usize::try_from(u32::from_le_bytes(*count)).ok().and_then(|n| n.checked_mul(8)).ok_or(Malformed)?;
        let (lengths, data) = rest.split_at_checked(size).ok_or(Malformed)?;
        Ok(Pairs { lengths, data })
    }

    fn take(&mut self, length: [u8; 4]) -> Option<&'b [u8]> {
        let length = usize::try_from(u32::from_le_bytes(length)).ok()?;
        let (taken, rest) = self.data.split_at_checked(length)?;
        (_, self.data) = rest.split_first()?;
        Some(taken)
    }
}

impl<'b> Iterator for Pairs<'b> {
    type Item = Result<(&'b [u8], &'b [u8]), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let ([a, b, c, d, e, f, g, h], rest) = self.lengths.split_first_chunk::<8>()?;
        self.lengths = rest;
        let name = self.take([*a, *b, *c, *d]);
        let value = self.take([*e, *f, *g, *h]);
        let pair = name.zip(value).ok_or(Malformed);
        if pair.is_err() {
            self.lengths = &[];
        }
        Some(pair)
    }
}

/// Writes a map.
pub fn write<N: AsRef<[u8]>>(pairs: &[(N, Vec<u8>)]) -> Vec<u8> {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    let mut out = number(pairs.len()).to_vec();
    for (name, value) in pairs {
        out.extend(number(name.as_ref().len()));
        out.extend(number(value.len()));
    }
    for part in pairs.iter().flat_map(|(name, value)| [name.as_ref(), value.as_slice()]) {
        out.extend(part);
        out.push(0);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    type Read<'b> = Result<Vec<(&'b [u8], &'b [u8])>, Malformed>;

    fn read(map: &[u8]) -> Read<'_> {
        Pairs::new(map)?.collect()
    }

    #[test]
    fn reads_what_was_written() {
        let map = vec![(b":authority".to_vec(), b"a.com".to_vec()), (b"\xff\0".to_vec(), vec![])];
        let bytes = write(&map);
        let expected: Vec<(&[u8], &[u8])> = vec![(b":authority", b"a.com"), (b"\xff\0", b"")];
        assert_eq!(read(&bytes), Ok(expected));
        assert_eq!(read(&[]), Ok(vec![]));
        assert_eq!(read(&[0; 4]), Ok(vec![]));
    }

    #[test]
    fn a_map_cut_anywhere_is_malformed() {
        let bytes = write(&[(b"a".to_vec(), b"bc".to_vec()), (b"d".to_vec(), b"e".to_vec())]);
        for cut in 1..bytes.len() {
            assert_eq!(read(&bytes[..cut]), Err(Malformed), "cut at {cut}");
        }
    }

    #[test]
    fn lengths_beyond_memory_are_malformed() {
        assert_eq!(read(&[0xff; 4]), Err(Malformed));
        assert_eq!(read(&[0xff; 64]), Err(Malformed));
        let mut one = vec![1, 0, 0, 0];
        one.extend([0xff; 8]);
        one.extend([0; 8]);
        assert_eq!(read(&one), Err(Malformed));
    }
}
