//! Validation as the two gates of a cluster do it: istiod's admission webhook, and the API server with the CRD's schema.
//!
//! Policy: a warning still applies; an error of the webhook drops only its own resource; an error of the schema is
//! reported as a second opinion, because a file passes no API server (and istiod reads files without the schema).

pub mod conflict;
pub mod destination_rule;
pub mod finding;
pub mod gateway;
mod header_value;
pub(crate) mod http_route;
mod locality;
pub mod predicates;
mod reachability;
mod regex;
pub mod sarif;
pub mod schema;
mod schema_rules;
pub mod service_entry;
mod shared;
pub mod sidecar;
mod traffic_policy;
pub mod unserved;
pub mod virtual_service;
pub mod workload_entry;

use crate::model::Meta;
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
