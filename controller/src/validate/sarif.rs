//! Findings as SARIF 2.1.0, which code hosts show beside the lines they are about.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::validate::finding::{Finding, Gate, Severity};

/// Where the schema of what is written lies.
const SCHEMA: &str = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json";

/// A log of one run.
#[derive(Debug, Serialize)]
pub struct Log<'f> {
    #[serde(rename = "$schema")]
    schema: &'static str,
    version: &'static str,
    runs: [Run<'f>; 1],
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Run<'f> {
    tool: Tool,
    column_kind: &'static str,
    results: Vec<ResultItem<'f>>,
}

#[derive(Debug, Serialize)]
struct Tool {
    driver: Driver,
}

#[derive(Debug, Serialize)]
struct Driver {
    name: &'static str,
    version: &'static str,
    rules: Vec<Rule>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    id: String,
    short_description: Message,
}

#[derive(Debug, Serialize)]
struct Message {
    text: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ResultItem<'f> {
    rule_id: String,
    rule_index: usize,
    level: &'static str,
    message: Message,
    locations: [Location<'f>; 1],
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Location<'f> {
    physical_location: PhysicalLocation,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    logical_locations: Vec<LogicalLocation<'f>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PhysicalLocation {
    artifact_location: ArtifactLocation,
    region: Region,
}

#[derive(Debug, Serialize)]
struct ArtifactLocation {
    uri: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Region {
    start_line: u32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct LogicalLocation<'f> {
    name: &'f str,
    fully_qualified_name: String,
    kind: &'static str,
}

/// The log of `findings`. A rule is called `GATE/CODE`: two gates may have a rule of the same name.
pub fn log(findings: &[Finding]) -> Log<'_> {
    let mut indexes: BTreeMap<String, usize> = findings.iter().map(|finding| (rule_id(finding), 0)).collect();
    for (position, index) in indexes.values_mut().enumerate() {
        *index = position;
    }
    let rules = indexes.keys().map(|id| Rule { id: id.clone(), short_description: Message { text: describe(id) } });
    let results = findings.iter().map(|finding| {
        let rule_id = rule_id(finding);
        ResultItem {
            rule_index: indexes.get(&rule_id).copied().unwrap_or_default(),
            rule_id,
            level: match finding.severity {
                Severity::Warning => "warning",
                // A second opinion does not stop a resource.
                Severity::Error if finding.gate == Gate::Schema => "warning",
                Severity::Error => "error",
            },
            message: Message { text: text(finding) },
            locations: [location(finding)],
        }
    });
    let driver = Driver { name: "portolan", version: env!("CARGO_PKG_VERSION"), rules: rules.collect() };
    let run = Run { tool: Tool { driver }, column_kind: "unicodeCodePoints", results: results.collect() };
    Log { schema: SCHEMA, version: "2.1.0", runs: [run] }
}

fn gate(finding: &Finding) -> &'static str {
    match finding.gate {
        Gate::Webhook => "webhook",
        Gate::Schema => "schema",
        Gate::Conflict => "conflict",
        Gate::Portolan => "portolan",
    }
}

fn rule_id(finding: &Finding) -> String {
    format!("{}/{}", gate(finding), finding.code.replace(' ', "-"))
}

fn describe(id: &str) -> String {
    match id.split_once('/') {
        Some(("webhook", code)) => format!("istiod's admission webhook: {code}"),
        Some(("schema", code)) => format!("The CRD's schema: {code}"),
        Some(("portolan", code)) => format!("Checked, but not carried out: {code}"),
        Some((_, code)) => format!("Resources in each other's way: {code}"),
        None => id.to_owned(),
    }
}

fn text(finding: &Finding) -> String {
    match finding.field.as_str() {
        "" => finding.message.clone(),
        field => format!("{field}: {}", finding.message),
    }
}

fn location(finding: &Finding) -> Location<'_> {
    let logical = (!finding.kind.is_empty()).then(|| LogicalLocation {
        name: &finding.name,
        fully_qualified_name: format!("{}/{}/{}", finding.kind, finding.namespace, finding.name),
        kind: "resource",
    });
    Location {
        physical_location: PhysicalLocation {
            artifact_location: ArtifactLocation { uri: uri(&finding.file) },
            region: Region { start_line: finding.line.max(1) },
        },
        logical_locations: logical.into_iter().collect(),
    }
}

/// A file name as a URI reference: relative ones stay so, and are read from where the tool ran.
fn uri(file: &str) -> String {
    let mut out = String::with_capacity(file.len() + 8);
    let name = match file {
        "-" => "stdin",
        name => name.strip_prefix("./").unwrap_or(name),
    };
    if name.starts_with('/') {
        out.push_str("file://");
    }
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
