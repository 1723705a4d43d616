//! What a request's target and its `Host` may be.

use memchr::{memchr, memrchr};

/// A table of letters, digits and these.
pub(super) const fn with(others: &[u8]) -> [bool; 256] {
    let mut table = [false; 256];
    let mut byte: u8 = 0;
    while byte < 128 {
        table[byte as usize] = byte.is_ascii_alphanumeric();
        byte += 1;
    }
    let mut at = 0;
    while at < others.len() {
        table[others[at] as usize] = true;
        at += 1;
    }
    table
}

/// Whether all bytes are such; looks at all of them, which many at once are faster for than one after the other.
pub(super) fn all(text: &[u8], is: impl Fn(u8) -> bool) -> bool {
    text.iter().fold(true, |all, byte| all & is(*byte))
}

/// The bytes an authority may have (RFC 3986, 3.2).
const AUTHORITY_BYTES: [bool; 256] = with(b"-._~%!$&'()*+,;=:[]@");

/// Whether these bytes may be in an authority.
pub(super) fn is_authority(text: &[u8]) -> bool {
    all(text, |b| AUTHORITY_BYTES[usize::from(b)])
}

/// Whether this is a host, perhaps with a port, where one is there or `port` says that it has to be.
pub(super) fn is_host(text: &[u8], port: bool) -> bool {
    let (host, rest) = match text {
        [b'[', ..] => text.split_at(memchr(b']', text).map_or(0, |end| end + 1)),
        _ => text.split_at(memchr(b':', text).unwrap_or(text.len())),
    };
    let plain = match host {
        [b'[', inside @ .., b']'] => {
            inside.len() > 1 && !inside.contains(&b'[') && inside.iter().filter(|b| **b == b':').count() < 8
        }
        _ => !host.is_empty() && !host.iter().any(|b| matches!(b, b'[' | b']')),
    };
    let ported = match rest {
        [] => !port,
        [b':', digits @ ..] => is_port(digits),
        _ => false,
    };
    plain && ported && is_authority(host) && !host.iter().any(|b| matches!(b, b'%' | b'@'))
}

fn is_port(digits: &[u8]) -> bool {
    let number = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
    number.is_some_and(|text| text.parse::<u16>().is_ok())
}

/// Checks a target in absolute form; gives what follows its authority.
pub(super) fn absolute(target: &[u8]) -> Option<&[u8]> {
    let prefix = |scheme: &[u8]| {
        target
            .split_at_checked(scheme.len())
            .filter(|(start, _)| start.eq_ignore_ascii_case(scheme))
            .map(|(_, rest)| rest)
    };
    let rest = prefix(b"http://").or_else(|| prefix(b"https://"))?;
    let (authority, path) = rest.split_at(rest.iter().position(|b| matches!(b, b'/' | b'?')).unwrap_or(rest.len()));
    // Who the client says it is does not go on.
    let (user, host) = authority.split_at(memrchr(b'@', authority).map_or(0, |at| at + 1));
    let (_, name) = user.split_last().unwrap_or((&b'@', user));
    let is_user = is_authority(user) && !name.iter().any(|b| matches!(b, b'[' | b']' | b'@'));
    let is_user = is_user && user.iter().filter(|b| **b == b':').count() < 8;
    (is_user && is_host(host, false)).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_may_have_a_port() {
        for (text, bare, ported) in [
            ("a.test", true, false),
            ("a.test:80", true, true),
            ("a_b:0", true, true),
            ("[::1]", true, false),
            ("[::1]:80", true, true),
            ("", false, false),
            (":80", false, false),
            ("a:", false, false),
            ("a:x", false, false),
            ("a:65536", false, false),
            ("a:+1", false, false),
            ("a:1:2", false, false),
            ("[::1", false, false),
            ("[]", false, false),
            ("::1", false, false),
            ("u@a", false, false),
            ("%61", false, false),
            ("a[b]", false, false),
            ("a]", false, false),
            ("[[::1]", false, false),
            ("[::1]a", false, false),
        ] {
            assert_eq!((is_host(text.as_bytes(), false), is_host(text.as_bytes(), true)), (bare, ported), "{text}");
            // What passes here hyper takes as well.
            assert!(!bare || text.parse::<http::uri::Authority>().is_ok(), "{text}");
        }
    }

    #[test]
    fn what_follows_the_authority_of_a_target_is_its_path() {
        for (target, path) in [
            ("http://a.test", Some("")),
            ("HTTPS://a.test/b?c", Some("/b?c")),
            ("http://u:p@a.test?c", Some("?c")),
            ("http://u@v@a.test/", None),
            ("http:///b", None),
            ("ftp://a.test/", None),
            ("a.test/", None),
        ] {
            assert_eq!(absolute(target.as_bytes()), path.map(str::as_bytes), "{target}");
        }
    }
}
