//! What the first bytes of a connection say: TLS with its server name, plain-text HTTP, or neither.
//!
//! Everything here reads bytes that a stranger chose. It never reads past what it was given, needs no more than
//! [`LIMIT`] bytes, and gives the same answer however the bytes were cut.

use serde::Serialize;

/// Bytes of a connection that are looked at before it counts as neither TLS nor HTTP (Envoy's own limit for a hello).
pub const LIMIT: usize = 16 * 1024;

/// The client's preface of HTTP/2 by prior knowledge (RFC 9113, 3.4).
pub const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Which first bytes a listener reads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// Read a TLS `ClientHello` for its server name.
    pub tls: bool,
    /// Tell plain-text HTTP/1.1 and HTTP/2 from other bytes.
    pub http: bool,
}

/// What a connection turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sniffed {
    /// More bytes can change the answer.
    NeedMore,
    /// TLS; the server name in lower case, where the hello has one.
    Tls(Option<Vec<u8>>),
    /// Plain-text HTTP/1.1.
    Http1,
    /// HTTP/2 by prior knowledge.
    Http2,
    /// Anything else, HTTP/1.0 among it, as in Envoy's `http_inspector`.
    Tcp,
}

/// Reads the bytes that have come so far. Only asks for more where the inspection could still find something.
#[must_use]
pub fn sniff(bytes: &[u8], inspection: Inspection) -> Sniffed {
    if !inspection.tls && !inspection.http {
        return Sniffed::Tcp;
    }
    if inspection.tls {
        match client_hello(bytes) {
            Hello::NeedMore if bytes.len() < LIMIT => return Sniffed::NeedMore,
            Hello::Complete(name) => return Sniffed::Tls(name),
            Hello::NeedMore | Hello::NotTls => {}
        }
    }
    if inspection.http { http(bytes) } else { Sniffed::Tcp }
}

// === HTTP ===

/// The first letters of the methods that Envoy's parser knows.
const FIRST_LETTERS: &[u8] = b"ABCDGHLMNOPRSTU";

/// Tells HTTP/1.1 and the preface of HTTP/2 from other bytes.
#[must_use]
pub fn http(bytes: &[u8]) -> Sniffed {
    let Some(first) = bytes.first() else { return Sniffed::NeedMore };
    if bytes.len() >= H2_PREFACE.len() {
        if bytes.starts_with(H2_PREFACE) {
            return Sniffed::Http2;
        }
    } else if H2_PREFACE.starts_with(bytes) {
        return Sniffed::NeedMore;
    }
    if !FIRST_LETTERS.contains(first) {
        return Sniffed::Tcp;
    }
    let Some(end) = bytes.iter().position(|b| matches!(b, b'\r' | b'\n')) else {
        return if bytes.len() < LIMIT { Sniffed::NeedMore } else { Sniffed::Tcp };
    };
    let mut words = bytes[..end].split(|b| *b == b' ');
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some(method), Some(target), Some(b"HTTP/1.1"), None)
            if method.iter().all(|b| b.is_ascii_uppercase() || *b == b'-') && !target.is_empty() =>
        {
            Sniffed::Http1
        }
        _ => Sniffed::Tcp,
    }
}

// === TLS ===

enum Hello {
    NeedMore,
    NotTls,
    Complete(Option<Vec<u8>>),
}

/// Bounded reader of a structure that may not be complete yet.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }
    fn u8(&mut self) -> Option<usize> {
        self.take(1).map(|b| usize::from(b[0]))
    }
    fn u16(&mut self) -> Option<usize> {
        self.take(2).map(|b| usize::from(b[0]) << 8 | usize::from(b[1]))
    }
    fn vec8(&mut self) -> Option<&'a [u8]> {
        let n = self.u8()?;
        self.take(n)
    }
    fn vec16(&mut self) -> Option<&'a [u8]> {
        let n = self.u16()?;
        self.take(n)
    }
}

/// Joins the handshake fragments of the records that have come (RFC 8446, 5.1) and reads the hello in them.
fn client_hello(bytes: &[u8]) -> Hello {
    let mut handshake = Vec::new();
    let mut rest = bytes;
    loop {
        // Each byte is judged as soon as it is there, so that other protocols need not wait for five of them.
        match (rest.first(), rest.get(1)) {
            (None, _) => return Hello::NeedMore,
            (Some(kind), _) if *kind != 22 => return Hello::NotTls,
            (_, Some(major)) if *major != 3 => return Hello::NotTls,
            _ => {}
        }
        let Some((header, body)) = rest.split_at_checked(5) else { return Hello::NeedMore };
        let length = usize::from(header[3]) << 8 | usize::from(header[4]);
        if length == 0 || length > LIMIT + 256 {
            return Hello::NotTls;
        }
        let whole = body.len() >= length;
        handshake.extend_from_slice(&body[..length.min(body.len())]);
        if handshake.first().is_some_and(|kind| *kind != 1) {
            return Hello::NotTls;
        }
        if let Some(&[_, a, b, c]) = handshake.first_chunk::<4>() {
            let size = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            if size > LIMIT {
                return Hello::NotTls;
            }
            if let Some(hello) = handshake.get(4..4 + size) {
                return match server_name(hello) {
                    Some(name) => Hello::Complete(name),
                    None => Hello::NotTls,
                };
            }
        }
        if !whole {
            return Hello::NeedMore;
        }
        rest = &body[length..];
    }
}

/// The host name in the body of a `ClientHello`; `None` where the body is malformed.
fn server_name(hello: &[u8]) -> Option<Option<Vec<u8>>> {
    let mut hello = Cursor(hello);
    hello.take(2 + 32)?;
    hello.vec8()?;
    hello.vec16()?;
    hello.vec8()?;
    if hello.0.is_empty() {
        return Some(None);
    }
    let mut extensions = Cursor(hello.vec16()?);
    if !hello.0.is_empty() {
        return None;
    }
    let mut found = None;
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let data = extensions.vec16()?;
        if kind != 0 {
            continue;
        }
        if found.is_some() {
            return None;
        }
        let mut list = Cursor(data);
        let mut names = Cursor(list.vec16()?);
        // One name of type host_name is all that RFC 6066 defines.
        if !list.0.is_empty() || names.u8()? != 0 {
            return None;
        }
        let name = names.vec16()?;
        if !names.0.is_empty() || name.is_empty() || name.len() > 255 || name.contains(&0) {
            return None;
        }
        found = Some(name.to_ascii_lowercase());
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: Inspection = Inspection { tls: true, http: true };
    const TLS: Inspection = Inspection { tls: true, http: false };

    fn hello(sni: Option<&[u8]>, records: usize) -> Vec<u8> {
        let mut extensions = vec![0, 43, 0, 3, 2, 3, 4];
        if let Some(sni) = sni {
            let n = u16::try_from(sni.len()).unwrap();
            extensions.extend_from_slice(&[0, 0]);
            extensions.extend_from_slice(&(n + 5).to_be_bytes());
            extensions.extend_from_slice(&(n + 3).to_be_bytes());
            extensions.push(0);
            extensions.extend_from_slice(&n.to_be_bytes());
            extensions.extend_from_slice(sni);
        }
        let mut body = vec![3, 3];
        body.extend_from_slice(&[7; 32]);
        body.extend_from_slice(&[0, 0, 2, 0x13, 1, 1, 0]);
        body.extend_from_slice(&u16::try_from(extensions.len()).unwrap().to_be_bytes());
        body.extend_from_slice(&extensions);
        let mut handshake = vec![1, 0];
        handshake.extend_from_slice(&u16::try_from(body.len()).unwrap().to_be_bytes());
        handshake.extend_from_slice(&body);
        let mut out = Vec::new();
        for part in handshake.chunks(handshake.len().div_ceil(records)) {
            out.extend_from_slice(&[22, 3, 1]);
            out.extend_from_slice(&u16::try_from(part.len()).unwrap().to_be_bytes());
            out.extend_from_slice(part);
        }
        out
    }

    #[test]
    fn server_name_is_found_however_the_hello_is_cut() {
        for records in [1, 2, 5] {
            let bytes = hello(Some(b"API.Example.com"), records);
            for cut in 0..bytes.len() {
                assert_eq!(sniff(&bytes[..cut], BOTH), Sniffed::NeedMore, "cut at {cut} of {records} records");
            }
            assert_eq!(sniff(&bytes, BOTH), Sniffed::Tls(Some(b"api.example.com".to_vec())));
            assert_eq!(sniff(&[&bytes[..], b"more"].concat(), TLS), Sniffed::Tls(Some(b"api.example.com".to_vec())));
        }
    }

    #[test]
    fn hello_without_a_name_is_still_tls() {
        assert_eq!(sniff(&hello(None, 1), BOTH), Sniffed::Tls(None));
    }

    #[test]
    fn no_byte_of_a_hello_can_be_changed_into_a_panic() {
        let bytes = hello(Some(b"api.example.com"), 2);
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut changed = bytes.clone();
                changed[at] = value;
                let _ = sniff(&changed, BOTH);
            }
        }
    }

    #[test]
    fn http_one_one_and_the_h2_preface_are_http() {
        let line = b"GET /a?b HTTP/1.1\r\n";
        for cut in 0..line.len() - 2 {
            assert_eq!(sniff(&line[..cut], BOTH), Sniffed::NeedMore, "cut at {cut}");
        }
        assert_eq!(sniff(line, BOTH), Sniffed::Http1);
        assert_eq!(sniff(b"BREW / HTTP/1.1\n", BOTH), Sniffed::Http1);
        for cut in 0..H2_PREFACE.len() {
            assert_eq!(sniff(&H2_PREFACE[..cut], BOTH), Sniffed::NeedMore, "cut at {cut}");
        }
        assert_eq!(sniff(H2_PREFACE, BOTH), Sniffed::Http2);
    }

    #[test]
    fn other_bytes_are_tcp_as_soon_as_they_can_be_told() {
        for bytes in [
            &b"h"[..],
            b"hello\n",
            b"GET / HTTP/1.0\r\n",
            b"GET / HTTP/1.1 x\r\n",
            b"GET  HTTP/1.1\r\n",
            b"\0",
            b"\r\n",
        ] {
            assert_eq!(sniff(bytes, BOTH), Sniffed::Tcp, "{bytes:?}");
        }
        assert_eq!(sniff(b"\x16\x02", BOTH), Sniffed::Tcp);
        assert_eq!(sniff(b"GET / HTTP/1.1\r\n", TLS), Sniffed::Tcp);
        assert_eq!(sniff(b"", Inspection::default()), Sniffed::Tcp);
    }

    #[test]
    fn endless_first_lines_are_given_up() {
        assert_eq!(sniff(&vec![b'A'; LIMIT], BOTH), Sniffed::Tcp);
        let mut hello = vec![22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xff];
        hello.resize(LIMIT, 0);
        assert_eq!(sniff(&hello, TLS), Sniffed::Tcp);
    }
}
