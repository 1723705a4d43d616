//! Gateway: every rule of istiod's `ValidateGateway`, in its order and close to its words; and TLS at a server, which
//! a Sidecar has too.

use std::collections::{BTreeSet, HashSet};

use crate::api::gateway::{Gateway, Port, Server, ServerTls, ServerTlsMode, TlsCertificate, TlsProtocol};
use crate::model::{Meta, Protocol};
use crate::validate::finding::Issue;
use crate::validate::predicates;
use crate::validate::service_entry::{is_http, is_tls, protocol};
use crate::validate::shared::{check, refuse};

/// The cipher suites that Envoy's BoringSSL knows.
const CIPHERS: [&str; 15] = [
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-RSA-AES256-SHA",
    "AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-SHA",
    "AES256-SHA",
    "DES-CBC3-SHA",
];

/// What istiod's webhook says of the spec.
pub fn validate(meta: &Meta, spec: &Gateway) -> Vec<Issue> {
    let mut issues = Vec::new();
    // Istio's own rendering of a Gateway of the Gateway API.
    let rendered = meta.annotations.get("internal.istio.io/gateway-semantics").is_some_and(|value| value == "gateway");
    if !rendered && !predicates::is_dns_label(&meta.name) {
        refuse(&mut issues, "gateway-name", "metadata.name", format!("invalid gateway name: {:?}", meta.name));
    }
    if spec.servers.is_empty() {
        refuse(&mut issues, "servers-required", "spec.servers", "gateway must have at least one server");
    }
    let mut names = HashSet::new();
    for (index, item) in spec.servers.iter().enumerate() {
        let path = format!("spec.servers[{index}]");
        server(item, rendered, &path, &mut issues);
        let Some(port) = &item.port else { continue };
        if !names.insert(&port.name) {
            let message = format!("port names in servers must be unique: duplicate name {}", port.name);
            refuse(&mut issues, "port-name-duplicate", format!("{path}.port.name"), message);
        }
        if item.tls.as_ref().is_some_and(|tls| tls.https_redirect) && !is_http(known_protocol(&port.protocol)) {
            let message = "tls.httpsRedirect should only be used with http servers";
            issues.push(Issue::warned("https-redirect", format!("{path}.tls.httpsRedirect"), message));
        }
    }
    issues
}

/// The protocol of that name; here an empty name is none.
pub(super) fn known_protocol(name: &str) -> Option<Protocol> {
    protocol(name).filter(|known| *known != Protocol::Auto)
}

fn server(server: &Server, rendered: bool, path: &str, issues: &mut Vec<Issue>) {
    if server.hosts.is_empty() {
        refuse(issues, "hosts-required", format!("{path}.hosts"), "server config must contain at least one host");
    }
    for (index, host) in server.hosts.iter().enumerate() {
        gateway_host(host, rendered, &format!("{path}.hosts[{index}]"), issues);
    }
    let unix = server.bind.strip_prefix("unix://");
    let before = issues.len();
    match &server.port {
        Some(port) => server_port(port, unix.is_some(), &format!("{path}.port"), issues),
        None => refuse(issues, "port-required", format!("{path}.port"), "port is required"),
    }
    let port_is_good = issues.len() == before;
    let field = format!("{path}.bind");
    if let Some(socket) = unix {
        check(issues, "unix-path", &field, predicates::unix_path(socket));
        if let Some(port) = server.port.as_ref().filter(|port| port.number != 0) {
            let message = format!("port number must be 0 for unix domain socket: {}", port.number);
            refuse(issues, "unix-port", field, message);
        }
    } else if !server.bind.is_empty() && !predicates::is_ip(&server.bind) {
        refuse(issues, "bind", field, format!("{} is not a valid IP", server.bind));
    }
    if let Some(tls) = &server.tls {
        server_tls(tls, &format!("{path}.tls"), issues);
    }
    if let Some(port) = server.port.as_ref().filter(|_| port_is_good) {
        tls_fits_protocol(server.tls.as_ref(), known_protocol(&port.protocol), &format!("{path}.tls"), issues);
    }
}

fn tls_fits_protocol(tls: Option<&ServerTls>, protocol: Option<Protocol>, field: &str, issues: &mut Vec<Issue>) {
    match tls {
        None if is_tls(protocol) => {
            refuse(issues, "tls-required", field, "server must have TLS settings for HTTPS/TLS protocols");
        }
        Some(tls) if !is_tls(protocol) && is_http(protocol) => {
            // A redirect to HTTPS is all that plain HTTP may say there.
            let files = [&tls.ca_certificates, &tls.private_key, &tls.server_certificate];
            if !is_passthrough(tls.mode) || files.iter().any(|file| !file.is_empty()) {
                refuse(issues, "tls-on-http", field, "server cannot have TLS settings for plain text HTTP ports");
            }
        }
        Some(_) if !is_tls(protocol) => {
            refuse(issues, "tls-on-tcp", field, "server cannot have TLS settings for non HTTPS/TLS ports");
        }
        _ => {}
    }
}

fn is_passthrough(mode: ServerTlsMode) -> bool {
    matches!(mode, ServerTlsMode::Passthrough | ServerTlsMode::AutoPassthrough)
}

fn server_port(port: &Port, unix: bool, path: &str, issues: &mut Vec<Issue>) {
    if known_protocol(&port.protocol).is_none() {
        let message = format!(
            "invalid protocol {:?}, supported protocols are HTTP, HTTP2, GRPC, GRPC-WEB, MONGO, REDIS, MYSQL, TCP",
            port.protocol
        );
        refuse(issues, "protocol", format!("{path}.protocol"), message);
    }
    if port.number > 0 || !unix {
        check(issues, "port-range", format!("{path}.number"), predicates::port(port.number));
    }
    if port.target_port > 0 {
        let message = "targetPort has no impact on Gateways";
        refuse(issues, "target-port", format!("{path}.targetPort"), message);
    }
    if port.name.is_empty() {
        refuse(issues, "port-name", format!("{path}.name"), "port name must be set");
    }
}

/// `[namespace/]name`, with `*` and `.` as namespaces.
fn gateway_host(host: &str, rendered: bool, field: &str, issues: &mut Vec<Issue>) {
    let Some((namespace, name)) = host.split_once('/') else {
        host_name(host, true, field, issues);
        return;
    };
    if namespace.is_empty() || name.is_empty() {
        let message = "config namespace and dnsName in host entry cannot be empty";
        refuse(issues, "host", field, message);
    }
    let special = matches!(namespace, "*" | ".") || rendered && namespace == "~";
    if !special && !predicates::is_dns_label(namespace) {
        refuse(issues, "host", field, format!("invalid namespace value {namespace:?} in gateway"));
    }
    host_name(name, true, field, issues);
}

/// The name in a host entry of a Gateway, or of a Sidecar, where an address is none.
pub(super) fn host_name(name: &str, address_allowed: bool, field: &str, issues: &mut Vec<Issue>) {
    if name != "*" && !name.contains('.') {
        refuse(issues, "host-short", field, "short names (non FQDN) are not allowed");
    }
    if !(address_allowed && predicates::is_ip(name)) {
        check(issues, "host", field, predicates::wildcard_domain(name));
    }
    if predicates::is_partial_wildcard(name) {
        refuse(issues, "partial-wildcard", field, format!("partial wildcard {name:?} not allowed"));
    }
}

/// TLS at a server.
pub(super) fn server_tls(tls: &ServerTls, path: &str, issues: &mut Vec<Issue>) {
    versions_and_ciphers(tls, path, issues);
    if tls.mode == ServerTlsMode::IstioMutual {
        let own = [
            (!tls.server_certificate.is_empty(), "serverCertificate"),
            (!tls.private_key.is_empty(), "privateKey"),
            (!tls.ca_certificates.is_empty(), "caCertificates"),
            (!tls.tls_certificates.is_empty(), "tlsCertificates"),
            (!tls.credential_name.is_empty(), "credentialName"),
            (!tls.credential_names.is_empty(), "credentialNames"),
        ];
        for (_, name) in own.into_iter().filter(|(given, _)| *given) {
            let message = format!("ISTIO_MUTUAL TLS cannot have associated {name}");
            refuse(issues, "istio-mutual", format!("{path}.{name}"), message);
        }
        return;
    }
    let by_file = !tls.server_certificate.is_empty() && !tls.private_key.is_empty();
    let by_name = !tls.credential_name.is_empty();
    let by_names = !tls.credential_names.is_empty();
    let by_files = !tls.tls_certificates.is_empty();
    if is_passthrough(tls.mode) {
        let files = [&tls.ca_crl, &tls.server_certificate, &tls.private_key, &tls.ca_certificates];
        if files.iter().any(|file| !file.is_empty()) || by_name || by_names || by_files {
            let message = "PASSTHROUGH and AUTO_PASSTHROUGH do not use certificates, they will be ignored";
            issues.push(Issue::warned("certificates-ignored", path, message));
        }
    }
    if [by_file, by_name, by_names, by_files].into_iter().filter(|given| *given).count() > 1 {
        let message = "only one of credential_name, credential_names, server_certificate/private_key, \
                       tls_certificates should be specified";
        refuse(issues, "certificate-sources", path, message);
    }
    let mutual = matches!(tls.mode, ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual);
    let simple = tls.mode == ServerTlsMode::Simple;
    if (mutual || simple) && (by_name || by_names) {
        return;
    }
    if mutual || simple {
        certificates(tls, mutual, path, issues);
    }
    if !tls.ca_crl.is_empty() {
        let field = format!("{path}.caCrl");
        if by_name {
            let message = "CRL is not supported with credentialName. CRL has to be specified in the credential";
            refuse(issues, "crl", &field, message);
        }
        if simple {
            refuse(issues, "crl", field, "CRL is not supported with SIMPLE TLS");
        }
    }
}

fn certificates(tls: &ServerTls, mutual: bool, path: &str, issues: &mut Vec<Issue>) {
    let mode = if mutual { "MUTUAL" } else { "SIMPLE" };
    if mutual && tls.ca_certificates.is_empty() {
        let message = format!("{mode} TLS requires a client CA bundle");
        refuse(issues, "ca-required", format!("{path}.caCertificates"), message);
    }
    if tls.tls_certificates.len() > 2 {
        let message = format!("{mode} TLS can support up to 2 server certificates");
        issues.push(Issue::warned("certificate-count", format!("{path}.tlsCertificates"), message));
    }
    let mut pair = |certificate: &str, key: &str, path: &str| {
        if certificate.is_empty() {
            let message = format!("{mode} TLS requires a server certificate");
            refuse(issues, "certificate-required", format!("{path}.serverCertificate"), message);
        }
        if key.is_empty() {
            let message = format!("{mode} TLS requires a private key");
            refuse(issues, "certificate-required", format!("{path}.privateKey"), message);
        }
    };
    if tls.tls_certificates.is_empty() {
        pair(&tls.server_certificate, &tls.private_key, path);
    }
    for (index, TlsCertificate { server_certificate, private_key, .. }) in tls.tls_certificates.iter().enumerate() {
        pair(server_certificate, private_key, &format!("{path}.tlsCertificates[{index}]"));
    }
}

fn versions_and_ciphers(tls: &ServerTls, path: &str, issues: &mut Vec<Issue>) {
    let old = matches!(tls.min_protocol_version, TlsProtocol::V1_0 | TlsProtocol::V1_1);
    if old && tls.cipher_suites.is_empty() {
        let message = "TLS version below TLSV1_2 require setting compatible ciphers as by default they no longer \
                       include compatible ciphers.";
        issues.push(Issue::warned("tls-version", format!("{path}.minProtocolVersion"), message));
    }
    let (mut seen, mut unknown, mut twice) = (HashSet::new(), BTreeSet::new(), BTreeSet::new());
    for cipher in tls.cipher_suites.iter().map(String::as_str) {
        if !is_cipher(cipher) {
            unknown.insert(cipher);
        } else if !seen.insert(cipher) {
            twice.insert(cipher);
        }
    }
    for (what, ciphers) in [("invalid", unknown), ("duplicate", twice)] {
        if !ciphers.is_empty() {
            let list: Vec<&str> = ciphers.into_iter().collect();
            let message = format!("ignoring {what} cipher suites: [{}]", list.join(" "));
            issues.push(Issue::warned("cipher-suites", format!("{path}.cipherSuites"), message));
        }
    }
}

/// A suite, or an expression of them (`-ALL`), which is not looked into.
fn is_cipher(name: &str) -> bool {
    !name.starts_with(char::is_alphanumeric) || name == "ALL" || CIPHERS.contains(&name)
}
