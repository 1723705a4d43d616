//! `portolan serve` and `portolan bootstrap envoy`, as they are typed.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn portolan(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_portolan")).args(arguments).output().unwrap()
}

fn refused(arguments: &[&str], expected: &str) {
    let output = portolan(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
    assert!(said.contains(expected), "{arguments:?}: {said}");
}

fn bootstrap(arguments: &[&str]) -> Value {
    let output = portolan(&[&["bootstrap", "envoy", "--output", "json", "--filter", "f.wasm"], arguments].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn plain_text_for_others_has_to_be_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().to_str().unwrap();
    refused(&["serve", "--config", config, "--listen", "0.0.0.0:0"], "--insecure-plaintext");
    refused(&["serve", "--config", config, "--tls-cert", "a.pem"], "--tls-key");
    refused(&["serve", "--config", config, "--tls-cert", "a.pem", "--tls-key", "b.pem"], "a.pem");
    refused(
        &["serve", "--config", "/does/not/exist", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"],
        "/does/not/exist",
    );
    refused(&["serve"], "--config");
}

#[test]
fn it_says_where_it_serves_and_ends_with_the_signal() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_portolan"))
        .args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-level", "error", "--config"])
        .arg(folder.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("portolan: serving on 127.0.0.1:"), "{line}");
    let killed = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(killed.success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_bootstrap_says_who_the_workload_is() {
    let contents = bootstrap(&[
        "--plaintext",
        "--namespace",
        "shop",
        "--name",
        "cart",
        "--labels",
        "app=cart,version=v1",
        "--ip",
        "10.4.0.7,fd00::7",
        "--locality",
        "r/z",
        "--transparent",
        "15001",
        "--http-proxy",
        "127.0.0.1:15080",
    ]);
    let node = &contents["node"];
    assert_eq!(node["id"], "sidecar~10.4.0.7~cart.shop~shop.svc.cluster.local");
    assert_eq!(node["metadata"]["NAMESPACE"], "shop");
    assert_eq!(node["metadata"]["LABELS"]["version"], "v1");
    assert_eq!(node["metadata"]["INSTANCE_IPS"], "10.4.0.7,fd00::7");
    assert_eq!(node["locality"]["zone"], "z");
    let settings = &node["metadata"]["PORTOLAN"];
    assert_eq!((&settings["transparent"], &settings["noSnapshot"]), (&15001.into(), &"closed".into()));
    let router = bootstrap(&["--plaintext", "--role", "gateway"]);
    assert!(router["node"]["id"].as_str().unwrap().starts_with("router~"));
}

#[test]
fn a_bootstrap_has_limits_and_may_have_tls() {
    let plain = bootstrap(&["--plaintext", "--max-heap", "256", "--controller", "[fd00::1]:15010"]);
    let monitors = &plain["overload_manager"]["resource_monitors"];
    assert_eq!(monitors[0]["typed_config"]["max_heap_size_bytes"], 256 << 20);
    let controller = &plain["static_resources"]["clusters"][0];
    assert!(controller["transport_socket"].is_null());
    let address = &controller["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"];
    assert_eq!(address["socket_address"]["address"], "fd00::1");

    let tls =
        bootstrap(&["--controller", "portolan.example:15012", "--ca", "ca.pem", "--cert", "c.pem", "--key", "k.pem"]);
    let context = &tls["static_resources"]["clusters"][0]["transport_socket"]["typed_config"];
    assert_eq!(context["sni"], "portolan.example");
    let common = &context["common_tls_context"];
    assert_eq!(common["tls_certificates"][0]["private_key"]["filename"], "k.pem");
    assert_eq!(
        common["validation_context"]["match_typed_subject_alt_names"][0]["matcher"]["exact"],
        "portolan.example"
    );
}

#[test]
fn both_forms_of_a_bootstrap_say_the_same() {
    let yaml = portolan(&["bootstrap", "envoy", "--plaintext", "--filter", "f.wasm", "--transparent", "15001"]);
    let yaml: Value = serde_yaml_ng::from_slice(&yaml.stdout).unwrap();
    assert_eq!(yaml, bootstrap(&["--plaintext", "--transparent", "15001"]));
}

#[test]
fn wrong_arguments_of_a_bootstrap_are_named() {
    for (arguments, expected) in [
        (&["--plaintext"][..], "--filter"),
        (&["--filter", "f.wasm"], "--plaintext"),
        (&["--filter", "f.wasm", "--plaintext", "--controller", "host"], "HOST:PORT"),
        (&["--filter", "f.wasm", "--plaintext", "--controller", "::1:80"], "brackets"),
        (&["--filter", "f.wasm", "--plaintext", "--namespace", "a.b"], "--namespace"),
        (&["--filter", "f.wasm", "--plaintext", "--labels", "x"], "key=value"),
        (&["--filter", "f.wasm", "--plaintext", "--http-proxy", "15080"], "--http-proxy"),
        (&["--filter", "f.wasm", "--ca", "a.pem", "--cert", "b.pem"], "--key"),
    ] {
        refused(&[&["bootstrap", "envoy"], arguments].concat(), expected);
    }
}

#[test]
fn help_shows_each_choice() {
    for (command, expected) in [
        (&["serve", "--help"][..], ["--tls-client-ca", "--insecure-plaintext", "Exit status", "SPIFFE"]),
        (&["bootstrap", "envoy", "--help"], ["--transparent", "--bind-ports", "--http-proxy", "--no-snapshot"]),
    ] {
        let text = String::from_utf8(portolan(command).stdout).unwrap();
        for word in expected {
            assert!(text.contains(word), "{command:?} does not tell of {word}");
        }
    }
}

/// A real Envoy takes what is printed; where there is none, `make test-envoy` says so.
#[test]
fn a_real_envoy_takes_the_bootstrap() {
    let envoy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/envoy");
    if !envoy.exists() {
        println!("SKIPPED: no Envoy in .venv; tests/venv.sh installs it");
        assert!(std::env::var_os("CI").is_none(), "CI skips nothing");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for arguments in [&["--plaintext"][..], &["--controller", "portolan.example:15012", "--ca", "/etc/hosts"]] {
        let arguments = [&["bootstrap", "envoy", "--filter", "f.wasm", "--transparent", "15001"], arguments].concat();
        let file = folder.path().join("envoy.yaml");
        std::fs::write(&file, portolan(&arguments).stdout).unwrap();
        let mut command = Command::new(&envoy);
        command.args(["--mode", "validate", "--use-dynamic-base-id", "-c"]).arg(&file);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        // A file of certificates is looked into; that it is refused for what is in it shows that the rest was read.
        let read = output.status.success() || said.contains("Failed to load trusted CA certificates");
        assert!(read, "{arguments:?}: {said}");
    }
}
