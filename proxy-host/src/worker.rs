//! A worker: one thread with its listeners, its filter, its clusters and its connections.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::{
    access_log::WorkerLog,
    config::Config,
    control::{Need, ToWorker},
    dns::Resolver,
    filter::{Connection, Filter, Via},
    limits::Refusals,
    listener::{plan::Plans, termination::Terminations},
    stats::Stats,
    upstream::{Cluster, EndpointReport, Resolved},
};

/// How often connections that nobody uses are looked for.
const SWEEP: Duration = Duration::from_secs(30);

/// Why there is no cluster of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoCluster {
    /// The controller knows none of that name.
    #[error("cluster_not_found")]
    NotFound,
    /// The controller did not say in time.
    #[error("cluster_not_found: the controller does not answer")]
    Timeout,
}

enum Slot {
    Ready(Rc<Cluster>),
    Waiting(Vec<oneshot::Sender<Option<Rc<Cluster>>>>),
}

/// One thread's state; nothing of it is shared with another.
pub struct Worker {
    /// Decides.
    pub filter: Filter,
    /// Resolves names that clients ask for.
    pub resolver: Resolver,
    /// Where lines go.
    pub log: WorkerLog,
    /// The settings.
    pub config: Rc<Config>,
    /// Turns true when the process is to end.
    pub stop: watch::Receiver<bool>,
    /// What all workers count.
    pub stats: Arc<Stats>,
    /// Refuses connections that are too many.
    pub refusals: Refusals,
    /// Certificates of a gateway's servers.
    pub terminations: Terminations,
    pub(crate) index: usize,
    plans: watch::Sender<Arc<Plans>>,
    clusters: RefCell<HashMap<String, Slot>>,
    needs: mpsc::UnboundedSender<Need>,
    connections: Cell<u64>,
    open: Cell<usize>,
    /// Told when the last open connection has ended.
    emptied: Notify,
}

/// Counts a connection as open for as long as it lives.
pub struct Opened(Rc<Worker>);

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        if self.0.open.get() == 0 {
            self.0.emptied.notify_one();
        }
    }
}

impl Worker {
    /// A worker of this number.
    #[must_use]
    pub fn new(
        index: usize,
        filter: Filter,
        log: WorkerLog,
        config: Rc<Config>,
        needs: mpsc::UnboundedSender<Need>,
        stop: watch::Receiver<bool>,
        stats: Arc<Stats>,
    ) -> Self {
        Self {
            stats,
            refusals: Refusals::default(),
            terminations: Terminations::default(),
            filter,
            resolver: Resolver::new(&config.name_servers),
            log,
            config,
            stop,
            index,
            plans: watch::Sender::default(),
            clusters: RefCell::default(),
            needs,
            connections: Cell::new(0),
            open: Cell::new(0),
            emptied: Notify::new(),
        }
    }

    /// The listener plans in force.
    #[must_use]
    pub fn plans(&self) -> Arc<Plans> {
        self.plans.borrow().clone()
    }

    /// Tells when the plans change.
    #[must_use]
    pub fn plans_changed(&self) -> watch::Receiver<Arc<Plans>> {
        self.plans.subscribe()
    }

    /// A connection that has just been accepted.
    pub fn connection(&self, source: SocketAddr, destination: SocketAddr, via: Via) -> Connection {
        let number = self.connections.get() + 1;
        self.connections.set(number);
        let id = (self.index as u64) << 48 | number;
        Connection { id, source, destination, via, server_name: None, client_certificate: None }
    }

    /// Counts a connection as open.
    #[must_use]
    pub fn opened(self: &Rc<Self>) -> Opened {
        self.open.set(self.open.get() + 1);
        Opened(self.clone())
    }

    /// Waits until no connection is open.
    pub async fn idle(&self) {
        while self.open.get() > 0 {
            self.emptied.notified().await;
        }
    }

    /// The cluster of a name; asks the controller for it the first time.
    ///
    /// # Errors
    /// There is none, or nobody says so in time.
    pub async fn cluster(&self, name: &str) -> Result<Rc<Cluster>, NoCluster> {
        if let Some(Slot::Ready(cluster)) = self.clusters.borrow().get(name) {
            return Ok(cluster.clone());
        }
        Box::pin(self.ask_for(name)).await
    }

    async fn ask_for(&self, name: &str) -> Result<Rc<Cluster>, NoCluster> {
        let (sender, answer) = oneshot::channel();
        let ask = match self.clusters.borrow_mut().get_mut(name) {
            Some(Slot::Ready(cluster)) => return Ok(cluster.clone()),
            Some(Slot::Waiting(waiting)) => {
                waiting.retain(|other| !other.is_closed());
                waiting.push(sender);
                None
            }
            None => Some(sender),
        };
        if let Some(sender) = ask {
            self.clusters.borrow_mut().insert(name.to_owned(), Slot::Waiting(vec![sender]));
            // Where the control thread is gone, the wait ends by its timeout.
            let _ = self.needs.send(Need { worker: self.index, cluster: name.to_owned() });
        }
        match tokio::time::timeout(self.config.cluster_timeout, answer).await {
            Ok(Ok(Some(cluster))) => Ok(cluster),
            Ok(Ok(None) | Err(_)) => Err(NoCluster::NotFound),
            Err(_) => Err(NoCluster::Timeout),
        }
    }

    /// Takes what the control thread says until it says no more.
    pub async fn listen(self: Rc<Self>, mut messages: mpsc::UnboundedReceiver<ToWorker>) {
        let mut sweep = tokio::time::interval(SWEEP);
        loop {
            tokio::select! {
                message = messages.recv() => match message {
                    Some(ToWorker::Plans(plans)) => {
                        self.plans.send_replace(plans);
                    }
                    Some(ToWorker::Cluster(name, cluster)) => self.update(&name, cluster),
                    Some(ToWorker::Report(answer)) => {
                        // Whoever asked may have given up.
                        let _ = answer.send(self.report());
                    }
                    None => return,
                },
                _ = sweep.tick() => self.sweep(),
            }
        }
    }

    fn update(&self, name: &str, cluster: Option<Arc<Resolved>>) {
        let mut clusters = self.clusters.borrow_mut();
        // Of clusters that nobody asked this worker for it keeps nothing.
        let Some(slot) = clusters.remove(name) else { return };
        let before = match &slot {
            Slot::Ready(before) => Some(before.clone()),
            Slot::Waiting(_) => None,
        };
        let cluster = cluster.map(|spec| Rc::new(Cluster::new(spec, before.as_deref())));
        if let Some(cluster) = &cluster {
            clusters.insert(name.to_owned(), Slot::Ready(cluster.clone()));
        }
        drop(clusters);
        if let Slot::Waiting(waiting) = slot {
            for sender in waiting {
                // Whoever waited may have given up.
                let _ = sender.send(cluster.clone());
            }
        }
    }

    /// The clusters that this worker holds, and what it has to do with each of their endpoints.
    fn report(&self) -> Vec<EndpointReport> {
        let clusters = self.clusters.borrow();
        let ready = clusters.values().filter_map(|slot| match slot {
            Slot::Ready(cluster) => Some(cluster.report()),
            Slot::Waiting(_) => None,
        });
        ready.flatten().collect()
    }

    fn sweep(&self) {
        let now = Instant::now();
        for slot in self.clusters.borrow().values() {
            if let Slot::Ready(cluster) = slot {
                cluster.sweep(now);
            }
        }
    }
}
