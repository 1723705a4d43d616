//! Names, each with one parser. Case, one trailing dot and IPv6 brackets are settled here and nowhere else.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NameError {
    /// No characters.
    #[error("name is empty")]
    Empty,
    /// Longer than 255 bytes.
    #[error("name is {got} bytes long, expected at most 255")]
    TooLong {
        /// Its length.
        got: usize,
    },
    /// A byte that no host name may hold.
    #[error("byte 0x{byte:02x} at {at} cannot be part of a host name")]
    BadByte {
        /// The byte.
        byte: u8,
        /// Where it stands.
        at: usize,
    },
    /// A `*` that is not the first character.
    #[error("`*` may only stand first")]
    Star,
}

/// Longest name that is looked up or declared, in bytes.
pub const MAX_NAME: usize = 255;

/// For each byte its lower case; 0 for bytes that no name may hold: what is not visible, delimiters, and stars. Istio's
/// own check is stricter; this one only keeps out what can never have been declared.
#[expect(clippy::indexing_slicing, reason = "a byte indexes 256 entries, while compiling")]
const LOWER: [u8; 256] = {
    let mut table = [0; 256];
    let mut b: u8 = 255;
    while b > b' ' {
        if !matches!(b, 0x7f | b'/' | b'\\' | b'?' | b'#' | b'@' | b'"' | b'<' | b'>' | b'[' | b']' | b'*' | b',') {
            table[b as usize] = b.to_ascii_lowercase();
        }
        b -= 1;
    }
    table
};

fn is_ipv6(name: &[u8]) -> bool {
    std::str::from_utf8(name).is_ok_and(|text| text.parse::<std::net::Ipv6Addr>().is_ok())
}

/// Room for one name in normal form, on the stack.
pub struct Buffer {
    bytes: [u8; MAX_NAME],
    len: usize,
}

impl Default for Buffer {
    fn default() -> Self {
        Buffer { bytes: [0; MAX_NAME], len: 0 }
    }
}

impl Buffer {
    /// The name; empty before [`normalise`] and after it failed.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(self.as_bytes()).unwrap_or_default()
    }

    /// The bytes of [`Buffer::as_str`].
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// Writes the normal form of `name` to `out`: lower case, without one trailing dot, without brackets.
/// This is the only normaliser.
pub fn normalise(name: &[u8], out: &mut Buffer) -> Result<(), NameError> {
    out.len = 0;
    let name = match name {
        // Brackets around anything else would let `[x.a.com]` pass for a name under `*.a.com`.
        [b'[', inner @ .., b']'] if is_ipv6(inner) => inner,
        [rest @ .., b'.'] if !rest.is_empty() => rest,
        other => other,
    };
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    let room = out.bytes.get_mut(..name.len()).ok_or(NameError::TooLong { got: name.len() })?;
    // One pass without a way out of it; where something is wrong is looked for afterwards.
    let (mut bad, mut ascii) = (false, true);
    for (to, from) in room.iter_mut().zip(name) {
        *to = LOWER.get(usize::from(*from)).copied().unwrap_or_default();
        bad |= *to == 0;
        ascii &= from.is_ascii();
    }
    let bad_byte = |at: usize| NameError::BadByte { byte: name.get(at).copied().unwrap_or_default(), at };
    if bad {
        return Err(bad_byte(room.iter().position(|b| *b == 0).unwrap_or_default()));
    }
    if !ascii && let Err(error) = std::str::from_utf8(room) {
        return Err(bad_byte(error.valid_up_to()));
    }
    out.len = name.len();
    Ok(())
}

/// The normal form of a name: the name itself if it is in normal form, as nearly all are, else written to `room`.
pub(crate) fn normal<'n>(name: &'n [u8], room: &'n mut Option<Buffer>) -> Result<&'n [u8], NameError> {
    if is_normal(name) {
        return Ok(name);
    }
    let buffer = room.insert(Buffer::default());
    normalise(name, buffer)?;
    Ok(buffer.as_bytes())
}

/// Is this surely in normal form, and without a colon? Eight bytes at a time; names that are short or hold rarer
/// characters are not told.
pub(crate) fn is_normal(name: &[u8]) -> bool {
    let Some(last) = name.last_chunk::<8>() else { return false };
    let mut strange = 0;
    for word in name.as_chunks::<8>().0.iter().chain([last]) {
        strange |= strange_bytes(u64::from_le_bytes(*word));
    }
    strange == 0 && name.len() <= MAX_NAME && !matches!(name, [.., b'.'])
}

/// The top bit of each byte outside `-` to `9` and `^` to `~`, or that is `/`: all others there are their own lower case and
/// may be part of a name.
fn strange_bytes(word: u64) -> u64 {
    const TOP: u64 = 0x8080_8080_8080_8080;
    const fn each(byte: u8) -> u64 {
        u64::from_le_bytes([byte; 8])
    }
    let low = word & !TOP;
    // Whether a byte is at least so much: no sum reaches into the next byte.
    let at_least = |byte: u8| low.wrapping_add(each(0x80 - byte));
    let slash = !((low ^ each(b'/')).wrapping_add(each(0x7f)));
    let good = (at_least(b'-') & !at_least(b':') & !slash) | (at_least(b'^') & !at_least(0x7f));
    (word | !good) & TOP
}

/// A host name or IP address in normal form.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Host(String);

impl Host {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Host {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        let mut out = Buffer::default();
        normalise(s.as_bytes(), &mut out)?;
        Ok(Host(out.as_str().to_owned()))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a ServiceEntry host may be: a name, or `*` with what a name must end with. The star stands for one character
/// or more, as in Envoy (SEMANTICS 1.4), so `*.w.com` takes `deep.w.com` but not `w.com`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostPattern {
    /// The name itself.
    Exact(Host),
    /// Names that end so; empty for `*`.
    Suffix(String),
}

impl HostPattern {
    /// Does the pattern take this name? The name is in normal form.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            HostPattern::Exact(host) => host.as_str() == name,
            HostPattern::Suffix(suffix) => name.len() > suffix.len() && name.ends_with(suffix.as_str()),
        }
    }
}

impl FromStr for HostPattern {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        match s.strip_prefix('*') {
            None => s.parse().map(HostPattern::Exact),
            Some("" | ".") => Ok(HostPattern::Suffix(String::new())),
            Some(rest) if rest.contains('*') => Err(NameError::Star),
            Some(rest) => rest.parse::<Host>().map(|h| HostPattern::Suffix(h.0)),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostPattern::Exact(host) => f.write_str(host.as_str()),
            HostPattern::Suffix(suffix) => write!(f, "*{suffix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_for_normal_is_its_own_normal_form() {
        for byte in 0..=u8::MAX {
            for at in [0, 3, 9] {
                let mut name = *b"abcdefgh.x";
                if let Some(place) = name.get_mut(at) {
                    *place = byte;
                }
                let mut out = Buffer::default();
                let normal = normalise(&name, &mut out).is_ok() && out.as_bytes() == name;
                assert!(normal || !is_normal(&name), "{byte:#x} at {at}");
                assert!(is_normal(&name) || !byte.is_ascii_lowercase(), "{byte:#x} at {at}");
            }
        }
    }

    #[test]
    fn only_ipv6_addresses_lose_their_brackets() {
        assert_eq!("[2001:DB8::1]".parse::<Host>().map(|h| h.0), Ok("2001:db8::1".to_owned()));
        assert_eq!("[::.w.example]".parse::<Host>(), Err(NameError::BadByte { byte: b'[', at: 0 }));
    }
}
