//! Delta discovery: listener plans, and Envoy clusters on demand. A resource is sent when it is asked for, and again
//! when it is not what was sent last; one that does not exist is answered as removed, and sent should it come to be.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

use portolan_proto::envoy::envoy::config::cluster::v3::Cluster;
use portolan_proto::envoy::envoy::config::core::v3::Node;
use portolan_proto::envoy::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryService;
use portolan_proto::envoy::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use portolan_proto::envoy::google::protobuf::{Any, Value, value::Kind};
use portolan_proto::v1::ListenerPlan;
use portolan_proto::{CLUSTER_TYPE_URL, LISTENER_PLAN_TYPE_URL};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Counters, Open};
use crate::cluster;
use crate::model::{Role, Scope};
use crate::publish::{Published, Publisher};

pub(super) struct Service {
    publisher: Publisher,
    counters: Arc<Counters>,
}

impl Service {
    pub(super) fn new(publisher: Publisher, counters: Arc<Counters>) -> Self {
        Service { publisher, counters }
    }
}

type Responses = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = ReceiverStream<Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("only the delta protocol is served"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, stream) = mpsc::channel(16);
        let (publisher, counters) = (self.publisher.clone(), self.counters.clone());
        tokio::spawn(async move {
            let _open = Open::new(counters.clone(), |c| &c.discovery_streams);
            let failed = responses.clone();
            if let Err(status) = serve(request.into_inner(), publisher, counters, responses).await {
                let _ = failed.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// One resource type of one stream.
#[derive(Default)]
struct Subscription {
    /// Subscribed to everything.
    wildcard: bool,
    names: BTreeSet<String>,
    /// What the client holds: the version, or `None` where it knows that there is no such resource.
    held: BTreeMap<String, Option<String>>,
}

impl Subscription {
    /// Takes in a request; returns the names that it wants to have answered now, whatever it holds.
    fn request(&mut self, request: &DeltaDiscoveryRequest, first: bool) -> Vec<String> {
        if first {
            let held = request.initial_resource_versions.iter();
            self.held.extend(held.map(|(name, version)| (name.clone(), Some(version.clone()))));
            self.wildcard = request.resource_names_subscribe.is_empty();
        }
        for name in &request.resource_names_unsubscribe {
            if name == "*" {
                self.wildcard = false;
            }
            self.names.remove(name);
            self.held.remove(name);
        }
        let mut wanted = Vec::new();
        for name in &request.resource_names_subscribe {
            if name == "*" {
                self.wildcard = true;
                continue;
            }
            self.names.insert(name.clone());
            // What is resumed is only sent if it differs; what is asked for anew is sent in any case.
            if !first {
                self.held.remove(name);
            }
            wanted.push(name.clone());
        }
        wanted
    }

    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    /// Notes a resource as it is now; true if the client has to be told.
    fn differs(&mut self, name: &str, version: Option<&str>) -> bool {
        let differs = self.held.get(name).is_none_or(|held| held.as_deref() != version);
        self.held.insert(name.to_owned(), version.map(str::to_owned));
        differs
    }
}

struct Stream {
    publisher: Publisher,
    counters: Arc<Counters>,
    responses: Responses,
    scope: Scope,
    node: String,
    published: watch::Receiver<Arc<Published>>,
    subscriptions: BTreeMap<String, Subscription>,
    /// Version up to which clusters were looked at.
    seen: u64,
    nonce: u64,
}

async fn serve(
    mut requests: Streaming<DeltaDiscoveryRequest>,
    publisher: Publisher,
    counters: Arc<Counters>,
    responses: Responses,
) -> Result<(), Status> {
    let Some(first) = requests.message().await? else { return Ok(()) };
    let node = first.node.clone().unwrap_or_default();
    let scope = scope(&node);
    tracing::info!(node = node.id, ?scope, "discovery stream opened");
    let mut published = publisher.subscribe(scope.clone()).await.map_err(ended)?;
    let seen = published.borrow_and_update().version;
    let subscriptions = BTreeMap::new();
    let mut stream =
        Stream { publisher, counters, responses, scope, node: node.id, published, subscriptions, seen, nonce: 0 };
    stream.request(first).await?;
    loop {
        tokio::select! {
            request = requests.next() => match request {
                None => return Ok(()),
                Some(request) => stream.request(request?).await?,
            },
            changed = stream.published.changed() => {
                changed.map_err(|_| Status::unavailable("the compiler has ended"))?;
                stream.update().await?;
            }
        }
    }
}

fn ended(_: crate::publish::Ended) -> Status {
    Status::unavailable("the compiler has ended")
}

impl Stream {
    async fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let url = request.type_url.clone();
        if let Some(error) = &request.error_detail {
            Counters::add(&self.counters.discovery_nacks, 1);
            let (node, reason) = (&self.node, &error.message);
            tracing::warn!(node, url, nonce = request.response_nonce, reason, "resources refused");
        }
        let first = !self.subscriptions.contains_key(&url);
        let subscription = self.subscriptions.entry(url.clone()).or_default();
        let wanted = subscription.request(&request, first);
        let asks = first || !wanted.is_empty() || request.resource_names_subscribe.iter().any(|n| n == "*");
        if !asks {
            return Ok(());
        }
        match url.as_str() {
            LISTENER_PLAN_TYPE_URL => self.send_plans(&wanted, true).await,
            CLUSTER_TYPE_URL => {
                let mut names = wanted;
                if first && let Some(subscription) = self.subscriptions.get(&url) {
                    names.extend(subscription.held.keys().filter(|n| !subscription.names.contains(*n)).cloned());
                }
                self.send_clusters(names, None, true).await
            }
            // Nothing of other types is ever there; the client is told so, lest it wait.
            _ => self.respond(&url, Vec::new(), wanted).await,
        }
    }

    async fn update(&mut self) -> Result<(), Status> {
        let version = self.published.borrow_and_update().version;
        if self.subscriptions.contains_key(LISTENER_PLAN_TYPE_URL) {
            self.send_plans(&[], false).await?;
        }
        let since = std::mem::replace(&mut self.seen, version);
        let names = self.subscriptions.get(CLUSTER_TYPE_URL).map(|s| s.names.iter().cloned().collect());
        match names {
            Some(names) => self.send_clusters(names, Some(since), false).await,
            None => Ok(()),
        }
    }

    /// Sends the plans that the client does not hold as they are, and says which of the wanted ones are not there.
    async fn send_plans(&mut self, wanted: &[String], answer: bool) -> Result<(), Status> {
        let published = self.published.borrow().clone();
        let Some(subscription) = self.subscriptions.get_mut(LISTENER_PLAN_TYPE_URL) else { return Ok(()) };
        let mut resources = Vec::new();
        let mut present = BTreeSet::new();
        for (port, plan) in &published.plans {
            let name = port.to_string();
            let version = plan_version(plan);
            if subscription.wants(&name) && subscription.differs(&name, Some(&version)) {
                resources.push(resource(&name, version, LISTENER_PLAN_TYPE_URL, plan.encode_to_vec()));
            }
            present.insert(name);
        }
        let gone = subscription.held.iter().filter(|(name, held)| held.is_some() && !present.contains(*name));
        let mut removed: BTreeSet<String> = gone.map(|(name, _)| name.clone()).collect();
        removed.extend(wanted.iter().filter(|n| !present.contains(*n)).cloned());
        for name in &removed {
            subscription.held.insert(name.clone(), None);
        }
        if resources.is_empty() && removed.is_empty() && !answer {
            return Ok(());
        }
        self.respond(LISTENER_PLAN_TYPE_URL, resources, removed.into_iter().collect()).await
    }

    async fn send_clusters(&mut self, names: Vec<String>, since: Option<u64>, answer: bool) -> Result<(), Status> {
        let clusters = match names.is_empty() {
            true => Vec::new(),
            false => self.publisher.clusters(self.scope.clone(), names, since).await.map_err(ended)?,
        };
        let Some(subscription) = self.subscriptions.get_mut(CLUSTER_TYPE_URL) else { return Ok(()) };
        let (mut resources, mut removed) = (Vec::new(), Vec::new());
        for (name, cluster) in clusters {
            let version = cluster.as_ref().map(cluster_version);
            if !subscription.differs(&name, version.as_deref()) {
                continue;
            }
            match (cluster, version) {
                (Some(cluster), Some(version)) => {
                    resources.push(resource(&name, version, CLUSTER_TYPE_URL, cluster.encode_to_vec()));
                }
                _ => removed.push(name),
            }
        }
        if resources.is_empty() && removed.is_empty() && !answer {
            return Ok(());
        }
        self.respond(CLUSTER_TYPE_URL, resources, removed).await
    }

    async fn respond(&mut self, url: &str, resources: Vec<Resource>, removed: Vec<String>) -> Result<(), Status> {
        self.nonce += 1;
        Counters::add(&self.counters.resources, resources.len());
        let (node, sent, gone) = (&self.node, resources.len(), removed.len());
        tracing::debug!(node, url, nonce = self.nonce, resources = sent, removed = gone, "resources sent");
        let response = DeltaDiscoveryResponse {
            system_version_info: self.seen.to_string(),
            resources,
            type_url: url.to_owned(),
            removed_resources: removed,
            nonce: self.nonce.to_string(),
            ..DeltaDiscoveryResponse::default()
        };
        self.responses.send(Ok(response)).await.map_err(|_| Status::cancelled("the client has gone"))
    }
}

fn resource(name: &str, version: String, url: &str, value: Vec<u8>) -> Resource {
    let resource = Some(Any { type_url: url.to_owned(), value });
    Resource { name: name.to_owned(), version, resource, ..Resource::default() }
}

fn plan_version(plan: &ListenerPlan) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(&plan.encode_to_vec());
    format!("{:016x}", hasher.finish())
}

fn cluster_version(cluster: &Cluster) -> String {
    format!("{:016x}", cluster::digest(cluster))
}

/// The scope that a node's metadata and id name; what is missing in the metadata is taken from the id
/// (`sidecar~IP~name.namespace~domain`).
fn scope(node: &Node) -> Scope {
    let mut id = node.id.split('~');
    let role = if id.next() == Some("router") { Role::Gateway } else { Role::Sidecar };
    let (ip, name) = (id.next().unwrap_or_default(), id.next().unwrap_or_default());
    let field = |name: &str| node.metadata.as_ref().and_then(|m| m.fields.get(name)).and_then(|v| v.kind.as_ref());
    let namespace = match field("NAMESPACE") {
        Some(Kind::StringValue(namespace)) => namespace.clone(),
        _ => name.rsplit_once('.').map_or("default", |(_, ns)| ns).to_owned(),
    };
    let text = |(key, value): (&String, &Value)| match &value.kind {
        Some(Kind::StringValue(value)) => Some((key.clone(), value.clone())),
        _ => None,
    };
    let labels = match field("LABELS") {
        Some(Kind::StructValue(labels)) => labels.fields.iter().filter_map(text).collect(),
        _ => BTreeMap::new(),
    };
    let ips = match field("INSTANCE_IPS") {
        Some(Kind::StringValue(ips)) => ips.as_str(),
        _ => ip,
    };
    let ips = ips.split(',').map(str::trim).filter(|ip| !ip.is_empty()).map(str::to_owned).collect();
    let locality = node.locality.as_ref().map_or_else(String::new, |l| {
        [&l.region, &l.zone, &l.sub_zone].map(String::as_str).join("/").trim_end_matches('/').to_owned()
    });
    Scope { namespace, labels, role, ips, locality }
}
