//! Every verdict of the validation corpus on the six kinds: istiod's webhook, before and after the
//! API server's pruning, and the API server with the CRD, with the names of the rules that failed.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use portolan_controller::config::documents::Document;
use portolan_controller::config::tree;
use portolan_controller::source::read;
use portolan_controller::validate::finding::{Finding, Gate, Severity};
use portolan_controller::validate::schema;
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
    assert!(cases > 800, "only {cases} cases: the corpus is not what it was");
    assert!(disagreements.is_empty(), "{} of {cases}:\n{}", disagreements.len(), disagreements.join("\n"));
}

/// A value of that schema, with one of everything in it.
fn one_of_everything(schema: &tree::Node) -> Value {
    let kind = schema.get("type").and_then(tree::Node::as_str);
    match kind {
        Some("object") => {
            let mut fields = serde_json::Map::new();
            if let Some(tree::Value::Map(properties)) = schema.get("properties").map(|node| &node.value) {
                for property in properties {
                    fields.insert(property.key.clone(), one_of_everything(&property.value));
                }
            }
            if let Some(values) = schema.get("additionalProperties") {
                fields.insert("key".into(), one_of_everything(values));
            }
            Value::Object(fields)
        }
        Some("array") => vec![one_of_everything(schema.get("items").expect("an array has items"))].into(),
        Some("integer" | "number") => 1.into(),
        Some("boolean") => true.into(),
        _ => match schema.get("enum").map(|node| &node.value) {
            Some(tree::Value::List(names)) => names[0].as_str().expect("names are strings").into(),
            // A duration, where one is asked for, and base64.
            _ => match (schema.get("x-kubernetes-validations"), schema.get("format")) {
                (Some(_), _) => "1s".into(),
                (_, Some(_)) => "AAAA".into(),
                _ => "0".into(),
            },
        },
    }
}

#[test]
fn every_field_of_the_schemas_is_decoded() {
    for (kind, crd) in [
        ("ServiceEntry", schema::SERVICE_ENTRY_CRD),
        ("WorkloadEntry", schema::WORKLOAD_ENTRY_CRD),
        ("VirtualService", schema::VIRTUAL_SERVICE_CRD),
        ("DestinationRule", schema::DESTINATION_RULE_CRD),
        ("Gateway", schema::GATEWAY_CRD),
        ("Sidecar", schema::SIDECAR_CRD),
    ] {
        let crd = tree::parse(crd, 1).expect("our own CRDs are YAML").root;
        let versions = crd.get("spec").and_then(|spec| spec.get("versions")).map(|node| &node.value);
        let Some(tree::Value::List(versions)) = versions else { panic!("{kind} has no versions") };
        for version in versions {
            let spec = ["schema", "openAPIV3Schema", "properties", "spec"]
                .iter()
                .fold(version, |node, name| node.get(name).expect("each version has a schema"));
            let name = version.get("name").and_then(tree::Node::as_str).expect("each version has a name");
            let resource = serde_json::json!({
                "apiVersion": format!("networking.istio.io/{name}"),
                "kind": kind,
                "metadata": {"name": "all", "namespace": "prod"},
                "spec": one_of_everything(spec),
            });
            let odd: Vec<_> = findings(&resource)
                .into_iter()
                .filter(|finding| matches!(finding.code, "unknown-field" | "type" | "no such resource"))
                .collect();
            assert!(odd.is_empty(), "{kind} {name}: {odd:#?}");
        }
    }
}
