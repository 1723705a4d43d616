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
    /// A port number that is not 1 to 65535.
    #[error("port is not a number from 1 to 65535")]
    Port,
}

/// Longest name that is looked up or declared, in bytes.
pub const MAX_NAME: usize = 255;

/// Bytes that a name may hold after lower-casing: visible ASCII that is no delimiter, and UTF-8. Istio's own check is
/// stricter; this one only keeps out what can never have been declared.
fn is_name_byte(b: u8) -> bool {
    !matches!(b, 0..=b' ' | 0x7f | b'/' | b'\\' | b'?' | b'#' | b'@' | b'"' | b'<' | b'>' | b'[' | b']' | b'*' | b',')
}

fn is_ipv6(name: &[u8]) -> bool {
    std::str::from_utf8(name).is_ok_and(|text| text.parse::<std::net::Ipv6Addr>().is_ok())
}

/// Writes the normal form of `name` to `out`: lower case, without one trailing dot, without brackets.
/// This is the only normaliser; `out` is empty on error.
pub fn normalise(name: &[u8], out: &mut Vec<u8>) -> Result<(), NameError> {
    out.clear();
    let name = match name {
        // Brackets around anything else would let `[x.a.com]` pass for a name under `*.a.com`.
        [b'[', inner @ .., b']'] if is_ipv6(inner) => inner,
        [rest @ .., b'.'] if !rest.is_empty() => rest,
        other => other,
    };
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > MAX_NAME {
        return Err(NameError::TooLong { got: name.len() });
    }
    if let Some(at) = name.iter().position(|b| !is_name_byte(*b)) {
        let byte = name.get(at).copied().unwrap_or_default();
        return Err(NameError::BadByte { byte, at });
    }
    out.extend(name.iter().map(u8::to_ascii_lowercase));
    Ok(())
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
        let mut out = Vec::with_capacity(s.len());
        normalise(s.as_bytes(), &mut out)?;
        String::from_utf8(out).map(Host).map_err(|_| NameError::Empty)
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
    fn only_ipv6_addresses_lose_their_brackets() {
        assert_eq!("[2001:DB8::1]".parse::<Host>().map(|h| h.0), Ok("2001:db8::1".to_owned()));
        assert_eq!("[::.w.example]".parse::<Host>(), Err(NameError::BadByte { byte: b'[', at: 0 }));
    }
}
