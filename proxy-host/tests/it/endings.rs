//! How requests end before their time, in Envoy's flags and response code details (each compared with Envoy 1.40).

use crate::http_support;
use crate::raw_http2;

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use http_support::{PATIENCE, Peer, Proxy, origin};
use portolan_proxy_host::config::{Config, Source};
use socket2::{Domain, SockRef, Socket, Type};

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
    for (request, ending) in
        [(GET, "0 DC 0 0"), ("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 9\r\n\r\nhalf", "0 DC 4 0")]
    {
        let mut client = proxy.connect();
        client.write_all(request.as_bytes()).unwrap();
        hears.recv_timeout(PATIENCE).unwrap();
        drop(client);
        tells(&proxy, origin, ending, "downstream_remote_disconnect");
    }
}

#[test]
fn a_body_that_breaks_within_the_answer() {
    let (origin, _hears) = mute(HALF);
    let proxy = Proxy::start(origin, "HTTP");
    let mut client = proxy.connect();
    client.write_all(b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n").unwrap();
    client.read_exact(&mut [0; 9]).unwrap();
    client.write_all(b"none\r\n").unwrap();
    tells(&proxy, origin, "200 DPE 2 4", "http1.codec_error");
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
    tells(&proxy, nobody, "503 URX,UF", details);

    let (slow, _hears) = mute("");
    let proxy = Proxy::start(slow, "HTTP");
    proxy.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nx-envoy-upstream-rq-timeout-ms: 50\r\n\r\n");
    tells(&proxy, slow, "504 UT", "response_timeout");
}

const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
const CONNECT: &str = "CONNECT a.test:80 HTTP/1.1\r\nHost: a.test:80\r\n\r\n";

/// An origin that takes the upgrade, or the bytes of a tunnel, says `hi`, reads `hello`, and does as it is told.
fn upgrading(tunnel: bool, then: impl Fn(Peer) -> std::io::Result<()> + Send + Sync + 'static) -> SocketAddr {
    origin(move |mut peer, _| {
        if !tunnel {
            peer.head()?;
            peer.say("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")?;
        }
        peer.say("hi")?;
        peer.take(5)?;
        then(peer)
    })
}

/// Asks for an upgrade or a tunnel, reads to `hi`, and says `hello`.
fn upgraded(proxy: &Proxy, request: &str) -> TcpStream {
    let mut client = proxy.connect();
    client.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\nhi") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        answer.extend(byte);
    }
    assert!(proxy.log.try_recv().is_err(), "the line is there before the end");
    client.write_all(b"hello").unwrap();
    client
}

fn is_reset(client: &TcpStream) {
    SockRef::from(client).set_linger(Some(Duration::ZERO)).unwrap();
}

const TERMINATED: &str = "upstream_reset_after_response_started{connection_termination}";

#[test]
fn an_upgraded_connection_that_the_upstream_ends() {
    for (request, reset, ending, details) in [
        (UPGRADE, false, "101 UC 5 2", TERMINATED),
        (UPGRADE, true, "101 UC 5 2", TERMINATED),
        (CONNECT, false, "200 - 5 2", "via_upstream"),
        (CONNECT, true, "200 UC 5 2", TERMINATED),
    ] {
        let origin = upgrading(request == CONNECT, move |peer| {
            if reset {
                is_reset(&peer.stream);
            }
            Ok(())
        });
        let proxy = Proxy::start(origin, "HTTP");
        let mut client = upgraded(&proxy, request);
        // It ends, with a reset or without.
        let _ = client.read_to_end(&mut Vec::new());
        tells(&proxy, origin, ending, details);
    }
}

#[test]
fn an_upgraded_connection_that_the_client_ends() {
    for request in [UPGRADE, CONNECT] {
        for reset in [false, true] {
            let (heard, hears) = channel();
            let origin = upgrading(request == CONNECT, move |mut peer| {
                // The test may not care.
                let _ = heard.send(());
                peer.take(usize::MAX).map(drop)
            });
            let proxy = Proxy::start(origin, "HTTP");
            let client = upgraded(&proxy, request);
            hears.recv_timeout(PATIENCE).unwrap();
            if reset {
                is_reset(&client);
            }
            drop(client);
            tells(
                &proxy,
                origin,
                &format!("{} DC 5 2", if request == CONNECT { 200 } else { 101 }),
                "downstream_remote_disconnect",
            );
        }
    }
}

#[test]
fn an_upgraded_connection_ends_with_its_clients_last_word() {
    let origin = upgrading(false, |mut peer| peer.take(usize::MAX).map(drop));
    let proxy = Proxy::start(origin, "HTTP");
    let mut client = upgraded(&proxy, UPGRADE);
    client.shutdown(Shutdown::Write).unwrap();
    // As in Envoy, nobody waits for what the upstream may still have to say.
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    tells(&proxy, origin, "101 DC 5 2", "downstream_remote_disconnect");
}

/// A client of a transparent port that leads to an origin, which has said `hi`.
fn carried(origin: SocketAddr) -> (Proxy, TcpStream) {
    let proxy = Proxy::start_with(origin, "TCP", |config| {
        config.transparent = Some("127.0.0.1:0".parse().unwrap());
        config.original_destination = |_| Ok(SocketAddr::from(([198, 18, 5, 5], 80)));
    });
    let mut client = TcpStream::connect(proxy.app.transparent.unwrap()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.read_exact(&mut [0; 2]).unwrap();
    (proxy, client)
}

#[test]
fn a_tcp_connection_that_one_side_resets() {
    for (client_resets, flag) in [(true, "-"), (false, "UR")] {
        let origin = origin(move |mut peer, _| {
            peer.say("hi")?;
            // Until the client has left, or has heard all.
            let _ = peer.take(if client_resets { usize::MAX } else { 5 });
            is_reset(&peer.stream);
            Ok(())
        });
        let (proxy, mut client) = carried(origin);
        client.write_all(b"hello").unwrap();
        if client_resets {
            is_reset(&client);
        } else {
            assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        drop(client);
        let line = proxy.line();
        assert!(line.contains(&format!("\"- - -\" 0 {flag} 5 2 ")), "{line}");
    }
}

/// An address that never answers: its queue of connections that nobody accepts is full.
fn silent() -> (SocketAddr, impl Sized) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let mut held = Vec::new();
    // The one that is not accepted at once is the first for which there is no room.
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        held.push(stream);
    }
    (address, (listener, held))
}

/// The mesh's `connectTimeout`.
const CONNECT_TIME: Duration = Duration::from_millis(300);

fn short_of_patience(config: &mut Config) {
    let Source::Files { paths, .. } = &config.source else { unreachable!() };
    std::fs::write(paths[0].join("mesh.yaml"), "connectTimeout: 0.3s\n").unwrap();
}

#[test]
fn an_upstream_that_never_answers_a_connection() {
    let (silent, _held) = silent();
    let proxy = Proxy::start_with(silent, "HTTP", short_of_patience);
    let begun = Instant::now();
    let answer = proxy.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n");
    // Three attempts, as Istio has it.
    assert!((CONNECT_TIME * 3..PATIENCE).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.ends_with("retried and the latest reset reason: connection timeout"), "{answer}");
    tells(&proxy, silent, "503 URX,UF", "upstream_reset_before_response_started{connection_timeout}");

    let once = b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nx-envoy-max-retries: 0\r\n\r\n";
    let answer = proxy.send(once);
    assert!(answer.ends_with("before headers. reset reason: connection timeout"), "{answer}");
    tells(&proxy, silent, "503 URX,UF", "upstream_reset_before_response_started{connection_timeout}");
}

#[test]
fn an_upstream_of_tcp_that_never_answers_a_connection() {
    let (silent, _held) = silent();
    let proxy = Proxy::start_with(silent, "TCP", |config| {
        short_of_patience(config);
        config.transparent = Some("127.0.0.1:0".parse().unwrap());
        config.original_destination = |_| Ok(SocketAddr::from(([198, 18, 5, 5], 80)));
    });
    let begun = Instant::now();
    let mut client = TcpStream::connect(proxy.app.transparent.unwrap()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!((CONNECT_TIME..PATIENCE).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    let line = proxy.line();
    assert!(line.contains("\"- - -\" 0 UF,URX 0 0 ") && line.contains("connection timeout"), "{line}");
}
