//! Rules that several kinds share.

use std::collections::HashSet;

use jiff::SignedDuration;

use crate::api::virtual_service::Destination;
use crate::model::Labels;
use crate::validate::finding::Issue;
use crate::validate::predicates;

/// Reports an error of the webhook.
pub(super) fn refuse(
    issues: &mut Vec<Issue>,
    code: &'static str,
    field: impl std::fmt::Display,
    message: impl Into<String>,
) {
    issues.push(Issue::refused(code, field, message));
}

/// Reports the error of a predicate.
pub(super) fn check(
    issues: &mut Vec<Issue>,
    code: &'static str,
    field: impl std::fmt::Display,
    result: Result<(), String>,
) {
    if let Err(message) = result {
        refuse(issues, code, field, message);
    }
}

/// Labels of an endpoint, a subset or a client.
pub(super) fn labels(labels: &Labels, field: &str, issues: &mut Vec<Issue>) {
    for (key, value) in labels {
        check(issues, "label-key", format!("{field}.{key}"), predicates::label_key(key));
        check(issues, "label-value", format!("{field}.{key}"), predicates::label_value(value));
    }
}

/// Labels of a selector: no wildcards, no empty key. True if there was nothing to refuse.
pub(super) fn selector(labels: &Labels, field: &str, issues: &mut Vec<Issue>) -> bool {
    let before = issues.len();
    for (key, value) in labels {
        let field = format!("{field}.{key}");
        if key.is_empty() {
            let message = format!("empty key is not supported in selector: \"{key}={value}\"");
            refuse(issues, "selector-key", &field, message);
        }
        if key.contains('*') || value.contains('*') {
            let message = format!("wildcard is not supported in selector: \"{key}={value}\"");
            refuse(issues, "selector-wildcard", &field, message);
        }
    }
    issues.len() == before
}

/// A duration of at least a millisecond, without smaller parts.
pub(super) fn duration(duration: Option<SignedDuration>, field: &str, issues: &mut Vec<Issue>) {
    let Some(duration) = duration else { return };
    if duration < SignedDuration::from_millis(1) {
        refuse(issues, "duration", field, "duration must be greater than 1ms");
    } else if duration.subsec_nanos() % 1_000_000 != 0 {
        refuse(issues, "duration", field, "only durations to ms precision are supported");
    }
}

/// A port number, where it is not 0.
pub(super) fn optional_port(number: u32, field: String, issues: &mut Vec<Issue>) {
    if number != 0 {
        check(issues, "port-range", field, predicates::port(number));
    }
}

/// The name of a subset.
pub(super) fn subset_name(name: &str, field: String, issues: &mut Vec<Issue>) {
    if name.is_empty() {
        refuse(issues, "subset-name", field, "subset name cannot be empty");
    } else if !predicates::is_dns_label(name) {
        refuse(issues, "subset-name", field, format!("subset name is invalid: {name}"));
    }
}

/// A destination.
pub(super) fn destination(destination: &Destination, field: &str, issues: &mut Vec<Issue>) {
    let host = &destination.host;
    let result = if host == "*" { Err("invalid destination host *".into()) } else { predicates::wildcard_domain(host) };
    check(issues, "destination-host", format!("{field}.host"), result);
    if !destination.subset.is_empty() {
        subset_name(&destination.subset, format!("{field}.subset"), issues);
    }
    if let Some(port) = &destination.port {
        check(issues, "port-range", format!("{field}.port.number"), predicates::port(port.number));
    }
}

/// Whose `exportTo` is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Exporter {
    /// May be exported to nobody (`~`).
    ServiceEntry,
    /// A DestinationRule with a workload selector stays in its namespace.
    Selecting,
    /// Any other.
    Other,
}

/// `exportTo`
pub(super) fn export_to(namespace: &str, entries: &[String], exporter: Exporter, issues: &mut Vec<Issue>) {
    let mut seen = HashSet::new();
    for (index, entry) in entries.iter().enumerate() {
        let field = format!("spec.exportTo[{index}]");
        let key = if entry == "." { namespace } else { entry };
        if seen.contains(key) {
            let message = if key == entry {
                format!("duplicate entries in exportTo for entry {entry}")
            } else {
                format!("duplicate entries in exportTo: . and current namespace {namespace}")
            };
            refuse(issues, "export-duplicate", field, message);
        } else if key == "~" && exporter != Exporter::ServiceEntry {
            let message = "exportTo ~ (none) is not allowed for Istio configuration objects";
            refuse(issues, "export-nobody", field, message);
        } else if matches!(key, "~" | "*" | ".") || predicates::is_dns_label(key) {
            seen.insert(key);
        } else {
            let message = "only .,*, or a valid DNS 1123 label is allowed as exportTo entry";
            refuse(issues, "export-entry", field, message);
        }
    }
    if exporter == Exporter::Selecting && !seen.is_empty() {
        if !seen.contains(namespace) {
            let message = "destination rule with workload selector cannot have exportTo beyond current namespace";
            refuse(issues, "export-selecting", "spec.exportTo", message);
        } else if seen.len() > 1 {
            let message = "destination rule with workload selector cannot have multiple entries in exportTo";
            refuse(issues, "export-selecting", "spec.exportTo", message);
        }
    }
    if entries.len() > 1 && seen.contains("*") {
        let message = "cannot have both public (*) and non-public exportTo values for a resource";
        refuse(issues, "export-public", "spec.exportTo", message);
    }
    if entries.len() > 1 && seen.contains("~") {
        let message = "cannot export service entry to no one (~) and someone";
        refuse(issues, "export-nobody", "spec.exportTo", message);
    }
}
