//! TLS towards a controller elsewhere. The files are read for every connection, so that a new certificate counts from the
//! next one on.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::Uri;

/// The files, and whom to expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControllerTls {
    /// Authorities of the controller's certificate, PEM.
    pub ca: PathBuf,
    /// Own certificate chain and key, PEM, for mutual TLS.
    pub own: Option<(PathBuf, PathBuf)>,
    /// Name that the controller's certificate must have; none: the host of its address.
    pub name: Option<String>,
}

/// Files that make no TLS.
#[derive(Debug, thiserror::Error)]
pub enum ControllerTlsError {
    /// One cannot be read as PEM.
    #[error("{}: {error}; check the path, its permissions, and that it is PEM", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: rustls::pki_types::pem::Error,
    },
    /// One holds no certificate.
    #[error("{}: no certificate in it", .0.display())]
    Empty(PathBuf),
    /// They cannot be used together.
    #[error("{}: {error}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: rustls::Error,
    },
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ControllerTlsError> {
    let failed = |error| ControllerTlsError::File { path: path.to_owned(), error };
    let all = CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if all.is_empty() { Err(ControllerTlsError::Empty(path.to_owned())) } else { Ok(all) }
}

impl ControllerTls {
    /// Reads the files.
    ///
    /// # Errors
    /// One of them cannot be used; the error names it.
    pub fn load(&self) -> Result<Arc<ClientConfig>, ControllerTlsError> {
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |error| ControllerTlsError::Unusable { path, error }
        };
        let mut roots = RootCertStore::empty();
        for authority in certificates(&self.ca)? {
            roots.add(authority).map_err(unusable(&self.ca))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(unusable(&self.ca))?.with_root_certificates(roots);
        let mut config = match &self.own {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let read = |error| ControllerTlsError::File { path: key.clone(), error };
                let private = PrivateKeyDer::from_pem_file(key).map_err(read)?;
                builder.with_client_auth_cert(certificates(certificate)?, private).map_err(unusable(certificate))?
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// Connects to the controller at this address.
    ///
    /// # Errors
    /// The network's, the files', or the certificate is not the expected one.
    pub async fn connect(&self, address: &Uri) -> io::Result<TlsStream<TcpStream>> {
        let host = address.host().unwrap_or_default().trim_matches(['[', ']']);
        let name = self.name.as_deref().unwrap_or(host).to_owned();
        let name = ServerName::try_from(name).map_err(io::Error::other)?;
        let config = self.load().map_err(io::Error::other)?;
        let stream = TcpStream::connect((host, address.port_u16().unwrap_or(443))).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(config).connect(name, stream).await
    }
}
