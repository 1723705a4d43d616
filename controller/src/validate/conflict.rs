//! Findings between resources that are each valid: the same resource twice, and ServiceEntries in each other's way.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::model::{Kind, Object, Protocol, ServiceEntry};
use crate::source::read::kind_name;
use crate::validate::finding::{Finding, Gate, Severity};

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

/// A use of a host's port, or of a bare TCP port.
struct Claim<'o> {
    placed: &'o Placed,
    entry: &'o ServiceEntry,
    index: usize,
}

/// Where ServiceEntries that can be seen from one namespace take a port from each other. The older one is said to win,
/// then the one of the smaller name.
pub fn between(objects: &[Placed]) -> Vec<Finding> {
    let mut entries: Vec<(&Placed, &ServiceEntry)> = objects
        .iter()
        .filter_map(|placed| match &placed.object {
            Object::ServiceEntry(entry) => Some((placed, entry.as_ref())),
            _ => None,
        })
        .collect();
    debug_assert!(entries.iter().all(|(placed, _)| placed.object.key().kind == Kind::ServiceEntry));
    entries.sort_by(|(_, a), (_, b)| {
        (a.meta.created, &a.meta.namespace, &a.meta.name).cmp(&(b.meta.created, &b.meta.namespace, &b.meta.name))
    });
    let mut findings = Vec::new();
    let mut hosts: HashMap<(String, u16), Vec<Claim<'_>>> = HashMap::new();
    let mut bare: HashMap<u16, Vec<Claim<'_>>> = HashMap::new();
    for (placed, entry) in entries {
        for (index, port) in entry.ports.iter().enumerate() {
            for host in &entry.hosts {
                let claim = Claim { placed, entry, index };
                let claims = hosts.entry((host.to_ascii_lowercase(), port.number)).or_default();
                let earlier = claims.iter().find(|earlier| overlap(earlier.entry, entry));
                match earlier.filter(|earlier| earlier.entry.ports[earlier.index].protocol != port.protocol) {
                    Some(earlier) => {
                        let message = format!(
                            "port {} of host {host} is {} here and {} in {}",
                            port.number,
                            protocol_name(port.protocol),
                            protocol_name(earlier.entry.ports[earlier.index].protocol),
                            place(earlier),
                        );
                        let field = format!("spec.ports[{index}].protocol");
                        findings.push(finding(placed, &field, "protocol-conflict", message));
                    }
                    // One claim of each protocol and audience is enough to compare with.
                    None if earlier.is_none() => claims.push(claim),
                    None => {}
                }
            }
            if takes_whole_port(entry, port.protocol) {
                let claims = bare.entry(port.number).or_default();
                match claims.iter().find(|earlier| overlap(earlier.entry, entry)) {
                    Some(earlier) if earlier.entry.hosts != entry.hosts => {
                        let message = format!(
                            "TCP port {} without addresses is already taken by {}: nothing reaches this one",
                            port.number,
                            place(earlier),
                        );
                        findings.push(finding(placed, &format!("spec.ports[{index}]"), "port-shadowed", message));
                    }
                    Some(_) => {}
                    None => claims.push(Claim { placed, entry, index }),
                }
            }
        }
    }
    findings
}

/// A TCP port without addresses listens on the wildcard address, and takes every connection that nothing else claims.
fn takes_whole_port(entry: &ServiceEntry, protocol: Protocol) -> bool {
    use Protocol::{Mongo, Mysql, Redis, Tcp};
    entry.addresses.is_empty() && entry.status_addresses.is_empty() && matches!(protocol, Tcp | Mongo | Redis | Mysql)
}

/// Whether some namespace sees both.
fn overlap(a: &ServiceEntry, b: &ServiceEntry) -> bool {
    match (audience(a), audience(b)) {
        (None, None) => true,
        (None, Some(some)) | (Some(some), None) => !some.is_empty(),
        (Some(a), Some(b)) => !a.is_disjoint(&b),
    }
}

/// The namespaces that see an entry; `None` for all of them.
fn audience(entry: &ServiceEntry) -> Option<BTreeSet<&str>> {
    if entry.export_to.is_empty() || entry.export_to.iter().any(|e| e == "*") {
        return None;
    }
    if entry.export_to.iter().any(|e| e == "~") {
        return Some(BTreeSet::new());
    }
    let own = |e: &'_ String| e == ".";
    Some(entry.export_to.iter().map(|e| if own(e) { entry.meta.namespace.as_str() } else { e.as_str() }).collect())
}

fn place(claim: &Claim<'_>) -> String {
    let meta = &claim.entry.meta;
    format!("{}/{} ({}:{})", meta.namespace, meta.name, claim.placed.file, claim.placed.line)
}

fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Auto => "without protocol",
        Protocol::Http => "HTTP",
        Protocol::HttpProxy => "HTTP_PROXY",
        Protocol::Http2 => "HTTP2",
        Protocol::Grpc => "GRPC",
        Protocol::GrpcWeb => "GRPC-WEB",
        Protocol::Https => "HTTPS",
        Protocol::Tls => "TLS",
        Protocol::Tcp => "TCP",
        Protocol::Mongo => "MONGO",
        Protocol::Redis => "REDIS",
        Protocol::Mysql => "MYSQL",
        Protocol::Udp => "UDP",
    }
}
