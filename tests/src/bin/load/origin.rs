//! The far end: as little work as can be, so that the proxy is what is measured.

use std::convert::Infallible;

use http_body_util::Full;
use hyper::{Response, body::Bytes, server::conn::http2, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::spawn_local,
};

use crate::bytes::CHUNK;

/// Body of every answer.
pub const BODY: &[u8] = b"hello from the origin\n";

/// Runs until the process is killed.
pub async fn run() -> anyhow::Result<serde_json::Value> {
    let http1 = TcpListener::bind("127.0.0.1:0").await?;
    let http2 = TcpListener::bind("127.0.0.1:0").await?;
    let bytes = TcpListener::bind("127.0.0.1:0").await?;
    println!("{} {} {}", http1.local_addr()?, http2.local_addr()?, bytes.local_addr()?);
    loop {
        // How a connection ends is for the client to judge.
        tokio::select! {
            stream = http1.accept() => { spawn_local(plain(stream?.0)); }
            stream = http2.accept() => { spawn_local(multiplexed(stream?.0)); }
            stream = bytes.accept() => { spawn_local(raw(stream?.0)); }
        }
    }
}

/// Answers each head; requests come without bodies.
async fn plain(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n", BODY.len());
    let answer = [head.as_bytes(), BODY].concat();
    let mut buffer = Vec::with_capacity(4096);
    loop {
        match stream.read_buf(&mut buffer).await {
            Ok(1..) => {}
            _ => return,
        }
        while let Some(end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            buffer.drain(..end + 4);
            if stream.write_all(&answer).await.is_err() {
                return;
            }
        }
    }
}

async fn multiplexed(stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(|_| async {
        let mut response = Response::new(Full::new(Bytes::from_static(BODY)));
        response.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("text/plain"));
        Ok::<_, Infallible>(response)
    });
    let _ = http2::Builder::new(Local).serve_connection(TokioIo::new(stream), service).await;
}

/// The first byte says which way the bytes go: `<` for to the client, anything else for from it.
async fn raw(mut stream: TcpStream) {
    let Ok(way) = stream.read_u8().await else { return };
    let mut buffer = vec![0; CHUNK];
    if way == b'<' {
        while stream.write_all(&buffer).await.is_ok() {}
        return;
    }
    while matches!(stream.read(&mut buffer).await, Ok(1..)) {}
    let _ = stream.write_all(b"end").await;
}

/// Runs hyper's tasks on this thread.
#[derive(Clone)]
pub struct Local;

impl<F> hyper::rt::Executor<F> for Local
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        spawn_local(future);
    }
}
