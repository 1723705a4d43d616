//! HTTP/2 and gRPC through the whole proxy.

use crate::http_support;
use crate::proxy_support;
use crate::raw_http2;

use std::{convert::Infallible, net::SocketAddr, thread, time::Duration};

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Bytes, Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proxy_support::{HTTP, PATIENCE, entry, origin, start};
use raw_http2::{Client, DATA, END_HEADERS, END_STREAM, GET, GOAWAY, HEADERS, RST_STREAM, SLOW, frame};
use tokio::net::TcpStream;

type Body = BoxBody<Bytes, Infallible>;

const GRPC: &str = "number: 80, name: grpc, protocol: GRPC";

fn trailers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
}

/// Data, then trailers.
fn body(data: &'static [u8], end: HeaderMap) -> Body {
    let frames = [Frame::data(Bytes::from_static(data)), Frame::trailers(end)];
    BoxBody::new(StreamBody::new(futures_util::stream::iter(frames.map(Ok))))
}

/// A gRPC server: `/echo` sends back what came, with the request's trailers in its own; `/only` answers with headers
/// alone; `/early` answers before it has read anything.
fn grpc_server() -> SocketAddr {
    http_support::serve(move |listener| async move {
        while let Ok((stream, _)) = listener.accept().await {
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(stream), service_fn(call)));
        }
    })
}

async fn call(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let mut response = Response::builder().header("content-type", "application/grpc");
    Ok(match request.uri().path() {
        "/only" => {
            response = response.header("grpc-status", "5").header("grpc-message", "nothing here");
            response.body(BoxBody::new(Full::new(Bytes::new()))).unwrap()
        }
        "/early" => response.body(body(b"early", trailers(&[("grpc-status", "8")]))).unwrap(),
        _ => {
            assert_eq!(request.headers()["te"], "trailers");
            let read = request.into_body().collect().await.unwrap();
            let came = read.trailers().cloned().unwrap_or_default();
            let mut end = trailers(&[("grpc-status", "0")]);
            end.extend(came);
            let frames = [Frame::data(read.to_bytes()), Frame::trailers(end)];
            response.body(BoxBody::new(StreamBody::new(futures_util::stream::iter(frames.map(Ok))))).unwrap()
        }
    })
}

/// What came of a call: HTTP's status, headers, data, trailers.
type Called = (StatusCode, HeaderMap, Bytes, Option<HeaderMap>);

/// Calls `http://a.test/` and this path through a proxy.
fn grpc(resources: &str, path: &str, request: Body) -> Called {
    let folder = tempfile::tempdir().unwrap();
    let (app, _lines) = start(folder.path(), resources, |_| {});
    let proxy = app.http_proxies[0];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let calling = async {
        let stream = TokioIo::new(TcpStream::connect(proxy).await.unwrap());
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        tokio::spawn(connection);
        let request = Request::post(format!("http://a.test{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(request)
            .unwrap();
        let (head, body) = sender.send_request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap();
        let end = body.trailers().cloned();
        (head.status, head.headers, body.to_bytes(), end)
    };
    runtime.block_on(async { tokio::time::timeout(PATIENCE, calling).await }).unwrap()
}

#[test]
fn grpc_has_its_trailers_both_ways() {
    let request = body(b"\0\0\0\0\x02hi", trailers(&[("x-end", "of the request")]));
    let (status, headers, data, end) = grpc(&entry("a", "a.test", GRPC, grpc_server()), "/echo", request);
    let end = end.unwrap();
    assert_eq!(
        (status, &headers["content-type"], &data[5..]),
        (StatusCode::OK, &"application/grpc".parse().unwrap(), &b"hi"[..])
    );
    assert_eq!((&end["grpc-status"], &end["x-end"]), (&"0".parse().unwrap(), &"of the request".parse().unwrap()));
}

#[test]
fn grpc_may_answer_with_trailers_only() {
    let request = body(b"\0\0\0\0\x02hi", HeaderMap::new());
    let (status, headers, data, end) = grpc(&entry("a", "a.test", GRPC, grpc_server()), "/only", request);
    assert_eq!((status, &headers["grpc-status"], data.len(), end), (StatusCode::OK, &"5".parse().unwrap(), 0, None));
    assert_eq!(headers["grpc-message"], "nothing here");
}

#[test]
fn grpc_may_answer_before_the_request_has_ended() {
    // A body that never ends.
    let frames = futures_util::stream::pending::<Result<Frame<Bytes>, Infallible>>();
    let request = BoxBody::new(StreamBody::new(frames));
    let (_, _, data, end) = grpc(&entry("a", "a.test", GRPC, grpc_server()), "/early", request);
    assert_eq!((&data[..], &end.unwrap()["grpc-status"]), (&b"early"[..], &"8".parse().unwrap()));
}

#[test]
fn a_refused_grpc_call_has_a_status_of_grpc() {
    let (status, headers, _, _) = grpc("", "/echo", body(b"", HeaderMap::new()));
    assert_eq!((status, &headers["content-type"]), (StatusCode::OK, &"application/grpc".parse().unwrap()));
    assert_eq!(headers["grpc-status"], "14");
}

#[test]
fn clients_are_told_when_the_proxy_ends_and_their_requests_end_first() {
    let folder = tempfile::tempdir().unwrap();
    let (began, begun) = std::sync::mpsc::channel();
    let (answer, answers) = std::sync::mpsc::channel::<()>();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let resources = entry("a", "a.test", HTTP, listener.local_addr().unwrap());
    thread::spawn(move || {
        use std::io::Write as _;
        let (mut stream, _) = listener.accept().unwrap();
        proxy_support::read_head(&mut stream).unwrap();
        began.send(()).unwrap();
        answers.recv_timeout(PATIENCE).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlast").unwrap();
    });
    let (app, _lines) = start(folder.path(), &resources, |config| config.drain = PATIENCE);
    let mut client = Client::connect(app.http_proxies[0]);
    client.send(&frame(HEADERS, END_STREAM | END_HEADERS, 1, SLOW));
    begun.recv_timeout(PATIENCE).unwrap();
    app.drain();
    // NO_ERROR
    assert_eq!(client.goaway(), Some(0));
    answer.send(()).unwrap();
    assert_eq!(client.frame_of(&[DATA, RST_STREAM]), Some((DATA, 1, b"last".to_vec())));
}

#[test]
fn a_stream_that_its_client_resets_leaves_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let resources = entry("a", "a.test", HTTP, origin("other", PATIENCE));
    let (app, _lines) = start(folder.path(), &resources, |_| {});
    let mut client = Client::connect(app.http_proxies[0]);
    client.send(&frame(HEADERS, END_STREAM | END_HEADERS, 1, SLOW));
    client.send(&frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes()));
    client.send(&frame(HEADERS, END_STREAM | END_HEADERS, 3, GET));
    assert_eq!(client.frame_of(&[DATA, RST_STREAM, GOAWAY]), Some((DATA, 3, b"other".to_vec())));
}

#[test]
fn an_upstream_that_is_not_there_is_a_503_of_its_stream_alone() {
    let folder = tempfile::tempdir().unwrap();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (app, _lines) = start(folder.path(), &entry("a", "a.test", HTTP, closed), |_| {});
    let mut client = Client::connect(app.http_proxies[0]);
    client.0.set_read_timeout(Some(PATIENCE + Duration::from_secs(5))).unwrap();
    for id in [1, 3] {
        client.send(&frame(HEADERS, END_STREAM | END_HEADERS, id, GET));
        let (kind, stream, payload) = client.frame_of(&[DATA, RST_STREAM, GOAWAY]).unwrap();
        assert_eq!((kind, stream), (DATA, id));
        assert!(payload.starts_with(b"upstream connect error"), "{}", String::from_utf8_lossy(&payload));
    }
}

/// A server of HTTP/2 that refuses the first stream of all, and answers the others with what it read.
fn refusing() -> SocketAddr {
    http_support::serve(move |listener| async move {
        let mut refused = false;
        while let Ok((stream, _)) = listener.accept().await {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                if !refused {
                    refused = true;
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                    continue;
                }
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    let mut read = Vec::new();
                    while let Some(Ok(data)) = body.data().await {
                        let _ = body.flow_control().release_capacity(data.len());
                        read.extend_from_slice(&data);
                    }
                    let mut send = respond.send_response(Response::new(()), false).unwrap();
                    send.send_data(read.into(), true).unwrap();
                });
            }
        }
    })
}

#[test]
fn a_stream_that_its_server_refuses_is_asked_for_again() {
    for (method, body) in [("GET", ""), ("POST", "body")] {
        let folder = tempfile::tempdir().unwrap();
        let http2 = "number: 80, name: http2, protocol: HTTP2";
        let (app, lines) = start(folder.path(), &entry("a", "a.test", http2, refusing()), |_| {});
        let request = format!(
            "{method} http://a.test/ HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = proxy_support::exchange(app.http_proxies[0], &request);
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(body), "{answer}");
        assert!(lines.recv_timeout(PATIENCE).unwrap().contains(" 200 - "));
    }
}
