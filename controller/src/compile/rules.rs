//! DestinationRules: which one counts for a host, and what it says of a port and a subset (SEMANTICS 5.1 to 5.5).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use jiff::SignedDuration;
use portolan_registry::route::{HashCookie, HashKey};

use super::service::Context;
use crate::api::destination_rule::{
    ConsistentHash, DestinationRule, LoadBalancer, PortTrafficPolicy, Subset, TrafficPolicy,
};
use crate::model::{Checked, Labels};
use crate::validate::predicates;

/// Istio's order within a namespace: those with a selector first, then by age and name.
type Place = (bool, i64, String);

/// All DestinationRules.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    /// How many of them hash.
    hashing: usize,
    /// How many have a tunnel.
    tunnels: usize,
    by_namespace: HashMap<String, BTreeMap<Place, Arc<Checked<DestinationRule>>>>,
}

/// A rule, or several of one namespace and host that Istio makes one of.
#[derive(Debug, Clone)]
pub(crate) struct Merged {
    selector: Option<Labels>,
    namespace: String,
    /// As written; a rule with a selector stays in its namespace.
    export_to: BTreeSet<String>,
    policy: Option<TrafficPolicy>,
    subsets: Vec<Subset>,
}

impl Rules {
    pub(crate) fn insert(&mut self, rule: &Arc<Checked<DestinationRule>>) {
        let namespace = self.by_namespace.entry(rule.meta.namespace.to_string()).or_default();
        namespace.insert(place(rule), Arc::clone(rule));
        self.hashing += usize::from(hashes(&rule.spec));
        self.tunnels += usize::from(tunnels(&rule.spec));
    }

    /// Whether connections may be tunnelled.
    pub(crate) fn tunnel(&self) -> bool {
        self.tunnels > 0
    }

    /// Whether routes may depend on rules, and not clusters alone.
    pub(crate) fn hash(&self) -> bool {
        self.hashing > 0
    }

    pub(crate) fn remove(&mut self, rule: &Checked<DestinationRule>) {
        if let Some(namespace) = self.by_namespace.get_mut(rule.meta.namespace.as_str()) {
            namespace.remove(&place(rule));
        }
        self.hashing -= usize::from(hashes(&rule.spec));
        self.tunnels -= usize::from(tunnels(&rule.spec));
    }

    /// The rule for a service of that namespace: first of the subscriber's namespace, then of the service's, then of
    /// the root's. The most specific host counts within each; it never competes with that of another.
    pub(crate) fn of(&self, namespace: &str, host: &str, cx: &Context) -> Option<Merged> {
        let (own, root) = (cx.scope.namespace.as_str(), cx.mesh.root_namespace.as_str());
        let local = |rule: &Checked<DestinationRule>| {
            let to = export_to(rule);
            to.is_empty() || ["*", ".", own].iter().any(|entry| to.contains(*entry))
        };
        let first = match own == root {
            true => self.most_specific(root, host, cx, is_private),
            false => self.most_specific(own, host, cx, local),
        };
        let exported = |of: &str| {
            let mut list = self.most_specific(of, host, cx, |rule| !is_private(rule));
            list.retain(|rule| {
                let to = &rule.export_to;
                to.is_empty() || to.contains("*") || to.contains(own)
            });
            list
        };
        let list = [first].into_iter().chain([namespace, root].map(exported)).find(|list| !list.is_empty())?;
        let selects = |rule: &&Merged| {
            rule.namespace == own
                && rule
                    .selector
                    .as_ref()
                    .is_some_and(|labels| labels.iter().all(|(k, v)| cx.scope.labels.get(k) == Some(v)))
        };
        let selecting = list.iter().find(selects);
        selecting.or_else(|| list.iter().rev().find(|rule| rule.selector.is_none())).cloned()
    }

    /// The rules of the most specific host of an index, merged.
    fn most_specific(
        &self,
        namespace: &str,
        host: &str,
        cx: &Context,
        within: impl Fn(&Checked<DestinationRule>) -> bool,
    ) -> Vec<Merged> {
        let Some(rules) = self.by_namespace.get(namespace) else { return Vec::new() };
        let domain = &cx.mesh.cluster_domain;
        let found: Vec<(String, &Checked<DestinationRule>)> = rules
            .values()
            .filter(|rule| within(rule))
            .map(|rule| (expand(&rule.spec.host, namespace, domain), rule.as_ref()))
            .filter(|(of, _)| predicates::is_host_subset(host, of))
            .collect();
        // Exact before wildcard, then the longer, then by bytes.
        let rank = |of: &str| (of.starts_with('*'), usize::MAX - of.len(), of.to_owned());
        let Some(best) = found.iter().map(|(of, _)| rank(of)).min() else { return Vec::new() };
        let mut out: Vec<Merged> = Vec::new();
        for (_, rule) in found.into_iter().filter(|(of, _)| rank(of) == best) {
            merge(&mut out, rule);
        }
        out
    }
}

/// Whether the rule keeps requests together by something.
fn hashes(spec: &DestinationRule) -> bool {
    let policies = spec.traffic_policy.iter().chain(spec.subsets.iter().filter_map(|s| s.traffic_policy.as_ref()));
    let balancers = policies.flat_map(|p| {
        [&p.load_balancer].into_iter().chain(p.port_level_settings.iter().map(|level| &level.load_balancer))
    });
    balancers.flatten().any(|balancer| balancer.consistent_hash.is_some())
}

/// Whether the rule has connections tunnelled.
pub(crate) fn tunnels(spec: &DestinationRule) -> bool {
    let policies = spec.traffic_policy.iter().chain(spec.subsets.iter().filter_map(|s| s.traffic_policy.as_ref()));
    policies.into_iter().any(|policy| policy.tunnel.is_some())
}

fn key(hash: &ConsistentHash) -> Option<HashKey> {
    if let Some(name) = &hash.http_header_name {
        return Some(HashKey::Header(name.to_ascii_lowercase()));
    }
    if let Some(cookie) = &hash.http_cookie {
        let seconds = |ttl: SignedDuration| u32::try_from(ttl.as_secs()).unwrap_or_default();
        return Some(HashKey::Cookie(HashCookie {
            name: cookie.name.clone(),
            path: cookie.path.clone(),
            ttl: cookie.ttl.map(seconds),
            attributes: cookie.attributes.iter().map(|a| (a.name.clone(), a.value.clone())).collect(),
        }));
    }
    match (&hash.http_query_parameter_name, hash.use_source_ip) {
        (Some(name), _) => Some(HashKey::Query(name.clone())),
        (None, Some(true)) => Some(HashKey::SourceIp),
        (None, _) => None,
    }
}

fn place(rule: &Checked<DestinationRule>) -> Place {
    (rule.spec.workload_selector.is_none(), rule.meta.created, rule.meta.name.to_string())
}

fn export_to(rule: &Checked<DestinationRule>) -> BTreeSet<String> {
    match rule.spec.workload_selector {
        Some(_) => BTreeSet::from([".".to_owned()]),
        None => rule.spec.export_to.iter().cloned().collect(),
    }
}

/// Whether nobody outside of its namespace may see it.
fn is_private(rule: &Checked<DestinationRule>) -> bool {
    let to = export_to(rule);
    to.len() == 1 && to.iter().all(|entry| entry == "." || entry == rule.meta.namespace.as_str())
}

/// A short name is one of the rule's namespace.
pub(crate) fn expand(host: &str, namespace: &str, domain: &str) -> String {
    if host.contains('.') || host == "*" || host.parse::<IpAddr>().is_ok() {
        return host.to_owned();
    }
    format!("{host}.{namespace}.svc.{domain}")
}

/// Takes one more rule of the same host in, as Istio does (`mergeDestinationRule`).
fn merge(list: &mut Vec<Merged>, rule: &Checked<DestinationRule>) {
    let to = export_to(rule);
    let selector = rule.spec.workload_selector.as_ref().map(|selector| selector.match_labels.clone());
    let mut apart = true;
    for earlier in list.iter_mut() {
        apart = to != earlier.export_to;
        if apart && (earlier.export_to.is_empty() || !to.is_superset(&earlier.export_to)) {
            continue;
        }
        if earlier.selector.is_some() && selector.is_some() && earlier.selector != selector {
            apart = true;
            continue;
        }
        if earlier.selector == selector {
            apart = false;
        }
        for subset in &rule.spec.subsets {
            if !earlier.subsets.iter().any(|known| known.name == subset.name) {
                earlier.subsets.push(subset.clone());
            }
        }
        if earlier.policy.is_none() {
            earlier.policy.clone_from(&rule.spec.traffic_policy);
        }
    }
    if apart {
        let namespace = rule.meta.namespace.to_string();
        let (policy, subsets) = (rule.spec.traffic_policy.clone(), rule.spec.subsets.clone());
        list.push(Merged { selector, namespace, export_to: to, policy, subsets });
    }
}

impl Merged {
    /// The labels of a subset's endpoints; `None`: there is no such subset.
    pub(crate) fn subset(&self, name: &str) -> Option<&Labels> {
        self.subsets.iter().find(|subset| subset.name == name).map(|subset| &subset.labels)
    }

    /// What connections ask for in a tunnel (SEMANTICS 5.9), as `HOST:PORT`: by the subset's settings, else the rule's. A
    /// port has none of its own.
    pub(crate) fn tunnel(&self, subset: &str) -> Option<String> {
        let subset = self.subsets.iter().find(|known| !subset.is_empty() && known.name == subset);
        let of_subset = subset.and_then(|subset| subset.traffic_policy.as_ref()).and_then(|p| p.tunnel.as_ref());
        let tunnel = of_subset.or_else(|| self.policy.as_ref()?.tunnel.as_ref())?;
        let host = match tunnel.target_host.parse::<IpAddr>() {
            Ok(IpAddr::V6(ip)) => format!("[{ip}]"),
            _ => tunnel.target_host.clone(),
        };
        Some(format!("{host}:{}", tunnel.target_port))
    }

    /// What requests to a port are kept together by (SEMANTICS 4.6): the subset's settings before the rule's. Those of the
    /// port count where a route names it (`by_port`), or there is no route.
    pub(crate) fn hash(&self, port: u16, subset: &str, by_port: bool) -> Option<HashKey> {
        let subset = self.subsets.iter().find(|known| !subset.is_empty() && known.name == subset);
        let of_subset = subset.and_then(|subset| subset.traffic_policy.as_ref());
        let levels = [(of_subset, true), (self.policy.as_ref(), by_port)];
        let hash = levels.into_iter().find_map(|(policy, by_port)| {
            let policy = policy?;
            let level = port_level(policy, port).filter(|_| by_port).and_then(|level| level.load_balancer.as_ref());
            let of = |balancer: &'_ LoadBalancer| balancer.consistent_hash.clone();
            level.and_then(of).or_else(|| policy.load_balancer.as_ref().and_then(of))
        });
        key(&hash?)
    }

    /// What holds for a port of all endpoints (no subset) or of a subset.
    pub(crate) fn policy(&self, port: u16, subset: &str) -> TrafficPolicy {
        let base = self.policy.as_ref();
        let mut out = match base.and_then(|policy| port_level(policy, port)) {
            // It stands in place of the policy; what it does not say is the default.
            Some(level) => whole(level),
            None => TrafficPolicy { port_level_settings: Vec::new(), ..base.cloned().unwrap_or_default() },
        };
        let over = self.subsets.iter().find(|known| !subset.is_empty() && known.name == subset);
        let Some(over) = over.and_then(|subset| subset.traffic_policy.as_ref()) else { return out };
        match port_level(over, port) {
            Some(level) => {
                let level = whole(level);
                out.connection_pool = level.connection_pool;
                out.outlier_detection = level.outlier_detection;
                out.load_balancer = level.load_balancer;
                out.tls = level.tls;
            }
            None => {
                out.connection_pool = over.connection_pool.clone().or(out.connection_pool);
                out.outlier_detection = over.outlier_detection.clone().or(out.outlier_detection);
                out.load_balancer = over.load_balancer.clone().or(out.load_balancer);
                out.tls = over.tls.clone().or(out.tls);
            }
        }
        out.proxy_protocol = over.proxy_protocol.clone().or(out.proxy_protocol);
        out.retry_budget = over.retry_budget.clone().or(out.retry_budget);
        out
    }
}

fn port_level(policy: &TrafficPolicy, port: u16) -> Option<&PortTrafficPolicy> {
    let of = |level: &&PortTrafficPolicy| level.port.as_ref().is_some_and(|p| p.number == u32::from(port));
    policy.port_level_settings.iter().find(of)
}

fn whole(level: &PortTrafficPolicy) -> TrafficPolicy {
    TrafficPolicy {
        load_balancer: level.load_balancer.clone(),
        connection_pool: level.connection_pool.clone(),
        outlier_detection: level.outlier_detection.clone(),
        tls: level.tls.clone(),
        ..TrafficPolicy::default()
    }
}
