//! A controller of the resources of a Kubernetes cluster.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Controller, ControllerError, Follower, log, take};
use crate::publish::{Ended, Publisher};
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

impl Controller {
    /// Watches a cluster, and takes the mesh's settings from a file, which is watched too; none: Istio's defaults.
    /// Returns at once: what is there by then is nothing yet. To be called within a tokio runtime, on which the services
    /// run.
    ///
    /// # Errors
    /// Settings of the mesh that are wrong, or no thread to compile on.
    pub fn of_cluster(client: &kube::Client, mesh: Option<&Path>) -> Result<(Self, Listed), ControllerError> {
        let (files, loaded) = YamlSource::load(&[], mesh)?;
        let mut controller = Self::empty(loaded.mesh)?;
        let mut ledger = Ledger::default();
        log(&ledger.replace(loaded.findings));
        let source = KubernetesSource::watch(client);
        let (tell, listed) = oneshot::channel();
        let (found, findings) = watch::channel(None);
        controller.cluster = Some(source.cluster(findings));
        let follow = Follow {
            source,
            files,
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
    /// The mesh's settings.
    files: YamlSource,
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
        loop {
            tokio::select! {
                batch = self.source.next() => {
                    let kubernetes::Batch { changes, news } = batch.ok_or(Ended)?;
                    let count = changes.len();
                    if count > 0 {
                        take(&self.publisher, Batch { changes, ..Batch::default() }).await?;
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
                batch = self.files.next() => self.mesh(batch).await?,
                () = self.reload.notified() => {
                    let batch = self.files.reload();
                    self.mesh(batch).await?;
                }
                () = async { tokio::time::sleep_until(review.unwrap_or_else(Instant::now)).await },
                    if review.is_some() && reviewing.is_none() =>
                {
                    review = None;
                    let (cluster, files) = (self.source.review(), self.files.review());
                    reviewing = Some(tokio::task::spawn_blocking(move || {
                        let mut findings = files.findings();
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

    /// Takes in the mesh's settings, if they have changed.
    async fn mesh(&mut self, batch: Batch) -> Result<(), Ended> {
        take(&self.publisher, batch).await
    }
}
