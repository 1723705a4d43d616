//! Which route of a table takes a request: the first whose conditions hold, as in Envoy.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;

use regex::bytes::{Regex, RegexBuilder};

use crate::bloom::Beginning;
use crate::encode::{Cursor, INLINE, TAG_ROUTES, TAG_TABLE};
use crate::route::{Action, CONDITIONS, EXACT, IGNORE_CASE, KIND, NEGATED, PREFIX, QUERY, REGEX, TextMatch};
use crate::snapshot::Snapshot;
use crate::wire::Wire;

/// What a route table asks about a request. Nothing is asked that no route needs.
pub trait Asked {
    /// The header of this lower-case name, pseudo headers too; several values are one, joined by commas.
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>>;
}

/// A connection: it has no headers.
#[derive(Debug, Clone, Copy)]
pub struct NoHeaders;

impl Asked for NoHeaders {
    fn header(&self, _: &str) -> Option<Cow<'_, [u8]>> {
        None
    }
}

/// Most expressions that are kept; with more they are made anew.
const KEPT: usize = 2048;
/// Most bytes of a compiled expression; a larger one matches nothing.
const PROGRAM: usize = 256 * 1024;

/// Compiled expressions, made when they are first needed.
#[derive(Default)]
pub struct Patterns(RefCell<HashMap<String, Option<Regex>>>);

impl fmt::Debug for Patterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Patterns({})", self.0.borrow().len())
    }
}

impl Patterns {
    /// Does the expression take all of the text? One that cannot be compiled takes nothing.
    pub fn matches(&self, pattern: &str, text: &[u8]) -> bool {
        let whole = |regex: &Regex| regex.is_match(text);
        self.with(&format!("^(?:{pattern})$"), |regex| regex.is_some_and(whole))
    }

    /// Replaces every match; `\1` in the replacement is the first group.
    pub fn replace(&self, pattern: &str, text: &[u8], replacement: &str) -> Vec<u8> {
        self.with(pattern, |regex| {
            let Some(regex) = regex else { return text.to_vec() };
            let replaced = regex.replace_all(text, |found: &regex::bytes::Captures<'_>| {
                let mut out = Vec::new();
                let mut chars = replacement.chars();
                while let Some(c) = chars.next() {
                    let next = if c == '\\' { chars.next() } else { None };
                    match next.map(|n| (n, n.to_digit(10))) {
                        Some((_, Some(group))) => {
                            out.extend_from_slice(found.get(group as usize).map_or(&[][..], |m| m.as_bytes()));
                        }
                        Some((other, None)) => out.extend_from_slice(other.encode_utf8(&mut [0; 4]).as_bytes()),
                        None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
                out
            });
            replaced.into_owned()
        })
    }

    fn with<T>(&self, pattern: &str, then: impl FnOnce(Option<&Regex>) -> T) -> T {
        let mut known = self.0.borrow_mut();
        if !known.contains_key(pattern) {
            if known.len() >= KEPT {
                known.clear();
            }
            let made = RegexBuilder::new(pattern).unicode(false).size_limit(PROGRAM).build().ok();
            known.insert(pattern.to_owned(), made);
        }
        then(known.get(pattern).and_then(Option::as_ref))
    }

    /// Does a condition hold for a text?
    pub fn holds(&self, condition: &TextMatch, text: &[u8]) -> bool {
        match condition {
            TextMatch::Present => true,
            TextMatch::Exact(wanted) => wanted.as_bytes() == text,
            TextMatch::Prefix(wanted) => text.starts_with(wanted.as_bytes()),
            TextMatch::Regex(pattern) => self.matches(pattern, text),
        }
    }
}

/// A table that decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table<'s> {
    /// A table's name, or routes behind a mark.
    pub(crate) name: &'s [u8],
}

/// The route that takes a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matched<'s> {
    /// Its name, if it has one.
    pub name: &'s str,
    /// Its number in the resource, from 0.
    pub index: u32,
    /// How much of the path its condition took.
    pub path: usize,
    /// What it does.
    pub action: Action,
}

/// A path without query and fragment.
pub fn without_query(path: &[u8]) -> &[u8] {
    let end = path.iter().position(|b| matches!(b, b'?' | b'#')).unwrap_or(path.len());
    path.get(..end).unwrap_or(path)
}

/// The query that begins here.
fn query_of(rest: &[u8]) -> &[u8] {
    let query = rest.strip_prefix(b"?").unwrap_or_default();
    query.split(|b| *b == b'#').next().unwrap_or_default()
}

/// The first query parameter of a name in a path, decoded.
pub fn query_parameter<'q>(path: &'q [u8], name: &str) -> Option<Cow<'q, [u8]>> {
    parameter(query_of(path.get(without_query(path).len()..)?), name)
}

/// A request as conditions see it.
struct Subject<'q, A> {
    asked: &'q A,
    path: Option<&'q [u8]>,
    query: &'q [u8],
    patterns: &'q Patterns,
}

impl Snapshot {
    /// The first route of a table that takes a request; `None`: there is none, which is 404 for HTTP.
    pub fn routed<'s>(&'s self, table: Table<'s>, asked: &impl Asked, patterns: &Patterns) -> Option<Matched<'s>> {
        let full = asked.header(":path");
        let path = full.as_deref().map(without_query);
        let rest = full.as_deref().zip(path).and_then(|(full, path)| full.get(path.len()..)).unwrap_or_default();
        let query = query_of(rest);
        let subject = Subject { asked, path, query, patterns };
        if let Some((&INLINE, routes)) = table.name.split_first() {
            return first(Cursor(routes), &subject);
        }
        let (_, value) = self.find(TAG_TABLE, table.name)?;
        let mut c = Cursor(value);
        if c.u8()? == 0 {
            return first(c, &subject);
        }
        let mut key = table.name.to_vec();
        let digest_at = key.len();
        let mut beginning = Beginning::new(path);
        while let Some(digest) = c.array::<8>() {
            if !beginning.may_be_taken(&mut c)? {
                continue;
            }
            key.truncate(digest_at);
            key.extend_from_slice(&digest);
            let (_, part) = self.find(TAG_ROUTES, &key)?;
            if let Some(matched) = first(Cursor(part), &subject) {
                return Some(matched);
            }
        }
        None
    }
}

/// Whether the bytes are the same. Paths of one table mostly begin alike: the ends are looked at first, by which most
/// routes are ruled out without a loop (which in WebAssembly goes byte by byte).
fn same_bytes(a: &[u8], b: &[u8]) -> bool {
    let ends_alike = match (a.last_chunk::<8>(), b.last_chunk::<8>()) {
        (Some(a), Some(b)) => a == b,
        _ => a.last() == b.last(),
    };
    a.len() == b.len() && ends_alike && a == b
}

/// The first route of these bytes that takes the request.
fn first<'s, A: Asked>(mut c: Cursor<'s>, subject: &Subject<'_, A>) -> Option<Matched<'s>> {
    while !c.0.is_empty() {
        let mut route = Cursor(c.bytes()?);
        let flags = route.u8()?;
        let wanted = route.bytes()?;
        let Some(path) = subject.takes_path(flags, wanted) else { continue };
        if flags & CONDITIONS != 0 {
            let conditions = Cursor(route.bytes()?);
            if !subject.holds(conditions)? {
                continue;
            }
        }
        let name = std::str::from_utf8(route.bytes()?).ok()?;
        let index = u32::get(&mut route)?;
        return Some(Matched { name, index, path, action: Action::get(&mut route)? });
    }
    None
}

impl<A: Asked> Subject<'_, A> {
    /// How much of the path is taken; `None`: the condition does not hold.
    fn takes_path(&self, flags: u8, wanted: &[u8]) -> Option<usize> {
        // Without a path only a route without a condition on it holds: that of connections.
        let Some(path) = self.path else { return (flags & KIND == 0).then_some(0) };
        let same =
            |a: &[u8], b: &[u8]| if flags & IGNORE_CASE != 0 { a.eq_ignore_ascii_case(b) } else { same_bytes(a, b) };
        let holds = match flags & KIND {
            EXACT => same(path, wanted),
            PREFIX => return path.get(..wanted.len()).is_some_and(|p| same(p, wanted)).then_some(wanted.len()),
            REGEX => std::str::from_utf8(wanted).is_ok_and(|pattern| self.patterns.matches(pattern, path)),
            _ => true,
        };
        holds.then_some(path.len())
    }

    fn holds(&self, mut conditions: Cursor<'_>) -> Option<bool> {
        while !conditions.0.is_empty() {
            let flags = conditions.u8()?;
            let name = std::str::from_utf8(conditions.bytes()?).ok()?;
            let wanted = conditions.bytes()?;
            let value = if flags & QUERY != 0 { parameter(self.query, name) } else { self.asked.header(name) };
            let negated = flags & NEGATED != 0;
            let text = match (&value, flags & KIND) {
                (Some(value), _) => Some(value.as_ref()),
                (None, EXACT | PREFIX | REGEX) if negated => Some(&[][..]),
                (None, _) => None,
            };
            let holds = text.is_some_and(|text| match flags & KIND {
                EXACT => text == wanted,
                PREFIX => text.starts_with(wanted),
                REGEX => std::str::from_utf8(wanted).is_ok_and(|pattern| self.patterns.matches(pattern, text)),
                _ => true,
            });
            if holds == negated {
                return Some(false);
            }
        }
        Some(true)
    }
}

/// The first query parameter of a name, decoded.
fn parameter<'q>(query: &'q [u8], name: &str) -> Option<Cow<'q, [u8]>> {
    query.split(|b| *b == b'&').find_map(|pair| {
        let (key, value) = match pair.iter().position(|b| *b == b'=') {
            Some(at) => (pair.get(..at)?, pair.get(at + 1..)?),
            None => (pair, &[][..]),
        };
        (decoded(key).as_ref() == name.as_bytes()).then(|| decoded(value))
    })
}

/// Percent-encoding undone.
fn decoded(text: &[u8]) -> Cow<'_, [u8]> {
    if !text.contains(&b'%') {
        return Cow::Borrowed(text);
    }
    let digit = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        match (first, after) {
            (b'%', [high, low, tail @ ..]) if digit(*high).is_some() && digit(*low).is_some() => {
                out.push(digit(*high).unwrap_or_default() << 4 | digit(*low).unwrap_or_default());
                rest = tail;
            }
            _ => out.push(*first),
        }
    }
    Cow::Owned(out)
}
