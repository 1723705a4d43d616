//! Objects in few words, and what a snapshot says about them.
#![allow(dead_code)]

use std::borrow::Cow;
use std::sync::Arc;

use portolan_controller::api::decode::Path;
use portolan_controller::api::message::Decode;
use portolan_controller::compile::{Compiler, Update, compile};
use portolan_controller::config::tree;
use portolan_controller::model::{
    Change, Checked, EndpointSlice, Labels, MeshConfig, Meta, Object, OutboundMode, Protocol, Resolution, Scope,
    Service, ServiceEntry, ServicePort, Workload, WorkloadEntry,
};
use portolan_registry::decision::{Decision, Verdict};
use portolan_registry::lookup::{Connection, Listener, Request};
use portolan_registry::route::Outcome;
use portolan_registry::routing::{Asked, Patterns};
use portolan_registry::snapshot::Snapshot;

pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

pub fn meta(namespace: &str, name: &str, created: i64) -> Meta {
    Meta { namespace: namespace.parse().unwrap(), name: name.parse().unwrap(), created, ..Meta::default() }
}

pub fn port(number: u16, protocol: Protocol) -> ServicePort {
    ServicePort { number, name: format!("p{number}"), protocol, target_port: None }
}

pub fn endpoint(address: &str) -> Workload {
    Workload { address: address.into(), ..Workload::default() }
}

/// `name`, or `namespace/name`, or either with `@created`.
pub fn se(name: &str, hosts: &[&str], ports: &[(u16, Protocol)]) -> ServiceEntry {
    let (name, created) = name.split_once('@').map_or((name, 0), |(n, c)| (n, c.parse().unwrap()));
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    ServiceEntry {
        meta: meta(namespace, name, created),
        hosts: hosts.iter().map(|h| (*h).to_owned()).collect(),
        ports: ports.iter().map(|(n, p)| port(*n, *p)).collect(),
        resolution: Resolution::Static,
        endpoints: vec![endpoint("10.0.0.1")],
        ..ServiceEntry::default()
    }
}

pub trait Tweak: Sized {
    fn with(self, f: impl FnOnce(&mut Self)) -> Self;
}

impl<T> Tweak for T {
    fn with(mut self, f: impl FnOnce(&mut Self)) -> Self {
        f(&mut self);
        self
    }
}

pub fn addresses(list: &[&str]) -> impl FnOnce(&mut ServiceEntry) {
    let list = list.iter().map(|a| (*a).to_owned()).collect();
    move |entry| entry.addresses = list
}

pub fn resolution(resolution: Resolution) -> impl FnOnce(&mut ServiceEntry) {
    move |entry| {
        entry.resolution = resolution;
        entry.endpoints.clear();
    }
}

pub fn entry(entry: ServiceEntry) -> Object {
    Object::ServiceEntry(Arc::new(entry))
}

/// A Sidecar from the YAML of its spec.
pub fn sidecar(name: &str, spec: &str) -> Object {
    Object::Sidecar(Arc::new(checked(name, spec)))
}

/// A DestinationRule from the YAML of its spec.
pub fn rule(name: &str, spec: &str) -> Object {
    Object::DestinationRule(Arc::new(checked(name, spec)))
}

/// A VirtualService from the YAML of its spec.
pub fn virtual_service(name: &str, spec: &str) -> Object {
    Object::VirtualService(Arc::new(checked(name, spec)))
}

/// A Gateway from the YAML of its spec.
pub fn gateway(name: &str, spec: &str) -> Object {
    Object::Gateway(Arc::new(checked(name, spec)))
}

fn checked<S: Decode>(name: &str, spec: &str) -> Checked<S> {
    let (name, created) = name.split_once('@').map_or((name, 0), |(n, c)| (n, c.parse().unwrap()));
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    let root = tree::parse(spec, 1).unwrap().root;
    let mut issues = Vec::new();
    let spec = S::decode(Some(&root), &Path::root("spec"), &mut issues);
    assert!(issues.is_empty(), "{issues:?}");
    Checked { meta: meta(namespace, name, created), spec }
}

pub fn we(name: &str, address: &str, spec: &[(&str, &str)]) -> WorkloadEntry {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    let workload = Workload { address: address.into(), labels: labels(spec), ..Workload::default() };
    WorkloadEntry { meta: meta(namespace, name, 0), workload, healthy: None }
}

pub fn workload(entry: WorkloadEntry) -> Object {
    Object::WorkloadEntry(Arc::new(entry))
}

pub fn kube(namespace: &str, name: &str, ip: Option<&str>, ports: &[(u16, Protocol)]) -> Object {
    Object::Service(Arc::new(Service {
        meta: meta(namespace, name, 0),
        ports: ports.iter().map(|(n, p)| port(*n, *p)).collect(),
        cluster_ips: ip.into_iter().map(str::to_owned).collect(),
        headless: ip.is_none(),
        ..Service::default()
    }))
}

pub fn slice(namespace: &str, service: &str, addresses: &[&str], port: u16) -> Object {
    Object::EndpointSlice(Arc::new(EndpointSlice {
        meta: meta(namespace, &format!("{service}-abc"), 0),
        service: service.into(),
        addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
        ports: [(format!("p{port}"), port)].into(),
    }))
}

pub fn scope() -> Scope {
    Scope { namespace: "default".into(), ips: vec!["1.1.1.1".into()], ..Scope::default() }
}

pub fn blocking() -> MeshConfig {
    MeshConfig { outbound: OutboundMode::RegistryOnly, ..MeshConfig::default() }
}

/// A compiled world, and the snapshot that a filter would have of it.
pub struct World {
    pub compiler: Compiler,
    pub update: Update,
    pub snapshot: Snapshot,
}

pub fn world(objects: impl IntoIterator<Item = Object>) -> World {
    world_of(objects, blocking())
}

pub fn world_of(objects: impl IntoIterator<Item = Object>, mesh: MeshConfig) -> World {
    World::of(objects, scope(), mesh)
}

pub fn opened(compiler: &Compiler) -> Snapshot {
    let mut snapshot = Snapshot::new();
    snapshot.reset();
    for (id, page) in compiler.pages() {
        snapshot.stage(id, page.to_vec()).unwrap();
    }
    snapshot.commit(compiler.digest()).unwrap();
    snapshot
}

impl World {
    pub fn of(objects: impl IntoIterator<Item = Object>, scope: Scope, mesh: MeshConfig) -> World {
        let (compiler, update) = compile(objects, scope, mesh);
        let snapshot = opened(&compiler);
        World { compiler, update, snapshot }
    }

    pub fn http(&self, destination: &str, authority: &str) -> String {
        let listener = Listener::Captured(destination.parse().unwrap());
        said(&self.snapshot.request(&Request { listener, authority: authority.as_bytes(), connect: false }))
    }

    /// The route that takes a GET request, and where it leads: `NAME -> CLUSTER CLUSTER`.
    pub fn routed(&self, destination: &str, authority: &str, path: &str) -> String {
        let listener = Listener::Captured(destination.parse().unwrap());
        let decision = self.snapshot.request(&Request { listener, authority: authority.as_bytes(), connect: false });
        self.led(&decision, &Get(path))
    }

    /// Where a table leads a request or connection.
    pub fn led(&self, decision: &Decision<'_>, asked: &impl Asked) -> String {
        let Verdict::Table { table } = decision.verdict else { return said(decision) };
        let Some(matched) = self.snapshot.routed(table, asked, &Patterns::default()) else { return "404".into() };
        let clusters = match matched.action.outcome {
            Outcome::Forward(targets) => targets.into_iter().map(|t| t.cluster).collect::<Vec<_>>().join(" "),
            Outcome::Redirect(redirect) => redirect.status.to_string(),
            Outcome::Respond(respond) => respond.status.to_string(),
        };
        format!("{} -> {clusters}", matched.name)
    }

    pub fn proxy(&self, authority: &str) -> String {
        let request = Request { listener: Listener::Proxy, authority: authority.as_bytes(), connect: false };
        said(&self.snapshot.request(&request))
    }

    pub fn tcp(&self, destination: &str) -> String {
        said(&self.snapshot.connection(&Connection { destination: destination.parse().unwrap(), sni: None }))
    }

    pub fn tls(&self, destination: &str, sni: &str) -> String {
        let destination = destination.parse().unwrap();
        said(&self.snapshot.connection(&Connection { destination, sni: Some(sni.as_bytes()) }))
    }

    /// Who won and who lost, as names.
    pub fn why_http(&self, destination: &str, authority: &str) -> String {
        let listener = Listener::Captured(destination.parse().unwrap());
        let request = Request { listener, authority: authority.as_bytes(), connect: false };
        self.snapshot.request(&request).reason.to_string()
    }

    /// The listener plan of a port: `tls http | prefixes | address http…`.
    pub fn plan(&self, port: u16) -> String {
        let Some(plan) = self.compiler.plans().get(&port) else { return "none".into() };
        let mut out = match &plan.wildcard {
            Some(i) => format!("{}{}wildcard", if i.tls { "tls " } else { "" }, if i.http { "http " } else { "" }),
            None => "-".into(),
        };
        for prefix in &plan.tcp_prefixes {
            out += &format!(" {prefix}");
        }
        for a in &plan.addresses {
            out += &format!(" {}{}", a.address, if a.inspection.as_ref().unwrap().http { "/http" } else { "" });
        }
        out
    }
}

/// A GET request for a path.
pub struct Get<'p>(pub &'p str);

impl Asked for Get<'_> {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        match name {
            ":path" => Some(Cow::Borrowed(self.0.as_bytes())),
            ":method" => Some(Cow::Borrowed(b"GET")),
            _ => None,
        }
    }
}

pub fn said(decision: &Decision<'_>) -> String {
    match &decision.verdict {
        Verdict::Route { cluster } => cluster.to_string(),
        Verdict::Table { table } => format!("{table:?}"),
        Verdict::Deny { status } => status.to_string(),
    }
}

pub fn apply(objects: impl IntoIterator<Item = Object>) -> Vec<Change> {
    objects.into_iter().map(Change::Apply).collect()
}
