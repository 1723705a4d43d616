//! The admin port, for people and for Prometheus: never for subscribers, and on loopback unless asked for otherwise.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

use crate::embed::Controller;

const INDEX: &str = "\
/ready        200 while subscribers are served
/healthz      200 while the compiler lives
/metrics      counters and gauges for Prometheus
/config_dump  what is held, compiled and subscribed to, as JSON
";

/// What the pages are about.
#[derive(Clone)]
pub struct Admin {
    controller: Controller,
    ready: Arc<AtomicBool>,
}

impl Admin {
    /// The pages of a controller, not ready yet.
    pub fn new(controller: Controller) -> Self {
        Admin { controller, ready: Arc::default() }
    }

    /// Says whether subscribers are served.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// The routes.
    pub fn router(&self) -> Router {
        Router::new()
            .route("/", get(|| async { INDEX }))
            .route("/ready", get(ready))
            .route("/healthz", get(healthz))
            .route("/metrics", get(metrics))
            .route("/config_dump", get(dump))
            .with_state(self.clone())
    }
}

async fn ready(State(admin): State<Admin>) -> Response {
    match admin.ready.load(Ordering::Relaxed) {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response(),
    }
}

async fn healthz(State(admin): State<Admin>) -> Response {
    match admin.controller.publisher().overview().await {
        Ok(_) => "ok\n".into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    }
}

/// Counters that are levels and not totals.
const LEVELS: [&str; 2] = ["subscribers", "discovery_streams"];

fn help(name: &str) -> &'static str {
    match name {
        "subscribers" => "Registry streams that are open",
        "updates" => "Registry updates sent",
        "pages" => "Pages in registry updates sent",
        "bytes" => "Size of registry updates sent, in bytes",
        "nacks" => "Registry updates that subscribers refused",
        "discovery_streams" => "Discovery streams that are open",
        "resources" => "Resources sent by discovery",
        "discovery_nacks" => "Discovery responses that clients refused",
        _ => "Subscribers refused because of who they are",
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let mut registry = Registry::with_prefix("portolan");
    for (name, value) in admin.controller.counters().all() {
        if LEVELS.contains(&name) {
            registry.register(name, help(name), ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)));
        } else {
            registry.register(name, help(name), ConstCounter::new(value));
        }
    }
    if let Some(cluster) = admin.controller.cluster() {
        cluster.status.register(&mut registry);
        admin.controller.counters().webhook.register(&mut registry);
    }
    if let Ok(overview) = admin.controller.publisher().overview().await {
        let gauge = |n: usize| ConstGauge::new(i64::try_from(n).unwrap_or(i64::MAX));
        registry.register("objects", "Resources that are held", gauge(overview.objects.values().sum()));
        registry.register("scopes", "Scopes that are compiled", gauge(overview.scopes.len()));
        let sizes = overview.scopes.iter().flat_map(|(_, p)| p.pages.iter().map(|page| page.data.len()));
        registry.register("snapshot_bytes", "Size of all compiled snapshots", gauge(sizes.sum()));
    }
    // Conflicts between resources are among them.
    let findings = Family::<Vec<(&str, String)>, Gauge>::default();
    for ((gate, severity, code), count) in admin.controller.status().findings() {
        let text = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
        let labels = vec![("gate", text(&gate)), ("severity", text(&severity)), ("code", code.to_owned())];
        findings.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
    registry.register("findings", "Findings about resources that are in force", findings);
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn dump(State(admin): State<Admin>) -> Response {
    let overview = match admin.controller.publisher().overview().await {
        Ok(overview) => overview,
        Err(error) => return (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    };
    let objects: serde_json::Map<String, Value> =
        overview.objects.iter().map(|(kind, n)| (format!("{kind:?}"), (*n).into())).collect();
    let scopes = overview.scopes.iter().map(|(scope, published)| {
        let plans = published.plans.values().map(|plan| {
            let wildcard = plan.wildcard.map(|i| json!({ "tls": i.tls, "http": i.http }));
            json!({ "port": plan.port, "wildcard": wildcard, "tcpPrefixes": plan.tcp_prefixes,
                    "addresses": plan.addresses.iter().map(|a| a.address.clone()).collect::<Vec<_>>() })
        });
        json!({
            "namespace": scope.namespace,
            "role": format!("{:?}", scope.role).to_lowercase(),
            "ips": scope.ips,
            "version": published.version,
            "digest": format!("{:016x}", published.digest),
            "pages": published.pages.len(),
            "bytes": published.pages.iter().map(|page| page.data.len()).sum::<usize>(),
            "listenerPlans": plans.collect::<Vec<_>>(),
        })
    });
    let scopes: Vec<Value> = scopes.collect();
    let sessions = admin.controller.counters().sessions.all();
    let addresses: serde_json::Map<String, Value> =
        overview.addresses.into_iter().map(|(host, both)| (host, json!(both))).collect();
    let all = json!({ "objects": objects, "scopes": scopes, "subscribers": sessions, "addresses": addresses });
    Json(all).into_response()
}
