//! What Portolan checks and does not carry out: fields that pass every gate of a cluster and change no traffic here, or other
//! traffic than they ask for. Warnings all, so that nobody takes a field for served because nothing was said.

use super::finding::{Gate, Issue, Severity};
use crate::api::destination_rule::{ClientTls, ClientTlsMode, DestinationRule, LoadBalancer};
use crate::api::gateway::{Gateway, ServerTlsMode};
use crate::api::sidecar::Sidecar;
use crate::model::Object;

/// The codes of these findings.
pub const CODES: [&str; 3] = ["not-served", "served-otherwise", "needs-files"];

/// What there is to say of an object that passed validation.
pub fn of(object: &Object) -> Vec<Issue> {
    let mut issues = Vec::new();
    match object {
        Object::Gateway(gateway) => of_gateway(&gateway.spec, &mut issues),
        Object::DestinationRule(rule) => of_rule(&rule.spec, &mut issues),
        Object::Sidecar(sidecar) => of_sidecar(&sidecar.spec, &mut issues),
        _ => {}
    }
    issues
}

fn say(issues: &mut Vec<Issue>, code: &'static str, field: String, message: &str) {
    issues.push(Issue::new(Gate::Portolan, Severity::Warning, code, field, message));
}

fn of_gateway(spec: &Gateway, issues: &mut Vec<Issue>) {
    for (index, server) in spec.servers.iter().enumerate() {
        let at = format!("spec.servers[{index}]");
        if server.bind.starts_with("unix://") {
            let message = "gateways do not listen on Unix sockets: this server gets no traffic";
            say(issues, "not-served", format!("{at}.bind"), message);
        }
        let Some(tls) = &server.tls else { continue };
        let mode = format!("{at}.tls.mode");
        match tls.mode {
            ServerTlsMode::IstioMutual => {
                let message = "needs the mesh's certificates in files (--mesh-certificates of the proxy); without them clients are refused";
                say(issues, "needs-files", mode, message);
            }
            ServerTlsMode::AutoPassthrough => {
                let message =
                    "AUTO_PASSTHROUGH joins networks of a mesh, which Portolan does not: this server gets no traffic";
                say(issues, "not-served", mode, message);
            }
            _ => {}
        }
        if !tls.ecdh_curves.is_empty() {
            say(issues, "not-served", format!("{at}.tls.ecdhCurves"), "the proxy's own curves are used");
        }
    }
}

fn of_rule(spec: &DestinationRule, issues: &mut Vec<Issue>) {
    let own = spec.traffic_policy.iter().map(|policy| ("spec.trafficPolicy".to_owned(), policy));
    let subsets = spec.subsets.iter().enumerate().filter_map(|(index, subset)| {
        Some((format!("spec.subsets[{index}].trafficPolicy"), subset.traffic_policy.as_ref()?))
    });
    for (at, policy) in own.chain(subsets) {
        balancer(policy.load_balancer.as_ref(), &at, issues);
        client_tls(policy.tls.as_ref(), &at, issues);
        for (index, level) in policy.port_level_settings.iter().enumerate() {
            let at = format!("{at}.portLevelSettings[{index}]");
            balancer(level.load_balancer.as_ref(), &at, issues);
            client_tls(level.tls.as_ref(), &at, issues);
        }
        if policy.tunnel.as_ref().is_some_and(|tunnel| tunnel.protocol == "POST") {
            let message = "tunnels are made by CONNECT whatever stands here";
            say(issues, "served-otherwise", format!("{at}.tunnel.protocol"), message);
        }
    }
}

fn balancer(balancer: Option<&LoadBalancer>, at: &str, issues: &mut Vec<Issue>) {
    if balancer.is_some_and(|balancer| balancer.backend_utilization.is_some()) {
        let message = "the default balancer is used";
        say(issues, "not-served", format!("{at}.loadBalancer.backendUtilization"), message);
    }
}

fn client_tls(tls: Option<&ClientTls>, at: &str, issues: &mut Vec<Issue>) {
    let Some(tls) = tls.filter(|tls| tls.mode != ClientTlsMode::Disable) else { return };
    if tls.mode == ClientTlsMode::IstioMutual {
        let message = "needs the mesh's certificates in files (--mesh-certificates of the proxy); without them plain text is sent";
        say(issues, "needs-files", format!("{at}.tls.mode"), message);
    } else if !tls.credential_name.is_empty() {
        let message = "secrets are not read for upstreams: plain text is sent; name files in place of it";
        say(issues, "not-served", format!("{at}.tls.credentialName"), message);
    } else if tls.ca_certificates.is_empty() && !tls.insecure_skip_verify.unwrap_or_default() {
        let message = "without caCertificates the server's certificate is not verified";
        say(issues, "served-otherwise", format!("{at}.tls"), message);
    }
}

fn of_sidecar(spec: &Sidecar, issues: &mut Vec<Issue>) {
    if !spec.ingress.is_empty() {
        say(issues, "not-served", "spec.ingress".to_owned(), "inbound traffic is not Portolan's");
    }
    if spec.inbound_connection_pool.is_some() {
        say(issues, "not-served", "spec.inboundConnectionPool".to_owned(), "inbound traffic is not Portolan's");
    }
}
