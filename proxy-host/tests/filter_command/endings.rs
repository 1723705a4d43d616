//! What the filter's log callback is told of streams that end before their time.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use crate::{
    http::same,
    support::{Host, Setup, server},
};

const CONFIGURATION: &str = "response.flags\nresponse.code\nresponse.code_details";

/// Envoy's response flags, as a filter sees them.
const DISCONNECTED: &str = "log response.flags 0040000000000000";
const PROTOCOL_ERROR: &str = "log response.flags 0000040000000000";
const RESET: &str = "log response.flags 0000001000000000";

/// What the log callback is told.
fn log(host: &Host) -> Vec<String> {
    host.wait_count("log", 3).into_iter().filter(|line| line.starts_with("log")).collect()
}

/// An origin that begins an answer and says nothing more.
fn half() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let mut held = Vec::new();
        for mut stream in listener.incoming().flatten() {
            // What becomes of it the test sees.
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf");
            held.push(stream);
        }
    });
    address
}

fn silent(http2: bool) -> SocketAddr {
    server(http2, |_| std::future::pending())
}

fn begin(host: &Host, request: &[u8]) -> TcpStream {
    let mut client = TcpStream::connect(host.address).unwrap();
    client.write_all(request).unwrap();
    client
}

#[test]
fn a_client_that_leaves_before_its_answer() {
    for request in ["GET / HTTP/1.1\r\nhost: a\r\n\r\n", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf"]
    {
        let setup = Setup { configuration: CONFIGURATION, ..Setup::new("properties", silent(false)) };
        let said = same(&setup, "leaving early", |host| {
            let client = begin(host, request.as_bytes());
            host.printed("@@ request");
            drop(client);
            log(host)
        });
        assert_eq!(said[0], DISCONNECTED);
    }
}

#[test]
fn a_client_that_leaves_within_its_answer() {
    let setup = Setup { configuration: CONFIGURATION, ..Setup::new("properties", half()) };
    let said = same(&setup, "leaving within", |host| {
        let mut client = begin(host, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n");
        let mut heard = Vec::new();
        while !heard.ends_with(b"half") {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            heard.extend(byte);
        }
        drop(client);
        log(host)
    });
    assert_eq!(said[0], DISCONNECTED);
}

#[test]
fn a_client_whose_body_is_broken() {
    let setup = Setup { configuration: CONFIGURATION, ..Setup::new("properties", silent(false)) };
    let (said, answer) = same(&setup, "a broken body", |host| {
        let mut client = begin(host, b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n");
        host.printed("@@ request");
        client.write_all(b"none\r\n").unwrap();
        let mut answer = Vec::new();
        // It ends, with a reset or without.
        let _ = client.read_to_end(&mut answer);
        let line = String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned();
        (log(host), line)
    });
    assert_eq!((said[0].as_str(), answer.as_str()), (PROTOCOL_ERROR, "HTTP/1.1 400 Bad Request"));
}

#[test]
fn a_client_of_http2_that_resets_its_stream() {
    let setup = Setup { configuration: CONFIGURATION, http2: true, ..Setup::new("properties", silent(true)) };
    let said = same(&setup, "a reset", |host| {
        let frames: [&[u8]; 3] = [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\0\0\0\x04\0\0\0\0\0",
            b"\0\0\x0b\x01\x05\0\0\0\x01\x82\x86\x84\x41\x06a.test",
        ];
        let mut client = begin(host, &frames.concat());
        host.printed("@@ request");
        client.write_all(b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\x08").unwrap();
        log(host)
    });
    assert_eq!(said[0], RESET);
}

#[test]
fn a_request_that_has_no_path_is_answered_with_404() {
    let setup = Setup { configuration: CONFIGURATION, ..Setup::new("properties", silent(false)) };
    let answers = same(&setup, "requests of no place", |host| {
        ["OPTIONS * HTTP/1.1\r\nhost: a\r\n", "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n"].map(|request| {
            let mut client = begin(host, format!("{request}\r\n").as_bytes());
            let mut line = [0; 12];
            client.read_exact(&mut line).unwrap();
            String::from_utf8_lossy(&line).into_owned()
        })
    });
    assert_eq!(answers, ["HTTP/1.1 404"; 2]);
}
