//! TLS towards endpoints: what a cluster says of it, and connections of that kind. Files are looked at for each
//! connection and read when they have changed, so that a new certificate counts from the next connection on.

use std::{
    cell::RefCell,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    client::{WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor},
    crypto::CryptoProvider,
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _,
    },
    server::ParsedCertificate,
};
use tokio_rustls::TlsConnector;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer as _,
};

use super::connect::{ConnectError, Stream};

/// What a cluster says of TLS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// Server name to ask for.
    pub name: Option<String>,
    /// Without one: the host that the request is for.
    pub name_of_host: bool,
    /// Authorities of the server's certificate, PEM; without them any certificate is taken.
    pub authorities: Option<PathBuf>,
    /// Lists of certificates that the authorities have revoked, PEM.
    pub revoked: Option<PathBuf>,
    /// Names of which the server's certificate must have one; none: no matter.
    pub names: Vec<String>,
    /// The certificate must also be for the host that the request is for.
    pub certified_host: bool,
    /// Own certificate chain and key, PEM.
    pub own: Option<(PathBuf, PathBuf)>,
    /// Protocols to offer.
    pub protocols: Vec<String>,
}

/// Files that make no TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("{}: {error}", path.display())]
    File { path: PathBuf, error: rustls::pki_types::pem::Error },
    #[error("{}: no certificate in it", .0.display())]
    Empty(PathBuf),
    #[error("{}: {error}", path.display())]
    Unusable { path: PathBuf, error: rustls::Error },
    #[error("{}: {error}", path.display())]
    Revoked { path: PathBuf, error: rustls::client::VerifierBuilderError },
}

/// When each of the files was changed, as far as that is known.
type Stamps = [Option<SystemTime>; 4];

/// What was made of files that were changed then.
type Loaded = Option<(Stamps, Arc<ClientConfig>)>;

/// Opens TLS on connections of one cluster.
#[derive(Default)]
pub struct Connector {
    /// For bytes, and for requests, whose host the certificate may have to name.
    loaded: RefCell<[Loaded; 2]>,
}

impl Connector {
    /// Does the handshake; `host` is the one that the request is for, `None` for bytes: as in Envoy those ask for no name of
    /// theirs, nor for one in the certificate.
    ///
    /// # Errors
    /// The files', or the server's certificate is not the expected one.
    pub async fn connect(&self, tls: &Tls, host: Option<&str>, stream: Stream) -> Result<Stream, ConnectError> {
        let config = self.config(tls, host.is_some()).map_err(|error| ConnectError::Tls(error.to_string()))?;
        let host = host.filter(|_| tls.name_of_host || tls.certified_host);
        let host = host.map(|host| host.trim_matches(['[', ']']).to_ascii_lowercase());
        let asked = tls.name.as_ref().or(host.as_ref().filter(|_| tls.name_of_host));
        // A name that is no name is not sent, as an address is not.
        let nameless = || ServerName::IpAddress(IpAddr::from([0, 0, 0, 0]).into());
        let name = asked.and_then(|name| ServerName::try_from(name.clone()).ok()).unwrap_or_else(nameless);
        match TlsConnector::from(config).connect(name, Box::new(stream)).await {
            Ok(stream) => Ok(Stream::Tls(Box::new(stream))),
            Err(error) => Err(ConnectError::Tls(error.to_string())),
        }
    }

    fn config(&self, tls: &Tls, of_request: bool) -> Result<Arc<ClientConfig>, TlsError> {
        let (certificate, key) = tls.own.as_ref().map(|(c, k)| (c.as_path(), k.as_path())).unzip();
        let stamps = [tls.authorities.as_deref(), tls.revoked.as_deref(), certificate, key].map(stamp);
        let slot = usize::from(of_request);
        if let Some((known, config)) = &self.loaded.borrow()[slot]
            && *known == stamps
        {
            return Ok(config.clone());
        }
        let config = Arc::new(load(tls, of_request)?);
        self.loaded.borrow_mut()[slot] = Some((stamps, config.clone()));
        Ok(config)
    }
}

pub(crate) fn stamp(path: Option<&Path>) -> Option<SystemTime> {
    path.and_then(|path| path.metadata().ok()).and_then(|metadata| metadata.modified().ok())
}

pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |error| TlsError::File { path: path.to_owned(), error };
    let all = CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if all.is_empty() { Err(TlsError::Empty(path.to_owned())) } else { Ok(all) }
}

fn load(tls: &Tls, of_request: bool) -> Result<ClientConfig, TlsError> {
    let unusable = |path: &Path| {
        let path = path.to_owned();
        move |error| TlsError::Unusable { path, error }
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = match &tls.authorities {
        None => None,
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates(path)? {
                roots.add(authority).map_err(unusable(path))?;
            }
            Some(roots)
        }
    };
    let revoked = match (&roots, &tls.revoked) {
        (Some(roots), Some(path)) => Some(revoked(path, roots, &provider)?),
        _ => None,
    };
    let (names, host) = (tls.names.clone(), tls.certified_host && of_request);
    let verifier = Verifier { provider: provider.clone(), roots, revoked, names, host };
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(unusable(Path::new("TLS")))?;
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match &tls.own {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let read = |error| TlsError::File { path: key.clone(), error };
            let private = PrivateKeyDer::from_pem_file(key).map_err(read)?;
            builder.with_client_auth_cert(certificates(certificate)?, private).map_err(unusable(certificate))?
        }
    };
    config.alpn_protocols = tls.protocols.iter().map(|name| name.clone().into_bytes()).collect();
    Ok(config)
}

/// What refuses certificates that the lists in a file name. As in Envoy each authority of a chain must have a list, and one
/// that is too old says nothing.
fn revoked(
    path: &Path,
    roots: &RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
    let failed = |error| TlsError::File { path: path.to_owned(), error };
    let lists = CertificateRevocationListDer::pem_file_iter(path).map_err(failed)?;
    let lists = lists.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if lists.is_empty() {
        return Err(TlsError::Empty(path.to_owned()));
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots.clone()), provider.clone())
        .with_crls(lists)
        .enforce_revocation_expiration()
        .build()
        .map_err(|error| TlsError::Revoked { path: path.to_owned(), error })
}

/// Looks at the server's certificate as Envoy does: a chain to one of the authorities, and a name of the list, which has
/// nothing to do with the name that was asked for.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    roots: Option<RootCertStore>,
    revoked: Option<Arc<WebPkiServerVerifier>>,
    names: Vec<String>,
    host: bool,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(roots) = &self.roots else { return Ok(ServerCertVerified::assertion()) };
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, algorithms)?;
        if let Some(revoked) = &self.revoked {
            match revoked.verify_server_cert(end_entity, intermediates, server_name, &[], now) {
                // It looks at the name last, for which there are rules of our own.
                Ok(_)
                | Err(rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                )) => {}
                Err(error) => return Err(error),
            }
        }
        let wrong = || rustls::Error::InvalidCertificate(CertificateError::NotValidForName);
        if !self.names.is_empty() && !has_name(end_entity, &self.names) {
            return Err(wrong());
        }
        if self.host && !has_name(end_entity, &[server_name.to_str().into_owned()]) {
            return Err(wrong());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Whether a certificate is for one of these names: DNS names, URIs or addresses, without the subject's common name.
pub(crate) fn has_name(certificate: &CertificateDer<'_>, names: &[String]) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return false };
    let held = certificate.extensions().iter().filter_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectAlternativeName(held) => Some(&held.general_names),
        _ => None,
    });
    held.flatten().any(|held| match held {
        GeneralName::DNSName(held) => names.iter().any(|name| dns_match(held, name)),
        GeneralName::URI(held) => names.iter().any(|name| name == held),
        GeneralName::IPAddress(held) => {
            let held = match **held {
                [a, b, c, d] => Some(IpAddr::from([a, b, c, d])),
                _ => <[u8; 16]>::try_from(*held).ok().map(IpAddr::from),
            };
            held.is_some_and(|held| names.iter().any(|name| name.parse() == Ok(held)))
        }
        _ => false,
    })
}

/// A star stands for one whole label, the first.
fn dns_match(held: &str, name: &str) -> bool {
    if held.eq_ignore_ascii_case(name) {
        return true;
    }
    let Some(parent) = held.strip_prefix("*.") else { return false };
    name.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest.eq_ignore_ascii_case(parent))
}

#[cfg(test)]
mod tests {
    use super::dns_match;

    #[test]
    fn a_star_stands_for_one_label() {
        assert!(dns_match("A.test", "a.test"));
        assert!(dns_match("*.a.test", "b.a.test"));
        for name in ["a.test", "c.b.a.test", ".a.test"] {
            assert!(!dns_match("*.a.test", name), "{name}");
        }
    }
}
