//! The services on TCP: plain, TLS, or TLS on both sides. Certificates may change while streams are open; connections
//! that come after a change meet the new ones.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ServerConfig, WebPkiClientVerifier};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::peer::{Identity, Peer};
use crate::embed::Controller;
use crate::source::watch::Watcher;

/// How long a client may take for the handshake.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(10);
/// How often a silent client is asked whether it is still there, and how long it may take to say so.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// How long streams get to end after the signal.
const DRAIN: Duration = Duration::from_millis(500);

/// Files of the certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain of the controller, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// Authorities of subscribers' certificates, PEM. With it, a subscriber needs one.
    pub client_ca: Option<PathBuf>,
}

/// Files that make no TLS configuration.
#[derive(Debug, Error)]
pub enum TlsError {
    /// One cannot be read as PEM.
    #[error("{}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: rustls::pki_types::pem::Error,
    },
    /// One holds no certificate.
    #[error("{}: no certificate in it", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// They do not fit together.
    #[error("{} and {}: {error}", certificate.display(), key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        error: rustls::Error,
    },
    /// The authorities cannot be used.
    #[error("{}: {error}", path.display())]
    Authorities {
        /// Their file.
        path: PathBuf,
        /// What is wrong.
        error: String,
    },
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |error| TlsError::File { path: path.to_owned(), error };
    let all = CertificateDer::pem_file_iter(path).map_err(failed)?;
    let all = all.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if all.is_empty() { Err(TlsError::Empty { path: path.to_owned() }) } else { Ok(all) }
}

impl TlsFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// One of them cannot be used; the error names it.
    pub fn load(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = certificates(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .map_err(|error| TlsError::File { path: self.key.clone(), error })?;
        let pair = |error| TlsError::Pair { certificate: self.certificate.clone(), key: self.key.clone(), error };
        let builder = ServerConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions().map_err(pair)?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let unusable = |error: String| TlsError::Authorities { path: path.clone(), error };
                let mut roots = RootCertStore::empty();
                for authority in certificates(path)? {
                    roots.add(authority).map_err(|error| unusable(error.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| unusable(error.to_string()))?)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(pair)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.certificate, &self.key].into_iter().chain(&self.client_ca)
    }

    /// Loads the files again whenever one changes; what cannot be used leaves the last good ones in force.
    pub(super) async fn follow(self, config: watch::Sender<Arc<ServerConfig>>) {
        let directories: BTreeSet<PathBuf> = self.paths().filter_map(|p| p.parent()).map(directory).collect();
        let watcher = Watcher::new().and_then(|mut watcher| watcher.watch(directories).map(|()| watcher));
        let mut watcher = match watcher {
            Ok(watcher) => watcher,
            Err(error) => {
                tracing::error!(%error, "certificates cannot be watched: a change needs a restart");
                return;
            }
        };
        loop {
            // Whatever happened beside the files may have been a link on the way to them: Kubernetes swaps directories.
            watcher.next().await;
            match self.load() {
                Ok(loaded) => {
                    config.send_replace(loaded);
                    tracing::info!("certificates loaded");
                }
                Err(error) => tracing::error!(%error, "certificates refused: the last good ones stay in force"),
            }
        }
    }
}

fn directory(parent: &Path) -> PathBuf {
    if parent.as_os_str().is_empty() { PathBuf::from(".") } else { parent.to_owned() }
}

/// Serves the controller's streams until the signal comes, and then a moment longer.
///
/// # Errors
/// The listener fails, or the certificates cannot be loaded.
pub async fn serve(
    controller: &Controller,
    listener: TcpListener,
    tls: Option<TlsFiles>,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (connections, incoming) = mpsc::channel(64);
    let (stopping, stopped) = watch::channel(false);
    let accept = match tls {
        None => tokio::spawn(accept_plain(listener, connections)),
        Some(files) => {
            let (config, current) = watch::channel(files.load()?);
            let mutual = files.client_ca.is_some();
            tokio::spawn(async move {
                tokio::join!(files.follow(config), accept_tls(listener, current, mutual, connections));
            })
        }
    };
    let services = super::router(controller.publisher().clone(), controller.counters().clone());
    let serving = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .add_routes(services)
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), async move {
            let mut stopped = stopped;
            // An error means that there is nobody left to stop for.
            let _ = stopped.wait_for(|stop| *stop).await;
        });
    let mut serving = std::pin::pin!(serving);
    tokio::select! {
        ended = serving.as_mut() => ended?,
        () = stop => {
            accept.abort();
            stopping.send_replace(true);
            // Streams have no end of their own: subscribers resume elsewhere or later.
            if let Ok(ended) = timeout(DRAIN, serving).await {
                ended?;
            }
        }
    }
    Ok(())
}

/// Why the services do not run.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The transport failed.
    #[error("serving: {0}")]
    Transport(#[from] tonic::transport::Error),
}

type Connections = mpsc::Sender<io::Result<Connection>>;

pub(super) async fn accepted(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                // Only costs latency where it cannot be set.
                let _ = stream.set_nodelay(true);
                return (stream, address);
            }
            Err(error) => {
                tracing::warn!(%error, "accept");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

async fn accept_plain(listener: TcpListener, connections: Connections) {
    loop {
        let (stream, address) = accepted(&listener).await;
        let peer = Peer { address, identity: None };
        if connections.send(Ok(Connection { stream: Box::pin(stream), peer })).await.is_err() {
            return;
        }
    }
}

async fn accept_tls(
    listener: TcpListener,
    config: watch::Receiver<Arc<ServerConfig>>,
    mutual: bool,
    connections: Connections,
) {
    loop {
        let (stream, address) = accepted(&listener).await;
        let (acceptor, connections) = (TlsAcceptor::from(config.borrow().clone()), connections.clone());
        tokio::spawn(async move {
            match handshake(acceptor, stream, address, mutual).await {
                // Where nobody takes it, the process is about to end.
                Ok(connection) => drop(connections.send(Ok(connection)).await),
                Err(error) => tracing::warn!(%address, error, "connection refused"),
            }
        });
    }
}

async fn handshake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    mutual: bool,
) -> Result<Connection, String> {
    let stream = timeout(HANDSHAKE, acceptor.accept(stream)).await.map_err(|_| "the handshake takes too long")?;
    let stream = stream.map_err(|error| error.to_string())?;
    let identity = if mutual {
        let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let certificate = certificate.ok_or("there is no client certificate")?;
        Some(Identity::of_certificate(certificate).map_err(|error| error.to_string())?)
    } else {
        None
    };
    Ok(Connection { stream: Box::pin(stream), peer: Peer { address, identity } })
}

trait Stream: AsyncRead + AsyncWrite + Send {}
impl<S: AsyncRead + AsyncWrite + Send> Stream for S {}

/// A connection with what is known of its other end.
struct Connection {
    stream: Pin<Box<dyn Stream>>,
    peer: Peer,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.stream.as_mut().poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_shutdown(cx)
    }
}
