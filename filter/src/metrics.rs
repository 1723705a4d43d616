//! Counters of decisions and gauges of the snapshot. Each is defined when it is first needed; there can be no more than
//! kinds × verdicts × causes of them.

use portolan_registry::decision::Rule;

use crate::host::{Host, MetricKind};
use crate::subscription::{Count, Subscription};

/// What was decided about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A request.
    Http = 0,
    /// A connection.
    Tcp = 1,
}

/// How it was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Sent to a cluster.
    Route = 0,
    /// Refused.
    Deny = 1,
}

/// Why: a rule of the registry, or what kept the registry from being asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The registry decided by this rule.
    Rule(Rule),
    /// There is no snapshot yet.
    NoSnapshot,
    /// The request has no `:authority`, or two.
    NoAuthority,
    /// The host does not say where the connection goes.
    NoDestination,
    /// A host call failed.
    HostFailure,
}

/// How many causes there are.
const CAUSES: usize = Rule::ALL.len() + 4;

impl Cause {
    /// Name in metrics, logs and response code details.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::Rule(rule) => rule.as_str(),
            Cause::NoSnapshot => "no_snapshot",
            Cause::NoAuthority => "no_authority",
            Cause::NoDestination => "no_destination",
            Cause::HostFailure => "host_failure",
        }
    }

    fn index(self) -> usize {
        match self {
            Cause::Rule(rule) => rule as usize,
            Cause::NoSnapshot => CAUSES - 4,
            Cause::NoAuthority => CAUSES - 3,
            Cause::NoDestination => CAUSES - 2,
            Cause::HostFailure => CAUSES - 1,
        }
    }
}

/// A metric's id in the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Slot {
    #[default]
    Undefined,
    /// The host would not define it, and is not asked again.
    Refused,
    Id(u32),
}

impl Slot {
    fn id(&mut self, host: &impl Host, kind: MetricKind, name: impl FnOnce() -> String) -> Option<u32> {
        if *self == Slot::Undefined {
            *self = host.define_metric(kind, &name()).map_or(Slot::Refused, Slot::Id);
        }
        match self {
            Slot::Id(id) => Some(*id),
            Slot::Undefined | Slot::Refused => None,
        }
    }

    // A metric that cannot be written is no reason to fail a request, and the next write tries again.
    fn add(&mut self, host: &impl Host, name: impl FnOnce() -> String) {
        if let Some(id) = self.id(host, MetricKind::Counter, name) {
            let _ = host.increment_metric(id, 1);
        }
    }

    fn set(&mut self, host: &impl Host, name: &str, value: u64) {
        if let Some(id) = self.id(host, MetricKind::Gauge, || name.to_owned()) {
            let _ = host.record_metric(id, value);
        }
    }
}

/// The metrics of one VM.
#[derive(Debug, Default)]
pub struct Metrics {
    decisions: [[[Slot; CAUSES]; 2]; 2],
    counts: [Slot; 3],
    state: Slot,
    version: Slot,
    bytes: Slot,
}

impl Metrics {
    /// Counts a decision in `portolan.KIND.OUTCOME.CAUSE`.
    pub fn decided(&mut self, host: &impl Host, kind: Kind, outcome: Outcome, cause: Cause) {
        let slots = self.decisions.get_mut(kind as usize).and_then(|k| k.get_mut(outcome as usize));
        if let Some(slot) = slots.and_then(|o| o.get_mut(cause.index())) {
            slot.add(host, || {
                let kind = if kind == Kind::Http { "http" } else { "tcp" };
                let outcome = if outcome == Outcome::Route { "route" } else { "deny" };
                format!("portolan.{kind}.{outcome}.{}", cause.as_str())
            });
        }
    }

    /// Counts what happened to the subscription.
    pub fn count(&mut self, host: &impl Host, count: Count) {
        let (index, name) = match count {
            Count::Update => (0, "portolan.updates"),
            Count::Refused => (1, "portolan.updates_refused"),
            Count::Closed => (2, "portolan.stream_closed"),
        };
        if let Some(slot) = self.counts.get_mut(index) {
            slot.add(host, || name.to_owned());
        }
    }

    /// Says how the snapshot is.
    pub fn show(&mut self, host: &impl Host, subscription: &Subscription) {
        self.state.set(host, "portolan.snapshot.state", subscription.state() as u64);
        self.version.set(host, "portolan.snapshot.version", subscription.version());
        let bytes = subscription.snapshot().map_or(0, |s| s.bytes() as u64);
        self.bytes.set(host, "portolan.snapshot.bytes", bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::{Call, Fake};

    #[test]
    fn every_cause_has_its_own_counter_defined_once() {
        let host = Fake::default();
        let mut metrics = Metrics::default();
        let others = [Cause::NoSnapshot, Cause::NoAuthority, Cause::NoDestination, Cause::HostFailure];
        let causes: Vec<Cause> = Rule::ALL.into_iter().map(Cause::Rule).chain(others).collect();
        for _ in 0..2 {
            for kind in [Kind::Http, Kind::Tcp] {
                for outcome in [Outcome::Route, Outcome::Deny] {
                    for cause in &causes {
                        metrics.decided(&host, kind, outcome, *cause);
                    }
                }
            }
        }
        assert_eq!(host.metrics().len(), 2 * 2 * CAUSES);
        assert!(host.metrics().values().all(|v| *v == 2), "{:?}", host.metrics());
        assert_eq!(host.metrics().get("portolan.http.route.host_exact"), Some(&2));
    }

    #[test]
    fn a_counter_that_the_host_refuses_is_asked_for_once() {
        let host = Fake::default();
        host.fail("define_metric", 10);
        let mut metrics = Metrics::default();
        for _ in 0..3 {
            metrics.decided(&host, Kind::Tcp, Outcome::Deny, Cause::NoSnapshot);
        }
        let asked = host.calls().iter().filter(|c| matches!(c, Call::DefineMetric(_))).count();
        assert_eq!(asked, 1);
    }
}
