//! Objects to rows, for one scope: a pure function of the set of objects, computed change by change.
//!
//! Two stages. Objects are grouped by host name, and each name is resolved on its own ([`service`]) into the filter chains
//! and domains that it claims ([`chains`]). Claims meet at lookup keys, where the order of precedence decides
//! ([`rows`], [`ports`]). A change withdraws what its host names claimed, and makes anew what they claim now and the rows
//! of the keys that either touched; nothing else is looked at.

mod chains;
mod conflicts;
mod delegates;
mod gateway_commit;
mod gateway_servers;
mod gateway_tls;
pub mod gateways;
mod http_routes;
mod l4_routes;
mod members;
mod names;
pub mod needs;
mod others;
mod ports;
mod rows;
pub mod rules;
pub(crate) mod service;
pub mod sidecar;
pub mod virtual_services;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use portolan_proto::envoy::envoy::config::cluster::v3::Cluster;
use portolan_proto::v1::{DnsName, Inspection, ListenerPlan};
use portolan_registry::object::{ClusterName, Namespace};
use portolan_registry::row::{CatchAll, Choice, Globals, Origin, Row, RowKey};
use portolan_registry::write::{self, PageId, Writer};

use self::chains::{Around, Group};
use self::conflicts::note_losers;
pub use self::conflicts::{Conflict, ConflictRule};
use self::gateways::Gateways;
use self::needs::Needs;
use self::others::Registry;
use self::ports::{At, PortState};
use self::rules::Rules;
use self::service::{Context, Member, group_key};
use self::sidecar::Sidecars;
use self::virtual_services::VirtualServices;
use crate::cluster::{self, endpoints::Workloads};
use crate::model::{Change, MeshConfig, Object, ObjectKey, OutboundMode, Scope, Service};

/// What a [`Compiler::commit`] did.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// Pages.
    pub pages: write::Commit,
    /// Ports whose listener plan changed or went.
    pub plans: Vec<u16>,
    /// Host names, in lower case, whose clusters may have changed.
    pub hosts: Vec<Arc<str>>,
    /// Host names whose answer by a DNS proxy changed or went.
    pub names: Vec<Arc<str>>,
    /// Conflicts at the keys that were computed.
    pub conflicts: Vec<Conflict>,
}

#[derive(Debug, Default)]
struct HostState {
    members: Vec<Member>,
    /// ExternalName Services that point here.
    aliases: Vec<Member>,
}

/// Compiles the objects that one scope sees.
#[derive(Debug)]
pub struct Compiler {
    cx: Context,
    sidecars: Sidecars,
    policy_changed: bool,
    gateways: Gateways,
    rules: Rules,
    virtual_services: VirtualServices,
    /// HTTP ports of each host, where VirtualServices ask for them.
    http_ports: HashMap<Arc<str>, Vec<virtual_services::Spot>>,
    objects: HashMap<ObjectKey, Object>,
    hosts: HashMap<Arc<str>, HostState>,
    /// ExternalName Services by their own names.
    aliases: HashMap<Arc<str>, Arc<Service>>,
    workloads: Workloads,
    /// Hosts of each namespace that select workloads.
    selecting: HashMap<Namespace, BTreeSet<Arc<str>>>,
    /// Hosts with a say in rows that are not their own.
    claimants: HashMap<RowKey, BTreeSet<Arc<str>>>,
    ports: BTreeMap<u16, PortState>,
    plans: BTreeMap<u16, ListenerPlan>,
    writer: Writer,
    needs: Arc<Needs>,
    names: BTreeMap<Arc<str>, DnsName>,
    dirty_hosts: BTreeSet<Arc<str>>,
    /// Hosts whose clusters alone may have changed.
    dirty_clusters: BTreeSet<Arc<str>>,
    dirty_rows: BTreeSet<RowKey>,
    dirty_ports: BTreeSet<u16>,
}

/// Compiles a set of objects from nothing.
pub fn compile(objects: impl IntoIterator<Item = Object>, scope: Scope, mesh: MeshConfig) -> (Compiler, Update) {
    let mut compiler = Compiler::new(scope, mesh);
    for object in objects {
        compiler.apply_one(&Change::Apply(object));
    }
    let update = compiler.commit();
    (compiler, update)
}

impl Compiler {
    /// A compiler without objects. Changed settings of the mesh need a new one.
    pub fn new(scope: Scope, mesh: MeshConfig) -> Self {
        let cx = Context { scope, mesh, imports: None };
        let mut compiler = Compiler {
            cx,
            sidecars: Sidecars::default(),
            policy_changed: false,
            gateways: Gateways::default(),
            rules: Rules::default(),
            virtual_services: VirtualServices::default(),
            http_ports: HashMap::new(),
            dirty_clusters: BTreeSet::new(),
            objects: HashMap::new(),
            hosts: HashMap::new(),
            aliases: HashMap::new(),
            workloads: Workloads::default(),
            selecting: HashMap::new(),
            claimants: HashMap::new(),
            ports: BTreeMap::new(),
            plans: BTreeMap::new(),
            writer: Writer::new(),
            needs: Arc::default(),
            names: BTreeMap::new(),
            dirty_hosts: BTreeSet::new(),
            dirty_rows: BTreeSet::new(),
            dirty_ports: BTreeSet::new(),
        };
        compiler.put_policy();
        compiler
    }

    /// What happens to unknown destinations.
    fn put_policy(&mut self) {
        let catch_all = match (self.cx.gateway(), self.cx.outbound()) {
            (true, _) | (_, OutboundMode::RegistryOnly) => CatchAll::Block,
            (_, OutboundMode::AllowAny) => CatchAll::PassThrough,
            (_, OutboundMode::AllowAnyDynamicDns) => CatchAll::DynamicDns,
        };
        // The row is a few bytes: it cannot be too large.
        let _ = self.writer.put(&Row::Globals(Globals {
            catch_all,
            gateway: self.cx.gateway(),
            retry: self.cx.default_retry(),
        }));
        let http = catch_all == CatchAll::DynamicDns;
        let sockets = self.cx.imports.iter().flat_map(sidecar::Imports::sockets);
        let plan = ListenerPlan {
            port: 0,
            wildcard: Some(Inspection { tls: false, http }),
            gateway: sockets.map(|(socket, _)| socket.listener()).collect(),
            ..ListenerPlan::default()
        };
        self.plans.insert(0, plan);
    }

    /// Another Sidecar counts: everything is seen anew.
    fn choose_sidecar(&mut self) {
        let imports = self.sidecars.chosen(&self.cx.scope);
        if imports == self.cx.imports {
            return;
        }
        let all: Vec<Arc<str>> = self.hosts.keys().cloned().collect();
        for key in all {
            self.touch(&key);
        }
        self.cx.imports = imports;
        self.policy_changed = true;
        self.virtual_services.dirty = true;
    }

    /// Says that the subscriber's names are resolved by a DNS proxy that answers with auto-allocated addresses. To be
    /// said before the first change.
    pub fn with_dns_capture(mut self, dns_capture: bool) -> Self {
        self.cx.scope.dns_capture = dns_capture;
        self
    }

    /// Takes in changes, in order; they count at the next [`Compiler::commit`].
    pub fn apply(&mut self, changes: &[Change]) {
        for change in changes {
            self.apply_one(change);
        }
    }

    fn group(&self, key: &str) -> Option<Group> {
        // A gateway has what its Gateways say.
        if self.cx.gateway() {
            return None;
        }
        let state = self.hosts.get(key)?;
        let resolved = service::resolve(&state.members, &state.aliases, &self.cx)?;
        let others = Registry { hosts: &self.hosts, aliases: &self.aliases, rules: &self.rules, cx: &self.cx };
        let around = Around {
            members: &state.members,
            workloads: &self.workloads,
            virtual_services: &self.virtual_services,
            others: &others,
            cx: &self.cx,
        };
        Some(Group::new(key, resolved, &around))
    }

    /// Brings pages and plans up to date.
    pub fn commit(&mut self) -> Update {
        let update = self.commit_rows();
        let routes = if self.cx.gateway() { &self.gateways.needs } else { self.virtual_services.needs() };
        let tunnels = self.rules.tunnel();
        // Routes that are made for hosts without a VirtualService are in no table that was counted.
        let mut routes = Needs { tunnels, ..Needs::clone(routes) };
        routes.retries.extend(self.cx.default_retry().and_then(|retry| retry.manner()));
        if *self.needs != routes {
            self.needs = Arc::new(routes);
        }
        update
    }

    fn commit_rows(&mut self) -> Update {
        let mut update = Update::default();
        if std::mem::take(&mut self.policy_changed) {
            self.put_policy();
            update.plans.push(0);
        }
        if self.cx.gateway() {
            self.commit_gateway(&mut update);
            return update;
        }
        let began = self.virtual_services.dirty;
        if began {
            self.review_virtual_services();
        }
        let dirty = std::mem::take(&mut self.dirty_hosts);
        for key in &dirty {
            if self.hosts.get(key).is_some_and(|s| s.members.is_empty() && s.aliases.is_empty()) {
                self.hosts.remove(key);
            }
            self.http_ports.remove(key);
            if let Ok(pattern) = key.parse() {
                self.dirty_rows.insert(RowKey::Host(pattern));
            }
            let Some(group) = self.group(key) else { continue };
            self.note_refusals(key, &group, &mut update.conflicts);
            self.http_ports.insert(key.clone(), group.http_ports());
            for row in group.foreign_rows() {
                self.claimants.entry(row.clone()).or_default().insert(key.clone());
                self.dirty_rows.insert(row);
            }
            for (port, order, claim) in group.port_claims() {
                self.ports.entry(port).or_default().add(order, claim);
                self.dirty_ports.insert(port);
            }
        }
        if self.cx.scope.dns_capture {
            self.commit_names(&dirty, &mut update);
        }
        if !self.virtual_services.is_idle() || began {
            self.assign_virtual_services(&dirty, &mut update.conflicts);
        }
        self.settle_ports();
        for key in std::mem::take(&mut self.dirty_rows) {
            let (row, at) = self.row(&key);
            match &key {
                // A Unix socket is no port's.
                RowKey::Address(_, 0) => {}
                RowKey::Address(address, port) => {
                    self.ports.entry(*port).or_default().set_address(*address, at);
                    self.dirty_ports.insert(*port);
                }
                RowKey::Prefix(port, net) => {
                    let sni = row.as_ref().map(|r| matches!(r, Row::Prefix { sni, .. } if !sni.is_empty()));
                    self.ports.entry(*port).or_default().set_net(*net, sni);
                    self.dirty_ports.insert(*port);
                }
                _ => {}
            }
            self.put(&key, row.as_ref(), &mut update.conflicts);
        }
        for port in std::mem::take(&mut self.dirty_ports) {
            self.commit_port(port, &mut update);
        }
        update.pages = self.writer.commit();
        let clusters = std::mem::take(&mut self.dirty_clusters);
        update.hosts = dirty.union(&clusters).cloned().collect();
        update
    }

    /// Brings up to date what a DNS proxy answers.
    fn commit_names(&mut self, dirty: &BTreeSet<Arc<str>>, update: &mut Update) {
        for key in dirty {
            let state = self.hosts.get(key);
            let resolved = state.and_then(|state| service::resolve(&state.members, &state.aliases, &self.cx));
            let name = state
                .zip(resolved.as_ref())
                .and_then(|(state, resolved)| names::answer(key, resolved, &state.members, &self.workloads, &self.cx));
            if self.names.get(key) == name.as_ref() {
                continue;
            }
            match name {
                Some(name) => drop(self.names.insert(key.clone(), name)),
                None => drop(self.names.remove(key)),
            }
            update.names.push(key.clone());
        }
    }

    /// Other VirtualServices count: what the hosts claim that they are about is withdrawn, to be made anew.
    fn review_virtual_services(&mut self) {
        let keys: Vec<Arc<str>> = self.hosts.keys().cloned().collect();
        let (views, changed) = self.virtual_services.review(&self.cx);
        for key in keys {
            if changed.iter().any(|one| one.is_about(&key)) {
                self.touch(&key);
            }
        }
        self.virtual_services.see(views);
    }

    /// Gives hosts and ports their route tables.
    fn assign_virtual_services(&mut self, dirty: &BTreeSet<Arc<str>>, conflicts: &mut Vec<Conflict>) {
        let others = Registry { hosts: &self.hosts, aliases: &self.aliases, rules: &self.rules, cx: &self.cx };
        let changed = self.virtual_services.assign(&self.cx, &self.http_ports, dirty, &others);
        for key in changed.hosts {
            let Some(group) = self.group(&key) else { continue };
            self.dirty_rows.extend(group.pattern.clone().map(RowKey::Host));
            self.dirty_rows.extend(group.foreign_rows());
        }
        self.dirty_rows.extend(changed.only.iter().filter_map(|host| host.parse().ok()).map(RowKey::Host));
        for key in changed.gone {
            self.writer.remove(&key);
        }
        for row in changed.put {
            self.put(&row.key(), Some(&row), conflicts);
        }
    }

    /// Where a port changes hands between protocols, every row that its claims make is made anew.
    fn settle_ports(&mut self) {
        for port in &self.dirty_ports {
            let Some(state) = self.ports.get_mut(port) else { continue };
            if !state.settle() {
                continue;
            }
            let keys: BTreeSet<Arc<str>> = state.orders().map(|o| group_key(&o.member.host).into()).collect();
            for key in keys {
                let Some(group) = self.group(&key) else { continue };
                self.dirty_rows.extend(group.pattern.clone().map(RowKey::Host));
                self.dirty_rows.extend(group.foreign_rows());
            }
        }
    }

    /// The row of a key, and how an address listens.
    fn row(&self, key: &RowKey) -> (Option<Row>, Option<At>) {
        let others: Vec<Arc<Group>> =
            self.claimants.get(key).into_iter().flatten().filter_map(|h| self.group(h).map(Arc::new)).collect();
        let mode = |port: u16| self.ports.get(&port).map(PortState::mode).unwrap_or_default();
        let row = match key {
            RowKey::Host(pattern) => {
                let own = self.group(&pattern.to_string());
                let only = self.virtual_services.only(&pattern.to_string());
                let sockets = || self.cx.imports.iter().flat_map(sidecar::Imports::sockets);
                let alone = |id: u32| sockets().find(|(socket, _)| socket.id() == id)?.1;
                rows::host(pattern, own.as_ref(), &others, only, mode, alone)
            }
            RowKey::Address(address, port) => return rows::address(*address, *port, &others).unzip(),
            RowKey::Prefix(port, net) => rows::prefix(*port, *net, &others, mode(*port)),
            RowKey::Port(_) | RowKey::Globals | RowKey::Table(_) | RowKey::Routes(..) => None,
        };
        (row, None)
    }

    fn commit_port(&mut self, port: u16, update: &mut Update) {
        let Some(state) = self.ports.get(&port) else { return };
        let origins = |o: &service::Order| o.member.source.origin();
        let tcp = state.everything().next().map(|first| {
            let group = self.group(&group_key(&first.member.host));
            let cluster = group.as_ref().map_or_else(ClusterName::default, |g| g.cluster(port));
            let chosen = rows::decide(cluster, origins(first), state.everything().skip(1).map(origins));
            match group.as_ref().and_then(|g| g.everything(port, first)) {
                Some(routed) => Choice { losers: chosen.losers, ..routed.clone() },
                None => group.as_ref().map_or(chosen.clone(), |group| group.tunnelled(chosen)),
            }
        });
        let kept_out: Vec<Origin> = state.kept_out().take(16).map(origins).collect();
        if !kept_out.is_empty() {
            let winner = state.orders().next().map(origins);
            let subject = format!("port {port}");
            update.conflicts.push(Conflict { subject, rule: ConflictRule::Protocol, winner, losers: kept_out });
        }
        let prefixes = state.nets().copied().collect();
        let row = state.wildcard().then(|| Row::Port { port, http: state.http(), tcp, prefixes });
        let plan = state.plan(port);
        if state.is_empty() {
            self.ports.remove(&port);
        }
        self.put(&RowKey::Port(port), row.as_ref(), &mut update.conflicts);
        if self.plans.get(&port) != plan.as_ref() {
            update.plans.push(port);
            match plan {
                Some(plan) => drop(self.plans.insert(port, plan)),
                None => drop(self.plans.remove(&port)),
            }
        }
    }

    fn put(&mut self, key: &RowKey, row: Option<&Row>, conflicts: &mut Vec<Conflict>) {
        let Some(row) = row else { return self.writer.remove(key) };
        note_losers(row, conflicts);
        if let Err(error) = self.writer.put(row) {
            tracing::warn!(?key, %error, "row left out");
            self.writer.remove(key);
            let subject = format!("{key:?}: {error}");
            conflicts.push(Conflict { subject, rule: ConflictRule::Refused, winner: None, losers: Vec::new() });
        }
    }

    /// All pages, by id.
    pub fn pages(&self) -> impl Iterator<Item = (PageId, &Arc<[u8]>)> {
        self.writer.pages()
    }

    /// One page.
    pub fn page(&self, id: PageId) -> Option<&Arc<[u8]>> {
        self.writer.page(id)
    }

    /// Digest of the whole snapshot.
    pub fn digest(&self) -> u64 {
        self.writer.digest()
    }

    /// Listener plans, by port; 0 is the catch-all.
    pub fn plans(&self) -> &BTreeMap<u16, ListenerPlan> {
        &self.plans
    }

    /// What the routes need of their host's configuration.
    pub fn needs(&self) -> &Arc<Needs> {
        &self.needs
    }

    /// What a DNS proxy answers, by host.
    pub fn names(&self) -> &BTreeMap<Arc<str>, DnsName> {
        &self.names
    }

    /// The mesh's `proxyHttpPort`.
    pub fn proxy_http_port(&self) -> Option<u16> {
        self.cx.mesh.proxy_http_port
    }

    /// Builds the cluster of this name; `None`: there is none (SEMANTICS 2.7).
    pub fn cluster(&self, name: &str) -> Option<Cluster> {
        // What would go past the registry goes to the Sidecar's egressProxy, where it has one.
        let instead = self.cx.imports.as_ref().and_then(|imports| imports.egress_proxy.as_deref());
        let named = match cluster::special(name, &self.cx) {
            Some(cluster) if instead.is_none() => return Some(cluster),
            Some(_) => cluster::parse(instead?)?,
            None => cluster::parse(name)?,
        };
        let state = self.hosts.get(&*group_key(named.host))?;
        let resolved = service::resolve(&state.members, &state.aliases, &self.cx)?;
        let rule = |namespace: &str, host: &str| self.rules.of(namespace, host, &self.cx);
        cluster::build(name, &named, &resolved, &state.members, &self.workloads, &self.cx, rule)
    }
}
