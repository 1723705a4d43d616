//! TLS of clients that ends here: a gateway's servers. Files are looked at for each connection and read when they have
//! changed; what cannot be read leaves the last good state in force.

use std::{
    cell::RefCell,
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use ::http::HeaderValue;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use portolan_proto::v1;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    SupportedCipherSuite, SupportedProtocolVersion,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::{
        ClientHello, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{client_certificate, rewind::Rewind};
use crate::{
    upstream::tls::{TlsError, certificates, has_name, stamp},
    worker::Worker,
};

/// What a server says of TLS.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Settings {
    certificates: Vec<Files>,
    authorities: Option<Source>,
    client_required: bool,
    /// Any certificate of a client will do.
    any_client: bool,
    client_names: Vec<String>,
    /// SHA-256 of public keys and of certificates that clients may have; without any, all may.
    pins: Vec<[u8; 32]>,
    revocations: Option<PathBuf>,
    versions: (u32, u32),
    ciphers: Vec<String>,
    protocols: Vec<String>,
}

/// Certificate and key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Files {
    Paths(PathBuf, PathBuf),
    Secret(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Source {
    Path(PathBuf),
    Secret(String),
}

/// Why a server's TLS cannot begin.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error(transparent)]
    File(#[from] TlsError),
    #[error("credentialName {0:?}: give --credentials DIR, in which it is a folder with tls.crt and tls.key")]
    NoFolder(String),
    #[error("tls.mode ISTIO_MUTUAL: give --mesh-certificates DIR, with cert-chain.pem, key.pem and root-cert.pem")]
    NoMesh,
    #[error("credentialName {0:?} cannot be the name of a folder")]
    Name(String),
    #[error("none of the cipher suites {0:?} is known; TLS 1.3 has its own")]
    Ciphers(Vec<String>),
    #[error("TLS {0:?} is not spoken here: 1.2 and 1.3 are")]
    Versions((u32, u32)),
    #[error("{path}: {1}", path = .0.display())]
    Key(PathBuf, rustls::Error),
    #[error("{path}: {1}", path = .0.display())]
    Authorities(PathBuf, String),
    #[error("{0}")]
    Tls(#[from] rustls::Error),
}

/// What the names of the mesh's files begin with.
const MESH: &str = "mesh-certificates:";

/// The digests that a message has. One that cannot be read is nobody's.
fn pins(message: &v1::ServerTls) -> Vec<[u8; 32]> {
    let keys = message.client_keys.iter().map(|key| BASE64_STANDARD.decode(key).unwrap_or_default());
    let hashes = message.client_hashes.iter().map(|hash| {
        let digits = hash.replace(':', "");
        let byte = |at: usize| digits.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
        (0..digits.len()).step_by(2).map_while(byte).collect()
    });
    keys.chain(hashes).map(|digest| digest.try_into().unwrap_or_default()).collect()
}

/// Where this proxy has its files.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Folders<'f> {
    /// Secrets that Gateways name.
    pub(super) credentials: Option<&'f Path>,
    /// The mesh's certificates.
    pub(super) mesh: Option<&'f Path>,
}

impl Folders<'_> {
    fn file(self, path: &Path) -> Result<PathBuf, Unusable> {
        match path.to_str().and_then(|path| path.strip_prefix(MESH)) {
            Some(file) => Ok(self.mesh.ok_or(Unusable::NoMesh)?.join(file)),
            None => Ok(path.to_owned()),
        }
    }
}

impl Settings {
    /// Reads the message.
    #[must_use]
    pub fn read(message: &v1::ServerTls) -> Self {
        let files = |files: &v1::ServerCertificate| match files.secret.as_str() {
            "" => Files::Paths(files.certificate.clone().into(), files.key.clone().into()),
            secret => Files::Secret(secret.to_owned()),
        };
        let ca = Some(&message.ca).filter(|ca| !ca.is_empty());
        Self {
            certificates: message.certificates.iter().map(files).collect(),
            authorities: ca.map(|ca| match message.ca_of_secret {
                true => Source::Secret(ca.clone()),
                false => Source::Path(ca.into()),
            }),
            client_required: message.client_required,
            any_client: message.any_client,
            client_names: message.client_names.clone(),
            pins: pins(message),
            revocations: Some(&message.revocations).filter(|path| !path.is_empty()).map(PathBuf::from),
            versions: (message.min_version, message.max_version),
            ciphers: message.ciphers.clone(),
            protocols: message.protocols.clone(),
        }
    }
}

/// The settings with each secret as files.
struct Located {
    certificates: Vec<(PathBuf, PathBuf)>,
    authorities: Option<PathBuf>,
    revocations: Option<PathBuf>,
}

/// When each of the files was changed, as far as that is known.
type Stamps = Vec<Option<SystemTime>>;

impl Located {
    fn of(settings: &Settings, folders: Folders<'_>) -> Result<Self, Unusable> {
        let credentials = folders.credentials;
        let pair = |files: &Files| match files {
            Files::Paths(certificate, key) => Ok((folders.file(certificate)?, folders.file(key)?)),
            Files::Secret(name) => {
                let folder = folder(name, credentials)?;
                Ok((folder.join("tls.crt"), folder.join("tls.key")))
            }
        };
        let authorities = settings.authorities.as_ref().map(|source| match source {
            Source::Path(path) => folders.file(path),
            Source::Secret(name) => folder(name, credentials).map(|folder| folder.join("ca.crt")),
        });
        Ok(Self {
            certificates: settings.certificates.iter().map(pair).collect::<Result<_, Unusable>>()?,
            authorities: authorities.transpose()?,
            revocations: settings.revocations.clone(),
        })
    }

    fn stamps(&self) -> Stamps {
        let files = self.certificates.iter().flat_map(|(certificate, key)| [certificate, key]);
        files.chain(&self.authorities).chain(&self.revocations).map(|path| stamp(Some(path))).collect()
    }
}

/// The folder of a secret, within that of all.
fn folder(name: &str, credentials: Option<&Path>) -> Result<PathBuf, Unusable> {
    let plain = name.strip_prefix("kubernetes://").unwrap_or(name);
    if plain.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(Unusable::Name(name.to_owned()));
    }
    Ok(credentials.ok_or_else(|| Unusable::NoFolder(name.to_owned()))?.join(plain))
}

/// What was made of settings and files, and how old the files were then.
struct Loaded {
    stamps: Stamps,
    made: Option<Made>,
}

/// What a handshake needs.
#[derive(Clone)]
struct Made {
    config: Arc<ServerConfig>,
    /// Names of the first certificate that are URIs.
    own: Arc<[String]>,
}

/// A handshake that is done.
pub(super) struct Accepted {
    pub(super) stream: TlsStream<Rewind>,
    /// What an upstream is told of the client's certificate, if it showed one.
    pub(super) client: Option<HeaderValue>,
}

/// What each server's TLS begins with.
#[derive(Default)]
pub struct Terminations(RefCell<HashMap<Arc<Settings>, Loaded>>);

impl Terminations {
    /// Forgets settings that nobody has any more.
    pub fn forget(&self) {
        self.0.borrow_mut().retain(|settings, _| Arc::strong_count(settings) > 1);
    }

    /// Does the handshake with a client; `None`: there is no connection any more.
    pub(super) async fn accept(&self, settings: &Arc<Settings>, client: Rewind, worker: &Worker) -> Option<Accepted> {
        let mesh = worker.config.identity.mesh_certificates.as_deref().map(Path::new);
        let Made { config, own } =
            self.made(settings, Folders { credentials: worker.config.credentials.as_deref(), mesh })?;
        let handshake = TlsAcceptor::from(config).accept(client);
        let (time, mut stop) = (worker.config.http.header_time, worker.stop.clone());
        let late = async {
            if time.is_zero() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(time).await;
        };
        tokio::select! {
            done = handshake => match done {
                Ok(stream) => {
                    let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
                    let client = shown.and_then(|shown| client_certificate::header(shown, &own));
                    Some(Accepted { stream, client })
                }
                Err(error) => {
                    tracing::debug!("TLS of a client: {error}");
                    None
                }
            },
            () = late => None,
            _ = stop.wait_for(|stop| *stop) => None,
        }
    }

    fn made(&self, settings: &Arc<Settings>, folders: Folders<'_>) -> Option<Made> {
        let located = Located::of(settings, folders);
        let stamps = located.as_ref().map(Located::stamps).unwrap_or_default();
        let mut known = self.0.borrow_mut();
        if let Some(loaded) = known.get(settings)
            && loaded.stamps == stamps
        {
            return loaded.made.clone();
        }
        let before = known.get(settings).and_then(|loaded| loaded.made.clone());
        let made = match located.and_then(|located| load(settings, &located)) {
            Ok(made) => Some(made),
            Err(error) => {
                let then = if before.is_some() { "the last good certificate stays" } else { "its clients are refused" };
                tracing::error!("TLS of a gateway's server: {error}; {then}");
                before
            }
        };
        known.insert(settings.clone(), Loaded { stamps, made: made.clone() });
        made
    }
}

fn load(settings: &Settings, located: &Located) -> Result<Made, Unusable> {
    let mut provider = ring::default_provider();
    if !settings.ciphers.is_empty() {
        let known = |suite: &SupportedCipherSuite| match suite {
            SupportedCipherSuite::Tls13(_) => true,
            SupportedCipherSuite::Tls12(_) => settings.ciphers.iter().any(|name| is_cipher(name, *suite)),
        };
        provider.cipher_suites.retain(known);
        if !provider.cipher_suites.iter().any(|suite| matches!(suite, SupportedCipherSuite::Tls12(_))) {
            return Err(Unusable::Ciphers(settings.ciphers.clone()));
        }
    }
    let provider = Arc::new(provider);
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&versions(settings)?)?;
    let builder = match verifier(settings, located, &provider)? {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut keys = Vec::new();
    for (certificate, key) in &located.certificates {
        let read = |error| TlsError::File { path: key.clone(), error };
        let private = PrivateKeyDer::from_pem_file(key).map_err(read)?;
        let fits = |error| Unusable::Key(key.clone(), error);
        keys.push(Arc::new(CertifiedKey::from_der(certificates(certificate)?, private, &provider).map_err(fits)?));
    }
    let first = keys.first().and_then(|key| key.cert.first());
    let own = first.map(|first| client_certificate::uris(first)).unwrap_or_default().into();
    let mut config = builder.with_cert_resolver(Arc::new(Certificates(keys)));
    config.alpn_protocols = settings.protocols.iter().map(|name| name.clone().into_bytes()).collect();
    Ok(Made { config: Arc::new(config), own })
}

/// Versions by Envoy's numbers; 0 is the default, which is from 1.2 on.
fn versions(settings: &Settings) -> Result<Vec<&'static SupportedProtocolVersion>, Unusable> {
    let (least, most) = settings.versions;
    let most = if most == 0 { 4 } else { most };
    let some: Vec<_> =
        [(3, &TLS12), (4, &TLS13)].into_iter().filter(|(n, _)| (least..=most).contains(n)).map(|(_, v)| v).collect();
    if some.is_empty() { Err(Unusable::Versions(settings.versions)) } else { Ok(some) }
}

/// Whether OpenSSL's name, `ECDHE-RSA-AES128-GCM-SHA256`, is that of this suite, `TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256`.
fn is_cipher(name: &str, suite: SupportedCipherSuite) -> bool {
    let letters = |text: &str| text.replace(['-', '_'], "").replace("WITH", "").replace("POLY1305SHA256", "POLY1305");
    let own = suite.suite();
    own.as_str().and_then(|own| own.strip_prefix("TLS_")).is_some_and(|own| letters(own) == letters(name))
}

/// A server's certificates: the first that the client can check.
#[derive(Debug)]
struct Certificates(Vec<Arc<CertifiedKey>>);

impl ResolvesServerCert for Certificates {
    fn resolve(&self, client: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let can = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(client.signature_schemes()).is_some();
        self.0.iter().find(can).or(self.0.first()).cloned()
    }
}

fn verifier(
    settings: &Settings,
    located: &Located,
    provider: &Arc<CryptoProvider>,
) -> Result<Option<Arc<dyn ClientCertVerifier>>, Unusable> {
    let (required, names, pins) = (settings.client_required, settings.client_names.clone(), settings.pins.clone());
    let Some(path) = &located.authorities else {
        let verifier = Clients { inner: None, names, pins, required, provider: provider.clone() };
        // Without authorities no client is asked, unless any will do.
        return Ok(settings.any_client.then(|| Arc::new(verifier) as Arc<dyn ClientCertVerifier>));
    };
    let mut roots = RootCertStore::empty();
    for authority in certificates(path)? {
        roots.add(authority).map_err(|error| Unusable::Key(path.clone(), error))?;
    }
    let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    if let Some(path) = &located.revocations {
        let failed = |error| TlsError::File { path: path.clone(), error };
        let all = CertificateRevocationListDer::pem_file_iter(path).map_err(failed)?;
        builder = builder.with_crls(all.collect::<Result<Vec<_>, _>>().map_err(failed)?);
    }
    let builder = if required { builder } else { builder.allow_unauthenticated() };
    let inner = builder.build().map_err(|error| Unusable::Authorities(path.clone(), error.to_string()))?;
    Ok(Some(Arc::new(Clients { inner: Some(inner), names, pins, required, provider: provider.clone() })))
}

/// Looks at a client's certificate: a chain to one of the authorities, and a name of the list.
#[derive(Debug)]
struct Clients {
    /// `None`: any certificate will do.
    inner: Option<Arc<dyn ClientCertVerifier>>,
    names: Vec<String>,
    pins: Vec<[u8; 32]>,
    required: bool,
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for Clients {
    fn client_auth_mandatory(&self) -> bool {
        self.required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.as_ref().map_or(&[], |inner| inner.root_hint_subjects())
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if let Some(inner) = &self.inner {
            inner.verify_client_cert(end_entity, intermediates, now)?;
        }
        if !self.names.is_empty() && !has_name(end_entity, &self.names) {
            return Err(rustls::Error::InvalidCertificate(CertificateError::NotValidForName));
        }
        if !self.pins.is_empty() && !client_certificate::digests(end_entity).iter().any(|own| self.pins.contains(own)) {
            return Err(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        Ok(ClientCertVerified::assertion())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openssl_names_are_those_of_suites() {
        let known: Vec<SupportedCipherSuite> = ring::default_provider().cipher_suites;
        for name in ["ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-RSA-CHACHA20-POLY1305"] {
            assert_eq!(known.iter().filter(|suite| is_cipher(name, **suite)).count(), 1, "{name}");
        }
        assert!(!known.iter().any(|suite| is_cipher("AES128-SHA", *suite)));
    }

    #[test]
    fn a_secret_stays_within_its_folder() {
        let at = Some(Path::new("/c"));
        assert_eq!(folder("own", at).unwrap(), Path::new("/c/own"));
        assert_eq!(folder("kubernetes://ns/own", at).unwrap(), Path::new("/c/ns/own"));
        for name in ["../x", "/x", "a/../../x", ""] {
            assert!(matches!(folder(name, at), Err(Unusable::Name(_))), "{name}");
        }
        assert!(matches!(folder("own", None), Err(Unusable::NoFolder(_))));
    }
}
