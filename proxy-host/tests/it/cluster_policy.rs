//! What DestinationRules and VirtualServices ask of the way to the endpoints: limits, ejection, copies, delays.

use crate::http_support;
use crate::proxy_support;

use std::{
    io::Read as _,
    net::SocketAddr,
    sync::{
        Arc, Condvar, Mutex,
        mpsc::{Receiver, channel},
    },
    thread,
    time::Instant,
};

use http_support::{answering, origin};
use portolan_proxy_host::app::App;
use proxy_support::{HTTP, PATIENCE, entry, get, start};

fn rule(policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: a, namespace: default}}\nspec:\n  \
         host: a.test\n  trafficPolicy: {{{policy}}}\n---\n"
    )
}

fn service(http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: a, namespace: default}}\nspec:\n  \
         hosts: [a.test]\n  http: [{{{http}}}]\n---\n"
    )
}

/// One worker, so that each connection of a test meets the same pool.
fn proxy(dir: &tempfile::TempDir, resources: &str) -> (App, Receiver<String>) {
    start(dir.path(), resources, |config| config.threads = 1)
}

/// An origin that answers with a status, and what it is asked.
fn status(code: u16) -> SocketAddr {
    origin(move |mut peer, _| {
        loop {
            peer.request()?;
            peer.say(&format!("HTTP/1.1 {code} Said\r\ncontent-length: 0\r\n\r\n"))?;
        }
    })
}

/// Whether it is open.
type Gate = (Mutex<bool>, Condvar);

/// An origin that answers once it may.
fn gated() -> (SocketAddr, Receiver<()>, Arc<Gate>) {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let (sender, asked) = channel();
    let opened = gate.clone();
    let address = origin(move |mut peer, _| {
        loop {
            peer.request()?;
            // The test may not care.
            let _ = sender.send(());
            let (open, changed) = &*opened;
            drop(changed.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
            peer.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
    });
    (address, asked, gate)
}

fn open(gate: &Gate) {
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
}

#[test]
fn of_those_that_wait_for_a_connection_only_so_many_may() {
    let (origin, asked, gate) = gated();
    let dir = tempfile::tempdir().unwrap();
    let pool = "connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}}";
    let (app, log) = proxy(&dir, &(entry("a", "a.test", HTTP, origin) + &rule(pool)));
    let address = app.http_proxies[0];
    let (sender, answers) = channel();
    let ask = || {
        let sender = sender.clone();
        // The test waits for its answers.
        thread::spawn(move || drop(sender.send(get(address, "http://a.test/"))));
    };
    ask();
    asked.recv_timeout(PATIENCE).unwrap();
    ask();
    ask();
    let refused = answers.recv_timeout(PATIENCE).unwrap();
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("\r\nx-envoy-overloaded: true\r\n"), "{refused}");
    assert!(refused.ends_with("disconnect/reset before headers. reset reason: overflow"), "{refused}");
    let line = log.recv_timeout(PATIENCE).unwrap();
    assert!(line.contains("\" 503 UO ") && line.contains("upstream_reset_before_response_started{overflow}"), "{line}");
    open(&gate);
    for _ in 0..2 {
        assert!(answers.recv_timeout(PATIENCE).unwrap().ends_with("\r\n\r\nok"));
    }
    let upstream = get(app.admin.unwrap(), "/metrics");
    assert!(upstream.contains("portolan_upstream_connections_total 1\n"), "{upstream}");
    assert!(upstream.contains("portolan_upstream_overflows_total 1\n"), "{upstream}");
}

#[test]
fn there_are_only_so_many_requests_at_a_time() {
    let (origin, asked, gate) = gated();
    let dir = tempfile::tempdir().unwrap();
    let pool = "connectionPool: {http: {http2MaxRequests: 1}}";
    let (app, log) = proxy(&dir, &(entry("a", "a.test", HTTP, origin) + &rule(pool)));
    let address = app.http_proxies[0];
    let first = thread::spawn(move || get(address, "http://a.test/"));
    asked.recv_timeout(PATIENCE).unwrap();
    assert!(get(address, "http://a.test/").starts_with("HTTP/1.1 503"));
    assert!(log.recv_timeout(PATIENCE).unwrap().contains("\" 503 UO "));
    open(&gate);
    assert!(first.join().unwrap().ends_with("\r\n\r\nok"));
    assert!(get(address, "http://a.test/").ends_with("\r\n\r\nok"));
}

fn two(one: SocketAddr, other: SocketAddr) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: a, namespace: default}}\nspec:\n  \
         hosts: [a.test]\n  resolution: STATIC\n  ports: [{{{HTTP}}}]\n  endpoints:\n  \
         - {{address: 127.0.0.1, ports: {{http: {}}}}}\n  - {{address: 127.0.0.1, ports: {{http: {}}}}}\n---\n",
        one.port(),
        other.port()
    )
}

#[test]
fn an_endpoint_that_fails_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let policy = "loadBalancer: {simple: ROUND_ROBIN}, \
                  outlierDetection: {consecutive5xxErrors: 2, baseEjectionTime: 1h, maxEjectionPercent: 100}";
    let (app, _log) = proxy(&dir, &(two(status(200), status(500)) + &rule(policy)));
    let answers: Vec<_> = (0..20).map(|_| get(app.http_proxies[0], "http://a.test/")).collect();
    let failed = answers.iter().filter(|answer| answer.starts_with("HTTP/1.1 500")).count();
    assert_eq!(failed, 2);
}

#[test]
fn a_rule_may_say_which_statuses_are_failures() {
    for (failing, failures) in [(418, 2), (500, 10)] {
        let dir = tempfile::tempdir().unwrap();
        let policy = "loadBalancer: {simple: ROUND_ROBIN}, outlierDetection: {consecutive5xxErrors: 2, \
                      outlierDetectionHttpErrorCodes: [404, 418], baseEjectionTime: 1h, maxEjectionPercent: 100}";
        let (app, _log) = proxy(&dir, &(two(status(200), status(failing)) + &rule(policy)));
        let answers: Vec<_> = (0..20).map(|_| get(app.http_proxies[0], "http://a.test/")).collect();
        let failed = answers.iter().filter(|answer| answer.starts_with(&format!("HTTP/1.1 {failing}"))).count();
        assert_eq!(failed, failures, "{failing}");
    }
}

#[test]
fn where_all_endpoints_are_left_out_there_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let policy = "outlierDetection: {consecutiveGatewayErrors: 1, baseEjectionTime: 1h, maxEjectionPercent: 100}";
    let (app, log) = proxy(&dir, &(entry("a", "a.test", HTTP, status(502)) + &rule(policy)));
    assert!(get(app.http_proxies[0], "http://a.test/").starts_with("HTTP/1.1 502"));
    log.recv_timeout(PATIENCE).unwrap();
    let answer = get(app.http_proxies[0], "http://a.test/");
    assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("no healthy upstream"), "{answer}");
    assert!(log.recv_timeout(PATIENCE).unwrap().contains("\" 503 UH "));
}

#[test]
fn connections_carry_only_so_many_requests() {
    let (sender, connections) = channel();
    let origin = origin(move |mut peer, number| {
        loop {
            peer.request()?;
            // The test waits for it.
            let _ = sender.send(number);
            peer.say("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")?;
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let pool = "connectionPool: {http: {maxRequestsPerConnection: 2}}";
    let (app, _log) = proxy(&dir, &(entry("a", "a.test", HTTP, origin) + &rule(pool)));
    let numbers: Vec<_> = (0..4)
        .map(|_| {
            get(app.http_proxies[0], "http://a.test/");
            connections.recv_timeout(PATIENCE).unwrap()
        })
        .collect();
    assert_eq!(numbers, [0, 0, 1, 1]);
}

#[test]
fn a_copy_goes_to_the_mirror_with_the_body_and_the_host() {
    let ((first, _seen), (second, copies)) = (answering(), answering());
    let dir = tempfile::tempdir().unwrap();
    let resources = entry("a", "a.test", HTTP, first)
        + &entry("b", "b.test", HTTP, second)
        + &service("route: [{destination: {host: a.test}}], mirror: {host: b.test}");
    let (app, _log) = proxy(&dir, &resources);
    let request =
        "POST http://a.test/x HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello";
    let answer = proxy_support::exchange(app.http_proxies[0], request);
    assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
    let copy = copies.recv_timeout(PATIENCE).unwrap();
    assert!(copy.head.starts_with("POST /x HTTP/1.1\r\n"), "{}", copy.head);
    assert!(copy.head.to_ascii_lowercase().contains("\r\nhost: a.test\r\n"), "{}", copy.head);
    assert!(!copy.head.contains("x-portolan"), "{}", copy.head);
    assert_eq!(copy.body, b"hello");
}

#[test]
fn a_delay_of_the_rules_is_kept_and_a_clients_is_not() {
    let (origin, seen) = answering();
    let dir = tempfile::tempdir().unwrap();
    let delayed =
        "fault: {delay: {percentage: {value: 100}, fixedDelay: 0.2s}}, route: [{destination: {host: a.test}}]";
    let (app, log) = proxy(&dir, &(entry("a", "a.test", HTTP, origin) + &service(delayed)));
    let begun = Instant::now();
    assert!(get(app.http_proxies[0], "http://a.test/").ends_with("\r\n\r\nok"));
    assert!(begun.elapsed().as_millis() >= 200);
    assert!(log.recv_timeout(PATIENCE).unwrap().contains("\" 200 DI "));
    assert!(!seen.recv_timeout(PATIENCE).unwrap().head.contains("x-envoy-fault"));

    let plain = tempfile::tempdir().unwrap();
    let (app, log) = proxy(&plain, &entry("a", "a.test", HTTP, origin));
    let request = "GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nx-envoy-fault-delay-request: 60000\r\n\r\n";
    assert!(proxy_support::exchange(app.http_proxies[0], request).ends_with("\r\n\r\nok"));
    assert!(log.recv_timeout(PATIENCE).unwrap().contains("\" 200 - "));
}

#[test]
fn a_timeout_of_the_rules_is_kept() {
    let origin = origin(|mut peer, _| {
        peer.request()?;
        // Until the proxy gives up.
        peer.stream.read(&mut [0]).map(drop)
    });
    let dir = tempfile::tempdir().unwrap();
    let timed = "timeout: 0.1s, route: [{destination: {host: a.test}}]";
    let (app, log) = proxy(&dir, &(entry("a", "a.test", HTTP, origin) + &service(timed)));
    assert!(get(app.http_proxies[0], "http://a.test/").starts_with("HTTP/1.1 504"));
    assert!(log.recv_timeout(PATIENCE).unwrap().contains("\" 504 UT"));
}

#[test]
fn answers_of_the_proxys_own_have_the_headers_of_the_rules() {
    // Nobody listens there.
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let rules = "route: [{destination: {host: a.test}}], headers: {response: {set: {x-said: rules}, remove: [server]}}";
    let (app, _log) = proxy(&dir, &[entry("a", "a.test", HTTP, nowhere), service(rules)].concat());
    let answer = get(app.http_proxies[0], "http://a.test/");
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("\r\nx-said: rules\r\n") && !answer.contains("\r\nserver: "), "{answer}");
    assert!(answer.contains("upstream connect error"), "{answer}");
}

/// An origin that tells what came before each request on a connection, and answers.
fn after_a_header(
    length: impl Fn(&mut http_support::Peer) -> std::io::Result<Vec<u8>> + Send + Sync + 'static,
) -> (SocketAddr, Receiver<Vec<u8>>) {
    let (sender, headers) = channel();
    let address = origin(move |mut peer, _| {
        // The test may not care.
        let _ = sender.send(length(&mut peer)?);
        loop {
            peer.request()?;
            peer.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
    });
    (address, headers)
}

fn line(peer: &mut http_support::Peer) -> std::io::Result<Vec<u8>> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.extend(peer.take(1)?);
    }
    Ok(line)
}

#[test]
fn an_upstream_is_told_of_each_client_by_the_proxy_protocol() {
    let (origin, headers) = after_a_header(line);
    let dir = tempfile::tempdir().unwrap();
    let resources = [entry("a", "a.test", HTTP, origin), rule("proxyProtocol: {version: V1}")].concat();
    let (app, _log) = proxy(&dir, &resources);
    let address = app.http_proxies[0];
    let mut clients: Vec<_> = (0..2).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
    for client in &mut clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        // The second request of a client goes over the connection of its first.
        for _ in 0..2 {
            std::io::Write::write_all(client, b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n").unwrap();
            let head = proxy_support::read_head(client).unwrap();
            assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
            client.read_exact(&mut [0; 2]).unwrap();
        }
        let port = client.local_addr().unwrap().port();
        let expected = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {port} {}\r\n", address.port());
        assert_eq!(String::from_utf8(headers.recv_timeout(PATIENCE).unwrap()).unwrap(), expected);
    }
    assert!(headers.try_recv().is_err());
}

#[test]
fn the_proxy_protocol_begins_tcp_connections_too() {
    let (origin, headers) = after_a_header(|peer| peer.take(28));
    let dir = tempfile::tempdir().unwrap();
    let tcp = entry("a", "a.test", "number: 80, name: t, protocol: TCP", origin);
    let (app, _log) = start(dir.path(), &[tcp, rule("proxyProtocol: {version: V2}")].concat(), |config| {
        config.transparent = Some("127.0.0.1:0".parse().unwrap());
        config.original_destination = |_| Ok(SocketAddr::from(([198, 18, 5, 5], 80)));
    });
    let mut client = std::net::TcpStream::connect(app.transparent.unwrap()).unwrap();
    let port = client.local_addr().unwrap().port().to_be_bytes();
    std::io::Write::write_all(&mut client, b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let head = proxy_support::read_head(&mut client).unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let expected = [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\xc6\x12\x05\x05"[..], &port, &[0, 80]].concat();
    assert_eq!(headers.recv_timeout(PATIENCE).unwrap(), expected);
}
