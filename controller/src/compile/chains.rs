//! What one host name puts into listeners and virtual hosts: filter chains (SEMANTICS 3.2, 3.3, 3.6, 3.7) and domains
//! (1.5).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_registry::name::HostPattern;
use portolan_registry::object::ClusterName;
use portolan_registry::route::{Action, Extras, HashKey, Outcome, Retry, Route, Target, TargetExtras, TextMatch};
use portolan_registry::row::{Choice, MAX_LOSERS, Origin, Routes, RowKey};

use super::http_routes::Others;
use super::l4_routes::{self, L4};
use super::service::{
    Addr, Context, HostPortOwner, Member, Order, Resolved, Source, Spoken, alternate_hosts, http_class, tls_class,
};
use super::virtual_services::{Routed, Spot, VirtualServices};
use crate::cluster::endpoints::{Workloads, host_endpoints};
use crate::cluster::{forward_name, outbound_name};
use crate::model::{Protocol, Resolution};

/// Ports that belong to the proxy: inbound, outbound, health and metrics.
const OWN_PORTS: [u16; 4] = [15001, 15006, 15021, 15090];

/// Where a chain's listener is bound, and what it asks of the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Bind {
    Wildcard,
    /// The wildcard listener, for destinations in this prefix.
    Net(IpNet),
    Address(IpAddr),
}

/// Filter chains of one service port at one address.
#[derive(Debug, Clone)]
pub(crate) struct Chain {
    /// Index into [`Resolved::services`].
    pub(crate) service: usize,
    pub(crate) address: u32,
    pub(crate) port: u16,
    pub(crate) protocol: Protocol,
    pub(crate) bind: Bind,
    /// Server name that the TCP chain asks for.
    pub(crate) sni: Option<HostPattern>,
    /// Destinations that a chain of an address asks for besides.
    pub(crate) within: Option<IpNet>,
    /// Where a VirtualService sends it.
    pub(crate) routed: Option<Arc<Choice>>,
    /// A chain for plain-text HTTP.
    pub(crate) http: bool,
    /// A chain for everything else.
    pub(crate) tcp: bool,
    /// The listener has a socket of its own.
    pub(crate) bound: bool,
    /// That socket is a Unix one, by its id; 0: it is none.
    pub(crate) socket: u32,
}

impl Chain {
    /// The port of the row that it is in.
    pub(crate) fn listens(&self) -> u16 {
        if self.socket == 0 { self.port } else { 0 }
    }
}

/// What a host name puts on a wildcard listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PortClaim {
    pub(crate) protocol: Protocol,
    pub(crate) http: bool,
    /// A chain without any condition.
    pub(crate) all: bool,
    pub(crate) sni: bool,
    /// The server name that was asked for is dialled.
    pub(crate) dials: bool,
}

/// A domain that is not the host name itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Domain {
    pub(crate) pattern: HostPattern,
    /// An address counts only on ports whose virtual host this service makes.
    pub(crate) of: Option<usize>,
}

/// What the chains of a host name depend on beside the name's own objects.
#[derive(Clone, Copy)]
pub(crate) struct Around<'a> {
    pub(crate) members: &'a [Member],
    pub(crate) workloads: &'a Workloads,
    pub(crate) virtual_services: &'a VirtualServices,
    pub(crate) others: &'a dyn Others,
    pub(crate) cx: &'a Context,
}

/// All that one host name claims.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) pattern: Option<HostPattern>,
    pub(crate) resolved: Resolved,
    pub(crate) chains: Vec<Chain>,
    pub(crate) domains: Vec<Domain>,
    /// Route tables, by socket and port.
    pub(crate) routed: BTreeMap<Spot, Routed>,
    /// What requests are kept together by on ports without a table.
    hashed: BTreeMap<u16, HashKey>,
    /// How they are retried, where the mesh says so.
    retry: Option<Retry>,
    /// What connections ask for in a tunnel.
    tunnel: Option<String>,
    /// Partial wildcards that a TLS port cannot match: origin and pattern.
    pub(crate) dropped: Vec<(Origin, String)>,
}

impl Group {
    pub(crate) fn new(key: &str, resolved: Resolved, around: &Around<'_>) -> Self {
        let Around { virtual_services, cx, .. } = *around;
        let spots = spots(&resolved);
        let routed = spots.filter_map(|spot| Some((spot, virtual_services.assigned(key, spot)?.clone()))).collect();
        let mut group = Group {
            pattern: key.parse().ok(),
            resolved,
            chains: Vec::new(),
            domains: Vec::new(),
            routed,
            hashed: BTreeMap::new(),
            retry: cx.default_retry(),
            tunnel: around.others.tunnel(key, ""),
            dropped: Vec::new(),
        };
        for owner in group.resolved.ports.iter().filter(|owner| owner.http.is_some()) {
            let host = group.resolved.services.get(owner.base).map_or("", |s| &s.member.host);
            let key = around.others.hash(host, owner.number, "", true);
            group.hashed.extend(key.map(|key| (owner.number, key)));
        }
        group.domains = domains(key, &group.resolved, cx);
        for index in 0..group.resolved.services.len() {
            group.add_chains(index, around);
        }
        group
    }

    fn add_chains(&mut self, index: usize, around: &Around<'_>) {
        let Around { members, workloads, cx, .. } = *around;
        let Some(service) = self.resolved.services.get(index).cloned() else { return };
        let places = service.ports().flat_map(|port| service.places(port.number).into_iter().map(move |at| (port, at)));
        for (port, place) in places {
            let protocol = place.protocol.unwrap_or(port.protocol);
            let blank = Chain {
                service: index,
                address: 0,
                port: port.number,
                protocol,
                bind: place.address.map_or(Bind::Wildcard, Bind::Address),
                sni: None,
                within: None,
                routed: None,
                http: false,
                tcp: false,
                bound: place.bound,
                socket: place.socket,
            };
            if http_class(protocol) {
                if place.socket == 0 && !OWN_PORTS.contains(&port.number) {
                    self.chains.push(Chain { http: true, ..blank });
                }
                continue;
            }
            // A socket says nothing of the port that is meant.
            if place.socket != 0 && service.ports().count() != 1 {
                continue;
            }
            let http = protocol == Protocol::Auto;
            if place.address.is_some() {
                self.put(&service, Chain { http, tcp: true, ..blank }, around);
                continue;
            }
            for (address, addr) in (0..).zip(&service.addresses) {
                let chain = Chain { address, http, tcp: true, ..blank.clone() };
                match addr {
                    Addr::Ip(ip, _) => self.put(&service, Chain { bind: Bind::Address(*ip), ..chain }, around),
                    Addr::Net(net) => {
                        let chain = Chain { bind: Bind::Net(*net), ..chain };
                        self.put(&service, chain, around);
                    }
                    Addr::Any => match headless(&service, port.number, members, workloads) {
                        Some(ips) => {
                            let own: BTreeSet<IpAddr> = cx.scope.ips.iter().filter_map(|i| i.parse().ok()).collect();
                            for ip in ips.difference(&own) {
                                self.put(&service, Chain { bind: Bind::Address(*ip), ..chain.clone() }, around);
                            }
                        }
                        None => self.put(&service, chain, around),
                    },
                }
            }
        }
    }

    /// The chains of VirtualServices, then the service's own where those leave it.
    fn put(&mut self, service: &Spoken, chain: Chain, around: &Around<'_>) {
        let l4 = L4 {
            cx: around.cx,
            seen: around.virtual_services.seen((chain.socket, chain.port)),
            host: &service.member.host,
            port: chain.port,
            others: around.others,
        };
        let own = if tls_class(chain.protocol) {
            let some = l4.tls(&chain);
            let own = some.is_empty();
            for routed in some {
                match &routed.sni {
                    Some(HostPattern::Suffix(suffix)) if !suffix.starts_with('.') => {
                        let pattern = format!("*{suffix}");
                        self.dropped.extend(routed.routed.map(|choice| (choice.winner.clone(), pattern)));
                    }
                    _ => self.chains.push(routed),
                }
            }
            own
        } else {
            let (some, own) = l4.tcp(&chain);
            let instead = !some.is_empty() && !own;
            if instead && chain.http {
                // The half of the port that is HTTP stays.
                self.chains.push(Chain { tcp: false, ..chain.clone() });
            }
            self.chains.extend(some.into_iter().map(|routed| Chain { http: false, ..routed }));
            own
        };
        match own {
            true if matches!(chain.bind, Bind::Address(_)) => self.chains.push(chain),
            true => self.with_server_names(service, chain, around.cx),
            false => {}
        }
    }

    /// Where a VirtualService sends what no other chain of a port takes.
    pub(crate) fn everything(&self, port: u16, of: &Order) -> Option<&Choice> {
        let all = |c: &&Chain| c.port == port && c.tcp && c.sni.is_none() && c.bind == Bind::Wildcard;
        let mut chains = self.chains.iter().filter(all).filter(|c| self.order(c).as_ref() == Some(of));
        chains.next()?.routed.as_deref()
    }

    /// TLS chains ask for the host's server names; all others, and TLS of host `*`, take what comes.
    fn with_server_names(&mut self, service: &Spoken, chain: Chain, cx: &Context) {
        if !tls_class(chain.protocol) || self.pattern == Some(HostPattern::Suffix(String::new())) {
            self.chains.push(chain);
            return;
        }
        let mut names: Vec<HostPattern> = self.pattern.iter().cloned().collect();
        for alias in &self.resolved.aliases {
            names.extend(alias.parse());
            names.extend(alternate_hosts(alias, cx).iter().filter_map(|a| a.parse().ok()));
        }
        for name in names {
            match &name {
                // Envoy refuses a listener with such a server name (SEMANTICS 3.7).
                HostPattern::Suffix(suffix) if !suffix.starts_with('.') => {
                    self.dropped.push((service.member.source.origin(), name.to_string()));
                }
                _ => self.chains.push(Chain { sni: Some(name), ..chain.clone() }),
            }
        }
    }

    /// The service that a chain or port owner means.
    pub(crate) fn service(&self, index: usize) -> Option<&Spoken> {
        self.resolved.services.get(index)
    }

    pub(crate) fn owner(&self, port: u16) -> Option<&HostPortOwner> {
        self.resolved.ports.iter().find(|o| o.number == port)
    }

    pub(crate) fn order(&self, chain: &Chain) -> Option<Order> {
        Some(self.service(chain.service)?.order(chain.address))
    }

    /// Rows that this host name has a say in, beside the one of its own name.
    pub(crate) fn foreign_rows(&self) -> BTreeSet<RowKey> {
        let own = self.pattern.as_ref();
        let mut out: BTreeSet<RowKey> = self.domains.iter().map(|d| RowKey::Host(d.pattern.clone())).collect();
        for chain in &self.chains {
            match (&chain.bind, &chain.sni) {
                (Bind::Address(ip), _) => drop(out.insert(RowKey::Address(*ip, chain.listens()))),
                (Bind::Net(net), _) => drop(out.insert(RowKey::Prefix(chain.port, *net))),
                (Bind::Wildcard, Some(name)) => drop(out.insert(RowKey::Host(name.clone()))),
                (Bind::Wildcard, None) => {}
            }
        }
        if let Some(own) = own {
            out.remove(&RowKey::Host(own.clone()));
        }
        out
    }

    /// What it puts on wildcard listeners, one claim for each service, address and port.
    pub(crate) fn port_claims(&self) -> Vec<(u16, Order, PortClaim)> {
        let mut out: Vec<(u16, Order, PortClaim)> = Vec::new();
        for chain in self.chains.iter().filter(|c| !matches!(c.bind, Bind::Address(_))) {
            let Some(order) = self.order(chain) else { continue };
            let resolution = self.service(chain.service).map(|s| s.member.source.resolution());
            let claim = PortClaim {
                protocol: chain.protocol,
                http: chain.http,
                all: chain.tcp && chain.sni.is_none() && chain.bind == Bind::Wildcard,
                sni: chain.sni.is_some(),
                dials: tls_class(chain.protocol) && resolution == Some(Resolution::DynamicDns),
            };
            match out.last_mut() {
                Some((port, last, merged)) if *port == chain.port && *last == order => {
                    merged.http |= claim.http;
                    merged.all |= claim.all;
                    merged.sni |= claim.sni;
                    merged.dials |= claim.dials;
                }
                _ => out.push((chain.port, order, claim)),
            }
        }
        out
    }

    /// The cluster of a port, as istiod names it.
    pub(crate) fn cluster(&self, port: u16) -> ClusterName {
        let base = self.owner(port).and_then(|o| self.service(o.base));
        outbound_name(port, base.map_or("", |s| &s.member.host))
    }

    fn choice(&self, owner: &HostPortOwner, cluster: ClusterName) -> Option<Choice> {
        let winner = self.service(owner.declared)?.member.source.origin();
        let mut losers: Vec<Origin> = Vec::new();
        for other in self.resolved.services.iter().chain(&self.resolved.hidden) {
            let origin = other.member.source.origin();
            if losers.len() < MAX_LOSERS
                && other.port(owner.number).is_some()
                && origin != winner
                && !losers.contains(&origin)
            {
                losers.push(origin);
            }
        }
        Some(Choice { cluster, routes: None, winner, losers })
    }

    /// The virtual host of a port, for the host name (`None`) or for an address of this service.
    pub(crate) fn http_choice(&self, port: u16, of: Option<usize>) -> Option<Choice> {
        let owner = self.owner(port).filter(|owner| owner.sockets.contains(&0))?;
        let http = owner.http?;
        if of.is_some_and(|of| of != http) {
            return None;
        }
        if let Some(routed) = self.routed.get(&(0, port)) {
            return Some(routed.choice());
        }
        Some(self.kept_together(port, self.choice(owner, self.cluster(port))?))
    }

    /// The same for requests that are kept together, where they are: by one route for all.
    pub(crate) fn kept_together(&self, port: u16, choice: Choice) -> Choice {
        let Some(key) = self.hashed.get(&port) else { return choice };
        let extras = TargetExtras { hash: Some(key.clone()), ..TargetExtras::default() };
        let cluster = choice.cluster.to_string();
        let targets = vec![Target { cluster, weight: 1, extras: Some(Box::new(extras)) }];
        let more = self.retry.clone().map(|retry| Box::new(Extras { retry: Some(retry), ..Extras::default() }));
        let route = Route {
            name: "default".to_owned(),
            index: 0,
            path: TextMatch::Present,
            ignore_case: false,
            conditions: Vec::new(),
            action: Action { outcome: Outcome::Forward(targets), extras: more },
        };
        Choice { cluster: ClusterName::default(), routes: Some(Routes::Inline(vec![route])), ..choice }
    }

    /// A connection's choice, in a tunnel where it is to be in one.
    pub(crate) fn tunnelled(&self, choice: Choice) -> Choice {
        let Some(tunnel) = &self.tunnel else { return choice };
        let cluster = choice.cluster.to_string();
        let targets = vec![Target { cluster, weight: 1, extras: Some(l4_routes::tunnelled(tunnel.clone())) }];
        let route = Route {
            name: "tunnel".to_owned(),
            index: 0,
            path: TextMatch::Present,
            ignore_case: false,
            conditions: Vec::new(),
            action: Action { outcome: Outcome::Forward(targets), extras: None },
        };
        Choice { cluster: ClusterName::default(), routes: Some(Routes::Inline(vec![route])), ..choice }
    }

    /// Ports with a virtual host.
    pub(crate) fn http_ports(&self) -> Vec<Spot> {
        spots(&self.resolved).collect()
    }

    /// What the HTTP proxy port does, or a Sidecar's own: an entry without endpoints is dialled by the name asked for.
    pub(crate) fn proxy_choice(&self, spot: Spot) -> Option<Choice> {
        let (socket, port) = spot;
        let owner = self.owner(port).filter(|owner| owner.sockets.contains(&socket))?;
        if let Some(routed) = self.routed.get(&spot) {
            return Some(routed.choice());
        }
        let base = self.service(owner.base)?;
        match base.member.source.resolution() {
            Resolution::None => self.choice(owner, forward_name(port, &base.member.host)),
            _ => Some(self.kept_together(port, self.choice(owner, self.cluster(port))?)),
        }
    }
}

/// Where a host name has virtual hosts.
fn spots(resolved: &Resolved) -> impl Iterator<Item = Spot> {
    let ports = resolved.ports.iter().filter(|owner| owner.http.is_some());
    ports.flat_map(|owner| owner.sockets.iter().map(|socket| (*socket, owner.number)))
}

/// The addresses of a headless service, where its listeners are bound to those of its endpoints (SEMANTICS 3.6).
fn headless(service: &Spoken, port: u16, members: &[Member], workloads: &Workloads) -> Option<BTreeSet<IpAddr>> {
    let source = &service.member.source;
    if source.resolution() != Resolution::None {
        return None;
    }
    let selects = match source {
        Source::Entry(entry) => entry.workload_selector.as_ref().is_some_and(|l| !l.is_empty()),
        Source::Kube(_) => true,
    };
    let endpoints = host_endpoints(members, &source.meta().namespace, workloads);
    let here: Vec<_> = endpoints.iter().filter(|e| e.service_port == port).collect();
    (selects || !here.is_empty()).then(|| here.iter().filter_map(|e| e.address.parse().ok()).collect())
}

fn domains(key: &str, resolved: &Resolved, cx: &Context) -> Vec<Domain> {
    let mut names = alternate_hosts(key, cx);
    for alias in &resolved.aliases {
        names.push(alias.clone());
        names.extend(alternate_hosts(alias, cx));
    }
    let headless = |s: &Spoken| s.member.source.is_kube() && s.member.source.resolution() == Resolution::None;
    if resolved.services.iter().any(headless) {
        let mut below: Vec<String> = names.iter().map(|n| format!("*.{n}")).collect();
        below.push(format!("*.{key}"));
        names.extend(below);
    }
    let mut out: Vec<Domain> =
        names.iter().filter_map(|n| n.parse().ok()).map(|pattern| Domain { pattern, of: None }).collect();
    for (index, service) in resolved.services.iter().enumerate() {
        for address in &service.addresses {
            if let Addr::Ip(_, text) = address
                && let Ok(pattern) = text.parse()
            {
                out.push(Domain { pattern, of: Some(index) });
            }
        }
    }
    out
}
