//! How watching goes, for metrics and readiness.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::kinds::{PODS, WATCHED, Watched};
use crate::model::Kind;
use crate::source::read::kind_name;

type Label = [(&'static str, &'static str); 1];

/// Levels and counters by kind; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Status {
    objects: Family<Label, Gauge>,
    errors: Family<Label, Counter>,
    watching: Family<Label, Gauge>,
    last_event: Family<Label, Gauge>,
    batches: Counter,
}

fn label(kind: Kind) -> Label {
    [("kind", kind_name(kind))]
}

impl Status {
    /// Nothing is watched yet.
    pub(super) fn new() -> Self {
        let status = Status::default();
        for watched in WATCHED.iter().chain([&PODS]) {
            // Nobody misses Pods that nothing selects.
            status.needed(watched, watched.kind != Kind::Pod);
            status.objects.get_or_create(&label(watched.kind)).set(0);
            status.errors.get_or_create(&label(watched.kind)).inc_by(0);
        }
        status
    }

    /// Whether the kind is to be watched: where it is not, there is nothing to say of that.
    pub(super) fn needed(&self, watched: &Watched, is: bool) {
        if is {
            self.watching(watched, false);
        } else {
            self.watching.remove(&label(watched.kind));
        }
    }

    pub(super) fn watching(&self, watched: &Watched, is: bool) {
        self.watching.get_or_create(&label(watched.kind)).set(i64::from(is));
    }

    pub(super) fn error(&self, watched: &Watched) {
        self.errors.get_or_create(&label(watched.kind)).inc();
        self.watching(watched, false);
    }

    pub(super) fn event(&self, watched: &Watched) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.last_event.get_or_create(&label(watched.kind)).set(i64::try_from(now).unwrap_or(i64::MAX));
        self.watching(watched, true);
    }

    pub(super) fn objects(&self, counts: &BTreeMap<Kind, usize>) {
        for watched in WATCHED.iter().chain([&PODS]) {
            let count = counts.get(&watched.kind).copied().unwrap_or_default();
            self.objects.get_or_create(&label(watched.kind)).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.batches.inc();
    }

    /// The kinds that are not watched at this moment, and should be.
    pub fn unwatched(&self) -> Vec<&'static str> {
        let missing = |watched: &&Watched| self.watching.get(&label(watched.kind)).is_some_and(|is| is.get() == 0);
        WATCHED.iter().chain([&PODS]).filter(missing).map(|watched| watched.name).collect()
    }

    /// Adds them to what Prometheus reads.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("kubernetes");
        registry.register("objects", "Resources of the cluster in force", self.objects.clone());
        registry.register("watch_errors", "Lists and watches that failed", self.errors.clone());
        registry.register(
            "watching",
            "1 while the kind is watched, nothing while it need not be",
            self.watching.clone(),
        );
        let help = "When the API server last said anything about the kind, in seconds since 1970";
        registry.register("last_event_timestamp_seconds", help, self.last_event.clone());
        registry.register("batches", "Batches of events taken in", self.batches.clone());
    }
}
