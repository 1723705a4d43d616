//! Findings between resources that are each valid: the same resource twice, and resources in each other's way. The
//! codes stand in [`CODES`] and in docs/findings.md.

mod audience;
mod hosts;
mod policies;
mod ports;
mod routes;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use self::audience::Audience;
use crate::model::{Object, ServiceEntry};
use crate::source::read::kind_name;
use crate::validate::finding::{Finding, Gate, Severity};

/// The codes of all findings between resources.
pub const CODES: [&str; 11] = [
    "duplicate-resource",
    "protocol-conflict",
    "port-shadowed",
    "port-name-conflict",
    "duplicate-host",
    "broad-wildcard",
    "unreachable-route",
    "policy-ignored",
    "rule-hidden",
    "server-ignored",
    "sidecar-ignored",
];

/// An object and where it stands.
#[derive(Debug, Clone)]
pub struct Placed {
    /// The object.
    pub object: Object,
    /// File.
    pub file: Arc<str>,
    /// Line; 0 where the place has none.
    pub line: u32,
}

/// The finding that `later` replaces `earlier`, which is the same resource.
pub fn duplicate(earlier: &Placed, later: &Placed) -> Finding {
    let message =
        format!("the same resource stands in {}:{}; this one, being later, counts", earlier.file, earlier.line);
    finding(later, "metadata.name", "duplicate-resource", message)
}

fn finding(placed: &Placed, field: &str, code: &'static str, message: String) -> Finding {
    let key = placed.object.key();
    Finding {
        file: Arc::clone(&placed.file),
        line: placed.line,
        kind: kind_name(key.kind).into(),
        namespace: key.namespace.to_string(),
        name: key.name.to_string(),
        field: field.into(),
        gate: Gate::Conflict,
        severity: Severity::Warning,
        code,
        message,
    }
}

/// The objects that count (of each key the later one), and the findings about the others.
pub fn deduplicate(objects: Vec<Placed>) -> (Vec<Placed>, Vec<Finding>) {
    let mut position = HashMap::with_capacity(objects.len());
    let mut kept: Vec<Placed> = Vec::with_capacity(objects.len());
    let mut findings = Vec::new();
    for placed in objects {
        match position.entry(placed.object.key()) {
            std::collections::hash_map::Entry::Occupied(entry) => {
                let earlier: &mut Placed = &mut kept[*entry.get()];
                findings.push(duplicate(earlier, &placed));
                *earlier = placed;
            }
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(kept.len());
                kept.push(placed);
            }
        }
    }
    (kept, findings)
}

/// A ServiceEntry and who sees it.
struct Entry<'o> {
    placed: &'o Placed,
    entry: &'o ServiceEntry,
    audience: Audience<'o>,
}

impl Entry<'_> {
    fn place(&self) -> String {
        place(self.placed)
    }
}

/// Where resources are in each other's way. The older one is said to win, then the one of the smaller name.
pub fn between(objects: &[Placed]) -> Vec<Finding> {
    let mut entries: Vec<Entry<'_>> = objects
        .iter()
        .filter_map(|placed| match &placed.object {
            Object::ServiceEntry(entry) => {
                let audience = audience::of(entry.meta.namespace.as_str(), &entry.export_to);
                Some(Entry { placed, entry, audience })
            }
            _ => None,
        })
        .collect();
    entries.sort_by(|Entry { entry: a, .. }, Entry { entry: b, .. }| {
        (a.meta.created, &a.meta.namespace, &a.meta.name).cmp(&(b.meta.created, &b.meta.namespace, &b.meta.name))
    });
    let mut findings = Vec::new();
    hosts::between(&entries, &mut findings);
    ports::between(&entries, &mut findings);
    routes::between(objects, &mut findings);
    policies::between(objects, &mut findings);
    findings
}

/// What one resource would change about that: findings that are not there without it, or in its earlier version. Those on
/// other resources come last.
pub fn about(object: &Placed, others: &[Placed]) -> Vec<Finding> {
    let key = object.object.key();
    let near = near(&object.object, others);
    let before: HashSet<(String, String, String)> = between(&near).iter().map(told).collect();
    let mut now: Vec<Placed> = near.into_iter().filter(|placed| placed.object.key() != key).collect();
    now.push(object.clone());
    let mut findings = between(&now);
    let kind = kind_name(key.kind);
    let own = |f: &Finding| f.kind == kind && f.namespace == key.namespace.as_str() && f.name == key.name.as_str();
    findings.retain(|finding| own(finding) || !before.contains(&told(finding)));
    findings.sort_by_key(|finding| !own(finding));
    findings
}

fn told(finding: &Finding) -> (String, String, String) {
    (format!("{} {}/{}", finding.kind, finding.namespace, finding.name), finding.field.clone(), finding.message.clone())
}

/// Those of `others` that a finding about the object could depend on: to compare all with all takes a while.
fn near(object: &Object, others: &[Placed]) -> Vec<Placed> {
    let whole_ports = |entry: &ServiceEntry| {
        let whole = entry.ports.iter().filter(|port| ports::takes_whole_port(entry, port.protocol));
        whole.map(|port| port.number).collect::<HashSet<_>>()
    };
    let names = |hosts: &[String]| hosts.iter().map(|host| host.to_ascii_lowercase()).collect::<HashSet<_>>();
    let close: Box<dyn Fn(&Object) -> bool> = match object {
        Object::ServiceEntry(this) => {
            let (hosts, ports) = (names(&this.hosts), whole_ports(this));
            let addresses: HashSet<&String> = this.addresses.iter().collect();
            Box::new(move |other| {
                let Object::ServiceEntry(other) = other else { return false };
                other.hosts.iter().any(|host| hosts.contains(&host.to_ascii_lowercase()))
                    || other.addresses.iter().any(|address| addresses.contains(address))
                    || !ports.is_disjoint(&whole_ports(other))
            })
        }
        Object::VirtualService(this) => {
            let hosts = names(&this.spec.hosts);
            Box::new(move |other| match other {
                Object::VirtualService(other) => {
                    // A delegate has no hosts.
                    other.spec.hosts.is_empty()
                        || other.spec.hosts.iter().any(|host| hosts.contains(&host.to_ascii_lowercase()))
                }
                Object::ServiceEntry(_) | Object::Service(_) | Object::DestinationRule(_) | Object::Gateway(_) => true,
                _ => false,
            })
        }
        Object::DestinationRule(_) | Object::Gateway(_) | Object::Sidecar(_) => {
            Box::new(|other| matches!(other, Object::DestinationRule(_) | Object::Gateway(_) | Object::Sidecar(_)))
        }
        _ => return Vec::new(),
    };
    others.iter().filter(|placed| close(&placed.object)).cloned().collect()
}

fn place(placed: &Placed) -> String {
    let meta = placed.object.meta();
    // Line 0: the place has no lines, and the name says everything.
    if placed.line == 0 {
        return format!("{}/{}", meta.namespace, meta.name);
    }
    format!("{}/{} ({}:{})", meta.namespace, meta.name, placed.file, placed.line)
}
