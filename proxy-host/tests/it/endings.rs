//! How requests end before their time, in Envoy's flags and response code details (each compared with Envoy 1.40).

use crate::http_support;
use crate::raw_http2;

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr},
    sync::mpsc::{Receiver, channel},
};

use http_support::{PATIENCE, Peer, Proxy, origin};

const GET: &str = "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n";

/// An origin that reads a request's head, which it tells, says this, and nothing more.
fn mute(says: &'static str) -> (SocketAddr, Receiver<()>) {
    let (heard, hears) = channel();
    let address = origin(move |mut peer: Peer, _| {
        peer.head()?;
        peer.say(says)?;
        // The test may not care.
        let _ = heard.send(());
        // Until the proxy leaves.
        peer.take(usize::MAX).map(drop)
    });
    (address, hears)
}

const HALF: &str = "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf";

/// The line tells status and flag, the upstream and the details.
fn tells(proxy: &Proxy, origin: SocketAddr, ending: &str, details: &str) {
    let line = proxy.line();
    for part in [format!("\" {ending} "), format!("\"{origin}\""), format!("\"{details}\"")] {
        assert!(line.contains(&part), "no {part} in {line}");
    }
}

#[test]
fn a_client_that_leaves_before_the_answer() {
    let (origin, hears) = mute("");
    let proxy = Proxy::start(origin, "HTTP");
    for request in [GET, "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 9\r\n\r\nhalf"] {
        let mut client = proxy.connect();
        client.write_all(request.as_bytes()).unwrap();
        hears.recv_timeout(PATIENCE).unwrap();
        drop(client);
        tells(&proxy, origin, "0 DC", "downstream_remote_disconnect");
    }
}

#[test]
fn a_client_that_leaves_within_the_answer() {
    let (origin, _hears) = mute(HALF);
    let proxy = Proxy::start(origin, "HTTP");
    let mut client = proxy.connect();
    client.write_all(GET.as_bytes()).unwrap();
    client.read_exact(&mut [0; 9]).unwrap();
    client.shutdown(Shutdown::Both).unwrap();
    tells(&proxy, origin, "200 DC", "downstream_remote_disconnect");
}

#[test]
fn a_client_of_http2_that_resets_or_leaves() {
    for (says, status) in [("", "0"), (HALF, "200")] {
        let (origin, hears) = mute(says);
        let proxy = Proxy::start(origin, "HTTP");
        for (reset, flag, details) in
            [(true, "DR", "http2.remote_reset"), (false, "DC", "downstream_remote_disconnect")]
        {
            let mut client = raw_http2::Client::connect(proxy.address);
            let ends = raw_http2::END_STREAM | raw_http2::END_HEADERS;
            client.send(&raw_http2::frame(raw_http2::HEADERS, ends, 1, raw_http2::GET));
            hears.recv_timeout(PATIENCE).unwrap();
            assert!(says.is_empty() || client.frame_of(&[raw_http2::DATA]).is_some());
            // Kept until the line is there, where it resets one stream only.
            let mut client = Some(client);
            match &mut client {
                Some(client) if reset => {
                    client.send(&raw_http2::frame(raw_http2::RST_STREAM, 0, 1, &8u32.to_be_bytes()))
                }
                _ => drop(client.take()),
            }
            let line = proxy.line();
            assert!(line.contains(&format!("\" {status} {flag} ")), "{line}");
            assert!(line.contains(&format!("\"{details}\"")), "{line}");
        }
    }
}

#[test]
fn an_upstream_that_ends_before_or_within_its_answer() {
    for (says, ending, details) in [
        ("", "503 UC", "upstream_reset_before_response_started{connection_termination}"),
        ("no HTTP\r\n\r\n", "502 UPE", "upstream_reset_before_response_started{protocol_error}"),
        (HALF, "200 UPE", "upstream_reset_after_response_started{protocol_error}"),
    ] {
        let origin = origin(move |mut peer: Peer, _| {
            peer.head()?;
            peer.say(says)
        });
        let proxy = Proxy::start(origin, "HTTP");
        let mut client = proxy.connect();
        client.write_all(GET.as_bytes()).unwrap();
        tells(&proxy, origin, ending, details);
    }
}

#[test]
fn an_upstream_that_is_not_there_or_too_slow() {
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    let proxy = Proxy::start(nobody, "HTTP");
    let answer = proxy.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n");
    // What lies below is not the client's affair.
    assert!(answer.ends_with("retried and the latest reset reason: remote connection failure"), "{answer}");
    let details =
        "upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_Connection_refused}";
    tells(&proxy, nobody, "503 UF,URX", details);

    let (slow, _hears) = mute("");
    let proxy = Proxy::start(slow, "HTTP");
    proxy.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nx-envoy-upstream-rq-timeout-ms: 50\r\n\r\n");
    tells(&proxy, slow, "504 UT", "response_timeout");
}

#[test]
fn an_upgraded_connection_is_told_at_its_end() {
    let origin = origin(|mut peer, _| {
        peer.head()?;
        peer.say("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhi")?;
        peer.take(5).map(drop)
    });
    let proxy = Proxy::start(origin, "HTTP");
    let mut client = proxy.connect();
    client.write_all(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"hi") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        answer.extend(byte);
    }
    assert!(proxy.log.try_recv().is_err(), "the line is there before the end");
    client.write_all(b"hello").unwrap();
    client.read_to_end(&mut answer).unwrap();
    drop(client);
    tells(&proxy, origin, "101 - 5 2", "via_upstream");
}
