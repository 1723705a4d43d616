//! Floods: what costs a client nothing and the proxy work ends the connection it comes over, and no other.

use crate::proxy_support;
use crate::raw_http2;

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use portolan_proxy_host::{app::App, config::Config};
use proxy_support::{HTTP, PATIENCE, entry, get, origin, start};
use raw_http2::*;

/// `ENHANCE_YOUR_CALM`.
const CALM: u32 = 11;

struct Setup {
    _app: App,
    proxy: SocketAddr,
    _folder: tempfile::TempDir,
}

fn setup(delay: Duration, configure: impl FnOnce(&mut Config)) -> Setup {
    let folder = tempfile::tempdir().unwrap();
    let (app, _) = start(folder.path(), &entry("a", "a.test", HTTP, origin("healthy", delay)), |config| {
        config.threads = 1;
        configure(config);
    });
    Setup { proxy: app.http_proxies[0], _app: app, _folder: folder }
}

/// The client that sends this is left, and another one is served.
fn left(bytes: &[u8]) {
    let setup = setup(Duration::ZERO, |_| {});
    let mut client = Client::connect(setup.proxy);
    client.send(bytes);
    assert_eq!(client.goaway(), Some(CALM));
    assert!(get(setup.proxy, "http://a.test/").ends_with("healthy"));
}

#[test]
fn rapid_reset() {
    let reset = |n: u32| {
        let id = 2 * n + 1;
        [frame(HEADERS, END_STREAM | END_HEADERS, id, GET), frame(RST_STREAM, 0, id, &8_u32.to_be_bytes())].concat()
    };
    left(&(0..1000).flat_map(reset).collect::<Vec<_>>());
}

#[test]
fn continuation() {
    // accept-encoding, a thousand times.
    let more = frame(CONTINUATION, 0, 1, &[0x90; 1000]);
    left(&[frame(HEADERS, END_STREAM, 1, GET), more.repeat(1000)].concat());
}

#[test]
fn empty_continuation() {
    left(&[frame(HEADERS, END_STREAM, 1, GET), frame(CONTINUATION, 0, 1, b"").repeat(100)].concat());
}

#[test]
fn empty_data() {
    left(&[frame(HEADERS, END_HEADERS, 1, GET), frame(DATA, 0, 1, b"").repeat(100)].concat());
}

#[test]
fn settings() {
    left(&frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]).repeat(2000));
}

#[test]
fn pings() {
    left(&frame(PING, 0, 0, &[0; 8]).repeat(2000));
}

#[test]
fn window_updates() {
    left(&frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]).repeat(1000));
}

#[test]
fn priorities() {
    left(&frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1]).repeat(1000));
}

#[test]
fn headers_that_cost_few_bytes_are_limited_by_their_size() {
    let setup = setup(Duration::ZERO, |_| {});
    let mut client = Client::connect(setup.proxy);
    // 4000 bytes once, and then named by one byte each time.
    let large = [&[0x40, 1, b'x', 0x7f, 0xa1, 0x1e][..], &[b'a'; 4000]].concat();
    client.send(&frame(HEADERS, END_STREAM | END_HEADERS, 1, &[GET, &large, &[0xbe; 10_000]].concat()));
    // The answer is one of 431, or the stream or the connection ends.
    let ended = client.frame_of(&[HEADERS, RST_STREAM, GOAWAY]);
    assert!(ended.is_some());
    assert!(get(setup.proxy, "http://a.test/").ends_with("healthy"));
}

#[test]
fn headers_without_a_name() {
    let setup = setup(Duration::ZERO, |_| {});
    let mut client = Client::connect(setup.proxy);
    client.send(&frame(HEADERS, END_STREAM | END_HEADERS, 1, &[GET, &[0; 3000]].concat()));
    let ended = client.frame_of(&[HEADERS, RST_STREAM, GOAWAY]);
    assert!(matches!(ended, Some((RST_STREAM | GOAWAY, ..))), "{ended:?}");
    assert!(get(setup.proxy, "http://a.test/").ends_with("healthy"));
}

#[test]
fn streams_beyond_the_limit_are_refused() {
    let setup = setup(PATIENCE, |config| config.http.streams = 3);
    let mut client = Client::connect(setup.proxy);
    for id in [1, 3, 5, 7] {
        client.send(&frame(HEADERS, END_STREAM | END_HEADERS, id, SLOW));
    }
    let refused = client.frame_of(&[RST_STREAM]);
    // REFUSED_STREAM
    assert_eq!(refused, Some((RST_STREAM, 7, 7_u32.to_be_bytes().to_vec())));
}

#[test]
fn a_client_may_ask_as_fast_as_it_is_answered() {
    let setup = setup(Duration::ZERO, |_| {});
    let mut client = Client::connect(setup.proxy);
    for id in (1..4000).step_by(2) {
        let update = frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 7]);
        let request = frame(HEADERS, END_STREAM | END_HEADERS, id, GET);
        client.send(&[request, update, frame(PING, 0, 0, &[0; 8])].concat());
        let answer = client.frame_of(&[DATA, RST_STREAM, GOAWAY]);
        assert_eq!(answer, Some((DATA, id, b"healthy".to_vec())));
    }
}

fn hurried() -> Setup {
    setup(Duration::ZERO, |config| config.http.header_time = Duration::from_millis(100))
}

#[test]
fn a_slow_head_is_answered_with_408() {
    let setup = hurried();
    for begun in ["G", "GET http://a.test/ HTTP/1.1\r\nHost: a.t", "PRI * HTTP/2.0"] {
        let answer = proxy_support::exchange(setup.proxy, begun);
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.ends_with("request header timeout"), "{answer}");
    }
}

#[test]
fn a_second_slow_head_is_answered_with_408() {
    let setup = hurried();
    let whole = "GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n";
    let answer = proxy_support::exchange(setup.proxy, &format!("{whole}GET /"));
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("HTTP/1.1 408 "), "{answer}");
}

#[test]
fn a_client_with_a_slow_head_in_http2_is_left() {
    let setup = hurried();
    for begun in [frame(HEADERS, END_STREAM, 1, GET), frame(HEADERS, END_STREAM | END_HEADERS, 1, GET)[..12].to_vec()] {
        let mut client = Client::connect(setup.proxy);
        client.send(&begun);
        assert_eq!(client.goaway(), Some(CALM));
    }
}

#[test]
fn a_connection_between_requests_has_no_limit_of_time() {
    let setup = hurried();
    let mut idle = TcpStream::connect(setup.proxy).unwrap();
    idle.set_read_timeout(Some(PATIENCE)).unwrap();
    // Longer than a head may take: the other client has been left by then.
    assert_eq!(Client::connect(setup.proxy).0.write(&frame(HEADERS, END_STREAM, 1, GET)).ok(), Some(9 + GET.len()));
    assert!(proxy_support::exchange(setup.proxy, "GET /").starts_with("HTTP/1.1 408 "));
    idle.write_all(b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n").unwrap();
    assert!(proxy_support::read_head(&mut idle).unwrap().starts_with("HTTP/1.1 200 "));
}
