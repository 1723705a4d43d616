//! Metrics for Prometheus: what workers, the filter and the controller have counted, added up when somebody asks.

use std::fmt;

use portolan_controller::validate::finding::{Gate, Severity};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, NoLabelSet, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::{Admin, dump};
use crate::{
    listener::Kind,
    stats::{self, DURATIONS, Stats},
    vm::{BUCKETS, MetricValue, Shared, TrapKind},
};

/// One name with its samples, each with its labels.
#[derive(Debug)]
struct Family {
    name: String,
    help: &'static str,
    samples: Samples,
}

type Labels = Vec<(&'static str, String)>;

#[derive(Debug)]
enum Samples {
    Counters(Vec<(Labels, u64)>),
    Gauges(Vec<(Labels, u64)>),
    /// Sum, and for each bucket its upper bound and how many fell into it.
    Histogram(f64, Vec<(f64, u64)>),
}

#[derive(Debug)]
struct Families(Vec<Family>);

impl Families {
    fn add(&mut self, name: impl Into<String>, help: &'static str, samples: Samples) {
        self.0.push(Family { name: name.into(), help, samples });
    }

    fn counter(&mut self, name: &str, help: &'static str, value: u64) {
        self.add(name, help, Samples::Counters(vec![(Vec::new(), value)]));
    }

    fn gauge(&mut self, name: &str, help: &'static str, value: u64) {
        self.add(name, help, Samples::Gauges(vec![(Vec::new(), value)]));
    }
}

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for Family { name, help, samples } in &self.0 {
            let kind = match samples {
                Samples::Counters(_) => MetricType::Counter,
                Samples::Gauges(_) => MetricType::Gauge,
                Samples::Histogram(..) => MetricType::Histogram,
            };
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            match samples {
                Samples::Counters(all) => {
                    for (labels, value) in all {
                        if labels.is_empty() {
                            metric.encode_counter::<NoLabelSet, _, u64>(value, None)?;
                        } else {
                            ConstCounter::new(*value).encode(metric.encode_family(labels)?)?;
                        }
                    }
                }
                Samples::Gauges(all) => {
                    for (labels, value) in all {
                        let value = i64::try_from(*value).unwrap_or(i64::MAX);
                        if labels.is_empty() {
                            metric.encode_gauge(&value)?;
                        } else {
                            ConstGauge::new(value).encode(metric.encode_family(labels)?)?;
                        }
                    }
                }
                Samples::Histogram(sum, buckets) => {
                    let count = buckets.iter().map(|bucket| bucket.1).sum();
                    metric.encode_histogram::<NoLabelSet>(*sum, count, buckets, None)?;
                }
            }
        }
        Ok(())
    }
}

/// All metrics in the text format that Prometheus reads.
///
/// # Errors
/// Never, as the text goes into memory.
pub(super) async fn text(admin: &Admin) -> Result<String, fmt::Error> {
    let mut families = Families(Vec::new());
    traffic(admin, &mut families);
    let state = dump::state(admin).await.unwrap_or_default();
    families.gauge("portolan_clusters", "Clusters that were asked for", state.clusters.len() as u64);
    workers(admin, &mut families);
    traps(&admin.filter, &mut families);
    controller(admin, &mut families);
    filter(&admin.filter, &mut families);
    write(families)
}

/// Of a filter's host: its clients, the filter's own, and how often it crashed.
///
/// # Errors
/// Never, as the text goes into memory.
pub(super) fn of_filter(shared: &Shared, stats: &Stats) -> Result<String, fmt::Error> {
    let mut families = Families(Vec::new());
    let sum = |cells: fn(&stats::WorkerStats) -> &[stats::Cell; 3]| {
        (0..3).map(|kind| stats.sum(|worker| &cells(worker)[kind])).sum()
    };
    families.counter("portolan_connections", "Client connections accepted", sum(|worker| &worker.accepted));
    families.gauge("portolan_connections_open", "Client connections that are open", sum(|worker| &worker.open));
    accept_failures(stats, &mut families);
    endings(stats, &mut families);
    traps(shared, &mut families);
    filter(shared, &mut families);
    write(families)
}

fn write(families: Families) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(families));
    let mut out = String::new();
    encode(&mut out, &registry)?;
    Ok(out)
}

fn traffic(admin: &Admin, families: &mut Families) {
    let stats = &admin.stats;
    let by_kind = |cell: fn(&stats::WorkerStats, usize) -> &stats::Cell| {
        [(Kind::Transparent, "transparent"), (Kind::HttpProxy, "http_proxy"), (Kind::Gateway, "gateway")]
            .map(|(kind, name)| (vec![("listener", name.to_owned())], stats.sum(|w| cell(w, stats::of(kind)))))
            .to_vec()
    };
    let accepted = by_kind(|worker, kind| &worker.accepted[kind]);
    families.add("portolan_connections", "Client connections accepted", Samples::Counters(accepted));
    let open = by_kind(|worker, kind| &worker.open[kind]);
    families.add("portolan_connections_open", "Client connections that are open", Samples::Gauges(open));
    let most = admin.config.max_connections as u64;
    families.gauge("portolan_connections_limit", "Client connections that there may be at a time", most);
    let refused = stats.sum(|w| &w.over_limit);
    families.counter("portolan_connections_refused", "Client connections refused because there were too many", refused);
    accept_failures(stats, families);
    endings(stats, families);
    upstreams(stats, families);
    let lost = stats.sum(|w| &w.lost_lines);
    families.counter(
        "portolan_access_log_lost_lines",
        "Lines of the access log dropped because nobody read them",
        lost,
    );
}

fn accept_failures(stats: &Stats, families: &mut Families) {
    let failed = stats.sum(|w| &w.accept_failures);
    families.counter("portolan_accept_failures", "Failures of the system to accept a connection", failed);
}

/// How requests and connections ended.
fn endings(stats: &Stats, families: &mut Families) {
    let (mut requests, mut connections) = (Vec::new(), Vec::new());
    for (ending, count) in stats.endings() {
        let flags = ("flags", if ending.flags.is_empty() { "-" } else { ending.flags }.to_owned());
        if ending.http {
            requests.push((vec![("code", ending.code.to_string()), flags], count));
        } else {
            connections.push((vec![flags], count));
        }
    }
    let help = "Requests that have ended, by status (0: none was sent) and Envoy's response flags";
    families.add("portolan_requests", help, Samples::Counters(requests));
    let help = "TCP connections that were proxied or refused and have ended, by Envoy's response flags";
    families.add("portolan_tcp_connections", help, Samples::Counters(connections));
    let bounds = DURATIONS.iter().map(|ms| *ms as f64).chain([f64::INFINITY]);
    let buckets = bounds.enumerate().map(|(at, bound)| (bound, stats.sum(|w| &w.durations[at]))).collect();
    let sum = stats.sum(|w| &w.duration_sum) as f64;
    let help = "Duration of requests, in milliseconds, to the last byte of the response";
    families.add("portolan_request_duration_milliseconds", help, Samples::Histogram(sum, buckets));
    families.counter("portolan_received_bytes", "Body bytes from clients", stats.sum(|w| &w.received));
    families.counter("portolan_sent_bytes", "Body bytes to clients", stats.sum(|w| &w.sent));
}

fn upstreams(stats: &Stats, families: &mut Families) {
    let opened = stats.sum(|w| &w.upstream_opened);
    families.counter("portolan_upstream_connections", "Connections to upstreams that were opened", opened);
    let open = stats.sum(|w| &w.upstream_open);
    families.gauge("portolan_upstream_connections_open", "Connections to upstreams that are open", open);
    let (failed, late) = (stats.sum(|w| &w.upstream_failed), stats.sum(|w| &w.upstream_timeouts));
    let reason = |name: &str, value| (vec![("reason", name.to_owned())], value);
    let failures = vec![reason("refused", failed.saturating_sub(late)), reason("timeout", late)];
    let help = "Connections to upstreams that failed to open";
    families.add("portolan_upstream_connect_failures", help, Samples::Counters(failures));
    let help = "Attempts to send a request again";
    families.counter("portolan_upstream_retries", help, stats.sum(|w| &w.upstream_retries));
    let help = "Requests that were not sent again because no retry was left";
    families.counter("portolan_upstream_retries_exceeded", help, stats.sum(|w| &w.upstream_retries_exceeded));
    let help = "Requests, retries and connections refused because a cluster's limits were reached";
    families.counter("portolan_upstream_overflows", help, stats.sum(|w| &w.upstream_overflows));
    let scopes = vec![
        (vec![("of", "request".to_owned())], stats.sum(|w| &w.upstream_request_timeouts)),
        (vec![("of", "attempt".to_owned())], stats.sum(|w| &w.upstream_try_timeouts)),
    ];
    let help = "Requests and attempts that took longer than their headers allow";
    families.add("portolan_upstream_timeouts", help, Samples::Counters(scopes));
}

fn workers(admin: &Admin, families: &mut Families) {
    let stats = &admin.stats;
    let ready = stats.sum(|w| &w.ready);
    families.gauge("portolan_workers_ready", "Workers whose filter has had the registry", ready);
    families.gauge("portolan_workers", "Workers", stats.workers() as u64);
}

fn traps(shared: &Shared, families: &mut Families) {
    let kinds = [TrapKind::Deadline, TrapKind::Exit, TrapKind::Guest];
    let traps = kinds.map(|kind| (vec![("kind", kind.as_str().to_owned())], shared.traps(kind))).to_vec();
    let help = "Callbacks of the filter that did not return; each refused what it was about";
    families.add("portolan_filter_traps", help, Samples::Counters(traps));
}

fn controller(admin: &Admin, families: &mut Families) {
    let Some(controller) = &admin.controller else { return };
    families.gauge("portolan_config_resources", "Resources in force", controller.sources.objects());
    let findings = controller.sources.findings().into_iter().map(|((gate, severity, code), count)| {
        let gate = match gate {
            Gate::Webhook => "webhook",
            Gate::Schema => "schema",
            Gate::Conflict => "conflict",
            Gate::Portolan => "portolan",
        };
        let severity = if severity == Severity::Error { "error" } else { "warning" };
        let labels = [("gate", gate), ("severity", severity), ("code", code)];
        (labels.map(|(name, value)| (name, value.to_owned())).to_vec(), count)
    });
    let help = "Findings about the configuration in force; `portolan validate` shows them";
    families.add("portolan_config_findings", help, Samples::Gauges(findings.collect()));
    let (applied, refused) = controller.sources.reloads();
    let result = |name: &str, value| (vec![("result", name.to_owned())], value);
    let reloads = vec![result("applied", applied), result("with_errors", refused)];
    let help = "Reloads of changed files; with_errors: something was refused and its last good version stays";
    families.add("portolan_config_reloads", help, Samples::Counters(reloads));
    for (name, value) in controller.counters.all() {
        let name = format!("portolan_controller_{name}");
        if name.ends_with("subscribers") || name.ends_with("streams") {
            families.gauge(&name, "Streams of the controller that are open", value);
        } else {
            families.counter(&name, "Served by the controller in this process", value);
        }
    }
}

/// The filter's own, by the names that it gave them, in the characters that Prometheus takes.
fn filter(shared: &Shared, families: &mut Families) {
    const HELP: &str = "Defined by the filter";
    for (name, value) in shared.metrics.all() {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' };
        let mut name: String = name.chars().map(plain).collect();
        if name.starts_with(|c: char| c.is_ascii_digit()) || name.is_empty() {
            name.insert(0, '_');
        }
        match value {
            MetricValue::Counter(value) => families.counter(&name, HELP, value),
            MetricValue::Gauge(value) => families.gauge(&name, HELP, value),
            MetricValue::Histogram { sum, buckets } => {
                let last = buckets.iter().rposition(|count| *count > 0).unwrap_or(0).min(BUCKETS - 2);
                let bound = |at: usize| if at == 0 { 0.0 } else { (2f64).powi(i32::try_from(at).unwrap_or(64)) - 1.0 };
                let mut all: Vec<_> = (0..=last).map(|at| (bound(at), buckets[at])).collect();
                all.push((f64::INFINITY, buckets[last + 1..].iter().sum()));
                families.add(name, HELP, Samples::Histogram(sum as f64, all));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_written_as_prometheus_reads_them() {
        let mut families = Families(Vec::new());
        families.counter("a", "A thing", 3);
        let labels = vec![("code", "200".to_owned()), ("flags", "x\"y".to_owned())];
        families.add("b", "B", Samples::Gauges(vec![(labels, 4)]));
        families.add("c", "C", Samples::Histogram(7.0, vec![(1.0, 2), (f64::INFINITY, 1)]));
        let mut registry = Registry::default();
        registry.register_collector(Box::new(families));
        let mut out = String::new();
        encode(&mut out, &registry).unwrap();
        let lines: Vec<_> = out.lines().filter(|line| !line.starts_with('#')).collect();
        let expected = [
            "a_total 3",
            "b{code=\"200\",flags=\"x\\\"y\"} 4",
            "c_sum 7.0",
            "c_count 3",
            "c_bucket{le=\"1.0\"} 2",
            "c_bucket{le=\"+Inf\"} 3",
        ];
        assert_eq!(lines, expected);
        assert!(out.ends_with("# EOF\n"), "{out}");
    }
}
