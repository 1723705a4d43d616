//! The traffic policy of a DestinationRule, and the connection pools of a Sidecar.

use std::collections::HashSet;

use crate::api::destination_rule::{
    ClientTls, ClientTlsMode, ConnectionPool, ConsistentHash, H2UpgradePolicy, LoadBalancer, OutlierDetection,
    PortTrafficPolicy, ProxyProtocolVersion, TrafficPolicy, Tunnel,
};
use crate::validate::finding::{Issue, Severity};
use crate::validate::shared::{self, check, refuse};
use crate::validate::{locality, predicates};

/// What istiod says of a policy in `namespace`.
pub(super) fn validate(namespace: &str, policy: &TrafficPolicy, path: &str, issues: &mut Vec<Issue>) {
    if *policy == TrafficPolicy::default() {
        refuse(issues, "policy-empty", path, "traffic policy must have at least one field");
        return;
    }
    if policy.tunnel.is_some() && policy.proxy_protocol.is_some() {
        refuse(issues, "tunnel", path, "tunnel and proxyProtocol must not be set together");
        return;
    }
    let outlier = policy.outlier_detection.as_ref();
    blocks(
        namespace,
        outlier,
        policy.connection_pool.as_ref(),
        policy.load_balancer.as_ref(),
        policy.tls.as_ref(),
        path,
        issues,
    );
    for (index, item) in policy.port_level_settings.iter().enumerate() {
        // What is only a warning elsewhere is not even that here.
        let mut found = Vec::new();
        port_level(namespace, item, &format!("{path}.portLevelSettings[{index}]"), &mut found);
        issues.extend(found.into_iter().filter(|issue| issue.severity == Severity::Error));
    }
    if let Some(tunnel) = &policy.tunnel {
        self::tunnel(tunnel, &format!("{path}.tunnel"), issues);
    }
    if let Some(ProxyProtocolVersion::Other(version)) = policy.proxy_protocol.as_ref().map(|proxy| proxy.version) {
        let message = format!("proxy protocol version is invalid: {version}");
        refuse(issues, "proxy-protocol", format!("{path}.proxyProtocol.version"), message);
    }
}

fn port_level(namespace: &str, item: &PortTrafficPolicy, path: &str, issues: &mut Vec<Issue>) {
    let PortTrafficPolicy { port, load_balancer, connection_pool, outlier_detection, tls } = item;
    if port.is_none() {
        refuse(issues, "port-required", path, "portTrafficPolicy must have valid port");
    }
    if load_balancer.is_none() && connection_pool.is_none() && outlier_detection.is_none() && tls.is_none() {
        refuse(issues, "policy-empty", path, "port traffic policy must have at least one field");
    }
    let outlier = outlier_detection.as_ref();
    blocks(namespace, outlier, connection_pool.as_ref(), load_balancer.as_ref(), tls.as_ref(), path, issues);
}

fn blocks(
    namespace: &str,
    outlier: Option<&OutlierDetection>,
    pool: Option<&ConnectionPool>,
    balancer: Option<&LoadBalancer>,
    tls: Option<&ClientTls>,
    path: &str,
    issues: &mut Vec<Issue>,
) {
    if let Some(outlier) = outlier {
        outlier_detection(outlier, &format!("{path}.outlierDetection"), issues);
    }
    if let Some(pool) = pool {
        connection_pool(pool, &format!("{path}.connectionPool"), issues);
    }
    if let Some(balancer) = balancer {
        load_balancer(balancer, outlier.is_some(), &format!("{path}.loadBalancer"), issues);
    }
    if let Some(tls) = tls {
        client_tls(namespace, tls, &format!("{path}.tls"), issues);
    }
}

fn outlier_detection(outlier: &OutlierDetection, path: &str, issues: &mut Vec<Issue>) {
    shared::duration(outlier.base_ejection_time, &format!("{path}.baseEjectionTime"), issues);
    if outlier.consecutive_errors != 0 {
        let message = "outlier detection consecutive errors is deprecated, use consecutiveGatewayErrors or \
                       consecutive5xxErrors instead";
        issues.push(Issue::warned("deprecated", format!("{path}.consecutiveErrors"), message));
    }
    if !outlier.split_external_local_origin_errors && outlier.consecutive_local_origin_failures.unwrap_or(0) > 0 {
        let message = "outlier detection consecutive local origin failures is specified, but split external local \
                       origin errors is set to false";
        refuse(issues, "outlier", format!("{path}.consecutiveLocalOriginFailures"), message);
    }
    shared::duration(outlier.interval, &format!("{path}.interval"), issues);
    let shares =
        [("maxEjectionPercent", outlier.max_ejection_percent), ("minHealthPercent", outlier.min_health_percent)];
    for (name, share) in shares {
        if !(0..=100).contains(&share) {
            let message = format!("percentage {share} is not in range 0..100");
            refuse(issues, "percentage", format!("{path}.{name}"), message);
        }
    }
}

/// Limits on connections.
pub(super) fn connection_pool(pool: &ConnectionPool, path: &str, issues: &mut Vec<Issue>) {
    if pool.http.is_none() && pool.tcp.is_none() {
        refuse(issues, "pool-empty", path, "connection pool must have at least one field");
    }
    let mut limits = Vec::new();
    let mut durations = Vec::new();
    if let Some(http) = &pool.http {
        limits.extend([
            ("http.http1MaxPendingRequests", http.http1_max_pending_requests),
            ("http.http2MaxRequests", http.http2_max_requests),
            ("http.maxRequestsPerConnection", http.max_requests_per_connection),
            ("http.maxRetries", http.max_retries),
            ("http.maxConcurrentStreams", http.max_concurrent_streams),
        ]);
        durations.push(("http.idleTimeout", http.idle_timeout));
        if http.h2_upgrade_policy == H2UpgradePolicy::Upgrade && http.use_client_protocol {
            let message = "use client protocol must not be true when H2UpgradePolicy is UPGRADE";
            refuse(issues, "client-protocol", format!("{path}.http.useClientProtocol"), message);
        }
        if let Some(keep_alive) = &http.http2_keep_alive {
            for (name, value) in [("interval", keep_alive.interval), ("timeout", keep_alive.timeout)] {
                let field = format!("{path}.http.http2KeepAlive.{name}");
                if value.is_none() {
                    refuse(issues, "keep-alive", &field, format!("http2 keepalive {name} is required"));
                }
                shared::duration(value, &field, issues);
            }
        }
    }
    if let Some(tcp) = &pool.tcp {
        limits.push(("tcp.maxConnections", tcp.max_connections));
        durations.push(("tcp.connectTimeout", tcp.connect_timeout));
        durations.push(("tcp.maxConnectionDuration", tcp.max_connection_duration));
        // Less than a millisecond switches the timeout off.
        durations.push(("tcp.idleTimeout", tcp.idle_timeout.filter(|timeout| timeout.as_millis() != 0)));
        if let Some(keepalive) = &tcp.tcp_keepalive {
            durations.push(("tcp.tcpKeepalive.time", keepalive.time));
            durations.push(("tcp.tcpKeepalive.interval", keepalive.interval));
        }
    }
    for (name, limit) in limits.into_iter().filter(|(_, limit)| *limit < 0) {
        let field = format!("{path}.{name}");
        refuse(issues, "pool-limit", field, format!("{name} must be non-negative (it is {limit})"));
    }
    for (name, value) in durations {
        shared::duration(value, &format!("{path}.{name}"), issues);
    }
}

fn load_balancer(balancer: &LoadBalancer, outlier: bool, path: &str, issues: &mut Vec<Issue>) {
    if let Some(hash) = &balancer.consistent_hash {
        consistent_hash(hash, &format!("{path}.consistentHash"), issues);
    }
    if balancer.locality_lb_setting.is_some() && balancer.zone_aware_lb_setting.is_some() {
        let message = "only one of localityLbSetting and zoneAwareLbSetting can be set";
        refuse(issues, "locality", format!("{path}.zoneAwareLbSetting"), message);
    }
    if let Some(setting) = &balancer.locality_lb_setting {
        locality::locality(setting, outlier, &format!("{path}.localityLbSetting"), issues);
    }
    if let Some(setting) = &balancer.zone_aware_lb_setting {
        locality::zone_aware(setting, outlier, &format!("{path}.zoneAwareLbSetting"), issues);
    }
    if let Some(warmup) = &balancer.warmup {
        let path = format!("{path}.warmup");
        if warmup.duration.is_none() {
            refuse(issues, "warmup", &path, "duration is required");
        }
        shared::duration(warmup.duration, &format!("{path}.duration"), issues);
        if warmup.minimum_percent.is_some_and(|percent| percent > 100.0) {
            let message = "minimumPercent value should be less than or equal to 100";
            refuse(issues, "warmup", format!("{path}.minimumPercent"), message);
        }
        if warmup.aggression.is_some_and(|aggression| aggression <= 0.0) {
            refuse(issues, "warmup", format!("{path}.aggression"), "aggression should be greater than 0");
        }
    }
}

fn consistent_hash(hash: &ConsistentHash, path: &str, issues: &mut Vec<Issue>) {
    if let Some(cookie) = &hash.http_cookie {
        let path = format!("{path}.httpCookie");
        if cookie.name.is_empty() {
            refuse(issues, "cookie", format!("{path}.name"), "name required for HttpCookie");
        }
        let mut names = HashSet::new();
        for (index, attribute) in cookie.attributes.iter().enumerate() {
            let field = format!("{path}.attributes[{index}].name");
            if attribute.name.is_empty() {
                refuse(issues, "cookie", field, "cookie attribute name cannot be empty");
            } else if !names.insert(&attribute.name) {
                refuse(issues, "cookie", field, format!("duplicate cookie attribute name: {}", attribute.name));
            }
        }
    }
    if hash.minimum_ring_size != 0 {
        let field = format!("{path}.minimumRingSize");
        let message =
            "consistent hash MinimumRingSize is deprecated, use ConsistentHashLB's RingHash configuration instead";
        issues.push(Issue::warned("deprecated", &field, message));
        if hash.ring_hash.is_some() || hash.maglev.is_some() {
            refuse(issues, "ring-size", field, "only one of MinimumRingSize or Maglev/Ringhash can be specified");
        }
    }
    if let Some(maglev) = &hash.maglev {
        let field = format!("{path}.maglev.tableSize");
        if maglev.table_size == 0 {
            refuse(issues, "maglev", &field, "tableSize must be set for maglev");
        }
        if maglev.table_size >= 5_000_011 {
            refuse(issues, "maglev", &field, "tableSize must be less than 5000011 for maglev");
        } else if !is_prime(maglev.table_size) {
            refuse(issues, "maglev", field, "tableSize must be a prime number for maglev");
        }
    }
}

/// As Envoy asks: 1 counts.
fn is_prime(number: u64) -> bool {
    match number {
        1..4 => true,
        _ if number.is_multiple_of(2) => false,
        _ => {
            (3..).step_by(2).take_while(|factor| factor * factor <= number).all(|factor| !number.is_multiple_of(factor))
        }
    }
}

fn client_tls(namespace: &str, tls: &ClientTls, path: &str, issues: &mut Vec<Issue>) {
    use ClientTlsMode::{Mutual, Simple};
    if let Some(reference) = tls.credential_name.strip_prefix("configmap://") {
        let field = format!("{path}.credentialName");
        let mut parts = reference.split('/');
        match (parts.next(), parts.next()) {
            (Some(there), Some(name)) if !there.is_empty() && !name.is_empty() => {
                if there != namespace {
                    let message = format!(
                        "invalid configmap:// credentialName: namespace must match the configuration namespace \
                         {namespace:?}"
                    );
                    refuse(issues, "credential", field, message);
                }
            }
            _ => {
                let message = "invalid configmap:// credentialName: expected namespace and name";
                refuse(issues, "credential", field, message);
            }
        }
    }
    if tls.insecure_skip_verify == Some(true) {
        let field = format!("{path}.insecureSkipVerify");
        let authorities = !tls.ca_certificates.is_empty() || !tls.subject_alt_names.is_empty();
        if tls.mode == Simple && (authorities || !tls.credential_name.is_empty()) {
            let message = "cannot specify CaCertificates or CredentialName or SubjectAltNames when InsecureSkipVerify \
                           is set true";
            refuse(issues, "skip-verify", field, message);
        } else if tls.mode == Mutual && authorities {
            let message = "cannot specify CaCertificates or SubjectAltNames when InsecureSkipVerify is set true";
            refuse(issues, "skip-verify", field, message);
        }
    }
    if matches!(tls.mode, Simple | Mutual) && !tls.credential_name.is_empty() {
        let files = [&tls.client_certificate, &tls.ca_certificates, &tls.private_key, &tls.ca_crl];
        if files.iter().any(|file| !file.is_empty()) {
            let message = "cannot specify client certificates or CA certificate or CA CRL If credentialName is set";
            refuse(issues, "credential", format!("{path}.credentialName"), message);
        }
        return;
    }
    if tls.mode == Mutual {
        if tls.client_certificate.is_empty() {
            let message = "client certificate required for mutual tls";
            refuse(issues, "client-certificate", format!("{path}.clientCertificate"), message);
        }
        if tls.private_key.is_empty() {
            let message = "private key required for mutual tls";
            refuse(issues, "client-certificate", format!("{path}.privateKey"), message);
        }
    }
}

fn tunnel(tunnel: &Tunnel, path: &str, issues: &mut Vec<Issue>) {
    if !matches!(tunnel.protocol.as_str(), "" | "CONNECT" | "POST") {
        let message = "tunnel protocol must be \"CONNECT\" or \"POST\"";
        refuse(issues, "tunnel", format!("{path}.protocol"), message);
    }
    if let Err(reason) = predicates::fqdn(&tunnel.target_host)
        && !predicates::is_ip(&tunnel.target_host)
    {
        let message = format!("tunnel target host must be valid FQDN or IP address: {reason}");
        refuse(issues, "tunnel", format!("{path}.targetHost"), message);
    }
    check(issues, "port-range", format!("{path}.targetPort"), predicates::port(tunnel.target_port));
}

#[cfg(test)]
mod tests {
    use super::is_prime;

    #[test]
    fn primes() {
        let found: Vec<u64> = (0..30).filter(|&number| is_prime(number)).collect();
        assert_eq!(found, [1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29]);
        assert!(is_prime(65_537) && !is_prime(65_536));
    }
}
