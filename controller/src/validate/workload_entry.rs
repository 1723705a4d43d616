//! WorkloadEntry, and the rules that it shares with the endpoints of a ServiceEntry.

use crate::api::workload_entry::WorkloadEntry;
use crate::model;
use crate::validate::finding::Issue;
use crate::validate::{predicates, shared};

/// What istiod's webhook says of the spec.
pub fn validate(entry: &WorkloadEntry) -> Vec<Issue> {
    let mut issues = Vec::new();
    endpoint(entry, "spec", true, None, &mut issues);
    issues
}

/// An endpoint at `path`; `services` are the port names of the ServiceEntry that it belongs to.
pub(super) fn endpoint(
    entry: &WorkloadEntry,
    path: &str,
    names_allowed: bool,
    services: Option<&[&str]>,
    issues: &mut Vec<Issue>,
) {
    let address = format!("{path}.address");
    if entry.address.is_empty() {
        if entry.network.is_empty() {
            issues.push(Issue::refused("address-required", address, "address is required"));
            return;
        }
        let message = format!("address is unset with network {:?}", entry.network);
        issues.push(Issue::warned("address-unset", address, message));
    } else if let Some(socket) = entry.address.strip_prefix("unix://") {
        if let Err(message) = predicates::unix_path(socket) {
            issues.push(Issue::refused("unix-path", address, message));
        }
        if !entry.ports.is_empty() {
            let message = format!("unix endpoint {} must not include ports", entry.address);
            issues.push(Issue::refused("unix-ports", format!("{path}.ports"), message));
        }
    } else if !predicates::is_ip(&entry.address) && !(names_allowed && predicates::fqdn(&entry.address).is_ok()) {
        let wanted = if names_allowed { "FQDN or an IP address" } else { "IP address" };
        let message = format!("endpoint address {:?} is not a valid {wanted}", entry.address);
        issues.push(Issue::refused("endpoint-address", address, message));
    }
    ports(entry, path, services, issues);
    shared::labels(&entry.labels, &format!("{path}.labels"), issues);
}

/// The port map of an endpoint.
pub(super) fn ports(entry: &WorkloadEntry, path: &str, services: Option<&[&str]>, issues: &mut Vec<Issue>) {
    for (name, &number) in &entry.ports {
        let field = format!("{path}.ports.{name}");
        if services.is_some_and(|services| !services.contains(&name.as_str())) {
            let message = format!("endpoint port {number} is not defined by the service entry");
            issues.push(Issue::refused("endpoint-port-undefined", &field, message));
        }
        if !predicates::is_dns_label(name) {
            issues.push(Issue::refused("port-name", &field, format!("invalid port name: {name}")));
        }
        if let Err(message) = predicates::port(number) {
            issues.push(Issue::refused("port-range", &field, message));
        }
    }
}

/// The checked form of a spec that [`validate`], or the ServiceEntry's validation, found no error in.
pub fn checked(entry: WorkloadEntry) -> model::Workload {
    model::Workload {
        address: entry.address,
        ports: entry.ports.into_iter().filter_map(|(name, port)| Some((name, u16::try_from(port).ok()?))).collect(),
        labels: entry.labels,
        network: entry.network,
        locality: entry.locality,
        weight: entry.weight,
        service_account: entry.service_account,
    }
}
