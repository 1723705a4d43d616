//! HTTP with a client, of either version: hyper, behind what judges each byte before it ([`super::guard`],
//! [`super::calm`]), with Envoy's limits.

use std::{error::Error, pin::pin, sync::Arc, time::Duration};

use ::http::{Request, Response};
use hyper::{
    body::{Body, Incoming},
    rt::bounds::Http2ServerConnExec,
    server::conn::{http1, http2},
    service::Service,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::watch;

use super::{
    calm::Calm,
    guard::{Control, Guard},
    rewind::Rewind,
};
use crate::exec::LocalExec;

/// What a client may ask of this proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpLimits {
    /// Bytes of the headers of a request, and in HTTP/1.1 of a chunk's size line or a trailer.
    pub header_bytes: u32,
    /// Headers of a request, and trailers.
    pub headers: usize,
    /// Streams of an HTTP/2 connection at a time.
    pub streams: u32,
    /// Time from the first byte of a request to the last of its headers; zero for no limit.
    pub header_time: Duration,
}

impl Default for HttpLimits {
    /// Envoy's `max_request_headers_kb`, `max_headers_count`, `max_concurrent_streams`, `request_headers_timeout`.
    fn default() -> Self {
        Self { header_bytes: 60 * 1024, headers: 100, streams: 1024, header_time: Duration::ZERO }
    }
}

/// Serves the requests of one connection until it ends, or `stop` is true and those under way have ended.
pub async fn serve<S, B>(
    client: Rewind,
    http2: bool,
    limits: HttpLimits,
    mut stop: watch::Receiver<bool>,
    control: Arc<Control>,
    service: S,
) where
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Future: 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
    LocalExec: Http2ServerConnExec<S::Future, B>,
{
    // How a connection ends is told by its requests.
    if http2 {
        let mut calm = Calm::new(client, limits.header_time);
        {
            let mut builder = http2::Builder::new(LocalExec);
            builder
                .timer(TokioTimer::new())
                .max_header_list_size(limits.header_bytes)
                .max_concurrent_streams(limits.streams);
            let mut serving = pin!(builder.serve_connection(TokioIo::new(&mut calm), service));
            tokio::select! {
                _ = serving.as_mut() => {}
                stopped = stop.wait_for(|stop| *stop) => {
                    // A guard, which would keep others from saying the same again.
                    drop(stopped);
                    serving.as_mut().graceful_shutdown();
                    let _ = serving.await;
                }
            }
        }
        calm.linger().await;
    } else {
        let io = TokioIo::new(Guard::new(client, control, limits));
        let serving = http1::Builder::new().serve_connection(io, service).with_upgrades();
        let mut serving = pin!(serving);
        tokio::select! {
            _ = serving.as_mut() => {}
            stopped = stop.wait_for(|stop| *stop) => {
                drop(stopped);
                serving.as_mut().graceful_shutdown();
                let _ = serving.await;
            }
        }
    }
}
