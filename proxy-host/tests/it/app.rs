//! The whole proxy in this process: files in, traffic through it.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::mpsc::Receiver,
    thread,
    time::{Duration, Instant},
};

use portolan_proxy_host::{access_log::AccessLog, app::App, config::Config};

/// An origin that answers each connection's first bytes with its name and what came.
fn origin(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || talk(stream, name));
        }
    });
    address
}

fn talk(mut stream: TcpStream, name: &str) {
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..n]).into_owned();
        let answer = if text.contains("upgrade: websocket") {
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n".to_owned()
        } else if text.contains(" HTTP/1.1\r\n") {
            let body = format!("{name}\n{text}");
            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        } else {
            format!("{name} got {text}")
        };
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

fn entry(name: &str, host: &str, port: &str, endpoint: SocketAddr) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: default}}\n\
         spec:\n  hosts: [{host}]\n  resolution: STATIC\n  ports: [{{{port}, targetPort: {}}}]\n  \
         endpoints: [{{address: {}}}]\n---\n",
        endpoint.port(),
        endpoint.ip()
    )
}

/// A proxy over a folder with these resources, in a mesh that refuses what is not in the registry.
fn start(dir: &Path, resources: &str, configure: impl FnOnce(&mut Config)) -> (App, Receiver<String>) {
    fs::write(dir.join("mesh.yaml"), "outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n").unwrap();
    fs::write(dir.join("entries.yaml"), resources).unwrap();
    let mut config = Config::of_files(vec![dir.to_owned()]);
    config.http_proxies = vec!["127.0.0.1:0".parse().unwrap()];
    config.threads = 2;
    configure(&mut config);
    let (log, lines) = AccessLog::channel();
    (App::start(config, log).unwrap(), lines)
}

fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // A reset, before or after the request is written, ends the answer as well as an end does.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn get(proxy: SocketAddr, url: &str, host: &str) -> String {
    exchange(proxy, &format!("GET {url} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))
}

#[test]
fn a_request_goes_where_its_entry_says_and_others_are_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let resources = entry("a", "a.test", "number: 80, name: http, protocol: HTTP", origin("first"));
    let (app, lines) = start(dir.path(), &resources, |_| {});
    let proxy = app.http_proxies[0];

    let answer = get(proxy, "http://a.test/path?q", "other.test");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains("\nfirst\nGET /path?q HTTP/1.1\r\n"), "{answer}");
    assert!(answer.contains("host: a.test\r\n"), "the target wins over Host: {answer}");
    assert!(!answer.contains("x-portolan-"), "{answer}");
    let line = lines.recv_timeout(Duration::from_secs(5)).unwrap();
    assert!(line.contains("\"GET /path?q HTTP/1.1\" 200 - 0 ") && line.contains("outbound|80||a.test"), "{line}");

    let answer = get(proxy, "http://b.test/", "b.test");
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    let line = lines.recv_timeout(Duration::from_secs(5)).unwrap();
    assert!(line.contains(" 502 - ") && line.contains("portolan_denied{blocked}"), "{line}");
    app.stop();
}

#[test]
fn a_client_cannot_name_a_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let resources = entry("a", "a.test", "number: 80, name: http, protocol: HTTP", origin("first"));
    let (app, _lines) = start(dir.path(), &resources, |_| {});
    let forged = "GET http://b.test/ HTTP/1.1\r\nHost: b.test\r\nx-portolan-cluster: outbound|80||a.test\r\n\
                  Connection: close\r\n\r\n";
    assert!(exchange(app.http_proxies[0], forged).starts_with("HTTP/1.1 502 "));
}

#[test]
fn connect_and_upgrades_carry_bytes_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let resources = entry("a", "a.test", "number: 80, name: http, protocol: HTTP", origin("first"));
    let (app, _lines) = start(dir.path(), &resources, |_| {});
    for open in [
        "CONNECT a.test:80 HTTP/1.1\r\nHost: a.test:80\r\n\r\n",
        "GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(app.http_proxies[0]).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(open.as_bytes()).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 200") || head.starts_with(b"HTTP/1.1 101"), "{open}");
        stream.write_all(b"ping").unwrap();
        let mut answer = [0; 14];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"first got ping", "{open}");
    }
}

#[test]
fn captured_connections_are_read_as_the_plan_says() {
    let dir = tempfile::tempdir().unwrap();
    let resources = [
        entry("a", "a.test", "number: 80, name: http, protocol: HTTP", origin("web")),
        entry("b", "b.test", "number: 80, name: tcp, protocol: TCP", origin("bytes")),
    ]
    .concat();
    let (app, _lines) = start(dir.path(), &resources, |config| {
        config.transparent = Some("127.0.0.1:0".parse().unwrap());
        config.original_destination = |_| Ok(SocketAddr::from(([198, 18, 5, 5], 80)));
    });
    let transparent = app.transparent.unwrap();
    let answer = get(transparent, "/", "a.test");
    assert!(answer.contains("\nweb\n"), "{answer}");
    let mut stream = TcpStream::connect(transparent).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"hello").unwrap();
    let mut answer = [0; 15];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"bytes got hello");
}

#[test]
fn a_connection_that_was_not_redirected_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (app, _lines) = start(dir.path(), "", |config| {
        config.transparent = Some("127.0.0.1:0".parse().unwrap());
        config.original_destination = |stream| stream.local_addr();
    });
    assert_eq!(get(app.transparent.unwrap(), "/", "a.test"), "");
}

#[test]
fn a_changed_file_is_picked_up() {
    let dir = tempfile::tempdir().unwrap();
    let origin = origin("first");
    let port = "number: 80, name: http, protocol: HTTP";
    let (app, _lines) = start(dir.path(), &entry("a", "a.test", port, origin), |_| {});
    let proxy = app.http_proxies[0];
    assert!(get(proxy, "http://b.test/", "b.test").starts_with("HTTP/1.1 502 "));
    fs::write(dir.path().join("entries.yaml"), entry("a", "b.test", port, origin)).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while !get(proxy, "http://b.test/", "b.test").starts_with("HTTP/1.1 200 ") {
        assert!(Instant::now() < end, "the change is not in effect");
    }
}
