//! The conformance cases, decided on paper: what the plan says of a connection, where the snapshot
//! sends it, and which addresses its cluster holds, against what istiod and Envoy were seen to do.

use crate::objects;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use objects::said;
use portolan_controller::compile::{Compiler, compile};
use portolan_controller::model::{Change, Role, Scope};
use portolan_controller::source::yaml::YamlSource;
use portolan_proto::envoy::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbConfig};
use portolan_proto::envoy::envoy::config::core::v3::{address, socket_address::PortSpecifier};
use portolan_proto::envoy::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use portolan_proto::v1::Inspection;
use portolan_registry::decision::{Decision, Verdict};
use portolan_registry::lookup::{Connection, Listener, Request, server_id};
use portolan_registry::route::{ALL, Outcome};
use portolan_registry::routing::{Asked, NoHeaders, Patterns};
use portolan_registry::snapshot::Snapshot;
use serde_json::Value;

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/conformance/cases");
    let mut out: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    out.retain(|case| {
        let config = std::fs::read_to_string(case.join("config.yaml")).unwrap();
        // A listener with a socket of its own is not compiled yet.
        !config.contains("captureMode: NONE\n")
    });
    out.sort();
    out
}

/// A line `key: {…}` or `- {…}` of case.yaml: what is in braces is JSON.
fn json_lines<'t>(text: &'t str, start: &'t str) -> impl Iterator<Item = Value> + 't {
    text.lines().filter_map(move |l| serde_json::from_str(l.strip_prefix(start)?).ok())
}

/// The inspection of the listener that takes a connection; none: no HTTP is told apart.
fn sniffs_http(compiler: &Compiler, dst: SocketAddr) -> bool {
    let http = |i: &Option<Inspection>| i.as_ref().is_some_and(|i| i.http);
    let catch_all = || http(&compiler.plans()[&0].wildcard);
    let Some(plan) = compiler.plans().get(&dst.port()) else { return catch_all() };
    if let Some(a) = plan.addresses.iter().find(|a| a.address == dst.ip().to_string()) {
        return http(&a.inspection);
    }
    if plan.wildcard.is_none() {
        return catch_all();
    }
    let within = |p: &String| p.parse::<ipnet::IpNet>().unwrap().contains(&dst.ip());
    !plan.tcp_prefixes.iter().any(within) && http(&plan.wildcard)
}

/// Where a cluster connects to; `None`: somewhere that DNS says.
fn targets(compiler: &Compiler, name: &str, dst: Option<SocketAddr>) -> Option<BTreeSet<String>> {
    let Some(cluster) = compiler.cluster(name) else { return Some(BTreeSet::new()) };
    if cluster.cluster_discovery_type == Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into())) {
        let mut dst = dst?;
        if let Some(LbConfig::OriginalDstLbConfig(config)) = cluster.lb_config
            && let Some(port) = config.upstream_port_override
        {
            dst.set_port(port.value.try_into().unwrap());
        }
        return Some([dst.to_string()].into());
    }
    // Of the priorities the first that has endpoints.
    let mut groups = cluster.load_assignment?.endpoints;
    groups.retain(|group| !group.lb_endpoints.is_empty());
    let first = groups.iter().map(|group| group.priority).min();
    groups.retain(|group| Some(group.priority) == first);
    let endpoints = groups.into_iter().flat_map(|l| l.lb_endpoints);
    endpoints
        .map(|e| {
            let Some(HostIdentifier::Endpoint(e)) = e.host_identifier else { return None };
            match e.address?.address? {
                address::Address::Pipe(pipe) => Some(format!("unix:{}", pipe.path)),
                address::Address::SocketAddress(a) => {
                    let Some(PortSpecifier::PortValue(port)) = a.port_specifier else { return None };
                    let ip: std::net::IpAddr = a.address.parse().ok()?;
                    Some(SocketAddr::new(ip, port.try_into().unwrap()).to_string())
                }
                address::Address::EnvoyInternalAddress(_) => None,
            }
        })
        .collect()
}

/// A probe's request, for conditions of routes.
struct Probe<'p>(&'p Value, &'p str);

impl Asked for Probe<'_> {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let text = |text: &'_ str| Some(Cow::Owned(text.as_bytes().to_vec()));
        match name {
            ":path" => text(
                self.0["path"]
                    .as_str()
                    .or_else(|| {
                        let target = self.0["target"].as_str()?.strip_prefix("http://")?;
                        Some(target.find('/').map_or("/", |at| &target[at..]))
                    })
                    .unwrap_or("/"),
            ),
            ":method" => text(self.0["method"].as_str().unwrap_or("GET")),
            ":scheme" => text("http"),
            ":authority" => text(self.1),
            other => {
                match self.0["headers"].as_object()?.iter().find(|(name, _)| name.eq_ignore_ascii_case(other))?.1 {
                    Value::Array(list) => text(&list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(",")),
                    one => text(one.as_str()?),
                }
            }
        }
    }
}

/// What a decision comes to: clusters, or a status.
fn outcome(snapshot: &Snapshot, decision: &Decision<'_>, asked: &impl Asked) -> Vec<String> {
    let Verdict::Table { table } = decision.verdict else { return vec![said(decision)] };
    let Some(matched) = snapshot.routed(table, asked, &Patterns::default()) else { return vec!["404".into()] };
    if let Some(fault) = matched.action.extras.and_then(|extras| extras.fault).filter(|f| f.abort_share == ALL) {
        return vec![if fault.abort_grpc.is_some() { 200 } else { fault.abort_status }.to_string()];
    }
    match matched.action.outcome {
        Outcome::Forward(targets) => targets.into_iter().map(|target| target.cluster).collect(),
        Outcome::Redirect(redirect) => vec![redirect.status.to_string()],
        Outcome::Respond(respond) => vec![respond.status.to_string()],
    }
}

/// What a port of a gateway does with a request; `None`: this is no gateway.
fn at_gateway(compiler: &Compiler, snapshot: &Snapshot, port: u16, host: &str, probe: &Value) -> Option<Vec<String>> {
    if !snapshot.globals().gateway {
        return None;
    }
    let Some(plan) = compiler.plans().get(&port) else { return Some(vec!["closed".into()]) };
    let server = server_id(plan.gateway[0].servers[0].name.as_bytes());
    let listener = Listener::Gateway { port, server };
    let decision = snapshot.request(&Request { listener, authority: host.as_bytes(), connect: false });
    Some(outcome(snapshot, &decision, &Probe(probe, host)))
}

fn decide(compiler: &Compiler, snapshot: &Snapshot, probe: &Value) -> (Vec<String>, Option<SocketAddr>) {
    let text = |k: &str| probe[k].as_str();
    let http = matches!(text("proto").unwrap_or("http"), "http" | "h2");
    let host = text("host").unwrap_or_default();
    let Ok(dst) = text("dst").unwrap().parse::<SocketAddr>() else {
        if let Some(port) = text("dst").unwrap().strip_prefix("proxy:") {
            let port: u16 = port.parse().unwrap();
            if let Some(said) = at_gateway(compiler, snapshot, port, host, probe) {
                return (said, None);
            }
        }
        let target = text("target").and_then(|t| t.strip_prefix("http://")).map(|t| t.split('/').next().unwrap());
        let authority = target.unwrap_or(host).as_bytes();
        let decision = snapshot.request(&Request { listener: Listener::Proxy, authority, connect: false });
        return (outcome(snapshot, &decision, &Probe(probe, target.unwrap_or(host))), None);
    };
    if http && sniffs_http(compiler, dst) {
        let listener = Listener::Captured(dst);
        let decision = snapshot.request(&Request { listener, authority: host.as_bytes(), connect: false });
        return (outcome(snapshot, &decision, &Probe(probe, host)), Some(dst));
    }
    let sni = text("sni").map(str::as_bytes);
    let decision = snapshot.connection(&Connection { destination: dst, sni });
    let said = outcome(snapshot, &decision, &NoHeaders);
    (said.into_iter().map(|said| if said == "502" { "closed".into() } else { said }).collect(), Some(dst))
}

#[test]
fn decisions_agree() {
    let cases = cases();
    assert!(cases.len() > 70, "{} cases", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let text = std::fs::read_to_string(case.join("case.yaml")).unwrap();
        let expected = std::fs::read_to_string(case.join("expected.json")).unwrap();
        let expected: Vec<Value> = serde_json::from_str(&expected).unwrap();
        let proxy = json_lines(&text, "proxy: ").next().unwrap();
        let files = ["config.yaml", "k8s.yaml"].map(|f| case.join(f)).into_iter().filter(|f| f.exists());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        let (_, loaded) = YamlSource::load(&files.collect::<Vec<_>>(), Some(&case.join("mesh.yaml"))).unwrap();
        let scope = Scope {
            namespace: proxy["namespace"].as_str().unwrap_or("default").into(),
            labels: serde_json::from_value(proxy["labels"].clone()).unwrap_or_default(),
            locality: proxy["locality"].as_str().unwrap_or_default().into(),
            role: if proxy["type"] == "router" { Role::Gateway } else { Role::Sidecar },
            ips: vec![proxy["ip"].as_str().unwrap_or("1.1.1.1").into()],
            ..Scope::default()
        };
        let objects = loaded.changes.into_iter().filter_map(|c| match c {
            Change::Apply(object) => Some(object),
            Change::Delete(_) => None,
        });
        let (compiler, _) = compile(objects, scope, loaded.mesh);
        let snapshot = objects::opened(&compiler);
        let probes: Vec<Value> = json_lines(&text, "- ").collect();
        assert_eq!(probes.len(), expected.len(), "{}", case.display());
        for (probe, expected) in probes.iter().zip(&expected).filter(|(p, _)| p["difference"].is_null()) {
            // What hashing and ejection do while requests go by cannot be seen on paper.
            if probe["distinct"] == true || case.ends_with("dr-outlier-default-gateway-errors") {
                continue;
            }
            let (verdicts, dst) = decide(&compiler, &snapshot, probe);
            let status = expected["status"][0].as_str().unwrap();
            let reached: BTreeSet<String> =
                expected["upstream"].as_array().unwrap().iter().map(|u| u["dst"].as_str().unwrap().into()).collect();
            let agrees = match verdicts.as_slice() {
                [verdict] if verdict == "502" || verdict == "closed" => {
                    reached.is_empty() && (status == verdict || status == "200")
                }
                [verdict] if verdict.parse::<u16>().is_ok() => status == verdict,
                clusters => {
                    let targets: Vec<_> = clusters.iter().map(|c| targets(&compiler, c, dst)).collect();
                    match targets.iter().cloned().collect::<Option<Vec<_>>>() {
                        Some(targets) => {
                            let all: BTreeSet<String> = targets.into_iter().flatten().collect();
                            if all.is_empty() { matches!(status, "503" | "closed") } else { all == reached }
                        }
                        None => !reached.is_empty() || matches!(status, "503" | "closed"),
                    }
                }
            };
            if !agrees {
                let case = case.file_name().unwrap().to_string_lossy().into_owned();
                wrong.push(format!("{case}: {probe}\n  got {verdicts:?}\n  not {status} {reached:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} probes disagree:\n{}", wrong.len(), wrong.join("\n"));
}
