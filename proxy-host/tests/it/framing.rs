//! How requests and answers of HTTP/1.1 say where they end, and whether their connections go on (each compared with
//! Envoy 1.40).

use crate::http_support;
use crate::raw_http2;

use std::net::SocketAddr;

use http_support::{PATIENCE, Proxy, answering, origin, statuses};

const LAST: &str = "GET /last HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n";

#[test]
fn a_body_without_a_length_goes_on_whatever_the_method() {
    let (address, seen) = answering();
    let proxy = Proxy::start(address, "HTTP");
    for method in ["GET", "HEAD", "DELETE", "POST"] {
        let request = format!(
            "{method} / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        );
        proxy.send(request.as_bytes());
        assert_eq!(seen.recv_timeout(PATIENCE).unwrap().body, b"hello", "{method}");
    }
}

#[test]
fn the_body_of_a_get_of_http2_goes_on() {
    let (address, seen) = answering();
    let proxy = Proxy::start(address, "HTTP");
    let mut client = raw_http2::Client::connect(proxy.address);
    client.send(&raw_http2::frame(raw_http2::HEADERS, raw_http2::END_HEADERS, 1, raw_http2::GET));
    client.send(&raw_http2::frame(raw_http2::DATA, raw_http2::END_STREAM, 1, b"hello"));
    assert_eq!(seen.recv_timeout(PATIENCE).unwrap().body, b"hello");
}

#[test]
fn a_method_that_http_1_1_does_not_take_goes_on_from_http2() {
    let (address, seen) = answering();
    let proxy = Proxy::start(address, "HTTP");
    let mut client = raw_http2::Client::connect(proxy.address);
    let ends = raw_http2::END_STREAM | raw_http2::END_HEADERS;
    let request = b"\x02\x03FOO\x86\x84\x41\x06a.test";
    client.send(&raw_http2::frame(raw_http2::HEADERS, ends, 1, request));
    let head = seen.recv_timeout(PATIENCE).unwrap().head;
    assert!(head.starts_with("FOO / HTTP/1.1\r\n"), "{head}");
}

#[test]
fn a_request_without_a_body_says_so_where_one_is_expected() {
    let (address, seen) = answering();
    let proxy = Proxy::start(address, "HTTP");
    for (method, says) in [("POST", true), ("PUT", true), ("OPTIONS", true), ("GET", false), ("DELETE", false)] {
        proxy.send(format!("{method} / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n").as_bytes());
        let head = seen.recv_timeout(PATIENCE).unwrap().head.to_ascii_lowercase();
        assert_eq!(head.contains("\r\ncontent-length: 0\r\n"), says, "{head}");
    }
}

#[test]
fn an_answer_that_says_its_length_twice_is_none() {
    for twice in [
        "content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        "content-length: 2\r\ncontent-length: 2\r\n\r\nok",
    ] {
        let address = origin(move |mut peer, _| {
            peer.head()?;
            peer.say(&format!("HTTP/1.1 200 OK\r\n{twice}"))?;
            peer.take(usize::MAX).map(drop)
        });
        let proxy = Proxy::start(address, "HTTP");
        assert_eq!(statuses(&proxy.send(LAST.as_bytes())), [502], "{twice}");
        let line = proxy.line();
        assert!(line.contains("\" 502 UPE "), "{line}");
        assert!(line.contains("upstream_reset_before_response_started{protocol_error}"), "{line}");
    }
}

#[test]
fn a_server_that_answered_in_http_1_0_is_spoken_to_in_http_1_1() {
    let (heard, hears) = std::sync::mpsc::channel();
    let address = origin(move |mut peer, _| {
        loop {
            // The test may not care.
            let _ = heard.send(peer.head()?);
            peer.say("HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok")?;
        }
    });
    let proxy = Proxy::start(address, "HTTP");
    for _ in 0..2 {
        assert_eq!(statuses(&proxy.send(LAST.as_bytes())), [200]);
        let head = hears.recv_timeout(PATIENCE).unwrap();
        assert!(head.starts_with("GET /last HTTP/1.1\r\n"), "{head}");
    }
}

/// Asks in HTTP/1.0 for an answer like this; gives its head in lower case.
fn old(connection: &str, answer: &'static str) -> String {
    let address: SocketAddr = origin(move |mut peer, _| {
        peer.head()?;
        peer.say(answer)
    });
    let proxy = Proxy::start_with(address, "HTTP", |config| config.http.http10 = true);
    let first = format!("GET / HTTP/1.0\r\nHost: a.test\r\n{connection}\r\n");
    // The second one is answered where the connection goes on.
    let answer = proxy.send(format!("{first}OPTIONS * HTTP/1.0\r\nHost: a.test\r\n\r\n").as_bytes());
    let answers = answer.matches("HTTP/1.0 ").count();
    let kept = answer.to_ascii_lowercase().split("\r\n\r\n").next().unwrap().to_owned();
    assert_eq!(kept.contains("\r\nconnection: keep-alive"), answers == 2, "{answer}");
    kept
}

#[test]
fn an_answer_in_http_1_0_says_whether_its_connection_goes_on() {
    const SIZED: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
    const KEEP: &str = "Connection: keep-alive\r\n";
    for (connection, answer, kept) in [
        ("", SIZED, false),
        (KEEP, SIZED, true),
        (KEEP, CHUNKED, false),
        (KEEP, "HTTP/1.1 204 No Content\r\n\r\n", false),
    ] {
        let head = old(connection, answer);
        let says = if kept { "\r\nconnection: keep-alive" } else { "\r\nconnection: close" };
        assert!(head.contains(says), "{head}");
    }
}

#[test]
fn a_proxy_connection_that_is_to_end_ends() {
    let (address, _seen) = answering();
    let proxy = Proxy::start(address, "HTTP");
    let request = "GET / HTTP/1.1\r\nHost: a.test\r\nProxy-Connection: close\r\n\r\n";
    let answer = proxy.send(request.as_bytes());
    assert!(answer.to_ascii_lowercase().contains("\r\nconnection: close\r\n"), "{answer}");
}

#[test]
fn a_client_does_not_say_whose_certificate_it_has_shown() {
    let (address, seen) = answering();
    let proxy = Proxy::start(address, "HTTP");
    let request = "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nX-Forwarded-Client-Cert: By=a\r\n\r\n";
    assert_eq!(statuses(&proxy.send(request.as_bytes())), [200]);
    let head = seen.recv_timeout(PATIENCE).unwrap().head.to_ascii_lowercase();
    assert!(!head.contains("x-forwarded-client-cert"), "{head}");
}

#[test]
fn an_upgrade_that_the_connection_does_not_name_is_none() {
    let (address, seen) = answering();
    let proxy = Proxy::start(address, "HTTP");
    let request = "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nUpgrade: websocket\r\n\r\n";
    assert_eq!(statuses(&proxy.send(request.as_bytes())), [200]);
    let head = seen.recv_timeout(PATIENCE).unwrap().head.to_ascii_lowercase();
    assert!(!head.contains("upgrade"), "{head}");
}
