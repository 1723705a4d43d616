//! The admin port: what the proxy, or a filter's host, is doing, for people, for Kubernetes' probes and for Prometheus. Off
//! unless asked for.
//!
//! It has a thread of its own, so that nobody who asks slows traffic, and it answers even when all workers are busy.

mod dump;
pub mod filter;
mod metrics;

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, thread, time::Duration};

use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE},
};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use portolan_controller::{serve::Counters, source::ledger::Status};
use tokio::{
    net::TcpListener,
    runtime::Builder,
    sync::{mpsc, watch},
};

use crate::{
    app::AppError,
    config::Config,
    control::Question,
    logging::{self, LevelError},
    stats::Stats,
    vm::Shared,
};

/// How long the control thread and the workers may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause after a failure to accept.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a client may take to send the head of its request.
const HEAD: Duration = Duration::from_secs(10);

const INDEX: &str = "Portolan's proxy-host. GET, if nothing else is said:
  /ready        200 once each worker's filter has the registry, 503 before and while the proxy ends
  /healthz      200 for as long as the process answers
  /metrics      counters and gauges, for Prometheus
  /config_dump  settings, listener plans, clusters and findings, as JSON
  /clusters     clusters in use, their endpoints, and what is under way to each
  /logging      level of the log; POST /logging?level=debug changes it
";

/// What is known of the controller within this process.
#[derive(Debug, Clone)]
pub struct ControllerState {
    /// What it served.
    pub counters: Arc<Counters>,
    /// What it reads.
    pub sources: Arc<Status>,
}

/// What an admin port tells, besides what each has: the index, `/healthz` and `/logging`.
pub(crate) trait Pages: Send + Sync + 'static {
    /// Its pages, for people.
    const INDEX: &str;
    /// Paths of its pages.
    const PATHS: &[&str];

    /// One of [`Pages::PATHS`].
    fn page(&self, path: &str) -> impl Future<Output = Answer> + Send;

    /// Sets the level of the log.
    fn set_level(&self, level: &str) -> Result<(), LevelError> {
        logging::set_level(level)
    }

    /// Waits until there is nothing left to tell of.
    fn ended(&self) -> impl Future<Output = ()> + Send;
}

/// What the admin port tells of.
pub struct Admin {
    /// The settings.
    pub config: Config,
    /// Where the proxy listens: transparently, and as an HTTP proxy.
    pub listeners: (Option<SocketAddr>, Vec<SocketAddr>),
    /// What workers count.
    pub stats: Arc<Stats>,
    /// What the filter counts.
    pub filter: Arc<Shared>,
    /// The controller, where it is in this process.
    pub controller: Option<ControllerState>,
    /// Asks the control thread.
    pub questions: mpsc::UnboundedSender<Question>,
    /// Turns true when the process is to end.
    pub stop: watch::Receiver<bool>,
}

/// Starts the thread that answers; gives the address.
///
/// # Errors
/// No thread, no runtime, or a socket that cannot be used.
pub fn start(listener: std::net::TcpListener, admin: Admin) -> Result<SocketAddr, AppError> {
    Ok(start_pages(listener, admin)?)
}

pub(crate) fn start_pages<P: Pages>(listener: std::net::TcpListener, pages: P) -> io::Result<SocketAddr> {
    let address = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "the admin port can be reached from elsewhere; whoever reaches it may use it");
    }
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let listener = {
        let _in = runtime.enter();
        TcpListener::from_std(listener)?
    };
    let pages = Arc::new(pages);
    // It answers until the process ends, so that it can be seen how that goes.
    thread::Builder::new().name("admin".into()).spawn(move || runtime.block_on(serve(listener, pages)))?;
    Ok(address)
}

async fn serve<P: Pages>(listener: TcpListener, pages: Arc<P>) {
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            () = pages.ended() => return,
        };
        match stream {
            Ok((stream, _)) => {
                let pages = pages.clone();
                let answer = service_fn(move |request| {
                    let pages = pages.clone();
                    async move { Ok::<_, Infallible>(answer(&*pages, &request).await) }
                });
                tokio::spawn(async move {
                    let mut server = hyper::server::conn::http1::Builder::new();
                    server.timer(TokioTimer::new()).header_read_timeout(HEAD);
                    // A client that goes away is its own affair.
                    let _ = server.serve_connection(TokioIo::new(stream), answer).await;
                });
            }
            Err(error) => {
                tracing::warn!("admin port: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

pub(crate) type Answer = Response<Full<Bytes>>;

fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    typed(status, "text/plain; charset=utf-8", body)
}

fn typed(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    answer
}

async fn answer<P: Pages>(pages: &P, request: &Request<Incoming>) -> Answer {
    let path = request.uri().path();
    if path == "/logging" && request.method() == Method::POST {
        return set_level(pages, request.uri().query().unwrap_or_default());
    }
    let known = matches!(path, "/" | "/healthz" | "/logging") || P::PATHS.contains(&path);
    if known && !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, format!("{path} is read with GET\n"));
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return answer;
    }
    match path {
        "/" => text(StatusCode::OK, P::INDEX),
        "/healthz" => text(StatusCode::OK, "ok\n"),
        "/logging" => match logging::level() {
            Some(level) => text(StatusCode::OK, format!("{level}\n")),
            None => text(StatusCode::NOT_IMPLEMENTED, format!("{}\n", LevelError::NotOurs)),
        },
        path if known => pages.page(path).await,
        _ => text(StatusCode::NOT_FOUND, format!("there is no such page\n\n{}", P::INDEX)),
    }
}

impl Pages for Admin {
    const INDEX: &str = INDEX;
    const PATHS: &[&str] = &["/ready", "/metrics", "/config_dump", "/clusters"];

    async fn page(&self, path: &str) -> Answer {
        match path {
            "/ready" => ready(self),
            "/metrics" => openmetrics(metrics::text(self).await),
            "/config_dump" => match dump::config(self).await {
                Some(json) => typed(StatusCode::OK, "application/json", format!("{json:#}\n")),
                None => unavailable(),
            },
            _ => dump::clusters(self).await.map_or_else(unavailable, |body| text(StatusCode::OK, body)),
        }
    }

    async fn ended(&self) {
        // The control thread ends with the application.
        self.questions.closed().await;
    }
}

fn openmetrics(written: Result<String, std::fmt::Error>) -> Answer {
    match written {
        Ok(body) => typed(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", body),
        Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "metrics cannot be written\n"),
    }
}

fn unavailable() -> Answer {
    text(StatusCode::SERVICE_UNAVAILABLE, "the control thread does not answer\n")
}

fn ready(admin: &Admin) -> Answer {
    let (ready, workers) = (admin.stats.sum(|worker| &worker.ready), admin.stats.workers());
    if *admin.stop.borrow() {
        text(StatusCode::SERVICE_UNAVAILABLE, "DRAINING\n")
    } else if ready < workers as u64 {
        let body = format!("PRE_INITIALIZING: {ready} of {workers} workers have the registry\n");
        text(StatusCode::SERVICE_UNAVAILABLE, body)
    } else {
        text(StatusCode::OK, "LIVE\n")
    }
}

fn set_level(pages: &impl Pages, query: &str) -> Answer {
    let usage = "POST /logging?level=LEVEL, where LEVEL is error, warn, info, debug or trace\n";
    let Some(level) = query.split('&').find_map(|pair| pair.strip_prefix("level=")) else {
        return text(StatusCode::BAD_REQUEST, usage);
    };
    // What a tracing filter needs and a form encodes.
    let level = level.replace("%3D", "=").replace("%2C", ",").replace("%3A", ":");
    match pages.set_level(&level) {
        Ok(()) => {
            tracing::info!(filter = level, "the level of the log was changed on the admin port");
            text(StatusCode::OK, format!("{level}\n"))
        }
        Err(error @ LevelError::Unknown(..)) => text(StatusCode::BAD_REQUEST, format!("{error}\n{usage}")),
        Err(error) => text(StatusCode::NOT_IMPLEMENTED, format!("{error}\n")),
    }
}
