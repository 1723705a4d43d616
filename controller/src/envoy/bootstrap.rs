//! The bootstrap of an Envoy: who it is, where the controller is, and what it may use. Everything else it is told.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use serde_json::{Value, json};

use super::BLACK_HOLE;
use super::settings::{FIELD, MESH_CERTIFICATES, Settings};

/// Name of the controller's cluster.
pub const CONTROLLER: &str = "portolan";

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// How Envoy speaks to the controller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ControllerTls {
    /// Authorities of the controller's certificate, PEM.
    pub ca: String,
    /// Name that the certificate must have.
    pub name: String,
    /// Envoy's own certificate and key, PEM.
    pub own: Option<(String, String)>,
    /// Folder of the files that name the certificates, so that Envoy reads them again when they change; `None`: it reads
    /// them when it starts.
    pub secrets: Option<String>,
}

/// Name of the file and of the secret for Envoy's own certificate.
const OWN: &str = "own-certificate";
/// The same for the authorities of the controller's.
const AUTHORITIES: &str = "authorities";

impl ControllerTls {
    /// The files that belong into the folder of secrets, by name.
    pub fn secret_files(&self) -> Vec<(String, Value)> {
        const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
        let list = |secret: Value| json!({ "resources": [secret] });
        let file = |name: &str| json!({ "filename": name });
        // A file in the place of an old one is seen in its folder; a Kubernetes volume changes a link there.
        let around = |name: &str| {
            let folder = Path::new(name).parent().filter(|folder| !folder.as_os_str().is_empty());
            json!({ "path": folder.unwrap_or(Path::new(".")) })
        };
        let mut out = vec![(
            format!("{AUTHORITIES}.json"),
            list(json!({ "@type": SECRET, "name": AUTHORITIES, "validation_context": {
                "trusted_ca": file(&self.ca), "watched_directory": around(&self.ca),
            } })),
        )];
        out.extend(self.own.iter().map(|(certificate, key)| {
            let own = json!({
                "certificate_chain": file(certificate), "private_key": file(key), "watched_directory": around(certificate),
            });
            (format!("{OWN}.json"), list(json!({ "@type": SECRET, "name": OWN, "tls_certificate": own })))
        }));
        out
    }

    /// The certificates of a connection to the controller.
    fn certificates(&self) -> Value {
        let name = match self.name.starts_with("spiffe://") {
            true => json!({ "san_type": "URI", "matcher": { "exact": self.name } }),
            false => json!({ "san_type": "DNS", "matcher": { "exact": self.name } }),
        };
        let validation = json!({ "match_typed_subject_alt_names": [name] });
        let mut out = json!({ "alpn_protocols": ["h2"] });
        if let Some(folder) = &self.secrets {
            let secret = |name: &str| {
                let path = Path::new(folder).join(format!("{name}.json"));
                let source = json!({ "path": path, "watched_directory": { "path": folder } });
                json!({ "name": name, "sds_config": { "path_config_source": source } })
            };
            out["combined_validation_context"] = json!({
                "default_validation_context": validation, "validation_context_sds_secret_config": secret(AUTHORITIES),
            });
            if self.own.is_some() {
                out["tls_certificate_sds_secret_configs"] = json!([secret(OWN)]);
            }
            return out;
        }
        let file = |name: &str| json!({ "filename": name });
        out["validation_context"] = validation;
        out["validation_context"]["trusted_ca"] = file(&self.ca);
        let own = self.own.iter();
        out["tls_certificates"] =
            own.map(|(chain, key)| json!({ "certificate_chain": file(chain), "private_key": file(key) })).collect();
        out
    }
}

/// What an Envoy may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Heap in bytes; near it, connections and requests are refused.
    pub heap: u64,
    /// Connections from clients, at a time.
    pub connections: u64,
}

/// Everything that goes into a bootstrap.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    /// `sidecar` or `router`.
    pub kind: &'static str,
    /// Name of the workload.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its addresses, at least one.
    pub ips: Vec<IpAddr>,
    /// region/zone/subzone
    pub locality: String,
    /// Host and port of the controller.
    pub controller: (String, u16),
    /// `None`: plain text.
    pub tls: Option<ControllerTls>,
    /// Folder of the mesh's certificates, where Envoy runs.
    pub mesh_certificates: Option<String>,
    /// What the listeners need to know.
    pub settings: Settings,
    /// Envoy's own admin port.
    pub admin: SocketAddr,
    /// What it may use.
    pub limits: Limits,
}

impl Bootstrap {
    /// The bootstrap as Envoy reads it.
    pub fn to_json(&self) -> Value {
        let ads = json!({ "resource_api_version": "V3", "ads": {} });
        json!({
            "node": self.node(),
            "admin": { "address": socket(&self.admin.ip().to_string(), self.admin.port()) },
            "dynamic_resources": {
                "lds_config": ads,
                // Those that get copies of requests; the others are asked for on demand.
                "cds_config": ads,
                "ads_config": {
                    "api_type": "DELTA_GRPC",
                    "transport_api_version": "V3",
                    "set_node_on_first_message_only": true,
                    "grpc_services": [{ "envoy_grpc": { "cluster_name": CONTROLLER } }],
                },
            },
            "static_resources": {
                "clusters": [
                    self.controller(),
                    { "name": BLACK_HOLE, "type": "STATIC", "connect_timeout": "1s" },
                ],
            },
            "overload_manager": self.overload(),
            // A cluster's statistics take memory when the first request needs them.
            "deferred_stat_options": { "enable_deferred_creation_stats": true },
        })
    }

    fn node(&self) -> Value {
        let ips: Vec<String> = self.ips.iter().map(ToString::to_string).collect();
        let (first, name, namespace) = (ips.first().map_or("", String::as_str), &self.name, &self.namespace);
        let mut locality = self.locality.splitn(3, '/');
        let mut part = || locality.next().unwrap_or_default();
        json!({
            "id": format!("{}~{first}~{name}.{namespace}~{namespace}.svc.cluster.local", self.kind),
            "cluster": format!("{name}.{namespace}"),
            "locality": { "region": part(), "zone": part(), "sub_zone": part() },
            "metadata": {
                "NAMESPACE": namespace,
                "LABELS": self.labels,
                "INSTANCE_IPS": ips.join(","),
                MESH_CERTIFICATES: self.mesh_certificates.as_deref().unwrap_or_default(),
                FIELD: self.settings,
            },
        })
    }

    fn controller(&self) -> Value {
        let (host, port) = &self.controller;
        let kind = if host.parse::<IpAddr>().is_ok() { "STATIC" } else { "STRICT_DNS" };
        let mut cluster = json!({
            "name": CONTROLLER,
            "type": kind,
            "connect_timeout": "2s",
            "typed_extension_protocol_options": { HTTP_OPTIONS: {
                "@type": format!("type.googleapis.com/{HTTP_OPTIONS}"),
                "explicit_http_config": { "http2_protocol_options": {
                    "connection_keepalive": { "interval": "30s", "timeout": "10s" },
                } },
            } },
            "load_assignment": {
                "cluster_name": CONTROLLER,
                "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": socket(host, *port) } }] }],
            },
        });
        if let Some(tls) = &self.tls {
            let mut context = json!({
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": tls.certificates(),
            });
            if !tls.name.starts_with("spiffe://") {
                context["sni"] = tls.name.as_str().into();
            }
            cluster["transport_socket"] = json!({ "name": "envoy.transport_sockets.tls", "typed_config": context });
        }
        cluster
    }

    fn overload(&self) -> Value {
        let heap = "envoy.resource_monitors.fixed_heap";
        let connections = "envoy.resource_monitors.global_downstream_max_connections";
        let kind = |of: &str, message: &str| {
            format!("type.googleapis.com/envoy.extensions.resource_monitors.{of}.v3.{message}")
        };
        let at = |action: &str, value: f64| {
            let trigger = json!({ "name": heap, "threshold": { "value": value } });
            json!({ "name": format!("envoy.overload_actions.{action}"), "triggers": [trigger] })
        };
        json!({
            "refresh_interval": "0.25s",
            "resource_monitors": [
                { "name": heap, "typed_config": {
                    "@type": kind("fixed_heap", "FixedHeapConfig"),
                    "max_heap_size_bytes": self.limits.heap,
                } },
                { "name": connections, "typed_config": {
                    "@type": kind("downstream_connections", "DownstreamConnectionsConfig"),
                    "max_active_downstream_connections": self.limits.connections,
                } },
            ],
            "actions": [at("shrink_heap", 0.9), at("stop_accepting_connections", 0.95), at("stop_accepting_requests", 0.98)],
        })
    }
}

fn socket(address: &str, port: u16) -> Value {
    json!({ "socket_address": { "address": address, "port_value": port } })
}
