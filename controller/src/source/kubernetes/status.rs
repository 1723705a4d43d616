//! How watching goes, for metrics and readiness.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::kinds::{NAMESPACES, PODS, WATCHED};
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

fn label(name: &'static str) -> Label {
    [("kind", name)]
}

/// What the mesh's settings are watched as.
pub(super) const CONFIG_MAP: &str = "ConfigMap";

/// The kinds of resources, as they are called.
fn kinds() -> impl Iterator<Item = &'static str> {
    WATCHED.iter().chain([&PODS, &NAMESPACES]).map(|watched| watched.name)
}

impl Status {
    /// Nothing is watched yet.
    pub(super) fn new() -> Self {
        let status = Status::default();
        for watched in &WATCHED {
            status.needed(watched.name, true);
        }
        for name in kinds() {
            status.objects.get_or_create(&label(name)).set(0);
            status.errors.get_or_create(&label(name)).inc_by(0);
        }
        status
    }

    /// Whether the kind is to be watched: where it is not, as Pods that nothing selects, there is nothing to say of that.
    pub(super) fn needed(&self, name: &'static str, is: bool) {
        if is {
            self.errors.get_or_create(&label(name)).inc_by(0);
            self.watching(name, false);
        } else {
            self.watching.remove(&label(name));
        }
    }

    fn watching(&self, name: &'static str, is: bool) {
        self.watching.get_or_create(&label(name)).set(i64::from(is));
    }

    pub(super) fn error(&self, name: &'static str) {
        self.errors.get_or_create(&label(name)).inc();
        self.watching(name, false);
    }

    pub(super) fn event(&self, name: &'static str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.last_event.get_or_create(&label(name)).set(i64::try_from(now).unwrap_or(i64::MAX));
        self.watching(name, true);
    }

    pub(super) fn objects(&self, counts: &BTreeMap<Kind, usize>) {
        for name in kinds() {
            let count = counts.iter().find(|(kind, _)| kind_name(**kind) == name).map_or(0, |(_, count)| *count);
            self.objects.get_or_create(&label(name)).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.batches.inc();
    }

    /// The kinds that are not watched at this moment, and should be.
    pub fn unwatched(&self) -> Vec<&'static str> {
        let missing = |name: &&'static str| self.watching.get(&label(name)).is_some_and(|is| is.get() == 0);
        kinds().chain([CONFIG_MAP]).filter(|name| missing(name)).collect()
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
