//! The streams as a subscriber sees them, over a pipe in memory.

use crate::objects;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use objects::*;
use portolan_controller::embed::{Controller, ControllerConfig};
use portolan_controller::model::Protocol::*;
use portolan_controller::model::{Change, MeshConfig, Object, OutboundMode, Resolution, Scope};
use portolan_proto::envoy::envoy::config::cluster::v3::Cluster;
use portolan_proto::envoy::envoy::config::core::v3::Node;
use portolan_proto::envoy::envoy::service::cluster::v3::cluster_discovery_service_client::ClusterDiscoveryServiceClient;
use portolan_proto::envoy::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use portolan_proto::envoy::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use portolan_proto::envoy::google::protobuf::{ListValue, Struct, Value, value};
use portolan_proto::envoy::google::rpc::Status as Rpc;
use portolan_proto::v1::registry_client::RegistryClient;
use portolan_proto::v1::{self, ListenerPlan, Subscribe, WatchRequest, WatchResponse, watch_request::Message as Say};
use portolan_proto::{CLUSTER_TYPE_URL, DNS_NAME_TYPE_URL, LISTENER_PLAN_TYPE_URL, LISTENER_TYPE_URL};
use portolan_registry::page::FORMAT;
use portolan_registry::snapshot::Snapshot;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

async fn controller(objects: Vec<Object>) -> Controller {
    let controller = Controller::empty(blocking()).unwrap();
    controller.apply(apply(objects)).await.unwrap();
    controller
}

async fn channel(controller: &Controller) -> Channel {
    let controller = controller.clone();
    let connect = tower::service_fn(move |_| {
        let pipe = controller.connect().map(hyper_util::rt::TokioIo::new).map_err(std::io::Error::other);
        async move { pipe }
    });
    Endpoint::from_static("http://controller").connect_with_connector(connect).await.unwrap()
}

/// A subscriber of the registry stream with its snapshot.
struct Subscriber {
    say: mpsc::UnboundedSender<WatchRequest>,
    hear: Streaming<WatchResponse>,
    snapshot: Snapshot,
}

impl Subscriber {
    async fn new(controller: &Controller, snapshot: Snapshot) -> Self {
        Self::with_window(controller, snapshot, 0).await
    }

    async fn with_window(controller: &Controller, snapshot: Snapshot, window: u32) -> Self {
        let (say, requests) = mpsc::unbounded_channel();
        let scope = v1::Scope { namespace: "default".into(), ips: vec!["1.1.1.1".into()], ..v1::Scope::default() };
        let format = u32::from(FORMAT);
        let held = if snapshot.is_empty() { Vec::new() } else { snapshot.held() };
        let subscribe = Subscribe { scope: Some(scope), subscriber: "test".into(), format, held, window, version: 0 };
        say.send(WatchRequest { message: Some(Say::Subscribe(subscribe)) }).unwrap();
        let mut client = RegistryClient::new(channel(controller).await);
        let hear = client.watch(UnboundedReceiverStream::new(requests)).await.unwrap().into_inner();
        Subscriber { say, hear, snapshot }
    }

    /// The next update: (version, bytes, pages).
    async fn update(&mut self) -> (u64, usize, usize) {
        let (mut bytes, mut pages) = (0, 0);
        loop {
            let part = self.hear.message().await.unwrap().unwrap();
            assert!(part.encoded_len() <= 130 * 1024 + 1024, "part of {} bytes", part.encoded_len());
            bytes += part.encoded_len();
            pages += part.pages.len();
            for id in part.removed {
                self.snapshot.unstage(id);
            }
            for page in part.pages {
                self.snapshot.stage(page.id, page.data).unwrap();
            }
            if part.last {
                self.snapshot.commit(part.digest).unwrap();
                return (part.version, bytes, pages);
            }
        }
    }

    fn ack(&self, version: u64) {
        self.say.send(WatchRequest { message: Some(Say::Ack(v1::Ack { version })) }).unwrap();
    }

    fn nack(&self, version: u64) {
        let reason = "for the test".into();
        self.say.send(WatchRequest { message: Some(Say::Nack(v1::Nack { version, reason })) }).unwrap();
    }
}

fn many(n: usize) -> Vec<Object> {
    let host = |i| format!("host-{i}.example.com");
    (0..n).map(|i| entry(se(&format!("e{i}"), &[&host(i)], &[(80, Http), (443, Tls)]))).collect()
}

fn one_more(name: &str, host: &str) -> Vec<Change> {
    apply([entry(se(name, &[host], &[(80, Http), (443, Tls)]))])
}

#[tokio::test]
async fn snapshot_then_changes() {
    let controller = controller(many(3000)).await;
    let mut subscriber = Subscriber::new(&controller, Snapshot::new()).await;
    let (version, bytes, pages) = subscriber.update().await;
    println!("3,000 entries: {bytes} bytes in {pages} pages");
    subscriber.ack(version);
    controller.apply(one_more("e7", "changed.example.com")).await.unwrap();
    let (version, bytes, pages) = subscriber.update().await;
    println!("one entry that changes its host: {bytes} bytes in {pages} pages");
    assert!(bytes <= 4096, "{bytes} bytes");
    subscriber.ack(version);
    controller.apply(vec![Change::Delete(many(9)[8].key())]).await.unwrap();
    let (_, bytes, pages) = subscriber.update().await;
    println!("one entry that goes: {bytes} bytes in {pages} pages");
    assert!(bytes <= 4096, "{bytes} bytes");
}

#[tokio::test]
async fn only_so_many_parts_are_on_their_way_as_the_subscriber_wants() {
    let controller = controller(many(3000)).await;
    let mut subscriber = Subscriber::with_window(&controller, Snapshot::new(), 2).await;
    let (mut last, mut version) = (false, 0);
    while !last {
        // The second has come without a word, and a third has not.
        for _ in 0..2 {
            let part = subscriber.hear.message().await.unwrap().unwrap();
            (last, version) = (part.last, part.version);
            for page in part.pages {
                subscriber.snapshot.stage(page.id, page.data).unwrap();
            }
            if last {
                subscriber.snapshot.commit(part.digest).unwrap();
                break;
            }
        }
        let more = tokio::time::timeout(std::time::Duration::from_millis(5), subscriber.hear.message()).await;
        assert!(more.is_err(), "{more:?}");
        for _ in 0..2 {
            let taken = v1::Taken { version };
            subscriber.say.send(WatchRequest { message: Some(Say::Taken(taken)) }).unwrap();
        }
    }
    subscriber.ack(version);
    controller.apply(one_more("e7", "changed.example.com")).await.unwrap();
    assert!(subscriber.update().await.0 > version);
}

#[tokio::test]
async fn what_is_held_is_not_sent_again() {
    let controller = controller(many(100)).await;
    let mut first = Subscriber::new(&controller, Snapshot::new()).await;
    let (version, ..) = first.update().await;
    first.ack(version);
    let mut again = Subscriber::new(&controller, std::mem::take(&mut first.snapshot)).await;
    let (_, _, pages) = again.update().await;
    assert_eq!(pages, 0);
    assert!(again.snapshot.digest() != 0);
}

#[tokio::test]
async fn refused_update_is_made_up_for_by_a_whole_one() {
    let controller = controller(many(100)).await;
    let mut subscriber = Subscriber::new(&controller, Snapshot::new()).await;
    let (version, _, all) = subscriber.update().await;
    subscriber.nack(version);
    controller.apply(one_more("x", "x.example.com")).await.unwrap();
    let (version, _, pages) = subscriber.update().await;
    assert!(pages >= all, "{pages} pages of at least {all}");
    subscriber.ack(version);
    controller.apply(one_more("y", "y.example.com")).await.unwrap();
    let (_, _, pages) = subscriber.update().await;
    assert!(pages < all, "{pages} pages");
    assert_eq!(controller.counters().nacks.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn other_format_is_refused() {
    let controller = controller(Vec::new()).await;
    let mut client = RegistryClient::new(channel(&controller).await);
    let subscribe = Subscribe { format: 9999, ..Subscribe::default() };
    let first = WatchRequest { message: Some(Say::Subscribe(subscribe)) };
    let mut hear = client.watch(tokio_stream::iter([first])).await.unwrap().into_inner();
    assert_eq!(hear.message().await.unwrap_err().code(), tonic::Code::FailedPrecondition);
}

/// A client of delta discovery.
struct Discovery {
    say: mpsc::UnboundedSender<DeltaDiscoveryRequest>,
    hear: Streaming<DeltaDiscoveryResponse>,
}

impl Discovery {
    async fn new(controller: &Controller, first: DeltaDiscoveryRequest) -> Self {
        let id = "sidecar~1.1.1.1~app.default~default.svc.cluster.local".to_owned();
        Self::of(controller, Node { id, ..Node::default() }, first).await
    }

    async fn of(controller: &Controller, node: Node, first: DeltaDiscoveryRequest) -> Self {
        let (say, requests) = mpsc::unbounded_channel();
        say.send(DeltaDiscoveryRequest { node: Some(node), ..first }).unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(channel(controller).await);
        let stream = client.delta_aggregated_resources(UnboundedReceiverStream::new(requests));
        Discovery { say, hear: stream.await.unwrap().into_inner() }
    }

    /// The next response: resources by name with their bytes, and removed names. It is acknowledged.
    async fn next(&mut self) -> (BTreeMap<String, Vec<u8>>, Vec<String>, BTreeMap<String, String>) {
        let response = self.hear.message().await.unwrap().unwrap();
        let (type_url, response_nonce) = (response.type_url.clone(), response.nonce.clone());
        self.say.send(DeltaDiscoveryRequest { type_url, response_nonce, ..Default::default() }).unwrap();
        let versions = response.resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect();
        let resources = response.resources.into_iter().map(|r| (r.name, r.resource.unwrap().value)).collect();
        (resources, response.removed_resources, versions)
    }
}

fn ask(url: &str, names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: url.into(),
        resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

#[tokio::test]
async fn names_are_for_those_who_answer_dns() {
    let controller = controller(vec![entry(se("a", &["a.com"], &[(9000, Tcp)]))]).await;
    let capture = Value { kind: Some(value::Kind::StringValue("true".into())) };
    let node = Node {
        id: "sidecar~1.1.1.1~app.default~default.svc.cluster.local".into(),
        metadata: Some(Struct { fields: [("DNS_CAPTURE".to_owned(), capture)].into() }),
        ..Node::default()
    };
    let mut client = Discovery::of(&controller, node, ask(DNS_NAME_TYPE_URL, &["*"])).await;
    let names = |got: &BTreeMap<String, Vec<u8>>| -> Vec<(String, usize)> {
        let count = |bytes: &[u8]| v1::DnsName::decode(bytes).unwrap().addresses.len();
        got.iter().map(|(name, bytes)| (name.clone(), count(bytes))).collect()
    };
    let (got, ..) = client.next().await;
    assert_eq!(names(&got), [("a.com".to_owned(), 1)]);
    controller.apply(apply([entry(se("b", &["b.com"], &[(9000, Tcp)]))])).await.unwrap();
    let (got, ..) = client.next().await;
    assert_eq!(names(&got), [("b.com".to_owned(), 1)]);
    controller.apply(vec![Change::Delete(entry(se("a", &[], &[])).key())]).await.unwrap();
    assert_eq!(client.next().await.1, ["a.com"]);
    let mut other = Discovery::new(&controller, ask(DNS_NAME_TYPE_URL, &["*"])).await;
    assert!(other.next().await.0.is_empty());
}

#[tokio::test]
async fn subscribers_that_nobody_tells_apart_share_a_snapshot() {
    let controller = controller(many(2)).await;
    let publisher = controller.publisher();
    let pod = |hash: &str, ip: &str| {
        let labels = labels(&[("app", "x"), ("pod-template-hash", hash)]);
        Scope { labels, ips: vec![ip.into()], ..scope() }
    };
    let (one, two) = (pod("1", "10.0.0.1"), pod("2", "10.0.0.2"));
    let mut first = publisher.subscribe(one.clone()).await.unwrap();
    let second = publisher.subscribe(two).await.unwrap();
    let shared = |n: usize| async move { assert_eq!(publisher.overview().await.unwrap().scopes.len(), n) };
    shared(1).await;
    assert_eq!(first.borrow_and_update().version, second.borrow().version);
    let selecting = sidecar("s", "{workloadSelector: {labels: {pod-template-hash: '1'}}, egress: [{hosts: ['./*']}]}");
    controller.apply(apply([selecting.clone()])).await.unwrap();
    shared(2).await;
    assert!(first.has_changed().unwrap());
    assert_eq!(
        publisher.clusters(one, vec!["outbound|80||host-1.example.com".into()], Some(1)).await.unwrap().len(),
        1
    );
    controller.apply(vec![Change::Delete(selecting.key())]).await.unwrap();
    shared(1).await;
}

#[tokio::test]
async fn clusters_come_on_demand_and_change_with_their_entries() {
    let controller = controller(vec![entry(se("a", &["a.com"], &[(80, Http)]))]).await;
    let a = "outbound|80||a.com";
    let late = "outbound|80||late.com";
    let mut client = Discovery::new(&controller, ask(CLUSTER_TYPE_URL, &[a, late])).await;
    let (got, removed, versions) = client.next().await;
    assert_eq!((got.keys().map(String::as_str).collect::<Vec<_>>(), removed), (vec![a], vec![late.to_owned()]));

    controller.apply(one_more("other", "other.com")).await.unwrap();
    controller.apply(one_more("late", "late.com")).await.unwrap();
    let (got, removed, _) = client.next().await;
    assert_eq!(
        (got.keys().map(String::as_str).collect::<Vec<_>>(), removed.len()),
        (vec![late], 0),
        "nobody hears of other.com"
    );

    let moved = entry(se("a", &["a.com"], &[(80, Http)]).with(|e| e.endpoints = vec![endpoint("10.0.0.2")]));
    controller.apply(apply([moved.clone()])).await.unwrap();
    let (got, _, _) = client.next().await;
    assert!(format!("{:?}", Cluster::decode(&got[a][..]).unwrap()).contains("10.0.0.2"));

    controller.apply(vec![Change::Delete(moved.key())]).await.unwrap();
    let (got, removed, _) = client.next().await;
    assert_eq!((got.len(), removed), (0, vec![a.to_owned()]));

    // A client that comes back with an old version hears of what is gone.
    let resumed = DeltaDiscoveryRequest {
        initial_resource_versions: versions.into_iter().collect(),
        ..ask(CLUSTER_TYPE_URL, &[a])
    };
    let (got, removed, _) = Discovery::new(&controller, resumed).await.next().await;
    assert_eq!((got.len(), removed), (0, vec![a.to_owned()]));
}

#[tokio::test]
async fn refused_resources_are_counted_and_their_next_change_is_sent() {
    let controller = controller(vec![entry(se("a", &["a.com"], &[(80, Http)]))]).await;
    let a = "outbound|80||a.com";
    let mut client = Discovery::new(&controller, ask(CLUSTER_TYPE_URL, &[a])).await;
    let response = client.hear.message().await.unwrap().unwrap();
    let refusal = Rpc { code: 13, message: "no such file".into(), ..Rpc::default() };
    let refused = DeltaDiscoveryRequest {
        type_url: response.type_url,
        response_nonce: response.nonce,
        error_detail: Some(refusal),
        ..DeltaDiscoveryRequest::default()
    };
    client.say.send(refused).unwrap();
    let moved = entry(se("a", &["a.com"], &[(80, Http)]).with(|e| e.endpoints = vec![endpoint("10.0.0.2")]));
    controller.apply(apply([moved])).await.unwrap();
    let (got, ..) = client.next().await;
    assert!(format!("{:?}", Cluster::decode(&got[a][..]).unwrap()).contains("10.0.0.2"));
    // Requests of a stream are read in their order: the answer to this one comes after the refusal was read.
    client.say.send(ask(CLUSTER_TYPE_URL, &["outbound|80||b.com"])).unwrap();
    client.next().await;
    assert_eq!(controller.counters().discovery_nacks.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn workload_changes_reach_those_who_hold_the_cluster() {
    let select = se("s", &["s.com"], &[(80, Http)]).with(|e| {
        e.endpoints.clear();
        e.workload_selector = Some(labels(&[("app", "x")]));
    });
    let dns = se("d", &["d.com"], &[(80, Http)]).with(resolution(Resolution::Dns)).with(|e| {
        e.workload_selector = Some(labels(&[("app", "x")]));
    });
    let controller = controller(vec![entry(select), entry(dns)]).await;
    let (s, d) = ("outbound|80||s.com", "outbound|80||d.com");
    let mut client = Discovery::new(&controller, ask(CLUSTER_TYPE_URL, &[s, d])).await;
    let (got, removed, _) = client.next().await;
    assert_eq!((got.contains_key(s), removed), (true, vec![d.to_owned()]), "DNS without endpoints is no cluster");
    let vm = workload(we("vm", "10.3.3.3", &[("app", "x")]));
    controller.apply(apply([vm])).await.unwrap();
    let (got, removed, _) = client.next().await;
    assert_eq!((got.len(), removed.len()), (2, 0));
}

#[tokio::test]
async fn clusters_come_on_a_stream_of_their_own_as_well() {
    let controller = controller(vec![entry(se("a", &["a.com"], &[(80, Http)]))]).await;
    let mut client = ClusterDiscoveryServiceClient::new(channel(&controller).await);
    let (say, requests) = mpsc::unbounded_channel();
    say.send(ask(CLUSTER_TYPE_URL, &["outbound|80||a.com"])).unwrap();
    let mut hear = client.delta_clusters(UnboundedReceiverStream::new(requests)).await.unwrap().into_inner();
    let answer = hear.message().await.unwrap().unwrap();
    assert_eq!(answer.resources.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["outbound|80||a.com"]);
}

#[tokio::test]
async fn plans_follow_the_ports() {
    let controller = controller(vec![entry(se("a", &["a.com"], &[(80, Http)]))]).await;
    let mut client = Discovery::new(&controller, ask(LISTENER_PLAN_TYPE_URL, &["*"])).await;
    let (got, _, versions) = client.next().await;
    assert_eq!(got.keys().collect::<Vec<_>>(), ["0", "80"]);

    controller.apply(one_more("b", "b.com")).await.unwrap();
    let (got, _, _) = client.next().await;
    assert_eq!(got.keys().collect::<Vec<_>>(), ["443"]);
    assert!(ListenerPlan::decode(&got["443"][..]).unwrap().wildcard.unwrap().tls);

    controller.apply(vec![Change::Delete(many(1)[0].key())]).await.unwrap();
    let mesh = MeshConfig { outbound: OutboundMode::AllowAnyDynamicDns, ..MeshConfig::default() };
    controller.publisher().set_mesh(mesh).await.unwrap();
    let (got, _, _) = client.next().await;
    assert_eq!(got.keys().collect::<Vec<_>>(), ["0"]);

    let resumed = DeltaDiscoveryRequest {
        initial_resource_versions: versions.into_iter().collect(),
        ..ask(LISTENER_PLAN_TYPE_URL, &["*"])
    };
    let (got, _, _) = Discovery::new(&controller, resumed).await.next().await;
    assert_eq!(got.keys().collect::<Vec<_>>(), ["0", "443"], "port 80 is held as it is");
}

fn envoy(metadata: &str) -> Node {
    let text = |s: &str| Value { kind: Some(value::Kind::StringValue(s.to_owned())) };
    let fields = [("filter", text("/filter.wasm")), ("controller", text("portolan")), ("httpProxy", list(metadata))];
    let settings = Struct { fields: fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect() };
    let settings = Value { kind: Some(value::Kind::StructValue(settings)) };
    Node {
        id: "sidecar~1.1.1.1~app.default~default.svc.cluster.local".to_owned(),
        user_agent_name: "envoy".to_owned(),
        metadata: Some(Struct { fields: [("PORTOLAN".to_owned(), settings)].into() }),
        ..Node::default()
    }
}

fn list(entry: &str) -> Value {
    let values = vec![Value { kind: Some(value::Kind::StringValue(entry.to_owned())) }];
    Value { kind: Some(value::Kind::ListValue(ListValue { values })) }
}

#[tokio::test]
async fn envoy_gets_listeners_and_hears_of_ports_that_come_and_go() {
    let controller = controller(vec![entry(se("a", &["a.com"], &[(80, Http)]))]).await;
    let mut node = envoy("127.0.0.1:15080");
    let settings = node.metadata.as_mut().unwrap().fields.get_mut("PORTOLAN").unwrap();
    if let Some(value::Kind::StructValue(settings)) = &mut settings.kind {
        settings.fields.insert("transparent".to_owned(), Value { kind: Some(value::Kind::NumberValue(15001.0)) });
    }
    let mut client = Discovery::of(&controller, node, ask(LISTENER_TYPE_URL, &[])).await;
    let (got, ..) = client.next().await;
    assert_eq!(got.keys().collect::<Vec<_>>(), ["0.0.0.0_80", "127.0.0.1_15080", "virtualOutbound"]);
    controller.apply(one_more("b", "b.com")).await.unwrap();
    let (got, removed, _) = client.next().await;
    assert_eq!((got.len(), got.contains_key("0.0.0.0_443"), removed.len()), (1, true, 0));
    let gone = one_more("b", "b.com").remove(0);
    let Change::Apply(gone) = gone else { panic!("one_more applies") };
    controller.apply(vec![Change::Delete(gone.key())]).await.unwrap();
    let (got, removed, _) = client.next().await;
    assert_eq!((got.len(), removed), (0, vec!["0.0.0.0_443".to_owned()]));
}

#[tokio::test]
async fn a_node_without_settings_is_told_how_to_get_them() {
    let controller = controller(Vec::new()).await;
    for (node, expected) in [
        (Node { metadata: None, ..envoy("127.0.0.1:1") }, "portolan bootstrap envoy"),
        (envoy("127.0.0.1"), "invalid socket address"),
    ] {
        let mut client = Discovery::of(&controller, node, ask(LISTENER_TYPE_URL, &[])).await;
        let status = client.hear.message().await.unwrap_err();
        assert!(status.message().contains(expected), "{}", status.message());
    }
}

#[tokio::test]
async fn to_envoy_a_cluster_that_is_not_there_is_an_empty_one_until_it_is() {
    let controller = controller(Vec::new()).await;
    let late = "outbound|80||late.com";
    let mut client = Discovery::of(&controller, envoy("127.0.0.1:1"), ask(CLUSTER_TYPE_URL, &[late])).await;
    let (got, removed, _) = client.next().await;
    let empty = Cluster::decode(&got[late][..]).unwrap();
    assert_eq!((empty.load_assignment, removed.len()), (None, 0));
    controller.apply(one_more("other", "other.com")).await.unwrap();
    let change = one_more("late", "late.com");
    controller.apply(change.clone()).await.unwrap();
    let (got, ..) = client.next().await;
    assert!(Cluster::decode(&got[late][..]).unwrap().load_assignment.is_some());
    let Some(Change::Apply(object)) = change.into_iter().next() else { panic!("one_more applies") };
    controller.apply(vec![Change::Delete(object.key())]).await.unwrap();
    let (got, removed, _) = client.next().await;
    assert_eq!((got.len(), removed), (0, vec![late.to_owned()]), "what was there and goes is removed");
}

#[tokio::test]
async fn files_are_read_and_followed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.yaml");
    let text = |host: &str| {
        let head = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: a}\n";
        format!(
            "{head}spec: {{hosts: [{host}], ports: [{{number: 80, name: http, protocol: HTTP}}], resolution: DNS}}\n"
        )
    };
    std::fs::write(&file, text("a.com")).unwrap();
    let config = ControllerConfig { paths: vec![folder.path().to_owned()], mesh: None };
    let controller = Controller::start(&config).await.unwrap();
    let mut client = Discovery::new(&controller, ask(CLUSTER_TYPE_URL, &["outbound|80||a.com"])).await;
    assert_eq!(client.next().await.0.len(), 1);
    std::fs::write(&file, text("b.com")).unwrap();
    assert_eq!(client.next().await.1, ["outbound|80||a.com"]);
}

#[tokio::test]
async fn a_subscriber_that_never_answers_has_its_stream_ended() {
    let controller = controller(Vec::new()).await;
    let mut subscriber = Subscriber::new(&controller, Snapshot::default()).await;
    subscriber.update().await;
    // With nothing left to do, time passes at once.
    tokio::time::pause();
    let status = subscriber.hear.message().await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status}");
}
