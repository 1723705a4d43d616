//! The rules of compilation, each as a table: objects in, decisions out.

use crate::objects;

use objects::*;
use portolan_controller::compile::ConflictRule;
use portolan_controller::model::Protocol::*;
use portolan_controller::model::{Change, MeshConfig, Object, OutboundMode, Resolution, Service};

const DST: &str = "198.18.5.5";

fn at(port: u16) -> String {
    format!("{DST}:{port}")
}

#[test]
fn hosts_are_matched_by_port() {
    let w = world([entry(se("a", &["a.com", "*.w.com"], &[(80, Http), (443, Tls)]))]);
    for (authority, port, want) in [
        ("a.com", 80, "outbound|80||a.com"),
        ("A.com.:80", 80, "outbound|80||a.com"),
        ("x.w.com", 80, "outbound|80||*.w.com"),
        ("w.com", 80, "502"),
        ("b.com", 80, "502"),
    ] {
        assert_eq!(w.http(&at(port), authority), want, "{authority}");
    }
    assert_eq!(w.tls(&at(443), "a.com"), "outbound|443||a.com");
    assert_eq!(w.tls(&at(443), "y.w.com"), "outbound|443||*.w.com");
    assert_eq!(w.tls(&at(443), "b.com"), "502");
    assert_eq!(w.plan(80), "http wildcard");
    assert_eq!(w.plan(443), "tls wildcard");
    assert_eq!(w.plan(81), "none");
}

#[test]
fn mixed_case_host_works() {
    let w = world([entry(se("a", &["MiXed.Example.com"], &[(80, Http), (443, Tls)]))]);
    assert_eq!(w.http(&at(80), "mixed.example.com"), "outbound|80||MiXed.Example.com");
    assert_eq!(w.tls(&at(443), "mixed.example.com"), "outbound|443||MiXed.Example.com");
    assert!(w.compiler.cluster("outbound|80||MiXed.Example.com").is_some());
}

#[test]
fn visibility_by_export() {
    let export = |to: &'static [&'static str]| {
        move |e: &mut portolan_controller::model::ServiceEntry| {
            e.export_to = to.iter().map(|t| (*t).to_owned()).collect();
        }
    };
    for (to, default, want) in [
        (&["*"][..], "*", "outbound|80||x.com"),
        (&["default"], "*", "outbound|80||x.com"),
        (&["."], "*", "502"),
        (&["third"], "*", "502"),
        (&["~"], "*", "502"),
        (&["*", "~"], "*", "outbound|80||x.com"),
        (&[], ".", "502"),
        (&[], "*", "outbound|80||x.com"),
    ] {
        let mesh = MeshConfig { default_service_export_to: vec![default.into()], ..blocking() };
        let w = world_of([entry(se("other/a", &["x.com"], &[(80, Http)]).with(export(to)))], mesh);
        assert_eq!(w.http(&at(80), "x.com"), want, "{to:?} by default {default}");
    }
}

#[test]
fn one_namespace_speaks_for_a_host() {
    let older = || entry(se("n1/a@1", &["x.com"], &[(80, Http)]));
    let newer = || entry(se("n2/b@2", &["x.com"], &[(80, Http), (8080, Http)]));
    let own = || entry(se("default/c@3", &["x.com"], &[(80, Http)]));
    let named = || entry(se("n2/b@2", &["x.com"], &[(8080, Http)]).with(|e| e.export_to = vec!["default".into()]));

    let w = world([older(), newer()]);
    assert_eq!(w.http(&at(8080), "x.com"), "502");
    assert_eq!(w.plan(8080), "none");
    assert_eq!(w.why_http(&at(80), "x.com"), "host_exact: ServiceEntry n1/a over ServiceEntry n2/b");
    let w = world([older(), newer(), own()]);
    assert!(w.why_http(&at(80), "x.com").starts_with("host_exact: ServiceEntry default/c over"));
    let w = world([older(), named()]);
    assert_eq!(w.http(&at(8080), "x.com"), "outbound|8080||x.com", "exported by name comes first");
}

#[test]
fn kubernetes_beats_entries_of_other_namespaces_but_not_of_the_own() {
    let host = "foo.ns1.svc.cluster.local";
    let service = || kube("ns1", "foo", Some("10.96.0.1"), &[(80, Http)]);
    let w = world([service(), entry(se("ns2/a", &[host], &[(80, Http)]))]);
    assert!(w.why_http(&at(80), host).contains("Service ns1/foo"));
    let w = world([service(), entry(se("default/a@9", &[host], &[(80, Http)]))]);
    assert!(w.why_http(&at(80), host).starts_with("host_exact: ServiceEntry default/a"));
}

#[test]
fn kubernetes_names_shorten() {
    let w = world([kube("default", "web", Some("10.96.5.1"), &[(80, Http)]), kube("n2", "db", None, &[(80, Http)])]);
    let web = "outbound|80||web.default.svc.cluster.local";
    let db = "outbound|80||db.n2.svc.cluster.local";
    for (authority, want) in [
        ("web", web),
        ("web.default", web),
        ("web.default.svc", web),
        ("web.default.svc.cluster.local", web),
        ("10.96.5.1", web),
        ("db", "502"),
        ("db.n2", db),
        ("x.db.n2", db),
        ("x.web", "502"),
    ] {
        assert_eq!(w.http(&at(80), authority), want, "{authority}");
    }
}

#[test]
fn full_name_beats_alternate() {
    let w = world([
        kube("default", "hl", Some("10.96.5.1"), &[(80, Http), (81, Http)]),
        entry(se("a@9", &["hl"], &[(80, Http)])),
    ]);
    assert_eq!(w.http(&at(80), "hl"), "outbound|80||hl");
    assert_eq!(w.http(&at(81), "hl"), "outbound|81||hl.default.svc.cluster.local");
    assert_eq!(w.http(&at(80), "hl.default"), "outbound|80||hl.default.svc.cluster.local");
}

#[test]
fn external_name_is_a_further_name_of_its_target() {
    let alias = Object::Service(std::sync::Arc::new(Service {
        meta: meta("default", "ext", 0),
        external_name: Some("a.com".into()),
        ..Service::default()
    }));
    let w = world([alias, entry(se("a", &["a.com"], &[(80, Http), (443, Tls)]))]);
    assert_eq!(w.http(&at(80), "ext.default.svc.cluster.local"), "outbound|80||a.com");
    assert_eq!(w.http(&at(80), "ext"), "outbound|80||a.com");
    assert_eq!(w.tls(&at(443), "ext.default"), "outbound|443||a.com");
}

#[test]
fn routes_to_an_external_name_go_to_its_target() {
    let alias = |target: &str, ports: &[(u16, portolan_controller::model::Protocol)]| {
        Object::Service(std::sync::Arc::new(Service {
            meta: meta("default", "ext", 0),
            external_name: Some(target.into()),
            ports: ports.iter().map(|(n, p)| port(*n, *p)).collect(),
            ..Service::default()
        }))
    };
    let routes = virtual_service("v", "hosts: [v.com]\nhttp: [{route: [{destination: {host: ext}}]}]");
    let entries = [entry(se("a", &["a.com"], &[(8080, Http)])), entry(se("b", &["b.com"], &[(80, Http), (81, Http)]))];
    let mut w = world(entries.into_iter().chain([routes, alias("a.com", &[])]));
    let led = |w: &World| w.routed(&at(80), "v.com", "/").split(" -> ").last().unwrap().to_owned();
    assert_eq!(led(&w), "outbound|8080||a.com");
    for (object, cluster) in [
        (alias("b.com", &[]), "outbound|80||b.com"),
        (alias("b.com", &[(81, Http)]), "outbound|81||b.com"),
        (entry(se("a", &["a.com"], &[(80, Http)])), "outbound|81||b.com"),
    ] {
        w.compiler.apply(&[Change::Apply(object)]);
        w.compiler.commit();
        w.snapshot = opened(&w.compiler);
        assert_eq!(led(&w), cluster);
    }
    w.compiler.apply(&[Change::Delete(alias("b.com", &[]).key())]);
    w.compiler.commit();
    w.snapshot = opened(&w.compiler);
    assert_eq!(led(&w), "outbound|80||ext.default.svc.cluster.local", "a name like any other");
}

#[test]
fn port_belongs_to_the_oldest_that_declares_it() {
    let stat = se("a@1", &["x.com"], &[(80, Http)]);
    let dns = se("b@2", &["x.com"], &[(80, Http), (8080, Http)]).with(resolution(Resolution::Dns));
    let w = world([entry(stat), entry(dns)]);
    assert_eq!(w.http(&at(8080), "x.com"), "outbound|8080||x.com");
    let kind = |name: &str| w.compiler.cluster(name).unwrap().load_assignment.unwrap().endpoints.len();
    assert_eq!((kind("outbound|80||x.com"), kind("outbound|8080||x.com")), (1, 1));
}

#[test]
fn newer_tcp_takes_the_virtual_host_away() {
    let w = world([
        entry(se("a@1", &["x.com"], &[(80, Http)])),
        entry(se("b@2", &["x.com"], &[(80, Tcp)]).with(addresses(&["10.1.1.1"]))),
    ]);
    assert_eq!(w.http(&at(80), "x.com"), "502");
    assert_eq!(w.tcp("10.1.1.1:80"), "outbound|80||x.com");
}

#[test]
fn addresses_bind_tcp_and_name_http() {
    let w =
        world([entry(se("a", &["a.com"], &[(80, Http), (443, Tls), (9000, Tcp), (7000, Auto)]).with(addresses(&[
            "10.0.9.1",
            "2001:db8::10",
            "10.9.0.0/16",
            "10.8.7.6/32",
        ])))]);
    for authority in ["a.com", "10.0.9.1", "[2001:db8::10]:80", "10.8.7.6"] {
        assert_eq!(w.http(&at(80), authority), "outbound|80||a.com", "{authority}");
    }
    assert_eq!(w.tls("10.0.9.1:443", "anything"), "outbound|443||a.com");
    assert_eq!(w.tcp("[2001:db8::10]:443"), "outbound|443||a.com");
    assert_eq!(w.tls("10.9.3.3:443", "a.com"), "outbound|443||a.com");
    assert_eq!(w.tls("10.9.3.3:443", "b.com"), "502");
    assert_eq!(w.tls(&at(443), "a.com"), "502");
    assert_eq!(w.tcp("10.9.3.3:9000"), "outbound|9000||a.com");
    assert_eq!(w.tcp(&at(9000)), "502");
    assert_eq!(w.plan(80), "http wildcard");
    assert_eq!(w.plan(443), "tls wildcard 10.9.0.0/16 10.0.9.1 10.8.7.6 2001:db8::10");
    assert_eq!(w.plan(7000), "http wildcard 10.9.0.0/16 10.0.9.1/http 10.8.7.6/http 2001:db8::10/http");
}

#[test]
fn sniffed_address_has_one_virtual_host() {
    let one = world([entry(se("a", &["a.com"], &[(7000, Auto)]).with(addresses(&["10.0.9.1"])))]);
    assert_eq!(one.http("10.0.9.1:7000", "whatever"), "outbound|7000||a.com");
    assert_eq!(one.tcp("10.0.9.1:7000"), "outbound|7000||a.com");
    let two = world([entry(se("a", &["a.com"], &[(7000, Auto)]).with(addresses(&["10.0.9.1", "10.0.9.2"])))]);
    assert_eq!(two.http("10.0.9.1:7000", "a.com"), "404", "two listeners, one name for their routes");
    assert_eq!(two.tcp("10.0.9.2:7000"), "outbound|7000||a.com");
}

#[test]
fn without_address_tcp_takes_the_port_by_age() {
    let w = world([entry(se("a@2", &["a.com"], &[(9000, Tcp)])), entry(se("b@1", &["b.com"], &[(9000, Tcp)]))]);
    assert_eq!(w.tcp(&at(9000)), "outbound|9000||b.com");
    let lost: Vec<_> = w.update.conflicts.iter().filter(|c| c.rule == ConflictRule::Port).collect();
    assert_eq!(lost.len(), 1);
    assert_eq!(lost[0].losers[0].name, "a");
}

#[test]
fn http_tls_and_tcp_share_a_port() {
    let w = world([
        entry(se("a@2", &["a.com"], &[(80, Http)])),
        entry(se("b@1", &["b.com"], &[(80, Tcp)])),
        entry(se("c@3", &["c.com"], &[(80, Tls)])),
    ]);
    assert_eq!(w.http(&at(80), "a.com"), "outbound|80||a.com");
    assert_eq!(w.http(&at(80), "b.com"), "502");
    assert_eq!(w.tcp(&at(80)), "outbound|80||b.com");
    assert_eq!(w.tls(&at(80), "c.com"), "outbound|80||c.com");
    assert_eq!(w.tls(&at(80), "d.com"), "outbound|80||b.com");
    assert_eq!(w.plan(80), "tls http wildcard");
}

#[test]
fn mongo_and_mysql_share_with_nobody() {
    for (first, second, tcp, http) in [
        (Mongo, Http, "outbound|80||b.com", "outbound|80||b.com"),
        (Http, Mongo, "502", "outbound|80||a.com"),
        (Tcp, Mysql, "outbound|80||a.com", "outbound|80||a.com"),
        (Mysql, Tls, "outbound|80||a.com", "outbound|80||a.com"),
    ] {
        // For Mongo first, the older entry is b.
        let (x, y) = if first == Mongo { ("b.com", "a.com") } else { ("a.com", "b.com") };
        let w = world([entry(se("x@1", &[x], &[(80, first)])), entry(se("y@2", &[y], &[(80, second)]))]);
        assert_eq!(w.tcp(&at(80)), tcp, "{first:?} then {second:?}");
        if first == Http {
            assert_eq!(w.http(&at(80), "a.com"), http);
        } else {
            assert!(!w.plan(80).contains("http"), "{}", w.plan(80));
        }
        if second == Tls {
            assert_eq!(w.tls(&at(80), "b.com"), tcp, "the server name is not asked for");
            assert_eq!(w.plan(80), "wildcard");
        }
        assert!(w.update.conflicts.iter().any(|c| c.rule == ConflictRule::Protocol));
    }
}

#[test]
fn proxy_ports_are_left_alone_for_http_only() {
    let w = world([entry(se("a", &["a.com"], &[(15001, Http), (15006, Tcp)]))]);
    assert_eq!(w.plan(15001), "none");
    assert_eq!(w.plan(15006), "wildcard");
}

#[test]
fn partial_wildcard_is_dropped_on_tls_alone() {
    let w = world([entry(se("a", &["*part.com", "b.com"], &[(80, Http), (443, Tls)]))]);
    assert_eq!(w.http(&at(80), "xpart.com"), "outbound|80||*part.com");
    assert_eq!(w.tls(&at(443), "xpart.com"), "502");
    assert_eq!(w.tls(&at(443), "b.com"), "outbound|443||b.com");
    assert!(w.update.conflicts.iter().any(|c| c.rule == ConflictRule::PartialWildcard && c.subject == "*part.com"));
}

#[test]
fn headless_entry_listens_on_its_endpoints() {
    let select = |e: &mut portolan_controller::model::ServiceEntry| {
        e.workload_selector = Some(labels(&[("app", "t")]));
    };
    let w = world([
        entry(se("a", &["a.com"], &[(9000, Tcp), (80, Http)]).with(resolution(Resolution::None)).with(select)),
        workload(we("vm1", "10.7.7.7", &[("app", "t")])),
        workload(we("vm2", "1.1.1.1", &[("app", "t")])),
        workload(we("vm3", "10.7.7.9", &[("app", "u")])),
    ]);
    assert_eq!(w.tcp("10.7.7.7:9000"), "outbound|9000||a.com");
    assert_eq!(w.plan(9000), "- 10.7.7.7", "neither the own address nor one that is not selected");
    assert_eq!(w.plan(80), "http wildcard");

    let w = world([kube("default", "db", None, &[(3306, Tcp)]), slice("default", "db", &["190.64.31.232"], 3306)]);
    assert_eq!(w.tcp("190.64.31.232:3306"), "outbound|3306||db.default.svc.cluster.local");
    assert_eq!(w.tcp(&at(3306)), "502");
}

#[test]
fn auto_allocated_addresses_count_with_dns_capture() {
    let object = || {
        entry(se("a", &["a.com"], &[(80, Http), (9000, Tcp)]).with(|e| {
            e.status_addresses = vec![("240.240.0.1".into(), "a.com".into()), ("2001:2::1".into(), "a.com".into())];
        }))
    };
    let off = world([object()]);
    assert_eq!((off.plan(9000), off.http(&at(80), "240.240.0.1")), ("wildcard".into(), "502".into()));
    let mut compiler = portolan_controller::compile::Compiler::new(scope(), blocking()).with_dns_capture(true);
    compiler.apply(&apply([object()]));
    let update = compiler.commit();
    let snapshot = opened(&compiler);
    let on = World { compiler, update, snapshot };
    assert_eq!(on.plan(9000), "- 240.240.0.1");
    assert_eq!(on.tcp("240.240.0.1:9000"), "outbound|9000||a.com");
    assert_eq!(on.http(&at(80), "240.240.0.1"), "outbound|80||a.com");
}

#[test]
fn forward_proxy_selects_the_port_asked_for() {
    let w = world([
        entry(se("a", &["a.com"], &[(80, Http), (8443, Tls)])),
        entry(se("b", &["*.n.com"], &[(80, Http)]).with(resolution(Resolution::None))),
    ]);
    for (authority, want) in [
        ("a.com", "outbound|80||a.com"),
        ("a.com:8443", "outbound|8443||a.com"),
        ("a.com:81", "502"),
        ("x.n.com", "forward|80||*.n.com"),
    ] {
        assert_eq!(w.proxy(authority), want, "{authority}");
    }
    let forward = w.compiler.cluster("forward|80||*.n.com").unwrap();
    let metadata = &forward.metadata.as_ref().unwrap().filter_metadata["portolan"].fields["port"];
    assert!(format!("{metadata:?}").contains("80"));
    assert!(w.compiler.cluster("forward|80||a.com").is_none());
}

#[test]
fn unknown_destinations_follow_the_policy() {
    for (mode, http, tcp, catch_all) in [
        (OutboundMode::RegistryOnly, "502", "502", "wildcard"),
        (OutboundMode::AllowAny, "PassthroughCluster", "PassthroughCluster", "wildcard"),
        (OutboundMode::AllowAnyDynamicDns, "AllowAnyDynamicDNSCluster", "PassthroughCluster", "http wildcard"),
    ] {
        let mesh = MeshConfig { outbound: mode, ..MeshConfig::default() };
        let w = world_of([entry(se("a", &["a.com"], &[(80, Http)]))], mesh);
        assert_eq!(w.http(&at(80), "b.com"), http);
        assert_eq!(w.tcp(&at(81)), tcp);
        assert_eq!(w.plan(0), catch_all);
        for name in [http, tcp].iter().filter(|n| n.ends_with("Cluster")) {
            assert!(w.compiler.cluster(name).is_some());
        }
    }
}
