//! Streams and connections on which nothing moves, with short limits.

use crate::http_support;
use crate::raw_http2;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use http_support::{PATIENCE, Peer, Proxy, answering, origin, statuses};

/// The limit of these tests.
const LIMIT: Duration = Duration::from_millis(400);

fn proxy(origin: SocketAddr) -> Proxy {
    Proxy::start_with(origin, "HTTP", |config| config.http.stream_idle = LIMIT)
}

/// An origin that reads a request's head, says this, and nothing more.
fn mute(says: &'static str) -> SocketAddr {
    origin(move |mut peer: Peer, _| {
        peer.head()?;
        peer.say(says)?;
        // Until the proxy leaves.
        peer.take(usize::MAX).map(drop)
    })
}

const GET: &str = "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n";

#[test]
fn a_request_that_nobody_answers_gets_a_504() {
    let proxy = proxy(mute(""));
    let begun = Instant::now();
    let answer = proxy.send(format!("{}connection: close\r\n\r\n", &GET[..GET.len() - 2]).as_bytes());
    assert!(begun.elapsed() >= LIMIT);
    assert!(answer.starts_with("HTTP/1.1 504 ") && answer.ends_with("\r\n\r\nstream timeout"), "{answer}");
    let line = proxy.line();
    assert!(line.contains(" 504 SI ") && line.contains("stream_idle_timeout"), "{line}");
}

#[test]
fn a_client_that_does_not_end_its_request_gets_a_408() {
    let proxy = proxy(mute(""));
    let answer = proxy.send(b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\n\r\nbo");
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.ends_with("\r\n\r\nstream timeout"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("\r\nconnection: close\r\n"), "{answer}");
    let line = proxy.line();
    assert!(line.contains(" 408 SI ") && line.contains("stream_idle_timeout"), "{line}");
}

#[test]
fn an_answer_that_stops_is_cut_off() {
    let proxy = proxy(mute("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"));
    let answer = proxy.send(GET.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\nhalf"), "{answer}");
    let line = proxy.line();
    assert!(line.contains(" 200 SI ") && line.contains("stream_idle_timeout"), "{line}");
}

/// An origin whose answer fills every buffer on its way.
fn endless() -> SocketAddr {
    origin(|mut peer, _| {
        peer.head()?;
        peer.say("HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")?;
        let part = "x".repeat(1 << 16);
        loop {
            peer.say(&part)?;
        }
    })
}

#[test]
fn an_answer_that_nobody_reads_is_cut_off() {
    let proxy = proxy(endless());
    let mut client = proxy.connect();
    client.write_all(GET.as_bytes()).unwrap();
    let line = proxy.line();
    assert!(line.contains(" 200 SI ") && line.contains("stream_idle_timeout"), "{line}");
}

#[test]
fn a_stream_whose_window_stays_shut_is_reset_alone() {
    let proxy = proxy(endless());
    let mut client = raw_http2::Client::connect(proxy.address);
    let ends = raw_http2::END_STREAM | raw_http2::END_HEADERS;
    client.send(&raw_http2::frame(raw_http2::HEADERS, ends, 1, raw_http2::GET));
    let (_, stream, _) = client.frame_of(&[raw_http2::RST_STREAM, raw_http2::GOAWAY]).unwrap();
    assert_eq!(stream, 1);
    let line = proxy.line();
    assert!(line.contains(" 200 SI ") && line.contains("stream_idle_timeout"), "{line}");
    client.send(&raw_http2::frame(raw_http2::PING, 0, 0, b"12345678"));
    assert!(client.frame_of(&[raw_http2::PING]).is_some());
}

#[test]
fn a_stream_that_moves_goes_on_for_as_long_as_it_likes() {
    let address = origin(|mut peer, _| {
        peer.request()?;
        peer.say("HTTP/1.1 200 OK\r\ncontent-length: 12\r\nconnection: close\r\n\r\n")?;
        for _ in 0..12 {
            thread::park_timeout(LIMIT / 4);
            peer.say("x")?;
        }
        Ok(())
    });
    let proxy = proxy(address);
    let answer = proxy.send(
        GET.as_bytes().strip_suffix(b"\r\n").map(|g| [g, b"connection: close\r\n\r\n"].concat()).as_deref().unwrap(),
    );
    assert!(answer.ends_with("\r\n\r\nxxxxxxxxxxxx"), "{answer}");
}

#[test]
fn an_upgraded_connection_that_is_silent_ends() {
    let address = origin(|mut peer, _| {
        peer.head()?;
        peer.say("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhi")?;
        peer.take(usize::MAX).map(drop)
    });
    let proxy = proxy(address);
    let begun = Instant::now();
    let answer = proxy.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 101 ") && answer.ends_with("\r\n\r\nhi"), "{answer}");
    assert!(begun.elapsed() >= LIMIT);
}

#[test]
fn a_tunnel_that_is_silent_ends() {
    let address = origin(|mut peer, _| peer.take(usize::MAX).map(drop));
    let proxy = Proxy::start_with(address, "TCP", |config| config.http.stream_idle = LIMIT);
    let answer = proxy.send(b"CONNECT a.test:80 HTTP/1.1\r\nHost: a.test:80\r\n\r\n");
    assert_eq!(statuses(&answer), [200]);
    let line = proxy.line();
    assert!(line.contains(" 200 SI "), "{line}");
}

#[test]
fn a_connection_without_requests_is_closed() {
    let (address, _seen) = answering();
    let proxy = Proxy::start_with(address, "HTTP", |config| config.http.connection_idle = LIMIT);
    let begun = Instant::now();
    let answer = proxy.send(GET.as_bytes());
    assert_eq!(statuses(&answer), [200]);
    assert!(begun.elapsed() >= LIMIT);
    // Also one that never had any.
    assert_eq!(proxy.send(b""), "");
}

#[test]
fn a_connection_with_a_request_is_not_closed() {
    let address = origin(|mut peer, _| {
        loop {
            peer.request()?;
            thread::park_timeout(LIMIT * 2);
            peer.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")?;
            thread::park_timeout(LIMIT * 2);
            peer.say("ok")?;
        }
    });
    let proxy = Proxy::start_with(address, "HTTP", |config| config.http.connection_idle = LIMIT);
    let mut client = proxy.connect();
    for _ in 0..2 {
        client.write_all(GET.as_bytes()).unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\nok") {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
    }
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn an_http2_connection_without_requests_gets_a_goaway() {
    let (address, _seen) = answering();
    let proxy = Proxy::start_with(address, "HTTP", |config| config.http.connection_idle = LIMIT);
    let mut client = raw_http2::Client::connect(proxy.address);
    let ends = raw_http2::END_STREAM | raw_http2::END_HEADERS;
    client.send(&raw_http2::frame(raw_http2::HEADERS, ends, 1, raw_http2::GET));
    let begun = Instant::now();
    assert!(client.frame_of(&[raw_http2::DATA]).is_some());
    assert_eq!(client.goaway(), Some(0));
    assert!(begun.elapsed() >= LIMIT / 2);
}

/// A proxy whose transparent listener leads to an origin.
fn transparent(origin: SocketAddr, extra: &str) -> (Proxy, TcpStream) {
    let proxy = Proxy::start_with(origin, "TCP", |config| {
        config.transparent = Some("127.0.0.1:0".parse().unwrap());
        config.original_destination = |_| Ok(SocketAddr::from(([198, 18, 5, 5], 80)));
        config.tcp_idle = LIMIT;
        if !extra.is_empty() {
            let portolan_proxy_host::config::Source::Files { paths, .. } = &config.source else { unreachable!() };
            std::fs::write(paths[0].join("more.yaml"), extra).unwrap();
        }
    });
    let stream = TcpStream::connect(proxy.app.transparent.unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (proxy, stream)
}

#[test]
fn a_tcp_connection_that_is_silent_is_closed() {
    let address = origin(|mut peer, _| {
        peer.say("hi")?;
        peer.take(usize::MAX).map(drop)
    });
    let (proxy, mut client) = transparent(address, "");
    let begun = Instant::now();
    for _ in 0..6 {
        client.write_all(b"x").unwrap();
        thread::park_timeout(LIMIT / 4);
    }
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"hi");
    assert!(begun.elapsed() >= LIMIT * 9 / 4, "{:?}", begun.elapsed());
    let line = proxy.line();
    assert!(line.contains("tcp_session_idle_timeout"), "{line}");
}

#[test]
fn a_destination_rule_may_let_tcp_connections_be_silent() {
    let rule = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: a, namespace: default}\n\
        spec: {host: a.test, trafficPolicy: {connectionPool: {tcp: {idleTimeout: 3600s}}}}\n";
    let address = origin(|mut peer, _| {
        peer.take(1)?;
        thread::park_timeout(LIMIT * 3);
        peer.say("late")
    });
    let (_proxy, mut client) = transparent(address, rule);
    client.write_all(b"x").unwrap();
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"late");
}

#[test]
fn a_destination_rule_may_limit_the_life_of_tcp_connections() {
    let rule = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: a, namespace: default}\n\
        spec: {host: a.test, trafficPolicy: {connectionPool: {tcp: {maxConnectionDuration: 0.6s}}}}\n";
    let address = origin(|mut peer, _| {
        loop {
            peer.say("x")?;
            thread::park_timeout(LIMIT / 8);
        }
    });
    let (proxy, mut client) = transparent(address, rule);
    let begun = Instant::now();
    let mut heard = Vec::new();
    // However it is closed.
    let _ = client.read_to_end(&mut heard);
    assert!(heard.len() > 3 && begun.elapsed() >= Duration::from_millis(550), "{heard:?} {:?}", begun.elapsed());
    let line = proxy.line();
    assert!(line.contains(" DT ") && line.contains("max_connection_duration_reached"), "{line}");
}
