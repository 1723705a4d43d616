//! What a client may send in HTTP/1.1. Every byte is judged before hyper sees it, so that no two readers of a request
//! (this proxy, the upstream) can disagree about where it ends.
//!
//! Refused is what Envoy's codec refuses (`proxy-host/tests/corpus` holds its recorded answers), and beyond it what
//! Envoy lets pass but others read differently: folded lines, a bare CR or LF, a second `Host`, and bytes that follow a
//! request for an upgrade before it is answered. Nothing is read past what was given; the verdict is the same however
//! the bytes were cut.

use memchr::{memchr, memrchr};

use super::{
    server::HttpLimits,
    target::{self, all, with},
};
use crate::headers;

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// Status of the answer.
    pub status: u16,
    /// Envoy's response code details.
    pub details: &'static str,
}

/// Whether such details are those of an error of the protocol, and not of what its requests ask.
#[must_use]
pub fn is_of_codec(details: &str) -> bool {
    ![FRAGMENT, NO_HOST, LATE].iter().any(|refusal| refusal.details == details)
}

const fn refusal(status: u16, details: &'static str) -> Refusal {
    Refusal { status, details }
}

const CODEC: Refusal = refusal(400, "http1.codec_error");
const CHARACTERS: Refusal = refusal(400, "http1.invalid_characters");
const URL: Refusal = refusal(400, "http1.invalid_url");
/// Envoy does not take the part of a URL that is the client's alone; its codec does, so the answer is not the codec's.
const FRAGMENT: Refusal = refusal(400, "path_normalization_failed");
const NO_HOST: Refusal = refusal(400, "missing_host_header");
const NOMINATED: Refusal = refusal(400, "http1.connection_header_rejected");
const AUTHORITY: Refusal = refusal(400, "http.invalid_authority");
const BODY: Refusal = refusal(400, "http1.body_disallowed");
const BOTH: Refusal = refusal(400, "http1.content_length_and_chunked_not_allowed");
const ENCODING: Refusal = refusal(501, "http1.invalid_transfer_encoding");
const TOO_MANY: Refusal = refusal(431, "http1.too_many_headers");
const TOO_LARGE: Refusal = refusal(431, "http1.headers_too_large");
const VERSION: Refusal = refusal(426, "low_version");
/// A head took too long.
pub const LATE: Refusal = refusal(408, "request_header_timeout");
const EARLY: Refusal = refusal(400, "http1.bytes_before_upgrade");

/// How far bytes may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// This many may pass; the others have to be shown again with what follows them.
    Pass(usize),
    /// This many may pass; then comes a request that is refused.
    Refuse(usize, Refusal),
    /// This many may pass; then the body that is under way is broken.
    Broken(usize, Refusal),
}

/// Where a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Head(Head),
    /// Bytes of a body still to come.
    Length(u64),
    Size,
    Data(u64),
    DataEnd,
    Trailers(usize),
    /// A request for an upgrade waits for its answer.
    Held,
    /// Nothing is judged any more.
    Open,
}

/// What is known of a head so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Head {
    /// Bytes looked at, which is where a line begins unless none ended yet.
    line: usize,
    scanned: usize,
    /// Whether the request line has been read.
    begun: bool,
    count: usize,
    length: Option<u64>,
    chunked: bool,
    host: bool,
    connect: bool,
    upgrade: bool,
    connection_upgrade: bool,
    http10: bool,
}

/// The judge of one connection.
#[derive(Debug)]
pub struct Strict {
    most: Most,
    state: State,
    /// The request under way asks for an upgrade.
    upgrade: bool,
}

/// Limits of a head.
#[derive(Debug, Clone, Copy)]
struct Most {
    bytes: usize,
    count: usize,
    /// HTTP/1.0 is taken.
    http10: bool,
}

impl Strict {
    /// For a new connection.
    #[must_use]
    pub fn new(limits: HttpLimits) -> Self {
        let most = Most { bytes: limits.header_bytes as usize, count: limits.headers, http10: limits.http10 };
        Self { most, state: State::Head(Head::default()), upgrade: false }
    }

    /// Judges bytes: those that [`Verdict::Pass`] did not let through before, and what came after them.
    pub fn judge(&mut self, bytes: &[u8]) -> Verdict {
        let mut at = 0;
        loop {
            let rest = &bytes[at..];
            let (used, next) = match self.state {
                State::Head(mut head) => match head.read(rest, self.most) {
                    Ok(Some(end)) => {
                        self.upgrade = head.connect || head.upgrade && head.connection_upgrade;
                        let next = match head.length {
                            _ if head.chunked => State::Size,
                            Some(length @ 1..) => State::Length(length),
                            _ => self.after(),
                        };
                        if next == State::Held && rest.len() > end {
                            return Verdict::Refuse(at, EARLY);
                        }
                        (end, next)
                    }
                    Ok(None) => {
                        self.state = State::Head(head);
                        return Verdict::Pass(at);
                    }
                    Err(refusal) => return Verdict::Refuse(at, refusal),
                },
                State::Length(length) => {
                    let (used, left) = take(length, rest);
                    (used, if left == 0 { self.after() } else { State::Length(left) })
                }
                State::Data(length) => {
                    let (used, left) = take(length, rest);
                    (used, if left == 0 { State::DataEnd } else { State::Data(left) })
                }
                State::DataEnd => match rest {
                    [b'\r', b'\n', ..] => (2, State::Size),
                    [] | [b'\r'] => return Verdict::Pass(at),
                    _ => return Verdict::Broken(at, CODEC),
                },
                State::Size => match line(rest, self.most.bytes) {
                    Ok(Some((text, end))) => match chunk_size(text) {
                        Some(0) => (end, State::Trailers(0)),
                        Some(size) => (end, State::Data(size)),
                        None => return Verdict::Broken(at, CODEC),
                    },
                    Ok(None) => return Verdict::Pass(at),
                    Err(refusal) => return Verdict::Broken(at, refusal),
                },
                State::Trailers(count) => match line(rest, self.most.bytes) {
                    Ok(Some(([], end))) => (end, self.after()),
                    Ok(Some((text, end))) => match header(text) {
                        _ if count == self.most.count => return Verdict::Broken(at, TOO_MANY),
                        Ok((name, _)) if is_framing(name) => return Verdict::Broken(at, CODEC),
                        Ok(_) => (end, State::Trailers(count + 1)),
                        Err(refusal) => return Verdict::Broken(at, refusal),
                    },
                    Ok(None) => return Verdict::Pass(at),
                    Err(refusal) => return Verdict::Broken(at, refusal),
                },
                State::Held if rest.is_empty() => return Verdict::Pass(at),
                State::Held => return Verdict::Broken(at, EARLY),
                State::Open => return Verdict::Pass(bytes.len()),
            };
            self.state = next;
            at += used;
            if at == bytes.len() {
                return Verdict::Pass(at);
            }
        }
    }

    /// Bytes that may pass unseen: those of a body whose length is known.
    #[must_use]
    pub fn unseen(&self) -> u64 {
        match self.state {
            State::Length(length) | State::Data(length) => length,
            State::Open => u64::MAX,
            _ => 0,
        }
    }

    /// So many of [`Strict::unseen`] have passed.
    pub fn passed(&mut self, count: u64) {
        match &mut self.state {
            State::Length(length) | State::Data(length) => *length = length.saturating_sub(count),
            _ => return,
        }
        self.state = match self.state {
            State::Length(0) => self.after(),
            State::Data(0) => State::DataEnd,
            state => state,
        };
    }

    /// Whether a request has been begun, and its head has not ended.
    #[must_use]
    pub fn in_head(&self) -> bool {
        matches!(self.state, State::Head(head) if head.scanned > 0)
    }

    /// Whether nothing of the next request has been seen.
    #[must_use]
    pub fn is_between(&self) -> bool {
        matches!(self.state, State::Head(head) if head.scanned == 0)
    }

    /// Whether a request for an upgrade waits for its answer.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.state == State::Held
    }

    /// The request for an upgrade was answered.
    pub fn answered(&mut self, upgraded: bool) {
        self.state = if upgraded { State::Open } else { State::Head(Head::default()) };
    }

    /// What follows a request.
    fn after(&self) -> State {
        if self.upgrade { State::Held } else { State::Head(Head::default()) }
    }
}

fn take(length: u64, bytes: &[u8]) -> (usize, u64) {
    let used = usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len());
    (used, length - used as u64)
}

/// One line without its end, and where the next one begins.
fn line(bytes: &[u8], most: usize) -> Result<Option<(&[u8], usize)>, Refusal> {
    let Some(lf) = memchr(b'\n', bytes) else {
        return if bytes.len() > most { Err(TOO_LARGE) } else { Ok(None) };
    };
    match bytes[..lf].split_last() {
        Some((b'\r', text)) if memchr(b'\r', text).is_none() => Ok(Some((text, lf + 1))),
        _ => Err(CODEC),
    }
}

/// The size of a chunk; extensions may follow it, and are not looked into.
fn chunk_size(text: &[u8]) -> Option<u64> {
    let end = text.iter().position(|b| !b.is_ascii_hexdigit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    if !matches!(rest.trim_ascii_start(), [] | [b';', ..]) || !rest.iter().all(|b| is_value(*b)) {
        return None;
    }
    // Fifteen digits keep every sum far from an overflow.
    let digits = std::str::from_utf8(digits).ok().filter(|digits| (1..16).contains(&digits.len()))?;
    u64::from_str_radix(digits, 16).ok()
}

fn is_value(byte: u8) -> bool {
    matches!(byte, b'\t' | b' '..=b'~' | 0x80..)
}

/// The characters of a name (RFC 9110, 5.6.2).
const TOKEN: [bool; 256] = with(b"!#$%&'*+-.^_`|~");

/// Whether a word of eight bytes has only visible ASCII from `least` (at most 128) on: one look where [`all`] takes eight.
/// A no may be wrong.
fn is_plain(word: u64, least: u8) -> bool {
    const ONES: u64 = u64::MAX / 255;
    const HIGH: u64 = ONES * 0x80;
    let too_low = word.wrapping_sub(ONES * u64::from(least));
    let deleted = (word ^ (ONES * 0x7f)).wrapping_sub(ONES);
    (too_low | deleted | word) & HIGH == 0
}

/// As [`all`], where nearly always all bytes are visible ASCII from `least` on, which are such.
fn all_plain(text: &[u8], least: u8, is: impl Fn(u8) -> bool + Copy) -> bool {
    let (words, rest) = text.as_chunks::<8>();
    words.iter().all(|word| is_plain(u64::from_le_bytes(*word), least) || all(word, is)) && all(rest, is)
}

/// Name and value of a header line.
fn header(text: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    let colon = memchr(b':', text).ok_or(CODEC)?;
    let (name, value) = (&text[..colon], &text[colon + 1..]);
    if name.is_empty() || !all(name, |b| TOKEN[usize::from(b)]) {
        return Err(CHARACTERS);
    }
    if !all_plain(value, b' ', is_value) {
        return Err(CODEC);
    }
    Ok((name, value.trim_ascii()))
}

/// Headers that decide about framing or routing have no place behind a body.
fn is_framing(name: &[u8]) -> bool {
    [&b"content-length"[..], b"transfer-encoding", b"host", b"connection", b"upgrade"]
        .iter()
        .any(|framing| name.eq_ignore_ascii_case(framing))
}

impl Head {
    /// Reads on in a head that begins where `bytes` do; gives its end.
    fn read(&mut self, bytes: &[u8], most: Most) -> Result<Option<usize>, Refusal> {
        while let Some(found) = memchr(b'\n', &bytes[self.scanned..]) {
            let lf = self.scanned + found;
            if lf > most.bytes {
                return Err(TOO_LARGE);
            }
            let text = match bytes[self.line..lf].split_last() {
                Some((b'\r', text)) if memchr(b'\r', text).is_none() => text,
                _ => return Err(CODEC),
            };
            (self.line, self.scanned) = (lf + 1, lf + 1);
            match (self.begun, text) {
                // An empty line before a request is skipped (RFC 9112, 2.2).
                (false, []) => {}
                (false, text) => self.request_line(text, most.http10)?,
                (true, []) => return self.end(lf + 1).map(Some),
                (true, text) => self.header(text, most.count)?,
            }
        }
        self.scanned = bytes.len();
        if bytes.len() > most.bytes { Err(TOO_LARGE) } else { Ok(None) }
    }

    fn request_line(&mut self, text: &[u8], http10: bool) -> Result<(), Refusal> {
        self.begun = true;
        let first = memchr(b' ', text).ok_or(CODEC)?;
        let last = memrchr(b' ', text).unwrap_or(first);
        let method = &text[..first];
        if !headers::is_method_name(method) {
            return Err(CODEC);
        }
        match &text[last + 1..] {
            b"HTTP/1.1" => {}
            b"HTTP/1.0" if http10 => self.http10 = true,
            [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
                return Err(VERSION);
            }
            // HTTP/0.9 had no version.
            [_, ..] if first == last => return Err(VERSION),
            _ => return Err(CODEC),
        }
        // The two spaces are the only ones.
        let target = text.get(first + 1..last).ok_or(CODEC)?;
        if target.is_empty() || !all_plain(target, b'!', |b| matches!(b, b'!'..=b'~')) {
            return Err(CODEC);
        }
        self.connect = method == b"CONNECT";
        let path = match target {
            _ if self.connect && target::is_host(target, true) => target,
            _ if self.connect => return Err(URL),
            [b'/', ..] => target,
            b"*" if method == b"OPTIONS" => target,
            target => target::absolute(target).ok_or(URL)?,
        };
        if memchr(b'#', path).is_some() {
            return Err(FRAGMENT);
        }
        // What hyper does not take either.
        let (path, query) = path.split_at(memchr(b'?', path).unwrap_or(path.len()));
        let refused = path.iter().any(|b| matches!(b, b'<' | b'>' | b'`'))
            || query.iter().any(|b| matches!(b, b'<' | b'>' | b'"'));
        if refused { Err(URL) } else { Ok(()) }
    }

    fn header(&mut self, text: &[u8], most: usize) -> Result<(), Refusal> {
        self.count += 1;
        if self.count > most {
            return Err(TOO_MANY);
        }
        let (name, value) = header(text)?;
        let is = |other: &[u8]| name.eq_ignore_ascii_case(other);
        match name.len() {
            4 if is(b"host") => {
                if std::mem::replace(&mut self.host, true) || !target::is_authority(value) {
                    return Err(AUTHORITY);
                }
            }
            14 if is(b"content-length") => {
                let digits = std::str::from_utf8(value).ok().filter(|v| v.bytes().all(|b| b.is_ascii_digit()));
                // The two largest numbers mean something else to hyper.
                let length =
                    digits.and_then(|digits| digits.parse().ok()).filter(|n| *n < u64::MAX - 1).ok_or(CODEC)?;
                if self.length.replace(length).is_some() {
                    return Err(CODEC);
                }
            }
            17 if is(b"transfer-encoding") => {
                if std::mem::replace(&mut self.chunked, true) || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(ENCODING);
                }
            }
            10 if is(b"connection") => {
                for token in value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                    self.connection_upgrade |= token.eq_ignore_ascii_case(b"upgrade");
                    may_be_named(token)?;
                }
            }
            // Neither Envoy nor this proxy upgrades to HTTP/2; such a request is one of HTTP/1.1.
            7 if is(b"upgrade") => self.upgrade |= !value.eq_ignore_ascii_case(b"h2c"),
            _ => {}
        }
        Ok(())
    }

    fn end(&self, end: usize) -> Result<usize, Refusal> {
        if self.chunked && self.length.is_some() {
            return Err(BOTH);
        }
        if self.connect && self.chunked {
            return Err(ENCODING);
        }
        if self.connect && self.length.is_some_and(|length| length > 0) {
            return Err(BODY);
        }
        // It has neither (RFC 9112, 6.1; RFC 9110, 7.8).
        if self.http10 && (self.chunked || self.connect || self.upgrade && self.connection_upgrade) {
            return Err(CODEC);
        }
        Ok(end)
    }
}

/// Whether `Connection` may name this header: none that says where a request goes or came from.
fn may_be_named(name: &[u8]) -> Result<(), Refusal> {
    match name {
        [b':', ..] => Err(NOMINATED),
        _ if name.eq_ignore_ascii_case(b"host") => Err(NO_HOST),
        [b'x' | b'X', ..] => {
            let said = [&b"x-forwarded-for"[..], b"x-forwarded-host", b"x-forwarded-proto"];
            if said.iter().any(|said| name.eq_ignore_ascii_case(said)) { Err(NOMINATED) } else { Ok(()) }
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> Strict {
        Strict::new(HttpLimits::default())
    }

    /// Shows bytes in pieces, as a connection would.
    fn pieces(bytes: &[u8], size: usize) -> (usize, Option<Verdict>) {
        let mut strict = fresh();
        let (mut passed, mut shown) = (0, 0);
        while shown < bytes.len() {
            shown = (shown + size).min(bytes.len());
            match strict.judge(&bytes[passed..shown]) {
                Verdict::Pass(count) => passed += count,
                Verdict::Refuse(count, refusal) => return (passed + count, Some(Verdict::Refuse(0, refusal))),
                Verdict::Broken(count, refusal) => return (passed + count, Some(Verdict::Broken(0, refusal))),
            }
        }
        (passed, None)
    }

    #[test]
    fn bytes_are_judged_alike_alone_and_by_eight() {
        let visible = |b: u8| matches!(b, b'!'..=b'~');
        for byte in 0..=255 {
            for other in [b'a', b' ', b'!', b'~', b'\t', 0, 0x1f, 0x7f, 0x80, 0xff] {
                for at in 0..9 {
                    let mut text = [other; 9];
                    text[at] = byte;
                    assert_eq!(all_plain(&text, b' ', is_value), all(&text, is_value), "{text:?}");
                    assert_eq!(all_plain(&text, b'!', visible), all(&text, visible), "{text:?}");
                }
            }
        }
    }

    const CHUNKED: &[u8] = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";

    #[test]
    fn the_verdict_is_the_same_however_the_bytes_are_cut() {
        let with = |rest: &[u8]| [CHUNKED, rest].concat();
        for (bytes, refused) in [
            (with(b"5;x=y\r\nhello\r\n0\r\nt: 1\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n"), None),
            (with(b"5\r\nhello0\r\n\r\n"), Some(Verdict::Broken(0, CODEC))),
            (with(b"0\r\ncontent-length: 5\r\n\r\n"), Some(Verdict::Broken(0, CODEC))),
            (
                b"POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabcGET / HTTP/1.0\r\n".to_vec(),
                Some(Verdict::Refuse(0, VERSION)),
            ),
        ] {
            let whole = pieces(&bytes, bytes.len());
            assert_eq!(whole.1, refused, "{}", String::from_utf8_lossy(&bytes));
            for size in [1, 2, 3, 7] {
                assert_eq!(pieces(&bytes, size), whole, "in pieces of {size}: {}", String::from_utf8_lossy(&bytes));
            }
        }
    }

    #[test]
    fn a_request_passes_only_when_its_head_is_whole() {
        let mut strict = fresh();
        let head = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        assert_eq!(strict.judge(&head[..20]), Verdict::Pass(0));
        assert_eq!(strict.judge(head), Verdict::Pass(head.len()));
    }

    #[test]
    fn a_head_without_an_end_is_refused_when_it_is_too_large() {
        let mut strict = fresh();
        let mut head = b"GET / HTTP/1.1\r\nx: ".to_vec();
        head.resize(60 * 1024, b'a');
        assert_eq!(strict.judge(&head), Verdict::Pass(0));
        head.extend(b"aa");
        assert_eq!(strict.judge(&head), Verdict::Refuse(0, TOO_LARGE));
    }

    #[test]
    fn an_upgrade_holds_what_follows_until_it_is_answered() {
        let head = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
        let mut strict = fresh();
        assert_eq!(strict.judge(head), Verdict::Pass(head.len()));
        assert!(strict.is_held());
        strict.answered(true);
        assert_eq!(strict.judge(b"\0\x01"), Verdict::Pass(2));

        let mut strict = fresh();
        assert_eq!(strict.judge(head), Verdict::Pass(head.len()));
        assert_eq!(strict.judge(b"x"), Verdict::Broken(0, EARLY));
        assert_eq!(fresh().judge(&[&head[..], b"x"].concat()), Verdict::Refuse(0, EARLY));
    }
}
