//! HTTP/1.1 as it comes, through the whole proxy; each test is one thing that clients and servers do.

use crate::http_support;

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    sync::mpsc::channel,
};

use http_support::{PATIENCE, Peer, Proxy, answering, origin, statuses};

/// Reads as many bytes as `text` has, and compares.
fn hears(stream: &mut TcpStream, text: &str) {
    let mut read = vec![0; text.len()];
    stream.read_exact(&mut read).unwrap();
    assert_eq!(String::from_utf8_lossy(&read), text);
}

/// The head of an answer, in lower case.
fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).to_ascii_lowercase()
}

/// All that comes until the end.
fn rest(stream: &mut TcpStream) -> String {
    let mut rest = Vec::new();
    // A reset ends it as well.
    let _ = stream.read_to_end(&mut rest);
    String::from_utf8_lossy(&rest).into_owned()
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const EXPECT: &str = "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n";

/// Reads a body of four bytes.
fn four(peer: &mut Peer) -> io::Result<()> {
    assert_eq!(peer.take(4)?, b"body");
    Ok(())
}

#[test]
fn an_upstreams_100_goes_to_the_client() {
    let (asked, heard) = channel();
    let (say, said) = channel::<()>();
    let said = std::sync::Mutex::new(said);
    let address = origin(move |mut peer, _| {
        let head = peer.head()?.to_ascii_lowercase();
        asked.send(head).unwrap();
        said.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        peer.say("HTTP/1.1 100 Continue\r\n\r\n")?;
        four(&mut peer)?;
        peer.say(OK)
    });
    let proxy = Proxy::start(address, "HTTP");
    let mut client = proxy.connect();
    client.write_all(EXPECT.as_bytes()).unwrap();
    assert!(heard.recv_timeout(PATIENCE).unwrap().contains("\r\nexpect: 100-continue\r\n"));
    // The proxy says none by itself: nothing has come while the upstream waits.
    client.set_nonblocking(true).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    client.set_nonblocking(false).unwrap();
    say.send(()).unwrap();
    hears(&mut client, "HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"body").unwrap();
    assert!(head(&mut client).starts_with("http/1.1 200 "));
}

#[test]
fn an_upstream_that_answers_at_once_is_heard_instead_of_a_100() {
    let address = origin(|mut peer, _| {
        peer.head()?;
        peer.say("HTTP/1.1 417 Expectation Failed\r\ncontent-length: 0\r\n\r\n")
    });
    let proxy = Proxy::start(address, "HTTP");
    let mut client = proxy.connect();
    client.write_all(EXPECT.as_bytes()).unwrap();
    assert!(head(&mut client).starts_with("http/1.1 417 "));
    assert_eq!(rest(&mut client), "");
}

#[test]
fn a_client_need_not_wait_for_its_100() {
    let address = origin(|mut peer, _| {
        loop {
            peer.head()?;
            four(&mut peer)?;
            peer.say(OK)?;
        }
    });
    let proxy = Proxy::start(address, "HTTP");
    let mut client = proxy.connect();
    for _ in 0..2 {
        client.write_all(format!("{EXPECT}body").as_bytes()).unwrap();
        assert!(head(&mut client).starts_with("http/1.1 200 "));
        hears(&mut client, "ok");
    }
}

#[test]
fn a_refused_request_gets_no_100() {
    let (address, _seen) = answering();
    let proxy = Proxy::start(address, "HTTP");
    let mut client = proxy.connect();
    client.write_all(EXPECT.replace("POST / ", "POST /%00 ").as_bytes()).unwrap();
    assert!(head(&mut client).starts_with("http/1.1 400 "));
}

#[test]
fn answers_without_a_body_leave_the_connection_usable() {
    let address = origin(|mut peer, _| {
        for answer in [
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.1 204 No Content\r\n\r\n",
            "HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\netag: \"a\"\r\n\r\n",
            OK,
        ] {
            peer.request()?;
            peer.say(answer)?;
        }
        Ok(())
    });
    let proxy = Proxy::start(address, "HTTP");
    let mut client = proxy.connect();
    for (method, status, header) in [
        ("HEAD", 200, "content-length: 5\r\n"),
        ("HEAD", 200, ""),
        ("GET", 204, ""),
        ("GET", 304, "etag: \"a\"\r\n"),
        ("GET", 200, "content-length: 2\r\n"),
    ] {
        client.write_all(format!("{method} / HTTP/1.1\r\nHost: a.test\r\n\r\n").as_bytes()).unwrap();
        let head = head(&mut client);
        assert!(head.starts_with(&format!("http/1.1 {status} ")) && head.contains(header), "{method}: {head}");
    }
    hears(&mut client, "ok");
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let address = origin(|mut peer, _| {
        loop {
            let path = peer.request()?.head.split(' ').nth(1).unwrap().to_owned();
            peer.say(&format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{path}", path.len()))?;
        }
    });
    let proxy = Proxy::start(address, "HTTP");
    let requests: String = (0..50)
        .map(|n| format!("POST /{n} HTTP/1.1\r\nHost: a.test\r\ncontent-length: 1\r\n\r\nx"))
        .chain(["GET /last HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n".to_owned()])
        .collect();
    let answer = proxy.send(requests.as_bytes());
    assert_eq!(statuses(&answer), [200; 51]);
    let bodies: Vec<_> = answer.split("\r\n\r\n").skip(1).map(|part| part.split("HTTP/1.1").next().unwrap()).collect();
    assert_eq!(bodies[..3], ["/0", "/1", "/2"]);
    assert_eq!(bodies[49..], ["/49", "/last"]);
}

#[test]
fn bodies_stream_both_ways_at_once() {
    let address = origin(|mut peer, _| {
        peer.head()?;
        peer.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
        loop {
            let chunk = peer.take(6)?;
            peer.say(&String::from_utf8_lossy(&chunk))?;
            if chunk == b"1\r\nz\r\n" {
                return peer.say("0\r\n\r\n");
            }
        }
    });
    let proxy = Proxy::start(address, "HTTP");
    let mut client = proxy.connect();
    client.write_all(b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    assert!(head(&mut client).contains("transfer-encoding: chunked\r\n"));
    // Each part is back before the next one is sent.
    for part in ["1\r\na\r\n", "1\r\nb\r\n", "1\r\nz\r\n"] {
        client.write_all(part.as_bytes()).unwrap();
        hears(&mut client, part);
    }
    hears(&mut client, "0\r\n\r\n");
}

#[test]
fn an_answer_may_come_before_the_end_of_the_request() {
    let address = origin(|mut peer, number| {
        peer.head()?;
        if number > 0 {
            return peer.say(OK);
        }
        peer.take(4)?;
        peer.say("HTTP/1.1 413 Payload Too Large\r\ncontent-length: 3\r\n\r\nbig")?;
        // As Envoy, the proxy does not use the connection again.
        assert!(peer.head().is_err());
        Ok(())
    });
    let proxy = Proxy::start(address, "HTTP");
    let mut client = proxy.connect();
    client.write_all(b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1000000\r\n\r\nbody").unwrap();
    assert!(head(&mut client).starts_with("http/1.1 413 "));
    assert_eq!(rest(&mut client), "big");
    assert_eq!(statuses(&proxy.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")), [200]);
}

#[test]
fn trailers_leave_the_connection_usable() {
    let address = origin(|mut peer, _| {
        peer.request()?;
        peer.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-after\r\n\r\n2\r\nok\r\n0\r\nx-after: 1\r\n\r\n")?;
        peer.request()?;
        peer.say(OK)
    });
    let proxy = Proxy::start(address, "HTTP");
    let request = "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nTrailer: x-end\r\n\r\n2\r\nhi\r\n0\r\nx-end: 1\r\n\r\n\
                   GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n";
    assert_eq!(statuses(&proxy.send(request.as_bytes())), [200, 200]);
}

/// A WebSocket through the proxy: the client's end, and the origin's.
fn websocket() -> (Proxy, TcpStream, TcpStream) {
    let (opened, open) = channel();
    let address = origin(move |mut peer, _| {
        let head = peer.head()?.to_ascii_lowercase();
        assert!(head.contains("\r\nupgrade: websocket\r\n") && head.contains("\r\nconnection: upgrade\r\n"), "{head}");
        peer.say("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: a\r\n\r\n")?;
        opened.send(peer.stream).unwrap();
        Ok(())
    });
    let proxy = Proxy::start(address, "HTTP");
    let mut client = proxy.connect();
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n\r\n")
        .unwrap();
    let head = head(&mut client);
    assert!(head.starts_with("http/1.1 101 ") && head.contains("\r\nsec-websocket-accept: a\r\n"), "{head}");
    let server = open.recv_timeout(PATIENCE).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    (proxy, client, server)
}

#[test]
fn a_websocket_that_its_client_closes_is_closed_at_the_origin() {
    let (_proxy, mut client, mut server) = websocket();
    client.write_all(b"\x81\x02hi").unwrap();
    let mut frame = [0; 4];
    server.read_exact(&mut frame).unwrap();
    assert_eq!(&frame, b"\x81\x02hi");
    drop(client);
    assert_eq!(rest(&mut server), "");
}

#[test]
fn a_websocket_that_its_origin_closes_is_closed_at_the_client() {
    let (_proxy, mut client, mut server) = websocket();
    server.write_all(b"last").unwrap();
    drop(server);
    assert_eq!(rest(&mut client), "last");
}

#[test]
fn a_websocket_counts_as_a_connection_until_it_ends() {
    let (proxy, client, server) = websocket();
    let mut app = proxy.app;
    app.drain();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // It does not end while the WebSocket is open, and does when it is closed.
    let early = runtime.block_on(async { tokio::time::timeout(PATIENCE / 50, app.drained()).await });
    assert!(early.is_err());
    drop((client, server));
    runtime.block_on(async { tokio::time::timeout(PATIENCE, app.drained()).await }).unwrap();
}

#[test]
fn trailers_go_both_ways() {
    let (heard, hear) = channel();
    let address = origin(move |mut peer, _| {
        peer.head()?;
        let mut body = Vec::new();
        while !body.ends_with(b"\r\n\r\n") {
            body.extend(peer.take(1)?);
        }
        heard.send(String::from_utf8_lossy(&body).into_owned()).unwrap();
        peer.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-after\r\n\r\n2\r\nok\r\n0\r\nx-after: 1\r\n\r\n")
    });
    let proxy = Proxy::start(address, "HTTP");
    let answer = proxy.send(
        b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\nTrailer: x-end\r\n\
          Connection: close, te\r\n\r\n2\r\nhi\r\n0\r\nx-end: 1\r\n\r\n",
    );
    assert!(answer.to_ascii_lowercase().ends_with("2\r\nok\r\n0\r\nx-after: 1\r\n\r\n"), "{answer}");
    assert_eq!(hear.recv_timeout(PATIENCE).unwrap().to_ascii_lowercase(), "2\r\nhi\r\n0\r\nx-end: 1\r\n\r\n");
}

#[test]
fn a_client_of_http_1_0_may_keep_its_connection() {
    let (address, seen) = answering();
    let proxy = Proxy::start_with(address, "HTTP", |config| config.http.http10 = true);
    let mut client = proxy.connect();
    for _ in 0..2 {
        client.write_all(b"GET / HTTP/1.0\r\nHost: a.test\r\nConnection: keep-alive\r\n\r\n").unwrap();
        let head = head(&mut client);
        assert!(head.starts_with("http/1.0 200 ") && head.contains("\r\nconnection: keep-alive\r\n"), "{head}");
        hears(&mut client, "ok");
    }
    client.write_all(b"GET / HTTP/1.0\r\nHost: a.test\r\n\r\n").unwrap();
    assert!(head(&mut client).starts_with("http/1.0 200 "));
    assert_eq!(rest(&mut client), "ok");
    assert!(seen.iter().take(3).all(|seen| seen.head.contains(" HTTP/1.1\r\n")));
}

#[test]
fn http_1_0_has_no_chunks() {
    let (address, _seen) = answering();
    let proxy = Proxy::start_with(address, "HTTP", |config| config.http.http10 = true);
    let answer = proxy.send(b"POST / HTTP/1.0\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
    assert_eq!(statuses(&answer), [400]);
}

#[test]
fn http2_is_not_offered_by_an_upgrade_and_the_request_is_answered() {
    let (address, seen) = answering();
    let proxy = Proxy::start(address, "HTTP");
    let request = "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
                   HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n";
    let mut client = proxy.connect();
    for _ in 0..2 {
        client.write_all(request.as_bytes()).unwrap();
        assert!(head(&mut client).starts_with("http/1.1 200 "));
        hears(&mut client, "ok");
        let head = seen.recv_timeout(PATIENCE).unwrap().head.to_ascii_lowercase();
        assert!(!head.contains("upgrade") && !head.contains("http2-settings"), "{head}");
    }
}

#[test]
fn upgrades_that_istio_does_not_enable_are_refused() {
    let (address, _seen) = answering();
    let proxy = Proxy::start(address, "HTTP");
    let answer = proxy.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: spdy/3.1\r\n\r\n");
    assert_eq!(statuses(&answer), [403]);
    let line = proxy.line();
    assert!(line.contains("upgrade_failed"), "{line}");
}

/// A TCP connection through the transparent port: the client's end, and the origin's.
fn tcp() -> (Proxy, TcpStream, TcpStream) {
    let (opened, open) = channel();
    let address = origin(move |peer, _| {
        opened.send(peer.stream).unwrap();
        Ok(())
    });
    let proxy = Proxy::start_with(address, "TCP", |config| {
        config.transparent = Some("127.0.0.1:0".parse().unwrap());
        config.original_destination = |_| Ok(std::net::SocketAddr::from(([198, 18, 5, 5], 80)));
    });
    let client = TcpStream::connect(proxy.app.transparent.unwrap()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let server = open.recv_timeout(PATIENCE).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    (proxy, client, server)
}

#[test]
fn a_tcp_client_may_end_its_half_first() {
    let (proxy, mut client, mut server) = tcp();
    client.write_all(b"all").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&mut server), "all");
    for _ in 0..3 {
        server.write_all(b"late").unwrap();
        hears(&mut client, "late");
    }
    drop(server);
    assert_eq!(rest(&mut client), "");
    let line = proxy.line();
    assert!(line.contains(" 0 - 3 12 "), "{line}");
}

#[test]
fn a_tcp_server_may_end_its_half_first() {
    let (proxy, mut client, mut server) = tcp();
    server.write_all(b"all").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&mut client), "all");
    for _ in 0..3 {
        client.write_all(b"late").unwrap();
        hears(&mut server, "late");
    }
    drop(client);
    assert_eq!(rest(&mut server), "");
    let line = proxy.line();
    assert!(line.contains(" 0 - 12 3 "), "{line}");
}
