//! The services over TCP: who may connect, as whom, and what follows when certificates change.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use portolan_controller::embed::Controller;
use portolan_controller::model::MeshConfig;
use portolan_controller::serve::admin::Admin;
use portolan_controller::serve::tcp::{TlsFiles, serve};
use portolan_proto::v1::registry_client::RegistryClient;
use portolan_proto::v1::{Scope, Subscribe, WatchRequest, WatchResponse, watch_request::Message};
use portolan_registry::page::FORMAT;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate with its key, both PEM.
fn certificate(authority: &Authority, dns: &[&str], uri: Option<&str>) -> (String, String) {
    let names: Vec<String> = dns.iter().map(|n| (*n).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.subject_alt_names.extend(uri.map(|uri| SanType::URI(uri.try_into().unwrap())));
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, authority).unwrap().pem(), key.serialize_pem())
}

fn shop(authority: &Authority) -> (String, String) {
    certificate(authority, &[], Some("spiffe://cluster.local/ns/shop/sa/cart"))
}

/// A controller that serves, until it is dropped.
struct Served {
    controller: Controller,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    ended: tokio::task::JoinHandle<()>,
}

async fn served(tls: Option<TlsFiles>) -> Served {
    let controller = Controller::empty(MeshConfig::default()).unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = controller.clone();
    let ended = tokio::spawn(async move {
        let stop = async { stopped.await.unwrap_or_default() };
        serve(&serving, listener, tls, stop).await.unwrap();
    });
    Served { controller, address, stop: Some(stop), ended }
}

fn write(folder: &Path, name: &str, (certificate, key): &(String, String)) -> (std::path::PathBuf, std::path::PathBuf) {
    let paths = (folder.join(format!("{name}.pem")), folder.join(format!("{name}-key.pem")));
    // The key first, so that a moment of disagreement is as likely as it will be in life.
    std::fs::write(&paths.1, key).unwrap();
    std::fs::write(&paths.0, certificate).unwrap();
    paths
}

/// Mutual TLS with this authority on both sides.
async fn mutual(folder: &Path, authority: &Authority) -> Served {
    let (certificate, key) = write(folder, "server", &certificate(authority, &["controller.test"], None));
    let client_ca = folder.join("ca.pem");
    std::fs::write(&client_ca, authority.pem()).unwrap();
    served(Some(TlsFiles { certificate, key, client_ca: Some(client_ca) })).await
}

async fn tls(address: SocketAddr, trust: &Authority, own: Option<&(String, String)>) -> Result<Channel, String> {
    let mut roots = RootCertStore::empty();
    roots.add(trust.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let connect = tower::service_fn(move |_| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from("controller.test").unwrap();
            connector.connect(name, stream).await.map(hyper_util::rt::TokioIo::new)
        }
    });
    let endpoint = Endpoint::from_static("http://controller.test");
    endpoint.connect_with_connector(connect).await.map_err(|error| format!("{error:?}"))
}

/// The first message for a subscriber of this namespace.
async fn subscribe(channel: Channel, namespace: &str) -> Result<WatchResponse, Status> {
    let scope = Scope { namespace: namespace.into(), ..Scope::default() };
    let subscribe = Subscribe { scope: Some(scope), format: FORMAT.into(), ..Subscribe::default() };
    let first = WatchRequest { message: Some(Message::Subscribe(subscribe)) };
    // A subscriber that says no more has left: what is sent to it then is a matter of luck.
    let requests = tokio_stream::iter([first]).chain(tokio_stream::pending());
    let stream = RegistryClient::new(channel).watch(requests).await?;
    Ok(stream.into_inner().message().await?.unwrap())
}

#[tokio::test]
async fn plain_text_is_served_and_ends_with_the_signal() {
    let mut served = served(None).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", served.address)).unwrap();
    let update = subscribe(endpoint.connect().await.unwrap(), "default").await.unwrap();
    assert!(update.last);
    served.stop.take().unwrap().send(()).unwrap();
    served.ended.await.unwrap();
    assert!(TcpStream::connect(served.address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn with_mutual_tls_the_namespace_is_the_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let ours = authority();
    let served = mutual(folder.path(), &ours).await;
    let own = shop(&ours);
    let channel = tls(served.address, &ours, Some(&own)).await.unwrap();
    assert!(subscribe(channel.clone(), "shop").await.unwrap().last);
    let lie = subscribe(channel, "bank").await.unwrap_err();
    assert_eq!(lie.code(), Code::PermissionDenied);
    assert!(lie.message().contains("bank") && lie.message().contains("ns/shop"), "{}", lie.message());
    let denied = served.controller.counters().all().into_iter().find(|(name, _)| *name == "denied").unwrap();
    assert_eq!(denied.1, 1);
}

#[tokio::test]
async fn without_a_certificate_of_ours_nobody_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (authority(), authority());
    let served = mutual(folder.path(), &ours).await;
    let nameless = certificate(&ours, &["cart.test"], None);
    for (what, own) in [("none", None), ("foreign", Some(shop(&theirs))), ("nameless", Some(nameless))] {
        // With TLS 1.3 the refusal may come after the client's part of the handshake.
        let refused = match tls(served.address, &ours, own.as_ref()).await {
            Ok(channel) => subscribe(channel, "shop").await.is_err(),
            Err(_) => true,
        };
        assert!(refused, "{what}");
    }
}

#[tokio::test]
async fn a_new_certificate_counts_for_new_connections() {
    let folder = tempfile::tempdir().unwrap();
    let (before, after) = (authority(), authority());
    let served = mutual(folder.path(), &before).await;
    let own = shop(&before);
    let held = tls(served.address, &before, Some(&own)).await.unwrap();
    assert!(subscribe(held.clone(), "shop").await.is_ok());
    write(folder.path(), "server", &certificate(&after, &["controller.test"], None));
    let end = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    while tls(served.address, &after, Some(&own)).await.is_err() {
        assert!(tokio::time::Instant::now() < end, "the new certificate is not used");
    }
    assert!(subscribe(held, "shop").await.is_ok(), "what is connected stays connected");
    // A broken file changes nothing.
    std::fs::write(folder.path().join("server.pem"), "nonsense").unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    assert!(tls(served.address, &after, Some(&own)).await.is_ok());
}

#[tokio::test]
async fn files_that_make_no_tls_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = write(folder.path(), "server", &certificate(&authority(), &["a.test"], None));
    let other = write(folder.path(), "other", &shop(&authority()));
    let files = |certificate: &Path, key: &Path| TlsFiles {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        client_ca: None,
    };
    assert!(files(&certificate, &key).load().is_ok());
    for (wrong, named) in [
        (files(&folder.path().join("none.pem"), &key), "none.pem"),
        (files(&key, &key), "server-key.pem: no certificate in it"),
        (files(&certificate, &other.1), "other-key.pem"),
    ] {
        let error = wrong.load().unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

async fn page(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn the_admin_port_says_how_it_is() {
    let served = served(None).await;
    let admin = Admin::new(served.controller.clone());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let at = listener.local_addr().unwrap();
    let router = admin.router();
    tokio::spawn(async move { axum::serve(listener, router).await });
    assert!(page(at, "/ready").await.starts_with("HTTP/1.1 503"));
    admin.set_ready(true);
    assert!(page(at, "/ready").await.starts_with("HTTP/1.1 200"));
    assert!(page(at, "/healthz").await.starts_with("HTTP/1.1 200"));

    let channel = Endpoint::from_shared(format!("http://{}", served.address)).unwrap().connect().await.unwrap();
    let subscribe = Subscribe {
        scope: Some(Scope { namespace: "shop".into(), ..Scope::default() }),
        subscriber: "cart-7#1".into(),
        format: FORMAT.into(),
        ..Subscribe::default()
    };
    let (say, requests) = tokio::sync::mpsc::unbounded_channel();
    say.send(WatchRequest { message: Some(Message::Subscribe(subscribe)) }).unwrap();
    let requests = tokio_stream::wrappers::UnboundedReceiverStream::new(requests);
    let mut stream = RegistryClient::new(channel).watch(requests).await.unwrap().into_inner();
    let version = stream.message().await.unwrap().unwrap().version;
    let nack = portolan_proto::v1::Nack { version, reason: "page 3: checksum".into() };
    say.send(WatchRequest { message: Some(Message::Nack(nack)) }).unwrap();
    // The controller answers a refusal only with the next change.
    served.controller.apply(Vec::new()).await.unwrap();
    stream.message().await.unwrap().unwrap();

    let metrics = page(at, "/metrics").await;
    for line in ["portolan_subscribers 1\n", "portolan_nacks_total 1\n", "portolan_scopes 1\n"] {
        assert!(metrics.contains(line), "{line} not in {metrics}");
    }
    let dump = page(at, "/config_dump").await;
    let dump: serde_json::Value = serde_json::from_str(dump.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(dump["subscribers"][0]["name"], "cart-7#1");
    assert_eq!(dump["subscribers"][0]["refused"], format!("version {version}: page 3: checksum"));
    assert_eq!(dump["scopes"][0]["namespace"], "shop");
}
