//! Delta discovery: listener plans, Envoy's listeners made of them, and clusters on demand. A resource is sent when it is asked for, and again
//! when it is not what was sent last; one that does not exist is answered as removed, and sent should it come to be.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use portolan_proto::envoy::envoy::config::cluster::v3::Cluster;
use portolan_proto::envoy::envoy::config::core::v3::Node;
use portolan_proto::envoy::envoy::service::cluster::v3::cluster_discovery_service_server::ClusterDiscoveryService;
use portolan_proto::envoy::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryService;
use portolan_proto::envoy::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use portolan_proto::envoy::google::protobuf::{Any, Value, value::Kind};
use portolan_proto::v1::ListenerPlan;
use portolan_proto::{CLUSTER_TYPE_URL, DNS_NAME_TYPE_URL, LISTENER_PLAN_TYPE_URL, LISTENER_TYPE_URL};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::listeners::Listeners;
use super::peer::{self, Peer};
use super::sessions::{Listed, Session};
use super::{Counters, Open};
use crate::cluster::{self, mesh_tls};
use crate::envoy::listeners::Renderer;
use crate::envoy::server_tls;
use crate::envoy::settings::{MESH_CERTIFICATES, Settings};
use crate::model::{Role, Scope};
use crate::publish::{Names, Published, Publisher};

#[derive(Clone)]
pub(super) struct Service {
    publisher: Publisher,
    counters: Arc<Counters>,
}

impl Service {
    pub(super) fn new(publisher: Publisher, counters: Arc<Counters>) -> Self {
        Service { publisher, counters }
    }

    /// Serves a stream, of whatever types are asked for on it.
    fn open(&self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Response<DeltaStream> {
        let (responses, stream) = mpsc::channel(16);
        let (publisher, counters) = (self.publisher.clone(), self.counters.clone());
        tokio::spawn(async move {
            let _open = Open::new(counters.clone(), |c| &c.discovery_streams);
            let failed = responses.clone();
            let peer = peer::of(&request);
            if let Err(status) = serve(request.into_inner(), peer, publisher, counters, responses).await {
                let _ = failed.send(Err(status)).await;
            }
        });
        Response::new(ReceiverStream::new(stream))
    }
}

type DeltaStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

fn delta_only() -> Status {
    Status::unimplemented("only the delta protocol is served")
}

/// Version of a cluster that stands for one that does not exist.
const ABSENT: &str = "absent";

/// How long a cluster that is no more stays in an Envoy, whose filters follow the registry on streams of their own.
const GRACE: Duration = Duration::from_secs(2);

/// Why clusters are looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    /// The client has asked, and is answered in any case.
    Asked,
    /// Something changed.
    Changed,
    /// They were gone a while ago.
    Due,
}

type Responses = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = ReceiverStream<Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = DeltaStream;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(delta_only())
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Ok(self.open(request))
    }
}

/// Clusters alone, for an Envoy whose aggregated stream is somebody else's: a sidecar of istiod's.
#[tonic::async_trait]
impl ClusterDiscoveryService for Service {
    type StreamClustersStream = ReceiverStream<Result<DiscoveryResponse, Status>>;
    type DeltaClustersStream = DeltaStream;

    async fn stream_clusters(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamClustersStream>, Status> {
        Err(delta_only())
    }

    async fn delta_clusters(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaClustersStream>, Status> {
        Ok(self.open(request))
    }

    async fn fetch_clusters(&self, _: Request<DiscoveryRequest>) -> Result<Response<DiscoveryResponse>, Status> {
        Err(delta_only())
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

    /// The version that the client holds of a resource.
    fn holds(&self, name: &str) -> Option<&str> {
        self.held.get(name).and_then(|held| held.as_deref())
    }

    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    /// Notes all resources of the type as they are now; says which the client does not hold so, and which of those that
    /// it holds or wants are not there.
    fn changes<'n>(&mut self, all: impl Iterator<Item = (&'n String, &'n String)>, wanted: &[String]) -> Changes {
        let (mut differ, mut present) = (BTreeSet::new(), BTreeSet::new());
        for (name, version) in all {
            if self.wants(name) && self.differs(name, Some(version)) {
                differ.insert(name.clone());
            }
            present.insert(name);
        }
        let gone = self.held.iter().filter(|(name, held)| held.is_some() && !present.contains(name));
        let mut removed: BTreeSet<String> = gone.map(|(name, _)| name.clone()).collect();
        removed.extend(wanted.iter().filter(|n| !present.contains(n)).cloned());
        for name in &removed {
            self.held.insert(name.clone(), None);
        }
        Changes { differ, removed, answer: false }
    }

    /// Notes a resource as it is now; true if the client has to be told.
    fn differs(&mut self, name: &str, version: Option<&str>) -> bool {
        let differs = self.held.get(name).is_none_or(|held| held.as_deref() != version);
        self.held.insert(name.to_owned(), version.map(str::to_owned));
        differs
    }
}

/// What a client has to be told.
struct Changes {
    differ: BTreeSet<String>,
    removed: BTreeSet<String>,
    /// It has asked, and is answered even if there is nothing to say.
    answer: bool,
}

struct Stream {
    publisher: Publisher,
    counters: Arc<Counters>,
    responses: Responses,
    scope: Scope,
    node: Node,
    session: Listed,
    listeners: Option<Listeners>,
    /// Names as they were sent last.
    names: Option<Arc<Names>>,
    published: watch::Receiver<Arc<Published>>,
    subscriptions: BTreeMap<String, Subscription>,
    /// Clusters that get copies of requests, and are sent unasked: an Envoy asks only for those of the requests themselves.
    mirrored: BTreeSet<String>,
    /// Clusters that are no more, and when they are to be removed.
    going: BTreeMap<String, Instant>,
    /// Version up to which clusters were looked at.
    seen: u64,
    nonce: u64,
}

async fn serve(
    mut requests: Streaming<DeltaDiscoveryRequest>,
    peer: Option<Peer>,
    publisher: Publisher,
    counters: Arc<Counters>,
    responses: Responses,
) -> Result<(), Status> {
    let Some(first) = requests.message().await? else { return Ok(()) };
    let node = first.node.clone().unwrap_or_default();
    let scope = scope(&node);
    peer::agree(peer.as_ref(), &scope.namespace).inspect_err(|_| Counters::add(&counters.denied, 1))?;
    tracing::info!(node = node.id, ?scope, "discovery stream opened");
    let session = Listed::new(&counters, Session::new("discovery", &node.id, peer.as_ref(), &scope));
    let mut published = publisher.subscribe(scope.clone()).await.map_err(ended)?;
    let seen = published.borrow_and_update().version;
    let subscriptions = BTreeMap::new();
    let (listeners, going) = (None, BTreeMap::new());
    let mut stream = Stream {
        publisher,
        counters,
        responses,
        scope,
        node,
        session,
        listeners,
        names: None,
        published,
        subscriptions,
        mirrored: BTreeSet::new(),
        going,
        seen,
        nonce: 0,
    };
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
            names = due(&mut stream.going) => stream.send_clusters(names, None, Why::Due).await?,
        }
    }
}

/// The clusters that are to be removed now.
async fn due(going: &mut BTreeMap<String, Instant>) -> Vec<String> {
    match going.values().min() {
        None => std::future::pending().await,
        Some(at) => tokio::time::sleep_until(*at).await,
    }
    let now = Instant::now();
    let names: Vec<String> = going.iter().filter(|(_, at)| **at <= now).map(|(name, _)| name.clone()).collect();
    going.retain(|_, at| *at > now);
    names
}

fn ended(_: crate::publish::Ended) -> Status {
    Status::unavailable("the compiler has ended")
}

impl Stream {
    async fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let url = request.type_url.clone();
        if let Some(error) = &request.error_detail {
            Counters::add(&self.counters.discovery_nacks, 1);
            let (node, reason) = (&self.node.id, &error.message);
            self.session.note(|s| s.refused = Some(format!("{url}: {reason}")));
            tracing::warn!(node, url, nonce = request.response_nonce, reason, "resources refused");
        }
        let first = !self.subscriptions.contains_key(&url);
        let subscription = self.subscriptions.entry(url.clone()).or_default();
        let wanted = subscription.request(&request, first);
        let everything = request.resource_names_subscribe.iter().any(|n| n == "*");
        let asks = first || !wanted.is_empty() || everything;
        if !asks {
            return Ok(());
        }
        match url.as_str() {
            LISTENER_PLAN_TYPE_URL => self.send_plans(&wanted, true).await,
            LISTENER_TYPE_URL => self.send_listeners(&wanted, true).await,
            DNS_NAME_TYPE_URL => self.send_names(&wanted, true).await,
            CLUSTER_TYPE_URL => {
                let mut names = wanted;
                if first && let Some(subscription) = self.subscriptions.get(&url) {
                    names.extend(subscription.held.keys().filter(|n| !subscription.names.contains(*n)).cloned());
                }
                // Names that are asked for change nothing about the others.
                if first || everything {
                    names.extend(self.follow_mirrors().0);
                }
                self.send_clusters(names, None, Why::Asked).await
            }
            server_tls::SECRET_TYPE_URL => self.send_secrets(wanted).await,
            // Nothing of other types is ever there; the client is told so, lest it wait.
            _ => self.respond(&url, Vec::new(), wanted).await,
        }
    }

    async fn update(&mut self) -> Result<(), Status> {
        let version = self.published.borrow_and_update().version;
        if self.subscriptions.contains_key(LISTENER_PLAN_TYPE_URL) {
            self.send_plans(&[], false).await?;
        }
        if self.subscriptions.contains_key(LISTENER_TYPE_URL) {
            self.send_listeners(&[], false).await?;
        }
        if self.subscriptions.contains_key(DNS_NAME_TYPE_URL) {
            self.send_names(&[], false).await?;
        }
        let since = std::mem::replace(&mut self.seen, version);
        let Some(subscription) = self.subscriptions.get(CLUSTER_TYPE_URL) else { return Ok(()) };
        let names = subscription.names.union(&self.mirrored).cloned().collect();
        self.send_clusters(names, Some(since), Why::Changed).await?;
        let (new, old) = self.follow_mirrors();
        self.send_clusters(new, None, Why::Changed).await?;
        self.withdraw(old).await
    }

    /// Notes which clusters are mirrored to, for a client that has subscribed to what there is; gives those that it needs
    /// from now on, and those that nothing but mirrors needed.
    fn follow_mirrors(&mut self) -> (Vec<String>, Vec<String>) {
        let published = self.published.borrow();
        let Some(subscription) = self.subscriptions.get(CLUSTER_TYPE_URL) else { return Default::default() };
        let now: BTreeSet<String> = match subscription.wildcard {
            true => published.needs.mirrored().into_iter().map(str::to_owned).collect(),
            false => BTreeSet::new(),
        };
        let unasked = |name: &&String| !subscription.names.contains(*name);
        let new = now.difference(&self.mirrored).filter(unasked).cloned().collect();
        let old = self.mirrored.difference(&now).filter(unasked).cloned().collect();
        drop(published);
        self.mirrored = now;
        (new, old)
    }

    async fn withdraw(&mut self, names: Vec<String>) -> Result<(), Status> {
        let Some(subscription) = self.subscriptions.get_mut(CLUSTER_TYPE_URL) else { return Ok(()) };
        let held = |name: &String| subscription.held.remove(name).flatten().is_some();
        let names: Vec<String> = names.into_iter().filter(held).collect();
        if names.is_empty() {
            return Ok(());
        }
        self.respond(CLUSTER_TYPE_URL, Vec::new(), names).await
    }

    /// Sends the plans that the client does not hold as they are, and says which of the wanted ones are not there.
    async fn send_plans(&mut self, wanted: &[String], answer: bool) -> Result<(), Status> {
        let published = self.published.borrow().clone();
        let named = published.plans.iter().map(|(port, plan)| (port.to_string(), plan));
        let plans: Vec<_> = named.map(|(name, plan)| (name, plan_version(plan), plan)).collect();
        let Some(subscription) = self.subscriptions.get_mut(LISTENER_PLAN_TYPE_URL) else { return Ok(()) };
        let mut changes = subscription.changes(plans.iter().map(|(name, version, _)| (name, version)), wanted);
        changes.answer = answer;
        let resources = plans.iter().filter(|(name, ..)| changes.differ.contains(name));
        let resources = resources
            .map(|(name, version, plan)| resource(name, version.clone(), LISTENER_PLAN_TYPE_URL, plan.encode_to_vec()));
        let resources = resources.collect();
        self.send(LISTENER_PLAN_TYPE_URL, resources, changes).await
    }

    /// The same for what a DNS proxy answers.
    async fn send_names(&mut self, wanted: &[String], answer: bool) -> Result<(), Status> {
        let published = self.published.borrow().clone();
        if !answer && self.names.as_ref().is_some_and(|sent| Arc::ptr_eq(sent, &published.names)) {
            return Ok(());
        }
        self.names = Some(published.names.clone());
        let Some(subscription) = self.subscriptions.get_mut(DNS_NAME_TYPE_URL) else { return Ok(()) };
        let all = published.names.iter().map(|(name, held)| (name, &held.version));
        let mut changes = subscription.changes(all, wanted);
        changes.answer = answer;
        let differ = published.names.iter().filter(|(name, _)| changes.differ.contains(*name));
        let resources = differ
            .map(|(name, held)| resource(name, held.version.clone(), DNS_NAME_TYPE_URL, held.bytes.clone()))
            .collect();
        self.send(DNS_NAME_TYPE_URL, resources, changes).await
    }

    /// The same for the listeners of an Envoy.
    async fn send_listeners(&mut self, wanted: &[String], answer: bool) -> Result<(), Status> {
        let published = self.published.borrow().clone();
        if self.listeners.is_none() {
            let settings = Settings::read(&self.node).map_err(|error| {
                tracing::warn!(node = self.node.id, %error, "no listeners can be made");
                Status::invalid_argument(error.to_string())
            })?;
            self.listeners = Some({
                let renderer = Renderer::new(&settings, &self.scope, &self.node.id);
                Listeners::new(renderer.with_mesh_certificates(mesh_certificates(&self.node)))
            });
        }
        let (Some(listeners), Some(subscription)) =
            (&mut self.listeners, self.subscriptions.get_mut(LISTENER_TYPE_URL))
        else {
            return Ok(());
        };
        let current = listeners.follow(&published);
        let mut changes = subscription.changes(current.iter().map(|(name, held)| (name, &held.version)), wanted);
        changes.answer = answer;
        let resources = current.iter().filter(|(name, _)| changes.differ.contains(*name));
        let resources = resources
            .map(|(name, held)| resource(name, held.version.clone(), LISTENER_TYPE_URL, held.bytes.clone()))
            .collect();
        self.send(LISTENER_TYPE_URL, resources, changes).await
    }

    /// Sends secrets, which are files of the Envoy's own that their names say: they never change here.
    async fn send_secrets(&mut self, wanted: Vec<String>) -> Result<(), Status> {
        let (mut resources, mut removed) = (Vec::new(), Vec::new());
        for name in wanted {
            match server_tls::secret(&name) {
                Some(secret) => {
                    let bytes = secret.encode_to_vec();
                    resources.push(resource(&name, "1".to_owned(), server_tls::SECRET_TYPE_URL, bytes));
                }
                None => removed.push(name),
            }
        }
        self.respond(server_tls::SECRET_TYPE_URL, resources, removed).await
    }

    async fn send(&mut self, url: &str, resources: Vec<Resource>, changes: Changes) -> Result<(), Status> {
        if resources.is_empty() && changes.removed.is_empty() && !changes.answer {
            return Ok(());
        }
        self.respond(url, resources, changes.removed.into_iter().collect()).await
    }

    async fn send_clusters(&mut self, names: Vec<String>, since: Option<u64>, why: Why) -> Result<(), Status> {
        let clusters = match names.is_empty() {
            true => Vec::new(),
            false => self.publisher.clusters(self.scope.clone(), names, since).await.map_err(ended)?,
        };
        let Some(subscription) = self.subscriptions.get_mut(CLUSTER_TYPE_URL) else { return Ok(()) };
        let (mut resources, mut removed) = (Vec::new(), Vec::new());
        let envoy = self.node.user_agent_name == "envoy";
        for (name, cluster) in clusters {
            let (cluster, version) = match cluster {
                Some(mut cluster) => {
                    self.going.remove(&name);
                    let version = cluster_version(&cluster);
                    mesh_tls::place(&mut cluster, mesh_certificates(&self.node));
                    if envoy {
                        crate::envoy::adapt(&mut cluster);
                    }
                    (Some(cluster), Some(version))
                }
                None if envoy => match (subscription.holds(&name), why) {
                    // Its filters may not have heard of it yet, and their requests would wait in vain.
                    (Some(version), Why::Changed) if version != ABSENT => {
                        self.going.entry(name).or_insert_with(|| Instant::now() + GRACE);
                        continue;
                    }
                    // To an Envoy that asks for it, what is not there is a cluster without endpoints: that refuses at
                    // once, where of one that it was told is gone every later request would wait in vain.
                    (Some(ABSENT), _) | (None, Why::Asked) => {
                        (Some(crate::envoy::absent(&name)), Some(ABSENT.to_owned()))
                    }
                    _ => (None, None),
                },
                None => (None, None),
            };
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
        if resources.is_empty() && removed.is_empty() && why != Why::Asked {
            return Ok(());
        }
        self.respond(CLUSTER_TYPE_URL, resources, removed).await
    }

    async fn respond(&mut self, url: &str, resources: Vec<Resource>, removed: Vec<String>) -> Result<(), Status> {
        self.nonce += 1;
        Counters::add(&self.counters.resources, resources.len());
        let (node, sent, gone) = (&self.node.id, resources.len(), removed.len());
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

/// The folder of the mesh's certificates, where the node runs.
fn mesh_certificates(node: &Node) -> Option<&str> {
    match &node.metadata.as_ref()?.fields.get(MESH_CERTIFICATES)?.kind {
        Some(Kind::StringValue(folder)) => Some(folder.as_str()).filter(|folder| !folder.is_empty()),
        _ => None,
    }
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
    let dns_capture = matches!(field("DNS_CAPTURE"), Some(Kind::StringValue(value)) if value == "true");
    Scope { namespace, labels, role, ips, locality, dns_capture }
}
