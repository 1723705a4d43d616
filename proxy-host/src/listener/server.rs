//! HTTP with a client, of either version: hyper, behind what judges each byte before it ([`super::guard`],
//! [`super::calm`]), with Envoy's limits.

use std::{
    error::Error,
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use ::http::{Request, Response};
use hyper::{
    body::{Body, Incoming},
    rt::bounds::Http2ServerConnExec,
    server::conn::http2,
    service::Service,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::watch;

use super::{
    calm::Calm,
    guard::{Control, End},
    keep_alive,
    rewind::Rewind,
};
use crate::{exec::StreamExec, idle};

/// Connections that are told to end for want of requests get this long (Envoy's `drain_timeout`).
const DRAIN: Duration = Duration::from_secs(5);

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
    /// HTTP/1.0 is taken.
    pub http10: bool,
    /// Silence on a stream, either way, that ends it; zero for no limit.
    pub stream_idle: Duration,
    /// Time without a request that ends a connection; zero for no limit.
    pub connection_idle: Duration,
}

impl Default for HttpLimits {
    /// Envoy's `max_request_headers_kb`, `max_headers_count`, `max_concurrent_streams`, `request_headers_timeout` and
    /// `idle_timeout`; as under Istio, streams may be silent.
    fn default() -> Self {
        Self {
            header_bytes: 60 * 1024,
            headers: 100,
            streams: 1024,
            header_time: Duration::ZERO,
            http10: false,
            stream_idle: Duration::ZERO,
            connection_idle: Duration::from_secs(3600),
        }
    }
}

/// Serves the requests of one connection until it ends, or those under way have ended after `stop` is true or after the
/// time that a connection without requests may take; `look` gives the number of requests so far, `None` while one is
/// under way.
pub async fn serve<S, B>(
    client: Rewind,
    http2: bool,
    limits: HttpLimits,
    stop: watch::Receiver<bool>,
    control: Arc<Control>,
    service: S,
    look: impl Fn() -> Option<u64>,
) where
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Future: 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
    StreamExec: Http2ServerConnExec<S::Future, B>,
{
    if http2 {
        // In a box, so that connections of the other version have no room for it.
        Box::pin(serve_http2(client, limits, stop, control, service, look)).await;
    } else {
        keep_alive::serve(client, limits, stop, control, service, look).await;
    }
}

async fn serve_http2<S, B>(
    client: Rewind,
    limits: HttpLimits,
    mut stop: watch::Receiver<bool>,
    control: Arc<Control>,
    service: S,
    look: impl Fn() -> Option<u64>,
) where
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Future: 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
    StreamExec: Http2ServerConnExec<S::Future, B>,
{
    let mut calm = Calm::new(client, control.clone(), limits.header_time);
    {
        let mut builder = http2::Builder::new(StreamExec { endable: !limits.stream_idle.is_zero() });
        builder
            .timer(TokioTimer::new())
            .max_header_list_size(limits.header_bytes)
            .max_concurrent_streams(limits.streams);
        let mut serving = pin!(builder.serve_connection(TokioIo::new(&mut calm), service));
        tokio::select! {
            // How a connection ends is told by its requests.
            _ = serving.as_mut() => {}
            idle = over(&mut stop, limits.connection_idle, &look) => {
                if !idle {
                    control.ends(End::Stopped);
                }
                serving.as_mut().graceful_shutdown();
                last(serving, idle, &look).await;
            }
        }
    }
    calm.linger().await;
}

/// Waits until a connection is to end; whether that is for want of requests.
async fn over(stop: &mut watch::Receiver<bool>, idle: Duration, look: impl Fn() -> Option<u64>) -> bool {
    tokio::select! {
        // What it gives is a guard, which would keep others from saying the same again.
        _ = stop.wait_for(|stop| *stop) => false,
        () = idle::quiet(idle, look) => true,
    }
}

/// Waits for the last requests of a connection. Where it is to end for want of any, its client need not agree.
pub(super) async fn last<R>(
    mut serving: Pin<&mut impl Future<Output = R>>,
    idle: bool,
    look: impl Fn() -> Option<u64>,
) {
    if idle {
        while let Err(_late) = tokio::time::timeout(DRAIN, serving.as_mut()).await {
            if look().is_some() {
                return;
            }
        }
    } else {
        let _ = serving.await;
    }
}
