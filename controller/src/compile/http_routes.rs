//! The HTTP routes of a VirtualService on one port, as a table (SEMANTICS 4.3 to 4.5). Conditions that do not depend on
//! the request are settled here.

use std::collections::{BTreeMap, BTreeSet};

use jiff::SignedDuration;
use portolan_registry::route::{
    ALL, Action, Condition, Cors, Extras, Fault, HashKey, HeaderOps, Mirror, Outcome, PathRewrite, Redirect, Respond,
    Retry, Route, Subject, Target, TargetExtras, TextMatch,
};

use super::gateway_servers::resolved;
use super::rules::expand;
use super::service::Context;
use crate::api::virtual_service::{
    self as api, CorsPolicy, Destination, HeaderOperations, HttpMatch, HttpRoute, Percent, RedirectPort, StringMatch,
    UnmatchedPreflights,
};

/// The gateway that stands for all sidecars.
pub(crate) const MESH: &str = "mesh";

/// What routes ask about the hosts that they lead to.
pub(crate) trait Others {
    /// The only port of a host, if it has just one.
    fn only_port(&self, host: &str) -> Option<u16>;

    /// The host that an ExternalName Service of this name stands for, and the Service's only port, if it has just one.
    fn alias(&self, host: &str) -> Option<(String, Option<u16>)>;

    /// What requests to a host are kept together by; `by_port` where the port's own settings count.
    fn hash(&self, host: &str, port: u16, subset: &str, by_port: bool) -> Option<HashKey>;

    /// What connections to a host are to ask for in a tunnel.
    fn tunnel(&self, host: &str, subset: &str) -> Option<String>;
}

/// Where routes are compiled for.
pub(crate) struct Place<'p> {
    pub(crate) cx: &'p Context,
    /// Namespace of the VirtualService.
    pub(crate) namespace: &'p str,
    /// Port of the listener.
    pub(crate) port: u16,
    pub(crate) others: &'p dyn Others,
    /// The Gateway, by namespace and name; `None` for a sidecar.
    pub(crate) gateway: Option<&'p str>,
    /// The server has TLS.
    pub(crate) tls: bool,
}

/// The table; empty where no route is for this subscriber and port.
pub(crate) fn compile<'r>(routes: impl Iterator<Item = &'r HttpRoute>, place: &Place<'_>) -> Vec<Route> {
    let mut out = Vec::new();
    for (index, route) in (0..).zip(routes) {
        let Some(action) = place.action(route) else { continue };
        let named = |name: &str| match name {
            "" => route.name.clone(),
            name => format!("{}.{name}", route.name),
        };
        if route.matches.is_empty() {
            let path = TextMatch::Prefix("/".into());
            let (name, conditions) = (named(""), Vec::new());
            out.push(Route { name, index, path, ignore_case: false, conditions, action });
            break;
        }
        for wanted in route.matches.iter().filter(|wanted| place.applies(wanted)) {
            let path = wanted.uri.as_ref().map_or(TextMatch::Prefix("/".into()), text);
            let conditions = conditions(wanted);
            let (name, ignore_case) = (named(&wanted.name), wanted.ignore_uri_case);
            let action = action.clone();
            let route = Route { name, index, path, ignore_case, conditions, action };
            let last = takes_all(&route);
            out.push(route);
            if last {
                return out;
            }
        }
    }
    out
}

/// Whether a route takes every request: those behind it are never reached.
pub(crate) fn takes_all(route: &Route) -> bool {
    let everything = matches!(&route.path, TextMatch::Prefix(prefix) if prefix == "/")
        || matches!(&route.path, TextMatch::Regex(regex) if regex == ".*");
    everything && route.conditions.is_empty()
}

/// The hosts, in lower case, whose ports bear on the table.
pub(crate) fn destinations<'r>(
    routes: impl Iterator<Item = &'r HttpRoute>,
    others: impl Iterator<Item = &'r Destination>,
    namespace: &str,
    domain: &str,
) -> BTreeSet<String> {
    let name = |to: &Destination| expand(&to.host, namespace, domain).to_lowercase();
    let mut out: BTreeSet<String> = others.map(name).collect();
    for route in routes {
        let mirrors = route.mirror.iter().chain(route.mirrors.iter().filter_map(|mirror| mirror.destination.as_ref()));
        for destination in route.route.iter().filter_map(|to| to.destination.as_ref()).chain(mirrors) {
            out.insert(name(destination));
        }
    }
    out
}

fn text(condition: &StringMatch) -> TextMatch {
    match (&condition.exact, &condition.prefix, &condition.regex) {
        (Some(exact), ..) => TextMatch::Exact(exact.clone()),
        (_, Some(prefix), _) => TextMatch::Prefix(prefix.clone()),
        (_, _, Some(regex)) if regex != "*" => TextMatch::Regex(regex.clone()),
        _ => TextMatch::Present,
    }
}

fn conditions(wanted: &HttpMatch) -> Vec<Condition> {
    let header = |name: &str, condition: &StringMatch, negated| Condition {
        subject: Subject::Header(name.to_ascii_lowercase()),
        text: text(condition),
        negated,
    };
    let mut out: Vec<Condition> = Vec::new();
    let pseudo = [(":method", &wanted.method), (":authority", &wanted.authority), (":scheme", &wanted.scheme)];
    for (name, condition) in pseudo {
        out.extend(condition.as_ref().map(|condition| header(name, condition, false)));
    }
    out.extend(wanted.headers.iter().map(|(name, condition)| header(name, condition, false)));
    out.extend(wanted.without_headers.iter().map(|(name, condition)| header(name, condition, true)));
    out.extend(wanted.query_params.iter().map(|(name, condition)| Condition {
        subject: Subject::Query(name.clone()),
        text: text(condition),
        negated: false,
    }));
    out
}

impl Place<'_> {
    fn applies(&self, wanted: &HttpMatch) -> bool {
        (wanted.port == 0 || wanted.port == u32::from(self.port)) && self.is_client(wanted)
    }

    /// Whether conditions on the client's workload hold; a list of gateways takes their place.
    fn is_client(&self, wanted: &HttpMatch) -> bool {
        if !wanted.gateways.is_empty() {
            return wanted.gateways.iter().any(|gateway| match self.gateway {
                None => gateway == MESH,
                Some(own) => gateway != MESH && resolved(gateway, self.namespace) == own,
            });
        }
        let (labels, namespace) = (&wanted.source_labels, &wanted.source_namespace);
        labels.iter().all(|(k, v)| self.cx.scope.labels.get(k) == Some(v))
            && (namespace.is_empty() || *namespace == self.cx.scope.namespace)
    }

    /// The cluster of a destination. One without a port has the target's only port, else that of the listener.
    pub(crate) fn cluster(&self, to: &Destination) -> String {
        let (host, port) = self.host_port(to);
        let port = port.or_else(|| self.others.only_port(&host)).unwrap_or(self.port);
        format!("outbound|{port}|{}|{host}", to.subset)
    }

    fn hash(&self, to: &Destination) -> Option<HashKey> {
        let (host, port) = self.host_port(to);
        self.others.hash(&host, port.unwrap_or(self.port), &to.subset, port.is_some())
    }

    fn host_port(&self, to: &Destination) -> (String, Option<u16>) {
        let host = expand(&to.host, self.namespace, &self.cx.mesh.cluster_domain);
        let given = to.port.as_ref().and_then(|port| u16::try_from(port.number).ok()).filter(|port| *port != 0);
        match self.others.alias(&host) {
            Some((target, port)) => (target, given.or(port)),
            None => (host, given),
        }
    }

    fn action(&self, route: &HttpRoute) -> Option<Action> {
        let mut extras = self.extras(route);
        let outcome = if let Some(redirect) = &route.redirect {
            if !redirect.prefix_rewrite.is_empty() {
                extras.path = Some(PathRewrite::Matched(redirect.prefix_rewrite.clone()));
            }
            Outcome::Redirect(self.redirect(redirect))
        } else if let Some(direct) = &route.direct_response {
            let body = direct.body.as_ref();
            let bytes = body.and_then(|b| b.bytes.as_ref()).map(|bytes| bytes.0.clone());
            let body = bytes.or_else(|| body.and_then(|b| b.string.clone()).map(String::into_bytes));
            Outcome::Respond(Respond { status: direct.status, body: body.unwrap_or_default() })
        } else {
            Outcome::Forward(self.targets(route, &mut extras)?)
        };
        let extras = (extras != Extras::default()).then(|| Box::new(extras));
        Some(Action { outcome, extras })
    }

    fn targets(&self, route: &HttpRoute, extras: &mut Extras) -> Option<Vec<Target>> {
        if let [only] = route.route.as_slice() {
            let headers = only.headers.as_ref();
            extend(&mut extras.request, headers.and_then(|h| h.request.as_ref()));
            extend(&mut extras.response, headers.and_then(|h| h.response.as_ref()));
            if extras.authority.is_empty() {
                extras.authority = authority(headers.and_then(|h| h.request.as_ref()));
            }
            let to = only.destination.as_ref()?;
            let hash = self.hash(to);
            let own = hash.map(|key| Box::new(TargetExtras { hash: Some(key), ..TargetExtras::default() }));
            return Some(vec![Target { cluster: self.cluster(to), weight: 1, extras: own }]);
        }
        let target = |to: &api::HttpRouteDestination| {
            let weight = u32::try_from(to.weight).ok().filter(|weight| *weight > 0)?;
            let destination = to.destination.as_ref()?;
            let (cluster, hash) = (self.cluster(destination), self.hash(destination));
            let headers = to.headers.as_ref();
            let authority = authority(headers.and_then(|h| h.request.as_ref()));
            let mut own = TargetExtras { authority, hash, ..TargetExtras::default() };
            extend(&mut own.request, headers.and_then(|h| h.request.as_ref()));
            extend(&mut own.response, headers.and_then(|h| h.response.as_ref()));
            let extras = (own != TargetExtras::default()).then(|| Box::new(own));
            Some(Target { cluster, weight, extras })
        };
        let targets: Vec<Target> = route.route.iter().filter_map(target).collect();
        (!targets.is_empty()).then_some(targets)
    }

    fn redirect(&self, redirect: &api::Redirect) -> Redirect {
        let port = match (redirect.port, &redirect.derive_port) {
            (Some(port), _) => port,
            (None, Some(RedirectPort::FromRequestPort)) => self.port.into(),
            (None, _) => 0,
        };
        let own = if self.tls { "https" } else { "http" };
        let scheme = if redirect.scheme.is_empty() { own } else { &redirect.scheme };
        let default = matches!((port, scheme), (80, "http") | (443, "https"));
        Redirect {
            status: if redirect.redirect_code == 0 { 301 } else { redirect.redirect_code },
            scheme: redirect.scheme.clone(),
            authority: redirect.authority.clone(),
            port: if default { 0 } else { port },
            path: redirect.uri.clone(),
            keeps_port: false,
        }
    }

    fn extras(&self, route: &HttpRoute) -> Extras {
        let headers = route.headers.as_ref();
        let request = headers.and_then(|h| h.request.as_ref());
        let mut out = Extras { authority: authority(request), ..Extras::default() };
        extend(&mut out.request, request);
        extend(&mut out.response, headers.and_then(|h| h.response.as_ref()));
        if let Some(rewrite) = &route.rewrite {
            if !rewrite.authority.is_empty() {
                out.authority.clone_from(&rewrite.authority);
            }
            out.path = match &rewrite.uri_regex_rewrite {
                Some(regex) => Some(PathRewrite::Regex(regex.pattern.clone(), regex.rewrite.clone())),
                None if rewrite.uri.is_empty() => None,
                None => Some(PathRewrite::Matched(rewrite.uri.clone())),
            };
        }
        out.timeout_ms = milliseconds(route.timeout);
        let retries = route.retries.as_ref().or(self.cx.mesh.default_retry.as_ref());
        let hashed = match route.route.as_slice() {
            [only] => only.destination.as_ref().is_some_and(|to| self.hash(to).is_some()),
            _ => false,
        };
        out.retry = retry(retries, hashed);
        out.fault = route.fault.as_ref().map(fault);
        out.cors = route.cors_policy.as_ref().map(cors);
        out.mirrors = self.mirrors(route);
        out
    }

    fn mirrors(&self, route: &HttpRoute) -> Vec<Mirror> {
        let first = route.mirror.as_ref().map(|to| {
            let old = || route.mirror_percent.map(|percent| percent.saturating_mul(ALL / 100));
            (to, route.mirror_percentage.as_ref().map(share).or_else(old))
        });
        let more =
            route.mirrors.iter().filter_map(|m| Some((m.destination.as_ref()?, m.percentage.as_ref().map(share))));
        let all = first.into_iter().chain(more).map(|(to, share)| (to, share.unwrap_or(ALL).min(ALL)));
        all.filter(|(_, share)| *share > 0).map(|(to, share)| Mirror { cluster: self.cluster(to), share }).collect()
    }
}

/// A share in millionths: Istio counts to 0.0001 percent.
#[expect(clippy::cast_sign_loss, reason = "it is not negative")]
fn share(percent: &Percent) -> u32 {
    (percent.value.clamp(0.0, 100.0) * f64::from(ALL / 100)).round() as u32
}

fn milliseconds(duration: Option<SignedDuration>) -> u32 {
    duration.map_or(0, |d| u32::try_from(d.as_millis().max(0)).unwrap_or(u32::MAX))
}

/// The retries of a route; `hashed`: its requests are kept together, and stay so when they are retried.
pub(crate) fn retry(retries: Option<&api::Retry>, hashed: bool) -> Option<Retry> {
    let Some(retries) = retries else {
        return hashed.then(|| Retry { attempts: Retry::ATTEMPTS, same_hosts: true, ..Retry::default() });
    };
    let attempts = u32::try_from(retries.attempts).unwrap_or_default();
    let (mut on, mut statuses) = (Vec::new(), Vec::new());
    for item in retries.retry_on.split(',').filter(|item| !item.is_empty()) {
        if item.parse::<u16>().is_ok() { &mut statuses } else { &mut on }.push(item);
    }
    if !statuses.is_empty() && !on.contains(&"retriable-status-codes") {
        on.push("retriable-status-codes");
    }
    Some(Retry {
        attempts,
        on: on.join(","),
        statuses: statuses.join(","),
        per_try_ms: milliseconds(retries.per_try_timeout),
        base_ms: milliseconds(retries.backoff),
        same_hosts: retries.retry_ignore_previous_hosts.map_or(hashed, |avoided| !avoided),
        remote: retries.retry_remote_localities == Some(true),
    })
}

fn fault(fault: &api::Fault) -> Fault {
    let mut out = Fault::default();
    if let Some(delay) = &fault.delay {
        let old = u32::try_from(delay.percent).unwrap_or_default().saturating_mul(ALL / 100);
        out.delay_share = delay.percentage.as_ref().map_or(old, share);
        out.delay_ms = milliseconds(delay.fixed_delay);
    }
    if let Some(abort) = &fault.abort {
        out.abort_share = abort.percentage.as_ref().map_or(0, share);
        out.abort_status = abort.http_status.and_then(|status| u32::try_from(status).ok()).unwrap_or(500);
        out.abort_grpc = abort.grpc_status.as_deref().and_then(api::grpc_status);
    }
    out
}

fn cors(policy: &CorsPolicy) -> Cors {
    let old = policy.allow_origin.iter().map(|origin| TextMatch::Exact(origin.clone()));
    Cors {
        origins: if policy.allow_origins.is_empty() {
            old.collect()
        } else {
            policy.allow_origins.iter().map(text).collect()
        },
        methods: policy.allow_methods.join(","),
        headers: policy.allow_headers.join(","),
        expose: policy.expose_headers.join(","),
        max_age: policy.max_age.map(|age| age.as_secs().to_string()).unwrap_or_default(),
        credentials: policy.allow_credentials.unwrap_or_default(),
        refuse_unmatched: policy.unmatched_preflights == UnmatchedPreflights::Ignore,
    }
}

/// Names that a header operation may not touch: the authority has a way of its own.
fn is_reserved(name: &str) -> bool {
    name.starts_with(':') || name.eq_ignore_ascii_case("host")
}

fn extend(ops: &mut HeaderOps, more: Option<&HeaderOperations>) {
    let Some(more) = more else { return };
    let kept = |map: &BTreeMap<String, String>| -> Vec<(String, String)> {
        let some = map.iter().filter(|(name, _)| !is_reserved(name));
        some.map(|(name, value)| (name.to_ascii_lowercase(), value.clone())).collect()
    };
    ops.set.extend(kept(&more.set));
    ops.add.extend(kept(&more.add));
    ops.remove.extend(more.remove.iter().filter(|name| !is_reserved(name)).map(|name| name.to_ascii_lowercase()));
}

/// The authority that header operations set.
fn authority(request: Option<&HeaderOperations>) -> String {
    let Some(request) = request else { return String::new() };
    let given = [&request.set, &request.add].into_iter().find_map(|map| {
        map.iter().find(|(name, _)| name.eq_ignore_ascii_case("host") || *name == ":authority").map(|(_, value)| value)
    });
    given.cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_is_kept_together_is_retried_where_it_was() {
        let asked = |avoided| api::Retry { attempts: 1, retry_ignore_previous_hosts: avoided, ..api::Retry::default() };
        let same = |retries: Option<&api::Retry>, hashed| retry(retries, hashed).map(|retry| retry.same_hosts);
        assert_eq!((same(None, false), same(None, true)), (None, Some(true)));
        for (avoided, hashed, expected) in
            [(None, false, false), (None, true, true), (Some(true), true, false), (Some(false), false, true)]
        {
            assert_eq!(same(Some(&asked(avoided)), hashed), Some(expected), "{avoided:?} {hashed}");
        }
        assert_eq!(retry(None, true).and_then(|retry| retry.manner()).unwrap().to_string(), "same-hosts");
    }
}
