//! Resources from a Kubernetes API server: listed once, then watched.
//!
//! Each kind is followed by a task of its own; what they say comes together in one [`store`], and leaves it as batches of
//! differences. Nothing is published before every kind was listed, so that a restarted controller never tells a proxy
//! that something is gone which was only not listed yet; a kind that cannot be had is gone without, loudly.

mod follow;
pub mod kinds;
pub mod mesh;
pub mod status;
pub mod store;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use self::kinds::WATCHED;
use self::status::Status;
use self::store::{Before, Event, Shared};
use crate::model::{Change, Kind};
use crate::source::yaml::Review;
use crate::validate::finding::Finding;

/// Events that wait to be taken in before the watches wait too.
const QUEUE: usize = 1024;
/// Events that one batch takes in at most.
const BATCH: usize = 10_000;
/// How long the API server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);

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
#[derive(Debug)]
pub struct KubernetesSource {
    store: Shared,
    events: mpsc::Receiver<Event>,
    status: Status,
    /// Kinds that were not listed yet.
    missing: BTreeSet<Kind>,
    _watches: JoinSet<()>,
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
        let missing = WATCHED.iter().map(|watched| watched.kind).collect();
        KubernetesSource { store: Shared::default(), events, status, missing, _watches: watches }
    }

    /// For others to look into; findings come by that channel.
    pub fn cluster(&self, findings: watch::Receiver<Option<Arc<Vec<Finding>>>>) -> Cluster {
        Cluster { status: self.status.clone(), resources: self.store.clone(), findings }
    }

    /// Waits for changes; the first batch is everything there is. Nothing is lost if the future is dropped. A batch may
    /// be empty, where only a status has changed. `None`: the watches have ended.
    pub async fn next(&mut self) -> Option<Batch> {
        let mut before = Before::new();
        while !self.missing.is_empty() {
            let event = self.events.recv().await?;
            self.take(event, &mut before);
        }
        // Everything so far is new: no need to remember what was before.
        if !self.store.read().first_told() {
            let mut store = self.store.write();
            self.status.objects(&store.by_kind());
            return Some(Batch { changes: store.all(), news: true });
        }
        let event = self.events.recv().await?;
        self.take(event, &mut before);
        for _ in 1..BATCH {
            let Ok(event) = self.events.try_recv() else { break };
            self.take(event, &mut before);
        }
        let mut store = self.store.write();
        self.status.objects(&store.by_kind());
        Some(Batch { changes: store.changes(before), news: store.news() })
    }

    fn take(&mut self, event: Event, before: &mut Before) {
        if let Event::Listed(kind, _) | Event::Unavailable(kind) = &event {
            self.missing.remove(kind);
        }
        self.store.write().take(event, before);
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
