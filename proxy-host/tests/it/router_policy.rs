//! Timeouts and retries that a request asks for by Envoy's headers.

use crate::http_support;

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    sync::mpsc::{Receiver, channel},
};

use http_support::{PATIENCE, Proxy, Seen, origin, statuses};

/// An origin that says these in turn, the last of them for ever; an empty one is silence, `!` the connection's end.
fn saying(answers: &'static [&'static str]) -> (SocketAddr, Receiver<Seen>) {
    let (sender, seen) = channel();
    let turn = std::sync::atomic::AtomicUsize::new(0);
    let address = origin(move |mut peer, _| {
        loop {
            let request = peer.request()?;
            // The test may not care.
            let _ = sender.send(request);
            let turn = turn.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            match answers[turn.min(answers.len() - 1)] {
                "!" => return Ok(()),
                answer => peer.say(answer)?,
            }
        }
    });
    (address, seen)
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const BUSY: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy";

fn get(headers: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n{headers}\r\n")
}

#[test]
fn a_request_has_the_time_that_it_says() {
    let (origin, seen) = saying(&[""]);
    let proxy = Proxy::start(origin, "HTTP");
    let answer = proxy.send(get("x-envoy-upstream-rq-timeout-ms: 60\r\n").as_bytes());
    assert_eq!(statuses(&answer), [504], "{answer}");
    assert!(answer.ends_with("\r\n\r\nupstream request timeout"), "{answer}");
    let line = proxy.line();
    assert!(line.contains("\" 504 UT ") && line.contains("\"response_timeout\""), "{line}");
    let head = seen.recv_timeout(PATIENCE).unwrap().head;
    assert!(head.contains("\r\nx-envoy-expected-rq-timeout-ms: 60\r\n"), "{head}");
    assert!(!head.contains("x-envoy-upstream-rq"), "{head}");
}

#[test]
fn a_client_may_want_204_for_a_timeout() {
    let (origin, _seen) = saying(&[""]);
    let proxy = Proxy::start(origin, "HTTP");
    let headers = "x-envoy-upstream-rq-timeout-ms: 60\r\nx-envoy-upstream-rq-timeout-alt-response: 1\r\n";
    assert_eq!(statuses(&proxy.send(get(headers).as_bytes())), [204]);
}

#[test]
fn the_time_begins_when_the_request_is_complete() {
    let (origin, seen) = saying(&[OK]);
    let proxy = Proxy::start(origin, "HTTP");
    let mut client = proxy.connect();
    let head = "POST / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: 2\r\n\
                x-envoy-upstream-rq-timeout-ms: 500\r\n\r\na";
    client.write_all(head.as_bytes()).unwrap();
    // Longer than the request's time; there is no event to wait for.
    assert!(seen.recv_timeout(std::time::Duration::from_millis(700)).is_err());
    client.write_all(b"b").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(statuses(&answer), [200], "{answer}");
}

#[test]
fn a_response_that_stops_is_cut_off_when_the_time_is_over() {
    let (origin, _seen) = saying(&["HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab"]);
    let proxy = Proxy::start(origin, "HTTP");
    let answer = proxy.send(get("x-envoy-upstream-rq-timeout-ms: 80\r\n").as_bytes());
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\nab"), "{answer}");
    let line = proxy.line();
    assert!(line.contains("\" 200 UT ") && line.contains("\"response_timeout\""), "{line}");
}

#[test]
fn attempts_have_a_time_of_their_own_and_are_counted() {
    let (origin, seen) = saying(&[""]);
    let proxy = Proxy::start(origin, "HTTP");
    let headers = "x-envoy-upstream-rq-per-try-timeout-ms: 40\r\nx-envoy-retry-on: 5xx\r\nx-envoy-max-retries: 1\r\n";
    let answer = proxy.send(get(headers).as_bytes());
    assert_eq!(statuses(&answer), [504], "{answer}");
    let line = proxy.line();
    assert!(line.contains("\" 504 URX,UT ") && line.contains("\"upstream_per_try_timeout\""), "{line}");
    let counts: Vec<_> = seen.try_iter().map(|request| attempt(&request)).collect();
    assert_eq!(counts, [1, 2]);
}

fn attempt(request: &Seen) -> u32 {
    let (_, rest) = request.head.split_once("\r\nx-envoy-attempt-count: ").unwrap();
    rest.split("\r\n").next().unwrap().parse().unwrap()
}

#[test]
fn a_request_with_a_body_is_sent_again_whole() {
    for first in [BUSY, "!"] {
        let (origin, seen) = match first {
            "!" => saying(&["!", OK]),
            _ => saying(&[BUSY, OK]),
        };
        let proxy = Proxy::start(origin, "HTTP");
        for (framing, body) in
            [("Content-Length: 5", "hello"), ("Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n")]
        {
            let request = format!(
                "POST / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n{framing}\r\nx-envoy-retry-on: 5xx\r\n\r\n{body}"
            );
            assert_eq!(statuses(&proxy.send(request.as_bytes())), [200]);
        }
        let seen: Vec<_> = seen.try_iter().map(|request| (attempt(&request), request.body)).collect();
        let hello = || b"hello".to_vec();
        assert_eq!(seen, [(1, hello()), (2, hello()), (1, hello())]);
    }
}

#[test]
fn the_last_response_is_passed_on_when_no_retry_is_left() {
    let (origin, seen) = saying(&[BUSY]);
    let proxy = Proxy::start(origin, "HTTP");
    let answer = proxy.send(get("x-envoy-retry-on: gateway-error\r\nx-envoy-max-retries: 3\r\n").as_bytes());
    assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("busy"), "{answer}");
    assert!(proxy.line().contains("\" 503 URX "));
    assert_eq!(seen.try_iter().count(), 4);
}

#[test]
fn a_response_that_nothing_asks_about_is_passed_on_at_once() {
    let (origin, seen) = saying(&[BUSY]);
    let proxy = Proxy::start(origin, "HTTP");
    for headers in ["", "x-envoy-retry-on: retriable-4xx,reset\r\n"] {
        assert!(proxy.send(get(headers).as_bytes()).starts_with("HTTP/1.1 503"));
        assert!(proxy.line().contains("\" 503 - "));
    }
    assert_eq!(seen.try_iter().count(), 2);
}

#[test]
fn a_body_that_is_too_long_to_be_kept_is_sent_once() {
    let (origin, seen) = saying(&[BUSY]);
    let proxy = Proxy::start(origin, "HTTP");
    let length = (1 << 20) + 1;
    let mut request = format!(
        "POST / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: {length}\r\nx-envoy-retry-on: 5xx\r\n\r\n"
    )
    .into_bytes();
    request.resize(request.len() + length, b'x');
    assert!(proxy.send(&request).starts_with("HTTP/1.1 503"));
    assert!(proxy.line().contains("\" 503 - "));
    let seen: Vec<_> = seen.try_iter().map(|request| request.body.len()).collect();
    assert_eq!(seen, [length]);
}
