//! VirtualService: every rule of istiod's `ValidateVirtualService`, in its order and close to its words.

use crate::api::virtual_service::{
    Destination, L4Match, RouteDestination, TcpRoute, TlsMatch, TlsRoute, VirtualService,
};
use crate::model::{Labels, Meta};
use crate::validate::finding::{Issue, Severity};
use crate::validate::shared::{self, check, refuse};
use crate::validate::{http_route, predicates, reachability};

/// Whose resource it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Semantics {
    /// A user's.
    Istio,
    /// Istio's own rendering of a route of the Gateway API, of which less is asked.
    GatewayApi,
}

/// What istiod's webhook says of the spec.
pub fn validate(meta: &Meta, spec: &VirtualService) -> Vec<Issue> {
    let semantics = match meta.annotations.get("internal.istio.io/route-semantics") {
        Some(value) if value == "gateway" => Semantics::GatewayApi,
        _ => Semantics::Istio,
    };
    let mut issues = Vec::new();
    let delegate = spec.hosts.is_empty();
    if delegate {
        let mut forbidden = |present: bool, field: &str, what: &str| {
            if present {
                let message = format!("delegate virtual service must have no {what} specified");
                refuse(&mut issues, "delegate", format!("spec.{field}"), message);
            }
        };
        forbidden(!spec.gateways.is_empty(), "gateways", "gateways");
        forbidden(!spec.tls.is_empty(), "tls", "tls route");
        forbidden(!spec.tcp.is_empty(), "tcp", "tcp route");
    }
    gateway_names(&spec.gateways, semantics, "spec.gateways", &mut issues);
    if !is_gateway_only(spec) {
        jwt_claims(spec, &mut issues);
    }
    hosts(spec, &mut issues);
    if spec.http.is_empty() && spec.tcp.is_empty() && spec.tls.is_empty() {
        refuse(&mut issues, "routes-required", "spec", "http, tcp or tls must be provided in virtual service");
    }
    for (index, route) in spec.http.iter().enumerate() {
        http_route::validate(route, delegate, semantics, &format!("spec.http[{index}]"), &mut issues);
    }
    for (index, route) in spec.tls.iter().enumerate() {
        tls_route(spec, route, semantics, &format!("spec.tls[{index}]"), &mut issues);
    }
    for (index, route) in spec.tcp.iter().enumerate() {
        tcp_route(route, semantics, &format!("spec.tcp[{index}]"), &mut issues);
    }
    shared::export_to(&meta.namespace, &spec.export_to, shared::Exporter::Other, &mut issues);
    reachability::analyze(spec, &mut issues);
    issues
}

/// Whether the routes hold for gateways alone.
fn is_gateway_only(spec: &VirtualService) -> bool {
    !spec.gateways.is_empty() && !spec.gateways.iter().any(|name| name == "mesh")
}

/// As [`is_gateway_only`] asks, but no gateways at all count too: istiod asks so where it looks at server names.
fn is_gateway(spec: &VirtualService) -> bool {
    !spec.gateways.iter().any(|name| name == "mesh")
}

fn jwt_claims(spec: &VirtualService, issues: &mut Vec<Issue>) {
    for (route_index, route) in spec.http.iter().enumerate() {
        for (index, item) in route.matches.iter().enumerate() {
            for name in item.headers.keys().chain(item.without_headers.keys()) {
                if http_route::is_jwt_claim(name) {
                    let message = format!(
                        "JWT claim based routing (key: {name}) is only supported for gateway, found no gateways: [{}]",
                        spec.gateways.join(" ")
                    );
                    refuse(issues, "jwt-claim", format!("spec.http[{route_index}].match[{index}]"), message);
                }
            }
        }
    }
}

fn hosts(spec: &VirtualService, issues: &mut Vec<Issue>) {
    let gateway_only = is_gateway_only(spec);
    let by_sni = spec.tls.iter().flat_map(|route| &route.matches).any(|item| !item.sni_hosts.is_empty());
    let mut all_valid = true;
    for (index, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{index}]");
        let result = match gateway_only {
            true => gateway_domain(by_sni, host),
            false => predicates::wildcard_domain(host),
        };
        match result {
            Err(message) if !predicates::is_ip(host) => {
                refuse(issues, "host", field, message);
                all_valid = false;
            }
            Err(_) => {}
            Ok(()) if !gateway_only && host == "*" => {
                let message = "wildcard host * is not allowed for virtual services bound to the mesh gateway";
                refuse(issues, "host-star", field, message);
                all_valid = false;
            }
            Ok(()) => {}
        }
    }
    if !all_valid {
        return;
    }
    for (index, host) in spec.hosts.iter().enumerate() {
        for (other_index, other) in spec.hosts.iter().enumerate().skip(index + 1) {
            if predicates::hosts_match(host, other) {
                let message = format!("duplicate hosts in virtual service: {host} & {other}");
                refuse(issues, "host-duplicate", format!("spec.hosts[{other_index}]"), message);
            }
        }
    }
}

/// A wildcard domain, or where a gateway passes TLS through, the name of a cluster as a server name:
/// `outbound_.80_._.example.com`.
fn gateway_domain(by_sni: bool, domain: &str) -> Result<(), String> {
    if !by_sni || !domain.starts_with("outbound_") || domain.len() > 255 {
        return predicates::wildcard_domain(domain);
    }
    let parts: Vec<&str> = domain.split('_').collect();
    let (Some(port), Some(host)) = (parts.get(1), parts.get(3)) else {
        return Err(format!("domain name {domain} invalid, should follow 'outbound_.<port>_._.<host>' format"));
    };
    if port.bytes().any(|b| b.is_ascii_digit()) && host.bytes().any(|b| b.is_ascii_alphabetic()) {
        return Ok(());
    }
    Err(format!("domain name {domain:?} invalid, should follow 'outbound_.<port>_._.<host>' format"))
}

/// Names of gateways: `namespace/name`, or a name; istiod looks no further than the first of the latter.
fn gateway_names(names: &[String], semantics: Semantics, field: &str, issues: &mut Vec<Issue>) {
    for (index, name) in names.iter().enumerate() {
        let field = format!("{field}[{index}]");
        let Some((namespace, short)) = name.split_once('/') else {
            let mut labels = name.split('.');
            if let (Some(first), Some(second)) = (labels.next(), labels.next()) {
                let better = format!("{second}/{first}");
                let message = format!(
                    "using legacy gatewayName format {name:?}; prefer the <namespace>/<name> format: {better:?}"
                );
                issues.push(Issue::warned("gateway-legacy", &field, message));
            }
            check(issues, "gateway-name", field, predicates::fqdn(name));
            return;
        };
        if namespace.is_empty() || short.is_empty() {
            refuse(issues, "gateway-name", &field, "config namespace and gateway name cannot be empty");
        }
        if !predicates::is_dns_label(namespace) {
            refuse(issues, "gateway-name", &field, format!("invalid value for namespace: {namespace:?}"));
        }
        if !predicates::is_dns_label(short) && semantics == Semantics::Istio {
            refuse(issues, "gateway-name", &field, format!("invalid value for gateway name: {short:?}"));
        }
    }
}

/// The gateways of a match on HTTP or TCP: istiod forgets the warnings about them.
pub(super) fn match_gateways(names: &[String], path: &str, issues: &mut Vec<Issue>) {
    let mut found = Vec::new();
    gateway_names(names, Semantics::Istio, &format!("{path}.gateways"), &mut found);
    issues.extend(found.into_iter().filter(|issue| issue.severity == Severity::Error));
}

/// Weighted destinations.
pub(super) fn destinations<'d>(
    items: impl ExactSizeIterator<Item = (&'d Option<Destination>, i32)>,
    semantics: Semantics,
    path: &str,
    issues: &mut Vec<Issue>,
) {
    let several = items.len() > 1;
    let mut total = 0_i32;
    for (index, (destination, weight)) in items.enumerate() {
        match destination {
            Some(destination) if semantics == Semantics::Istio => {
                shared::destination(destination, &format!("{path}[{index}].destination"), issues);
            }
            Some(_) => {}
            None => {
                let field = format!("{path}[{index}].destination");
                refuse(issues, "destination-required", field, "destination is required");
            }
        }
        if weight < 0 {
            refuse(issues, "weight", format!("{path}[{index}].weight"), format!("weight {weight} < 0"));
        }
        total = total.wrapping_add(weight);
    }
    if several && total == 0 {
        refuse(issues, "weight", path, "total destination weight = 0");
    }
}

fn tls_route(spec: &VirtualService, route: &TlsRoute, semantics: Semantics, path: &str, issues: &mut Vec<Issue>) {
    if route.matches.is_empty() {
        let message = "TLS route must have at least one match condition";
        refuse(issues, "match-required", format!("{path}.match"), message);
    }
    for (index, item) in route.matches.iter().enumerate() {
        let path = format!("{path}.match[{index}]");
        let TlsMatch { sni_hosts, destination_subnets, port, source_labels, gateways, .. } = item;
        if sni_hosts.is_empty() {
            let message = "TLS match must have at least one SNI host";
            refuse(issues, "sni-required", format!("{path}.sniHosts"), message);
        }
        for (index, host) in sni_hosts.iter().enumerate() {
            sni_host(spec, host, format!("{path}.sniHosts[{index}]"), issues);
        }
        l4_conditions(destination_subnets, *port, source_labels, &path, issues);
        gateway_names(gateways, Semantics::Istio, &format!("{path}.gateways"), issues);
    }
    route_destinations(&route.route, semantics, "TLS route is required", path, issues);
}

fn sni_host(spec: &VirtualService, host: &str, field: String, issues: &mut Vec<Issue>) {
    let result = if is_gateway(spec) { gateway_domain(true, host) } else { predicates::wildcard_domain(host) };
    if let Err(message) = result {
        if predicates::is_ip(host) {
            let message =
                format!("using an IP address ({host:?}) goes against SNI spec and most clients do not support this");
            issues.push(Issue::warned("sni-ip", field, message));
        } else {
            refuse(issues, "sni-host", field, message);
        }
    } else if !spec.hosts.iter().any(|known| predicates::is_host_subset(host, known)) {
        let message = format!(
            "SNI host {host:?} is not a compatible subset of any of the virtual service hosts: [{}]",
            spec.hosts.join(", ")
        );
        refuse(issues, "sni-host", field, message);
    }
}

fn tcp_route(route: &TcpRoute, semantics: Semantics, path: &str, issues: &mut Vec<Issue>) {
    for (index, item) in route.matches.iter().enumerate() {
        let L4Match { destination_subnets, port, source_labels, gateways, .. } = item;
        let path = format!("{path}.match[{index}]");
        l4_conditions(destination_subnets, *port, source_labels, &path, issues);
        match_gateways(gateways, &path, issues);
    }
    route_destinations(&route.route, semantics, "TCP route is required", path, issues);
}

fn route_destinations(
    route: &[RouteDestination],
    semantics: Semantics,
    required: &str,
    path: &str,
    issues: &mut Vec<Issue>,
) {
    let path = format!("{path}.route");
    if route.is_empty() {
        refuse(issues, "route-required", &path, required);
    }
    destinations(route.iter().map(|item| (&item.destination, item.weight)), semantics, &path, issues);
}

fn l4_conditions(subnets: &[String], port: u32, labels: &Labels, path: &str, issues: &mut Vec<Issue>) {
    for (index, subnet) in subnets.iter().enumerate() {
        let field = format!("{path}.destinationSubnets[{index}]");
        check(issues, "subnet", field, predicates::ip_subnet(subnet));
    }
    shared::optional_port(port, format!("{path}.port"), issues);
    shared::labels(labels, &format!("{path}.sourceLabels"), issues);
}
