//! Sidecar: every rule of istiod's `ValidateSidecar`, in its order and close to its words.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::api::gateway::{ServerTls, ServerTlsMode};
use crate::api::sidecar::{
    CaptureMode, EgressListener, IngressListener, OutboundMode, OutboundTrafficPolicy, Sidecar, SidecarPort,
};
use crate::model::Meta;
use crate::validate::finding::Issue;
use crate::validate::gateway::{host_name, known_protocol, server_tls};
use crate::validate::service_entry::{is_http, is_tls, protocol};
use crate::validate::shared::{self, check, refuse};
use crate::validate::{predicates, traffic_policy};

/// What istiod's webhook says of the spec.
pub fn validate(meta: &Meta, spec: &Sidecar) -> Vec<Issue> {
    let mut issues = Vec::new();
    if let Some(selector) = &spec.workload_selector {
        if !shared::selector(&selector.labels, "spec.workloadSelector.labels", &mut issues) {
            return issues;
        }
        if selector.labels.is_empty() {
            let message =
                "sidecar: workload selector specified without labels, will be applied to all services in namespace";
            issues.push(Issue::warned("selector-empty", "spec.workloadSelector", message));
        }
    }
    let nothing = spec.egress.is_empty()
        && spec.ingress.is_empty()
        && spec.outbound_traffic_policy.is_none()
        && spec.inbound_connection_pool.is_none();
    if nothing {
        return vec![Issue::refused("sidecar-empty", "spec", "sidecar: empty configuration provided")];
    }
    ingress(&spec.ingress, &mut issues);
    if let Some(pool) = &spec.inbound_connection_pool {
        traffic_policy::connection_pool(pool, "spec.inboundConnectionPool", &mut issues);
    }
    egress(meta, &spec.egress, &mut issues);
    if let Some(policy) = &spec.outbound_traffic_policy {
        outbound_policy(policy, &mut issues);
    }
    issues
}

fn ingress(listeners: &[IngressListener], issues: &mut Vec<Issue>) {
    let mut numbers = HashSet::new();
    for (index, listener) in listeners.iter().enumerate() {
        let path = format!("spec.ingress[{index}]");
        let Some(port) = &listener.port else {
            let message = "sidecar: port is required for ingress listeners";
            refuse(issues, "port-required", format!("{path}.port"), message);
            continue;
        };
        port_names(port, &path, issues);
        check(issues, "port-range", format!("{path}.port.number"), predicates::port(port.number));
        bind_address(&listener.bind, &path, issues);
        if !numbers.insert(port.number) {
            let message = "sidecar: ports on IP bound listeners must be unique";
            refuse(issues, "port-duplicate", format!("{path}.port.number"), message);
        }
        if !listener.default_endpoint.is_empty() {
            default_endpoint(&listener.default_endpoint, &format!("{path}.defaultEndpoint"), issues);
        }
        let known = known_protocol(&port.protocol);
        if let Some(tls) = &listener.tls {
            ingress_tls(tls, &format!("{path}.tls"), issues);
            if !is_tls(known) {
                let message = "server cannot have TLS settings for non HTTPS/TLS ports";
                refuse(issues, "tls-on-tcp", format!("{path}.tls"), message);
            }
        }
        if let Some(pool) = &listener.connection_pool {
            let path = format!("{path}.connectionPool");
            traffic_policy::connection_pool(pool, &path, issues);
            if pool.http.is_some() && !is_http(known) {
                let message = format!(
                    "sidecar: HTTP connection pool settings are configured for port {} ({:?}) but its protocol is \
                     not HTTP ({}); only TCP settings will apply",
                    port.number, port.name, port.protocol
                );
                issues.push(Issue::warned("pool-not-http", format!("{path}.http"), message));
            }
        }
    }
}

/// What both kinds of listeners ask of a port.
fn port_names(port: &SidecarPort, path: &str, issues: &mut Vec<Issue>) {
    if port.target_port > 0 {
        refuse(issues, "target-port", format!("{path}.port.targetPort"), "targetPort has no impact on Sidecars");
    }
    if !port.name.is_empty() && !predicates::is_dns_label(&port.name) {
        refuse(issues, "port-name", format!("{path}.port.name"), format!("invalid port name: {}", port.name));
    }
    if protocol(&port.protocol).is_none() {
        let message = format!("unsupported protocol: {}", port.protocol);
        refuse(issues, "protocol", format!("{path}.port.protocol"), message);
    }
}

fn bind_address(bind: &str, path: &str, issues: &mut Vec<Issue>) {
    if !bind.is_empty() && !predicates::is_ip(bind) {
        refuse(issues, "bind", format!("{path}.bind"), format!("{bind} is not a valid IP"));
    }
}

/// `unix://` path, or a port of this host.
fn default_endpoint(endpoint: &str, field: &str, issues: &mut Vec<Issue>) {
    if let Some(socket) = endpoint.strip_prefix("unix://") {
        check(issues, "unix-path", field, predicates::unix_path(socket));
        return;
    }
    let split = match endpoint.strip_prefix('[') {
        Some(rest) => rest.split_once("]:"),
        None => endpoint.rsplit_once(':').filter(|(host, _)| !host.contains(':')),
    };
    let Some((host, port)) = split else {
        refuse(issues, "default-endpoint", field, format!("address {endpoint}: missing port in address"));
        return;
    };
    if !matches!(host, "" | "127.0.0.1" | "0.0.0.0" | "::1" | "::") {
        let message = "sidecar: defaultEndpoint must be of form 127.0.0.1:<port>,0.0.0.0:<port>,[::1]:port,[::]:port,\
                       unix://filepath or unset";
        refuse(issues, "default-endpoint", field, message);
    }
    match port.parse::<i64>() {
        Ok(number) => {
            check(issues, "port-range", field, predicates::port(u32::try_from(number).unwrap_or(0)));
        }
        Err(_) => {
            let message = format!("sidecar: defaultEndpoint port ({port}) is not a number");
            refuse(issues, "default-endpoint", field, message);
        }
    }
}

fn ingress_tls(tls: &ServerTls, path: &str, issues: &mut Vec<Issue>) {
    let unsupported = [
        (!tls.subject_alt_names.is_empty(), "subjectAltNames"),
        (tls.https_redirect, "httpsRedirect"),
        (!tls.credential_name.is_empty(), "credentialName"),
        (!tls.credential_names.is_empty(), "credentialNames"),
        (!tls.tls_certificates.is_empty(), "tlsCertificates"),
    ];
    for (_, name) in unsupported.into_iter().filter(|(given, _)| *given) {
        let message = format!("sidecar: {name} is not supported in ingress tls");
        refuse(issues, "ingress-tls", format!("{path}.{name}"), message);
    }
    if matches!(tls.mode, ServerTlsMode::IstioMutual | ServerTlsMode::AutoPassthrough) {
        let message = "configuration is invalid: cannot set this mode in sidecar ingress tls";
        refuse(issues, "ingress-tls", format!("{path}.mode"), message);
    }
    server_tls(tls, path, issues);
}

fn egress(meta: &Meta, listeners: &[EgressListener], issues: &mut Vec<Issue>) {
    let mut numbers = HashSet::new();
    let mut sockets = HashSet::new();
    for (index, listener) in listeners.iter().enumerate() {
        let path = format!("spec.egress[{index}]");
        match &listener.port {
            None if index + 1 < listeners.len() => {
                let message = "sidecar: the egress listener with empty port should be the last listener in the list";
                refuse(issues, "catch-all-last", &path, message);
            }
            None => {}
            Some(port) => {
                egress_port(port, listener, &path, issues);
                if port.number == 0 && !sockets.insert(&listener.bind) {
                    let message = "sidecar: unix domain socket values for listeners must be unique";
                    refuse(issues, "socket-duplicate", format!("{path}.bind"), message);
                } else if port.number != 0 && !numbers.insert(port.number) {
                    let message = "sidecar: ports on IP bound listeners must be unique";
                    refuse(issues, "port-duplicate", format!("{path}.port.number"), message);
                }
            }
        }
        egress_hosts(meta, &listener.hosts, &format!("{path}.hosts"), issues);
    }
}

fn egress_port(port: &SidecarPort, listener: &EgressListener, path: &str, issues: &mut Vec<Issue>) {
    port_names(port, path, issues);
    if port.number != 0 {
        check(issues, "port-range", format!("{path}.port.number"), predicates::port(port.number));
        bind_address(&listener.bind, path, issues);
        return;
    }
    match listener.bind.strip_prefix("unix://") {
        Some(socket) => check(issues, "unix-path", format!("{path}.bind"), predicates::unix_path(socket)),
        None => {
            let message = "sidecar: ports with 0 value must have a unix domain socket bind address";
            refuse(issues, "port-range", format!("{path}.port.number"), message);
        }
    }
    if !matches!(listener.capture_mode, CaptureMode::Default | CaptureMode::None) {
        let message = "sidecar: captureMode must be DEFAULT/NONE for unix domain socket listeners";
        refuse(issues, "capture-mode", format!("{path}.captureMode"), message);
    }
}

/// `namespace/name`, each only once.
fn egress_hosts(meta: &Meta, hosts: &[String], path: &str, issues: &mut Vec<Issue>) {
    if hosts.is_empty() {
        let message = "sidecar: egress listener must contain at least one host";
        refuse(issues, "hosts-required", path, message);
    }
    let mut seen: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (index, host) in hosts.iter().enumerate() {
        let field = format!("{path}[{index}]");
        let Some((namespace, name)) = host.split_once('/') else {
            refuse(issues, "host", field, "host must be of form namespace/dnsName");
            continue;
        };
        if !namespace.starts_with('~') {
            let names = seen.entry(if namespace == "." { &meta.namespace } else { namespace }).or_default();
            let again = if name == "*" { !names.is_empty() } else { names.contains(name) || names.contains("*") };
            if again {
                issues.push(Issue::warned("host-duplicate", &field, format!("duplicated egress host: {host}")));
            }
            names.insert(name);
        }
        if namespace.is_empty() || name.is_empty() {
            let message = "config namespace and dnsName in host entry cannot be empty";
            refuse(issues, "host", &field, message);
        }
        let bare = namespace.strip_prefix('~').unwrap_or(namespace);
        if !matches!(bare, "" | "*" | ".") && !predicates::is_dns_label(bare) {
            refuse(issues, "host", &field, format!("invalid namespace value {namespace:?} in sidecar"));
        }
        host_name(name, false, &field, issues);
    }
    if seen.len() > 1 && seen.get("*").is_some_and(|names| names.contains("*")) {
        let message = "`*/*` host select all resources, no other hosts can be added";
        issues.push(Issue::warned("host-all", path, message));
    }
}

fn outbound_policy(policy: &OutboundTrafficPolicy, issues: &mut Vec<Issue>) {
    const PATH: &str = "spec.outboundTrafficPolicy";
    // ALLOW_ANY_DYNAMIC_DNS has this number in MeshConfig, and no name here.
    if policy.mode == OutboundMode::Other(3) {
        let message = "sidecar: ALLOW_ANY_DYNAMIC_DNS mode is only supported in MeshConfig, not in Sidecar resource";
        refuse(issues, "outbound-mode", format!("{PATH}.mode"), message);
        return;
    }
    let Some(proxy) = &policy.egress_proxy else { return };
    let field = format!("{PATH}.egressProxy");
    if policy.mode != OutboundMode::AllowAny {
        let message = "sidecar: egress_proxy must be set only with ALLOW_ANY outbound_traffic_policy mode";
        refuse(issues, "egress-proxy", field, message);
        return;
    }
    check(issues, "egress-proxy", format!("{field}.host"), predicates::fqdn(&proxy.host));
    if proxy.port.is_none() {
        refuse(issues, "egress-proxy", format!("{field}.port"), "sidecar: egress_proxy port must be non-nil");
        return;
    }
    shared::destination(proxy, &field, issues);
}
