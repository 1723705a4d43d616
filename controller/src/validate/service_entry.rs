//! ServiceEntry: every rule of istiod's `ValidateServiceEntry`, in its order and close to its words.

use std::collections::HashSet;

use crate::api::service_entry::{RESOLUTIONS, ServiceEntry};
use crate::model::{self, Location, Meta, Protocol, Resolution, ServicePort};
use crate::validate::finding::Issue;
use crate::validate::{predicates, shared, workload_entry};

/// The label that keeps an entry from getting virtual addresses.
pub const AUTO_ALLOCATION_LABEL: &str = "networking.istio.io/enable-autoallocate-ip";

const NONE: i32 = 0;
const STATIC: i32 = 1;
const DNS: i32 = 2;
const DNS_ROUND_ROBIN: i32 = 3;
const DYNAMIC_DNS: i32 = 4;

/// The protocol of that name, in any case; `None` for one that istiod does not know. Empty means sniffed.
pub fn protocol(name: &str) -> Option<Protocol> {
    const NAMES: &[(&str, Protocol)] = &[
        ("", Protocol::Auto),
        ("tcp", Protocol::Tcp),
        ("udp", Protocol::Udp),
        ("grpc", Protocol::Grpc),
        ("grpc-web", Protocol::GrpcWeb),
        ("http", Protocol::Http),
        ("http_proxy", Protocol::HttpProxy),
        ("http2", Protocol::Http2),
        ("https", Protocol::Https),
        ("tls", Protocol::Tls),
        ("mongo", Protocol::Mongo),
        ("redis", Protocol::Redis),
        ("mysql", Protocol::Mysql),
    ];
    NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, protocol)| *protocol)
}

pub(super) fn is_http(protocol: Option<Protocol>) -> bool {
    use Protocol::{Grpc, GrpcWeb, Http, Http2, HttpProxy};
    matches!(protocol, Some(Http | HttpProxy | Http2 | Grpc | GrpcWeb))
}

pub(super) fn is_tls(protocol: Option<Protocol>) -> bool {
    matches!(protocol, Some(Protocol::Https | Protocol::Tls))
}

fn is_tcp_class(protocol: Option<Protocol>) -> bool {
    use Protocol::{Mongo, Mysql, Redis, Tcp};
    is_tls(protocol) || matches!(protocol, Some(Tcp | Mongo | Redis | Mysql))
}

/// What istiod's webhook says of the spec.
pub fn validate(meta: &Meta, spec: &ServiceEntry) -> Vec<Issue> {
    let mut issues = Vec::new();
    if !selector(spec, &mut issues) {
        return issues;
    }
    hosts(spec, &mut issues);
    addresses(spec, &mut issues);
    ports(meta, spec, &mut issues);
    match spec.resolution {
        NONE => resolution_none(spec, &mut issues),
        STATIC => resolution_static(spec, &mut issues),
        DNS | DNS_ROUND_ROBIN => resolution_dns(spec, &mut issues),
        DYNAMIC_DNS => resolution_dynamic_dns(meta, spec, &mut issues),
        _ => issues.push(Issue::refused("resolution", "spec.resolution", "unsupported resolution type")),
    }
    let several = spec.resolution != NONE && spec.hosts.len() > 1;
    let told_apart = |name: &str| is_http(protocol(name)) || is_tls(protocol(name));
    if several && let Some(index) = spec.ports.iter().position(|port| !told_apart(&port.protocol)) {
        let message = "multiple hosts provided with non-HTTP, non-TLS ports";
        issues.push(Issue::refused("multiple-hosts", format!("spec.ports[{index}].protocol"), message));
    }
    shared::export_to(&meta.namespace, &spec.export_to, shared::Exporter::ServiceEntry, &mut issues);
    issues
}

/// False if the rest is not to be looked at.
fn selector(spec: &ServiceEntry, issues: &mut Vec<Issue>) -> bool {
    let Some(labels) = &spec.workload_selector else { return true };
    for (key, value) in labels {
        let field = format!("spec.workloadSelector.labels.{key}");
        if key.is_empty() {
            let message = format!("empty key is not supported in selector: \"{key}={value}\"");
            issues.push(Issue::refused("selector-key", field, message));
            return false;
        }
        if key.contains('*') || value.contains('*') {
            let message = format!("wildcard is not supported in selector: \"{key}={value}\"");
            issues.push(Issue::refused("selector-wildcard", field, message));
            return false;
        }
    }
    if labels.is_empty() {
        let message = "service entry: workload selector specified without labels, will be applied to all services \
                       in namespace";
        issues.push(Issue::warned("selector-empty", "spec.workloadSelector", message));
    }
    if !spec.endpoints.is_empty() {
        let message = "only one of WorkloadSelector or Endpoints is allowed in Service Entry";
        issues.push(Issue::refused("selector-and-endpoints", "spec.endpoints", message));
    }
    true
}

fn hosts(spec: &ServiceEntry, issues: &mut Vec<Issue>) {
    if spec.hosts.is_empty() {
        issues.push(Issue::refused("hosts-required", "spec.hosts", "service entry must have at least one host"));
    }
    for (index, host) in spec.hosts.iter().enumerate() {
        if host == "*" {
            issues.push(Issue::refused("host-star", format!("spec.hosts[{index}]"), "invalid host *"));
            continue;
        }
        if let Err(message) = predicates::wildcard_domain(host) {
            issues.push(Issue::refused("host", format!("spec.hosts[{index}]"), message));
        } else if spec.resolution != DYNAMIC_DNS && predicates::is_partial_wildcard(host) {
            let message = format!("partial wildcard {host:?} not allowed");
            issues.push(Issue::warned("partial-wildcard", format!("spec.hosts[{index}]"), message));
        }
    }
}

fn addresses(spec: &ServiceEntry, issues: &mut Vec<Issue>) {
    for (index, address) in spec.addresses.iter().enumerate() {
        if let Err(message) = predicates::ip_subnet(address) {
            issues.push(Issue::refused("address", format!("spec.addresses[{index}]"), message));
        }
    }
    if spec.resolution != NONE
        && spec.resolution != STATIC
        && let Some(index) = spec.addresses.iter().position(|address| address.contains('/'))
    {
        let message = "CIDR addresses are allowed only for NONE/STATIC resolution types";
        issues.push(Issue::refused("address-cidr", format!("spec.addresses[{index}]"), message));
    }
}

/// Whether entries of that kind get virtual addresses.
fn is_auto_allocated(meta: &Meta, spec: &ServiceEntry) -> bool {
    let opted_out = meta.labels.get(AUTO_ALLOCATION_LABEL).is_some_and(|value| value.eq_ignore_ascii_case("false"));
    spec.resolution != NONE && !opted_out
}

fn ports(meta: &Meta, spec: &ServiceEntry, issues: &mut Vec<Issue>) {
    let mut names = HashSet::new();
    let mut numbers = HashSet::new();
    for (index, port) in spec.ports.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        if !names.insert(&port.name) {
            let message = format!("service entry port name {:?} already defined", port.name);
            issues.push(Issue::refused("port-name-duplicate", field("name"), message));
        }
        if !numbers.insert(port.number) {
            let message = format!("service entry port {} already defined", port.number);
            issues.push(Issue::refused("port-duplicate", field("number"), message));
        }
        if port.target_port != 0
            && let Err(message) = predicates::port(port.target_port)
        {
            issues.push(Issue::refused("target-port", field("targetPort"), message));
        }
        let bare = spec.addresses.is_empty() && !is_auto_allocated(meta, spec);
        if bare && (port.protocol.is_empty() || port.protocol == "TCP") {
            let message = "addresses are required for ports serving TCP (or unset) protocol when IP Autoallocation is \
                           not enabled";
            issues.push(Issue::warned("addresses-required", field("protocol"), message));
        }
        if !predicates::is_dns_label(&port.name) {
            issues.push(Issue::refused("port-name", field("name"), format!("invalid port name: {}", port.name)));
        }
        if protocol(&port.protocol).is_none() {
            let message = format!("unsupported protocol: {}", port.protocol);
            issues.push(Issue::refused("protocol", field("protocol"), message));
        }
        if let Err(message) = predicates::port(port.number) {
            issues.push(Issue::refused("port-range", field("number"), message));
        }
    }
}

fn resolution_none(spec: &ServiceEntry, issues: &mut Vec<Issue>) {
    if !spec.endpoints.is_empty() {
        let message = "no endpoints should be provided for resolution type none";
        issues.push(Issue::refused("endpoints-with-none", "spec.endpoints", message));
    }
    if spec.workload_selector.is_some() {
        let message = "workloadSelector should not be set when resolution mode is NONE";
        issues.push(Issue::warned("selector-with-none", "spec.workloadSelector", message));
    }
}

fn port_names(spec: &ServiceEntry) -> Vec<&str> {
    spec.ports.iter().map(|port| port.name.as_str()).collect()
}

fn resolution_static(spec: &ServiceEntry, issues: &mut Vec<Issue>) {
    let names = port_names(spec);
    for (index, entry) in spec.endpoints.iter().enumerate() {
        workload_entry::endpoint(entry, &format!("spec.endpoints[{index}]"), false, Some(&names), issues);
    }
    let unix = spec.endpoints.iter().position(|entry| entry.address.starts_with("unix://"));
    if let Some(index) = unix.filter(|_| spec.ports.len() != 1) {
        let message = "exactly 1 service port required for unix endpoints";
        issues.push(Issue::refused("unix-one-port", format!("spec.endpoints[{index}].address"), message));
    }
}

fn resolution_dns(spec: &ServiceEntry, issues: &mut Vec<Issue>) {
    let name = RESOLUTIONS.iter().find(|(_, number)| *number == spec.resolution).map_or("", |(name, _)| name);
    if spec.endpoints.is_empty() {
        let mut wrong = spec.hosts.iter().enumerate();
        if let Some((index, reason)) = wrong.find_map(|(index, host)| Some((index, predicates::fqdn(host).err()?))) {
            let message = format!(
                "hosts must be FQDN or contain only prefix wildcards if no endpoints are provided for resolution mode \
                 {name}, {reason}"
            );
            issues.push(Issue::refused("host-not-resolvable", format!("spec.hosts[{index}]"), message));
        }
    }
    if spec.resolution == DNS_ROUND_ROBIN && spec.endpoints.len() > 1 {
        let message = "there must only be 0 or 1 endpoint for resolution mode DNS_ROUND_ROBIN";
        issues.push(Issue::refused("round-robin-endpoints", "spec.endpoints", message));
    }
    let names = port_names(spec);
    for (index, entry) in spec.endpoints.iter().enumerate() {
        let path = format!("spec.endpoints[{index}]");
        if !predicates::is_ip(&entry.address) && predicates::fqdn(&entry.address).is_err() {
            let message = format!("endpoint address {:?} is not a valid FQDN or an IP address", entry.address);
            issues.push(Issue::refused("endpoint-address", format!("{path}.address"), message));
        }
        shared::labels(&entry.labels, &format!("{path}.labels"), issues);
        workload_entry::ports(entry, &path, Some(&names), issues);
    }
    let tcp = spec.ports.iter().any(|port| is_tcp_class(protocol(&port.protocol)));
    if tcp && !spec.addresses.is_empty() && spec.hosts.len() > 1 {
        let message =
            "service entry can not have more than one host specified simultaneously with address and tcp port";
        issues.push(Issue::warned("hosts-share-address", "spec.hosts", message));
    }
}

fn resolution_dynamic_dns(meta: &Meta, spec: &ServiceEntry, issues: &mut Vec<Issue>) {
    if spec.hosts.is_empty() {
        let message = "at least one wildcard host must be provided for resolution type DYNAMIC_DNS";
        issues.push(Issue::refused("dynamic-hosts", "spec.hosts", message));
    }
    for (index, host) in spec.hosts.iter().enumerate().filter(|(_, host)| !host.starts_with('*')) {
        let message = format!("host must be wildcarded for resolution mode DYNAMIC_DNS, {host:?} is not");
        issues.push(Issue::refused("dynamic-host", format!("spec.hosts[{index}]"), message));
    }
    if !spec.addresses.is_empty() {
        let message = "addresses cannot be set for resolution type DYNAMIC_DNS. HTTP route domains will only be \
                       generated from the hosts field values";
        issues.push(Issue::refused("dynamic-addresses", "spec.addresses", message));
    }
    if !spec.endpoints.is_empty() {
        let message = "endpoints cannot be set for resolution type DYNAMIC_DNS. Destination IP address determined \
                       from hosts field values";
        issues.push(Issue::refused("dynamic-endpoints", "spec.endpoints", message));
    }
    for (index, port) in spec.ports.iter().enumerate() {
        use Protocol::{Grpc, Http, Http2, Tls};
        if !matches!(protocol(&port.protocol), Some(Http | Tls | Grpc | Http2)) {
            let message = "only HTTP, TLS, GRPC, and HTTP2 protocols are supported for resolution type DYNAMIC_DNS";
            issues.push(Issue::refused("dynamic-protocol", format!("spec.ports[{index}].protocol"), message));
        }
    }
    let waypoint = meta.labels.get("istio.io/use-waypoint").is_some_and(|name| !name.eq_ignore_ascii_case("none"));
    match spec.location {
        0 => {}
        1 if waypoint => {
            let message =
                "location MESH_INTERNAL with resolution type DYNAMIC_DNS is not supported when using waypoints";
            issues.push(Issue::refused("dynamic-waypoint", "spec.location", message));
        }
        1 => {}
        _ => {
            let message = "location must be MESH_EXTERNAL or MESH_INTERNAL for resolution type DYNAMIC_DNS";
            issues.push(Issue::refused("location", "spec.location", message));
        }
    }
}

/// The checked form of a spec that [`validate`] found no error in.
pub fn checked(meta: Meta, spec: ServiceEntry, status_addresses: Vec<(String, String)>) -> model::ServiceEntry {
    let port = |port: crate::api::service_entry::Port| {
        Some(ServicePort {
            number: u16::try_from(port.number).ok()?,
            name: port.name,
            protocol: protocol(&port.protocol)?,
            target_port: u16::try_from(port.target_port).ok().filter(|&number| number != 0),
        })
    };
    model::ServiceEntry {
        meta,
        hosts: spec.hosts,
        addresses: spec.addresses,
        ports: spec.ports.into_iter().filter_map(port).collect(),
        location: if spec.location == 1 { Location::MeshInternal } else { Location::MeshExternal },
        resolution: match spec.resolution {
            STATIC => Resolution::Static,
            DNS => Resolution::Dns,
            DNS_ROUND_ROBIN => Resolution::DnsRoundRobin,
            DYNAMIC_DNS => Resolution::DynamicDns,
            _ => Resolution::None,
        },
        endpoints: spec.endpoints.into_iter().map(workload_entry::checked).collect(),
        workload_selector: spec.workload_selector,
        export_to: spec.export_to,
        subject_alt_names: spec.subject_alt_names,
        status_addresses,
    }
}
