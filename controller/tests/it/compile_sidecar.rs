//! What a Sidecar lets its workloads see: objects in, decisions out.

use crate::objects;

use objects::*;
use portolan_controller::compile::Compiler;
use portolan_controller::model::Protocol::*;
use portolan_controller::model::{Change, Object};
use portolan_registry::lookup::{Listener, Request, server_id, socket_address};

const DST: &str = "198.18.5.5";

fn at(port: u16) -> String {
    format!("{DST}:{port}")
}

fn entries() -> Vec<Object> {
    vec![
        entry(se("default/a", &["a.com"], &[(80, Http), (8080, Http)])),
        entry(se("other/b", &["b.com", "*.w.com"], &[(80, Http), (443, Tls)])),
        entry(se("other/t", &["t.com"], &[(9000, Tcp)]).with(addresses(&["10.20.0.1"]))),
    ]
}

fn with(sidecars: &[(&str, &str)]) -> World {
    world(entries().into_iter().chain(sidecars.iter().map(|(name, spec)| sidecar(name, spec))))
}

#[test]
fn only_what_is_imported_is_seen() {
    let w = with(&[("default", "egress: [{hosts: [other/b.com, 'other/*.w.com']}]")]);
    assert_eq!(w.http(&at(80), "b.com"), "outbound|80||b.com");
    assert_eq!(w.http(&at(80), "x.w.com"), "outbound|80||*.w.com");
    assert_eq!(w.http(&at(80), "a.com"), "502");
    assert_eq!(w.plan(8080), "none");
    assert_eq!(w.tcp("10.20.0.1:9000"), "502");
    assert!(w.compiler.cluster("outbound|80||a.com").is_none());
}

#[test]
fn a_sidecar_for_istiod_alone_does_not_count() {
    let w = world(entries().into_iter().chain([match sidecar("default", "egress: [{hosts: [other/b.com]}]") {
        Object::Sidecar(object) => {
            let mut object = (*object).clone();
            object.meta.annotations.insert("portolan.io/for".into(), "istiod".into());
            Object::Sidecar(object.into())
        }
        other => other,
    }]));
    assert_eq!(w.http(&at(80), "a.com"), "outbound|80||a.com");
}

#[test]
fn one_name_under_a_wildcard_does_not_import_the_wildcard() {
    let w = with(&[("default", "egress: [{hosts: [other/x.w.com]}]")]);
    assert_eq!(w.plan(80), "none");
}

#[test]
fn exclusions_win_whatever_the_order() {
    for hosts in ["['~other/b.com', '*/*']", "['*/*', '~other/b.com']", "['*/*', '~/b.com']"] {
        let w = with(&[("default", &format!("egress: [{{hosts: {hosts}}}]"))]);
        assert_eq!(w.http(&at(80), "a.com"), "outbound|80||a.com", "{hosts}");
        assert_eq!(w.http(&at(80), "b.com"), "502", "{hosts}");
    }
}

#[test]
fn a_port_with_a_listener_of_its_own_takes_nothing_from_the_last() {
    let spec = "egress: [{port: {number: 80, protocol: HTTP}, hosts: ['other/*']}, {hosts: ['./*', other/t.com]}]";
    let w = with(&[("default", spec)]);
    assert_eq!(w.http(&at(80), "b.com"), "outbound|80||b.com");
    assert_eq!(w.http(&at(80), "a.com"), "502");
    assert_eq!(w.http(&at(8080), "a.com"), "outbound|8080||a.com");
    assert_eq!(w.tls(&at(443), "b.com"), "502");
    assert_eq!(w.plan(443), "none");
    assert_eq!(w.tcp("10.20.0.1:9000"), "outbound|9000||t.com");
}

#[test]
fn each_listener_decides_who_speaks_for_a_host() {
    let both = [
        entry(se("default/a", &["a.com"], &[(80, Http), (81, Http)])),
        entry(se("other/a", &["a.com"], &[(80, Http), (81, Http)]).with(|e| e.endpoints = vec![endpoint("10.0.0.9")])),
    ];
    let spec = "egress: [{port: {number: 81, protocol: HTTP}, hosts: [other/a.com]}, {hosts: ['*/*']}]";
    let w = world(both.into_iter().chain([sidecar("default", spec)]));
    let addresses = |name: &str| format!("{:?}", w.compiler.cluster(name).unwrap().load_assignment);
    assert!(addresses("outbound|80||a.com").contains("10.0.0.1"), "the own namespace's");
    assert!(addresses("outbound|81||a.com").contains("10.0.0.9"), "the imported one");
}

#[test]
fn the_policy_of_the_sidecar_replaces_the_meshs() {
    let (block, pass) = ("502", "PassthroughCluster");
    for (spec, want) in [
        ("outboundTrafficPolicy: {mode: ALLOW_ANY}", pass),
        ("outboundTrafficPolicy: {}", block),
        ("egress: [{hosts: ['*/*']}]", block),
    ] {
        let w = with(&[("default", spec)]);
        assert_eq!(w.http(&at(80), "unknown.com"), want, "{spec}");
        assert_eq!(w.tcp(&at(7)), want, "{spec}");
    }
}

#[test]
fn what_would_pass_through_goes_to_the_egress_proxy() {
    let policy = |hosts: &str, to: &str| {
        let spec = format!(
            "egress: [{{hosts: {hosts}}}]\noutboundTrafficPolicy: {{mode: ALLOW_ANY, egressProxy: {{host: {to}, \
             port: {{number: 8080}}}}}}"
        );
        with(&[("default", &spec)])
    };
    let places = |w: &World| {
        let cluster = w.compiler.cluster("PassthroughCluster")?;
        Some(cluster.load_assignment.unwrap().endpoints.iter().map(|e| e.lb_endpoints.len()).sum::<usize>())
    };
    let w = policy("['./*']", "a.com");
    assert_eq!(w.http(&at(80), "unknown.com"), "PassthroughCluster");
    assert_eq!(w.tcp(&at(7)), "PassthroughCluster");
    assert_eq!(places(&w), Some(1), "the endpoints of a.com and not where the client dialled");
    assert_eq!(places(&policy("['other/*']", "a.com")), None, "what is not imported is not there");
}

#[test]
fn the_root_namespaces_holds_where_there_is_no_other() {
    let root = ("istio-system/root", "egress: [{hosts: ['./*']}]");
    let w = with(&[root]);
    assert_eq!(w.http(&at(80), "a.com"), "outbound|80||a.com");
    assert_eq!(w.http(&at(80), "b.com"), "502");
    let w = with(&[root, ("default/mine", "egress: [{hosts: ['other/*']}]")]);
    assert_eq!(w.http(&at(80), "a.com"), "502");
    // It selects other workloads.
    let w = with(&[root, ("default/mine", "{workloadSelector: {labels: {app: x}}, egress: [{hosts: ['other/*']}]}")]);
    assert_eq!(w.http(&at(80), "a.com"), "outbound|80||a.com");
}

#[test]
fn a_sidecar_that_comes_and_goes() {
    let mut compiler = Compiler::new(scope(), blocking());
    compiler.apply(&entries().into_iter().map(Change::Apply).collect::<Vec<_>>());
    let before = compiler.commit();
    assert!(before.plans.contains(&8080));
    let (digest, narrow) = (compiler.digest(), sidecar("s", "egress: [{hosts: [other/t.com]}]"));
    compiler.apply(&[Change::Apply(narrow.clone())]);
    let narrowed = compiler.commit();
    assert!(narrowed.plans.contains(&8080) && !compiler.plans().contains_key(&8080));
    compiler.apply(&[Change::Delete(narrow.key())]);
    compiler.commit();
    assert_eq!(compiler.digest(), digest);
    assert!(compiler.plans().contains_key(&8080));
}

#[test]
fn a_socket_of_its_own_takes_nothing_from_captured_connections() {
    let spec = "egress: [{port: {number: 80, protocol: HTTP}, bind: 127.0.0.1, captureMode: NONE, hosts: ['other/*']}]";
    let w = with(&[("default", spec)]);
    assert_eq!(w.http("127.0.0.1:80", "b.com"), "outbound|80||b.com");
    assert_eq!(w.http("127.0.0.1:80", "a.com"), "502");
    let plan = &w.compiler.plans()[&80];
    assert!(plan.wildcard.is_none() && plan.addresses.is_empty());
    let [listener] = &plan.gateway[..] else { panic!("{plan:?}") };
    assert_eq!((listener.bind.as_str(), listener.inspects, listener.sniffs_http), ("127.0.0.1", false, false));
    assert!(matches!(&listener.servers[..], [server] if server.http));
}

#[test]
fn a_socket_speaks_what_the_sidecar_says() {
    let spec = "egress: [{port: {number: 80, protocol: TCP}, captureMode: NONE, hosts: ['other/b.com']}]";
    let w = with(&[("default", spec)]);
    assert_eq!(w.tcp("127.0.0.1:80"), "outbound|80||b.com", "the address is that of the host itself");
    assert!(matches!(&w.compiler.plans()[&80].gateway[0].servers[..], [server] if !server.http));
}

#[test]
fn all_ports_have_sockets_where_the_listener_names_none() {
    let spec = "egress: [{bind: 127.0.0.9, captureMode: NONE, hosts: ['*/*']}]";
    let w = with(&[("default", spec)]);
    assert_eq!(w.http("127.0.0.9:8080", "a.com"), "outbound|8080||a.com");
    assert_eq!(
        w.tls("127.0.0.9:443", "b.com"),
        "outbound|443||*.w.com",
        "any name goes to the first, as to an address"
    );
    assert_eq!(w.tcp("127.0.0.9:9000"), "outbound|9000||t.com");
    assert_eq!(w.tcp("10.20.0.1:9000"), "502");
}

#[test]
fn redirected_connections_to_the_address_of_a_listener() {
    let spec = "egress: [{port: {number: 80, protocol: HTTP}, bind: 10.9.9.9, hosts: ['other/*']}, {hosts: ['./*']}]";
    let w = with(&[("default", spec)]);
    assert_eq!(w.http("10.9.9.9:80", "b.com"), "outbound|80||b.com");
    assert_eq!(w.tcp("10.9.9.9:80"), "502");
    assert_eq!(w.plan(80), "- 10.9.9.9/http");
    assert_eq!(w.http(&at(8080), "a.com"), "outbound|8080||a.com");
}

#[test]
fn sockets_have_hosts_of_their_own() {
    let spec = "egress:\n\
                - {port: {number: 8080, protocol: HTTP_PROXY, name: p}, captureMode: NONE, hosts: ['./a.com']}\n\
                - {port: {number: 0, protocol: HTTP, name: u}, bind: 'unix:///run/h', hosts: ['other/b.com']}\n\
                - {port: {number: 0, protocol: TCP, name: t}, bind: 'unix://@t', hosts: ['other/t.com']}\n\
                - {hosts: ['other/*.w.com']}";
    let w = with(&[("default", spec)]);
    let ask = |chain: &str, authority: &str| {
        let listener = Listener::EgressProxy(server_id(chain.as_bytes()));
        said(&w.snapshot.request(&Request { listener, authority: authority.as_bytes(), connect: false }))
    };
    let (proxy, unix) = ("egress_proxy:127.0.0.1:8080", "egress_proxy:unix:///run/h");
    // A name alone means the listener's own port where the host has it.
    assert_eq!(ask(proxy, "a.com"), "outbound|8080||a.com");
    assert_eq!(ask(proxy, "a.com:80"), "outbound|80||a.com");
    assert_eq!(ask(proxy, "a.com:81"), "502");
    assert_eq!((ask(proxy, "b.com"), ask(unix, "a.com")), ("502".into(), "502".into()));
    assert_eq!(ask(unix, "b.com"), "outbound|80||b.com");
    assert_eq!(w.tcp(&socket_address(b"egress_socket:unix://@t").to_string()), "outbound|9000||t.com");
    // None of it is there for connections that are redirected.
    assert_eq!((w.http(&at(80), "a.com"), w.http(&at(80), "b.com")), ("502".into(), "502".into()));
    assert_eq!(w.http(&at(80), "x.w.com"), "outbound|80||*.w.com");
    let bound: Vec<&str> = w.compiler.plans()[&0].gateway.iter().map(|socket| socket.bind.as_str()).collect();
    assert_eq!(bound, ["127.0.0.1:8080", "unix:///run/h", "unix://@t"]);
}
