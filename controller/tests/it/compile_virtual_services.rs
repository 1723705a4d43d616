//! VirtualServices: whose routes a host and port has (SEMANTICS 4.1 to 4.5), delegates (4.7), TLS and TCP (4.11, 4.12).

use crate::objects;

use objects::{Tweak, World, addresses, apply, entry, opened, resolution, scope, se, virtual_service, world};
use portolan_controller::compile::{Compiler, compile};
use portolan_controller::model::{Change, MeshConfig, Object, Protocol, Resolution};
use portolan_registry::lookup::Connection;
use portolan_registry::routing::NoHeaders;

const AT80: &str = "192.0.2.1:80";
const AT8080: &str = "192.0.2.1:8080";

/// A VirtualService with one route, which is named after it.
fn one(name: &str, hosts: &str, more: &str) -> Object {
    let short = name.rsplit('/').next().unwrap().split('@').next().unwrap();
    let spec =
        format!("hosts: [{hosts}]\nhttp: [{{name: {short}, route: [{{destination: {{host: to.example}}}}]}}]\n{more}");
    virtual_service(name, &spec)
}

fn web(name: &str, hosts: &[&str]) -> Object {
    entry(se(name, hosts, &[(80, Protocol::Http), (8080, Protocol::Http)]))
}

/// Which VirtualService's route takes a request.
fn who(world: &World, destination: &str, host: &str) -> String {
    let led = world.routed(destination, host, "/");
    led.split(" -> ").next().unwrap().to_owned()
}

#[test]
fn precedence_among_several() {
    type Case = (&'static str, Vec<Object>, &'static str);
    let cases: [Case; 6] = [
        ("the oldest", vec![one("young@9", "a.com", ""), one("old@1", "a.com", "")], "old"),
        ("then the name", vec![one("b", "a.com", ""), one("a", "a.com", "")], "a"),
        (
            "a private one before an older public one",
            vec![one("public@1", "a.com", ""), one("private@9", "a.com", "exportTo: ['.']")],
            "private",
        ),
        (
            "one exported by name before a public one",
            vec![one("public@1", "a.com", ""), one("other/named@9", "a.com", "exportTo: [default]")],
            "named",
        ),
        ("an exact host before a wildcard", vec![one("wild@1", "'*.com'", ""), one("exact@9", "a.com", "")], "exact"),
        (
            "one that others may not see counts for nobody else",
            vec![one("other/hidden@1", "a.com", "exportTo: ['.']")],
            "outbound|80||a.com",
        ),
    ];
    for (what, objects, expected) in cases {
        let world = world(objects.into_iter().chain([web("e", &["a.com"])]));
        assert_eq!(who(&world, AT80, "a.com"), expected, "{what}");
    }
}

#[test]
fn names_that_no_entry_declares() {
    let nope = world([one("v", "nope.com", ""), web("e", &["a.com"])]);
    assert_eq!((who(&nope, AT80, "nope.com"), who(&nope, AT8080, "nope.com")), ("v".into(), "502".into()));
    let both = world([one("v", "nope.com, a.com", ""), web("e", &["a.com"])]);
    for (host, destination) in [("nope.com", AT80), ("nope.com", AT8080), ("a.com", AT80), ("a.com", AT8080)] {
        assert_eq!(who(&both, destination, host), "v", "{host} {destination}");
    }
    let below = world([one("v", "x.w.com", ""), web("e", &["*.w.com"])]);
    assert_eq!(
        (who(&below, AT80, "x.w.com"), who(&below, AT8080, "x.w.com")),
        ("v".into(), "outbound|8080||*.w.com".into())
    );
    assert_eq!(who(&below, AT80, "y.w.com"), "outbound|80||*.w.com");
}

#[test]
fn the_most_specific_wildcard_counts() {
    let world = world([one("a", "'*.com'", ""), one("b", "'*.w.com'", ""), web("e", &["a.com", "*.w.com"])]);
    assert_eq!((who(&world, AT80, "a.com"), who(&world, AT80, "x.w.com")), ("a".into(), "b".into()));
}

#[test]
fn routes_for_others_are_none_at_all() {
    let more = |condition: &str| {
        let spec =
            format!("hosts: [a.com]\nhttp: [{{match: [{{{condition}}}], route: [{{destination: {{host: b.com}}}}]}}]");
        world([virtual_service("v", &spec), web("e", &["a.com"])]).routed(AT80, "a.com", "/")
    };
    for (condition, applies) in [
        ("port: 80", true),
        ("port: 8080", false),
        ("sourceLabels: {app: x}", false),
        ("sourceNamespace: other", false),
        ("sourceNamespace: default", true),
        ("gateways: [mesh], sourceNamespace: other", true),
        ("gateways: [default/g]", false),
    ] {
        let expected = if applies { " -> outbound|80||b.com" } else { "outbound|80||a.com" };
        assert_eq!(more(condition), expected, "{condition}");
    }
}

#[test]
fn what_comes_after_a_route_for_everything_is_left_out() {
    let spec = "hosts: [a.com]\nhttp:\n- {name: get, match: [{uri: {prefix: /}, method: {exact: POST}}], route: [{destination: {host: b.com}}]}\n\
                - {name: all, match: [{uri: {prefix: /}}], directResponse: {status: 418}}\n- {name: never, redirect: {uri: /x}}";
    let world = world([virtual_service("v", spec), web("e", &["a.com"])]);
    assert_eq!(world.routed(AT80, "a.com", "/never"), "all -> 418");
}

#[test]
fn a_destination_without_a_port_has_the_targets_only_port() {
    let spec = "hosts: [a.com]\nhttp: [{route: [{destination: {host: single.com}}]}]";
    let single = entry(se("s", &["single.com"], &[(9090, Protocol::Http)]));
    let mut objects = vec![virtual_service("v", spec), web("e", &["a.com"])];
    assert_eq!(world(objects.clone()).routed(AT80, "a.com", "/"), " -> outbound|80||single.com");
    let (mut compiler, _) = compile(objects.clone(), scope(), MeshConfig::default());
    objects.push(single.clone());
    assert_eq!(world(objects.clone()).routed(AT80, "a.com", "/"), " -> outbound|9090||single.com");
    compiler.apply(&apply([single]));
    compiler.commit();
    let (whole, _) = compile(objects, scope(), MeshConfig::default());
    assert_eq!(compiler.digest(), whole.digest(), "the table follows the target");
}

#[test]
fn changes_leave_what_compiling_anew_would_make() {
    let objects = [
        web("e", &["a.com", "*.w.com"]),
        entry(se("t", &["t.com"], &[(443, Protocol::Tls), (9000, Protocol::Tcp)])),
        one("v1", "a.com, x.com", ""),
        one("v2@5", "'*.w.com', a.com", ""),
        virtual_service("root", "hosts: [a.com]\nhttp: [{delegate: {name: part}}]"),
        virtual_service(
            "part",
            "http: [{name: part, match: [{uri: {prefix: /p}}], route: [{destination: {host: t.com}}]}]",
        ),
        virtual_service(
            "l4",
            "hosts: [t.com]\ntls: [{match: [{sniHosts: [t.com]}], route: [{destination: {host: a.com, port: {number: 80}}}]}]\n\
            tcp: [{route: [{destination: {host: a.com, port: {number: 80}}}]}]",
        ),
    ];
    let (mut compiler, _) = compile(objects.clone(), scope(), MeshConfig::default());
    let anew = |left: Vec<Object>| compile(left, scope(), MeshConfig::default()).0.digest();
    for (at, gone) in objects.iter().enumerate() {
        compiler.apply(&[Change::Delete(gone.key())]);
        compiler.commit();
        let left = objects.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, o)| o.clone()).collect();
        assert_eq!(compiler.digest(), anew(left), "without {:?}", gone.key());
        compiler.apply(&apply([gone.clone()]));
        compiler.commit();
        assert_eq!(compiler.digest(), anew(objects.to_vec()), "with {:?} again", gone.key());
    }
    for object in &objects {
        compiler.apply(&[Change::Delete(object.key())]);
    }
    compiler.commit();
    assert_eq!(compiler.digest(), Compiler::new(scope(), MeshConfig::default()).tap());
}

trait Tap {
    fn tap(self) -> u64;
}

impl Tap for Compiler {
    /// The digest of one that never held anything.
    fn tap(mut self) -> u64 {
        self.commit();
        self.digest()
    }
}

#[test]
fn delegates() {
    let root = "hosts: [a.com]\nhttp:\n- {name: root, match: [{uri: {prefix: /p}, headers: {}}], timeout: 2s, delegate: {name: d, namespace: other}}\n\
                - {name: rest, route: [{destination: {host: a.com}}]}";
    let delegate = |export: &str| {
        virtual_service(
            "other/d",
            &format!(
                "exportTo: [{export}]\nhttp:\n- {{name: dropped, match: [{{uri: {{prefix: /p/1}}}}, {{uri: {{prefix: /zzz}}}}], directResponse: {{status: 200}}}}\n\
                 - {{name: exact, match: [{{uri: {{exact: /p/e}}}}], directResponse: {{status: 201}}}}\n- {{directResponse: {{status: 202}}}}"
            ),
        )
    };
    let world = world([virtual_service("v", root), delegate("'*'"), web("e", &["a.com"])]);
    let led = |path: &str| world.routed(AT80, "a.com", path);
    assert_eq!(led("/p/1"), "root -> 202", "a route with a condition that contradicts the root's is dropped");
    assert_eq!(led("/p/e"), "root-exact -> 201");
    assert_eq!(led("/zzz"), "rest -> outbound|80||a.com");
    let hidden = objects::world([virtual_service("v", root), delegate("'.'"), web("e", &["a.com"])]);
    assert_eq!(
        hidden.routed(AT80, "a.com", "/p/e"),
        "rest -> outbound|80||a.com",
        "it is not exported to the root's namespace"
    );
}

#[test]
fn the_reason_names_the_virtual_service() {
    let world = world([one("v", "a.com", ""), web("e", &["a.com"])]);
    assert_eq!(world.why_http(AT80, "a.com"), "host_exact: VirtualService default/v");
}

/// Where a TLS or TCP connection goes.
fn connected(world: &World, destination: &str, sni: Option<&str>) -> String {
    let query = Connection { destination: destination.parse().unwrap(), sni: sni.map(str::as_bytes) };
    world.led(&world.snapshot.connection(&query), &NoHeaders)
}

#[test]
fn tls_routes_stand_in_place_of_the_services_own() {
    let spec = "hosts: [x.w.com]\ntls: [{match: [{sniHosts: [x.w.com]}], route: [{destination: {host: b.com, port: {number: 443}}, weight: 1}, \
                {destination: {host: c.com, port: {number: 443}}, weight: 3}]}]";
    let wild = entry(se("e", &["*.w.com"], &[(443, Protocol::Tls)]).with(resolution(Resolution::None)));
    let world = world([virtual_service("v", spec), wild]);
    let at = "192.0.2.1:443";
    assert_eq!(connected(&world, at, Some("x.w.com")), "tls -> outbound|443||b.com outbound|443||c.com");
    assert_eq!(connected(&world, at, Some("y.w.com")), "502", "the generic chain is gone");
}

#[test]
fn tls_routes_of_a_service_with_an_address() {
    let spec = "hosts: [a.com]\ntls: [{match: [{sniHosts: [a.com]}], route: [{destination: {host: b.com, port: {number: 443}}}]}]";
    let vip = entry(se("e", &["a.com"], &[(443, Protocol::Tls)]).with(addresses(&["10.0.0.9"])));
    let world = world([virtual_service("v", spec), vip]);
    assert_eq!(connected(&world, "10.0.0.9:443", Some("a.com")), "tls -> outbound|443||b.com");
    assert_eq!(connected(&world, "10.0.0.9:443", Some("z.com")), "502");
}

#[test]
fn tcp_routes_by_subnet_and_for_all() {
    let spec = |condition: &str| {
        format!(
            "hosts: [u.com]\ntcp: [{{match: [{{{condition}}}], route: [{{destination: {{host: t.com, port: {{number: 9000}}}}}}]}}]"
        )
    };
    let service = || entry(se("e", &["u.com"], &[(9001, Protocol::Tcp)]).with(addresses(&["10.7.0.0/16"])));
    let inside = "10.7.1.1:9001";
    let by_port = world([virtual_service("v", &spec("port: 9001")), service()]);
    assert_eq!(connected(&by_port, inside, None), "tcp -> outbound|9000||t.com");
    let by_net = world([virtual_service("v", &spec("destinationSubnets: [10.7.1.0/24]")), service()]);
    assert_eq!(connected(&by_net, inside, None), "tcp -> outbound|9000||t.com");
    assert_eq!(connected(&by_net, "10.7.2.1:9001", None), "outbound|9001||u.com");
    let labels = world([virtual_service("v", &spec("sourceLabels: {app: x}")), service()]);
    assert_eq!(connected(&labels, inside, None), "outbound|9001||u.com");
    assert_eq!(opened(&labels.compiler).digest(), labels.compiler.digest());
}
