//! Clusters and their endpoints, as tables (SEMANTICS 2.2 to 2.7, 2.13).

use crate::objects;

use objects::*;
use portolan_controller::model::Protocol::*;
use portolan_controller::model::{Object, Resolution, Role, Service, ServiceEntry};
use portolan_proto::envoy::envoy::config::cluster::v3::Cluster;
use portolan_proto::envoy::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbConfig};
use portolan_proto::envoy::envoy::config::core::v3::{address, socket_address::PortSpecifier};
use portolan_proto::envoy::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;

/// `TYPE address:port*weight@locality …`, or `none`.
fn brief(cluster: Option<Cluster>) -> String {
    let Some(cluster) = cluster else { return "none".into() };
    let mut out = match &cluster.cluster_discovery_type {
        Some(ClusterDiscoveryType::Type(kind)) => DiscoveryType::try_from(*kind).unwrap().as_str_name().to_owned(),
        Some(ClusterDiscoveryType::ClusterType(custom)) => custom.name.rsplit('.').next().unwrap().to_owned(),
        None => "?".into(),
    };
    if let Some(LbConfig::OriginalDstLbConfig(config)) = &cluster.lb_config {
        out += &format!(" port {}", config.upstream_port_override.unwrap().value);
    }
    if let Some(options) = cluster.typed_extension_protocol_options.values().next() {
        // Field 3 is explicit, field 5 as downstream.
        out += if options.value[0] >> 3 == 3 { " h2" } else { " as-downstream" };
    }
    for group in cluster.load_assignment.unwrap_or_default().endpoints {
        for e in group.lb_endpoints {
            let Some(HostIdentifier::Endpoint(endpoint)) = e.host_identifier else { panic!("no endpoint") };
            out += " ";
            match endpoint.address.unwrap().address.unwrap() {
                address::Address::Pipe(pipe) => out += &pipe.path,
                address::Address::SocketAddress(a) => {
                    let Some(PortSpecifier::PortValue(port)) = a.port_specifier else { panic!("no port") };
                    out += &format!("{}:{port}", a.address);
                }
                address::Address::EnvoyInternalAddress(_) => panic!("internal address"),
            }
            match e.load_balancing_weight.unwrap().value {
                1 => {}
                weight => out += &format!("*{weight}"),
            }
            if let Some(l) = &group.locality {
                out += &format!("@{}/{}/{}", l.region, l.zone, l.sub_zone);
            }
        }
    }
    out
}

fn of(objects: impl IntoIterator<Item = Object>, name: &str) -> String {
    brief(world(objects).compiler.cluster(name))
}

fn base() -> ServiceEntry {
    se("a", &["t.com"], &[(80, Http), (443, Tls)]).with(|e| {
        e.ports[0].name = "http".into();
        e.ports[0].target_port = Some(8080);
    })
}

#[test]
fn resolutions() {
    let with = |how| vec![entry(base().with(resolution(how)))];
    let endpoints = |how| {
        let list = vec![endpoint("foo.bar"), endpoint("1.2.3.4")];
        vec![entry(base().with(resolution(how)).with(|e| e.endpoints = list))]
    };
    for (objects, port, want) in [
        (with(Resolution::None), 80, "ORIGINAL_DST port 8080"),
        (with(Resolution::None), 443, "ORIGINAL_DST"),
        (with(Resolution::Static), 80, "STATIC"),
        (with(Resolution::Dns), 80, "STRICT_DNS t.com:8080"),
        (with(Resolution::Dns), 443, "STRICT_DNS t.com:443"),
        (with(Resolution::DnsRoundRobin), 80, "LOGICAL_DNS t.com:8080"),
        (endpoints(Resolution::Dns), 80, "STRICT_DNS foo.bar:8080 1.2.3.4:8080"),
        (endpoints(Resolution::DnsRoundRobin), 80, "LOGICAL_DNS foo.bar:8080"),
        (endpoints(Resolution::Static), 80, "STATIC 1.2.3.4:8080"),
        (with(Resolution::Static), 81, "none"),
    ] {
        assert_eq!(of(objects, &format!("outbound|{port}||t.com")), want);
    }
    assert_eq!(of([entry(base())], "outbound|80|v1|t.com"), "none", "subsets need a DestinationRule");
    assert_eq!(of([entry(base())], "nonsense"), "none");
}

#[test]
fn dynamic_dns_dials_the_name_for_some_protocols() {
    let ports = [(80, Http), (443, Tls), (90, Grpc), (9000, Tcp)];
    let w = world([entry(se("a", &["*.x.com"], &ports).with(resolution(Resolution::DynamicDns)))]);
    for (port, want) in [
        (80, "dynamic_forward_proxy"),
        (443, "dynamic_forward_proxy"),
        (90, "dynamic_forward_proxy h2"),
        (9000, "none"),
    ] {
        assert_eq!(brief(w.compiler.cluster(&format!("outbound|{port}||*.x.com"))), want, "{port}");
    }
}

#[test]
fn gateways_pass_nothing_through() {
    let gateway = portolan_controller::model::Scope { role: Role::Gateway, ..scope() };
    let objects = [entry(base().with(resolution(Resolution::None)))];
    let (compiler, _) = portolan_controller::compile::compile(objects, gateway, blocking());
    assert_eq!(brief(compiler.cluster("outbound|80||t.com")), "STATIC");
}

#[test]
fn connect_strategy_races() {
    let object = base().with(resolution(Resolution::Dns)).with(|e| {
        e.meta.annotations = labels(&[("istio.io/connect-strategy", "race_first_tcp_connect")]);
    });
    assert_eq!(of([entry(object)], "outbound|80||t.com"), "LOGICAL_DNS t.com:8080");
}

#[test]
fn endpoint_ports_weights_and_localities() {
    let object = base().with(|e| {
        let far = endpoint("2.2.2.2").with(|w| {
            w.ports = [("http".into(), 9090)].into();
            w.weight = 3;
            w.locality = "us/east/a/rest".into();
        });
        e.endpoints = vec![far, endpoint("1.1.1.9"), endpoint("1.1.1.9"), endpoint("unix:///run/s")];
    });
    let object = [entry(object)];
    assert_eq!(of(object.clone(), "outbound|80||t.com"), "STATIC 1.1.1.9:8080 /run/s 2.2.2.2:9090*3@us/east/a");
    assert_eq!(of(object, "outbound|443||t.com"), "STATIC 1.1.1.9:443 /run/s 2.2.2.2:443*3@us/east/a");
}

#[test]
fn upstream_protocol() {
    for (protocol, want) in [
        (Http, "STATIC 10.0.0.1:80"),
        (Http2, "STATIC h2 10.0.0.1:80"),
        (Grpc, "STATIC h2 10.0.0.1:80"),
        (GrpcWeb, "STATIC h2 10.0.0.1:80"),
        (Auto, "STATIC as-downstream 10.0.0.1:80"),
        (Tcp, "STATIC 10.0.0.1:80"),
        (Udp, "none"),
    ] {
        assert_eq!(of([entry(se("a", &["t.com"], &[(80, protocol)]))], "outbound|80||t.com"), want, "{protocol:?}");
    }
}

#[test]
fn selected_workloads() {
    let selecting = |how: Resolution, selector: &[(&str, &str)]| {
        let selector = labels(selector);
        entry(base().with(resolution(how)).with(|e| e.workload_selector = Some(selector)))
    };
    let vms = || {
        let vm1 = we("vm1", "10.1.1.1", &[("app", "x")]).with(|w| {
            w.meta.labels = labels(&[("app", "t")]);
            w.workload.ports = [("http".into(), 9090)].into();
            w.workload.weight = 7;
        });
        let sick = we("vm4", "10.1.1.4", &[("app", "t")]).with(|w| {
            w.meta.annotations = labels(&[("proxy.istio.io/health-checks-enabled", "true")]);
        });
        let vm2 = we("vm2", "vm2.internal", &[("app", "t")]);
        let other = we("other/vm3", "10.1.1.3", &[("app", "t")]);
        let unlike = we("vm5", "10.1.1.5", &[("app", "u")]);
        [vm1, vm2, other, sick, unlike].map(workload)
    };
    let t = &[("app", "t")];
    for (object, want) in [
        (selecting(Resolution::Static, t), "STATIC 10.1.1.1:9090*7"),
        (selecting(Resolution::Dns, t), "STRICT_DNS 10.1.1.1:9090*7 vm2.internal:8080"),
        (selecting(Resolution::Static, &[]), "STATIC 10.1.1.1:9090*7 10.1.1.5:8080"),
        (selecting(Resolution::Static, &[("app", "z")]), "STATIC"),
        (selecting(Resolution::Dns, &[("app", "z")]), "none"),
    ] {
        assert_eq!(of(vms().into_iter().chain([object]), "outbound|80||t.com"), want);
    }
}

#[test]
fn entries_of_one_host_share_endpoints_by_port_name() {
    let one = |name: &str, address: &str, port_name: &str| {
        let (address, port_name) = (endpoint(address), port_name.to_owned());
        entry(se(name, &["t.com"], &[(80, Http)]).with(|e| {
            e.endpoints = vec![address];
            e.ports[0].name = port_name;
        }))
    };
    let same = [one("a@1", "10.0.0.1", "h"), one("b@2", "10.0.0.2", "h")];
    assert_eq!(of(same, "outbound|80||t.com"), "STATIC 10.0.0.1:80 10.0.0.2:80");
    let other = [one("a@1", "10.0.0.1", "h"), one("b@2", "10.0.0.2", "g")];
    assert_eq!(of(other, "outbound|80||t.com"), "STATIC 10.0.0.1:80");
}

#[test]
fn kubernetes_services() {
    let host = "outbound|80||web.default.svc.cluster.local";
    let selecting = Object::Service(std::sync::Arc::new(Service {
        meta: meta("default", "web", 0),
        ports: vec![port(80, Http).with(|p| p.target_port = Some(8080))],
        cluster_ips: vec!["10.96.5.1".into()],
        selector: Some(labels(&[("app", "web")])),
        ..Service::default()
    }));
    let vms = [we("vm1", "2.2.2.2", &[("app", "web")]), we("vm2", "3.3.3.3", &[("app", "other")])].map(workload);
    assert_eq!(of(vms.into_iter().chain([selecting]), host), "STATIC 2.2.2.2:8080");
    let plain = [kube("default", "web", Some("10.96.5.1"), &[(80, Http)]), slice("default", "web", &["10.10.5.1"], 80)];
    assert_eq!(of(plain, host), "STATIC 10.10.5.1:80");
    assert_eq!(of([kube("default", "web", None, &[(80, Http)])], host), "ORIGINAL_DST");
}
