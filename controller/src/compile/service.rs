//! Objects as services: visibility, order, addresses and the one namespace that speaks for a host name (SEMANTICS 1.6,
//! 2.1, 2.11, 2.12).

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_registry::route::Retry;
use portolan_registry::row::{Origin, OriginKind};

use super::http_routes;
use super::sidecar::{Imports, Place};
use crate::model::{
    MeshConfig, Meta, OutboundMode, Protocol, Resolution, Role, Scope, Service, ServiceEntry, ServicePort,
};

/// What decides how objects are seen: who asks, and the mesh's settings.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) scope: Scope,
    pub(crate) mesh: MeshConfig,
    /// What the subscriber's Sidecar imports; `None`: everything visible.
    pub(crate) imports: Option<Imports>,
}

impl Context {
    /// `<ns>.svc.<domain>`
    fn proxy_domain(&self) -> String {
        format!("{}.svc.{}", self.scope.namespace, self.mesh.cluster_domain)
    }

    /// Whether the subscriber speaks IPv6 only; one that names no address speaks IPv4.
    pub(crate) fn v6_only(&self) -> bool {
        let mut ips = self.scope.ips.iter().filter_map(|ip| ip.parse::<IpAddr>().ok()).peekable();
        ips.peek().is_some() && ips.all(|ip| ip.is_ipv6())
    }

    /// Retries that a MeshConfig has in place of Istio's own.
    pub(crate) fn default_retry(&self) -> Option<Retry> {
        http_routes::retry(self.mesh.default_retry.as_ref(), false)
    }

    /// What happens to unknown destinations.
    pub(crate) fn outbound(&self) -> OutboundMode {
        self.imports.as_ref().and_then(|imports| imports.outbound).unwrap_or(self.mesh.outbound)
    }

    pub(crate) fn gateway(&self) -> bool {
        self.scope.role == Role::Gateway
    }
}

/// The object behind a service.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    Entry(Arc<ServiceEntry>),
    Kube(Arc<Service>),
}

impl Source {
    pub(crate) fn meta(&self) -> &Meta {
        match self {
            Source::Entry(o) => &o.meta,
            Source::Kube(o) => &o.meta,
        }
    }

    pub(crate) fn ports(&self) -> &[ServicePort] {
        match self {
            Source::Entry(o) => &o.ports,
            Source::Kube(o) => &o.ports,
        }
    }

    pub(crate) fn is_kube(&self) -> bool {
        matches!(self, Source::Kube(_))
    }

    pub(crate) fn resolution(&self) -> Resolution {
        match self {
            Source::Entry(o) => o.resolution,
            Source::Kube(o) if o.headless => Resolution::None,
            Source::Kube(_) => Resolution::Static,
        }
    }

    fn export_to(&self) -> &[String] {
        match self {
            Source::Entry(o) => &o.export_to,
            Source::Kube(o) => &o.export_to,
        }
    }

    pub(crate) fn origin(&self) -> Origin {
        let meta = self.meta();
        let kind = if self.is_kube() { OriginKind::Service } else { OriginKind::ServiceEntry };
        Origin { namespace: meta.namespace.clone(), name: meta.name.clone(), kind }
    }
}

/// One host of one object.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) source: Source,
    /// Host as written.
    pub(crate) host: Arc<str>,
}

impl Member {
    /// The name by which services are ordered: the host of a ServiceEntry, the object name of a Service.
    fn sort_name(&self) -> &str {
        match &self.source {
            Source::Entry(_) => &self.host,
            Source::Kube(o) => &o.meta.name,
        }
    }

    /// Oldest first; ties that Istio leaves to chance end with the object's name.
    pub(crate) fn age(&self, other: &Member) -> Ordering {
        let (a, b) = (self.source.meta(), other.source.meta());
        (a.created, self.sort_name(), &a.namespace, self.source.is_kube(), &a.name).cmp(&(
            b.created,
            other.sort_name(),
            &b.namespace,
            other.source.is_kube(),
            &b.name,
        ))
    }

    /// Whether the subscriber may see the object, and if so, whether it was exported to its namespace by name.
    pub(crate) fn visible(&self, cx: &Context) -> Option<bool> {
        let own = match self.source.export_to() {
            [] => &cx.mesh.default_service_export_to,
            own => own,
        };
        if own.iter().any(|e| e == "*") {
            return Some(false);
        }
        if own.iter().any(|e| e == "~") {
            return None;
        }
        let namespace = &self.source.meta().namespace;
        own.iter()
            .any(|e| *e == cx.scope.namespace || (e == "." && *namespace == cx.scope.namespace.as_str()))
            .then_some(true)
    }
}

/// Place of a service in the order in which Istio goes through them.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    /// Public services follow those exported by name.
    pub(crate) public: bool,
    pub(crate) member: Member,
    /// Index of the address.
    pub(crate) address: u32,
}

impl Ord for Order {
    fn cmp(&self, other: &Self) -> Ordering {
        self.public
            .cmp(&other.public)
            .then_with(|| self.member.age(&other.member))
            .then_with(|| self.member.host.cmp(&other.member.host))
            .then_with(|| self.address.cmp(&other.address))
    }
}

impl PartialOrd for Order {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Order {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Order {}

/// An address of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Addr {
    /// None given.
    Any,
    /// One address: in its normal form to bind to, and as written for the Host header.
    Ip(IpAddr, String),
    Net(IpNet),
}

/// A service that speaks for its host name.
#[derive(Debug, Clone)]
pub(crate) struct Spoken {
    pub(crate) member: Member,
    pub(crate) public: bool,
    pub(crate) addresses: Vec<Addr>,
    /// The ports that the subscriber's Sidecar imports, each with the listener's place; `None`: all.
    imported: Option<Vec<(u16, Place)>>,
}

impl Spoken {
    pub(crate) fn ports(&self) -> impl Iterator<Item = &ServicePort> {
        let imported = |port: &&ServicePort| {
            self.imported.as_ref().is_none_or(|some| some.iter().any(|(number, _)| *number == port.number))
        };
        self.member.source.ports().iter().filter(|p| p.protocol != Protocol::Udp).filter(imported)
    }

    /// The listeners that a port is on.
    pub(crate) fn places(&self, port: u16) -> Vec<Place> {
        let Some(imported) = &self.imported else { return vec![Place::default()] };
        imported.iter().filter(|(number, _)| *number == port).map(|(_, place)| *place).collect()
    }

    pub(crate) fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports().find(|p| p.number == number)
    }

    pub(crate) fn order(&self, address: u32) -> Order {
        Order { public: self.public, member: self.member.clone(), address }
    }
}

/// A port of a host name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostPortOwner {
    pub(crate) number: u16,
    /// Index of the service whose cluster takes the port: resolution, name and all.
    pub(crate) base: usize,
    /// Index of the service that brought the port.
    pub(crate) declared: usize,
    /// Index of the service that makes the virtual host, if the port has one: the last in order with that port.
    pub(crate) http: Option<usize>,
    /// The sockets of a Sidecar that offer the port, by their ids; 0: all that is no such socket.
    pub(crate) sockets: BTreeSet<u32>,
}

/// What a host name means to a subscriber.
#[derive(Debug, Clone)]
pub(crate) struct Resolved {
    /// The services of the namespace that won, in list order.
    pub(crate) services: Vec<Spoken>,
    /// Objects of other namespaces that the winner hides.
    pub(crate) hidden: Vec<Spoken>,
    /// Ports, ascending.
    pub(crate) ports: Vec<HostPortOwner>,
    /// ExternalName Services that point here.
    pub(crate) aliases: Vec<String>,
}

impl Resolved {
    /// Is the port one that Istio makes a cluster for?
    pub(crate) fn is_merged(&self, owner: &HostPortOwner) -> bool {
        owner.base == first(&self.services)
    }
}

/// Resolves what one host name means; `None`: nothing that this subscriber may see.
pub(crate) fn resolve(members: &[Member], aliases: &[Member], cx: &Context) -> Option<Resolved> {
    let mut list: Vec<Spoken> = members
        .iter()
        .filter_map(|m| {
            let explicit = m.visible(cx)?;
            let addresses = addresses(m, members, cx);
            (!addresses.is_empty()).then(|| Spoken { member: m.clone(), public: !explicit, addresses, imported: None })
        })
        .collect();
    list.sort_by(|a, b| a.public.cmp(&b.public).then_with(|| a.member.age(&b.member)));
    let (services, hidden) = match &cx.imports {
        Some(imports) => imported(list, imports, &cx.scope.namespace)?,
        None => {
            let namespace = winner(list.iter(), &cx.scope.namespace)?.to_owned();
            list.into_iter().partition(|s| s.member.source.meta().namespace.as_str() == namespace.as_str())
        }
    };
    let ports = ports(&services);
    let aliases = aliases.iter().filter(|a| a.visible(cx).is_some()).map(|a| a.host.to_lowercase()).collect();
    Some(Resolved { services, hidden, ports, aliases })
}

/// The services that the listeners of a Sidecar have, each with its ports, and those that they hide. Each listener
/// decides for itself which namespace speaks for the host.
fn imported(list: Vec<Spoken>, imports: &Imports, own: &str) -> Option<(Vec<Spoken>, Vec<Spoken>)> {
    let mut taken: Vec<Option<Vec<(u16, Place)>>> = vec![None; list.len()];
    for listener in &imports.listeners {
        let has = |s: &&Spoken| {
            let namespace = &s.member.source.meta().namespace;
            listener.imports(namespace, &s.member.host) && listener.port.is_none_or(|port| s.port(port).is_some())
        };
        let Some(namespace) = winner(list.iter().filter(has), own).map(str::to_owned) else { continue };
        for (service, taken) in list.iter().zip(&mut taken) {
            if !has(&service) || service.member.source.meta().namespace.as_str() != namespace {
                continue;
            }
            // What has an address of its own is there, and in nobody's way.
            let elsewhere = listener.place.address.is_some()
                || service.addresses.iter().all(|address| matches!(address, Addr::Ip(..)));
            let ports = service.ports().filter(|port| match listener.port {
                _ if listener.socket.is_some() => true,
                Some(number) => port.number == number,
                // Virtual hosts are the port's, whichever of its listeners they came by.
                None if http_class(port.protocol) => {
                    let here = |(number, place): &(u16, Place)| *number == port.number && place.socket == 0;
                    let known = taken.iter().flatten().any(here);
                    !imports.is_taken_everywhere(port.number) && (known || !imports.is_taken(port.number))
                }
                None => elsewhere || !imports.is_taken_everywhere(port.number),
            });
            let ports: Vec<u16> = ports.map(|port| port.number).collect();
            taken.get_or_insert_default().extend(ports.into_iter().map(|port| (port, listener.place)));
        }
    }
    let (mut services, mut hidden) = (Vec::new(), Vec::new());
    for (service, taken) in list.into_iter().zip(taken) {
        match taken {
            Some(ports) => services.push(Spoken { imported: Some(ports), ..service }),
            None => hidden.push(service),
        }
    }
    (!services.is_empty()).then_some((services, hidden))
}

/// The namespace that speaks for a host name: the subscriber's own, else Kubernetes', else the first.
fn winner<'l>(mut list: impl Iterator<Item = &'l Spoken>, own: &str) -> Option<&'l str> {
    let mut best = &list.next()?.member.source;
    for Spoken { member, .. } in list {
        let namespace = &member.source.meta().namespace;
        let takes_over = !best.is_kube() && member.source.is_kube() && best.meta().namespace != own;
        if namespace == own || takes_over {
            best = &member.source;
        }
    }
    Some(&best.meta().namespace)
}

/// The service that the clusters of a host are made of.
fn first(services: &[Spoken]) -> usize {
    services.iter().position(|s| s.member.source.is_kube()).unwrap_or(0)
}

/// Who owns each port. Istio merges clusters by its rules; a port that it would route to a cluster it never makes
/// belongs to the oldest service that declares it (ARCHITECTURE, Differences from Istio).
fn ports(services: &[Spoken]) -> Vec<HostPortOwner> {
    let base = first(services);
    let mut out: Vec<HostPortOwner> = Vec::new();
    let mut take = |index: usize, base: usize, service: &Spoken| {
        for port in service.ports() {
            if out.iter().any(|o| o.number == port.number) {
                continue;
            }
            let last = services.iter().enumerate().rev().find_map(|(i, s)| s.port(port.number).map(|p| (i, p)));
            let http = last.filter(|(_, p)| http_class(p.protocol) || p.protocol == Protocol::Auto).map(|(i, _)| i);
            let places = services.iter().flat_map(|s| s.places(port.number));
            let sockets = places.map(|place| place.socket).collect();
            out.push(HostPortOwner { number: port.number, base, declared: index, http, sockets });
        }
    };
    let Some(first) = services.get(base) else { return Vec::new() };
    take(base, base, first);
    for (index, service) in services.iter().enumerate().filter(|(i, s)| *i != base && mergeable(first, s)) {
        take(index, base, service);
    }
    for (index, service) in services.iter().enumerate() {
        take(index, index, service);
    }
    out.sort_by_key(|o| o.number);
    out
}

/// May the ports of a later service join the clusters of the first?
fn mergeable(first: &Spoken, later: &Spoken) -> bool {
    let set = |list: &[String]| {
        let mut list = list.to_vec();
        list.sort();
        list.dedup();
        list
    };
    match (&first.member.source, &later.member.source) {
        (Source::Entry(a), Source::Entry(b)) => {
            a.ports != b.ports
                && a.meta.namespace == b.meta.namespace
                && a.resolution == b.resolution
                && a.meta.labels == b.meta.labels
                && a.workload_selector.clone().unwrap_or_default() == b.workload_selector.clone().unwrap_or_default()
                && set(&a.export_to) == set(&b.export_to)
        }
        _ => false,
    }
}

/// HTTP whatever the bytes are (SEMANTICS 3.1).
pub(crate) fn http_class(protocol: Protocol) -> bool {
    use Protocol::{Grpc, GrpcWeb, Http, Http2, HttpProxy};
    matches!(protocol, Http | Http2 | Grpc | GrpcWeb | HttpProxy)
}

/// TLS that the client begins.
pub(crate) fn tls_class(protocol: Protocol) -> bool {
    matches!(protocol, Protocol::Https | Protocol::Tls)
}

/// The addresses of a service; empty where an entry has only such as cannot be read, and then it is no service.
fn addresses(member: &Member, siblings: &[Member], cx: &Context) -> Vec<Addr> {
    match &member.source {
        Source::Entry(entry) if entry.addresses.is_empty() => {
            // Entries of one namespace and host share their virtual addresses (ARCHITECTURE, Differences from Istio).
            let own = auto_address(member, cx);
            let mut out: Vec<Addr> = own.into_iter().map(ip).collect();
            if !out.is_empty() {
                let siblings = siblings.iter().filter(|s| s.source.meta().namespace == entry.meta.namespace);
                let mut shared: Vec<IpAddr> = siblings.filter_map(|s| auto_address(s, cx)).collect();
                shared.sort();
                shared.dedup();
                shared.retain(|a| Some(*a) != own);
                out.extend(shared.into_iter().map(ip));
            }
            if out.is_empty() { vec![Addr::Any] } else { out }
        }
        Source::Entry(entry) => entry.addresses.iter().filter_map(|a| address(a)).collect(),
        Source::Kube(service) => {
            let v6_only = cx.v6_only();
            let usable = |a: &IpAddr| a.is_ipv6() == v6_only;
            let ips = service.cluster_ips.iter().filter_map(|a| a.parse().ok()).filter(usable);
            let out: Vec<Addr> = ips.map(ip).collect();
            if out.is_empty() { vec![Addr::Any] } else { out }
        }
    }
}

fn ip(address: IpAddr) -> Addr {
    Addr::Ip(address, address.to_string())
}

fn address(text: &str) -> Option<Addr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(if address.is_unspecified() { Addr::Any } else { Addr::Ip(address, text.to_lowercase()) });
    }
    let net = text.parse::<IpNet>().ok()?;
    if net.prefix_len() == net.max_prefix_len() { Some(ip(net.addr())) } else { Some(Addr::Net(net.trunc())) }
}

/// The address that Istio's controller allocated for this host, while the entry is still entitled to one
/// (SEMANTICS 2.9): the last of the subscriber's family in the status.
fn auto_address(member: &Member, cx: &Context) -> Option<IpAddr> {
    let Source::Entry(entry) = &member.source else { return None };
    if !cx.scope.dns_capture || !may_have_virtual_address(entry, &member.host) {
        return None;
    }
    let of_host = entry.status_addresses.iter().rev().filter(|(_, host)| host.eq_ignore_ascii_case(&member.host));
    of_host.filter_map(|(a, _)| a.parse::<IpAddr>().ok()).find(|a| a.is_ipv6() == cx.v6_only())
}

/// Whether an entry's host is entitled to an allocated address (SEMANTICS 2.9).
pub(crate) fn may_have_virtual_address(entry: &ServiceEntry, host: &str) -> bool {
    let refused = entry.meta.labels.get("networking.istio.io/enable-autoallocate-ip");
    let wildcard = host.starts_with('*') && entry.resolution != Resolution::DynamicDns;
    entry.resolution != Resolution::None
        && entry.addresses.is_empty()
        && !wildcard
        && !refused.is_some_and(|v| v.eq_ignore_ascii_case("false"))
}

/// Further names of a host (SEMANTICS 1.5): those that a Kubernetes name shortens to within the cluster.
pub(crate) fn alternate_hosts(host: &str, cx: &Context) -> Vec<String> {
    let proxy = cx.proxy_domain();
    let Some(shared) = proxy.find(".svc.").and_then(|at| proxy.get(at..)) else { return Vec::new() };
    if !host.ends_with(shared) {
        return Vec::new();
    }
    let (Some(svc), Some(dot)) = (host.find(".svc."), host.find('.')) else { return Vec::new() };
    if svc == 0 || dot + 1 > svc {
        return Vec::new();
    }
    let (short, stem) = (&host[..dot], &host[..svc]);
    let mut out = vec![stem.to_owned(), format!("{stem}.svc")];
    if host[dot + 1..svc] == cx.scope.namespace {
        out.push(short.to_owned());
    }
    out
}

/// The name that a Kubernetes Service goes by.
pub(crate) fn kube_host(service: &Service, cx: &Context) -> String {
    format!("{}.{}.svc.{}", service.meta.name, service.meta.namespace, cx.mesh.cluster_domain)
}

/// Lower case without a trailing dot: what hosts are grouped by.
pub(crate) fn group_key(host: &str) -> Cow<'_, str> {
    let host = host.strip_suffix('.').filter(|h| !h.is_empty()).unwrap_or(host);
    if host.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(host.to_ascii_lowercase())
    } else {
        Cow::Borrowed(host)
    }
}
