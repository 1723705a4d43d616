//! `portolan validate` as a person or a pipeline runs it: what it prints in each form, and its exit status.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Each of the six kinds once: three good, two with errors, one with a warning.
const RESOURCES: &str = "\
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: ok, namespace: prod}
spec: {hosts: [a.example.com], ports: [{number: 80, name: http, protocol: HTTP}], resolution: DNS}
---
apiVersion: networking.istio.io/v1beta1
kind: WorkloadEntry
metadata: {name: vm, namespace: prod}
spec: {address: 10.0.0.1}
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: {name: bad, namespace: prod}
spec:
  hosts: [a.example.com]
  http:
  - route: [{destination: {host: a.example.com}}]
    timeout: 0s
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: old, namespace: prod}
spec: {host: a.example.com, trafficPolicy: {outlierDetection: {consecutiveErrors: 5}}}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: bad, namespace: prod}
spec: {servers: []}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: ok, namespace: prod}
spec: {egress: [{hosts: ['./*']}]}
";

fn validate(arguments: &[&str], text: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_portolan"))
        .arg("validate")
        .args(arguments)
        .arg("-")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command runs");
    child.stdin.take().expect("it reads").write_all(text.as_bytes()).expect("it reads all");
    child.wait_with_output().expect("it ends")
}

fn text(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("UTF-8")
}

#[test]
fn text_names_file_line_and_resource() {
    let output = validate(&[], RESOURCES);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for line in [
        "-:18: error[duration] VirtualService prod/bad spec.http[0].timeout: duration must be greater than 1ms (webhook)",
        "-:23: warning[deprecated] DestinationRule prod/old",
        "-:28: error[servers-required] Gateway prod/bad spec.servers: gateway must have at least one server (webhook)",
    ] {
        assert!(said.lines().any(|said| said.starts_with(line)), "{line} in\n{said}");
    }
}

#[test]
fn json_is_one_object_a_line() {
    let output = validate(&["--output", "json"], RESOURCES);
    let findings: Vec<Value> =
        text(&output).lines().map(|line| serde_json::from_str(line).expect("each line is JSON")).collect();
    let gateway = findings.iter().find(|finding| finding["kind"] == "Gateway").expect("the Gateway has a finding");
    for (field, value) in [("name", "bad"), ("namespace", "prod"), ("severity", "error"), ("gate", "webhook")] {
        assert_eq!(gateway[field], value);
    }
}

#[test]
fn nothing_to_say_is_success() {
    let only_good: Vec<&str> = RESOURCES.split("---\n").filter(|document| document.contains("name: ok")).collect();
    let output = validate(&[], &only_good.join("---\n"));
    assert_eq!((output.status.code(), text(&output)), (Some(0), ""));
}

/// What the schema of SARIF 2.1.0 requires of the parts that are written here.
fn check_sarif(log: &Value) -> Vec<&Value> {
    assert_eq!(log["version"], "2.1.0");
    let runs = log["runs"].as_array().expect("runs is an array");
    assert_eq!(runs.len(), 1);
    let driver = &runs[0]["tool"]["driver"];
    assert!(driver["name"].is_string(), "a driver has a name");
    let rules = driver["rules"].as_array().expect("rules is an array");
    let mut ids: Vec<&str> = rules.iter().map(|rule| rule["id"].as_str().expect("a rule has an id")).collect();
    assert!(rules.iter().all(|rule| rule["shortDescription"]["text"].is_string()));
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "rules are unique");
    assert!(matches!(runs[0]["columnKind"].as_str(), Some("utf16CodeUnits" | "unicodeCodePoints")));
    let results: Vec<&Value> = runs[0]["results"].as_array().expect("results is an array").iter().collect();
    for result in &results {
        assert!(result["message"]["text"].as_str().is_some_and(|text| !text.is_empty()), "{result}");
        assert!(matches!(result["level"].as_str(), Some("none" | "note" | "warning" | "error")), "{result}");
        let index = usize::try_from(result["ruleIndex"].as_u64().expect("an index")).expect("a small one");
        assert_eq!(rules[index]["id"], result["ruleId"]);
        for location in result["locations"].as_array().expect("locations is an array") {
            let physical = &location["physicalLocation"];
            let uri = physical["artifactLocation"]["uri"].as_str().expect("a file has a URI");
            assert!(uri.bytes().all(|b| b.is_ascii_graphic()), "{uri}");
            assert!(physical["region"]["startLine"].as_u64().is_some_and(|line| line >= 1), "{result}");
        }
    }
    results
}

#[test]
fn sarif_holds_what_its_schema_requires() {
    let output = validate(&["--output", "sarif"], RESOURCES);
    let log: Value = serde_json::from_slice(&output.stdout).expect("one document");
    let results = check_sarif(&log);
    let timeout = results
        .iter()
        .find(|result| result["ruleId"] == "webhook/duration")
        .expect("the finding on the timeout is there");
    assert_eq!(timeout["level"], "error");
    assert_eq!(timeout["locations"][0]["physicalLocation"]["region"]["startLine"], 18);
    assert_eq!(timeout["locations"][0]["logicalLocations"][0]["fullyQualifiedName"], "VirtualService/prod/bad");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn sarif_without_findings_is_a_document_too() {
    let output = validate(&["--output", "sarif"], "# nothing\n");
    let log: Value = serde_json::from_slice(&output.stdout).expect("one document");
    assert_eq!((check_sarif(&log).len(), output.status.code()), (0, Some(0)));
}

#[test]
fn names_of_files_become_uris() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("a b%.yaml");
    std::fs::write(&file, "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: g}\nspec: {}\n")
        .unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_portolan"))
        .args(["validate", "--output", "sarif"])
        .arg(&file)
        .output()
        .expect("the command runs");
    let log: Value = serde_json::from_slice(&output.stdout).expect("one document");
    let results = check_sarif(&log);
    let uri = results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].as_str().unwrap();
    assert!(uri.starts_with("file:///") && uri.ends_with("/a%20b%25.yaml"), "{uri}");
}

/// What passes every gate of a cluster and is not carried out here.
const UNSERVED: &str = "\
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: g, namespace: prod}
spec:
  servers:
  - {port: {number: 443, name: a, protocol: TLS}, hosts: ['*'], tls: {mode: AUTO_PASSTHROUGH}}
  - {port: {number: 0, name: b, protocol: HTTP}, bind: unix:///run/b, hosts: ['*']}
  - {port: {number: 444, name: c, protocol: HTTPS}, hosts: [c.example.com], tls: {mode: ISTIO_MUTUAL}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: d, namespace: prod}
spec:
  host: a.example.com
  trafficPolicy:
    tunnel: {protocol: POST, targetHost: b.example.com, targetPort: 443}
    portLevelSettings:
    - port: {number: 443}
      tls: {mode: SIMPLE, credentialName: secret}
  subsets:
  - name: v1
    trafficPolicy: {tls: {mode: SIMPLE}}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: s, namespace: prod}
spec:
  ingress: [{port: {number: 80, name: http, protocol: HTTP}, defaultEndpoint: '127.0.0.1:8080'}]
";

#[test]
fn what_is_not_carried_out_is_a_warning_that_names_the_field() {
    let output = validate(&[], UNSERVED);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    for line in [
        "-:6: warning[not-served] Gateway prod/g spec.servers[0].tls.mode: AUTO_PASSTHROUGH",
        "-:7: warning[not-served] Gateway prod/g spec.servers[1].bind: ",
        "-:8: warning[needs-files] Gateway prod/g spec.servers[2].tls.mode: ",
        "-:16: warning[served-otherwise] DestinationRule prod/d spec.trafficPolicy.tunnel.protocol: ",
        "-:19: warning[not-served] DestinationRule prod/d spec.trafficPolicy.portLevelSettings[0].tls.credentialName: ",
        "-:22: warning[served-otherwise] DestinationRule prod/d spec.subsets[0].trafficPolicy.tls: ",
        "-:28: warning[not-served] Sidecar prod/s spec.ingress: ",
    ] {
        assert!(said.lines().any(|said| said.starts_with(line) && said.ends_with(" (portolan)")), "{line} in\n{said}");
    }
    assert_eq!(said.matches("(portolan)").count(), 7, "{said}");
}

#[test]
fn what_is_not_carried_out_has_a_row_in_the_documents() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/findings.md");
    let document = std::fs::read_to_string(path).expect("the document is part of the repository");
    for code in portolan_controller::validate::unserved::CODES {
        assert!(document.contains(&format!("| `{code}` |")), "{code} is not described");
    }
}
