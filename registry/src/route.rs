//! Route tables: ordered conditions and actions, as Envoy would find them in one virtual host. What is settled before a
//! request comes (ports, gateways, labels of the client) is settled by whoever writes them.
//!
//! A short table is one row. A long one is a row that lists parts, and a row for each part, which is known by its
//! content: parts end where the bytes of a route say so, and one changed route changes one part.

use std::collections::BTreeSet;
use std::fmt;

use crate::bloom;
use crate::encode::Cursor;
use crate::hash;
use crate::row::{Row, TableName};
use crate::wire::{MOST, Wire, fields, lists, varint};

/// A condition on a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextMatch {
    /// It is there.
    Present,
    /// Equality.
    Exact(String),
    /// It begins so.
    Prefix(String),
    /// An expression of RE2's syntax that takes all of it.
    Regex(String),
}

/// What a condition is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// A header by its lower-case name, pseudo headers too; several values are one, joined by commas.
    Header(String),
    /// The first query parameter of this name.
    Query(String),
}

/// A condition of a route, beside that on the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// What it is about.
    pub subject: Subject,
    /// What it must be.
    pub text: TextMatch,
    /// It must not be so; what is not there counts as empty.
    pub negated: bool,
}

/// A route: what must hold, and what is done then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Its name, if it has one.
    pub name: String,
    /// Its number in the resource, from 0.
    pub index: u32,
    /// The path without query and fragment.
    pub path: TextMatch,
    /// Whether `Exact` and `Prefix` of the path disregard case.
    pub ignore_case: bool,
    /// All of these must hold.
    pub conditions: Vec<Condition>,
    /// What is done.
    pub action: Action,
}

/// Changes to headers: removals first, then what is set, then what is added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderOps {
    /// Replaced.
    pub set: Vec<(String, String)>,
    /// Appended.
    pub add: Vec<(String, String)>,
    /// Removed.
    pub remove: Vec<String>,
}

impl HeaderOps {
    /// Nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }
}

/// A cookie that keeps requests together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HashCookie {
    /// Its name.
    pub name: String,
    /// Its path; empty for none.
    pub path: String,
    /// How many seconds one lasts that is made for a client without it, 0 for as long as the client runs. `None`: none is
    /// made.
    pub ttl: Option<u32>,
    /// More attributes; an empty value is left out.
    pub attributes: Vec<(String, String)>,
}

/// What requests of one kind are kept together by: those of one value go to one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashKey {
    /// A header, by its lower-case name.
    Header(String),
    /// A cookie.
    Cookie(HashCookie),
    /// The client's address.
    SourceIp,
    /// A query parameter.
    Query(String),
}

/// What holds for one of several destinations, applied before what holds for the route.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TargetExtras {
    /// New authority; empty for none.
    pub authority: String,
    /// Headers of the request.
    pub request: HeaderOps,
    /// Headers of the response.
    pub response: HeaderOps,
    /// What requests are kept together by.
    pub hash: Option<HashKey>,
    /// Of connections: the host and port that a CONNECT asks the destination for; empty for no tunnel.
    pub tunnel: String,
}

/// A destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Cluster name.
    pub cluster: String,
    /// Weight among the destinations.
    pub weight: u32,
    /// More.
    pub extras: Option<Box<TargetExtras>>,
}

/// A redirect; empty texts leave what the request has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Redirect {
    /// Status.
    pub status: u32,
    /// New scheme.
    pub scheme: String,
    /// New authority.
    pub authority: String,
    /// New port; 0 for none.
    pub port: u32,
    /// New path.
    pub path: String,
    /// The port that the client named stays, though it suits the other scheme.
    pub keeps_port: bool,
}

/// An answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Respond {
    /// Status.
    pub status: u32,
    /// Body.
    pub body: Vec<u8>,
}

/// What becomes of the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It goes to one of these, by weight.
    Forward(Vec<Target>),
    /// It is redirected.
    Redirect(Redirect),
    /// It is answered.
    Respond(Respond),
}

/// A rewrite of the path; the query stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathRewrite {
    /// In place of what the route's condition matched.
    Matched(String),
    /// Every match of the expression, with `\1` for groups.
    Regex(String, String),
}

/// Retries; absent fields leave the host's own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retry {
    /// How many; with 0 the host's own conditions do not hold either.
    pub attempts: u32,
    /// Conditions, as Envoy's `x-envoy-retry-on` takes them; empty for the host's own.
    pub on: String,
    /// Status codes, separated by commas.
    pub statuses: String,
    /// Milliseconds for each try; 0 for none.
    pub per_try_ms: u32,
    /// Milliseconds of the first interval between tries; 0 for the host's own.
    pub base_ms: u32,
    /// Endpoints that were tried are not avoided.
    pub same_hosts: bool,
    /// Priorities that were tried are avoided.
    pub remote: bool,
}

impl Retry {
    /// Retries where nobody says how many, as Istio has it.
    pub const ATTEMPTS: u32 = 2;

    /// Whether the host's own conditions for retries do not hold.
    pub fn replaces(&self) -> bool {
        self.attempts == 0 || !self.on.is_empty()
    }

    /// How it is retried, where that is not the host's own way.
    pub fn manner(&self) -> Option<Manner> {
        let own = self.replaces();
        let manner = match self.attempts {
            0 => Manner { own, ..Manner::default() },
            _ => Manner { own, base_ms: self.base_ms, same_hosts: self.same_hosts, remote: self.remote },
        };
        (manner != Manner::default()).then_some(manner)
    }
}

/// What of retries a host is told in one word, because a stock Envoy does it by its route only. The text lists what
/// departs from the host's own way: `own,base-ms=50,same-hosts,remote`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Manner {
    /// The host's own conditions do not hold.
    pub own: bool,
    /// Milliseconds of the first interval between tries; 0 for the host's own.
    pub base_ms: u32,
    /// Endpoints that were tried are not avoided.
    pub same_hosts: bool,
    /// Priorities that were tried are avoided.
    pub remote: bool,
}

impl fmt::Display for Manner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let base = format!("base-ms={}", self.base_ms);
        let words =
            [(self.own, "own"), (self.base_ms > 0, &base), (self.same_hosts, "same-hosts"), (self.remote, "remote")];
        let said: Vec<&str> = words.iter().filter(|(said, _)| *said).map(|(_, word)| *word).collect();
        f.write_str(&said.join(","))
    }
}

/// Faults. Shares are in millionths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fault {
    /// Share of requests that is delayed.
    pub delay_share: u32,
    /// Milliseconds.
    pub delay_ms: u32,
    /// Share of requests that is answered at once.
    pub abort_share: u32,
    /// HTTP status of the answer.
    pub abort_status: u32,
    /// Status for gRPC requests, in place of it.
    pub abort_grpc: Option<u32>,
}

/// A cross-origin policy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cors {
    /// Origins; any of them.
    pub origins: Vec<TextMatch>,
    /// Answers to a preflight; empty ones are left out.
    pub methods: String,
    /// Request headers.
    pub headers: String,
    /// Response headers that a script may read.
    pub expose: String,
    /// Seconds, in digits.
    pub max_age: String,
    /// Credentials may be sent.
    pub credentials: bool,
    /// A preflight of another origin is answered here.
    pub refuse_unmatched: bool,
}

/// Where copies of requests go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Cluster name.
    pub cluster: String,
    /// Share of requests in millionths.
    pub share: u32,
}

/// What most routes do without.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extras {
    /// New authority; empty for none.
    pub authority: String,
    /// Rewrite of the path.
    pub path: Option<PathRewrite>,
    /// Headers of the request.
    pub request: HeaderOps,
    /// Headers of the response.
    pub response: HeaderOps,
    /// Milliseconds; 0 for none.
    pub timeout_ms: u32,
    /// Retries.
    pub retry: Option<Retry>,
    /// Faults.
    pub fault: Option<Fault>,
    /// Cross-origin policy.
    pub cors: Option<Cors>,
    /// Mirrors.
    pub mirrors: Vec<Mirror>,
}

/// What a route does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Action {
    /// What becomes of the request.
    pub outcome: Outcome,
    /// More.
    pub extras: Option<Box<Extras>>,
}

// === bytes ===

fields!(HeaderOps: set, add, remove);
fields!(HashCookie: name, path, ttl, attributes);
fields!(TargetExtras: authority, request, response, hash, tunnel);
fields!(Target: cluster, weight, extras);
fields!(Redirect: status, scheme, authority, port, path, keeps_port);
fields!(Respond: status, body);
fields!(Retry: attempts, on, statuses, per_try_ms, base_ms, same_hosts, remote);
fields!(Fault: delay_share, delay_ms, abort_share, abort_status, abort_grpc);
fields!(Cors: origins, methods, headers, expose, max_age, credentials, refuse_unmatched);
fields!(Mirror: cluster, share);
fields!(Extras: authority, path, request, response, timeout_ms, retry, fault, cors, mirrors);
fields!(Action: outcome, extras);
lists!(Target, TextMatch, Mirror);

const PRESENT: u8 = 0;
pub(crate) const EXACT: u8 = 1;
pub(crate) const PREFIX: u8 = 2;
pub(crate) const REGEX: u8 = 3;
/// The kind of a text's condition.
pub(crate) const KIND: u8 = 3;
/// Case of the path is disregarded.
pub(crate) const IGNORE_CASE: u8 = 4;
/// There are conditions beside that on the path.
pub(crate) const CONDITIONS: u8 = 8;
/// A condition is negated.
pub(crate) const NEGATED: u8 = 4;
/// A condition is about a query parameter.
pub(crate) const QUERY: u8 = 8;

fn parts(text: &TextMatch) -> (u8, &str) {
    match text {
        TextMatch::Present => (PRESENT, ""),
        TextMatch::Exact(text) => (EXACT, text),
        TextMatch::Prefix(text) => (PREFIX, text),
        TextMatch::Regex(text) => (REGEX, text),
    }
}

impl Wire for TextMatch {
    fn put(&self, out: &mut Vec<u8>) {
        let (kind, text) = parts(self);
        out.push(kind);
        text.to_owned().put(out);
    }

    fn get(c: &mut Cursor<'_>) -> Option<Self> {
        let kind = c.u8()?;
        let text = String::get(c)?;
        Some(match kind {
            PRESENT => TextMatch::Present,
            EXACT => TextMatch::Exact(text),
            PREFIX => TextMatch::Prefix(text),
            _ => TextMatch::Regex(text),
        })
    }
}

impl Wire for Outcome {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Outcome::Forward(targets) => {
                out.push(0);
                targets.put(out);
            }
            Outcome::Redirect(redirect) => {
                out.push(1);
                redirect.put(out);
            }
            Outcome::Respond(respond) => {
                out.push(2);
                respond.put(out);
            }
        }
    }

    fn get(c: &mut Cursor<'_>) -> Option<Self> {
        match c.u8()? {
            0 => Wire::get(c).map(Outcome::Forward),
            1 => Wire::get(c).map(Outcome::Redirect),
            2 => Wire::get(c).map(Outcome::Respond),
            _ => None,
        }
    }
}

impl Wire for HashKey {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            HashKey::Header(name) => {
                out.push(0);
                name.put(out);
            }
            HashKey::Cookie(cookie) => {
                out.push(1);
                cookie.put(out);
            }
            HashKey::SourceIp => out.push(2),
            HashKey::Query(name) => {
                out.push(3);
                name.put(out);
            }
        }
    }

    fn get(c: &mut Cursor<'_>) -> Option<Self> {
        match c.u8()? {
            0 => Wire::get(c).map(HashKey::Header),
            1 => Wire::get(c).map(HashKey::Cookie),
            2 => Some(HashKey::SourceIp),
            3 => Wire::get(c).map(HashKey::Query),
            _ => None,
        }
    }
}

impl Wire for PathRewrite {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            PathRewrite::Matched(text) => {
                out.push(0);
                text.put(out);
            }
            PathRewrite::Regex(pattern, text) => {
                out.push(1);
                pattern.put(out);
                text.put(out);
            }
        }
    }

    fn get(c: &mut Cursor<'_>) -> Option<Self> {
        match c.u8()? {
            0 => Wire::get(c).map(PathRewrite::Matched),
            1 => Some(PathRewrite::Regex(Wire::get(c)?, Wire::get(c)?)),
            _ => None,
        }
    }
}

/// A route's bytes: their number, then flags, path, conditions, name, number and action.
fn encode(route: &Route) -> Vec<u8> {
    let (kind, path) = parts(&route.path);
    let mut body = vec![
        kind | if route.ignore_case { IGNORE_CASE } else { 0 }
            | if route.conditions.is_empty() { 0 } else { CONDITIONS },
    ];
    path.to_owned().put(&mut body);
    if !route.conditions.is_empty() {
        let mut list = Vec::new();
        for condition in &route.conditions {
            let (kind, text) = parts(&condition.text);
            let (query, name) = match &condition.subject {
                Subject::Header(name) => (0, name),
                Subject::Query(name) => (QUERY, name),
            };
            list.push(kind | query | if condition.negated { NEGATED } else { 0 });
            name.put(&mut list);
            text.to_owned().put(&mut list);
        }
        // In one piece, so that what follows is found without reading them.
        list.put(&mut body);
    }
    route.name.put(&mut body);
    route.index.put(&mut body);
    route.action.put(&mut body);
    let mut out = Vec::with_capacity(body.len() + 3);
    varint(&mut out, body.len());
    out.extend_from_slice(&body);
    out
}

/// The bytes of routes that lie beside each other.
pub(crate) fn encode_all(routes: &[Route]) -> Vec<u8> {
    routes.iter().flat_map(encode).collect()
}

/// Up to so many bytes a table is one row.
const SHORT: usize = 1024;
/// A part of a table is about so long, and never longer than [`LONGEST`] unless it is one route.
const USUAL: u64 = 1024;
const LONGEST: usize = 16_384;

/// How a table lies in its row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableBody {
    /// The routes themselves.
    Whole(Vec<u8>),
    /// The parts that hold them, in order.
    Parts(Vec<Part>),
}

/// A part of a long table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// What its row is known by.
    pub(crate) digest: u64,
    /// Which paths its routes may take.
    pub(crate) filter: Vec<u8>,
}

/// The rows of a table.
pub fn rows(name: &TableName, routes: &[Route]) -> Vec<Row> {
    let encoded: Vec<Vec<u8>> = routes.iter().map(encode).collect();
    if encoded.iter().map(Vec::len).sum::<usize>() <= SHORT {
        return vec![Row::Table { name: name.clone(), body: TableBody::Whole(encoded.concat()) }];
    }
    let mut parts: Vec<(Vec<u8>, Vec<&Route>)> = Vec::new();
    let mut open = false;
    for (bytes, route) in encoded.into_iter().zip(routes) {
        // Whether a part ends here follows from the route alone: those behind a new one stay as they were.
        let ends = hash::checksum(1, &bytes) % USUAL < bytes.len() as u64;
        match parts.last_mut().filter(|(part, _)| open && part.len() + bytes.len() <= LONGEST) {
            Some((part, of)) => {
                part.extend_from_slice(&bytes);
                of.push(route);
            }
            None => parts.push((bytes, vec![route])),
        }
        open = !ends;
    }
    let listed = parts.iter().map(|(part, of)| Part { digest: hash::checksum(2, part), filter: bloom::write(of) });
    let listed: Vec<Part> = listed.collect();
    let digests: Vec<u64> = listed.iter().map(|part| part.digest).collect();
    let mut out = vec![Row::Table { name: name.clone(), body: TableBody::Parts(listed) }];
    let mut seen = BTreeSet::new();
    for (digest, (bytes, _)) in digests.into_iter().zip(parts) {
        if seen.insert(digest) {
            out.push(Row::Routes { table: name.clone(), digest, bytes });
        }
    }
    out
}

/// The largest share there is: a million millionths.
pub const ALL: u32 = 1_000_000;

const _: () = assert!(ALL < MOST);
