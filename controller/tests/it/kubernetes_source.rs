//! A controller of a cluster, of which the API server is played in this process.

use crate::fake_api;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fake_api::FakeApi;
use portolan_controller::embed::{Controller, MeshSource};
use portolan_controller::model::{Kind, Scope};
use portolan_controller::publish::Published;
use portolan_controller::status;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(20);

fn entry(host: &str) -> Value {
    json!({ "metadata": { "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": { "hosts": [host], "resolution": "DNS",
                      "ports": [{ "number": 80, "name": "http", "protocol": "HTTP" }] } })
}

fn put(api: &FakeApi, name: &str, host: &str) {
    api.put("serviceentries", "default", name, entry(host));
}

/// An entry that chooses Pods.
fn selecting() -> Value {
    let mut entry = entry("selecting.example.com");
    entry["spec"]["resolution"] = "STATIC".into();
    entry["spec"]["workloadSelector"] = json!({ "labels": { "app": "a" } });
    entry
}

async fn started(api: &FakeApi) -> Controller {
    let (controller, listed) = Controller::of_cluster(&api.client(), &MeshSource::Defaults).unwrap();
    timeout(LONG, listed.wait()).await.expect("the cluster is listed").unwrap();
    controller
}

async fn subscribed(controller: &Controller) -> watch::Receiver<Arc<Published>> {
    let scope = Scope { namespace: "default".into(), ..Scope::default() };
    controller.publisher().subscribe(scope).await.unwrap()
}

async fn objects(controller: &Controller) -> BTreeMap<Kind, usize> {
    controller.publisher().overview().await.unwrap().objects
}

/// What a controller has in force that finds the cluster as it is now.
async fn expected(api: &FakeApi) -> u64 {
    subscribed(&started(api).await).await.borrow().digest
}

async fn settles(published: &mut watch::Receiver<Arc<Published>>, digest: u64) {
    let settled = published.wait_for(|published| published.digest == digest);
    timeout(LONG, settled).await.expect("the digest of the cluster's state").unwrap();
}

/// Pages that are not the same in both.
fn different(a: &Published, b: &Published) -> usize {
    let missing = |a: &Published, b: &Published| {
        a.pages.iter().filter(|page| b.page_digest(page.id) != Some(page.digest)).count()
    };
    missing(a, b).max(missing(b, a))
}

fn metrics(controller: &Controller) -> String {
    let (mut registry, mut text) = (Registry::with_prefix("portolan"), String::new());
    controller.cluster().unwrap().status.register(&mut registry);
    encode(&mut text, &registry).unwrap();
    text
}

#[tokio::test]
async fn nothing_is_served_before_every_kind_was_listed() {
    let api = FakeApi::start().await;
    api.put("serviceentries", "default", "a", selecting());
    api.slow("pods", true);
    let (controller, listed) = Controller::of_cluster(&api.client(), &MeshSource::Defaults).unwrap();
    let mut listed = std::pin::pin!(listed.wait());
    // Every other kind was listed by the time that its list was asked for again by another controller.
    while api.lists("serviceentries") == 0 || api.lists("endpointslices") == 0 {
        tokio::task::yield_now().await;
    }
    assert!(timeout(Duration::from_millis(50), &mut listed).await.is_err(), "it does not wait for the Pods");
    assert!(objects(&controller).await.is_empty());
    api.slow("pods", false);
    timeout(LONG, listed).await.unwrap().unwrap();
    assert_eq!(objects(&controller).await, BTreeMap::from([(Kind::ServiceEntry, 1)]));
}

#[tokio::test]
async fn a_change_of_the_cluster_is_a_change_of_what_is_served() {
    let api = FakeApi::start().await;
    for n in 0..1200 {
        put(&api, &format!("e{n}"), &format!("host-{n}.example.com"));
    }
    let controller = started(&api).await;
    let mut published = subscribed(&controller).await;
    let before = published.borrow_and_update().clone();
    put(&api, "e7", "changed.example.com");
    settles(&mut published, expected(&api).await).await;
    let after = published.borrow_and_update().clone();
    let pages = different(&before, &after);
    // The host that was and the one that is, each where its hash puts it.
    assert!((1..=4).contains(&pages), "{pages} of {} pages differ", before.pages.len());
    api.delete("serviceentries", "default", "e7");
    settles(&mut published, expected(&api).await).await;
    assert_eq!(objects(&controller).await[&Kind::ServiceEntry], 1199);
}

#[tokio::test]
async fn a_watch_out_of_date_lists_again_and_changes_only_what_is_different() {
    let api = FakeApi::start().await;
    for n in 0..3 {
        put(&api, &format!("e{n}"), &format!("host-{n}.example.com"));
    }
    let controller = started(&api).await;
    let mut published = subscribed(&controller).await;
    let before = published.borrow_and_update().clone();
    let lists = api.lists("serviceentries");
    api.forget();
    while api.lists("serviceentries") == lists {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The same state is no news.
    put(&api, "e3", "host-3.example.com");
    settles(&mut published, expected(&api).await).await;
    assert_eq!(published.borrow().version, before.version + 1);
}

#[tokio::test]
async fn an_api_server_that_goes_away_leaves_the_last_good_state() {
    let api = FakeApi::start().await;
    put(&api, "a", "a.example.com");
    put(&api, "b", "b.example.com");
    let controller = started(&api).await;
    let mut published = subscribed(&controller).await;
    let before = published.borrow_and_update().clone();
    api.down(true);
    let status = &controller.cluster().unwrap().status;
    while status.unwatched().len() < 8 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(published.borrow().digest, before.digest);
    // What happens meanwhile can be watched no more when it is back.
    api.delete("serviceentries", "default", "a");
    put(&api, "c", "c.example.com");
    api.forget();
    api.down(false);
    settles(&mut published, expected(&api).await).await;
    while !status.unwatched().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_kind_that_is_denied_takes_no_other_down() {
    let api = FakeApi::start().await;
    api.deny("virtualservices");
    put(&api, "a", "a.example.com");
    let controller = started(&api).await;
    assert_eq!(objects(&controller).await, BTreeMap::from([(Kind::ServiceEntry, 1)]));
    assert_eq!(controller.cluster().unwrap().status.unwatched(), ["VirtualService"]);
    let metrics = metrics(&controller);
    assert!(metrics.contains("portolan_kubernetes_watching{kind=\"VirtualService\"} 0"), "{metrics}");
    assert!(metrics.contains("portolan_kubernetes_watch_errors_total{kind=\"VirtualService\"} 1"), "{metrics}");
    assert!(metrics.contains("portolan_kubernetes_objects{kind=\"ServiceEntry\"} 1"), "{metrics}");
    let mut published = subscribed(&controller).await;
    put(&api, "b", "b.example.com");
    settles(&mut published, expected(&api).await).await;
}

#[tokio::test]
async fn resources_that_cannot_be_read_take_no_other_down() {
    let api = FakeApi::start().await;
    for (name, odd) in [
        ("no-spec", json!({})),
        ("text", json!({ "spec": "text" })),
        ("hosts", json!({ "spec": { "hosts": { "a": 1 } } })),
        ("labels", json!({ "metadata": { "labels": [1] }, "spec": {} })),
    ] {
        api.put("serviceentries", "default", name, odd.clone());
        api.put("virtualservices", "default", name, odd.clone());
        api.put("pods", "default", name, odd.clone());
        api.put("endpointslices", "default", name, odd);
    }
    put(&api, "good", "good.example.com");
    let controller = started(&api).await;
    let counts = objects(&controller).await;
    assert_eq!(counts[&Kind::ServiceEntry], 1, "{counts:?}");
    let mut published = subscribed(&controller).await;
    // A good resource that turns bad stays as it was; a bad one that turns good counts.
    let before = published.borrow_and_update().digest;
    api.put("serviceentries", "default", "good", json!({ "spec": { "hosts": [] } }));
    put(&api, "text", "text.example.com");
    published.changed().await.unwrap();
    assert_ne!(published.borrow_and_update().digest, before);
    assert_eq!(objects(&controller).await[&Kind::ServiceEntry], 2);
}

#[tokio::test]
async fn an_older_version_of_istios_resources_is_found() {
    let api = FakeApi::start().await;
    api.hide("/networking.istio.io/v1/");
    api.hide("/networking.istio.io/v1beta1/sidecars");
    api.hide("/networking.istio.io/v1alpha3/sidecars");
    put(&api, "a", "a.example.com");
    let controller = started(&api).await;
    assert_eq!(objects(&controller).await, BTreeMap::from([(Kind::ServiceEntry, 1)]));
    assert_eq!(controller.cluster().unwrap().status.unwatched(), ["Sidecar"]);
}

#[tokio::test]
async fn pods_are_watched_while_an_entry_selects_some() {
    let api = FakeApi::start().await;
    put(&api, "a", "a.example.com");
    let pod = json!({ "metadata": { "labels": { "app": "a" } }, "status": { "podIP": "10.0.0.1" } });
    api.put("pods", "default", "pod", pod);
    let controller = started(&api).await;
    assert_eq!((api.lists("pods"), objects(&controller).await.get(&Kind::Pod)), (0, None));
    assert!(controller.cluster().unwrap().status.unwatched().is_empty());
    assert!(!metrics(&controller).contains("portolan_kubernetes_watching{kind=\"Pod\"}"), "{}", metrics(&controller));
    // Both come into force at once.
    api.put("serviceentries", "default", "selecting", selecting());
    let both = async {
        loop {
            let now = objects(&controller).await;
            if now.get(&Kind::ServiceEntry) == Some(&2) {
                return now.get(&Kind::Pod).copied();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert_eq!(timeout(LONG, both).await.expect("the entry"), Some(1));
    api.delete("serviceentries", "default", "selecting");
    let none = async {
        while objects(&controller).await.contains_key(&Kind::Pod) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, none).await.expect("no Pods are held");
}

/// Writes status as the leader does.
fn leading(api: &FakeApi, controller: &Controller) -> (watch::Sender<bool>, JoinHandle<()>) {
    let (leads, leader) = watch::channel(true);
    let cluster = controller.cluster().unwrap();
    let (resources, findings) = (cluster.resources.clone(), cluster.findings.clone());
    let write = status::write(api.client(), controller.publisher().clone(), resources, findings, leader);
    (leads, tokio::spawn(write))
}

fn addresses(api: &FakeApi, name: &str) -> Vec<String> {
    let entry = api.get("serviceentries", "default", name);
    let list = entry["status"]["addresses"].as_array().cloned().unwrap_or_default();
    list.iter().map(|item| format!("{} {}", item["value"].as_str().unwrap(), item["host"].as_str().unwrap())).collect()
}

async fn allocated(api: &FakeApi, name: &str) -> Vec<String> {
    let written = async {
        while addresses(api, name).is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, written).await.expect("addresses in the status");
    addresses(api, name)
}

#[tokio::test]
async fn the_leader_writes_allocated_addresses_once() {
    let api = FakeApi::start().await;
    put(&api, "a", "a.example.com");
    put(&api, "b", "b.example.com");
    let mut refused = entry("c.example.com");
    refused["metadata"]["labels"] = json!({ "networking.istio.io/enable-autoallocate-ip": "False" });
    api.put("serviceentries", "default", "refused", refused);
    let mut others = entry("d.example.com");
    others["status"]["addresses"] = json!([{ "value": "240.240.3.3", "host": "d.example.com" }]);
    api.put("serviceentries", "default", "others", others);
    let first = started(&api).await;
    let (leads, writer) = leading(&api, &first);
    let of_a = allocated(&api, "a").await;
    let of_b = allocated(&api, "b").await;
    assert!(of_a[0].starts_with("240.240.") && of_a[0].ends_with(" a.example.com"), "{of_a:?}");
    assert!(of_a.len() == 2 && of_a[1].starts_with("2001:2:"), "{of_a:?}");
    assert_eq!(addresses(&api, "others"), ["240.240.3.3 d.example.com"], "another controller's stay");
    // Others come and go, the controller starts again, and nobody is written to twice.
    put(&api, "e", "e.example.com");
    allocated(&api, "e").await;
    drop((leads, first));
    timeout(LONG, writer).await.expect("the writer ends with who leads").unwrap();
    api.delete("serviceentries", "default", "b");
    let again = started(&api).await;
    let (_leads, _writer) = leading(&api, &again);
    put(&api, "f", "f.example.com");
    allocated(&api, "f").await;
    assert_eq!(addresses(&api, "a"), of_a);
    let mut written = api.written();
    written.sort();
    let once = |name: &str| (name.to_owned(), "portolan-addresses".to_owned());
    assert_eq!(written, ["a", "b", "e", "f"].map(once));
    // Another entry of the host shares them; one that is no longer entitled has none.
    put(&api, "b2", "b.example.com");
    assert_eq!(allocated(&api, "b2").await, of_b);
    let mut own = entry("a.example.com");
    own["spec"]["addresses"] = json!(["10.0.0.1"]);
    own["status"] = api.get("serviceentries", "default", "a")["status"].clone();
    api.put("serviceentries", "default", "a", own);
    let gone = async {
        while !addresses(&api, "a").is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, gone).await.expect("no addresses where they have no effect");
}

fn put_mesh(api: &FakeApi, text: &str) {
    api.put("configmaps", "istio-system", "istio", json!({ "data": { "mesh": text, "meshNetworks": "networks: {}" } }));
}

#[tokio::test]
async fn the_meshs_settings_are_followed_in_their_config_map() {
    let api = FakeApi::start().await;
    put(&api, "a", "a.example.com");
    put_mesh(&api, "outboundTrafficPolicy: {mode: NONSENSE}");
    let map = MeshSource::Map("istio-system/istio".parse().unwrap());
    let (controller, listed) = Controller::of_cluster(&api.client(), &map).unwrap();
    let mut listed = std::pin::pin!(listed.wait());
    while api.lists("configmaps") == 0 {
        tokio::task::yield_now().await;
    }
    // Settings that cannot be read are not the defaults, which would open the mesh.
    assert!(timeout(Duration::from_millis(50), &mut listed).await.is_err(), "it does not wait for the settings");
    put_mesh(&api, "proxyHttpPort: 15080");
    timeout(LONG, listed).await.unwrap().unwrap();
    let mut published = subscribed(&controller).await;
    let mut port = async |expected: u16| {
        let told = published.wait_for(|published| published.proxy_http_port == Some(expected));
        timeout(LONG, told).await.expect("the new settings").unwrap();
    };
    port(15080).await;
    put_mesh(&api, "proxyHttpPort: 15081");
    port(15081).await;
    // What is wrong is told, and changes nothing.
    put_mesh(&api, "proxyHttpPort: many");
    let mut findings = controller.cluster().unwrap().findings.clone();
    let told = findings.wait_for(|findings| {
        findings
            .iter()
            .flat_map(|all| all.iter())
            .any(|finding| finding.file.as_ref() == "ConfigMap istio-system/istio")
    });
    timeout(LONG, told).await.expect("a finding").unwrap();
    port(15081).await;
    // So does its end; when it is back it counts.
    api.delete("configmaps", "istio-system", "istio");
    put(&api, "b", "b.example.com");
    port(15081).await;
    put_mesh(&api, "proxyHttpPort: 15082");
    port(15082).await;
}

fn put_namespace(api: &FakeApi, name: &str, labels: Value) {
    api.put("namespaces", "", name, json!({ "metadata": { "labels": labels } }));
}

/// Waits until so many ServiceEntries are in force.
async fn entries(controller: &Controller, count: usize) {
    let there = async {
        while objects(controller).await.get(&Kind::ServiceEntry).copied().unwrap_or_default() != count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, there).await.unwrap_or_else(|_| panic!("not {count} entries in force"));
}

async fn started_with(api: &FakeApi, mesh: &str) -> Controller {
    put_mesh(api, mesh);
    let map = MeshSource::Map("istio-system/istio".parse().unwrap());
    let (controller, listed) = Controller::of_cluster(&api.client(), &map).unwrap();
    timeout(LONG, listed.wait()).await.expect("the cluster is listed").unwrap();
    controller
}

const SELECTORS: &str = "discoverySelectors: [{matchLabels: {mesh: 'on'}}]";

#[tokio::test]
async fn a_namespace_brings_and_takes_its_objects_with_its_labels() {
    let api = FakeApi::start().await;
    put(&api, "a", "a.example.com");
    api.put("serviceentries", "other", "b", entry("b.example.com"));
    // Even the root namespace is chosen by its labels alone, and one that is not there by none.
    api.put("serviceentries", "istio-system", "c", entry("c.example.com"));
    api.put("serviceentries", "missing", "d", entry("d.example.com"));
    put_namespace(&api, "default", json!({ "mesh": "on" }));
    put_namespace(&api, "other", json!({}));
    put_namespace(&api, "istio-system", json!({}));
    let controller = started_with(&api, SELECTORS).await;
    entries(&controller, 1).await;
    let mut published = subscribed(&controller).await;
    put_namespace(&api, "other", json!({ "mesh": "on" }));
    entries(&controller, 2).await;
    settles(&mut published, subscribed(&started_with(&api, SELECTORS).await).await.borrow().digest).await;
    put_namespace(&api, "missing", json!({ "mesh": "on" }));
    entries(&controller, 3).await;
    put_namespace(&api, "default", json!({ "mesh": "off" }));
    entries(&controller, 2).await;
    // Changes of what is passed over count once it is not.
    api.delete("serviceentries", "default", "a");
    put(&api, "e", "e.example.com");
    put(&api, "f", "f.example.com");
    put_namespace(&api, "default", json!({ "mesh": "on" }));
    entries(&controller, 4).await;
    api.delete("namespaces", "", "other");
    entries(&controller, 3).await;
    assert!(metrics(&controller).contains("portolan_kubernetes_watching{kind=\"Namespace\"} 1"));
}

#[tokio::test]
async fn selectors_come_and_go_with_the_meshs_settings() {
    let api = FakeApi::start().await;
    put(&api, "a", "a.example.com");
    api.put("serviceentries", "other", "b", entry("b.example.com"));
    put_namespace(&api, "default", json!({ "mesh": "on" }));
    put_namespace(&api, "other", json!({}));
    let controller = started_with(&api, "{}").await;
    entries(&controller, 2).await;
    assert_eq!(api.lists("namespaces"), 0, "nobody asked for Namespaces");
    let mut published = subscribed(&controller).await;
    let mut fewest = published.clone();
    // Nothing is gone that is chosen, not for a moment.
    let least = tokio::spawn(async move {
        let mut least = usize::MAX;
        while fewest.changed().await.is_ok() {
            least = least.min(fewest.borrow_and_update().plans.len());
        }
        least
    });
    put_mesh(&api, SELECTORS);
    entries(&controller, 1).await;
    put_mesh(&api, "discoverySelectors: [{matchLabels: {'a b': c}}]");
    let mut findings = controller.cluster().unwrap().findings.clone();
    let told = findings.wait_for(|findings| {
        let fields = findings.iter().flat_map(|all| all.iter()).map(|finding| finding.field.as_str());
        fields.into_iter().any(|field| field == "discoverySelectors[0].matchLabels.a b")
    });
    timeout(LONG, told).await.expect("a finding that names the field").unwrap();
    put_mesh(&api, "proxyHttpPort: 15080");
    entries(&controller, 2).await;
    let told = published.wait_for(|published| published.proxy_http_port == Some(15080));
    timeout(LONG, told).await.expect("the new settings").unwrap();
    let unwatched = async {
        while metrics(&controller).contains("watching{kind=\"Namespace\"}") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, unwatched).await.expect("Namespaces are watched no more");
    drop((controller, published));
    assert_eq!(timeout(LONG, least).await.expect("the end").unwrap(), 2, "port 80 and the catch-all");
}

#[tokio::test]
async fn selectors_of_namespaces_that_may_not_be_listed_open_and_close_nothing() {
    let api = FakeApi::start().await;
    api.deny("namespaces");
    put(&api, "a", "a.example.com");
    let controller = started_with(&api, "{}").await;
    let mut published = subscribed(&controller).await;
    // The other settings count.
    put_mesh(&api, &format!("{SELECTORS}\nproxyHttpPort: 15080"));
    let told = published.wait_for(|published| published.proxy_http_port == Some(15080));
    timeout(LONG, told).await.expect("the new settings").unwrap();
    put(&api, "b", "b.example.com");
    entries(&controller, 2).await;
    assert_eq!(controller.cluster().unwrap().status.unwatched(), ["Namespace"]);
    // Who starts with them serves nobody.
    let map = MeshSource::Map("istio-system/istio".parse().unwrap());
    let (second, listed) = Controller::of_cluster(&api.client(), &map).unwrap();
    let denied = async {
        while !metrics(&second).contains("watch_errors_total{kind=\"Namespace\"} 1") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, denied).await.expect("Namespaces are asked for");
    assert!(timeout(Duration::from_millis(50), listed.wait()).await.is_err(), "served without knowing what is chosen");
}

#[tokio::test]
async fn conflicts_are_between_what_is_considered() {
    let api = FakeApi::start().await;
    for namespace in ["default", "other"] {
        api.put("serviceentries", namespace, "same", entry("same.example.com"));
    }
    put_namespace(&api, "default", json!({ "mesh": "on" }));
    put_namespace(&api, "other", json!({}));
    let controller = started_with(&api, SELECTORS).await;
    let cluster = controller.cluster().unwrap();
    let mut findings = cluster.findings.clone();
    let said = |all: &Option<Arc<Vec<_>>>| all.as_ref().map(|all| all.len());
    let none = findings.wait_for(|all| said(all) == Some(0));
    timeout(LONG, none).await.expect("no conflict").unwrap();
    assert_eq!(cluster.resources.read().known().count(), 1, "only what is considered is written to");
    put_namespace(&api, "other", json!({ "mesh": "on" }));
    let some = findings.wait_for(|all| said(all).is_some_and(|count| count > 0));
    timeout(LONG, some).await.expect("a conflict").unwrap();
    assert_eq!(cluster.resources.read().known().count(), 2);
}

#[tokio::test]
async fn the_watch_of_the_meshs_settings_has_metrics() {
    let api = FakeApi::start().await;
    let controller = started_with(&api, "{}").await;
    let status = &controller.cluster().unwrap().status;
    let now = metrics(&controller);
    assert!(now.contains("portolan_kubernetes_watching{kind=\"ConfigMap\"} 1"), "{now}");
    assert!(now.contains("portolan_kubernetes_watch_errors_total{kind=\"ConfigMap\"} 0"), "{now}");
    assert!(now.contains("portolan_kubernetes_last_event_timestamp_seconds{kind=\"ConfigMap\"}"), "{now}");
    api.down(true);
    let told = async |missing: bool| {
        while status.unwatched().contains(&"ConfigMap") != missing {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, told(true)).await.expect("it is said not to be watched");
    assert!(!metrics(&controller).contains("watch_errors_total{kind=\"ConfigMap\"} 0"));
    api.down(false);
    // Nothing happens to it that would tell.
    timeout(LONG * 2, told(false)).await.expect("it is said to be watched again");
    // Who has it from elsewhere misses none.
    assert!(!metrics(&started(&api).await).contains("watching{kind=\"ConfigMap\"}"));
}
