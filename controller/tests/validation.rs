//! Every verdict of the validation corpus on ServiceEntries and WorkloadEntries: istiod's webhook, before and after the
//! API server's pruning, and the API server with the CRD, with the names of the rules that failed.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use portolan_controller::config::documents::Document;
use portolan_controller::source::read;
use portolan_controller::validate::finding::{Finding, Gate, Severity};
use serde_json::Value;

fn corpus() -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/conformance/validation.jsonl");
    let text = std::fs::read_to_string(path).expect("the corpus is part of the repository");
    text.lines().map(|line| serde_json::from_str(line).expect("each line is JSON")).collect()
}

fn findings(resource: &Value) -> Vec<Finding> {
    let text = resource.to_string();
    read::document(&Document { line: 1, text: &text }, &Arc::from("corpus")).1
}

fn worst(findings: &[Finding], gate: Gate) -> &'static str {
    match findings.iter().filter(|finding| finding.gate == gate).map(|finding| finding.severity).max() {
        None => "ok",
        Some(Severity::Warning) => "warning",
        Some(Severity::Error) => "error",
    }
}

fn failed_rules(findings: &[Finding]) -> BTreeSet<String> {
    findings
        .iter()
        .filter(|finding| finding.gate == Gate::Schema && finding.severity == Severity::Error)
        .map(|finding| match finding.code {
            "cel" => format!("{}: cel: {}", finding.field, finding.message),
            code => format!("{}: {code}", finding.field),
        })
        .collect()
}

/// The resource without the paths that the API server drops.
fn pruned(case: &Value) -> Value {
    let mut resource = case["resource"].clone();
    for path in case["pruned"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let pointer = format!("/{}", path.replace('[', ".").replace(']', "").replace('.', "/"));
        let (parent, name) = pointer.rsplit_once('/').expect("a pointer has a slash");
        if let Some(Value::Object(fields)) = resource.pointer_mut(parent) {
            fields.remove(name);
        }
    }
    resource
}

#[test]
fn every_verdict_of_the_corpus() {
    let mut disagreements = Vec::new();
    let mut cases = 0;
    for case in corpus() {
        if !matches!(case["resource"]["kind"].as_str(), Some("ServiceEntry" | "WorkloadEntry")) {
            continue;
        }
        cases += 1;
        let text = |key: &str| case[key].as_str().unwrap_or_default();
        let id = text("id");
        let found = findings(&case["resource"]);
        let mut compare = |what: &str, expected: &str, got: &str| {
            if expected != got {
                disagreements.push(format!("{id}: {what}: expected {expected}, got {got}; {found:#?}"));
            }
        };
        compare("webhook", text("webhook"), worst(&found, Gate::Webhook));
        let crd = if worst(&found, Gate::Schema) == "error" { "error" } else { "ok" };
        compare("crd", text("crd"), crd);
        let expected: BTreeSet<String> =
            text("rule").split(" | ").filter(|rule| !rule.is_empty()).map(str::to_owned).collect();
        compare("rule", &format!("{expected:?}"), &format!("{:?}", failed_rules(&found)));
        let after = worst(&findings(&pruned(&case)), Gate::Webhook);
        compare("webhookPruned", case["webhookPruned"].as_str().unwrap_or(text("webhook")), after);
    }
    assert!(cases > 200, "only {cases} cases: the corpus is not what it was");
    assert!(disagreements.is_empty(), "{} of {cases}:\n{}", disagreements.len(), disagreements.join("\n"));
}
