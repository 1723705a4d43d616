//! A proxy whose descriptors are all in use, and one that listens on IPv6 for clients of IPv4.

use crate::proxy_support;

use std::{
    net::{SocketAddr, TcpStream, UdpSocket},
    process::Command,
    time::Duration,
};

use proxy_support::{HTTP, PATIENCE, Program, entry, get, origin, start, until, write};

/// The value of a metric without labels.
fn metric(admin: SocketAddr, name: &str) -> u64 {
    let text = get(admin, "/metrics");
    let line = text.lines().find(|line| line.split(' ').next() == Some(name));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn without_descriptors_clients_are_refused_and_served_again_when_there_are() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &entry("a", "a.test", HTTP, origin("served", Duration::ZERO)));
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 80; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_proxy-host")]);
    command.args([
        "--threads",
        "1",
        "--http-proxy",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
        "--max-connections",
        "1000",
    ]);
    let mut program = Program::start(command.arg("--config").arg(dir.path()));
    let ready = program.line("ready after");
    let (proxy, admin) = (Program::address(&ready, "HTTP proxy on"), Program::address(&ready, "admin on"));
    assert!(get(proxy, "http://a.test/").ends_with("served"));

    let held: Vec<_> = (0..100).map(|_| TcpStream::connect(proxy).unwrap()).collect();
    // The one descriptor that is kept back tells a client so.
    let refused = held.iter().filter(|stream| {
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut start = [0; 12];
        std::io::Read::read_exact(&mut &**stream, &mut start).is_ok() && start == *b"HTTP/1.1 503"
    });
    assert!(refused.count() > 0);
    drop(held);
    until(proxy, "http://a.test/", "served");
    // Each failure is followed by a pause: a loop without one would have come to thousands.
    let failures = metric(admin, "portolan_accept_failures_total");
    assert!((1..1000).contains(&failures), "{failures}");
}

#[test]
fn clients_of_ipv4_are_served_on_an_ipv6_listener() {
    if UdpSocket::bind("[::1]:0").is_err() {
        assert!(std::env::var_os("CI").is_none(), "SKIPPED: there is no IPv6 here");
        return eprintln!("SKIPPED: there is no IPv6 here");
    }
    let dir = tempfile::tempdir().unwrap();
    let resources = entry("a", "a.test", HTTP, origin("by name", Duration::ZERO))
        + &entry("b", "b.test", "number: 9123, name: http, protocol: HTTP", origin("by address", Duration::ZERO))
            .replace("resolution: STATIC", "addresses: [192.0.2.7]\n  resolution: STATIC");
    let (app, lines) = start(dir.path(), &resources, |config| {
        config.http_proxies = vec!["[::]:0".parse().unwrap()];
        config.transparent = Some("[::]:0".parse().unwrap());
        // As the kernel gives it for a socket of both families.
        config.original_destination = |_| Ok("[::ffff:192.0.2.7]:9123".parse().unwrap());
    });
    let of = |address: SocketAddr| SocketAddr::from(([127, 0, 0, 1], address.port()));
    assert!(get(of(app.http_proxies[0]), "http://a.test/").ends_with("by name"));
    let line = lines.recv_timeout(PATIENCE).unwrap();
    assert!(line.contains("127.0.0.1:") && !line.contains("ffff"), "{line}");
    assert!(get(of(app.transparent.unwrap()), "http://b.test:9123/").ends_with("by address"));
    let line = lines.recv_timeout(PATIENCE).unwrap();
    assert!(line.contains("outbound|9123||b.test") && !line.contains("ffff"), "{line}");
}
