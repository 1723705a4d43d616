//! One engine owns the objects and, for each scope that somebody asked for, a compiler; what it compiles is published as
//! an immutable value that all subscribers of the scope share.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use portolan_proto::envoy::envoy::config::cluster::v3::Cluster;
use portolan_proto::v1::{DnsName, ListenerPlan};
use portolan_registry::write::{PageId, page_digest};
use prost::Message;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

use crate::allocate::Allocator;
use crate::cluster;
use crate::compile::needs::Needs;
use crate::compile::{Compiler, Conflict, Update};
use crate::discovery::Discovery;
use crate::distinctions::Distinctions;
use crate::model::Kind;
use crate::model::{Change, MeshConfig, Object, ObjectKey, Scope};

/// How long a scope stays compiled after its last subscriber left.
const IDLE: Duration = Duration::from_secs(300);

/// From so many changes on it is cheaper to look at everything again.
const MANY: usize = 1000;

/// A page as it is published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Its place.
    pub id: PageId,
    /// Its bytes.
    pub data: Arc<[u8]>,
    /// Their digest.
    pub digest: u64,
}

/// What is in force for one scope.
#[derive(Debug, Clone, Default)]
pub struct Published {
    /// Rises with every change, across all scopes.
    pub version: u64,
    /// Pages by ascending id.
    pub pages: Vec<Page>,
    /// Digest of the whole snapshot.
    pub digest: u64,
    /// Listener plans by port.
    pub plans: BTreeMap<u16, Arc<ListenerPlan>>,
    /// The mesh's `proxyHttpPort`.
    pub proxy_http_port: Option<u16>,
    /// What routes need of an Envoy's configuration.
    pub needs: Arc<Needs>,
    /// What a DNS proxy answers, by host.
    pub names: Arc<Names>,
}

/// Answers of a DNS proxy, by host.
pub type Names = BTreeMap<String, Answer>;

/// What a DNS proxy answers for a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Another one wherever the bytes differ.
    pub version: String,
    /// A `portolan.v1.DnsName`.
    pub bytes: Vec<u8>,
}

impl Answer {
    fn new(name: &DnsName) -> Self {
        let bytes = name.encode_to_vec();
        let mut hasher = DefaultHasher::new();
        hasher.write(&bytes);
        Answer { version: format!("{:016x}", hasher.finish()), bytes }
    }
}

impl Published {
    /// Digest of the page of this id.
    pub fn page_digest(&self, id: PageId) -> Option<u64> {
        let at = self.pages.binary_search_by_key(&id, |p| p.id).ok()?;
        self.pages.get(at).map(|p| p.digest)
    }
}

/// The engine has ended: its thread was shut down or has died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the compiler has ended")]
pub struct Ended;

/// Clusters by name; `None`: there is no such cluster.
pub type Clusters = Vec<(String, Option<Cluster>)>;

enum Command {
    Apply(Vec<Change>, oneshot::Sender<Vec<Conflict>>),
    Mesh(Box<MeshConfig>, Vec<Change>, oneshot::Sender<Vec<Conflict>>),
    Subscribe(Box<Scope>, oneshot::Sender<watch::Receiver<Arc<Published>>>),
    Clusters { scope: Box<Scope>, names: Vec<String>, since: Option<u64>, answer: oneshot::Sender<Clusters> },
    Overview(oneshot::Sender<Overview>),
    Addresses(oneshot::Sender<Addresses>),
}

/// Addresses and hosts that the status of each ServiceEntry should have.
pub type Addresses = HashMap<ObjectKey, Vec<(String, String)>>;

/// What the engine holds, for people.
#[derive(Debug, Clone, Default)]
pub struct Overview {
    /// Objects by kind.
    pub objects: BTreeMap<Kind, usize>,
    /// The scopes that are compiled, and what is in force for each.
    pub scopes: Vec<(Scope, Arc<Published>)>,
    /// Addresses that were allocated, by namespace and host.
    pub addresses: Vec<(String, [IpAddr; 2])>,
}

/// Handle to the engine; clones share it, and it ends with the last of them.
#[derive(Debug, Clone)]
pub struct Publisher {
    commands: mpsc::UnboundedSender<Command>,
}

impl Publisher {
    /// Starts the engine on a thread of its own, so that compiling keeps no runtime waiting.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(mesh: MeshConfig) -> std::io::Result<Self> {
        let (commands, mut inbox) = mpsc::unbounded_channel();
        std::thread::Builder::new().name("compiler".into()).spawn(move || {
            let mut discovery = Discovery::default();
            discovery.select(&mesh.discovery_selectors);
            let mut engine = Engine {
                mesh,
                discovery,
                objects: HashMap::new(),
                allocator: Allocator::default(),
                capturing: false,
                distinctions: Distinctions::default(),
                scopes: HashMap::new(),
                seats: HashMap::new(),
                version: 0,
            };
            while let Some(command) = inbox.blocking_recv() {
                engine.run(command);
            }
        })?;
        Ok(Publisher { commands })
    }

    /// Takes in one batch of changes; returns when every scope has it published, with the conflicts at the keys that it
    /// touched, of all scopes.
    ///
    /// # Errors
    /// When the engine has ended.
    pub async fn apply(&self, changes: Vec<Change>) -> Result<Vec<Conflict>, Ended> {
        self.ask(|answer| Command::Apply(changes, answer)).await
    }

    /// Puts new mesh settings in force; every scope is compiled anew.
    ///
    /// # Errors
    /// When the engine has ended.
    pub async fn set_mesh(&self, mesh: MeshConfig) -> Result<(), Ended> {
        self.replace(mesh, Vec::new()).await.map(drop)
    }

    /// As [`Publisher::set_mesh`] and [`Publisher::apply`] at once: nobody is told of one without the other.
    ///
    /// # Errors
    /// When the engine has ended.
    pub async fn replace(&self, mesh: MeshConfig, changes: Vec<Change>) -> Result<Vec<Conflict>, Ended> {
        self.ask(|answer| Command::Mesh(Box::new(mesh), changes, answer)).await
    }

    /// Subscribes to a scope, which is compiled if it is not yet.
    ///
    /// # Errors
    /// When the engine has ended.
    pub async fn subscribe(&self, scope: Scope) -> Result<watch::Receiver<Arc<Published>>, Ended> {
        self.ask(|answer| Command::Subscribe(Box::new(scope), answer)).await
    }

    /// Builds clusters for a scope. With `since`, only those that may have changed after that version.
    ///
    /// # Errors
    /// When the engine has ended.
    pub async fn clusters(&self, scope: Scope, names: Vec<String>, since: Option<u64>) -> Result<Clusters, Ended> {
        self.ask(|answer| Command::Clusters { scope: Box::new(scope), names, since, answer }).await
    }

    /// Says what is held and in force.
    ///
    /// # Errors
    /// When the engine has ended.
    pub async fn overview(&self) -> Result<Overview, Ended> {
        self.ask(Command::Overview).await
    }

    /// Says which addresses the status of every ServiceEntry should have; from then on, addresses are allocated.
    ///
    /// # Errors
    /// When the engine has ended.
    pub async fn addresses(&self) -> Result<Addresses, Ended> {
        self.ask(Command::Addresses).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Ended> {
        let (answer, reply) = oneshot::channel();
        self.commands.send(command(answer)).map_err(|_| Ended)?;
        reply.await.map_err(|_| Ended)
    }
}

fn status_addresses(object: &Object) -> Option<(ObjectKey, Vec<(String, String)>)> {
    let Object::ServiceEntry(entry) = object else { return None };
    Some((object.key(), entry.status_addresses.clone()))
}

struct Engine {
    mesh: MeshConfig,
    /// What lies in namespaces that are not considered. The objects are those that are.
    discovery: Discovery,
    objects: HashMap<ObjectKey, Object>,
    allocator: Allocator,
    /// Somebody counts allocated addresses; before that, nobody has any.
    capturing: bool,
    distinctions: Distinctions,
    /// What is compiled, by what of a scope counts.
    scopes: HashMap<Scope, ScopeState>,
    /// Who subscribes, by what subscribers say of themselves.
    seats: HashMap<Scope, Seat>,
    version: u64,
}

/// Subscribers that say the same of themselves.
struct Seat {
    /// What of their scope counts.
    of: Scope,
    published: watch::Sender<Arc<Published>>,
    idle: Option<Instant>,
}

struct ScopeState {
    compiler: Compiler,
    published: Arc<Published>,
    /// Version at which a host name last changed; `since` where it is not in here.
    changed: HashMap<Arc<str>, u64>,
    /// Version of the first compilation, or of the last time that subscribers came from another scope.
    since: u64,
}

impl Engine {
    fn run(&mut self, command: Command) {
        // A caller that has gone needs no answer.
        match command {
            Command::Apply(changes, answer) => drop(answer.send(self.apply(&changes))),
            Command::Mesh(mesh, changes, answer) => drop(answer.send(self.set_mesh(*mesh, &changes))),
            Command::Subscribe(scope, answer) => drop(answer.send(self.seat(&scope).published.subscribe())),
            Command::Clusters { scope, names, since, answer } => {
                let of = self.seat(&scope).of.clone();
                let state = self.scope(&of);
                let clusters = names.into_iter().filter(|n| state.may_differ(n, since));
                let _ = answer.send(clusters.map(|n| (n.clone(), state.compiler.cluster(&n))).collect());
            }
            Command::Overview(answer) => drop(answer.send(self.overview())),
            Command::Addresses(answer) => {
                self.capture();
                let _ = answer.send(self.objects.values().filter_map(status_addresses).collect());
            }
        }
    }

    /// Takes changes in, and says what they come to.
    fn hold<'c>(&mut self, changes: &'c [Change]) -> Cow<'c, [Change]> {
        let mut changes = self.discovery.sift(changes, &self.objects);
        if self.capturing {
            changes = Cow::Owned(self.allocator.assign(&changes, &self.objects));
        }
        for change in changes.iter() {
            match change {
                Change::Apply(object) => drop(self.objects.insert(object.key(), object.clone())),
                Change::Delete(key) => drop(self.objects.remove(key)),
            }
        }
        changes
    }

    fn apply(&mut self, changes: &[Change]) -> Vec<Conflict> {
        let changes = &*self.hold(changes);
        self.version += 1;
        let version = self.version;
        self.forget();
        let mut conflicts = Vec::new();
        for state in self.scopes.values_mut() {
            let start = Instant::now();
            state.compiler.apply(changes);
            let update = state.compiler.commit();
            state.publish(version, &update);
            tracing::debug!(version, changes = changes.len(), elapsed = ?start.elapsed(), "compiled");
            conflicts.extend(update.conflicts);
        }
        if changes.iter().any(Distinctions::concerned_by) {
            self.tell_apart();
        }
        self.publish();
        conflicts
    }

    /// Drops what nobody has subscribed to for a while.
    fn forget(&mut self) {
        self.seats.retain(|_, seat| !seat.forsaken());
        let seats = &self.seats;
        self.scopes.retain(|scope, _| {
            let kept = seats.values().any(|seat| seat.of == *scope);
            if !kept {
                tracing::info!(?scope, "scope forgotten: nobody has subscribed for a while");
            }
            kept
        });
    }

    /// Objects may ask about subscribers what none asked before, or not any more.
    fn tell_apart(&mut self) {
        let now = Distinctions::of(self.objects.values());
        if now == self.distinctions {
            return;
        }
        self.distinctions = now;
        let version = self.version;
        let mut moved = Vec::new();
        for (scope, seat) in &mut self.seats {
            let of = self.distinctions.relevant(scope);
            if seat.of != of {
                seat.of = of.clone();
                moved.push(of);
            }
        }
        for scope in moved {
            let state = self.scope(&scope);
            // What those who come have seen is not known here.
            state.changed.clear();
            state.since = version;
        }
        let seats = &self.seats;
        self.scopes.retain(|scope, _| seats.values().any(|seat| seat.of == *scope));
    }

    /// Tells subscribers what is in force, where that is new.
    fn publish(&self) {
        for seat in self.seats.values() {
            let Some(state) = self.scopes.get(&seat.of) else { continue };
            seat.published.send_if_modified(|held| {
                let new = !Arc::ptr_eq(held, &state.published);
                held.clone_from(&state.published);
                new
            });
        }
    }

    fn overview(&self) -> Overview {
        let mut objects = BTreeMap::new();
        for key in self.objects.keys() {
            *objects.entry(key.kind).or_default() += 1;
        }
        let in_force = |(scope, state): (&Scope, &ScopeState)| (scope.clone(), state.published.clone());
        let mut scopes: Vec<_> = self.scopes.iter().map(in_force).collect();
        scopes.sort_by(|(a, _), (b, _)| (&a.namespace, &a.ips).cmp(&(&b.namespace, &b.ips)));
        let addresses = self.allocator.all().map(|(namespace, host, both)| (format!("{namespace}/{host}"), *both));
        Overview { objects, scopes, addresses: addresses.collect() }
    }

    fn set_mesh(&mut self, mesh: MeshConfig, changes: &[Change]) -> Vec<Conflict> {
        if self.mesh == mesh {
            return if changes.is_empty() { Vec::new() } else { self.apply(changes) };
        }
        self.discovery.select(&mesh.discovery_selectors);
        self.mesh = mesh;
        let changes = self.hold(changes);
        self.version += 1;
        let mut conflicts = Vec::new();
        for (scope, state) in &mut self.scopes {
            let (compiler, update) =
                crate::compile::compile(self.objects.values().cloned(), scope.clone(), self.mesh.clone());
            state.compiler = compiler;
            state.changed.clear();
            state.since = self.version;
            state.published = Arc::new(whole(self.version, &state.compiler));
            if !changes.is_empty() {
                conflicts.extend(update.conflicts);
            }
        }
        if changes.iter().any(Distinctions::concerned_by) {
            self.tell_apart();
        }
        self.publish();
        conflicts
    }

    fn seat(&mut self, scope: &Scope) -> &Seat {
        if !self.seats.contains_key(scope) {
            let of = self.distinctions.relevant(scope);
            let published = watch::Sender::new(self.scope(&of).published.clone());
            self.seats.insert(scope.clone(), Seat { of, published, idle: None });
        }
        &self.seats[scope]
    }

    /// Allocates addresses from now on.
    fn capture(&mut self) {
        if std::mem::replace(&mut self.capturing, true) {
            return;
        }
        let all: Vec<Change> = self.objects.values().cloned().map(Change::Apply).collect();
        for change in self.allocator.assign(&all, &HashMap::new()) {
            if let Change::Apply(object) = change {
                self.objects.insert(object.key(), object);
            }
        }
    }

    fn scope(&mut self, scope: &Scope) -> &mut ScopeState {
        if scope.dns_capture {
            self.capture();
        }
        if !self.scopes.contains_key(scope) {
            self.version += 1;
        }
        let version = self.version;
        self.scopes.entry(scope.clone()).or_insert_with(|| {
            let start = Instant::now();
            let (compiler, update) =
                crate::compile::compile(self.objects.values().cloned(), scope.clone(), self.mesh.clone());
            let (objects, conflicts) = (self.objects.len(), update.conflicts.len());
            tracing::info!(?scope, objects, conflicts, elapsed = ?start.elapsed(), "scope compiled");
            let published = Arc::new(whole(version, &compiler));
            ScopeState { compiler, published, changed: HashMap::new(), since: version }
        })
    }
}

impl Seat {
    fn forsaken(&mut self) -> bool {
        if self.published.receiver_count() > 0 {
            self.idle = None;
            return false;
        }
        self.idle.get_or_insert_with(Instant::now).elapsed() > IDLE
    }
}

impl ScopeState {
    fn may_differ(&self, name: &str, since: Option<u64>) -> bool {
        let Some(since) = since else { return true };
        // Those of no host follow what the Sidecar says.
        let Some(host) = cluster::host_of(name) else { return true };
        let changed = self.changed.get(host.as_str()).copied();
        changed.unwrap_or(self.since) > since
    }

    fn publish(&mut self, version: u64, update: &Update) {
        if update.hosts.len() > MANY {
            self.changed.clear();
            self.since = version;
        } else {
            self.changed.extend(update.hosts.iter().map(|host| (host.clone(), version)));
        }
        if update.pages.changed.len() > MANY {
            self.published = Arc::new(whole(version, &self.compiler));
            return;
        }
        let held = self.published.clone();
        let mut pages = held.pages.clone();
        pages.retain(|p| update.pages.removed.binary_search(&p.id).is_err());
        for id in &update.pages.changed {
            let Some(data) = self.compiler.page(*id) else { continue };
            let page = Page { id: *id, digest: page_digest(data), data: data.clone() };
            match pages.binary_search_by_key(id, |p| p.id) {
                Ok(at) => pages[at] = page,
                Err(at) => pages.insert(at, page),
            }
        }
        let mut plans = held.plans.clone();
        for port in &update.plans {
            match self.compiler.plans().get(port) {
                Some(plan) => drop(plans.insert(*port, Arc::new(plan.clone()))),
                None => drop(plans.remove(port)),
            }
        }
        let mut names = held.names.clone();
        for host in &update.names {
            let names = Arc::make_mut(&mut names);
            match self.compiler.names().get(host) {
                Some(name) => drop(names.insert(host.to_string(), Answer::new(name))),
                None => drop(names.remove(host.as_ref())),
            }
        }
        let (digest, needs) = (self.compiler.digest(), self.compiler.needs().clone());
        self.published = Arc::new(Published { version, pages, digest, plans, needs, names, ..*held });
    }
}

fn whole(version: u64, compiler: &Compiler) -> Published {
    let page = |(id, data): (PageId, &Arc<[u8]>)| Page { id, data: data.clone(), digest: page_digest(data) };
    Published {
        version,
        pages: compiler.pages().map(page).collect(),
        digest: compiler.digest(),
        plans: compiler.plans().iter().map(|(port, plan)| (*port, Arc::new(plan.clone()))).collect(),
        proxy_http_port: compiler.proxy_http_port(),
        needs: compiler.needs().clone(),
        names: Arc::new(compiler.names().iter().map(|(host, name)| (host.to_string(), Answer::new(name))).collect()),
    }
}
