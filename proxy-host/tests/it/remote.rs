//! A controller elsewhere, and the role of a gateway.

use crate::proxy_support;

use std::{net::SocketAddr, path::PathBuf, sync::mpsc, thread, time::Duration};

use portolan_controller::{
    embed::{Controller, ControllerConfig},
    serve,
};
use portolan_proxy_host::config::{Role, Source};
use proxy_support::*;
use tokio::sync::oneshot;

/// A controller that serves over TCP until it is dropped.
struct Remote {
    address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Remote {
    fn start(paths: Vec<PathBuf>) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (sender, address) = mpsc::channel();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let controller = Controller::start(&ControllerConfig { paths, mesh: None }).await.unwrap();
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                sender.send(listener.local_addr().unwrap()).unwrap();
                let routes = serve::router(controller.publisher().clone(), controller.counters().clone());
                let incoming = tonic::transport::server::TcpIncoming::from(listener);
                let serving = tonic::transport::Server::builder().add_routes(routes).serve_with_incoming(incoming);
                tokio::select! {
                    ended = serving => ended.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        Self { address: address.recv_timeout(PATIENCE).unwrap(), _stop: stop }
    }
}

#[test]
fn a_controller_elsewhere_is_followed_and_outlived() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &entry("a", "a.test", HTTP, origin("first", Duration::ZERO)));
    let remote = Remote::start(vec![dir.path().to_owned()]);
    let elsewhere = tempfile::tempdir().unwrap();
    let (app, _lines) =
        start(elsewhere.path(), "", |config| config.source = Source::Controller(format!("http://{}", remote.address)));
    let (proxy, admin) = (app.http_proxies[0], app.admin.unwrap());
    until(admin, "/ready", "LIVE");
    assert!(get(proxy, "http://a.test/").ends_with("first"));
    assert!(get(proxy, "http://b.test/").starts_with("HTTP/1.1 502 "));
    let moved = entry("b", "b.test", HTTP, origin("other", Duration::ZERO));
    std::fs::write(dir.path().join("entries.yaml"), moved).unwrap();
    until(proxy, "http://b.test/", "other");
    // Without its controller it keeps to what it knows.
    drop(remote);
    until(admin, "/metrics", "portolan_snapshot_state 2\n");
    assert!(get(proxy, "http://b.test/").ends_with("other"));
    assert!(get(proxy, "http://a.test/").starts_with("HTTP/1.1 502 "));
}

#[test]
fn a_controller_that_is_not_there_means_503_and_not_ready() {
    let dir = tempfile::tempdir().unwrap();
    let (app, _lines) = start(dir.path(), "", |config| {
        // A port that nobody listens on.
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        config.source = Source::Controller(format!("http://{}", taken.local_addr().unwrap()));
    });
    let answer = get(app.http_proxies[0], "http://a.test/");
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("has not been received yet"), "{answer}");
    assert!(get(app.admin.unwrap(), "/ready").starts_with("HTTP/1.1 503 "));
    assert!(get(app.admin.unwrap(), "/healthz").starts_with("HTTP/1.1 200 "));
}

#[test]
fn a_gateway_knows_no_host_that_it_was_not_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let resources = entry("a", "a.test", HTTP, origin("first", Duration::ZERO));
    let (app, lines) = start(dir.path(), &resources, |config| config.identity.role = Role::Gateway);
    let answer = get(app.http_proxies[0], "http://b.test/");
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    let line = lines.recv_timeout(PATIENCE).unwrap();
    assert!(line.ends_with("\"portolan_denied{no_virtual_host}\" \"no_virtual_host\"\n"), "{line}");
}
