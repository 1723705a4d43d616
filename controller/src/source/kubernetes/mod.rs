//! Resources from a Kubernetes API server: listed once, then watched.
//!
//! Each kind is followed by a task of its own; what they say comes together in one [`store`], and leaves it as batches of
//! differences. Nothing is published before every kind was listed, so that a restarted controller never tells a proxy
//! that something is gone which was only not listed yet; a kind that cannot be had is gone without, loudly.
//!
//! Pods are many, and endpoints of Services have them already: they are watched only while a ServiceEntry has a
//! `workloadSelector`, the one thing that chooses Pods itself. Namespaces are watched only while the mesh has
//! `discoverySelectors`, which ask for their labels; then nothing is told before they were listed.

mod follow;
pub mod kinds;
pub mod mesh;
pub mod status;
pub mod store;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, timeout_at};

use self::kinds::{NAMESPACES, PODS, WATCHED};
use self::status::Status;
use self::store::{Before, Event, Shared};
use crate::model::{Change, Kind, LabelSelector};
use crate::source::yaml::Review;
use crate::validate::finding::Finding;

/// Events that wait to be taken in before the watches wait too.
const QUEUE: usize = 1024;
/// Events that one batch takes in at most.
const BATCH: usize = 10_000;
/// How long the API server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long the first entry that selects Pods waits for their list, so that it does not come into force without endpoints.
const SELECTED: Duration = Duration::from_secs(5);

/// Why there is no way to a cluster. All of them are the fault of the configuration.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The kubeconfig cannot be used.
    #[error("{}: {source}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: kube::config::KubeconfigError,
    },
    /// There is neither a kubeconfig nor a service account.
    #[error("no cluster: {0}; give --kubeconfig, set KUBECONFIG, or run in a pod with a service account")]
    Nowhere(#[from] kube::config::InferConfigError),
    /// The kubeconfig in the usual place cannot be used.
    #[error("kubeconfig: {0}")]
    Usual(#[from] kube::config::KubeconfigError),
    /// Certificates or credentials cannot be used.
    #[error("the cluster's credentials: {0}")]
    Client(#[from] kube::Error),
}

/// A client of the cluster that a kubeconfig names; without one of that in the usual places (`KUBECONFIG`,
/// `~/.kube/config`), else of the cluster that this process runs in.
///
/// # Errors
/// See [`ConnectError`]; the API server itself is not asked yet.
pub async fn connect(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Client, ConnectError> {
    let options = KubeConfigOptions { context: context.map(str::to_owned), cluster: None, user: None };
    let mut config = match kubeconfig {
        Some(path) => {
            let failed = |source| ConnectError::Kubeconfig { path: path.to_owned(), source };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            Config::from_custom_kubeconfig(file, &options).await.map_err(failed)?
        }
        None if context.is_some() => Config::from_kubeconfig(&options).await?,
        None => Config::infer().await?,
    };
    config.connect_timeout = Some(CONNECT);
    Ok(Client::try_from(config)?)
}

/// What others may know of a cluster that is watched; clones share it.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// How watching goes.
    pub status: Status,
    /// The resources.
    pub resources: Shared,
    /// What there is to say about all of them together; `None` before the first review.
    pub findings: watch::Receiver<Option<Arc<Vec<Finding>>>>,
}

/// What happened.
#[derive(Debug, Default)]
pub struct Batch {
    /// Changed resources, each at most once.
    pub changes: Vec<Change>,
    /// What there is to say of single resources has changed.
    pub news: bool,
}

/// The resources of a cluster. Ends its watches when it is dropped.
pub struct KubernetesSource {
    client: Client,
    store: Shared,
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    status: Status,
    /// Kinds that were not listed yet.
    missing: BTreeSet<Kind>,
    /// How long to wait for them; at first, as long as it takes.
    until: Option<Instant>,
    /// Something was taken in that nobody was told, and how that was before.
    taken: bool,
    before: Before,
    /// The watch of Pods, while they are needed.
    pods: Option<AbortHandle>,
    /// Likewise of Namespaces, and whether they were listed.
    namespaces: Option<(AbortHandle, bool)>,
    watches: JoinSet<()>,
}

impl fmt::Debug for KubernetesSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubernetesSource").field("missing", &self.missing).finish_non_exhaustive()
    }
}

impl KubernetesSource {
    /// Begins to watch. To be called within a tokio runtime.
    pub fn watch(client: &Client) -> Self {
        let (sender, events) = mpsc::channel(QUEUE);
        let status = Status::new();
        let mut watches = JoinSet::new();
        for watched in &WATCHED {
            watches.spawn(follow::follow(client.clone(), watched, sender.clone(), status.clone()));
        }
        KubernetesSource {
            client: client.clone(),
            store: Shared::default(),
            sender,
            events,
            status,
            missing: WATCHED.iter().map(|watched| watched.kind).collect(),
            until: None,
            taken: false,
            before: Before::new(),
            pods: None,
            namespaces: None,
            watches,
        }
    }

    /// For others to look into; findings come by that channel.
    pub fn cluster(&self, findings: watch::Receiver<Option<Arc<Vec<Finding>>>>) -> Cluster {
        Cluster { status: self.status.clone(), resources: self.store.clone(), findings }
    }

    /// Waits for changes; the first batch is everything there is. Nothing is lost if the future is dropped. A batch may
    /// be empty, where only a status has changed. `None`: the watches have ended.
    pub async fn next(&mut self) -> Option<Batch> {
        loop {
            for _ in 0..BATCH {
                let Ok(event) = self.events.try_recv() else { break };
                self.take(event);
            }
            if self.taken && self.missing.is_empty() {
                break;
            }
            let event = self.events.recv();
            let event = match self.until {
                None => event.await,
                Some(until) => match timeout_at(until, event).await {
                    Ok(event) => event,
                    Err(_) => {
                        tracing::warn!(kinds = ?self.missing, "not listed in time: the rest goes on without");
                        self.missing.clear();
                        self.until = None;
                        continue;
                    }
                },
            };
            self.take(event?);
        }
        self.until = None;
        self.taken = false;
        let before = std::mem::take(&mut self.before);
        let mut store = self.store.write();
        self.status.objects(&store.by_kind());
        // At first everything is new, whatever was before.
        let changes = if store.first_told() { store.changes(before) } else { store.all() };
        Some(Batch { changes, news: store.news() })
    }

    fn take(&mut self, event: Event) {
        // A watch that was ended may have left something.
        match event.kind() {
            Kind::Pod if self.pods.is_none() => return,
            Kind::Namespace if self.namespaces.is_none() => return,
            _ => {}
        }
        match (&event, &mut self.namespaces) {
            (Event::Unavailable(Kind::Namespace), _) => {
                let what = if self.store.read().first_told() { "those from before stay" } else { "nothing is served" };
                tracing::error!(
                    "the mesh has discoverySelectors, and Namespaces cannot be listed: {what} until they are"
                );
                return;
            }
            (Event::Listed(Kind::Namespace, _), Some((_, listed))) => *listed = true,
            _ => {}
        }
        if let Event::Listed(kind, _) | Event::Unavailable(kind) = &event {
            self.missing.remove(kind);
        }
        self.taken = true;
        let mut store = self.store.write();
        store.take(event, &mut self.before);
        match (store.selects_pods(), &self.pods) {
            (true, None) => {
                tracing::info!("an entry has a workloadSelector: Pods are watched");
                self.status.needed(PODS.name, true);
                self.missing.insert(Kind::Pod);
                self.until = store.first_told().then(|| Instant::now() + SELECTED);
                let (client, sender, status) = (self.client.clone(), self.sender.clone(), self.status.clone());
                self.pods = Some(self.watches.spawn(follow::follow(client, &PODS, sender, status)));
            }
            (false, Some(watch)) => {
                tracing::info!("no entry has a workloadSelector: Pods are watched no more");
                watch.abort();
                self.pods = None;
                self.missing.remove(&Kind::Pod);
                store.take(Event::Listed(Kind::Pod, Vec::new()), &mut self.before);
                self.status.needed(PODS.name, false);
            }
            _ => {}
        }
    }

    /// Has what selectors of namespaces need: says whether Namespaces are known that they ask for. At first they are
    /// waited for, and it is true.
    pub fn discover(&mut self, selectors: &[LabelSelector]) -> bool {
        match (selectors.is_empty(), &self.namespaces) {
            (true, None) => {}
            (true, Some((watch, _))) => {
                tracing::info!("no discoverySelectors: Namespaces are watched no more");
                watch.abort();
                self.namespaces = None;
                self.missing.remove(&Kind::Namespace);
                self.store.write().take(Event::Listed(Kind::Namespace, Vec::new()), &mut self.before);
                self.taken = true;
                self.status.needed(NAMESPACES.name, false);
            }
            (false, None) => {
                tracing::info!("the mesh has discoverySelectors: Namespaces are watched");
                self.status.needed(NAMESPACES.name, true);
                let (client, sender, status) = (self.client.clone(), self.sender.clone(), self.status.clone());
                let watch = self.watches.spawn(follow::follow(client, &NAMESPACES, sender, status));
                self.namespaces = Some((watch, false));
                if !self.store.read().first_told() {
                    self.missing.insert(Kind::Namespace);
                }
            }
            (false, Some(_)) => {}
        }
        let listed = self.namespaces.as_ref().is_none_or(|(_, listed)| *listed);
        listed || !self.store.read().first_told()
    }

    /// These selectors are in force.
    pub fn select(&mut self, selectors: &[LabelSelector]) {
        self.store.write().select(selectors);
    }

    /// How the mesh's settings are watched is told here too.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// Resources in force.
    pub fn objects(&self) -> usize {
        self.store.read().len()
    }

    /// All resources at this moment.
    pub fn review(&self) -> Review {
        self.store.read().review()
    }
}
