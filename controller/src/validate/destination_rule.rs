//! DestinationRule: every rule of istiod's `ValidateDestinationRule`, in its order and close to its words.

use std::collections::HashSet;

use crate::api::destination_rule::DestinationRule;
use crate::model::Meta;
use crate::validate::finding::{Issue, Severity};
use crate::validate::shared::{self, check, refuse};
use crate::validate::{predicates, traffic_policy};

/// What istiod's webhook says of the spec.
pub fn validate(meta: &Meta, spec: &DestinationRule) -> Vec<Issue> {
    let mut issues = Vec::new();
    check(&mut issues, "host", "spec.host", predicates::wildcard_domain(&spec.host));
    if let Some(policy) = &spec.traffic_policy {
        traffic_policy::validate(&meta.namespace, policy, "spec.trafficPolicy", &mut issues);
    }
    let mut names = HashSet::new();
    for (index, subset) in spec.subsets.iter().enumerate() {
        let path = format!("spec.subsets[{index}]");
        if !names.insert(&subset.name) {
            let message = format!("duplicate subset names: {}", subset.name);
            refuse(&mut issues, "subset-duplicate", format!("{path}.name"), message);
        }
        shared::subset_name(&subset.name, format!("{path}.name"), &mut issues);
        shared::labels(&subset.labels, &format!("{path}.labels"), &mut issues);
        if let Some(policy) = &subset.traffic_policy {
            // Istiod keeps the errors in there, not the warnings.
            let mut found = Vec::new();
            traffic_policy::validate(&meta.namespace, policy, &format!("{path}.trafficPolicy"), &mut found);
            issues.extend(found.into_iter().filter(|issue| issue.severity == Severity::Error));
        }
    }
    let exporter = match spec.workload_selector {
        Some(_) => shared::Exporter::Selecting,
        None => shared::Exporter::Other,
    };
    shared::export_to(&meta.namespace, &spec.export_to, exporter, &mut issues);
    if let Some(selector) = &spec.workload_selector {
        shared::selector(&selector.match_labels, "spec.workloadSelector.matchLabels", &mut issues);
        if selector.match_labels.is_empty() {
            let message = "workload selector specified without labels";
            issues.push(Issue::warned("selector-empty", "spec.workloadSelector", message));
        }
    }
    issues
}
