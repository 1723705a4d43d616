//! Findings between resources that are each valid.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use portolan_controller::config::documents;
use portolan_controller::source::read::{self, Outcome};
use portolan_controller::validate::conflict::{self, Placed};
use portolan_controller::validate::finding::Finding;

fn conflicts(text: &str) -> Vec<Finding> {
    let file: Arc<str> = Arc::from("test.yaml");
    let mut objects = Vec::new();
    for document in documents::split(text) {
        let (outcomes, findings) = read::document(&document, &file);
        for outcome in outcomes {
            let Outcome::Object(object, line) = outcome else { panic!("not accepted: {findings:?}") };
            objects.push(Placed { object, file: Arc::clone(&file), line });
        }
    }
    let (objects, mut findings) = conflict::deduplicate(objects);
    findings.extend(conflict::between(&objects));
    findings
}

fn entry(name: &str, spec: &str) -> String {
    document("ServiceEntry", name, spec)
}

/// `name` may be `namespace/name`.
fn document(kind: &str, name: &str, spec: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    let metadata = format!("{{name: {name}, namespace: {namespace}}}");
    format!("---\napiVersion: networking.istio.io/v1\nkind: {kind}\nmetadata: {metadata}\nspec: {spec}\n")
}

/// `NAME CODE FIELD` of each finding.
fn said(documents: &[String]) -> BTreeSet<String> {
    let findings = conflicts(&documents.concat());
    findings.iter().map(|f| format!("{} {} {}", f.name, f.code, f.field)).collect()
}

fn expect<const N: usize>(documents: &[String], lines: [&str; N]) {
    let expected: BTreeSet<String> = lines.map(str::to_owned).into();
    assert_eq!(said(documents), expected, "{}", documents.concat());
}

const HTTP: &str = "ports: [{number: 80, name: http, protocol: HTTP}]";

#[test]
fn the_same_resource_twice() {
    let spec = format!("{{hosts: [a.example.com], resolution: DNS, {HTTP}}}");
    expect(&[entry("a", &spec), entry("a", &spec)], ["a duplicate-resource metadata.name"]);
}

#[test]
fn a_port_with_two_protocols() {
    let other = "ports: [{number: 80, name: http, protocol: TCP}]";
    let a = entry("a", &format!("{{hosts: [a.example.com], resolution: DNS, {HTTP}}}"));
    let b = entry("b", &format!("{{hosts: [a.example.com], resolution: DNS, {other}}}"));
    expect(&[a.clone(), b], ["b protocol-conflict spec.ports[0].protocol"]);
    // Nobody sees both.
    let spec = format!("{{hosts: [a.example.com], resolution: DNS, exportTo: ['.'], {other}}}");
    let hidden = a.replace("resolution: DNS,", "resolution: DNS, exportTo: ['.'],");
    expect(&[hidden, entry("other/b", &spec)], []);
}

#[test]
fn tcp_that_swallows_tcp() {
    let tcp = "ports: [{number: 9000, name: tcp, protocol: TCP}], resolution: STATIC";
    let a = entry("a", &format!("{{hosts: [a.example.com], {tcp}}}"));
    let b = entry("b", &format!("{{hosts: [b.example.com], {tcp}}}"));
    expect(&[a, b], ["b port-shadowed spec.ports[0]"]);
}

#[test]
fn an_address_that_two_take() {
    let tls = "ports: [{number: 443, name: tls, protocol: TLS}], resolution: NONE";
    let a = entry("a", &format!("{{hosts: [a.example.com], addresses: [10.0.0.1], {tls}}}"));
    let b = entry("b", &format!("{{hosts: [b.example.com], addresses: [10.0.0.2, 10.0.0.1], {tls}}}"));
    let c = entry("c", &format!("{{hosts: [c.example.com, d.example.com], addresses: [10.0.0.3], {tls}}}"));
    expect(&[a, b, c], ["b port-shadowed spec.addresses[1]", "c port-shadowed spec.ports[0]"]);
}

#[test]
fn a_host_that_two_declare() {
    let a = entry("a", &format!("{{hosts: [a.example.com], resolution: DNS, {HTTP}}}"));
    let elsewhere = entry("other/b", &format!("{{hosts: [A.example.com], resolution: DNS, {HTTP}}}"));
    expect(&[a.clone(), elsewhere], ["b duplicate-host spec.hosts[0]"]);
    let unlike = entry("c", &format!("{{hosts: [a.example.com], resolution: STATIC, {HTTP}}}"));
    expect(&[a.clone(), unlike], ["c duplicate-host spec.hosts[0]"]);
    // Two that merge.
    let more =
        entry("d", "{hosts: [a.example.com], resolution: DNS, ports: [{number: 81, name: more, protocol: HTTP}]}");
    expect(&[a, more], []);
}

#[test]
fn static_ports_of_other_names() {
    let spec = |name: &str| {
        format!("{{hosts: [a.example.com], resolution: STATIC, ports: [{{number: 80, name: {name}, protocol: HTTP}}]}}")
    };
    expect(&[entry("a", &spec("one")), entry("b", &spec("two"))], ["b port-name-conflict spec.hosts[0]"]);
}

#[test]
fn wildcards_over_too_much() {
    let hosts = |hosts: &str| format!("{{hosts: [{hosts}], resolution: NONE, {HTTP}}}");
    expect(&[entry("a", &hosts("'*.com'"))], ["a broad-wildcard spec.hosts[0]"]);
    expect(&[entry("a", &hosts("'*.example.com'"))], []);
    let route = "{hosts: ['*.com'], http: [{directResponse: {status: 404}}]}";
    expect(&[document("VirtualService", "v", route)], ["v broad-wildcard spec.hosts[0]"]);
    let gateway = "{hosts: ['*'], gateways: [edge/g], http: [{directResponse: {status: 404}}]}";
    expect(&[document("VirtualService", "v", gateway)], []);
}

#[test]
fn a_host_that_two_route() {
    let spec = "{hosts: [a.example.com], http: [{directResponse: {status: 404}}]}";
    let two = [document("VirtualService", "a", spec), document("VirtualService", "b", spec)];
    expect(&two, ["b duplicate-host spec.hosts[0]"]);
    let own = spec.replace("http:", "exportTo: ['.'], http:");
    expect(&[document("VirtualService", "x/a", &own), document("VirtualService", "z/b", &own)], []);
    // A gateway joins the routes of a host.
    let edge = spec.replace("http:", "gateways: [edge/g], http:");
    expect(&[document("VirtualService", "a", &edge), document("VirtualService", "b", &edge)], []);
}

#[test]
fn routes_to_nowhere() {
    let a = entry("a", &format!("{{hosts: [a.example.com], resolution: DNS, {HTTP}}}"));
    let rule = document("DestinationRule", "a", "{host: a.example.com, subsets: [{name: v1, labels: {v: '1'}}]}");
    let route = |to: &str| {
        let spec = format!("{{hosts: [a.example.com], http: [{{route: [{{destination: {to}}}]}}]}}");
        vec![a.clone(), rule.clone(), document("VirtualService", "v", &spec)]
    };
    let field = "v unreachable-route spec.http[0].route[0].destination";
    expect(&route("{host: b.example.com}"), [&format!("{field}.host")]);
    expect(&route("{host: a.example.com, port: {number: 81}}"), [&format!("{field}.port.number")]);
    expect(&route("{host: a.example.com, subset: v2}"), [&format!("{field}.subset")]);
    expect(&route("{host: a.example.com, subset: v1, port: {number: 80}}"), []);
    // What a cluster may have cannot be judged from files without Services.
    expect(&route("{host: reviews}"), []);

    let delegate = "{hosts: [a.example.com], http: [{delegate: {name: d, namespace: other}}]}";
    let route = document("VirtualService", "v", delegate);
    expect(&[a.clone(), route.clone()], ["v unreachable-route spec.http[0].delegate"]);
    let target = document("VirtualService", "other/d", "{http: [{directResponse: {status: 200}}]}");
    expect(&[a.clone(), route, target], []);

    let tls = "{hosts: [a.example.com], tls: [{match: [{sniHosts: [a.example.com]}], route: [{destination: {host: \
               a.example.com}}]}]}";
    expect(&[a, document("VirtualService", "v", tls)], ["v unreachable-route spec.tls"]);
}

#[test]
fn gateways_that_do_not_exist() {
    let spec = "{hosts: [a.example.com], gateways: [edge/other], http: [{directResponse: {status: 404}}]}";
    let server = "{servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}";
    let route = document("VirtualService", "v", spec);
    expect(&[route.clone(), document("Gateway", "edge/g", server)], ["v unreachable-route spec.gateways[0]"]);
    expect(&[route, document("Gateway", "edge/other", server)], []);
}

#[test]
fn rules_of_the_same_host() {
    let policy = "{host: a.example.com, trafficPolicy: {loadBalancer: {simple: RANDOM}}, subsets: [{name: v1}]}";
    let two = [document("DestinationRule", "a", policy), document("DestinationRule", "b", policy)];
    expect(&two, ["b policy-ignored spec.trafficPolicy", "b policy-ignored spec.subsets[0]"]);
    let other = policy.replace("v1", "v2").replace("trafficPolicy: {loadBalancer: {simple: RANDOM}},", "");
    expect(&[document("DestinationRule", "a", policy), document("DestinationRule", "b", &other)], []);
}

#[test]
fn a_clients_wildcard_before_a_services_rule() {
    let policy = |host: &str| format!("{{host: '{host}', trafficPolicy: {{loadBalancer: {{simple: RANDOM}}}}}}");
    let wide = document("DestinationRule", "client/wide", &policy("*.example.com"));
    let exact = document("DestinationRule", "service/exact", &policy("a.example.com"));
    expect(&[wide.clone(), exact.clone()], ["wide rule-hidden spec.host"]);
    expect(&[wide, exact.replace("{host:", "{exportTo: ['.'], host:")], []);
}

#[test]
fn servers_of_the_same_port() {
    let server = |protocol: &str, host: &str, tls: &str| {
        format!("{{servers: [{{port: {{number: 443, name: p, protocol: {protocol}}}, hosts: [{host}]{tls}}}]}}")
    };
    let pass = ", tls: {mode: PASSTHROUGH}";
    let gateways = |one: &str, other: &str| vec![document("Gateway", "a", one), document("Gateway", "b", other)];
    let a = server("TLS", "a.example.com", pass);
    expect(&gateways(&a, &a), ["b server-ignored spec.servers[0]"]);
    expect(&gateways(&a, &server("TLS", "b.example.com", pass)), []);
    expect(&gateways(&a, &server("TCP", "b.example.com", "")), ["b server-ignored spec.servers[0]"]);
    let http = server("HTTP", "a.example.com", "");
    expect(&gateways(&http, &http), []);
}

#[test]
fn sidecars_of_the_same_workloads() {
    let spec = "{egress: [{hosts: ['./*']}]}";
    let labelled = "{workloadSelector: {labels: {app: x}}, egress: [{hosts: ['./*']}]}";
    let sidecar = |name: &str, spec: &str| document("Sidecar", name, spec);
    expect(&[sidecar("a", spec), sidecar("b", spec)], ["b sidecar-ignored spec.workloadSelector"]);
    expect(&[sidecar("a", spec), sidecar("b", labelled), sidecar("other/c", spec)], []);
}

#[test]
fn each_code_has_a_row_in_the_documents() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/findings.md");
    let text = fs::read_to_string(path).expect("the document is part of the repository");
    for code in conflict::CODES {
        assert!(text.contains(&format!("| `{code}` |")), "{code} is not described");
    }
}

#[test]
fn ten_thousand_owners_of_one_host_are_compared_at_once() {
    let spec = format!("{{hosts: [a.example.com], exportTo: ['.'], resolution: DNS, {HTTP}}}");
    let text: String = (0..10_000).map(|n| entry(&format!("ns{n}/a"), &spec)).collect();
    assert_eq!(conflicts(&text).len(), 0);
}
