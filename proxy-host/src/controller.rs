//! The way to the controller: one in this process over an in-memory connection, or one elsewhere. Both speak the same
//! streams.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use hyper_util::rt::TokioIo;
use portolan_controller::{
    config::{documents, files},
    embed::{self, Batch},
    model::{Change, MeshConfig},
    source::read::{self, Outcome},
    validate::{
        conflict::{self, Placed},
        finding::{Finding, Severity},
    },
};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{app::AppError, config::Source};

/// A connection to a controller; the embedded one lives as long as this.
pub struct Controller {
    /// Carries the registry stream and discovery.
    pub channel: Channel,
    /// MeshConfig's `proxyHttpPort`, where the mesh is known here.
    pub proxy_http_port: Option<u16>,
    _embedded: Option<embed::Controller>,
}

/// Connects, or starts the embedded controller.
///
/// # Errors
/// The address or the configuration cannot be used.
pub async fn connect(source: &Source) -> Result<Controller, AppError> {
    match source {
        Source::Controller(address) => {
            let endpoint = Endpoint::from_shared(address.clone()).map_err(|_| AppError::Controller(address.clone()))?;
            // Opened with the first call, and again after each failure.
            Ok(Controller { channel: endpoint.connect_lazy(), proxy_http_port: None, _embedded: None })
        }
        Source::Files { paths, mesh } => start(paths, mesh.as_deref()).await,
    }
}

async fn start(paths: &[PathBuf], mesh: Option<&Path>) -> Result<Controller, AppError> {
    let mesh = match mesh {
        Some(path) => {
            let text = read_file(path)?;
            let (mesh, findings) = read::mesh(&text, &name(path));
            report(&findings);
            mesh.ok_or_else(|| AppError::Config(format!("{}: not a MeshConfig", path.display())))?
        }
        None => MeshConfig::default(),
    };
    let proxy_http_port = mesh.proxy_http_port;
    let controller = embed::Controller::start(mesh).map_err(|error| AppError::Config(error.to_string()))?;
    let changes = objects(paths)?.into_iter().map(Change::Apply).collect();
    let applied = controller.apply(Batch::Changes(changes)).await;
    applied.map_err(|error| AppError::Config(error.to_string()))?;
    let pipes = controller.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let pipe = pipes.connect();
        async move { pipe.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://controller.internal").connect_with_connector_lazy(connector);
    Ok(Controller { channel, proxy_http_port, _embedded: Some(controller) })
}

fn objects(paths: &[PathBuf]) -> Result<Vec<portolan_controller::model::Object>, AppError> {
    let files = files::list(paths).map_err(|(path, error)| AppError::File { path, error })?;
    let mut placed = Vec::new();
    for path in files {
        let (text, file) = (read_file(&path)?, name(&path));
        for document in documents::split(&text) {
            let (outcomes, findings) = read::document(&document, &file);
            report(&findings);
            placed.extend(outcomes.into_iter().filter_map(|outcome| match outcome {
                Outcome::Object(object, line) => Some(Placed { object, file: file.clone(), line }),
                _ => None,
            }));
        }
    }
    let (placed, duplicates) = conflict::deduplicate(placed);
    report(&duplicates);
    Ok(placed.into_iter().map(|placed| placed.object).collect())
}

fn name(path: &Path) -> Arc<str> {
    path.to_string_lossy().into()
}

fn read_file(path: &Path) -> Result<String, AppError> {
    std::fs::read_to_string(path).map_err(|error| AppError::File { path: path.to_owned(), error })
}

fn report(findings: &[Finding]) {
    for finding in findings {
        match finding.severity {
            Severity::Error => tracing::error!("{finding}"),
            _ => tracing::warn!("{finding}"),
        }
    }
}
