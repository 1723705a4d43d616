//! The CEL rules of our CRDs in Rust, each beside the text that it stands for.

use crate::api::decode;
use crate::config::tree::{Node, Value};
use crate::validate::predicates;

/// Whether a value keeps a rule.
pub(super) type Check = fn(&Node) -> bool;

/// The counterpart of a rule.
pub(super) fn find(rule: &str) -> Option<Check> {
    RULES.iter().find(|(text, _)| *text == rule).map(|(_, check)| *check)
}

const RULES: &[(&str, Check)] = &[
    ("self != '*'", |node| node.as_str() != Some("*")),
    ("!self.contains('*')", |node| node.as_str().is_none_or(|text| !text.contains('*'))),
    ("!self.contains(\"*\")", |node| node.as_str().is_none_or(|text| !text.contains('*'))),
    ("self.all(key, !key.contains(\"*\"))", |node| keys(node).all(|key| !key.contains('*'))),
    ("self.all(key, key.size() != 0)", |node| keys(node).all(|key| !key.is_empty())),
    ("duration(self) >= duration('1ms')", |node| {
        let Some(text) = node.as_str() else { return true };
        decode::go_duration(text).is_some_and(|duration| duration.as_nanos() >= 1_000_000)
    }),
    ("(has(self.tlsCertificates) ? 1 : 0) + (has(self.credentialNames) ? 1 : 0) <= 1", |node| {
        !both(node, "tlsCertificates", "credentialNames")
    }),
    ("(has(self.credentialName) ? 1 : 0) + (has(self.credentialNames) ? 1 : 0) <= 1", |node| {
        !both(node, "credentialName", "credentialNames")
    }),
    ("(has(self.credentialNames) ? 1 : 0) + (has(self.tlsCertificates) ? 1 : 0) <= 1", |node| {
        !both(node, "credentialNames", "tlsCertificates")
    }),
    ("0 < self && self <= 65535", |node| match node.value {
        Value::Int(number) => (1..=65535).contains(&number),
        _ => true,
    }),
    ("self.all(p1, self.exists_one(p2, p1.number == p2.number))", |node| {
        let mut seen = std::collections::HashSet::new();
        items(Some(node)).iter().all(|port| match present(port, "number").map(|node| &node.value) {
            Some(Value::Int(number)) => seen.insert(*number),
            _ => true,
        })
    }),
    ("!(has(self.workloadSelector) && has(self.endpoints))", |node| {
        present(node, "workloadSelector").is_none() || present(node, "endpoints").is_none()
    }),
    (
        "!has(self.addresses) || (has(self.resolution) ? self.resolution : 'NONE') in ['NONE', 'STATIC'] || \
         self.addresses.all(a, !a.contains('/'))",
        |node| {
            let resolution = text(node, "resolution").unwrap_or("NONE");
            matches!(resolution, "NONE" | "STATIC")
                || items(present(node, "addresses")).iter().all(|a| a.as_str().is_none_or(|a| !a.contains('/')))
        },
    ),
    ("(has(self.resolution) && self.resolution != 'NONE') || !has(self.endpoints)", |node| {
        text(node, "resolution").unwrap_or("NONE") != "NONE" || present(node, "endpoints").is_none()
    }),
    (
        "!has(self.resolution) || self.resolution != 'DNS_ROUND_ROBIN' || !has(self.endpoints) || \
         size(self.endpoints) <= 1",
        |node| text(node, "resolution") != Some("DNS_ROUND_ROBIN") || items(present(node, "endpoints")).len() <= 1,
    ),
    ("has(self.address) || has(self.network)", |node| {
        present(node, "address").is_some() || present(node, "network").is_some()
    }),
    ("!has(self.address) || !self.address.startsWith('unix://') || !has(self.ports)", |node| {
        !text(node, "address").is_some_and(|a| a.starts_with("unix://")) || present(node, "ports").is_none()
    }),
    ("!self.startsWith('unix://') || self.startsWith('unix:///') || self.startsWith('unix://@')", |node| {
        let socket = node.as_str().and_then(|text| text.strip_prefix("unix://"));
        socket.is_none_or(|path| path.starts_with(['/', '@']))
    }),
    ("!self.startsWith('unix://') || !self.endsWith('/')", |node| {
        node.as_str().is_none_or(|text| !text.starts_with("unix://") || !text.ends_with('/'))
    }),
    (
        "self.all(name, size(name) < 63 && name.matches('^[a-zA-Z0-9](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?$'))",
        |node| match &node.value {
            Value::Map(fields) => fields
                .iter()
                .filter(|field| !field.value.is_null())
                .all(|field| field.key.len() < 63 && predicates::is_dns_label(&field.key)),
            _ => true,
        },
    ),
];

/// The keys that have a value.
fn keys(node: &Node) -> impl Iterator<Item = &str> {
    let fields = match &node.value {
        Value::Map(fields) => fields.as_slice(),
        _ => &[],
    };
    fields.iter().filter(|field| !field.value.is_null()).map(|field| field.key.as_str())
}

fn both(node: &Node, one: &str, other: &str) -> bool {
    present(node, one).is_some() && present(node, other).is_some()
}

fn present<'n>(node: &'n Node, name: &str) -> Option<&'n Node> {
    node.get(name).filter(|node| !node.is_null())
}

fn text<'n>(node: &'n Node, name: &str) -> Option<&'n str> {
    present(node, name).and_then(Node::as_str)
}

fn items(node: Option<&Node>) -> &[Node] {
    match node.map(|node| &node.value) {
        Some(Value::List(items)) => items,
        _ => &[],
    }
}
