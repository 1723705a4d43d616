//! The controller within another process: the same services as over TCP, through pipes in memory.

use std::sync::Arc;

use thiserror::Error;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Server;

use crate::compile::Conflict;
use crate::model::{Change, MeshConfig};
use crate::publish::{Ended, Publisher};
use crate::serve::{self, Counters};

/// Bytes that a pipe holds in each direction before its writer waits.
const PIPE: usize = 256 * 1024;

/// Why a controller did not start or does not answer.
#[derive(Debug, Error)]
pub enum ControllerError {
    /// The system gave no thread.
    #[error("cannot start the compiler: {0}")]
    Thread(#[from] std::io::Error),
    /// It has ended.
    #[error(transparent)]
    Ended(#[from] Ended),
}

/// One batch of what sources yield.
#[derive(Debug, Clone, PartialEq)]
pub enum Batch {
    /// Objects that came, changed or went.
    Changes(Vec<Change>),
    /// New settings of the mesh.
    Mesh(MeshConfig),
}

/// A controller: compiler and services. Clones share it, and it ends with the last of them.
#[derive(Debug, Clone)]
pub struct Controller {
    publisher: Publisher,
    counters: Arc<Counters>,
    pipes: mpsc::UnboundedSender<std::io::Result<DuplexStream>>,
}

impl Controller {
    /// Starts a controller without objects; they come by [`Controller::apply`]. To be called within a tokio runtime, on
    /// which the services run.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(mesh: MeshConfig) -> Result<Self, ControllerError> {
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
        Ok(Controller { publisher, counters, pipes })
    }

    /// Takes in one batch; returns when it is published, with the conflicts that it met.
    ///
    /// # Errors
    /// When the compiler has ended.
    pub async fn apply(&self, batch: Batch) -> Result<Vec<Conflict>, ControllerError> {
        match batch {
            Batch::Changes(changes) => Ok(self.publisher.apply(changes).await?),
            Batch::Mesh(mesh) => {
                self.publisher.set_mesh(mesh).await?;
                Ok(Vec::new())
            }
        }
    }

    /// Takes in batches for as long as there are any.
    ///
    /// # Errors
    /// When the compiler has ended.
    pub async fn follow(&self, mut batches: impl tokio_stream::Stream<Item = Batch> + Unpin) -> Result<(), ControllerError> {
        while let Some(batch) = batches.next().await {
            self.apply(batch).await?;
        }
        Ok(())
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

    /// What compiles and publishes.
    pub fn publisher(&self) -> &Publisher {
        &self.publisher
    }

    /// What was served.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }
}
