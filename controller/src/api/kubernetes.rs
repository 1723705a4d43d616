//! The Kubernetes resources that bear on where traffic goes. They are decoded, not judged: an API server has done that.

use std::collections::BTreeMap;

use crate::api::decode::{self, Fields, Path};
use crate::config::tree::{Node, Value};
use crate::model::{EndpointSlice, Meta, Pod, Protocol, Service, ServicePort};
use crate::validate::finding::Issue;
use crate::validate::service_entry::protocol;

/// Ports that servers speak first on, so that Istio does not sniff them.
const SERVER_FIRST: [u32; 4] = [25, 53, 3306, 27017];

/// Reads a core `Service`.
pub fn service(meta: Meta, root: &Node, issues: &mut Vec<Issue>) -> Service {
    let path = Path::root("spec");
    let mut spec = Fields::of(root.get("spec"), &path, issues);
    let mut target_port_names = BTreeMap::new();
    let ports = decode::list(spec.take("ports"), &path.field("ports"), issues, |node, path, issues| {
        let mut fields = Fields::of(Some(node), path, issues);
        let number = decode::uint32(fields.take("port"), &path.field("port"), issues);
        let name = decode::string(fields.take("name"), &path.field("name"), issues);
        let transport = decode::string(fields.take("protocol"), &path.field("protocol"), issues);
        let app = decode::string(fields.take("appProtocol"), &path.field("appProtocol"), issues);
        let target = fields.take("targetPort");
        let target_port = match target.map(|node| &node.value) {
            Some(Value::String(text)) if text.parse::<u16>().is_err() => {
                target_port_names.insert(name.clone(), text.clone());
                0
            }
            _ => decode::uint32(target, &path.field("targetPort"), issues),
        };
        Some(ServicePort {
            number: u16::try_from(number).ok().filter(|&number| number != 0)?,
            protocol: port_protocol(number, &name, &transport, &app),
            name,
            target_port: u16::try_from(target_port).ok().filter(|&number| number != 0),
        })
    });
    let cluster_ip = decode::string(spec.take("clusterIP"), &path.field("clusterIP"), issues);
    let mut cluster_ips = decode::strings(spec.take("clusterIPs"), &path.field("clusterIPs"), issues);
    if cluster_ips.is_empty() && !cluster_ip.is_empty() {
        cluster_ips.push(cluster_ip.clone());
    }
    let headless = cluster_ip == "None" || cluster_ips.iter().any(|ip| ip == "None");
    cluster_ips.retain(|ip| ip != "None");
    let kind = decode::string(spec.take("type"), &path.field("type"), issues);
    let external_name = decode::string(spec.take("externalName"), &path.field("externalName"), issues);
    let selector = spec.take("selector");
    let export_to = meta.annotations.get("networking.istio.io/exportTo").map_or_else(Vec::new, |list| {
        list.split(',').map(str::trim).filter(|entry| !entry.is_empty()).map(str::to_owned).collect()
    });
    Service {
        ports: ports.into_iter().flatten().collect(),
        target_port_names,
        cluster_ips,
        headless,
        external_name: (kind == "ExternalName" && !external_name.is_empty()).then_some(external_name),
        selector: selector.map(|node| decode::string_map(Some(node), &path.field("selector"), issues)),
        export_to,
        meta,
    }
}

/// Istio's choice: the transport, then `appProtocol`, then the port's name up to the first dash.
fn port_protocol(number: u32, name: &str, transport: &str, app: &str) -> Protocol {
    if transport == "UDP" {
        return Protocol::Udp;
    }
    let known = match app {
        "" => {
            let lower = name.to_ascii_lowercase();
            if lower.starts_with("grpc-web") {
                return Protocol::GrpcWeb;
            }
            protocol(lower.split('-').next().unwrap_or_default())
        }
        "kubernetes.io/h2c" => Some(Protocol::Http2),
        "kubernetes.io/ws" => Some(Protocol::Http),
        "kubernetes.io/wss" => Some(Protocol::Https),
        other => protocol(other),
    };
    match known.unwrap_or(Protocol::Auto) {
        Protocol::Auto if SERVER_FIRST.contains(&number) => Protocol::Tcp,
        other => other,
    }
}

/// Reads a `discovery.k8s.io` `EndpointSlice`.
pub fn endpoint_slice(meta: Meta, root: &Node, issues: &mut Vec<Issue>) -> EndpointSlice {
    let path = Path::root("endpoints");
    let endpoints = decode::list(root.get("endpoints"), &path, issues, |node, path, issues| {
        let mut fields = Fields::of(Some(node), path, issues);
        let ready = fields.take("conditions").and_then(|conditions| conditions.get("ready"));
        let addresses = decode::strings(fields.take("addresses"), &path.field("addresses"), issues);
        // Ready unless it says otherwise.
        if ready.is_some_and(|node| node.value == Value::Bool(false)) { Vec::new() } else { addresses }
    });
    let ports = numbered_ports(root.get("ports"), &Path::root("ports"), issues);
    EndpointSlice {
        service: meta.labels.get("kubernetes.io/service-name").cloned().unwrap_or_default(),
        addresses: endpoints.into_iter().flatten().collect(),
        ports,
        meta,
    }
}

/// Reads a core `Endpoints` as one slice per subset.
pub fn endpoints(meta: &Meta, root: &Node, issues: &mut Vec<Issue>) -> Vec<EndpointSlice> {
    let subsets = decode::list(root.get("subsets"), &Path::root("subsets"), issues, |node, path, issues| {
        let mut fields = Fields::of(Some(node), path, issues);
        let addresses =
            decode::list(fields.take("addresses"), &path.field("addresses"), issues, |node, path, issues| {
                decode::string(node.get("ip"), &path.field("ip"), issues)
            });
        (addresses, numbered_ports(fields.take("ports"), &path.field("ports"), issues))
    });
    let slice = |(index, (addresses, ports)): (usize, (Vec<String>, BTreeMap<String, u16>))| EndpointSlice {
        // A name too long to tell apart from others is that of no document either.
        meta: Meta { name: format!("{}-subset-{index}", meta.name).parse().unwrap_or_default(), ..meta.clone() },
        service: meta.name.to_string(),
        addresses,
        ports,
    };
    subsets.into_iter().enumerate().map(slice).collect()
}

fn numbered_ports(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> BTreeMap<String, u16> {
    let ports = decode::list(node, path, issues, |node, path, issues| {
        let mut fields = Fields::of(Some(node), path, issues);
        let name = decode::string(fields.take("name"), &path.field("name"), issues);
        let port = decode::uint32(fields.take("port"), &path.field("port"), issues);
        Some((name, u16::try_from(port).ok().filter(|&port| port != 0)?))
    });
    ports.into_iter().flatten().collect()
}

/// The label that each Namespace has in a cluster: its name.
const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// Makes the metadata of a core `Namespace` those of an object that lies in itself, with the label that an API server
/// would give it.
pub fn namespace(meta: &mut Meta, issues: &mut Vec<Issue>) {
    match meta.name.as_str().parse() {
        Ok(namespace) if !meta.name.is_empty() => meta.namespace = namespace,
        _ => issues.push(Issue::refused("name", "metadata.name", "a Namespace needs a name")),
    }
    meta.annotations.clear();
    meta.labels.entry(NAME_LABEL.into()).or_insert_with(|| meta.name.to_string());
}

/// Reads a core `Pod`.
pub fn pod(meta: Meta, root: &Node, issues: &mut Vec<Issue>) -> Pod {
    let path = Path::root("spec");
    let mut spec = Fields::of(root.get("spec"), &path, issues);
    let service_account = decode::string(spec.take("serviceAccountName"), &path.field("serviceAccountName"), issues);
    let mut ports = BTreeMap::new();
    for list in ["containers", "initContainers"] {
        decode::list(spec.take(list), &path.field(list), issues, |container, path, issues| {
            // Of the init containers only those that stay (restartPolicy Always) serve.
            let stays = container.get("restartPolicy").and_then(Node::as_str) == Some("Always");
            if list == "initContainers" && !stays {
                return;
            }
            decode::list(container.get("ports"), &path.field("ports"), issues, |port, path, issues| {
                let mut fields = Fields::of(Some(port), path, issues);
                let name = decode::string(fields.take("name"), &path.field("name"), issues);
                let transport = decode::string(fields.take("protocol"), &path.field("protocol"), issues);
                let number = decode::uint32(fields.take("containerPort"), &path.field("containerPort"), issues);
                if let Some(number) = u16::try_from(number).ok().filter(|&number| number != 0)
                    && matches!(transport.as_str(), "" | "TCP")
                    && !name.is_empty()
                {
                    ports.entry(name).or_insert(number);
                }
            });
        });
    }
    let path = Path::root("status");
    let mut status = Fields::of(root.get("status"), &path, issues);
    let mut ips = decode::list(status.take("podIPs"), &path.field("podIPs"), issues, |node, path, issues| {
        decode::string(node.get("ip"), &path.field("ip"), issues)
    });
    if ips.is_empty() {
        ips.push(decode::string(status.take("podIP"), &path.field("podIP"), issues));
    }
    ips.retain(|ip| !ip.is_empty());
    let phase = decode::string(status.take("phase"), &path.field("phase"), issues);
    let conditions = decode::list(status.take("conditions"), &path.field("conditions"), issues, |node, _, _| {
        node.get("type").and_then(Node::as_str) == Some("Ready")
            && node.get("status").and_then(Node::as_str) == Some("True")
    });
    let deleted = root.get("metadata").and_then(|meta| meta.get("deletionTimestamp")).is_some_and(|t| !t.is_null());
    let terminal = matches!(phase.as_str(), "Succeeded" | "Failed");
    Pod { ips, ready: conditions.contains(&true) && !terminal && !deleted, ports, service_account, meta }
}
