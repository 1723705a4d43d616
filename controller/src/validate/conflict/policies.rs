//! DestinationRules, Gateways and Sidecars that take effect from each other.

use std::collections::{BTreeMap, HashMap};

use super::{Placed, audience, finding, place};
use crate::api::destination_rule::DestinationRule;
use crate::api::gateway::Server;
use crate::model::{Checked, Labels, Meta, Object, Protocol};
use crate::validate::finding::Finding;
use crate::validate::predicates;
use crate::validate::service_entry::{is_http, is_tls, protocol};

/// Among all objects, the oldest first.
pub(super) fn between(objects: &[Placed], findings: &mut Vec<Finding>) {
    let mut ordered: Vec<&Placed> = objects
        .iter()
        .filter(|placed| matches!(placed.object, Object::DestinationRule(_) | Object::Gateway(_) | Object::Sidecar(_)))
        .collect();
    ordered.sort_by(|a, b| {
        let key = |meta: &Meta| (meta.created, meta.name.to_string(), meta.namespace.to_string());
        key(a.object.meta()).cmp(&key(b.object.meta()))
    });
    sidecars(&ordered, findings);
    rules(&ordered, findings);
    servers(&ordered, findings);
}

/// Of Sidecars of a namespace that select the same workloads only the oldest is used.
fn sidecars(ordered: &[&Placed], findings: &mut Vec<Finding>) {
    let mut seen: HashMap<(&str, Option<&Labels>), &Placed> = HashMap::new();
    for &placed in ordered {
        let Object::Sidecar(sidecar) = &placed.object else { continue };
        let selector = sidecar.spec.workload_selector.as_ref().map(|selector| &selector.labels);
        let namespace = sidecar.meta.namespace.as_str();
        if let Some(earlier) = seen.get(&(namespace, selector.filter(|labels| !labels.is_empty()))) {
            let message = format!("{} selects the same workloads and is older: this one is not used", place(earlier));
            findings.push(finding(placed, "spec.workloadSelector", "sidecar-ignored", message));
            continue;
        }
        seen.insert((namespace, selector.filter(|labels| !labels.is_empty())), placed);
    }
}

fn rules(ordered: &[&Placed], findings: &mut Vec<Finding>) {
    type Rule<'o> = (&'o Placed, &'o Checked<DestinationRule>);
    let mut seen: BTreeMap<(&str, &str), Vec<Rule<'_>>> = BTreeMap::new();
    let mut all = Vec::new();
    for &placed in ordered {
        let Object::DestinationRule(rule) = &placed.object else { continue };
        let rule = rule.as_ref();
        all.push((placed, rule));
        let namespace = rule.meta.namespace.as_str();
        let earlier = seen.entry((namespace, &rule.spec.host)).or_default();
        if let Some((other, first)) = earlier.iter().find(|(_, other)| merge(other, rule)) {
            swallowed(placed, rule, other, first, findings);
        } else {
            earlier.push((placed, rule));
        }
    }
    // A wildcard of the client's namespace is looked at before anything of the service's.
    let wildcards = all.iter().filter(|(_, rule)| rule.spec.host.starts_with('*'));
    for (placed, wide) in wildcards {
        let namespace = wide.meta.namespace.as_str();
        let hidden = all.iter().find(|(_, rule)| {
            rule.meta.namespace.as_str() != namespace
                && rule.spec.host != wide.spec.host
                && predicates::is_host_subset(&rule.spec.host, &wide.spec.host)
                && audience::of(rule.meta.namespace.as_str(), &rule.spec.export_to)
                    .is_none_or(|some| some.contains(namespace))
        });
        if let Some((other, _)) = hidden {
            let message = format!(
                "for clients in {namespace} this rule counts instead of the more exact one of {}",
                place(other)
            );
            findings.push(finding(placed, "spec.host", "rule-hidden", message));
        }
    }
}

/// Whether Istio makes one rule of two (SEMANTICS 5.3).
fn merge(a: &Checked<DestinationRule>, b: &Checked<DestinationRule>) -> bool {
    let (one, other) = (&a.spec, &b.spec);
    one.workload_selector == other.workload_selector
        && one.export_to.len() == other.export_to.len()
        && one.export_to.iter().all(|entry| other.export_to.contains(entry))
}

fn swallowed(
    placed: &Placed,
    rule: &Checked<DestinationRule>,
    other: &Placed,
    first: &Checked<DestinationRule>,
    findings: &mut Vec<Finding>,
) {
    if rule.spec.traffic_policy.is_some() && first.spec.traffic_policy.is_some() {
        let message = format!("{} has a policy for this host and is older: this one is not used", place(other));
        findings.push(finding(placed, "spec.trafficPolicy", "policy-ignored", message));
    }
    for (index, subset) in rule.spec.subsets.iter().enumerate() {
        if first.spec.subsets.iter().any(|known| known.name == subset.name) {
            let message =
                format!("{} defines the subset {} and is older: this one is not used", place(other), subset.name);
            findings.push(finding(placed, &format!("spec.subsets[{index}]"), "policy-ignored", message));
        }
    }
}

/// What servers of one gateway workload on one port and bind address are to each other.
fn servers(ordered: &[&Placed], findings: &mut Vec<Finding>) {
    type Listener<'o> = (&'o Labels, u32, &'o str);
    let mut seen: HashMap<Listener<'_>, Vec<(&Placed, &Server)>> = HashMap::new();
    for &placed in ordered {
        let Object::Gateway(gateway) = &placed.object else { continue };
        for (index, server) in gateway.spec.servers.iter().enumerate() {
            let Some(port) = &server.port else { continue };
            let earlier = seen.entry((&gateway.spec.selector, port.number, &server.bind)).or_default();
            let clash = earlier.iter().find_map(|(other, first)| Some((other, clash(first, server)?)));
            if let Some((other, reason)) = clash {
                let message = format!("{reason} in {}: this server is not used", place(other));
                findings.push(finding(placed, &format!("spec.servers[{index}]"), "server-ignored", message));
            } else {
                earlier.push((placed, server));
            }
        }
    }
}

fn clash(first: &Server, later: &Server) -> Option<String> {
    let speaks = |server: &Server| server.port.as_ref().and_then(|port| protocol(&port.protocol));
    let number = later.port.as_ref().map_or(0, |port| port.number);
    match (speaks(first), speaks(later)) {
        (a, b) if is_tls(a) && is_tls(b) => {
            let name = |host: &str| host.split_once('/').map_or(host, |(_, name)| name).to_owned();
            let taken = |host: &&String| first.hosts.iter().any(|known| name(known) == name(host));
            let host = later.hosts.iter().find(taken)?;
            Some(format!("port {number} already serves {host} by TLS"))
        }
        (a, b) if is_http(a) && is_http(b) => None,
        (a, b) if is_tls(a) == is_tls(b) && a == b && a != Some(Protocol::Auto) => {
            Some(format!("port {number} is already taken by TCP"))
        }
        _ => Some(format!("port {number} already speaks another protocol")),
    }
}
