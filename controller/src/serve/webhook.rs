//! A validating admission webhook: our validation, with conflicts as warnings. It keeps no state between requests, so that
//! what one resource does to it concerns no other.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;
use rustls::server::ServerConfig;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::tcp::{HANDSHAKE, TlsError, TlsFiles, accepted};
use crate::config::tree;
use crate::model::{Object, ServiceEntry};
use crate::source::kubernetes::store::{PLACE, Shared};
use crate::source::read::{self, Outcome};
use crate::validate::conflict::{self, Placed};
use crate::validate::finding::{Finding, Gate, Severity};

/// Most bytes of a request: two versions of the largest resource that an API server stores (1.5 MiB), and room.
const LIMIT: usize = 8 << 20;
/// Most warnings of an answer; API servers cut off what is longer than 4 KiB in all.
const WARNINGS: usize = 8;
/// Most bytes of one warning, beyond which API servers cut it.
const WARNING: usize = 256;

/// Requests that were answered.
#[derive(Debug, Default)]
pub struct Counters {
    allowed: AtomicU64,
    denied: AtomicU64,
    warned: AtomicU64,
    unreadable: AtomicU64,
}

impl Counters {
    /// Adds them to what Prometheus reads.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("webhook");
        for (name, help, counter) in [
            ("allowed", "Resources that were admitted", &self.allowed),
            ("denied", "Resources that were refused", &self.denied),
            ("warned", "Resources that were admitted with warnings", &self.warned),
            ("unreadable", "Requests that were no AdmissionReview", &self.unreadable),
        ] {
            registry.register(name, help, ConstCounter::new(counter.load(Relaxed)));
        }
    }
}

/// What the webhook knows.
#[derive(Clone)]
pub struct Webhook {
    /// The resources that are there already; `None` where nobody watches them.
    known: Option<Shared>,
    counters: Arc<super::Counters>,
}

/// `admission.k8s.io/v1` `AdmissionReview`, as far as it is read.
#[derive(Deserialize)]
struct Review {
    #[serde(rename = "apiVersion")]
    api_version: String,
    request: Request,
}

#[derive(Deserialize)]
struct Request {
    uid: String,
    #[serde(default)]
    operation: String,
    #[serde(default, rename = "subResource")]
    sub_resource: String,
    #[serde(default)]
    object: Value,
}

impl Webhook {
    /// A webhook that compares with these resources.
    pub fn new(known: Option<Shared>, counters: Arc<super::Counters>) -> Self {
        Webhook { known, counters }
    }

    fn counters(&self) -> &Counters {
        &self.counters.webhook
    }

    /// The routes: `/validate`, and `/healthz`.
    pub fn router(self) -> Router {
        Router::new()
            .route("/validate", post(validate))
            .route("/healthz", axum::routing::get(|| async { "ok\n" }))
            .layer(DefaultBodyLimit::max(LIMIT))
            .with_state(self)
    }

    /// Errors and warnings about a resource.
    fn judge(&self, object: Value) -> (Vec<String>, Vec<String>) {
        let (outcomes, findings) = read::resource(&tree::from_json(object, 0), &Arc::from(PLACE));
        // What the schema has to say the API server has said itself.
        let of = |severity| {
            let gate = |f: &&Finding| f.severity == severity && matches!(f.gate, Gate::Webhook | Gate::Portolan);
            findings.iter().filter(gate).map(|f| text(f, false)).collect::<Vec<_>>()
        };
        let (errors, mut warnings) = (of(Severity::Error), of(Severity::Warning));
        let read = outcomes.into_iter().find_map(|outcome| match outcome {
            Outcome::Object(object, _) => Some(youngest(object)),
            _ => None,
        });
        if let (Some(known), Some(object)) = (&self.known, read)
            // What is passed over is in nobody's way.
            && known.considers(&object.meta().namespace)
        {
            let key = object.key();
            let placed = Placed { object, file: Arc::from(PLACE), line: 0 };
            let own = |f: &Finding| f.namespace == key.namespace.as_str() && f.name == key.name.as_str();
            let found = conflict::about(&placed, &known.placed());
            warnings.extend(found.iter().map(|f| text(f, !own(f))));
        }
        (errors, warnings)
    }
}

/// A resource that is not stored yet has no age: it is the youngest.
fn youngest(object: Object) -> Object {
    match object {
        Object::ServiceEntry(entry) if entry.meta.created == 0 => {
            let mut entry: ServiceEntry = (*entry).clone();
            entry.meta.created = i64::MAX;
            Object::ServiceEntry(Arc::new(entry))
        }
        other => other,
    }
}

fn text(finding: &Finding, named: bool) -> String {
    let object = match named {
        true => format!("{} {}/{} ", finding.kind, finding.namespace, finding.name),
        false => String::new(),
    };
    let field = if finding.field.is_empty() { String::new() } else { format!("{}: ", finding.field) };
    format!("{object}{field}{} [{}]", finding.message, finding.code)
}

/// As much of a warning as an API server passes on.
fn short(mut warning: String) -> String {
    if warning.len() > WARNING {
        let cut = (0..=WARNING - 3).rev().find(|&at| warning.is_char_boundary(at)).unwrap_or_default();
        warning.truncate(cut);
        warning.push_str("...");
    }
    warning
}

async fn validate(State(webhook): State<Webhook>, body: axum::body::Bytes) -> Response {
    let review = match serde_json::from_slice::<Review>(&body) {
        Ok(review) if review.api_version == "admission.k8s.io/v1" => review,
        Ok(review) => {
            webhook.counters().unreadable.fetch_add(1, Relaxed);
            let message = format!("{} is not admission.k8s.io/v1\n", review.api_version);
            return (StatusCode::BAD_REQUEST, message).into_response();
        }
        Err(error) => {
            webhook.counters().unreadable.fetch_add(1, Relaxed);
            return (StatusCode::BAD_REQUEST, format!("no AdmissionReview: {error}\n")).into_response();
        }
    };
    let Request { uid, operation, sub_resource, object } = review.request;
    // What goes, and what only concerns the status, needs no judgement.
    let judged = if operation == "DELETE" || !sub_resource.is_empty() || object.is_null() {
        Ok((Vec::new(), Vec::new()))
    } else {
        let webhook = webhook.clone();
        tokio::task::spawn_blocking(move || webhook.judge(object)).await
    };
    let Ok((errors, warnings)) = judged else {
        // The failure policy of the webhook says what becomes of this one.
        return (StatusCode::INTERNAL_SERVER_ERROR, "validation failed\n").into_response();
    };
    let counter = match (errors.is_empty(), warnings.is_empty()) {
        (true, true) => &webhook.counters().allowed,
        (true, false) => {
            webhook.counters().allowed.fetch_add(1, Relaxed);
            &webhook.counters().warned
        }
        (false, _) => &webhook.counters().denied,
    };
    counter.fetch_add(1, Relaxed);
    let warnings: Vec<String> = warnings.into_iter().take(WARNINGS).map(short).collect();
    let mut response = json!({ "uid": uid, "allowed": errors.is_empty(), "warnings": warnings });
    if !errors.is_empty() {
        response["status"] =
            json!({ "status": "Failure", "code": 422, "reason": "Invalid", "message": errors.join("; ") });
    }
    Json(json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response }))
        .into_response()
}

/// Connections after their handshake. Each takes its handshake on its own, so that a slow client delays nobody.
struct Incoming {
    connections: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    address: SocketAddr,
}

impl axum::serve::Listener for Incoming {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.connections.recv().await {
            Some(connection) => connection,
            // The listener has ended with its runtime.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        Ok(self.address)
    }
}

/// Serves until it is dropped. Certificates are read again when their files change.
///
/// # Errors
/// The certificates cannot be loaded, or the listener fails.
pub async fn serve(webhook: Webhook, listener: TcpListener, files: TlsFiles) -> Result<(), WebhookError> {
    let (config, current) = watch::channel(files.load()?);
    let (sender, connections) = mpsc::channel(64);
    let incoming = Incoming { connections, address: listener.local_addr()? };
    let accept = async {
        loop {
            let (stream, address) = accepted(&listener).await;
            let (config, sender) = (http1(&current.borrow()), sender.clone());
            tokio::spawn(async move {
                match timeout(HANDSHAKE, TlsAcceptor::from(config).accept(stream)).await {
                    // Where nobody takes it, the process is about to end.
                    Ok(Ok(stream)) => drop(sender.send((stream, address)).await),
                    Ok(Err(error)) => tracing::warn!(%address, %error, "webhook: connection refused"),
                    Err(_) => tracing::warn!(%address, "webhook: the handshake takes too long"),
                }
            });
        }
    };
    tokio::select! {
        served = async { axum::serve(incoming, webhook.router()).await } => Ok(served?),
        // Where files cannot be watched the certificates stay as they are.
        () = async { files.follow(config).await; std::future::pending().await } => Ok(()),
        () = accept => Ok(()),
    }
}

/// The same certificates, for HTTP/1.1.
fn http1(config: &Arc<ServerConfig>) -> Arc<ServerConfig> {
    let mut config = ServerConfig::clone(config);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

/// Why the webhook does not run.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The listener failed.
    #[error("webhook: {0}")]
    Listener(#[from] std::io::Error),
}
