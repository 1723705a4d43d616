//! VirtualServices: which of them a subscriber sees, and which hosts and ports each has (SEMANTICS 4.1, 4.2).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use portolan_registry::object::{Namespace, ObjectName};
use portolan_registry::route;
use portolan_registry::row::{Choice, Origin, OriginKind, Routes, Row, RowKey, TableName};

use super::delegates;
use super::http_routes::{self, MESH, Others, Place};
use super::needs::Needs;
use super::rules::expand;
use super::service::Context;
use crate::api::virtual_service::{HttpRoute, VirtualService};
use crate::model::Checked;
use crate::validate::predicates;

type Key = (Namespace, ObjectName);

/// Where virtual hosts are: a socket of a Sidecar by its id, or 0, and a port.
pub(crate) type Spot = (u32, u16);

/// A VirtualService that a subscriber sees.
#[derive(Debug, PartialEq)]
pub(crate) struct Virtual {
    pub(crate) object: Arc<Checked<VirtualService>>,
    /// Hosts with short names expanded, as written.
    pub(crate) hosts: Vec<String>,
    /// The routes, with those of delegates in place.
    http: Vec<HttpRoute>,
    /// Hosts whose ports the routes may ask for, those of TLS and TCP among them.
    destinations: BTreeSet<String>,
}

impl Virtual {
    pub(crate) fn origin(&self) -> Origin {
        let meta = &self.object.meta;
        Origin { namespace: meta.namespace.clone(), name: meta.name.clone(), kind: OriginKind::VirtualService }
    }

    /// The routes, with those of delegates in place.
    pub(crate) fn http(&self) -> &[HttpRoute] {
        &self.http
    }

    /// Hosts in lower case whose ports its routes may ask for.
    pub(crate) fn destinations(&self) -> &BTreeSet<String> {
        &self.destinations
    }

    /// Whether it may bear on the filter chains of a host (in lower case).
    pub(crate) fn is_about(&self, host: &str) -> bool {
        let spec = &self.object.spec;
        let chains = !spec.tls.is_empty() || !spec.tcp.is_empty();
        chains && self.hosts.iter().any(|own| predicates::hosts_match(host, &own.to_lowercase()))
    }

    fn key(&self) -> Key {
        (self.object.meta.namespace.clone(), self.object.meta.name.clone())
    }
}

/// What is seen of all VirtualServices.
pub(crate) struct Views(Vec<View>);

/// What one egress listener of a Sidecar has; without a Sidecar there is one, which has all.
#[derive(Debug, Default, PartialEq)]
struct View {
    /// The socket that it is of; 0: none.
    socket: u32,
    port: Option<u16>,
    /// In Istio's order.
    list: Vec<Arc<Virtual>>,
    /// Hosts in lower case, and whose they are. Of an exact host all count, the first that has routes for a port; of a
    /// wildcard only the first.
    exact: HashMap<String, Vec<usize>>,
    wildcards: HashMap<String, Vec<usize>>,
}

impl View {
    fn new(socket: u32, port: Option<u16>, list: Vec<Arc<Virtual>>) -> Self {
        let mut view = View { socket, port, ..View::default() };
        for (at, one) in list.iter().enumerate() {
            for host in &one.hosts {
                let host = host.to_lowercase();
                let wildcard = host.starts_with('*');
                let index = if wildcard { &mut view.wildcards } else { &mut view.exact };
                let whose = index.entry(host).or_default();
                if whose.is_empty() || !wildcard {
                    whose.push(at);
                }
            }
        }
        view.list = list;
        view
    }

    /// Those whose host is the most specific for a registry host.
    fn most_specific(&self, host: &str) -> &[usize] {
        let above = |suffix: &str| {
            let starts = suffix.char_indices().map(|(at, _)| at).chain([suffix.len()]);
            starts.filter_map(|at| suffix.get(at..)).find_map(|rest| self.wildcards.get(&format!("*{rest}")))
        };
        let found = match host.strip_prefix('*') {
            Some(_) if self.wildcards.is_empty() => None,
            Some(suffix) => above(suffix),
            None if self.wildcards.is_empty() => self.exact.get(host),
            None => self.exact.get(host).or_else(|| above(host)),
        };
        found.map_or(&[], Vec::as_slice)
    }
}

/// Where a host and port leads.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Routed {
    /// Place of the VirtualService among those that are seen.
    pub(crate) order: usize,
    pub(crate) table: TableName,
    pub(crate) origin: Origin,
}

impl Routed {
    pub(crate) fn choice(&self) -> Choice {
        let (routes, winner) = (Some(Routes::Table(self.table.clone())), self.origin.clone());
        Choice { cluster: Default::default(), routes, winner, losers: Vec::new() }
    }
}

/// A table as it was written.
#[derive(Debug)]
struct Written {
    of: Arc<Virtual>,
    rows: Vec<RowKey>,
    needs: Needs,
}

/// All VirtualServices, and what became of them.
#[derive(Debug, Default)]
pub(crate) struct VirtualServices {
    objects: BTreeMap<Key, Arc<Checked<VirtualService>>>,
    /// Objects have changed, or what the subscriber imports.
    pub(crate) dirty: bool,
    views: Vec<View>,
    /// Tables of hosts of the registry, by socket and port.
    assigned: HashMap<Arc<str>, BTreeMap<Spot, Routed>>,
    /// Tables of hosts that are in no registry, by socket and port.
    only: BTreeMap<String, BTreeMap<Spot, Routed>>,
    tables: BTreeMap<TableName, Written>,
    /// What all tables need.
    needs: Arc<Needs>,
}

/// What a new assignment changes.
#[derive(Debug, Default)]
pub(crate) struct Reassigned {
    /// Hosts of the registry with other tables.
    pub(crate) hosts: Vec<Arc<str>>,
    /// Hosts that are in no registry, with other tables.
    pub(crate) only: Vec<String>,
    pub(crate) put: Vec<Row>,
    pub(crate) gone: Vec<RowKey>,
}

impl VirtualServices {
    pub(crate) fn insert(&mut self, object: &Arc<Checked<VirtualService>>) {
        self.objects.insert((object.meta.namespace.clone(), object.meta.name.clone()), Arc::clone(object));
        self.dirty = true;
    }

    pub(crate) fn remove(&mut self, object: &Checked<VirtualService>) {
        self.objects.remove(&(object.meta.namespace.clone(), object.meta.name.clone()));
        self.dirty = true;
    }

    /// Whether there is nothing here that bears on anything.
    pub(crate) fn is_idle(&self) -> bool {
        self.objects.is_empty() && !self.dirty && self.tables.is_empty()
    }

    /// What the routes need of their host's configuration.
    pub(crate) fn needs(&self) -> &Arc<Needs> {
        &self.needs
    }

    /// The table of a registry host and port.
    pub(crate) fn assigned(&self, host: &str, spot: Spot) -> Option<&Routed> {
        self.assigned.get(host)?.get(&spot)
    }

    /// The tables of a host that is in no registry.
    pub(crate) fn only(&self, host: &str) -> Option<&BTreeMap<Spot, Routed>> {
        self.only.get(host)
    }

    /// Those that the listener of a port sees, in order.
    pub(crate) fn seen(&self, spot: Spot) -> &[Arc<Virtual>] {
        self.view(spot).map_or(&[], |view| &view.list)
    }

    fn view(&self, (socket, port): Spot) -> Option<&View> {
        let of = |wanted: Option<u16>| self.views.iter().find(|view| view.socket == socket && view.port == wanted);
        of(Some(port)).or_else(|| of(None))
    }

    /// What is seen now, and what of it was not seen before or is not any more.
    pub(crate) fn review(&self, cx: &Context) -> (Views, Vec<Arc<Virtual>>) {
        let mesh = |object: &Checked<VirtualService>| {
            let gateways = &object.spec.gateways;
            gateways.is_empty() || gateways.iter().any(|gateway| gateway == MESH)
        };
        let list = if cx.gateway() { Vec::new() } else { self.visible(cx, &mesh) };
        let views = match &cx.imports {
            None => vec![View::new(0, None, list)],
            Some(imports) => imports
                .listeners
                .iter()
                .map(|listener| {
                    let some = list.iter().filter(|v| listener.imports_any(&v.object.meta.namespace, &v.hosts));
                    View::new(listener.place.socket, listener.port, some.cloned().collect())
                })
                .collect(),
        };
        let all = |views: &[View]| -> Vec<Arc<Virtual>> { views.iter().flat_map(|v| v.list.iter().cloned()).collect() };
        let (old, new) = (all(&self.views), all(&views));
        let missing = |from: &[Arc<Virtual>], here: &[Arc<Virtual>]| -> Vec<Arc<Virtual>> {
            let known: HashMap<Key, &Arc<Virtual>> = here.iter().map(|v| (v.key(), v)).collect();
            from.iter().filter(|v| known.get(&v.key()).is_none_or(|other| other != v)).cloned().collect()
        };
        let mut changed = missing(&old, &new);
        changed.extend(missing(&new, &old));
        (Views(views), changed)
    }

    /// From now on this is what is seen.
    pub(crate) fn see(&mut self, views: Views) {
        self.views = views.0;
        self.dirty = false;
    }

    /// Those that a gateway sees of which one of the Gateways they name is meant, by name and own namespace.
    pub(crate) fn bound_to(&self, cx: &Context, meant: &dyn Fn(&str, &str) -> bool) -> Vec<Arc<Virtual>> {
        self.visible(cx, &|object| {
            let namespace = object.meta.namespace.as_str();
            object.spec.gateways.iter().any(|name| name != MESH && meant(name, namespace))
        })
    }

    /// Those that a subscriber sees, of some: private ones of its namespace, those exported to it, public ones; each by age and name.
    fn visible(&self, cx: &Context, some: &dyn Fn(&Checked<VirtualService>) -> bool) -> Vec<Arc<Virtual>> {
        let own = cx.scope.namespace.as_str();
        let mut ranked: Vec<(u8, &Arc<Checked<VirtualService>>)> = Vec::new();
        for object in self.objects.values() {
            if object.spec.hosts.is_empty() || !some(object) {
                continue;
            }
            let rank = match reach(object, cx) {
                Reach::Public => 2,
                Reach::Some(to) if to.contains(&own) => u8::from(object.meta.namespace.as_str() != own),
                Reach::Some(_) | Reach::Nobody => continue,
            };
            ranked.push((rank, object));
        }
        ranked.sort_by_key(|(rank, o)| (*rank, o.meta.created, o.meta.name.clone(), o.meta.namespace.clone()));
        ranked.into_iter().map(|(_, object)| Arc::new(self.resolve(object, cx))).collect()
    }

    fn resolve(&self, object: &Arc<Checked<VirtualService>>, cx: &Context) -> Virtual {
        let namespace = object.meta.namespace.as_str();
        let domain = &cx.mesh.cluster_domain;
        let delegate = |of: &str, name: &str| {
            let key = (of.parse().ok()?, name.parse().ok()?);
            let found = self.objects.get(&key).filter(|found| found.spec.hosts.is_empty())?;
            let reaches = match reach(found, cx) {
                Reach::Public => true,
                Reach::Some(to) => to.contains(&namespace),
                Reach::Nobody => false,
            };
            reaches.then_some(found.as_ref())
        };
        let http: Vec<HttpRoute> = delegates::merged(object, delegate).into_iter().map(|r| r.into_owned()).collect();
        let spec = &object.spec;
        let tls = spec.tls.iter().flat_map(|route| &route.route);
        let l4 = tls.chain(spec.tcp.iter().flat_map(|route| &route.route)).filter_map(|to| to.destination.as_ref());
        let destinations = http_routes::destinations(http.iter(), l4, namespace, domain);
        let hosts = object.spec.hosts.iter().map(|host| expand(host, namespace, domain)).collect();
        Virtual { object: Arc::clone(object), hosts, http, destinations }
    }

    /// Works out which hosts and ports have which tables. `ports` are the HTTP ports of every registry host, `touched` the
    /// hosts that have changed, `others` knows where routes lead to.
    pub(crate) fn assign(
        &mut self,
        cx: &Context,
        ports: &HashMap<Arc<str>, Vec<Spot>>,
        touched: &BTreeSet<Arc<str>>,
        others: &dyn Others,
    ) -> Reassigned {
        let mut out = Reassigned::default();
        let mut tables: BTreeMap<TableName, Written> = BTreeMap::new();
        let mut old = std::mem::take(&mut self.tables);
        let mut table = |one: &Arc<Virtual>, port: u16| -> Option<Routed> {
            let meta = &one.object.meta;
            let name: TableName = format!("{}/{}:{port}", meta.namespace, meta.name).parse().ok()?;
            let origin = one.origin();
            if let Some(known) = tables.get(&name) {
                return (!known.rows.is_empty()).then_some(Routed { order: 0, table: name, origin });
            }
            let same = |was: &Written| {
                (Arc::ptr_eq(&was.of, one) || was.of == *one)
                    && !touched.iter().any(|host| one.destinations.contains(host.as_ref()))
            };
            let written = match old.remove(&name) {
                Some(was) if same(&was) => was,
                was => {
                    let namespace = &meta.namespace;
                    let place = Place { cx, namespace, port, others, gateway: None, tls: false };
                    let routes = http_routes::compile(one.http.iter(), &place);
                    let rows = if routes.is_empty() { Vec::new() } else { route::rows(&name, &routes) };
                    let keys: Vec<RowKey> = rows.iter().map(Row::key).collect();
                    let left = was.map(|was| was.rows).unwrap_or_default().into_iter();
                    out.gone.extend(left.filter(|key| !keys.contains(key)));
                    out.put.extend(rows);
                    Written { of: Arc::clone(one), rows: keys, needs: Needs::of(&routes) }
                }
            };
            let there = !written.rows.is_empty();
            tables.insert(name.clone(), written);
            there.then_some(Routed { order: 0, table: name, origin })
        };

        let mut assigned: HashMap<Arc<str>, BTreeMap<Spot, Routed>> = HashMap::new();
        let mut only: BTreeMap<String, BTreeMap<Spot, Routed>> = BTreeMap::new();
        for view in &self.views {
            let serves = |(socket, port): Spot| match view.port {
                _ if socket != view.socket => false,
                Some(own) => own == port,
                None => socket != 0 || !self.views.iter().any(|other| other.port == Some(port)),
            };
            // Ports on which a VirtualService is a service's, and on which its wildcards are about any.
            let mut matched: Vec<BTreeSet<Spot>> = vec![BTreeSet::new(); view.list.len()];
            let mut about: HashMap<&str, BTreeSet<Spot>> = HashMap::new();
            let wildcards: Vec<&String> = view.wildcards.keys().collect();
            for (host, ports) in ports {
                let ports = || ports.iter().copied().filter(|port| serves(*port));
                for wildcard in wildcards.iter().filter(|wildcard| predicates::hosts_match(host, wildcard)) {
                    about.entry(wildcard.as_str()).or_default().extend(ports());
                }
                for &at in view.most_specific(host) {
                    let (Some(one), Some(matched)) = (view.list.get(at), matched.get_mut(at)) else { continue };
                    for spot in ports() {
                        matched.insert(spot);
                        if let Some(table) = table(one, spot.1) {
                            let own = assigned.entry(Arc::clone(host)).or_default();
                            own.entry(spot).or_insert(Routed { order: at, ..table });
                        }
                    }
                }
            }
            for (order, (one, matched)) in view.list.iter().zip(matched).enumerate() {
                // Istio makes virtual hosts for names that it does not know on port 80 only, or beside a service's.
                let other = Some((view.socket, 80)).filter(|spot| !matched.contains(spot));
                for spot in matched.iter().copied().chain(other).filter(|spot| serves(*spot)) {
                    for host in one.hosts.iter().map(|host| host.to_lowercase()) {
                        let known = match host.starts_with('*') {
                            true => about.get(host.as_str()).is_some_and(|ports| ports.contains(&spot)),
                            false => ports.get(host.as_str()).is_some_and(|ports| ports.contains(&spot)),
                        };
                        let taken = only.get(&host).is_some_and(|ports| ports.contains_key(&spot));
                        if !known
                            && !taken
                            && let Some(table) = table(one, spot.1)
                        {
                            only.entry(host).or_default().insert(spot, Routed { order, ..table });
                        }
                    }
                }
            }
        }
        out.gone.extend(old.into_values().flat_map(|was| was.rows));
        self.tables = tables;
        let mut needs = Needs::default();
        self.tables.values().for_each(|table| needs.add(&table.needs));
        if *self.needs != needs {
            self.needs = Arc::new(needs);
        }
        // Chains ask for destinations' ports as well.
        let asks = |one: &&Arc<Virtual>| touched.iter().any(|host| one.destinations.contains(host.as_ref()));
        let asking: Vec<&Arc<Virtual>> = self.views.iter().flat_map(|view| &view.list).filter(asks).collect();
        let about = |host: &&Arc<str>| asking.iter().any(|one| one.is_about(host));
        out.hosts.extend(ports.keys().filter(|_| !asking.is_empty()).filter(about).cloned());
        let changed = |host: &&Arc<str>| self.assigned.get(*host) != assigned.get(*host);
        let all: BTreeSet<&Arc<str>> = self.assigned.keys().chain(assigned.keys()).collect();
        out.hosts.extend(all.into_iter().filter(changed).cloned());
        let all: BTreeSet<&String> = self.only.keys().chain(only.keys()).collect();
        out.only = all.into_iter().filter(|host| self.only.get(*host) != only.get(*host)).cloned().collect();
        self.assigned = assigned;
        self.only = only;
        out
    }
}

/// Whom a VirtualService is exported to.
enum Reach<'o> {
    Public,
    Some(Vec<&'o str>),
    Nobody,
}

fn reach<'o>(object: &'o Checked<VirtualService>, cx: &'o Context) -> Reach<'o> {
    let to = match object.spec.export_to.as_slice() {
        [] => &cx.mesh.default_virtual_service_export_to,
        own => own,
    };
    let own = |entry: &'o String| if entry == "." { object.meta.namespace.as_str() } else { entry.as_str() };
    if to.iter().any(|entry| entry == "*") {
        Reach::Public
    } else if to.iter().any(|entry| entry == "~") {
        Reach::Nobody
    } else {
        Reach::Some(to.iter().map(own).collect())
    }
}
