//! What Gateways and the VirtualServices that bind to them come to (SEMANTICS 4.8, 4.13, 6.1).

use crate::objects;

use objects::{Get, World, entry, gateway, kube, labels, se, slice, virtual_service};
use portolan_controller::model::{MeshConfig, Object, Protocol, Role, Scope};
use portolan_registry::lookup::{Connection, Listener, Request, server_id};
use portolan_registry::routing::NoHeaders;

fn world(objects: impl IntoIterator<Item = Object>) -> World {
    let scope = Scope {
        namespace: "infra".into(),
        role: Role::Gateway,
        labels: labels(&[("app", "gw")]),
        ips: vec!["1.1.1.1".into()],
        ..Scope::default()
    };
    World::of(objects, scope, MeshConfig::default())
}

/// Where a server of a port sends a GET request.
fn asked(world: &World, port: u16, server: &str, authority: &str, path: &str) -> String {
    let listener = Listener::Gateway { port, server: server_id(server.as_bytes()) };
    let decision = world.snapshot.request(&Request { listener, authority: authority.as_bytes(), connect: false });
    world.led(&decision, &Get(path))
}

fn http(world: &World, authority: &str, path: &str) -> String {
    asked(world, 80, "http.80", authority, path)
}

/// Where a connection to a port of the gateway goes.
fn connected(world: &World, at: &str, sni: Option<&str>) -> String {
    let query = Connection { destination: at.parse().unwrap(), sni: sni.map(str::as_bytes) };
    world.led(&world.snapshot.connection(&query), &NoHeaders)
}

/// The servers of a port: `NAME NAMES… tls`, and whether names are read.
fn servers(world: &World, port: u16) -> Vec<String> {
    let Some(plan) = world.compiler.plans().get(&port) else { return Vec::new() };
    let server = |server: &portolan_proto::v1::GatewayServer| {
        let tls = if server.tls.is_some() { " tls" } else { "" };
        format!("{} {}{tls}", server.name, server.server_names.join(" ")).trim().to_owned()
    };
    let inspects = plan.gateway.iter().any(|listener| listener.inspects);
    let all = plan.gateway.iter().flat_map(|listener| listener.servers.iter().map(server));
    all.chain(inspects.then(|| "inspects".to_owned())).collect()
}

fn a() -> Object {
    entry(se("a", &["a.com"], &[(80, Protocol::Http), (443, Protocol::Tls)]))
}

const HTTP: &str = "{selector: {app: gw}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: [HOSTS]}]}";

fn http_gateway(name: &str, hosts: &str) -> Object {
    gateway(name, &HTTP.replace("HOSTS", hosts))
}

fn to(hosts: &str, gateways: &str, path: &str, target: &str) -> String {
    let route = format!("route: [{{destination: {{host: {target}}}}}]");
    format!("{{hosts: [{hosts}], gateways: [{gateways}], http: [{{match: [{{uri: {{prefix: {path}}}}}], {route}}}]}}")
}

#[test]
fn a_host_needs_a_server_and_a_virtual_service_of_an_allowed_namespace() {
    let world = world([
        a(),
        http_gateway("infra/g", "\"default/a.com\", \"./own.com\", \"*.w.com\""),
        virtual_service("default/v", &to("a.com, own.com, x.w.com", "infra/g", "/", "a.com")),
    ]);
    assert_eq!(http(&world, "a.com:80", "/x"), " -> outbound|80||a.com");
    assert_eq!(http(&world, "x.w.com", "/"), " -> outbound|80||a.com");
    for host in ["own.com", "y.w.com", "other.com", "a.com."] {
        assert_eq!(http(&world, host, "/"), "404", "{host}");
    }
    assert_eq!(servers(&world, 80), ["http.80"]);
}

#[test]
fn only_gateways_that_select_the_workload_count_and_only_routes_that_bind_to_them() {
    let other = HTTP.replace("app: gw", "app: other").replace("HOSTS", "\"*\"");
    let world = world([
        a(),
        http_gateway("infra/g", "\"*\""),
        gateway("infra/o", &other.replace("number: 80", "number: 81")),
        virtual_service("default/short", &to("a.com", "g", "/", "a.com")),
        virtual_service("default/mesh", &to("b.com", "mesh", "/", "a.com")),
        virtual_service("default/both", &to("c.com", "mesh, infra/g", "/", "a.com")),
    ]);
    assert_eq!(http(&world, "a.com", "/"), "404");
    assert_eq!(http(&world, "b.com", "/"), "404");
    assert_eq!(http(&world, "c.com", "/"), " -> outbound|80||a.com");
    assert!(servers(&world, 81).is_empty());
}

#[test]
fn routes_of_several_for_one_host_are_one_list_and_what_takes_all_comes_last() {
    let world = world([
        a(),
        http_gateway("infra/g", "\"*\""),
        virtual_service("default/all@1", &to("a.com", "infra/g", "/", "all.com")),
        virtual_service("default/part@2", &to("a.com", "infra/g", "/part", "part.com")),
    ]);
    assert_eq!(http(&world, "a.com", "/part/1"), " -> outbound|80||part.com");
    assert_eq!(http(&world, "a.com", "/else"), " -> outbound|80||all.com");
}

#[test]
fn https_servers_of_one_port_do_not_share_virtual_hosts() {
    let tls = |name: &str| format!("tls: {{mode: SIMPLE, serverCertificate: /{name}.crt, privateKey: /{name}.key}}");
    let server = |name: &str| {
        format!("{{port: {{number: 443, name: {name}, protocol: HTTPS}}, hosts: [{name}.com], {}}}", tls(name))
    };
    let world = world([
        a(),
        gateway("infra/g", &format!("{{servers: [{}, {}]}}", server("a"), server("b"))),
        virtual_service("default/v", &to("a.com, b.com", "infra/g", "/", "a.com")),
    ]);
    assert_eq!(asked(&world, 443, "https.443.a.g.infra", "a.com", "/"), " -> outbound|443||a.com");
    assert_eq!(asked(&world, 443, "https.443.a.g.infra", "b.com", "/"), "404");
    assert_eq!(servers(&world, 443), ["https.443.a.g.infra a.com tls", "https.443.b.g.infra b.com tls", "inspects"]);
}

#[test]
fn a_server_may_redirect_to_https() {
    let server = "port: {number: 80, name: http, protocol: HTTP}, hosts: [a.com, b.com], tls: {httpsRedirect: true}";
    let world = world([
        a(),
        gateway("infra/g", &format!("{{servers: [{{{server}}}]}}")),
        virtual_service("default/v", &to("a.com", "infra/g", "/", "a.com")),
    ]);
    for host in ["a.com", "b.com"] {
        assert_eq!(http(&world, host, "/"), "https-redirect -> 301", "{host}");
    }
    assert_eq!(http(&world, "c.com", "/"), "404");
}

#[test]
fn passthrough_goes_by_server_name_and_bytes_by_port() {
    let ends = "tls: {mode: SIMPLE, serverCertificate: /c, privateKey: /k}";
    let spec = format!(
        "{{servers: [\
         {{port: {{number: 443, name: tls, protocol: TLS}}, hosts: ['*.com'], tls: {{mode: PASSTHROUGH}}}},\
         {{port: {{number: 444, name: pass, protocol: HTTPS}}, hosts: ['*.com'], tls: {{mode: PASSTHROUGH}}}},\
         {{port: {{number: 444, name: ends, protocol: TLS}}, hosts: [ends.org], {ends}}},\
         {{port: {{number: 9000, name: tcp, protocol: TCP}}, hosts: ['*']}}]}}"
    );
    let route = |host: &str| format!("route: [{{destination: {{host: {host}, port: {{number: 443}}}}}}]");
    let routes = format!(
        "{{hosts: [a.com, '*.w.com', ends.org, any.com], gateways: [infra/g], \
         tls: [{{match: [{{sniHosts: [a.com]}}], {}}}, {{match: [{{sniHosts: ['*.w.com'], port: 443}}], {}}}], \
         tcp: [{{match: [{{port: 9000}}], {}}}, {{match: [{{port: 444, gateways: [infra/g]}}], {}}}]}}",
        route("a.com"),
        route("w.com"),
        route("t.com"),
        route("e.com")
    );
    let world = world([a(), gateway("infra/g", &spec), virtual_service("default/v", &routes)]);
    assert_eq!(connected(&world, "1.1.1.1:443", Some("A.com")), "tls -> outbound|443||a.com");
    assert_eq!(connected(&world, "1.1.1.1:443", Some("x.w.com")), "tls -> outbound|443||w.com");
    assert_eq!(connected(&world, "1.1.1.1:443", Some("b.com")), "502");
    assert_eq!(connected(&world, "1.1.1.1:443", None), "502");
    assert_eq!(connected(&world, "1.1.1.1:444", Some("x.w.com")), "502");
    assert_eq!(connected(&world, "1.1.1.1:444", Some("ends.org")), "tcp -> outbound|443||e.com");
    assert_eq!(connected(&world, "1.1.1.1:9000", None), "tcp -> outbound|443||t.com");
    assert_eq!(servers(&world, 443), ["tcp", "inspects"]);
    assert_eq!(servers(&world, 444), ["tls.444.ends.g.infra ends.org tls", "tcp a.com", "inspects"]);
    assert_eq!(servers(&world, 9000), ["tcp"]);
}

#[test]
fn the_port_of_a_service_in_front_is_translated() {
    let world = world([
        a(),
        http_gateway("infra/g", "\"*\""),
        virtual_service("default/v", &to("a.com", "infra/g", "/", "a.com")),
        kube("infra", "gw", Some("10.9.9.9"), &[(80, Protocol::Http)]),
        slice_at("infra", "gw", "1.1.1.1", 80, 8080),
    ]);
    assert_eq!(asked(&world, 8080, "http.8080", "a.com", "/"), " -> outbound|80||a.com");
    assert!(servers(&world, 80).is_empty());
}

fn slice_at(namespace: &str, service: &str, address: &str, port: u16, target: u16) -> Object {
    let Object::EndpointSlice(slice) = slice(namespace, service, &[address], port) else { unreachable!() };
    let mut slice = (*slice).clone();
    slice.ports = [(format!("p{port}"), target)].into();
    Object::EndpointSlice(std::sync::Arc::new(slice))
}

#[test]
fn a_server_whose_place_is_taken_is_refused_and_said_to_be() {
    let tcp = "{servers: [{port: {number: 80, name: t, protocol: TCP}, hosts: ['*']}]}";
    let world = world([
        a(),
        http_gateway("infra/a@1", "\"*\""),
        gateway("infra/b@2", tcp),
        virtual_service("default/v", &to("a.com", "infra/a", "/", "a.com")),
    ]);
    assert_eq!(servers(&world, 80), ["http.80"]);
    assert_eq!(http(&world, "a.com", "/"), " -> outbound|80||a.com");
    let refused: Vec<String> = world.update.conflicts.iter().map(|c| c.subject.clone()).collect();
    assert_eq!(refused, ["port 80 of the gateway, server t"]);
}

#[test]
fn services_make_neither_virtual_hosts_nor_listeners_of_a_gateway() {
    let world = world([a(), entry(se("t", &["t.com"], &[(9000, Protocol::Tcp)]))]);
    assert_eq!(world.compiler.plans().keys().copied().collect::<Vec<_>>(), [0]);
    assert_eq!(world.http("10.0.0.1:80", "a.com"), "404");
    assert!(world.compiler.cluster("outbound|80||a.com").is_some());
}
