//! What validation has to say about a resource.

use serde::Serialize;
use std::fmt;
use std::sync::Arc;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The resource is applied all the same.
    Warning,
    /// The gate refuses the resource.
    Error,
}

/// Who would say so in a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Gate {
    /// istiod's admission webhook, and the reading of the file itself.
    Webhook,
    /// The API server with the schema of the CRD.
    Schema,
    /// Nobody: two resources are in each other's way.
    Conflict,
    /// Nobody: a cluster would act on it, and Portolan does not.
    Portolan,
}

/// A finding before it is known where the resource comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issue {
    /// Gate.
    pub gate: Gate,
    /// Severity.
    pub severity: Severity,
    /// Short stable name of the rule.
    pub code: &'static str,
    /// Path of the field (`spec.ports[0].name`), empty for the whole resource.
    pub field: String,
    /// What is wrong, in the words of that gate where it has some.
    pub message: String,
}

impl Issue {
    /// An error of istiod's webhook.
    pub fn refused(code: &'static str, field: impl fmt::Display, message: impl Into<String>) -> Issue {
        Issue::new(Gate::Webhook, Severity::Error, code, field, message)
    }

    /// A warning of istiod's webhook.
    pub fn warned(code: &'static str, field: impl fmt::Display, message: impl Into<String>) -> Issue {
        Issue::new(Gate::Webhook, Severity::Warning, code, field, message)
    }

    /// An issue of any gate.
    pub fn new(
        gate: Gate,
        severity: Severity,
        code: &'static str,
        field: impl fmt::Display,
        message: impl Into<String>,
    ) -> Issue {
        Issue { gate, severity, code, field: field.to_string(), message: message.into() }
    }

    /// Whether the resource must not be applied: a schema error alone is a second opinion, as files pass no API server.
    pub fn rejects(&self) -> bool {
        self.severity == Severity::Error && self.gate == Gate::Webhook
    }
}

/// A finding with its place; one line of `portolan validate --output json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// File as it was named, `-` for standard input.
    pub file: Arc<str>,
    /// Line, from 1.
    pub line: u32,
    /// Kind of the resource, empty if not known.
    pub kind: String,
    /// Namespace of the resource.
    pub namespace: String,
    /// Name of the resource.
    pub name: String,
    /// Path of the field, empty for the whole resource.
    pub field: String,
    /// Gate.
    pub gate: Gate,
    /// Severity.
    pub severity: Severity,
    /// Short stable name of the rule.
    pub code: &'static str,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        let gate = match self.gate {
            Gate::Webhook => "webhook",
            Gate::Schema => "schema",
            Gate::Conflict => "conflict",
            Gate::Portolan => "portolan",
        };
        write!(f, "{}:{}: {severity}[{}]", self.file, self.line, self.code)?;
        if !self.kind.is_empty() {
            write!(f, " {} {}/{}", self.kind, self.namespace, self.name)?;
        }
        if !self.field.is_empty() {
            write!(f, " {}", self.field)?;
        }
        // Text of a file may hold control characters; a terminal must not obey them.
        let message: String = self.message.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        write!(f, ": {message} ({gate})")
    }
}
