//! What DestinationRules make of clusters: which rule counts, its subsets, and its policy in Envoy's words.

use crate::objects;

use std::collections::BTreeSet;

use objects::*;
use portolan_controller::compile::{Compiler, compile};
use portolan_controller::model::Protocol::*;
use portolan_controller::model::{Change, Object, Resolution, Scope};
use portolan_proto::envoy::envoy::config::cluster::v3::Cluster;
use portolan_proto::envoy::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, DiscoveryType, LbConfig, LbPolicy,
};
use portolan_proto::envoy::envoy::config::core::v3::{address, data_source, transport_socket};
use portolan_proto::envoy::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use portolan_proto::envoy::envoy::extensions::transport_sockets::tls::v3::{
    UpstreamTlsContext, common_tls_context::ValidationContextType,
};
use portolan_proto::envoy::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use portolan_registry::decision::Verdict;
use portolan_registry::lookup::{Listener, Request};
use portolan_registry::route::{HashCookie, HashKey, Outcome};
use portolan_registry::routing::Patterns;
use prost::Message;

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// A rule for a host whose connect timeout tells which one counted.
fn marked(name: &str, host: &str, seconds: i64, more: &str) -> Object {
    let pool = format!("{{connectionPool: {{tcp: {{connectTimeout: {seconds}s}}}}}}");
    rule(name, &format!("{{host: '{host}', trafficPolicy: {pool}{more}}}"))
}

fn seconds(objects: Vec<Object>, scope: Scope, name: &str) -> i64 {
    let (compiler, _) = compile(objects, scope, blocking());
    compiler.cluster(name).expect("there is a cluster").connect_timeout.expect("it has a timeout").seconds
}

fn client(namespace: &str, app: &str) -> Scope {
    Scope { namespace: namespace.into(), labels: labels(&[("app", app)]), ..scope() }
}

const A: &str = "outbound|80||a.com";

#[test]
fn which_rule_counts() {
    let a = || entry(se("service/a", &["a.com"], &[(80, Http)]));
    let cases: Vec<(&str, Vec<Object>, i64)> = vec![
        ("none", vec![], 10),
        ("the service's namespace", vec![marked("service/r", "a.com", 1, "")], 1),
        (
            "a wildcard of the client's before an exact one of the service's",
            vec![marked("service/r", "a.com", 1, ""), marked("client/w", "*.com", 2, "")],
            2,
        ),
        (
            "the most specific within one",
            vec![marked("client/w", "*.com", 2, ""), marked("client/r", "a.com", 3, "")],
            3,
        ),
        ("the root's at last", vec![marked("istio-system/r", "*", 4, "")], 4),
        ("a third namespace never", vec![marked("third/r", "a.com", 5, "")], 10),
        (
            "a rule that is not exported hides what is less specific",
            vec![marked("service/w", "*.com", 6, ""), marked("service/r", "a.com", 7, ", exportTo: [third]")],
            10,
        ),
        ("exported by name", vec![marked("service/r", "a.com", 8, ", exportTo: [client]")], 8),
        ("private", vec![marked("service/r", "a.com", 9, ", exportTo: ['.']")], 10),
        ("for others only", vec![marked("client/r", "a.com", 9, ", exportTo: [third]")], 10),
        ("another case is another host", vec![marked("client/r", "A.com", 9, "")], 10),
    ];
    for (what, rules, want) in cases {
        let objects = rules.into_iter().chain([a()]).collect();
        assert_eq!(seconds(objects, client("client", "x"), A), want, "{what}");
    }
}

#[test]
fn rules_of_one_host_merge() {
    let a = || entry(se("service/a", &["a.com"], &[(80, Http)]));
    let cases: Vec<(&str, Vec<Object>, i64)> = vec![
        ("the older policy", vec![marked("client/b@2", "a.com", 2, ""), marked("client/c@1", "a.com", 1, "")], 1),
        (
            "a policy where the older has none",
            vec![marked("client/b@2", "a.com", 2, ""), rule("client/c@1", "{host: a.com, subsets: [{name: v1}]}")],
            2,
        ),
        (
            "side by side, the newer counts",
            vec![marked("client/b@2", "a.com", 2, ", exportTo: ['*']"), marked("client/c@1", "a.com", 1, "")],
            2,
        ),
        (
            "one that selects the client",
            vec![
                marked("client/b@1", "a.com", 1, ""),
                marked("client/c@2", "a.com", 2, ", workloadSelector: {matchLabels: {app: x}}"),
            ],
            2,
        ),
        (
            "one that selects others",
            vec![
                marked("client/b@1", "a.com", 1, ""),
                marked("client/c@2", "a.com", 2, ", workloadSelector: {matchLabels: {app: z}}"),
            ],
            1,
        ),
    ];
    for (what, rules, want) in cases {
        let objects = rules.into_iter().chain([a()]).collect();
        assert_eq!(seconds(objects, client("client", "x"), A), want, "{what}");
    }
}

#[test]
fn port_and_subset_levels() {
    let spec = "{host: a.com, trafficPolicy: {connectionPool: {tcp: {connectTimeout: 1s, maxConnections: 7}}, \
                portLevelSettings: [{port: {number: 81}, connectionPool: {tcp: {connectTimeout: 2s}}}]}, subsets: \
                [{name: v1, trafficPolicy: {connectionPool: {tcp: {connectTimeout: 3s}}}}, {name: v2}]}";
    let (compiler, _) =
        compile([entry(se("a", &["a.com"], &[(80, Http), (81, Http)])), rule("r", spec)], scope(), blocking());
    for (name, timeout, connections) in [
        ("outbound|80||a.com", 1, 7),
        ("outbound|81||a.com", 2, u32::MAX),
        ("outbound|80|v1|a.com", 3, u32::MAX),
        ("outbound|80|v2|a.com", 1, 7),
        ("outbound|81|v2|a.com", 2, u32::MAX),
    ] {
        let cluster = compiler.cluster(name).unwrap();
        assert_eq!(cluster.name, name);
        assert_eq!(cluster.connect_timeout.unwrap().seconds, timeout, "{name}");
        let thresholds = &cluster.circuit_breakers.unwrap().thresholds[0];
        assert_eq!(thresholds.max_connections.unwrap().value, connections, "{name}");
    }
    assert!(compiler.cluster("outbound|80|v3|a.com").is_none(), "no such subset");
}

fn addresses(cluster: &Cluster) -> BTreeSet<String> {
    let assignment = cluster.load_assignment.iter().flat_map(|a| &a.endpoints).flat_map(|l| &l.lb_endpoints);
    assignment
        .filter_map(|e| match &e.host_identifier {
            Some(HostIdentifier::Endpoint(e)) => match e.address.as_ref()?.address.as_ref()? {
                address::Address::SocketAddress(a) => Some(a.address.clone()),
                _ => None,
            },
            _ => None,
        })
        .collect()
}

#[test]
fn subsets_select_by_label() {
    let of = |address: &str, version: &str| {
        endpoint(address).with(|e| {
            e.labels = labels(&[("version", version)]);
            e.locality = if version == "1" { "eu/west".into() } else { String::new() };
        })
    };
    let a = se("a", &["a.com"], &[(80, Http)]).with(|e| e.endpoints = vec![of("10.0.0.1", "1"), of("10.0.0.2", "2")]);
    let b = se("b", &["b.com"], &[(80, Http)]).with(resolution(Resolution::Dns));
    let spec = |host: &str| {
        format!(
            "{{host: {host}, subsets: [{{name: one, labels: {{version: '1'}}}}, {{name: three, labels: {{version: \
             '3'}}}}, {{name: west, labels: {{topology.kubernetes.io/zone: west}}}}, {{name: all}}]}}"
        )
    };
    let objects = [entry(a), entry(b), rule("a", &spec("a.com")), rule("b", &spec("b.com"))];
    let (compiler, _) = compile(objects, scope(), blocking());
    let of = |name: &str| compiler.cluster(name).map(|cluster| addresses(&cluster));
    let set = |list: &[&str]| Some(list.iter().map(|a| (*a).to_owned()).collect::<BTreeSet<_>>());
    assert_eq!(of("outbound|80|one|a.com"), set(&["10.0.0.1"]));
    assert_eq!(of("outbound|80|west|a.com"), set(&["10.0.0.1"]));
    assert_eq!(of("outbound|80|all|a.com"), set(&["10.0.0.1", "10.0.0.2"]));
    assert_eq!(of("outbound|80|three|a.com"), set(&[]), "a static subset without endpoints is an empty cluster");
    assert_eq!(of("outbound|80|three|b.com"), None, "a DNS subset without endpoints is none");
    assert_eq!(of("outbound|80|all|b.com"), set(&["b.com"]));
}

/// The cluster of `a.com` under this policy.
fn under(policy: &str, protocol: portolan_controller::model::Protocol) -> Cluster {
    let a = se("a", &["a.com"], &[(80, protocol)]).with(|e| e.subject_alt_names = vec!["san.a.com".into()]);
    let spec = format!("{{host: a.com, trafficPolicy: {policy}}}");
    let (compiler, _) = compile([entry(a), rule("r", &spec)], scope(), blocking());
    compiler.cluster(A).unwrap()
}

fn options(cluster: &Cluster) -> HttpProtocolOptions {
    HttpProtocolOptions::decode(cluster.typed_extension_protocol_options[HTTP_OPTIONS].value.as_slice()).unwrap()
}

#[test]
fn load_balancers() {
    for (settings, want) in [
        ("simple: RANDOM", LbPolicy::Random),
        ("simple: ROUND_ROBIN", LbPolicy::RoundRobin),
        ("simple: LEAST_CONN", LbPolicy::LeastRequest),
        ("simple: UNSPECIFIED", LbPolicy::LeastRequest),
        ("simple: PASSTHROUGH", LbPolicy::ClusterProvided),
        ("consistentHash: {httpHeaderName: x}", LbPolicy::RingHash),
        ("consistentHash: {useSourceIp: true, maglev: {tableSize: 65537}}", LbPolicy::Maglev),
    ] {
        let cluster = under(&format!("{{loadBalancer: {{{settings}}}}}"), Http);
        assert_eq!(cluster.lb_policy(), want, "{settings}");
        let passthrough = Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into()));
        assert_eq!(cluster.cluster_discovery_type == passthrough, want == LbPolicy::ClusterProvided, "{settings}");
    }
    let ring =
        |settings: &str| match under(&format!("{{loadBalancer: {{consistentHash: {settings}}}}}"), Http).lb_config {
            Some(LbConfig::RingHashLbConfig(ring)) => ring.minimum_ring_size.unwrap().value,
            other => panic!("{other:?}"),
        };
    assert_eq!(ring("{httpHeaderName: x}"), 1024);
    assert_eq!(ring("{httpHeaderName: x, ringHash: {minimumRingSize: 7}}"), 7);
    let warm = under("{loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 30s}}}", Http);
    let Some(LbConfig::RoundRobinLbConfig(config)) = warm.lb_config else { panic!("{:?}", warm.lb_config) };
    let slow = config.slow_start_config.unwrap();
    assert_eq!(slow.slow_start_window.unwrap().seconds, 30);
    assert!((slow.min_weight_percent.unwrap().value - 10.0).abs() < f64::EPSILON);
}

/// What requests to a.com are kept together by, with and without a VirtualService.
fn keys(world: &World) -> Vec<Option<HashKey>> {
    let hash = |host: &str| {
        let listener = Listener::Captured("192.0.2.1:80".parse().unwrap());
        let request = Request { listener, authority: host.as_bytes(), connect: false };
        let Verdict::Table { table } = world.snapshot.request(&request).verdict else { return None };
        let matched = world.snapshot.routed(table, &Get("/"), &Patterns::default()).unwrap();
        let Outcome::Forward(targets) = matched.action.outcome else { panic!("{matched:?}") };
        targets[0].extras.as_ref()?.hash.clone()
    };
    ["a.com", "direct.com", "named.com", "v1.com"].map(hash).into()
}

#[test]
fn what_requests_are_kept_together_by() {
    let to = |host: &str, to: &str| {
        let spec = format!("hosts: [{host}]\nhttp: [{{route: [{{destination: {{host: a.com{to}}}}}]}}]");
        virtual_service(&host.replace('.', "-"), &spec)
    };
    let objects = || {
        let entry = entry(se("service/a", &["a.com"], &[(80, Http)]));
        let named = to("named.com", ", port: {number: 80}");
        vec![entry, to("direct.com", ""), named, to("v1.com", ", subset: v1")]
    };
    let header = |name: &str| Some(HashKey::Header(name.into()));
    let hash = |header: &str| format!("loadBalancer: {{consistentHash: {{httpHeaderName: {header}}}}}");
    let level = format!("portLevelSettings: [{{port: {{number: 80}}, {}}}]", hash("X-P"));
    let both = format!("{{{}, {level}}}", hash("x-top"));
    let subset = format!("[{{name: v1, labels: {{a: b}}, trafficPolicy: {{{}}}}}]", hash("x-sub"));
    let cases = [
        ("{loadBalancer: {simple: RANDOM}}".to_owned(), "[]", vec![None, None, None, None]),
        (format!("{{{}}}", hash("x-top")), "[]", vec![header("x-top"); 4]),
        (both.clone(), "[]", vec![header("x-p"), header("x-top"), header("x-p"), header("x-top")]),
        (both, &subset, vec![header("x-p"), header("x-top"), header("x-p"), header("x-sub")]),
    ];
    for (policy, subsets, expected) in cases {
        let rule = || rule("service/r", &format!("{{host: a.com, trafficPolicy: {policy}, subsets: {subsets}}}"));
        let mut world = world(objects().into_iter().chain([rule()]));
        assert_eq!(keys(&world), expected, "{policy}");
        // A rule that comes later does the same, and one that goes leaves nothing.
        world.compiler.apply(&[Change::Delete(rule().key())]);
        world.compiler.commit();
        world.snapshot = opened(&world.compiler);
        assert_eq!(keys(&world), [None, None, None, None]);
        world.compiler.apply(&[Change::Apply(rule())]);
        world.compiler.commit();
        world.snapshot = opened(&world.compiler);
        assert_eq!(keys(&world), expected, "{policy}");
    }
    let cookie = "httpCookie: {name: s, path: /p, ttl: 30.5s, attributes: [{name: Secure}]}";
    let hashes = [
        ("useSourceIp: true", HashKey::SourceIp),
        ("httpQueryParameterName: Q", HashKey::Query("Q".into())),
        (
            cookie,
            HashKey::Cookie(HashCookie {
                name: "s".into(),
                path: "/p".into(),
                ttl: Some(30),
                attributes: vec![("Secure".into(), String::new())],
            }),
        ),
    ];
    for (settings, key) in hashes {
        let policy = format!("{{loadBalancer: {{consistentHash: {{{settings}}}}}}}");
        let rule = rule("service/r", &format!("{{host: a.com, trafficPolicy: {policy}}}"));
        assert_eq!(keys(&world(objects().into_iter().chain([rule])))[0], Some(key), "{settings}");
    }
}

#[test]
fn connections_are_kept_together_by_the_clients_address_alone() {
    for (settings, want) in [("httpHeaderName: x", LbPolicy::Random), ("useSourceIp: true", LbPolicy::RingHash)] {
        let cluster = under(&format!("{{loadBalancer: {{consistentHash: {{{settings}}}}}}}"), Tcp);
        assert_eq!(cluster.lb_policy(), want, "{settings}");
    }
}

#[test]
fn pools_and_versions() {
    let cluster = under(
        "{connectionPool: {tcp: {maxConnections: 1, idleTimeout: 9s, tcpKeepalive: {time: 60s, probes: 3}}, http: \
         {http1MaxPendingRequests: 2, http2MaxRequests: 3, maxRetries: 4, maxRequestsPerConnection: 5, idleTimeout: \
         6s}}}",
        Http,
    );
    let t = cluster.circuit_breakers.clone().unwrap().thresholds[0];
    let limits = [t.max_connections, t.max_pending_requests, t.max_requests, t.max_retries].map(|l| l.unwrap().value);
    assert_eq!(limits, [1, 2, 3, 4]);
    let keepalive = cluster.upstream_connection_options.unwrap().tcp_keepalive.unwrap();
    assert_eq!((keepalive.keepalive_time.unwrap().value, keepalive.keepalive_probes.unwrap().value), (60, 3));
    let common = options(&cluster).common_http_protocol_options.unwrap();
    assert_eq!(common.idle_timeout.unwrap().seconds, 6, "that of HTTP goes first");
    assert_eq!(common.max_requests_per_connection.unwrap().value, 5);
    assert!(options(&cluster).upstream_protocol_options.is_some(), "Envoy wants a protocol beside options");

    let upgraded = under("{connectionPool: {http: {h2UpgradePolicy: UPGRADE, maxConcurrentStreams: 8}}}", Http);
    assert!(format!("{:?}", options(&upgraded)).contains("max_concurrent_streams: Some(UInt32Value { value: 8 })"));
    let client = under("{connectionPool: {http: {useClientProtocol: true}}}", Http);
    assert!(format!("{:?}", options(&client)).contains("UseDownstreamProtocolConfig"));
}

#[test]
fn a_retry_budget_has_istios_defaults() {
    let budget = |policy: &str| {
        let budget = under(policy, Http).circuit_breakers.unwrap().thresholds[0].retry_budget.unwrap();
        (budget.budget_percent.unwrap().value, budget.min_retry_concurrency.unwrap().value)
    };
    assert_eq!(budget("{retryBudget: {percent: 12.5, minRetryConcurrency: 7}}"), (12.5, 7));
    assert_eq!(budget("{retryBudget: {}}"), (20.0, 3));
}

#[test]
fn without_a_rule_nothing_is_limited() {
    let w = world([entry(se("a", &["a.com"], &[(80, Http)]))]);
    let thresholds = &w.compiler.cluster(A).unwrap().circuit_breakers.unwrap().thresholds[0];
    assert_eq!(thresholds.max_connections.unwrap().value, u32::MAX);
    assert_eq!(thresholds.max_retries.unwrap().value, u32::MAX);
}

#[test]
fn outlier_detection() {
    let cluster = under(
        "{outlierDetection: {consecutive5xxErrors: 0, consecutiveGatewayErrors: 2, interval: 1s, baseEjectionTime: \
         3m, maxEjectionPercent: 50, minHealthPercent: 20}}",
        Http,
    );
    let outlier = cluster.outlier_detection.unwrap();
    assert_eq!(outlier.enforcing_consecutive_5xx.unwrap().value, 0);
    assert_eq!(outlier.consecutive_gateway_failure.unwrap().value, 2);
    assert_eq!(outlier.enforcing_consecutive_gateway_failure.unwrap().value, 100);
    assert_eq!(outlier.enforcing_success_rate.unwrap().value, 0);
    assert_eq!(outlier.base_ejection_time.unwrap().seconds, 180);
    assert_eq!(outlier.max_ejection_percent.unwrap().value, 50);
    let panic = cluster.common_lb_config.unwrap().healthy_panic_threshold.unwrap().value;
    assert!((panic - 20.0).abs() < f64::EPSILON);
}

fn tls(cluster: &Cluster) -> UpstreamTlsContext {
    let socket = cluster.transport_socket.as_ref().unwrap();
    assert_eq!(socket.name, "envoy.transport_sockets.tls");
    let Some(transport_socket::ConfigType::TypedConfig(any)) = &socket.config_type else { panic!("no config") };
    UpstreamTlsContext::decode(any.value.as_slice()).unwrap()
}

// The field that istiod writes.
#[allow(deprecated)]
#[test]
fn tls_origination() {
    let cluster = under(
        "{tls: {mode: MUTUAL, clientCertificate: /c/cert.pem, privateKey: /c/key.pem, caCertificates: \
                         /c/ca.pem, sni: x.com}}",
        Grpc,
    );
    let context = tls(&cluster);
    assert_eq!(context.sni, "x.com");
    let common = context.common_tls_context.unwrap();
    assert_eq!(common.alpn_protocols, ["h2"]);
    let file = |source: &portolan_proto::envoy::envoy::config::core::v3::DataSource| match &source.specifier {
        Some(data_source::Specifier::Filename(name)) => name.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(file(common.tls_certificates[0].certificate_chain.as_ref().unwrap()), "/c/cert.pem");
    assert_eq!(common.tls_certificates[0].watched_directory.as_ref().unwrap().path, "/c");
    let Some(ValidationContextType::ValidationContext(validation)) = common.validation_context_type else {
        panic!("nothing is validated")
    };
    assert_eq!(file(validation.trusted_ca.as_ref().unwrap()), "/c/ca.pem");
    assert!(format!("{:?}", validation.match_subject_alt_names).contains("san.a.com"), "the ServiceEntry's names");
}

#[test]
fn the_server_name_is_the_host_that_is_asked_for() {
    let cluster = under("{tls: {mode: SIMPLE}}", Http);
    assert_eq!(tls(&cluster).sni, "");
    assert!(options(&cluster).upstream_http_protocol_options.unwrap().auto_sni);
    assert!(under("{tls: {mode: DISABLE}}", Http).transport_socket.is_none());
}

#[test]
fn proxy_protocol_goes_around_tls() {
    let plain = under("{proxyProtocol: {version: V2}}", Tcp).transport_socket.unwrap();
    assert_eq!(plain.name, "envoy.transport_sockets.upstream_proxy_protocol");
    assert!(format!("{plain:?}").contains("envoy.transport_sockets.upstream_proxy_protocol"));
}

/// Endpoints in three places, seen from `locality`: priority, weight and addresses of each group.
fn places(balancer: &str, locality: &str) -> Vec<(u32, u32, Vec<String>)> {
    let at = |address: &str, locality: &str, tier: &str| {
        endpoint(address).with(|e| {
            e.locality = locality.into();
            e.labels = labels(&[("tier", tier)]);
        })
    };
    let endpoints =
        vec![at("10.0.1.1", "r1/z1/s1", "a"), at("10.0.1.2", "r1/z2/s1", "b"), at("10.0.1.3", "r2/z1/s1", "a")];
    let a = se("a", &["a.com"], &[(80, Http)]).with(|e| e.endpoints = endpoints);
    let rule = rule("r", &format!("{{host: a.com, trafficPolicy: {balancer}}}"));
    let scope = Scope { locality: locality.into(), labels: labels(&[("tier", "a")]), ..scope() };
    let (compiler, _) = compile([entry(a), rule], scope, blocking());
    let groups = compiler.cluster(A).unwrap().load_assignment.unwrap().endpoints;
    let group = |group: &portolan_proto::envoy::envoy::config::endpoint::v3::LocalityLbEndpoints| {
        let assignment = portolan_proto::envoy::envoy::config::endpoint::v3::ClusterLoadAssignment {
            endpoints: vec![group.clone()],
            ..Default::default()
        };
        let of = Cluster { load_assignment: Some(assignment), ..Cluster::default() };
        (group.priority, group.load_balancing_weight.unwrap().value, addresses(&of).into_iter().collect())
    };
    let mut out: Vec<_> = groups.iter().map(group).collect();
    out.sort();
    out
}

#[test]
fn localities() {
    let expect = |policy: &str, locality: &str, want: &[(u32, u32, &[&str])]| {
        let want: Vec<(u32, u32, Vec<String>)> =
            want.iter().map(|(p, w, list)| (*p, *w, list.iter().map(|a| (*a).to_owned()).collect())).collect();
        assert_eq!(places(policy, locality), want, "{policy} from {locality}");
    };
    let balancer =
        |setting: &str| format!("{{outlierDetection: {{}}, loadBalancer: {{localityLbSetting: {setting}}}}}");
    let (one, two, three): (&[&str], &[&str], &[&str]) = (&["10.0.1.1"], &["10.0.1.2"], &["10.0.1.3"]);
    // Outlier detection alone brings failover about, unless it is switched off.
    expect("{outlierDetection: {}}", "r1/z1/s1", &[(0, 1, one), (1, 1, two), (2, 1, three)]);
    expect("{outlierDetection: {}}", "r2/z7/s1", &[(0, 1, three), (1, 1, one), (1, 1, two)]);
    expect(&balancer("{enabled: false}"), "r1/z1/s1", &[(0, 1, one), (0, 1, two), (0, 1, three)]);
    expect("{loadBalancer: {simple: RANDOM}}", "r1/z1/s1", &[(0, 1, one), (0, 1, two), (0, 1, three)]);
    // Another region is to stand in.
    expect(&balancer("{failover: [{from: r9, to: r2}]}"), "r9/z/s", &[(0, 1, three), (1, 1, one), (1, 1, two)]);
    let shares = balancer("{distribute: [{from: r1/z1/*, to: {'r1/z2/*': 50, 'r2/*': 50}}]}");
    expect(&shares, "r1/z1/s1", &[(0, 1, &[]), (0, 50, two), (0, 50, three)]);
    expect(&shares, "r2/z1/s1", &[(0, 1, one), (0, 1, two), (0, 1, three)]);
    let labels = balancer("{failoverPriority: [tier, topology.kubernetes.io/region]}");
    expect(&labels, "r1/z1/s1", &[(0, 1, one), (1, 1, three), (2, 1, two)]);
    expect(&balancer("{failoverPriority: ['tier=b']}"), "r1", &[(0, 1, two), (1, 1, one), (1, 1, three)]);
    let zones = "{loadBalancer: {zoneAwareLbSetting: {}}}";
    expect(zones, "r1/z1/s1", &[(0, 1, one), (0, 1, two), (1, 1, three)]);
}

#[test]
fn a_changed_rule_changes_the_clusters_of_its_hosts_alone() {
    let mut compiler = Compiler::new(scope(), blocking());
    let entries = [("a", "a.com"), ("b", "b.com"), ("c", "*.w.com")];
    let entries = entries.map(|(name, host)| Change::Apply(entry(se(name, &[host], &[(80, Http)]))));
    compiler.apply(&entries);
    compiler.commit();
    let digest = compiler.digest();
    let narrow = marked("r", "a.com", 1, "");
    compiler.apply(&[Change::Apply(narrow.clone())]);
    let update = compiler.commit();
    assert_eq!(update.hosts, ["a.com".into()]);
    assert!(update.pages.changed.is_empty() && compiler.digest() == digest);
    compiler.apply(&[Change::Apply(marked("r", "*.com", 2, ""))]);
    assert_eq!(compiler.commit().hosts.len(), 3);
    compiler.apply(&[Change::Delete(narrow.key())]);
    compiler.commit();
    assert_eq!(compiler.cluster(A).unwrap().connect_timeout.unwrap().seconds, 10);
}
