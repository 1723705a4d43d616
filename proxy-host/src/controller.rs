//! The way to the controller: one in this process over an in-memory connection, or one elsewhere. Both speak the same
//! streams.

use hyper_util::rt::TokioIo;
use portolan_controller::embed::{self, ControllerConfig};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{app::AppError, config::Source};

/// A connection to a controller; the embedded one lives as long as this.
pub struct Controller {
    /// Carries the registry stream and discovery.
    pub channel: Channel,
    /// MeshConfig's `proxyHttpPort`, where the mesh is known here.
    pub proxy_http_port: Option<u16>,
    embedded: Option<embed::Controller>,
}

impl Controller {
    /// Has the files read again, where there are any.
    pub fn reload(&self) {
        match &self.embedded {
            Some(controller) => controller.reload(),
            None => tracing::info!("nothing to read again: the configuration is that of the controller elsewhere"),
        }
    }

    /// The controller within this process.
    #[must_use]
    pub fn embedded(&self) -> Option<&embed::Controller> {
        self.embedded.as_ref()
    }
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
            Ok(Controller { channel: endpoint.connect_lazy(), proxy_http_port: None, embedded: None })
        }
        Source::Files { paths, mesh } => start(&ControllerConfig { paths: paths.clone(), mesh: mesh.clone() }).await,
    }
}

async fn start(config: &ControllerConfig) -> Result<Controller, AppError> {
    let controller = embed::Controller::start(config).await.map_err(|error| AppError::Config(error.to_string()))?;
    let proxy_http_port = controller.proxy_http_port();
    let pipes = controller.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let pipe = pipes.connect();
        async move { pipe.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://controller.internal").connect_with_connector_lazy(connector);
    Ok(Controller { channel, proxy_http_port, embedded: Some(controller) })
}
