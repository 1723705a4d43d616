//! Objects to rows, for one scope: a pure function of the set of objects, computed change by change.
//!
//! Two stages. Objects are grouped by host name, and each name is resolved on its own ([`service`]) into the filter chains
//! and domains that it claims ([`chains`]). Claims meet at lookup keys, where the order of precedence decides
//! ([`rows`], [`ports`]). A change withdraws what its host names claimed, and makes anew what they claim now and the rows
//! of the keys that either touched; nothing else is looked at.

mod chains;
mod delegates;
mod gateway_commit;
mod gateway_servers;
mod gateway_tls;
pub mod gateways;
mod http_routes;
mod l4_routes;
mod names;
pub mod needs;
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
use portolan_registry::route::HashKey;
use portolan_registry::row::{CatchAll, Choice, Globals, Origin, Row, RowKey};
use portolan_registry::write::{self, PageId, Writer};

use self::chains::{Around, Group};
use self::gateways::Gateways;
use self::http_routes::Others;
use self::needs::Needs;
use self::ports::PortState;
use self::rules::Rules;
use self::service::{Context, Member, Source, group_key, kube_host};
use self::sidecar::Sidecars;
use self::virtual_services::VirtualServices;
use crate::api::destination_rule::DestinationRule;
use crate::cluster::{self, endpoints::Workloads};
use crate::model::{Change, Checked, MeshConfig, Object, ObjectKey, OutboundMode, Scope, Service};
use crate::validate::predicates;

/// Claims that met, and who lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// What was claimed: a host and port, an address, a prefix or a port.
    pub subject: String,
    /// The rule that decided.
    pub rule: ConflictRule,
    /// Who has it now; `None`: nobody.
    pub winner: Option<Origin>,
    /// Who lost it, in the order of precedence; not all, if they are many.
    pub losers: Vec<Origin>,
}

/// Why a claim was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConflictRule {
    /// One host and port, claimed more than once: own namespace, then Kubernetes, then the oldest.
    Host,
    /// One server name and port: the oldest.
    ServerName,
    /// One address and port: the oldest.
    Address,
    /// One destination prefix and port: the oldest.
    Prefix,
    /// Everything on a port: the oldest.
    Port,
    /// MONGO and MYSQL share a port with nobody.
    Protocol,
    /// A partial wildcard cannot be matched on a TLS port.
    PartialWildcard,
    /// The name cannot be looked up, or what it means is too large for a page.
    Refused,
}

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
    http_ports: HashMap<Arc<str>, Vec<u16>>,
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
        let _ = self.writer.put(&Row::Globals(Globals { catch_all, gateway: self.cx.gateway() }));
        let http = catch_all == CatchAll::DynamicDns;
        let plan = ListenerPlan { port: 0, wildcard: Some(Inspection { tls: false, http }), ..ListenerPlan::default() };
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

    fn apply_one(&mut self, change: &Change) {
        match change {
            Change::Delete(key) => {
                if let Some(old) = self.objects.remove(key) {
                    self.leave(&old);
                }
            }
            Change::Apply(object) => {
                match self.objects.insert(object.key(), object.clone()) {
                    Some(old) if old == *object => return,
                    Some(old) => self.leave(&old),
                    None => {}
                }
                self.join(object);
            }
        }
    }

    /// What an object is to host names: members of a group each, or an alias of one.
    fn members(&self, object: &Object) -> Vec<(Arc<str>, Member, bool)> {
        let keyed = |host: &str, source: Source| {
            let key: Arc<str> = group_key(host).into();
            let host = if *key == *host { key.clone() } else { host.into() };
            (key, Member { source, host })
        };
        match object {
            Object::ServiceEntry(entry) => {
                let mut out: Vec<(Arc<str>, Member, bool)> = Vec::with_capacity(entry.hosts.len());
                for host in &entry.hosts {
                    let (key, member) = keyed(host, Source::Entry(entry.clone()));
                    if !out.iter().any(|(k, ..)| *k == key) {
                        out.push((key, member, false));
                    }
                }
                out
            }
            Object::Service(service) => {
                let host = kube_host(service, &self.cx);
                let (key, member) = keyed(&host, Source::Kube(service.clone()));
                match &service.external_name {
                    Some(target) => vec![(group_key(target).into(), member, true)],
                    None => vec![(key, member, false)],
                }
            }
            _ => Vec::new(),
        }
    }

    fn join(&mut self, object: &Object) {
        if let Object::Sidecar(sidecar) = object {
            self.sidecars.insert(sidecar, &self.cx.scope, &self.cx.mesh.root_namespace);
            return self.choose_sidecar();
        }
        if let Object::DestinationRule(rule) = object {
            self.touch_clusters(rule);
            self.rules.insert(rule);
            return self.touch_clusters(rule);
        }
        if let Object::VirtualService(object) = object {
            return self.virtual_services.insert(object);
        }
        if let Object::Gateway(gateway) = object {
            return self.gateways.insert(gateway, &self.cx.scope);
        }
        for (key, member, alias) in self.members(object) {
            self.touch(&key);
            if let (true, Source::Kube(service)) = (alias, &member.source) {
                self.aliases.insert(group_key(&member.host).into(), Arc::clone(service));
                // Routes name the alias.
                self.touch(&group_key(&member.host).into());
            }
            if member.source.is_kube() || selects(&member.source) {
                let namespace = member.source.meta().namespace.clone();
                self.selecting.entry(namespace).or_default().insert(key.clone());
            }
            let state = self.hosts.entry(key).or_default();
            if alias { &mut state.aliases } else { &mut state.members }.push(member);
        }
        self.touch_selecting(object);
        self.workloads.insert(object);
    }

    fn leave(&mut self, object: &Object) {
        if let Object::Sidecar(sidecar) = object {
            self.sidecars.remove(sidecar, &self.cx.scope, &self.cx.mesh.root_namespace);
            return self.choose_sidecar();
        }
        if let Object::DestinationRule(rule) = object {
            self.touch_clusters(rule);
            self.rules.remove(rule);
            return self.touch_clusters(rule);
        }
        if let Object::VirtualService(object) = object {
            return self.virtual_services.remove(object);
        }
        if let Object::Gateway(gateway) = object {
            return self.gateways.remove(gateway);
        }
        let gone = object.key();
        for (key, member, alias) in self.members(object) {
            self.touch(&key);
            if alias {
                let own: Arc<str> = group_key(&member.host).into();
                self.aliases.remove(&own);
                self.touch(&own);
            }
            let namespace = &member.source.meta().namespace;
            let Some(state) = self.hosts.get_mut(&key) else { continue };
            let stays = |m: &Member| {
                let meta = m.source.meta();
                m.source.is_kube() != member.source.is_kube()
                    || meta.name != gone.name
                    || meta.namespace != gone.namespace
            };
            state.members.retain(stays);
            state.aliases.retain(stays);
            let still =
                |m: &Member| m.source.meta().namespace == *namespace && (m.source.is_kube() || selects(&m.source));
            if !state.members.iter().any(still)
                && let Some(hosts) = self.selecting.get_mut(namespace)
            {
                hosts.remove(&key);
            }
        }
        self.touch_selecting(object);
        self.workloads.remove(object);
    }

    /// Notes the hosts that a rule may be about.
    fn touch_clusters(&mut self, rule: &Checked<DestinationRule>) {
        let of = rules::expand(&rule.spec.host, &rule.meta.namespace, &self.cx.mesh.cluster_domain);
        let of = group_key(&of).into_owned();
        let about = |host: &&Arc<str>| predicates::is_host_subset(host, &of);
        let hosts: Vec<Arc<str>> = self.hosts.keys().filter(about).cloned().collect();
        if self.rules.hash() {
            self.gateways.dirty = true;
            hosts.iter().for_each(|host| self.touch(host));
        }
        self.dirty_clusters.extend(hosts);
    }

    /// Withdraws what the hosts claim that take a workload for an endpoint, before it comes or goes.
    fn touch_selecting(&mut self, object: &Object) {
        let Some(workload) = Workloads::labels(object) else { return };
        let Some(hosts) = self.selecting.get(&object.meta().namespace) else { return };
        let takes = |key: &&Arc<str>| {
            self.hosts.get(*key).is_some_and(|s| s.members.iter().any(|m| workload.selected_by(&m.source)))
        };
        let touched: Vec<Arc<str>> = hosts.iter().filter(takes).cloned().collect();
        for key in touched {
            self.touch(&key);
        }
    }

    /// Withdraws what a host name claims now; what it claims then is made at the commit.
    fn touch(&mut self, key: &Arc<str>) {
        if !self.dirty_hosts.insert(key.clone()) {
            return;
        }
        let aliases = self.hosts.get(key).into_iter().flat_map(|state| &state.aliases);
        self.dirty_hosts.extend(aliases.map(|alias| group_key(&alias.host).into()));
        let Some(group) = self.group(key) else { return };
        for row in group.foreign_rows() {
            if let Some(hosts) = self.claimants.get_mut(&row) {
                hosts.remove(key);
                if hosts.is_empty() {
                    self.claimants.remove(&row);
                }
            }
            self.dirty_rows.insert(row);
        }
        for (port, order, _) in group.port_claims() {
            self.ports.entry(port).or_default().remove(&order);
            self.dirty_ports.insert(port);
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
            let row = self.row(&key);
            match &key {
                RowKey::Address(address, port) => {
                    let told_apart = row.as_ref().map(|r| match r {
                        Row::Address { http, sni, .. } => Inspection { http: http.is_some(), tls: !sni.is_empty() },
                        _ => Inspection::default(),
                    });
                    self.ports.entry(*port).or_default().set_address(*address, told_apart);
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

    fn row(&self, key: &RowKey) -> Option<Row> {
        let others: Vec<Arc<Group>> =
            self.claimants.get(key).into_iter().flatten().filter_map(|h| self.group(h).map(Arc::new)).collect();
        let mode = |port: u16| self.ports.get(&port).map(PortState::mode).unwrap_or_default();
        match key {
            RowKey::Host(pattern) => {
                let own = self.group(&pattern.to_string());
                let only = self.virtual_services.only(&pattern.to_string());
                rows::host(pattern, own.as_ref(), &others, only, mode)
            }
            RowKey::Address(address, port) => rows::address(*address, *port, &others),
            RowKey::Prefix(port, net) => rows::prefix(*port, *net, &others, mode(*port)),
            RowKey::Port(_) | RowKey::Globals | RowKey::Table(_) | RowKey::Routes(..) => None,
        }
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
                None => chosen,
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

    fn note_refusals(&self, key: &str, group: &Group, conflicts: &mut Vec<Conflict>) {
        let mut note = |subject: &str, rule, losers| {
            conflicts.push(Conflict { subject: subject.to_owned(), rule, winner: None, losers });
        };
        if group.pattern.is_none() {
            let losers = group.resolved.services.iter().map(|s| s.member.source.origin()).collect();
            note(key, ConflictRule::Refused, losers);
        }
        for (origin, pattern) in &group.dropped {
            note(pattern, ConflictRule::PartialWildcard, vec![origin.clone()]);
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
        if self.cx.gateway() { &self.gateways.needs } else { self.virtual_services.needs() }
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

/// All that routes may ask about the hosts that they lead to.
struct Registry<'c> {
    hosts: &'c HashMap<Arc<str>, HostState>,
    aliases: &'c HashMap<Arc<str>, Arc<Service>>,
    rules: &'c Rules,
    cx: &'c Context,
}

impl Registry<'_> {
    fn resolve(&self, host: &str) -> Option<service::Resolved> {
        let state = self.hosts.get(&*group_key(host))?;
        service::resolve(&state.members, &state.aliases, self.cx)
    }
}

impl Others for Registry<'_> {
    fn only_port(&self, host: &str) -> Option<u16> {
        match self.resolve(host)?.ports.as_slice() {
            [only] => Some(only.number),
            _ => None,
        }
    }

    fn alias(&self, host: &str) -> Option<(String, Option<u16>)> {
        let service = self.aliases.get(&*group_key(host))?;
        let port = match service.ports.as_slice() {
            [only] => Some(only.number),
            _ => None,
        };
        Some((service.external_name.clone()?, port))
    }

    fn hash(&self, host: &str, port: u16, subset: &str, by_port: bool) -> Option<HashKey> {
        if !self.rules.hash() {
            return None;
        }
        let resolved = self.resolve(host)?;
        let owner = resolved.ports.iter().find(|owner| owner.number == port);
        let base = &resolved.services.get(owner.map_or(0, |owner| owner.base))?.member;
        self.rules.of(&base.source.meta().namespace, &base.host, self.cx)?.hash(port, subset, by_port)
    }
}

/// Does the source take workloads for endpoints?
fn selects(source: &Source) -> bool {
    match source {
        Source::Entry(entry) => entry.workload_selector.is_some(),
        Source::Kube(_) => true,
    }
}

fn note_losers(row: &Row, conflicts: &mut Vec<Conflict>) {
    let mut note = |subject: String, rule, choice: Option<&Choice>| {
        if let Some(choice) = choice.filter(|c| !c.losers.is_empty()) {
            let (winner, losers) = (Some(choice.winner.clone()), choice.losers.clone());
            conflicts.push(Conflict { subject, rule, winner, losers });
        }
    };
    match row {
        Row::Host { pattern, ports } => {
            for p in ports {
                let host = p.http.as_ref().or(p.proxy.as_ref());
                note(format!("{pattern}:{}", p.port), ConflictRule::Host, host);
                let same = matches!((host, &p.sni), (Some(h), Some(s)) if h.winner == s.winner && h.losers == s.losers);
                let sni = p.sni.as_ref().filter(|_| !same);
                note(format!("{pattern}:{}", p.port), ConflictRule::ServerName, sni);
            }
        }
        Row::Address { address, port, tcp, .. } => {
            note(std::net::SocketAddr::new(*address, *port).to_string(), ConflictRule::Address, tcp.as_ref());
        }
        Row::Prefix { port, net, tcp, sni } => {
            note(format!("{net} port {port}"), ConflictRule::Prefix, tcp.as_ref());
            for (name, choice) in sni {
                note(format!("{net} port {port} server name {name}"), ConflictRule::Prefix, Some(choice));
            }
        }
        Row::Port { port, tcp, .. } => note(format!("port {port}"), ConflictRule::Port, tcp.as_ref()),
        Row::Globals(_) | Row::Table { .. } | Row::Routes { .. } => {}
    }
}
