//! What an upstream of HTTP/2 may do: connections and streams that it ends, and those that it has no room for.

use crate::http_support;

use std::{
    future::Future,
    io::{Read as _, Write as _},
    net::SocketAddr,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread,
};

use bytes::Bytes;
use h2::{
    Reason, RecvStream,
    server::{Builder, Connection, SendResponse},
};
use http::{Request, Response};
use http_support::{PATIENCE, Proxy};
use tokio::{net::TcpStream, sync::Notify};

const GET: &str = "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n";

type Served = Connection<TcpStream, Bytes>;
type Asked = (Request<RecvStream>, SendResponse<Bytes>);

/// A server each of whose connections is served by `serve`, which gets the connection's number.
fn server<F: Future<Output = ()>>(builder: Builder, serve: impl Fn(Served, usize) -> F + Send + 'static) -> SocketAddr {
    http_support::serve(move |listener| async move {
        let mut number = 0;
        // One after the other: no test needs more.
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(connection) = builder.handshake(stream).await {
                serve(connection, number).await;
            }
            number += 1;
        }
    })
}

fn answer(respond: &mut SendResponse<Bytes>, body: impl Into<Bytes>) {
    let mut stream = respond.send_response(Response::new(()), false).unwrap();
    stream.send_data(body.into(), true).unwrap();
}

async fn accept(connection: &mut Served) -> Asked {
    connection.accept().await.unwrap().unwrap()
}

/// Goes on until the connection ends.
async fn to_the_end(mut connection: Served) {
    while let Some(Ok(_)) = connection.accept().await {}
}

#[test]
fn a_goaway_lets_requests_end_and_the_next_one_has_another_connection() {
    let origin = server(Builder::new(), |mut connection, number| async move {
        let (_, mut respond) = accept(&mut connection).await;
        connection.graceful_shutdown();
        // It ends when this is through.
        answer(&mut respond, format!("connection {number}"));
        to_the_end(connection).await;
    });
    let proxy = Proxy::start(origin, "HTTP2");
    for number in 0..3 {
        let got = proxy.send(GET.as_bytes());
        assert!(got.starts_with("HTTP/1.1 200 ") && got.contains(&format!("connection {number}")), "{got}");
        assert!(proxy.line().contains("\" 200 - "));
    }
}

#[test]
fn a_request_that_a_goaway_leaves_out_is_asked_for_again() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let origin = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut first, _) = listener.accept().unwrap();
        // Preface, its SETTINGS, WINDOW_UPDATE and HEADERS.
        let mut read = vec![0; 24];
        first.read_exact(&mut read).unwrap();
        first.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).unwrap();
        loop {
            let mut head = [0; 9];
            first.read_exact(&mut head).unwrap();
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            first.read_exact(&mut payload).unwrap();
            if head[3] == 1 {
                break;
            }
        }
        // Nothing of this connection was, or will be, looked at; NO_ERROR.
        first.write_all(&[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        let (second, _) = listener.accept().unwrap();
        second.set_nonblocking(true).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut connection = h2::server::handshake(TcpStream::from_std(second).unwrap()).await.unwrap();
            let (_, mut respond) = accept(&mut connection).await;
            answer(&mut respond, "again");
            to_the_end(connection).await;
        });
        drop(first);
    });
    let proxy = Proxy::start(origin, "HTTP2");
    let got = proxy.send(GET.as_bytes());
    assert!(got.starts_with("HTTP/1.1 200 ") && got.contains("again"), "{got}");
    assert!(proxy.line().contains("\" 200 - "));
}

#[test]
fn long_bodies_go_by_the_windows_both_ways() {
    let mut builder = Builder::new();
    builder.initial_window_size(1_000).initial_connection_window_size(70_000);
    let origin = server(builder, |mut connection, _| async move {
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            tokio::task::spawn(async move {
                let length = request.headers()["content-length"].clone();
                let mut body = request.into_body();
                let mut read = Vec::new();
                while let Some(data) = body.data().await {
                    let data = data.unwrap();
                    body.flow_control().release_capacity(data.len()).unwrap();
                    read.extend_from_slice(&data);
                }
                assert_eq!(length.to_str().unwrap().parse(), Ok(read.len()));
                answer(&mut respond, read);
            });
        }
    });
    let proxy = Proxy::start(origin, "HTTP2");
    let body = "0123456789abcdef".repeat(60_000);
    let head =
        format!("POST / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    let mut client = proxy.connect();
    client.write_all(head.as_bytes()).unwrap();
    client.write_all(body.as_bytes()).unwrap();
    let mut got = String::new();
    client.read_to_string(&mut got).unwrap();
    let (head, rest) = got.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 ") && rest.len() >= body.len(), "{head} {}", rest.len());
}

/// A server of one stream at a time, which answers a request when it is told to, and tells what came of each stream.
fn one_at_a_time() -> (SocketAddr, Receiver<&'static str>) {
    let (tells, told) = channel();
    let mut builder = Builder::new();
    builder.max_concurrent_streams(1);
    let origin = server(builder, move |mut connection, _| {
        let tells = tells.clone();
        async move {
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let tells = tells.clone();
                tokio::task::spawn(async move {
                    if request.uri().path() == "/never" {
                        tells.send("asked").unwrap();
                        let reset = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
                        tells.send(if reset.unwrap() == Reason::CANCEL { "cancelled" } else { "reset" }).unwrap();
                    } else {
                        answer(&mut respond, "ok");
                    }
                });
            }
        }
    });
    (origin, told)
}

#[test]
fn a_client_that_leaves_resets_its_stream_and_makes_room_for_those_that_wait() {
    let (origin, told) = one_at_a_time();
    let proxy = Proxy::start(origin, "HTTP2");
    // So that the server has said how many streams it takes.
    assert!(proxy.send(GET.as_bytes()).contains("ok"));
    for unfinished in [
        "GET /never HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "POST /never HTTP/1.1\r\nHost: a.test\r\nContent-Length: 9\r\n\r\nhalf",
    ] {
        let mut first = proxy.connect();
        first.write_all(unfinished.as_bytes()).unwrap();
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), "asked");
        let mut waiting = proxy.connect();
        waiting.write_all(GET.as_bytes()).unwrap();
        drop(first);
        // The POST's body broke off, which its client says by leaving.
        let how = told.recv_timeout(PATIENCE).unwrap();
        assert!(how == "cancelled" || unfinished.starts_with("POST"), "{how}");
        let mut got = String::new();
        waiting.read_to_string(&mut got).unwrap();
        assert!(got.starts_with("HTTP/1.1 200 "), "{got}");
    }
}

#[test]
fn a_stream_that_its_server_resets_is_told_and_leaves_the_connection() {
    let read = Arc::new(Notify::new());
    let is_read = read.clone();
    let origin = server(Builder::new(), move |mut connection, number| {
        let is_read = is_read.clone();
        async move {
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                match request.uri().path() {
                    "/before" => respond.send_reset(Reason::INTERNAL_ERROR),
                    "/within" => {
                        let mut stream = respond.send_response(Response::new(()), false).unwrap();
                        stream.send_data("half".into(), false).unwrap();
                        let is_read = is_read.clone();
                        tokio::task::spawn(async move {
                            is_read.notified().await;
                            stream.send_reset(Reason::INTERNAL_ERROR);
                        });
                    }
                    _ => answer(&mut respond, format!("connection {number}")),
                }
            }
        }
    });
    let proxy = Proxy::start(origin, "HTTP2");
    for (path, part, ending, details) in [
        ("/before", "remote reset", "503 UR", "upstream_reset_before_response_started{remote_reset}"),
        ("/within", "half", "200 UR", "upstream_reset_after_response_started{remote_reset}"),
    ] {
        let mut client = proxy.connect();
        client.write_all(GET.replace("GET /", &format!("GET {path}")).as_bytes()).unwrap();
        let mut got = Vec::new();
        while !String::from_utf8_lossy(&got).contains(part) {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            got.extend(byte);
        }
        if part == "half" {
            read.notify_one();
        }
        let line = proxy.line();
        assert!(line.contains(&format!("\" {ending} ")) && line.contains(&format!("\"{details}\"")), "{line}");
        let got = proxy.send(GET.as_bytes());
        assert!(got.contains("connection 0"), "{got}");
        proxy.line();
    }
}
