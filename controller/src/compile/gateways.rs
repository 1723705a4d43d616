//! What a gateway's workload listens for, and where VirtualServices send it (SEMANTICS 4.8, 4.13, 6.1). All of it follows
//! from its Gateways and the VirtualServices that bind to them: services make neither listeners nor virtual hosts here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use portolan_proto::v1::{GatewayListener, GatewayServer, ListenerPlan};
use portolan_registry::lookup::server_id;
use portolan_registry::name::HostPattern;
use portolan_registry::object::{ClusterName, Namespace, ObjectName};
use portolan_registry::route::{self, Action, Outcome, Redirect, Route, TextMatch};
use portolan_registry::row::{Choice, HostPort, Origin, Routes, Row, RowKey, TableName};

use super::gateway_servers::{Class, Merged, Server, merge, resolved};
use super::gateway_tls;
use super::http_routes::{self, Others, Place};
use super::l4_routes;
use super::needs::Needs;
use super::service::Context;
use super::virtual_services::{Virtual, VirtualServices};
use crate::api::gateway::{Gateway, ServerTlsMode};
use crate::api::virtual_service::RouteDestination;
use crate::model::{Checked, Scope};
use crate::validate::predicates;

/// The table of virtual hosts that only redirect to HTTPS.
const TO_HTTPS: &str = "https-redirect";
/// Longest name of a table; longer ones are made of a digest.
const LONGEST: usize = 900;

/// The Gateways of one workload, in Istio's order.
#[derive(Debug, Default)]
pub(crate) struct Gateways {
    objects: BTreeMap<(i64, ObjectName, Namespace), Arc<Checked<Gateway>>>,
    /// They have changed, or what they are compiled from.
    pub(crate) dirty: bool,
    /// Services in front of the workload: their ports, and the workload's.
    in_front: BTreeMap<Arc<str>, Vec<(u16, u16)>>,
    /// Hosts whose ports routes have asked for.
    destinations: BTreeSet<String>,
    /// Rows as they were written.
    pub(crate) written: BTreeMap<RowKey, Row>,
    /// What their routes need.
    pub(crate) needs: Arc<Needs>,
}

/// What Gateways come to.
#[derive(Debug, Default)]
pub(crate) struct Compiled {
    pub(crate) rows: BTreeMap<RowKey, Row>,
    pub(crate) plans: BTreeMap<u16, ListenerPlan>,
    /// Servers that found their place taken: what was asked for, who has it, and who does not get it.
    pub(crate) refused: Vec<(String, Origin, Origin)>,
    needs: Needs,
}

impl Gateways {
    pub(crate) fn insert(&mut self, object: &Arc<Checked<Gateway>>, scope: &Scope) {
        let meta = &object.meta;
        if object.spec.selector.iter().all(|(k, v)| scope.labels.get(k) == Some(v)) {
            let place = (meta.created, meta.name.clone(), meta.namespace.clone());
            self.objects.insert(place, Arc::clone(object));
            self.dirty = true;
        }
    }

    pub(crate) fn remove(&mut self, object: &Checked<Gateway>) {
        let meta = &object.meta;
        self.dirty |= self.objects.remove(&(meta.created, meta.name.clone(), meta.namespace.clone())).is_some();
    }

    /// Says which ports of a host are served by the workload itself, at which of its own.
    pub(crate) fn stands_behind(&mut self, host: &Arc<str>, ports: Vec<(u16, u16)>) {
        let before = if ports.is_empty() {
            self.in_front.remove(host)
        } else {
            self.in_front.insert(Arc::clone(host), ports.clone())
        };
        self.dirty |= before.unwrap_or_default() != ports;
        self.dirty |= self.destinations.contains(host.as_ref());
    }

    fn target(&self, number: u16) -> u16 {
        let ports = self.in_front.values().flatten();
        ports.into_iter().find(|(port, _)| *port == number).map_or(number, |(_, target)| *target)
    }

    /// Compiles everything.
    pub(crate) fn compile(
        &mut self,
        virtual_services: &VirtualServices,
        cx: &Context,
        others: &dyn Others,
    ) -> Compiled {
        let Merged { listeners, refused } = merge(self.objects.values(), |number| self.target(number));
        let mut bound: HashMap<String, Vec<Arc<Virtual>>> = HashMap::new();
        for server in listeners.values().flatten() {
            bound
                .entry(server.gateway.clone())
                .or_insert_with(|| virtual_services.bound_to(cx, &|name, ns| resolved(name, ns) == server.gateway));
        }
        let destinations = bound.values().flatten().flat_map(|one| one.destinations().iter().cloned()).collect();
        let mut work = Work { cx, others, bound: &bound, hosts: BTreeMap::new(), out: Compiled::default() };
        for ((port, bind), servers) in &listeners {
            work.listener(*port, bind, servers);
        }
        let Work { hosts, mut out, .. } = work;
        for (pattern, ports) in hosts {
            let row = Row::Host { pattern, ports: ports.into_values().collect() };
            out.rows.insert(row.key(), row);
        }
        out.refused = refused;
        if *self.needs != out.needs {
            self.needs = Arc::new(std::mem::take(&mut out.needs));
        }
        self.destinations = destinations;
        self.dirty = false;
        out
    }
}

/// A virtual host in the making.
#[derive(Default)]
struct Domain {
    /// Whose routes it has, by Gateway and VirtualService, in order.
    routes: Vec<usize>,
    /// The Gateway that redirects it.
    redirect: Option<Origin>,
}

/// Routes of one VirtualService for one Gateway.
struct Source {
    gateway: String,
    of: Arc<Virtual>,
    routes: Vec<Route>,
}

/// Filter chains by server name: those for a name, and the one for any.
#[derive(Default)]
struct Chains {
    any: Option<Choice>,
    names: BTreeMap<HostPattern, Choice>,
}

struct Work<'w> {
    cx: &'w Context,
    others: &'w dyn Others,
    /// VirtualServices of each Gateway.
    bound: &'w HashMap<String, Vec<Arc<Virtual>>>,
    hosts: BTreeMap<HostPattern, BTreeMap<(u16, u32), HostPort>>,
    out: Compiled,
}

impl<'w> Work<'w> {
    fn bound(&self, server: &Server<'_>) -> &'w [Arc<Virtual>] {
        self.bound.get(&server.gateway).map_or(&[], Vec::as_slice)
    }

    fn place<'p>(&'p self, server: &'p Server<'_>, one: &'p Virtual) -> Place<'p> {
        Place {
            cx: self.cx,
            namespace: &one.object.meta.namespace,
            port: server.number,
            others: self.others,
            gateway: Some(&server.gateway),
            tls: server.spec.tls.is_some(),
        }
    }

    fn listener(&mut self, port: u16, bind: &str, servers: &[Server<'_>]) {
        let mut chains = Chains::default();
        let mut plan: Vec<GatewayServer> = Vec::new();
        // HTTP servers of one name share their virtual hosts.
        let mut by_name: BTreeMap<&str, Vec<&Server<'_>>> = BTreeMap::new();
        for server in servers.iter().filter(|server| matches!(server.class, Class::Http | Class::Https)) {
            by_name.entry(&server.name).or_default().push(server);
        }
        for (name, group) in by_name {
            self.virtual_hosts(port, name, &group);
            let first = group.first().map(|server| &server.spec.tls);
            let https = group.iter().find(|server| server.class == Class::Https);
            let tls = https.and(first).and_then(|tls| tls.as_ref()).and_then(gateway_tls::plan);
            if https.is_some() && tls.is_none() {
                continue;
            }
            plan.push(GatewayServer {
                name: name.to_owned(),
                http: true,
                server_names: https.map(|server| server.server_names()).unwrap_or_default(),
                tls,
            });
        }
        // Names that end here are nobody else's.
        let ended = |server: &&Server<'_>| matches!(server.class, Class::Https | Class::Tls);
        let mut taken: BTreeSet<String> = servers.iter().filter(ended).flat_map(Server::server_names).collect();
        for server in servers {
            match server.class {
                Class::Http | Class::Https => {}
                Class::Tcp => {
                    let Some(choice) = self.tcp_choice(server) else { continue };
                    chains.any.get_or_insert(choice);
                    plan.push(GatewayServer { name: server.name.clone(), ..GatewayServer::default() });
                }
                Class::Tls => {
                    let Some(tls) = server.spec.tls.as_ref().and_then(gateway_tls::plan) else { continue };
                    let Some(choice) = self.tcp_choice(server) else { continue };
                    let server_names = server.server_names();
                    if server_names.is_empty() {
                        chains.any.get_or_insert(choice);
                    } else {
                        let patterns = server_names.iter().filter_map(|name| name.parse().ok());
                        chains.names.extend(patterns.map(|pattern| (pattern, choice.clone())));
                    }
                    plan.push(GatewayServer { name: server.name.clone(), http: false, server_names, tls: Some(tls) });
                }
                Class::Passthrough => self.passthrough(server, &mut taken, &mut chains),
            }
        }
        plan.extend(passed_on(&plan, &chains));
        self.put_chains(port, bind, chains);
        if !plan.is_empty() {
            let inspects = servers.iter().any(|server| server.class.by_name());
            let gateway = GatewayListener { bind: bind.to_owned(), servers: plan, inspects, sniffs_http: false };
            let of =
                self.out.plans.entry(port).or_insert_with(|| ListenerPlan { port: port.into(), ..Default::default() });
            of.gateway.push(gateway);
        }
    }

    /// Chains of an address are a row of it; those of the port are rows of the names.
    fn put_chains(&mut self, port: u16, bind: &str, chains: Chains) {
        let row = if let Ok(address) = bind.parse::<IpAddr>() {
            Row::Address { address, port, http: None, tcp: chains.any, sni: chains.names.into_iter().collect() }
        } else {
            for (pattern, choice) in chains.names {
                self.slot(pattern, port, 0).sni = Some(choice);
            }
            Row::Port { port, http: false, tcp: chains.any, prefixes: Vec::new() }
        };
        self.out.rows.insert(row.key(), row);
    }

    fn slot(&mut self, pattern: HostPattern, port: u16, server: u32) -> &mut HostPort {
        let blank = HostPort { port, server, ..HostPort::default() };
        self.hosts.entry(pattern).or_default().entry((port, server)).or_insert(blank)
    }

    /// The virtual hosts that these servers share: each host that a server and a VirtualService have in common, with the
    /// routes of all of them.
    fn virtual_hosts(&mut self, port: u16, name: &str, servers: &[&Server<'_>]) {
        let mut sources: Vec<Source> = Vec::new();
        let mut domains: BTreeMap<String, Domain> = BTreeMap::new();
        for server in servers {
            let redirects = server.spec.tls.as_ref().is_some_and(|tls| tls.https_redirect);
            for one in self.bound(server) {
                let hosts = intersection(server, one);
                if hosts.is_empty() {
                    continue;
                }
                let known = |source: &Source| source.gateway == server.gateway && Arc::ptr_eq(&source.of, one);
                let at = sources.iter().position(known).unwrap_or_else(|| {
                    let routes = http_routes::compile(one.http().iter(), &self.place(server, one));
                    sources.push(Source { gateway: server.gateway.clone(), of: Arc::clone(one), routes });
                    sources.len() - 1
                });
                if sources.get(at).is_none_or(|source| source.routes.is_empty()) {
                    continue;
                }
                for host in hosts {
                    let domain = domains.entry(host).or_default();
                    if !domain.routes.contains(&at) {
                        domain.routes.push(at);
                    }
                    if redirects {
                        domain.redirect.get_or_insert_with(|| server.origin.clone());
                    }
                }
            }
            for host in server.hosts.iter().filter(|host| redirects && !host.contains('/')) {
                let domain = domains.entry(host.to_lowercase()).or_default();
                domain.redirect.get_or_insert_with(|| server.origin.clone());
            }
        }
        let id = server_id(name.as_bytes());
        for (host, domain) in domains {
            let Ok(pattern) = host.parse::<HostPattern>() else { continue };
            let Some(choice) = self.table(name, &domain, &sources) else { continue };
            self.slot(pattern, port, id).http = Some(choice);
        }
    }

    /// The table of a virtual host, which others may share.
    fn table(&mut self, server: &str, domain: &Domain, sources: &[Source]) -> Option<Choice> {
        let of = || domain.routes.iter().filter_map(|at| sources.get(*at));
        let (name, winner) = match &domain.redirect {
            Some(gateway) => (TO_HTTPS.to_owned(), gateway.clone()),
            None => {
                let names =
                    of().map(|s| format!("{}<{}/{}", s.gateway, s.of.object.meta.namespace, s.of.object.meta.name));
                let names: Vec<String> = names.collect();
                let whole = format!("{server}:{}", names.join("+"));
                let short = || {
                    let mut hasher = DefaultHasher::new();
                    hasher.write(whole.as_bytes());
                    format!("{}:{:016x}", server.get(..LONGEST / 2).unwrap_or(server), hasher.finish())
                };
                (if whole.len() > LONGEST { short() } else { whole.clone() }, of().next()?.of.origin())
            }
        };
        let name: TableName = name.parse().ok()?;
        if !self.out.rows.contains_key(&RowKey::Table(name.clone())) {
            let routes = if domain.redirect.is_some() {
                vec![to_https()]
            } else {
                // What takes everything comes last, whoever's it is.
                let all = of().flat_map(|source| &source.routes).cloned();
                let (last, first): (Vec<Route>, Vec<Route>) = all.partition(http_routes::takes_all);
                first.into_iter().chain(last).collect()
            };
            self.out.needs.add(&Needs::of(&routes));
            for row in route::rows(&name, &routes) {
                self.out.rows.insert(row.key(), row);
            }
        }
        let routes = Some(Routes::Table(name));
        Some(Choice { cluster: ClusterName::default(), routes, winner, losers: Vec::new() })
    }

    /// Where a server without HTTP sends everything: the first TCP route of the first VirtualService that has one.
    fn tcp_choice(&self, server: &Server<'_>) -> Option<Choice> {
        self.bound(server).iter().filter(|one| is_about(server, one)).find_map(|one| {
            let applies = |port: u32, gateways: &[String]| self.applies(server, one, port, gateways);
            let routes = (0..).zip(&one.object.spec.tcp);
            let (index, route) = routes.into_iter().find(|(_, route)| {
                let matched = route.matches.iter().any(|m| applies(m.port, &m.gateways));
                (route.matches.is_empty() || matched) && !route.route.is_empty()
            })?;
            self.l4(server, one, "tcp", index, &route.route)
        })
    }

    fn passthrough(&self, server: &Server<'_>, taken: &mut BTreeSet<String>, chains: &mut Chains) {
        if server.spec.tls.as_ref().is_some_and(|tls| tls.mode == ServerTlsMode::AutoPassthrough) {
            return;
        }
        for one in self.bound(server).iter().filter(|one| is_about(server, one)) {
            for (index, route) in (0..).zip(&one.object.spec.tls) {
                for wanted in &route.matches {
                    let names: Vec<String> = wanted.sni_hosts.iter().map(|name| name.to_lowercase()).collect();
                    // Envoy refuses part of a label.
                    let fits = |name: &String| !name.starts_with('*') || name == "*" || name.starts_with("*.");
                    if !self.applies(server, one, wanted.port, &wanted.gateways)
                        || names.iter().any(|name| taken.contains(name))
                    {
                        continue;
                    }
                    taken.extend(names.iter().cloned());
                    let Some(choice) = self.l4(server, one, "tls", index, &route.route) else { continue };
                    if names.iter().any(|name| name == "*") {
                        chains.any.get_or_insert(choice);
                        continue;
                    }
                    let patterns = names.iter().filter(|name| fits(name)).filter_map(|name| name.parse().ok());
                    chains.names.extend(patterns.map(|pattern: HostPattern| (pattern, choice.clone())));
                }
            }
        }
    }

    /// Whether a match of a TCP or TLS route is for this server. What it says of the client's labels does not count.
    #[expect(clippy::unused_self, reason = "beside its kin")]
    fn applies(&self, server: &Server<'_>, one: &Virtual, port: u32, gateways: &[String]) -> bool {
        let namespace = one.object.meta.namespace.as_str();
        (port == 0 || port == u32::from(server.number))
            && (gateways.is_empty() || gateways.iter().any(|name| resolved(name, namespace) == server.gateway))
    }

    fn l4(
        &self,
        server: &Server<'_>,
        one: &Virtual,
        kind: &str,
        index: u32,
        to: &[RouteDestination],
    ) -> Option<Choice> {
        l4_routes::choice(&self.place(server, one), one, kind, index, to)
    }
}

/// The chains of TLS that is passed on. Where other TLS ends here, the host has to know by name which does not.
fn passed_on(plan: &[GatewayServer], chains: &Chains) -> Vec<GatewayServer> {
    let ends = plan.iter().any(|server| server.tls.is_some());
    let own = |name: &String| !plan.iter().any(|server| server.server_names.contains(name));
    let names: Vec<String> = chains.names.keys().map(ToString::to_string).filter(own).collect();
    let all = chains.any.is_some() || !ends && !names.is_empty();
    let taken = plan.iter().any(|server| server.server_names.is_empty());
    let chain = |server_names| GatewayServer { name: "tcp".to_owned(), server_names, ..GatewayServer::default() };
    let named = (ends && !names.is_empty()).then(|| chain(names));
    named.into_iter().chain((all && !taken).then(|| chain(Vec::new()))).collect()
}

/// Hosts in lower case that a server and a VirtualService have in common: of each two the more specific one.
fn intersection(server: &Server<'_>, one: &Virtual) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for here in server.hosts_for(&one.object.meta.namespace) {
        for there in &one.hosts {
            if predicates::is_host_subset(here, there) {
                out.insert(here.to_lowercase());
            } else if predicates::is_host_subset(there, here) {
                out.insert(there.to_lowercase());
            }
        }
    }
    out
}

/// Whether a VirtualService has a host of the server's.
fn is_about(server: &Server<'_>, one: &Virtual) -> bool {
    let namespace = one.object.meta.namespace.as_str();
    server.hosts_for(namespace).any(|here| one.hosts.iter().any(|there| predicates::hosts_match(here, there)))
}

/// The route of a host of which only HTTPS is to be asked. Envoy does not look at the port that a client named.
fn to_https() -> Route {
    let redirect = Redirect { status: 301, scheme: "https".to_owned(), keeps_port: true, ..Redirect::default() };
    Route {
        name: TO_HTTPS.to_owned(),
        index: 0,
        path: TextMatch::Present,
        ignore_case: false,
        conditions: Vec::new(),
        action: Action { outcome: Outcome::Redirect(redirect), extras: None },
    }
}
