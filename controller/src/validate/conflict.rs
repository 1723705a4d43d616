//! Findings between resources that are each valid: the same resource twice, and resources in each other's way. The
//! codes stand in [`CODES`] and in docs/findings.md.

mod audience;
mod hosts;
mod policies;
mod ports;
mod routes;

use std::collections::HashMap;
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
    /// Line.
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

fn place(placed: &Placed) -> String {
    let meta = placed.object.meta();
    format!("{}/{} ({}:{})", meta.namespace, meta.name, placed.file, placed.line)
}
