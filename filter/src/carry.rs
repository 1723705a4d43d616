//! Carries out what a route says: every word of it is for the host, nothing here decides.

use std::borrow::Cow;

use portolan_registry::authority;
use portolan_registry::lookup::PASSTHROUGH_CLUSTER;
use portolan_registry::route::{ALL, Cors, Extras, Fault, HeaderOps, Outcome, PathRewrite, Redirect, Retry, Target};
use portolan_registry::routing::{Asked, Matched, Patterns, without_query};

use crate::hash_key::{self, Sticky};
use crate::host::{Answer, Host, Result};
use crate::http::set_cluster;
use crate::request::Headers;

/// The header by which the host's route chooses where copies go: names of clusters, separated by commas.
pub const MIRROR_HEADER: &str = "x-portolan-mirror";
/// The filter state by whose value the host keeps requests together, and those that it sends again too: a header would have
/// to be gone before a request leaves, and so before it is sent again.
pub const HASH_STATE: &str = "envoy.hashable_string";
/// The header by which it retries otherwise than of its own accord: the text of a route's `Manner`.
pub const RETRY_POLICY_HEADER: &str = "x-portolan-retry";
const DELAY_HEADER: &str = "x-envoy-fault-delay-request";
const ABORT_HEADER: &str = "x-envoy-fault-abort-request";
const ABORT_GRPC_HEADER: &str = "x-envoy-fault-abort-grpc-request";
const TIMEOUT_HEADER: &str = "x-envoy-upstream-rq-timeout-ms";
const TRY_TIMEOUT_HEADER: &str = "x-envoy-upstream-rq-per-try-timeout-ms";
const RETRY_HEADER: &str = "x-envoy-retry-on";
const RETRY_GRPC_HEADER: &str = "x-envoy-retry-grpc-on";
const STATUSES_HEADER: &str = "x-envoy-retriable-status-codes";
const RETRIES_HEADER: &str = "x-envoy-max-retries";
const ORIGINAL_PATH: &str = "x-envoy-original-path";

/// Changes to the headers of a response, with their values worked out.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    list: Vec<(Change, String, Vec<u8>)>,
}

#[derive(Debug, Clone, Copy)]
enum Change {
    Remove,
    Set,
    Add,
}

impl Pending {
    fn set(&mut self, name: &str, value: &[u8]) {
        self.list.push((Change::Set, name.to_owned(), value.to_vec()));
    }

    fn take_in(&mut self, ops: &HeaderOps, request: &Headers<'_>, host: &impl Host) {
        self.list.extend(ops.remove.iter().map(|name| (Change::Remove, name.clone(), Vec::new())));
        for (change, list) in [(Change::Set, &ops.set), (Change::Add, &ops.add)] {
            let values = list.iter().map(|(name, value)| (change, name.clone(), text(value, request, host)));
            self.list.extend(values.filter(|(_, _, value)| !value.is_empty()));
        }
    }

    /// Changes a response that has come.
    pub(crate) fn apply(&self, host: &impl Host) -> Result {
        self.list.iter().try_for_each(|(change, name, value)| match change {
            Change::Remove => host.remove_response_header(name),
            Change::Set => host.replace_response_header(name, value),
            Change::Add => host.add_response_header(name, value),
        })
    }

    /// Changes an answer that is made here.
    fn answer(&self, answer: &mut Answer) {
        for (change, name, value) in &self.list {
            if !matches!(change, Change::Add) {
                answer.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
            }
            if !matches!(change, Change::Remove) {
                answer.headers.push((name.clone(), value.clone()));
            }
        }
    }
}

/// What a route comes to.
pub(crate) enum Carried {
    /// The request goes on; what is to be changed about the response.
    On(Option<Pending>),
    /// It is answered here, after so many milliseconds.
    Answered(Box<Answer>, u32),
}

/// A share of all requests, in millionths.
fn hits(share: u32) -> bool {
    share >= ALL || share > 0 && fastrand::u32(0..ALL) < share
}

/// Tells the host what the route wants done.
pub(crate) fn carry_out(
    host: &impl Host,
    request: &Headers<'_>,
    matched: &Matched<'_>,
    patterns: &Patterns,
) -> Result<Carried> {
    let extras = matched.action.extras.as_deref();
    let mut pending = Pending::default();
    let fault = extras.and_then(|e| e.fault.as_ref());
    let delay = fault.filter(|fault| hits(fault.delay_share)).map_or(0, |fault| fault.delay_ms);
    match fault.map(|fault| inject(host, fault, delay)).transpose()? {
        None | Some(Injected::Nothing) => {}
        Some(Injected::Answer(answer)) => return Ok(Carried::Answered(answer, 0)),
        Some(Injected::Later) => {
            let target = match &matched.action.outcome {
                Outcome::Forward(targets) => pick(targets).map(|target| target.cluster.as_str()),
                Outcome::Redirect(_) | Outcome::Respond(_) => None,
            };
            set_cluster(host, target.unwrap_or(PASSTHROUGH_CLUSTER).as_bytes())?;
            return Ok(Carried::On(None));
        }
    }
    if let Some(cors) = extras.and_then(|e| e.cors.as_ref())
        && let Some(answer) = cross_origin(cors, request, patterns, &mut pending)
    {
        return Ok(Carried::Answered(Box::new(answer), delay));
    }
    let path = extras.and_then(|e| e.path.as_ref()).map(|rewrite| rewritten(request, matched.path, rewrite, patterns));
    let mut answer = match &matched.action.outcome {
        Outcome::Forward(targets) => {
            let Some(target) = pick(targets) else { return Ok(Carried::Answered(Box::new(no_target()), delay)) };
            order_delay(host, delay)?;
            forward(host, request, target, extras, path.as_deref(), &mut pending)?;
            return Ok(Carried::On(Some(pending).filter(|p| !p.list.is_empty())));
        }
        Outcome::Redirect(redirect) => redirected(redirect, request, path.as_deref()),
        Outcome::Respond(respond) => {
            Answer::new(u16::try_from(respond.status).unwrap_or(500), "direct_response", respond.body.clone())
        }
    };
    if let Some(extras) = extras {
        pending.take_in(&extras.response, request, host);
    }
    pending.answer(&mut answer);
    Ok(Carried::Answered(Box::new(answer), delay))
}

/// A destination by weight.
pub(crate) fn pick(targets: &[Target]) -> Option<&Target> {
    let total = targets.iter().fold(0u32, |sum, target| sum.saturating_add(target.weight));
    if targets.len() < 2 || total == 0 {
        return targets.first();
    }
    let mut at = fastrand::u32(0..total);
    targets.iter().find(|target| {
        let here = at < target.weight;
        at = at.saturating_sub(target.weight);
        here
    })
}

fn no_target() -> Answer {
    Answer::new(503, "portolan_no_destination", b"portolan: the route has no destination\n".to_vec())
}

fn forward(
    host: &impl Host,
    request: &Headers<'_>,
    target: &Target,
    extras: Option<&Extras>,
    path: Option<&[u8]>,
    pending: &mut Pending,
) -> Result {
    let own = target.extras.as_deref();
    let operations = own.map(|o| &o.request).into_iter().chain(extras.map(|e| &e.request));
    operations.into_iter().try_for_each(|ops| change_request(host, request, ops))?;
    for ops in own.map(|o| &o.response).into_iter().chain(extras.map(|e| &e.response)) {
        pending.take_in(ops, request, host);
    }
    let authority = extras.map(|e| &e.authority).filter(|a| !a.is_empty()).or(own.map(|o| &o.authority));
    if let Some(authority) = authority.filter(|a| !a.is_empty()) {
        host.replace_request_header(":authority", authority.as_bytes())?;
    }
    // As the client sent it: the host's own policy would read it before any rewrite too.
    if let Some(key) = own.and_then(|o| o.hash.as_ref()) {
        let Sticky { value, cookie } = hash_key::value(host, request, key);
        if !value.is_empty() {
            crate::envoy::set_state(host, HASH_STATE, &value, 1)?;
        }
        pending.list.extend(cookie.map(|cookie| (Change::Add, "set-cookie".to_owned(), cookie)));
    }
    if let Some(path) = path {
        host.replace_request_header(ORIGINAL_PATH, &request.header(":path").unwrap_or_default())?;
        host.replace_request_header(":path", path)?;
    }
    if let Some(extras) = extras {
        orders(host, request, extras)?;
    }
    set_cluster(host, target.cluster.as_bytes())
}

/// Timeouts, retries and mirrors. What the application ordered itself comes first, as it does in Envoy.
fn orders(host: &impl Host, request: &Headers<'_>, extras: &Extras) -> Result {
    number(host, request, TIMEOUT_HEADER, extras.timeout_ms)?;
    if let Some(retry) = &extras.retry {
        retries(host, request, retry)?;
    }
    // In one value: of several an Envoy's route sees the first.
    let mirrors: Vec<&str> = extras.mirrors.iter().filter(|m| hits(m.share)).map(|m| m.cluster.as_str()).collect();
    match mirrors.as_slice() {
        [] => Ok(()),
        some => host.replace_request_header(MIRROR_HEADER, some.join(",").as_bytes()),
    }
}

/// Says a number that is not 0, unless the application does.
fn number(host: &impl Host, request: &Headers<'_>, name: &str, value: u32) -> Result {
    match request.header(name) {
        None if value > 0 => host.replace_request_header(name, value.to_string().as_bytes()),
        _ => Ok(()),
    }
}

/// Orders retries.
pub(crate) fn retries(host: &impl Host, request: &Headers<'_>, retry: &Retry) -> Result {
    let Retry { attempts, on, statuses, per_try_ms, .. } = retry;
    if let Some(manner) = retry.manner() {
        host.replace_request_header(RETRY_POLICY_HEADER, manner.to_string().as_bytes())?;
    }
    // The number that the host's own conditions come with need not be said.
    if retry.replaces() || *attempts != Retry::ATTEMPTS {
        number(host, request, RETRIES_HEADER, *attempts)?;
    }
    number(host, request, TRY_TIMEOUT_HEADER, *per_try_ms)?;
    // Envoy knows some conditions under one header and some under the other, and skips those that it does not know.
    for (name, ours) in [(RETRY_HEADER, on), (RETRY_GRPC_HEADER, on), (STATUSES_HEADER, statuses)] {
        let value = match request.header(name) {
            _ if ours.is_empty() => continue,
            None => ours.clone().into_bytes(),
            Some(theirs) => [&theirs, &b","[..], ours.as_bytes()].concat(),
        };
        host.replace_request_header(name, &value)?;
    }
    Ok(())
}

/// An address without the port behind it.
pub(crate) fn without_port(address: &[u8]) -> &[u8] {
    let end = address.iter().rposition(|b| *b == b':').unwrap_or(address.len());
    address.get(..end).unwrap_or_default()
}

fn change_request(host: &impl Host, request: &Headers<'_>, ops: &HeaderOps) -> Result {
    ops.remove.iter().try_for_each(|name| host.remove_request_header(name.as_bytes()))?;
    for (name, value) in &ops.set {
        let value = text(value, request, host);
        if !value.is_empty() {
            host.replace_request_header(name, &value)?;
        }
    }
    for (name, value) in &ops.add {
        let value = text(value, request, host);
        if !value.is_empty() {
            host.add_request_header(name, &value)?;
        }
    }
    Ok(())
}

/// The path after a rewrite, with its query.
fn rewritten(request: &Headers<'_>, matched: usize, rewrite: &PathRewrite, patterns: &Patterns) -> Vec<u8> {
    let full = request.header(":path").unwrap_or_default();
    let path = without_query(&full);
    let query = full.get(path.len()..).unwrap_or_default();
    match rewrite {
        PathRewrite::Matched(text) => [text.as_bytes(), full.get(matched..).unwrap_or_default()].concat(),
        PathRewrite::Regex(pattern, replacement) => {
            let mut out = patterns.replace(pattern, path, replacement);
            out.extend_from_slice(query);
            out
        }
    }
}

/// Envoy's `newUri`: what the redirect does not say is as the request has it.
fn redirected(redirect: &Redirect, request: &Headers<'_>, path: Option<&[u8]>) -> Answer {
    let said = |name: &str| request.header(name).unwrap_or_default().into_owned();
    let asked_scheme = said(":scheme");
    let scheme: &[u8] = match redirect.scheme.as_bytes() {
        [] if asked_scheme.is_empty() => b"http",
        [] => &asked_scheme,
        given => given,
    };
    let mut location = [scheme, b"://"].concat();
    if redirect.authority.is_empty() {
        let authority = said(":authority");
        location.extend_from_slice(host_of(&authority, scheme, &said("x-forwarded-proto"), redirect));
    } else {
        location.extend_from_slice(redirect.authority.as_bytes());
    }
    if redirect.port != 0 {
        location.extend_from_slice(format!(":{}", redirect.port).as_bytes());
    }
    let full = said(":path");
    let query = full.get(without_query(&full).len()..).unwrap_or_default();
    match redirect.path.as_bytes() {
        [] => location.extend_from_slice(path.unwrap_or(&full)),
        given => {
            location.extend_from_slice(given);
            if !given.contains(&b'?') {
                location.extend_from_slice(query);
            }
        }
    }
    let mut answer = Answer::new(u16::try_from(redirect.status).unwrap_or(301), "direct_response", Vec::new());
    answer.headers.push(("location".to_owned(), location));
    answer
}

/// The authority without a port that the redirect replaces or that only suited the other scheme.
fn host_of<'a>(authority: &'a [u8], scheme: &[u8], was: &[u8], redirect: &Redirect) -> &'a [u8] {
    let (host, port) = authority::split(authority);
    let default = matches!((was, port), (b"https", Some(443)) | (b"http", Some(80)));
    if redirect.port != 0 || scheme != was && default && !redirect.keeps_port { host } else { authority }
}

/// What a fault comes to.
enum Injected {
    /// The request goes on.
    Nothing,
    /// The answer in place of the upstream's.
    Answer(Box<Answer>),
    /// The host delays the request and then answers it.
    Later,
}

/// Has the host delay the request.
fn order_delay(host: &impl Host, delay: u32) -> Result {
    if delay == 0 { Ok(()) } else { host.replace_request_header(DELAY_HEADER, delay.to_string().as_bytes()) }
}

/// Gives an answer in place of the upstream's, or orders it after the delay.
fn inject(host: &impl Host, fault: &Fault, delay: u32) -> Result<Injected> {
    if hits(fault.abort_share) {
        if delay > 0 {
            order_delay(host, delay)?;
            let (name, value) = match fault.abort_grpc {
                Some(code) => (ABORT_GRPC_HEADER, code),
                None => (ABORT_HEADER, fault.abort_status),
            };
            host.replace_request_header(name, value.to_string().as_bytes())?;
            return Ok(Injected::Later);
        }
        let status = if fault.abort_grpc.is_some() { 200 } else { u16::try_from(fault.abort_status).unwrap_or(500) };
        let mut answer = Answer::new(status, "fault_filter_abort", b"fault filter abort".to_vec());
        answer.grpc = fault.abort_grpc;
        return Ok(Injected::Answer(Box::new(answer)));
    }
    Ok(Injected::Nothing)
}

/// Answers a preflight, or notes what the response is to say.
fn cross_origin(cors: &Cors, request: &Headers<'_>, patterns: &Patterns, pending: &mut Pending) -> Option<Answer> {
    let origin = request.header("origin").filter(|origin| !origin.is_empty())?;
    let preflight = request.header(":method").as_deref() == Some(b"OPTIONS")
        && request.header("access-control-request-method").is_some_and(|method| !method.is_empty());
    let known = cors.origins.iter().any(|allowed| patterns.holds(allowed, &origin) || patterns.holds(allowed, b"*"));
    if !known {
        let refused = preflight && cors.refuse_unmatched;
        return refused.then(|| Answer::new(200, "cors_response", Vec::new()));
    }
    let mut list: Vec<(&str, &[u8])> = vec![("access-control-allow-origin", &origin)];
    if cors.credentials {
        list.push(("access-control-allow-credentials", b"true"));
    }
    if !preflight {
        list.push(("access-control-expose-headers", cors.expose.as_bytes()));
    } else {
        list.push(("access-control-allow-methods", cors.methods.as_bytes()));
        list.push(("access-control-allow-headers", cors.headers.as_bytes()));
        list.push(("access-control-max-age", cors.max_age.as_bytes()));
    }
    list.retain(|(_, value)| !value.is_empty());
    if preflight {
        let mut answer = Answer::new(200, "cors_response", Vec::new());
        answer.headers = list.into_iter().map(|(name, value)| (name.to_owned(), value.to_vec())).collect();
        return Some(answer);
    }
    list.into_iter().for_each(|(name, value)| pending.set(name, value));
    None
}

/// A header's value: Envoy's substitutions between percent signs, as far as a filter can know them; what cannot be known
/// is empty.
fn text(value: &str, request: &Headers<'_>, host: &impl Host) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = value;
    while let Some((before, after)) = rest.split_once('%') {
        out.extend_from_slice(before.as_bytes());
        let Some((command, tail)) = after.split_once('%') else {
            rest = after;
            break;
        };
        match command {
            "" => out.push(b'%'),
            _ => out.extend_from_slice(&known(command, request, host)),
        }
        rest = tail;
    }
    out.extend_from_slice(rest.as_bytes());
    out
}

fn known<'h>(command: &str, request: &'h Headers<'_>, host: &impl Host) -> Cow<'h, [u8]> {
    let property = |path: &str| host.property(path).unwrap_or_default();
    let address = |path: &str| without_port(&property(path)).to_vec();
    if let Some(name) = command.strip_prefix("REQ(").and_then(|c| c.strip_suffix(')')) {
        let mut names = name.split('?');
        return names.find_map(|name| request.header(&name.to_ascii_lowercase())).unwrap_or_default();
    }
    Cow::Owned(match command {
        "PROTOCOL" => property("request\0protocol"),
        "DOWNSTREAM_REMOTE_ADDRESS" => property("source\0address"),
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => address("source\0address"),
        "DOWNSTREAM_LOCAL_ADDRESS" => property("destination\0address"),
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => address("destination\0address"),
        "REQUESTED_SERVER_NAME" => property("connection\0requested_server_name"),
        _ => Vec::new(),
    })
}

#[cfg(test)]
#[path = "carry_tests.rs"]
mod tests;
