//! Delta discovery: one stream for listener plans and clusters, opened again with back-off when it ends.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use portolan_proto::{
    CLUSTER_TYPE_URL, DNS_NAME_TYPE_URL, LISTENER_PLAN_TYPE_URL,
    envoy::{
        envoy::{
            config::core::v3::{Locality, Node},
            service::discovery::v3::{
                DeltaDiscoveryRequest, DeltaDiscoveryResponse,
                aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
            },
        },
        google::{
            protobuf::{Struct, Value, value::Kind},
            rpc::Status as RpcStatus,
        },
    },
    v1,
};
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::transport::Channel;

use crate::{
    config::{Identity, Role},
    listener::plan::PortPlan,
    upstream::cluster::{Spec, Target},
};

/// gRPC's INVALID_ARGUMENT, the code of a refusal.
const INVALID_ARGUMENT: i32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What discovery says.
#[derive(Debug)]
pub enum Update {
    /// The plan of a port; `None`: it is no more.
    Plan(u16, Option<PortPlan>),
    /// All plans of the first answer have been given.
    PlansComplete,
    /// What is answered for a host by DNS; `None`: the host is no more.
    Name(String, Option<v1::DnsName>),
    /// All names of the first answer have been given.
    NamesComplete,
    /// A cluster that was asked for; `None`: there is none of that name (any more).
    Cluster(String, Option<Box<Spec<Target>>>),
}

/// Reads discovery until the receiver of `updates` is gone. Names that come on `wanted` are subscribed to.
pub async fn run(
    channel: Channel,
    identity: Identity,
    mut wanted: mpsc::UnboundedReceiver<String>,
    updates: mpsc::UnboundedSender<Update>,
) {
    let mut held = Held::default();
    let mut pause = FIRST_PAUSE;
    while !updates.is_closed() {
        match stream(&channel, &identity, &mut held, &mut wanted, &updates, &mut pause).await {
            Ok(()) => tracing::info!("the controller ended the discovery stream"),
            Err(status) => tracing::warn!("discovery: {}: {}", status.code(), status.message()),
        }
        let spread = pause.mul_f64(0.5 + fastrand::f64());
        tokio::time::sleep(spread).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// What has been accepted, by type and name, with versions; sent again when a stream is opened again.
#[derive(Default)]
struct Held {
    plans: HashMap<String, String>,
    names: HashMap<String, String>,
    clusters: HashMap<String, String>,
    subscribed: BTreeSet<String>,
}

async fn stream(
    channel: &Channel,
    identity: &Identity,
    held: &mut Held,
    wanted: &mut mpsc::UnboundedReceiver<String>,
    updates: &mpsc::UnboundedSender<Update>,
    pause: &mut Duration,
) -> Result<(), tonic::Status> {
    let (requests, outgoing) = mpsc::unbounded_channel();
    let send = |request: DeltaDiscoveryRequest| {
        // A stream that has ended says so by its responses.
        let _ = requests.send(request);
    };
    send(DeltaDiscoveryRequest {
        node: Some(node(identity)),
        type_url: LISTENER_PLAN_TYPE_URL.into(),
        resource_names_subscribe: vec!["*".into()],
        initial_resource_versions: held.plans.clone(),
        ..Default::default()
    });
    if identity.dns_capture {
        send(DeltaDiscoveryRequest {
            type_url: DNS_NAME_TYPE_URL.into(),
            resource_names_subscribe: vec!["*".into()],
            initial_resource_versions: held.names.clone(),
            ..Default::default()
        });
    }
    if !held.subscribed.is_empty() {
        send(DeltaDiscoveryRequest {
            type_url: CLUSTER_TYPE_URL.into(),
            resource_names_subscribe: held.subscribed.iter().cloned().collect(),
            initial_resource_versions: held.clusters.clone(),
            ..Default::default()
        });
    }
    let outgoing = tokio_stream::wrappers::UnboundedReceiverStream::new(outgoing);
    let mut client = AggregatedDiscoveryServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20);
    let mut responses = client.delta_aggregated_resources(outgoing).await?.into_inner();
    loop {
        tokio::select! {
            response = responses.message() => {
                let Some(response) = response? else { return Ok(()) };
                *pause = FIRST_PAUSE;
                for request in held.take(response, updates) {
                    send(request);
                }
            }
            name = wanted.recv() => {
                let Some(name) = name else { return Ok(()) };
                let mut names = vec![name];
                while let Ok(name) = wanted.try_recv() {
                    names.push(name);
                }
                names.retain(|name| held.subscribed.insert(name.clone()));
                if !names.is_empty() {
                    send(DeltaDiscoveryRequest {
                        type_url: CLUSTER_TYPE_URL.into(),
                        resource_names_subscribe: names,
                        ..Default::default()
                    });
                }
            }
        }
    }
}

impl Held {
    /// Passes on what a response says; gives what has to be answered.
    fn take(
        &mut self,
        response: DeltaDiscoveryResponse,
        updates: &mpsc::UnboundedSender<Update>,
    ) -> Vec<DeltaDiscoveryRequest> {
        let mut refused = Vec::new();
        let mut unsubscribe = Vec::new();
        let give = |update| {
            // Without a receiver the process is about to end.
            let _ = updates.send(update);
        };
        match response.type_url.as_str() {
            LISTENER_PLAN_TYPE_URL => {
                for resource in response.resources {
                    let read = v1::ListenerPlan::decode(resource.resource.unwrap_or_default().value.as_slice())
                        .map_err(|e| e.to_string())
                        .and_then(|plan| PortPlan::read(&plan).map_err(|e| e.to_string()));
                    match read {
                        Ok((port, plan)) => {
                            self.plans.insert(resource.name, resource.version);
                            give(Update::Plan(port, Some(plan)));
                        }
                        Err(error) => refused.push(format!("listener plan {}: {error}", resource.name)),
                    }
                }
                for name in response.removed_resources {
                    self.plans.remove(&name);
                    if let Ok(port) = name.parse() {
                        give(Update::Plan(port, None));
                    }
                }
                give(Update::PlansComplete);
            }
            DNS_NAME_TYPE_URL => {
                for resource in response.resources {
                    match v1::DnsName::decode(resource.resource.unwrap_or_default().value.as_slice()) {
                        Ok(name) => {
                            self.names.insert(resource.name.clone(), resource.version);
                            give(Update::Name(resource.name, Some(name)));
                        }
                        Err(error) => refused.push(format!("dns name {}: {error}", resource.name)),
                    }
                }
                for name in response.removed_resources {
                    self.names.remove(&name);
                    give(Update::Name(name, None));
                }
                give(Update::NamesComplete);
            }
            CLUSTER_TYPE_URL => {
                for resource in response.resources {
                    match Spec::decode(&resource.resource.unwrap_or_default().value) {
                        Ok(spec) => {
                            self.clusters.insert(resource.name.clone(), resource.version);
                            give(Update::Cluster(resource.name, Some(Box::new(spec))));
                        }
                        Err(error) => {
                            refused.push(format!("cluster {}: {error}", resource.name));
                            // The last good one stays; where there is none, those who wait must hear of it.
                            if !self.clusters.contains_key(&resource.name) {
                                self.subscribed.remove(&resource.name);
                                unsubscribe.push(resource.name.clone());
                                give(Update::Cluster(resource.name, None));
                            }
                        }
                    }
                }
                for name in response.removed_resources {
                    // As in Envoy's on-demand discovery, the next request asks again.
                    self.clusters.remove(&name);
                    if self.subscribed.remove(&name) {
                        unsubscribe.push(name.clone());
                    }
                    give(Update::Cluster(name, None));
                }
            }
            other => refused.push(format!("resources of type {other} were not asked for")),
        }
        let error_detail = (!refused.is_empty()).then(|| {
            let message = refused.join("; ");
            tracing::warn!("refused from the controller: {message}");
            RpcStatus { code: INVALID_ARGUMENT, message, details: Vec::new() }
        });
        vec![DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            resource_names_unsubscribe: unsubscribe,
            error_detail,
            ..Default::default()
        }]
    }
}

fn text(value: &str) -> Value {
    Value { kind: Some(Kind::StringValue(value.into())) }
}

/// The node as Istio's agent describes it.
#[must_use]
pub fn node(identity: &Identity) -> Node {
    let labels = identity.labels.iter().map(|(key, value)| (key.clone(), text(value))).collect();
    let ips: Vec<_> = identity.ips.iter().map(ToString::to_string).collect();
    let mut fields = BTreeMap::from([
        ("NAMESPACE".to_owned(), text(&identity.namespace)),
        ("LABELS".to_owned(), Value { kind: Some(Kind::StructValue(Struct { fields: labels })) }),
        ("INSTANCE_IPS".to_owned(), text(&ips.join(","))),
    ]);
    if identity.dns_capture {
        fields.insert("DNS_CAPTURE".to_owned(), text("true"));
    }
    if let Some(folder) = &identity.mesh_certificates {
        fields.insert("MESH_CERTIFICATES".to_owned(), text(folder));
    }
    let kind = match identity.role {
        Role::Sidecar => "sidecar",
        Role::Gateway => "router",
    };
    let first = ips.first().map_or("127.0.0.1", String::as_str);
    let namespace = &identity.namespace;
    let mut locality = identity.locality.split('/').map(str::to_owned);
    Node {
        id: format!("{kind}~{first}~proxy-host.{namespace}~{namespace}.svc.cluster.local"),
        metadata: Some(Struct { fields: fields.into_iter().collect() }),
        locality: (!identity.locality.is_empty()).then(|| Locality {
            region: locality.next().unwrap_or_default(),
            zone: locality.next().unwrap_or_default(),
            sub_zone: locality.next().unwrap_or_default(),
        }),
        user_agent_name: "portolan-proxy-host".into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_proto::envoy::{envoy::service::discovery::v3::Resource, google::protobuf::Any};

    fn response(type_url: &str, resources: Vec<(&str, Vec<u8>)>, removed: &[&str]) -> DeltaDiscoveryResponse {
        DeltaDiscoveryResponse {
            type_url: type_url.into(),
            nonce: "7".into(),
            resources: (resources.into_iter())
                .map(|(name, value)| Resource {
                    name: name.into(),
                    version: "1".into(),
                    resource: Some(Any { type_url: type_url.into(), value }),
                    ..Default::default()
                })
                .collect(),
            removed_resources: removed.iter().map(|r| (*r).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_good_plan_is_passed_on_and_a_bad_one_refused_by_name() {
        let (updates, mut seen) = mpsc::unbounded_channel();
        let mut held = Held::default();
        let good = v1::ListenerPlan { port: 80, ..Default::default() }.encode_to_vec();
        let bad = v1::ListenerPlan { port: 99999, ..Default::default() }.encode_to_vec();
        let answers = held.take(response(LISTENER_PLAN_TYPE_URL, vec![("80", good), ("99999", bad)], &[]), &updates);
        assert!(matches!(seen.try_recv(), Ok(Update::Plan(80, Some(_)))));
        assert!(matches!(seen.try_recv(), Ok(Update::PlansComplete)));
        assert_eq!(answers[0].response_nonce, "7");
        assert!(answers[0].error_detail.as_ref().unwrap().message.contains("99999"));
        assert!(held.plans.contains_key("80") && !held.plans.contains_key("99999"));
    }

    #[test]
    fn a_removed_cluster_is_given_up_so_that_the_next_request_asks_again() {
        let (updates, mut seen) = mpsc::unbounded_channel();
        let mut held = Held::default();
        held.subscribed.insert("c".into());
        let answers = held.take(response(CLUSTER_TYPE_URL, vec![], &["c"]), &updates);
        assert!(matches!(seen.try_recv(), Ok(Update::Cluster(name, None)) if name == "c"));
        assert_eq!(answers[0].resource_names_unsubscribe, ["c"]);
        assert!(held.subscribed.is_empty());
    }

    #[test]
    fn the_node_carries_the_scope() {
        let identity = Identity {
            namespace: "shop".into(),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            ips: vec!["1.1.1.1".parse().unwrap()],
            locality: "r/z/s".into(),
            role: Role::Gateway,
            dns_capture: true,
            mesh_certificates: None,
        };
        let node = node(&identity);
        assert_eq!(node.id, "router~1.1.1.1~proxy-host.shop~shop.svc.cluster.local");
        assert_eq!(node.locality.unwrap().zone, "z");
        let fields = node.metadata.unwrap().fields;
        assert_eq!((&fields["NAMESPACE"], &fields["DNS_CAPTURE"]), (&text("shop"), &text("true")));
    }
}
