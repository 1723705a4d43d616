//! The state of the proxy, as JSON and as Envoy's list of clusters.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use super::{Admin, PATIENCE};
use crate::{
    config::{Config, Role, Source},
    control::{Question, State},
    upstream::{
        Resolved,
        cluster::{Address, Discovery},
    },
};

/// The plans and clusters in force; `None`: the control thread does not answer.
pub(super) async fn state(admin: &Admin) -> Option<State> {
    let (answer, state) = oneshot::channel();
    admin.questions.send(Question::State(answer)).ok()?;
    tokio::time::timeout(PATIENCE, state).await.ok()?.ok()
}

/// Everything that bears on where a request goes.
pub(super) async fn config(admin: &Admin) -> Option<Value> {
    let state = state(admin).await?;
    let plans: BTreeMap<_, _> = state.plans.0.iter().map(|(port, plan)| (port, json!(plan))).collect();
    let clusters: serde_json::Map<_, _> = (state.clusters.iter())
        .map(|(name, known)| (name.clone(), known.as_ref().map_or(Value::Null, |cluster| self::cluster(cluster))))
        .collect();
    let sources = admin.controller.as_ref().map(|controller| {
        let findings: Vec<_> = (controller.sources.findings().into_iter())
            .map(|((gate, severity, code), n)| json!({ "gate": gate, "severity": severity, "code": code, "count": n }))
            .collect();
        let (applied, refused) = controller.sources.reloads();
        json!({
            "resources": controller.sources.objects(),
            "findings": findings,
            "reloads": { "applied": applied, "with_errors": refused },
        })
    });
    let (transparent, http_proxies) = &admin.listeners;
    Some(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "settings": settings(&admin.config),
        "listeners": { "transparent": transparent, "http_proxy": http_proxies },
        "sources": sources,
        "listener_plans": plans,
        "clusters": clusters,
    }))
}

fn settings(config: &Config) -> Value {
    let source = match &config.source {
        Source::Files { paths, mesh } => json!({ "config": paths, "mesh": mesh }),
        Source::Controller(address) => json!({ "controller": address }),
    };
    let identity = &config.identity;
    let role = match identity.role {
        Role::Sidecar => "sidecar",
        Role::Gateway => "gateway",
    };
    json!({
        "source": source,
        "namespace": identity.namespace,
        "labels": identity.labels,
        "ip": identity.ips,
        "locality": identity.locality,
        "role": role,
        "threads": config.threads,
        "max_connections": config.max_connections,
        "drain_time": humantime::format_duration(config.drain).to_string(),
    })
}

fn cluster(cluster: &Resolved) -> Value {
    let discovery = match &cluster.discovery {
        Discovery::OriginalDst { port } => json!({ "original_destination": { "port": port } }),
        Discovery::DynamicForwardProxy { port } => json!({ "name_asked_for": { "port": port } }),
        Discovery::Endpoints(endpoints) => {
            let endpoint = |e: &crate::upstream::cluster::Endpoint<Vec<Address>>| {
                let addresses: Vec<_> = e.at.iter().map(ToString::to_string).collect();
                json!({ "addresses": addresses, "weight": e.weight, "priority": e.priority })
            };
            json!({ "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>() })
        }
    };
    json!({
        "discovery": discovery,
        "connect_timeout": humantime::format_duration(cluster.connect_timeout).to_string(),
        "policy": format!("{:?}", cluster.policy),
        "protocol": format!("{:?}", cluster.protocol),
        "dns": cluster.dns.map(|dns| format!("{dns:?}")),
    })
}

/// In Envoy's form: `cluster::address::what::value`.
pub(super) async fn clusters(admin: &Admin) -> Option<String> {
    let state = state(admin).await?;
    let (answer, mut answers) = mpsc::unbounded_channel();
    admin.questions.send(Question::Endpoints(answer)).ok()?;
    let mut endpoints: BTreeMap<(String, String), (u64, u32, u32)> = BTreeMap::new();
    // A worker that is busy for so long is left out rather than waited for.
    let gather = async {
        for _ in 0..admin.stats.workers() {
            for report in answers.recv().await.into_iter().flatten() {
                let addresses: Vec<_> = report.addresses.iter().map(ToString::to_string).collect();
                let of = endpoints.entry((report.cluster, addresses.join(","))).or_default();
                *of = (of.0 + u64::from(report.active), report.weight, report.priority);
            }
        }
    };
    let whole = tokio::time::timeout(PATIENCE, gather).await.is_ok();
    let mut out = String::new();
    for (name, known) in &state.clusters {
        let kind = match known.as_ref().map(|cluster| &cluster.discovery) {
            None => "unknown",
            Some(Discovery::OriginalDst { .. }) => "original_destination",
            Some(Discovery::DynamicForwardProxy { .. }) => "name_asked_for",
            Some(Discovery::Endpoints(_)) => "endpoints",
        };
        let _ = writeln!(out, "{name}::discovery::{kind}");
        // What a resolution found counts even where no worker has used it yet.
        if let Some(Discovery::Endpoints(list)) = known.as_ref().map(|cluster| &cluster.discovery) {
            for endpoint in list {
                let addresses: Vec<_> = endpoint.at.iter().map(ToString::to_string).collect();
                let key = (name.clone(), addresses.join(","));
                endpoints.entry(key).or_insert((0, endpoint.weight, endpoint.priority));
            }
        }
    }
    for ((name, addresses), (active, weight, priority)) in endpoints {
        let _ = writeln!(out, "{name}::{addresses}::rq_active::{active}");
        let _ = writeln!(out, "{name}::{addresses}::weight::{weight}");
        let _ = writeln!(out, "{name}::{addresses}::priority::{priority}");
    }
    if !whole {
        out.push_str("a worker did not answer in time; what it has under way is missing\n");
    }
    Some(out)
}
