//! ServiceEntries that declare the same host, or far too many hosts.

use std::collections::HashMap;

use super::audience::Claims;
use super::{Entry, finding};
use crate::model::{Resolution, ServiceEntry};
use crate::validate::finding::Finding;

/// Of entries in the order in which they win.
pub(super) fn between<'o>(entries: &'o [Entry<'o>], findings: &mut Vec<Finding>) {
    let mut hosts: HashMap<String, Claims<'_, usize>> = HashMap::new();
    for (number, this) in entries.iter().enumerate() {
        for (index, host) in this.entry.hosts.iter().enumerate() {
            let field = format!("spec.hosts[{index}]");
            if is_broad(host) {
                findings.push(finding(this.placed, &field, "broad-wildcard", broad(host)));
            }
            let claims = hosts.entry(host.to_ascii_lowercase()).or_default();
            let mut earlier: Vec<usize> = claims.seen_with(&this.audience).collect();
            earlier.sort_unstable();
            earlier.dedup();
            if let Some((code, message)) = earlier.iter().find_map(|&other| lost(host, this, &entries[other])) {
                findings.push(finding(this.placed, &field, code, message));
            }
            // What is like an earlier one says nothing new about a third.
            if !earlier.iter().any(|&other| alike(entries[other].entry, this.entry)) {
                claims.add(number, &this.audience);
            }
        }
    }
}

/// A wildcard over a whole top-level domain, or over everything.
pub(super) fn is_broad(host: &str) -> bool {
    host.strip_prefix('*').is_some_and(|rest| !rest.trim_start_matches('.').contains('.'))
}

pub(super) fn broad(host: &str) -> String {
    format!("{host} takes every name under it that nothing more exact declares, far more than one owner has")
}

fn alike(a: &ServiceEntry, b: &ServiceEntry) -> bool {
    a.meta.namespace == b.meta.namespace && a.ports == b.ports && difference(a, b).is_none()
}

fn same_set(a: &[String], b: &[String]) -> bool {
    a.len() == b.len() && a.iter().all(|entry| b.contains(entry))
}

/// What keeps two entries of one namespace from being merged.
fn difference(a: &ServiceEntry, b: &ServiceEntry) -> Option<&'static str> {
    if a.resolution != b.resolution {
        Some("resolution")
    } else if a.meta.labels != b.meta.labels {
        Some("metadata.labels")
    } else if a.workload_selector != b.workload_selector {
        Some("workloadSelector")
    } else if !same_set(&a.export_to, &b.export_to) {
        Some("exportTo")
    } else {
        None
    }
}

/// What is lost where `earlier` declares the same host (SEMANTICS 1.6).
fn lost(host: &str, this: &Entry<'_>, earlier: &Entry<'_>) -> Option<(&'static str, String)> {
    let there = earlier.place();
    let (entry, earlier) = (this.entry, earlier.entry);
    if entry.meta.namespace != earlier.meta.namespace {
        let message = format!(
            "host {host} is also declared by {there}: a namespace that sees both uses its own, else the older one, \
             never both"
        );
        return Some(("duplicate-host", message));
    }
    if let Some(what) = difference(entry, earlier) {
        let message = format!(
            "host {host} is also declared by {there} with another {what}: the two do not merge, the older one decides"
        );
        return Some(("duplicate-host", message));
    }
    // Static endpoints are matched by the port's name, addresses from DNS by its number.
    let renamed = entry.ports.iter().filter(|_| entry.resolution == Resolution::Static).find_map(|port| {
        let other = earlier.ports.iter().find(|other| other.number == port.number && other.name != port.name)?;
        Some((port, other))
    });
    let (port, other) = renamed?;
    let message = format!(
        "port {} of host {host} is called {:?} here and {:?} in {there}: the endpoints of this one are not used",
        port.number, port.name, other.name
    );
    Some(("port-name-conflict", message))
}
