//! Validation as the two gates of a cluster do it: istiod's admission webhook, and the API server with the CRD's schema.
//!
//! Policy: a warning still applies; an error of the webhook drops only its own resource; an error of the schema is
//! reported as a second opinion, because a file passes no API server (and istiod reads files without the schema).

pub mod conflict;
pub mod finding;
pub mod predicates;
pub mod schema;
mod schema_rules;
pub mod service_entry;
pub mod workload_entry;

use crate::model::{Labels, Meta};
use finding::Issue;

/// What istiod checks of every kind's metadata. Any error here hides the others.
pub fn metadata(meta: &Meta) -> Vec<Issue> {
    let refused = |annotation: &str, message: String| {
        vec![Issue::refused("annotation", format!("metadata.annotations.{annotation}"), message)]
    };
    for annotation in ["internal.istio.io/parents", "internal.istio.io/parent-namespace"] {
        if meta.annotations.contains_key(annotation) {
            return refused(annotation, format!("{annotation:?} annotation found, this may not be set by users"));
        }
    }
    let annotation = "internal.istio.io/webhook-always-reject";
    if meta.annotations.contains_key(annotation) {
        return refused(annotation, format!("{annotation:?} annotation found, rejecting"));
    }
    let annotation = "istio.io/dry-run";
    if meta.annotations.contains_key(annotation) {
        let whose = format!("{}/{}", meta.namespace, meta.name);
        return refused(
            annotation,
            format!("{whose} has unsupported annotation {annotation}, please remove the annotation"),
        );
    }
    Vec::new()
}

/// Labels of an endpoint.
fn endpoint_labels(labels: &Labels, field: &str, issues: &mut Vec<Issue>) {
    for (key, value) in labels {
        if let Err(message) = predicates::label_key(key) {
            issues.push(Issue::refused("label-key", format!("{field}.{key}"), message));
        }
        if let Err(message) = predicates::label_value(value) {
            issues.push(Issue::refused("label-value", format!("{field}.{key}"), message));
        }
    }
}
