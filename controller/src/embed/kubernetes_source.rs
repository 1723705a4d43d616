//! A controller of the resources of a Kubernetes cluster.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Controller, ControllerError, Follower, log, take};
use crate::model::{LabelSelector, MeshConfig};
use crate::publish::{Ended, Publisher};
use crate::source::kubernetes::mesh::{self, MeshMap, Said};
use crate::source::kubernetes::{self, KubernetesSource};
use crate::source::ledger::{Ledger, Status};
use crate::source::yaml::{Batch, YamlSource};
use crate::validate::finding::Finding;

/// How long after a change findings are reviewed: a cluster is never quiet for long, and a review looks at everything.
const QUIET: Duration = Duration::from_secs(1);

/// Tells when a controller has everything that its cluster holds.
#[derive(Debug)]
pub struct Listed(oneshot::Receiver<()>);

impl Listed {
    /// Waits until then. Serving before would tell proxies that things are gone which were only not listed yet.
    ///
    /// # Errors
    /// When the controller has ended.
    pub async fn wait(self) -> Result<(), Ended> {
        self.0.await.map_err(|_| Ended)
    }
}

/// Where a controller of a cluster has the mesh's settings from. Whatever it is, it is watched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum MeshSource {
    /// Istio's defaults.
    #[default]
    Defaults,
    /// A file.
    File(PathBuf),
    /// A ConfigMap of the cluster.
    Map(MeshMap),
}

impl Controller {
    /// Watches a cluster and the mesh's settings. Returns at once: what is there by then is nothing yet. To be called within a tokio runtime, on which the services
    /// run.
    ///
    /// # Errors
    /// Settings of the mesh that are wrong, or no thread to compile on.
    pub fn of_cluster(client: &kube::Client, mesh: &MeshSource) -> Result<(Self, Listed), ControllerError> {
        let file = if let MeshSource::File(file) = mesh { Some(file.as_path()) } else { None };
        let (files, loaded) = YamlSource::load(&[], file)?;
        let mut controller = Self::empty(loaded.mesh.clone())?;
        let mut ledger = Ledger::default();
        log(&ledger.replace(loaded.findings));
        let mut source = KubernetesSource::watch(client);
        source.discover(&loaded.mesh.discovery_selectors);
        source.select(&loaded.mesh.discovery_selectors);
        let map = if let MeshSource::Map(map) = mesh {
            let (said, says) = mpsc::channel(1);
            tokio::spawn(mesh::follow(client.clone(), map.clone(), said, source.status().clone()));
            Some(says)
        } else {
            None
        };
        let (tell, listed) = oneshot::channel();
        let (found, findings) = watch::channel(None);
        controller.cluster = Some(source.cluster(findings));
        let follow = Follow {
            source,
            selectors: loaded.mesh.discovery_selectors,
            waiting: None,
            files,
            map,
            said_of_map: Vec::new(),
            ledger,
            publisher: controller.publisher.clone(),
            status: controller.status.clone(),
            reload: controller.reload.clone(),
            listed: Some(tell),
            found,
        };
        let follow = tokio::spawn(async move {
            if let Err(error) = follow.run().await {
                tracing::error!(%error, "the cluster is not followed any more");
            }
        });
        controller.source = Some(Arc::new(Follower(follow)));
        Ok((controller, Listed(listed)))
    }
}

struct Follow {
    source: KubernetesSource,
    /// The mesh's `discoverySelectors` in force.
    selectors: Vec<LabelSelector>,
    /// Settings of which these wait until the Namespaces that they ask for are known.
    waiting: Option<MeshConfig>,
    /// The mesh's settings in a file.
    files: YamlSource,
    /// Those in a ConfigMap, and what there was to say of it.
    map: Option<mpsc::Receiver<Said>>,
    said_of_map: Vec<Finding>,
    ledger: Ledger,
    publisher: Publisher,
    status: Arc<Status>,
    reload: Arc<Notify>,
    listed: Option<oneshot::Sender<()>>,
    /// For those who tell the cluster.
    found: watch::Sender<Option<Arc<Vec<Finding>>>>,
}

impl Follow {
    async fn run(mut self) -> Result<(), ControllerError> {
        let mut review = None;
        let mut reviewing: Option<JoinHandle<Vec<Finding>>> = None;
        if let Some(map) = &mut self.map {
            // Nobody is served by settings that are not the mesh's.
            loop {
                let Said { mesh, findings } = map.recv().await.ok_or(Ended)?;
                self.said_of_map = findings;
                log(&self.ledger.replace(self.said_of_map.clone()));
                if let Some(mesh) = mesh {
                    self.mesh(mesh).await?;
                    break;
                }
            }
        }
        loop {
            tokio::select! {
                Some(said) = async { self.map.as_mut()?.recv().await } => {
                    self.said_of_map = said.findings;
                    if let Some(mesh) = said.mesh {
                        tracing::info!("the mesh's settings were read again");
                        self.mesh(mesh).await?;
                    }
                    review.get_or_insert_with(|| Instant::now() + QUIET);
                }
                batch = self.source.next() => {
                    let kubernetes::Batch { changes, news } = batch.ok_or(Ended)?;
                    let count = changes.len();
                    if count > 0 {
                        take(&self.publisher, Batch { changes, ..Batch::default() }).await?;
                    }
                    if let Some(mesh) = self.waiting.take() {
                        self.mesh(mesh).await?;
                    }
                    match self.listed.take() {
                        Some(listed) => {
                            tracing::info!(resources = count, "the cluster is listed");
                            // Who does not wait for it serves nobody.
                            let _ = listed.send(());
                        }
                        None => tracing::debug!(changes = count, "the cluster has changed"),
                    }
                    if news || count > 0 {
                        review.get_or_insert_with(|| Instant::now() + QUIET);
                    }
                }
                batch = self.files.next() => self.file(batch).await?,
                () = self.reload.notified() => {
                    let batch = self.files.reload();
                    self.file(batch).await?;
                }
                () = async { tokio::time::sleep_until(review.unwrap_or_else(Instant::now)).await },
                    if review.is_some() && reviewing.is_none() =>
                {
                    review = None;
                    let (cluster, files) = (self.source.review(), self.files.review());
                    let of_map = self.said_of_map.clone();
                    reviewing = Some(tokio::task::spawn_blocking(move || {
                        let mut findings = files.findings();
                        findings.extend(of_map);
                        findings.extend(cluster.findings());
                        findings
                    }));
                }
                Some(found) = async { Some(reviewing.as_mut()?.await) } => {
                    reviewing = None;
                    let found = found.map_err(|_| Ended)?;
                    self.found.send_replace(Some(Arc::new(found.clone())));
                    log(&self.ledger.replace(found));
                    self.status.loaded(&self.ledger, self.source.objects());
                }
            }
        }
    }

    /// Takes in the mesh's settings, if the file has others.
    async fn file(&mut self, batch: Batch) -> Result<(), Ended> {
        match batch.mesh {
            Some(mesh) => self.mesh(mesh).await,
            None => Ok(()),
        }
    }

    /// Puts the mesh's settings in force. Selectors of namespaces wait until it is known what they choose: it would be
    /// nothing.
    async fn mesh(&mut self, mut mesh: MeshConfig) -> Result<(), Ended> {
        self.waiting = None;
        if self.source.discover(&mesh.discovery_selectors) {
            self.selectors.clone_from(&mesh.discovery_selectors);
            self.source.select(&self.selectors);
        } else {
            self.waiting = Some(mesh.clone());
            mesh.discovery_selectors.clone_from(&self.selectors);
        }
        self.publisher.set_mesh(mesh).await
    }
}
