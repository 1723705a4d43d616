//! A gateway while its resources and certificates change. What its ports do with traffic, the cases in
//! `tests/conformance` say.

use crate::proxy_support;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use portolan_proxy_host::{app::App, config::Role};
use proxy_support::{HTTP, PATIENCE, entry, get, origin, start, until, write};
use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme, StreamOwned,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use x509_parser::prelude::FromDer as _;

/// A port that nobody has right now.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn gateway(port: SocketAddr, server: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: g, namespace: default}}\nspec:\n  \
         servers: [{{port: {{number: {}, name: p, protocol: {server}]\n---\n\
         apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: v, namespace: default}}\nspec:\n  \
         hosts: ['*']\n  gateways: [g]\n  http: [{{route: [{{destination: {{host: a.test, port: {{number: 80}}}}}}]}}]\n---\n",
        port.port()
    )
}

fn run(dir: &Path, resources: &str, credentials: Option<&Path>) -> App {
    let (app, _lines) = start(dir, resources, |config| {
        config.identity.role = Role::Gateway;
        config.http_proxies.clear();
        config.credentials = credentials.map(Path::to_owned);
    });
    app
}

fn certificate(folder: &Path, common: &str) {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, common);
    let key = KeyPair::generate().unwrap();
    fs::create_dir_all(folder).unwrap();
    for (name, text) in [("tls.key", key.serialize_pem()), ("tls.crt", params.self_signed(&key).unwrap().pem())] {
        // Whole or not at all, as a mounted Secret changes.
        fs::write(folder.join("new"), text).unwrap();
        fs::rename(folder.join("new"), folder.join(name)).unwrap();
    }
}

#[derive(Debug)]
struct Anybody(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Who the server says it is, what was agreed on and the answer to a GET; `None`: it does not take the connection.
fn greeted(address: SocketAddr, protocol: &str) -> Option<(String, Option<Vec<u8>>, String)> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
    let mut config =
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider))).with_no_client_auth();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let connection = ClientConnection::new(Arc::new(config), ServerName::try_from("a.test").unwrap()).unwrap();
    let stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut tls = StreamOwned::new(connection, stream);
    tls.write_all(b"GET / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    // An end without a goodbye is an end.
    let _ = tls.read_to_end(&mut answer);
    let chain = tls.conn.peer_certificates()?;
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(&chain[0]).unwrap();
    let common = certificate.subject().iter_common_name().next()?.as_str().unwrap().to_owned();
    Some((common, tls.conn.alpn_protocol().map(<[u8]>::to_vec), String::from_utf8_lossy(&answer).into_owned()))
}

/// Tries until the server says it is this.
fn known_as(address: SocketAddr, common: &str) -> (Option<Vec<u8>>, String) {
    let end = Instant::now() + PATIENCE;
    loop {
        match greeted(address, "http/1.1") {
            Some((name, protocol, answer)) if name == common => return (protocol, answer),
            other => assert!(Instant::now() < end, "not {common}: {other:?}"),
        }
        thread::park_timeout(Duration::from_millis(20));
    }
}

/// Waits until somebody listens there, or nobody does.
fn open(address: SocketAddr, wanted: bool) {
    let end = Instant::now() + PATIENCE;
    while TcpStream::connect(address).is_ok() != wanted {
        assert!(Instant::now() < end, "{address} is not open: {wanted}");
        thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn ports_come_and_go_with_the_resources() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (free(), free());
    let a = entry("a", "a.test", HTTP, origin("A", Duration::ZERO));
    let at = |port| a.clone() + &gateway(port, "HTTP}, hosts: ['*']}");
    let app = run(dir.path(), &at(first), None);
    // What was asked for at the start is there when the proxy says that it listens.
    assert!(get(first, "/").ends_with("\r\n\r\nA"));
    write(dir.path(), &at(second));
    open(second, true);
    until(second, "/", "\r\n\r\nA");
    open(first, false);
    drop(app);
}

#[test]
fn a_secret_is_a_folder_and_counts_from_the_next_connection_on() {
    let (dir, secrets) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let port = free();
    let a = entry("a", "a.test", HTTP, origin("A", Duration::ZERO));
    let resources = a + &gateway(port, "HTTPS}, hosts: [a.test], tls: {mode: SIMPLE, credentialName: own}}");
    let app = run(dir.path(), &resources, Some(secrets.path()));
    assert_eq!(greeted(port, "h2"), None, "there is no certificate yet");
    certificate(&secrets.path().join("own"), "first");
    let (protocol, answer) = known_as(port, "first");
    assert_eq!(protocol.as_deref(), Some(&b"http/1.1"[..]));
    assert!(answer.ends_with("\r\n\r\nA"), "{answer}");
    certificate(&secrets.path().join("own"), "second");
    known_as(port, "second");
    fs::write(secrets.path().join("own/tls.crt"), "nonsense").unwrap();
    known_as(port, "second");
    drop(app);
}
