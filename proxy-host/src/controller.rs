//! The way to the controller: one in this process over an in-memory connection, or one elsewhere. Both speak the same
//! streams.

use hyper_util::rt::TokioIo;
use portolan_controller::embed::{self, ControllerConfig};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{app::AppError, config::Source, controller_tls::ControllerTls};

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
pub async fn connect(source: &Source, tls: Option<&ControllerTls>) -> Result<Controller, AppError> {
    match source {
        Source::Controller(address) => {
            let wrong = || AppError::Controller(address.clone());
            let endpoint = Endpoint::from_shared(address.clone()).map_err(|_| wrong())?;
            // Opened with the first call, and again after each failure.
            let channel = match (endpoint.uri().scheme_str(), tls) {
                (Some("http"), None) => endpoint.connect_lazy(),
                (Some("https"), Some(tls)) => {
                    // Better now, by name, than with each attempt.
                    tls.load().map_err(|error| AppError::Config(error.to_string()))?;
                    secured(&endpoint, address, tls).ok_or_else(wrong)?
                }
                (Some("https"), None) => {
                    return Err(AppError::Config("--controller https://… needs --controller-ca".to_owned()));
                }
                (_, Some(_)) => {
                    return Err(AppError::Config(
                        "--controller-ca goes with --controller https://HOST:PORT".to_owned(),
                    ));
                }
                _ => return Err(wrong()),
            };
            Ok(Controller { channel, proxy_http_port: None, embedded: None })
        }
        Source::Files { paths, mesh } => start(&ControllerConfig { paths: paths.clone(), mesh: mesh.clone() }).await,
    }
}

/// A channel over TLS of our own: the endpoint itself is told that it is plain.
fn secured(endpoint: &Endpoint, address: &str, tls: &ControllerTls) -> Option<Channel> {
    let address: Uri = address.parse().ok()?;
    let tls = tls.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let (tls, address) = (tls.clone(), address.clone());
        async move { tls.connect(&address).await.map(TokioIo::new) }
    });
    let authority = endpoint.uri().authority()?;
    let plain = Endpoint::from_shared(format!("http://{authority}")).ok()?;
    Some(plain.connect_with_connector_lazy(connector))
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
