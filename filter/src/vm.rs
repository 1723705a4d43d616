//! What one VM holds. All plugins of a VM share one snapshot and one registry stream.

use std::collections::BTreeMap;
use std::fmt;

use portolan_registry::routing::Patterns;

use crate::carry::Pending;
use crate::config::NoSnapshot;
use crate::host::{DECISION, Host, Level};
use crate::later::Later;
use crate::metrics::{Cause, Kind, Metrics, Outcome};
use crate::root::{Root, Stream};
use crate::subscription::Subscription;

/// The state of one VM.
#[derive(Debug)]
pub struct Vm<H> {
    /// The host it runs in.
    pub host: H,
    /// Root contexts that are configured, by context id.
    pub(crate) roots: BTreeMap<u32, Root>,
    /// The subscription, once a root has been configured.
    pub(crate) subscription: Option<Subscription>,
    /// The root on whose behalf the stream and the ticks are.
    pub(crate) stream: Option<Stream>,
    pub(crate) metrics: Metrics,
    /// Whether some root wants decisions reported.
    pub(crate) report: bool,
    /// Whether the host says by a header where each request came in, for every root.
    pub(crate) destination_header: bool,
    /// The least level that the host writes.
    pub(crate) log_level: u32,
    /// Room to write a cluster's name in, kept for the next one.
    pub(crate) room: Vec<u8>,
    /// Compiled expressions of routes.
    pub(crate) patterns: Patterns,
    /// What is to be changed about responses, by the context of the request.
    pub(crate) pending: BTreeMap<u32, Pending>,
    /// Answers that are delayed.
    pub(crate) later: Later,
}

impl<H: Host> Vm<H> {
    /// A VM with nothing configured.
    pub fn new(host: H) -> Self {
        Vm {
            host,
            roots: BTreeMap::new(),
            subscription: None,
            stream: None,
            metrics: Metrics::default(),
            report: false,
            destination_header: false,
            log_level: Level::Info as u32,
            room: Vec::new(),
            patterns: Patterns::default(),
            pending: BTreeMap::new(),
            later: Later::default(),
        }
    }

    /// What to do before there is a snapshot. Where the plugins of a VM differ, the strictest holds.
    pub fn no_snapshot(&self) -> NoSnapshot {
        let open = |root: &Root| root.config.no_snapshot == NoSnapshot::Open;
        if !self.roots.is_empty() && self.roots.values().all(open) { NoSnapshot::Open } else { NoSnapshot::Closed }
    }

    /// The subscription, if there is one.
    pub fn subscription(&self) -> Option<&Subscription> {
        self.subscription.as_ref()
    }

    pub(crate) fn log(&self, level: Level, message: impl FnOnce() -> String) {
        log(&self.host, self.log_level, level, message);
    }

    pub(crate) fn decided(&mut self, kind: Kind, outcome: Outcome, cause: Cause) {
        self.metrics.decided(&self.host, kind, outcome, cause);
    }
}

/// Says why a request or connection was decided as it was, if anybody wants to know.
pub(crate) fn report(host: &impl Host, wanted: bool, decision: &impl fmt::Display) {
    if wanted {
        // Without a line in a log the decision is the same.
        let _ = host.set_property(DECISION, decision.to_string().as_bytes());
    }
}

/// Writes a line, if the host would not drop it.
pub(crate) fn log(host: &impl Host, least: u32, level: Level, message: impl FnOnce() -> String) {
    if level as u32 >= least {
        host.log(level, &message());
    }
}
