//! The controller within another process: the same services as over TCP, through pipes in memory.

mod kubernetes_source;

pub use kubernetes_source::{Listed, MeshSource};

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::io::DuplexStream;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Server;

use crate::compile::Conflict;
use crate::model::{Change, MeshConfig};
use crate::publish::{Ended, Publisher};
use crate::serve::{self, Counters};
use crate::source::kubernetes::Cluster;
use crate::source::ledger::{Difference, Ledger, Status};
use crate::source::yaml::{Batch, ReadError, YamlSource};
use crate::validate::finding::{Finding, Severity};

/// Bytes that a pipe holds in each direction before its writer waits.
const PIPE: usize = 256 * 1024;

/// How long after a change findings are reviewed; what changes meanwhile is reviewed with it.
const QUIET: Duration = Duration::from_millis(200);

/// Why a controller did not start or does not answer.
#[derive(Debug, Error)]
pub enum ControllerError {
    /// The system gave no thread.
    #[error("cannot start the compiler: {0}")]
    Thread(#[from] std::io::Error),
    /// It has ended.
    #[error(transparent)]
    Ended(#[from] Ended),
    /// The resources cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Where a controller's resources come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ControllerConfig {
    /// Files and directories of resources; they are watched.
    pub paths: Vec<PathBuf>,
    /// File of the mesh's settings; none: what a `mesh.yaml` among the resources says, or Istio's defaults.
    pub mesh: Option<PathBuf>,
}

/// A controller: compiler and services. Clones share it, and it ends with the last of them.
#[derive(Debug, Clone)]
pub struct Controller {
    publisher: Publisher,
    counters: Arc<Counters>,
    pipes: mpsc::UnboundedSender<std::io::Result<DuplexStream>>,
    /// The task that follows the source.
    source: Option<Arc<Follower>>,
    /// The cluster that is watched, where there is one.
    cluster: Option<Cluster>,
    status: Arc<Status>,
    reload: Arc<Notify>,
    proxy_http_port: Option<u16>,
}

/// Ends with the controller that it works for.
#[derive(Debug)]
struct Follower(JoinHandle<()>);

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Controller {
    /// Reads the resources, compiles them as scopes are asked for, and follows their changes. To be called within a
    /// tokio runtime, on which the services run. What validation finds is logged.
    ///
    /// # Errors
    /// A path that cannot be read, settings of the mesh that are wrong, or no thread to compile on.
    pub async fn start(config: &ControllerConfig) -> Result<Self, ControllerError> {
        let (source, loaded) = YamlSource::load(&config.paths, config.mesh.as_deref())?;
        let mut controller = Self::empty(loaded.mesh)?;
        let mut ledger = Ledger::default();
        log(&ledger.replace(loaded.findings));
        controller.status.loaded(&ledger, source.objects());
        controller.apply(loaded.changes).await?;
        let (publisher, status) = (controller.publisher.clone(), controller.status.clone());
        let reload = controller.reload.clone();
        let follow = tokio::spawn(async move {
            if let Err(error) = follow(source, ledger, publisher, &status, &reload).await {
                tracing::error!(%error, "files are not followed any more");
            }
        });
        controller.source = Some(Arc::new(Follower(follow)));
        Ok(controller)
    }

    /// Starts a controller without resources; they come by [`Controller::apply`]. To be called within a tokio runtime, on
    /// which the services run.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn empty(mesh: MeshConfig) -> Result<Self, ControllerError> {
        let proxy_http_port = mesh.proxy_http_port;
        let publisher = Publisher::start(mesh)?;
        let counters = Arc::new(Counters::default());
        let (pipes, incoming) = mpsc::unbounded_channel();
        let routes = serve::router(publisher.clone(), counters.clone());
        tokio::spawn(async move {
            let incoming = UnboundedReceiverStream::new(incoming);
            if let Err(error) = Server::builder().add_routes(routes).serve_with_incoming(incoming).await {
                tracing::error!(%error, "the services in memory have ended");
            }
        });
        let (status, reload) = Default::default();
        Ok(Controller { publisher, counters, pipes, source: None, cluster: None, status, reload, proxy_http_port })
    }

    /// Takes in one batch of changes; returns when it is published, with the conflicts that it met.
    ///
    /// # Errors
    /// When the compiler has ended.
    pub async fn apply(&self, changes: Vec<Change>) -> Result<Vec<Conflict>, ControllerError> {
        Ok(self.publisher.apply(changes).await?)
    }

    /// A connection to the services: HTTP/2 by prior knowledge is to be spoken on it.
    ///
    /// # Errors
    /// When the services have ended with their runtime.
    pub fn connect(&self) -> Result<DuplexStream, ControllerError> {
        let (ours, theirs) = tokio::io::duplex(PIPE);
        self.pipes.send(Ok(theirs)).map_err(|_| Ended)?;
        Ok(ours)
    }

    /// The mesh's `proxyHttpPort` at the start; a listener of an embedding proxy.
    pub fn proxy_http_port(&self) -> Option<u16> {
        self.proxy_http_port
    }

    /// What compiles and publishes.
    pub fn publisher(&self) -> &Publisher {
        &self.publisher
    }

    /// Reads all files again, whether they seem to have changed or not.
    pub fn reload(&self) {
        self.reload.notify_one();
    }

    /// The state of the files, for metrics.
    pub fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// The cluster that is watched, of a controller of a cluster.
    pub fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref()
    }

    /// What was served.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }
}

async fn take(publisher: &Publisher, batch: Batch) -> Result<(), Ended> {
    let conflicts = match batch.mesh {
        Some(mesh) => publisher.replace(mesh, batch.changes).await?,
        None => publisher.apply(batch.changes).await?,
    };
    for conflict in conflicts {
        tracing::info!(subject = conflict.subject, rule = ?conflict.rule, winner = ?conflict.winner, "conflict");
    }
    Ok(())
}

/// Takes in what changes; then, when files have been quiet for a moment, says what is wrong now that was not before, and
/// what is not wrong any more.
async fn follow(
    mut source: YamlSource,
    mut ledger: Ledger,
    publisher: Publisher,
    status: &Status,
    reload: &Notify,
) -> Result<(), ControllerError> {
    let mut review = None;
    let mut reviewing: Option<JoinHandle<Vec<Finding>>> = None;
    loop {
        let batch = tokio::select! {
            batch = source.next() => batch,
            () = reload.notified() => {
                tracing::info!("reading all files again");
                source.reload()
            }
            () = async { tokio::time::sleep_until(review.unwrap_or_else(Instant::now)).await },
                if review.is_some() && reviewing.is_none() =>
            {
                review = None;
                let now = source.review();
                reviewing = Some(tokio::task::spawn_blocking(move || now.findings()));
                continue;
            }
            Some(found) = async { Some(reviewing.as_mut()?.await) } => {
                reviewing = None;
                log(&ledger.replace(found.map_err(|_| Ended)?));
                status.loaded(&ledger, source.objects());
                continue;
            }
        };
        let errors = batch.findings.iter().filter(|finding| finding.severity == Severity::Error).count();
        let changes = batch.changes.len();
        take(&publisher, batch).await?;
        status.reloaded(errors == 0);
        tracing::info!(changes, errors, "files read again");
        review.get_or_insert_with(|| Instant::now() + QUIET);
    }
}

fn log(difference: &Difference) {
    for f in &difference.new {
        // A place without lines has line 0.
        let place = if f.line == 0 { f.file.to_string() } else { format!("{}:{}", f.file, f.line) };
        let (object, field) = (format!("{} {}/{}", f.kind, f.namespace, f.name), &f.field);
        match f.severity {
            Severity::Error => {
                tracing::error!(place, object, field, code = %f.code, "{}; the last good version stays", f.message);
            }
            Severity::Warning => tracing::warn!(place, object, field, code = %f.code, "{}", f.message),
        }
    }
    for f in &difference.gone {
        let (place, object) = (f.file.as_ref(), format!("{} {}/{}", f.kind, f.namespace, f.name));
        tracing::info!(place, object, field = f.field, code = %f.code, "no longer: {}", f.message);
    }
}
