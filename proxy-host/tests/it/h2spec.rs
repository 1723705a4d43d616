//! h2spec, a conformance suite for HTTP/2, against the HTTP proxy port; `make h2spec` runs this alone.

use crate::http_support;
use crate::proxy_support;

use std::{fs, path::Path, process::Command, time::Duration};

use proxy_support::{entry, start, until, write};

/// What h2spec asks of a server that speaks HTTP/2 alone. On a port that speaks HTTP/1.1 too, bytes that are no preface
/// are a request of HTTP/1.1, and get the answer that Envoy gives them.
const NO_PREFACE: &str = "Sends invalid connection preface";

/// The path of h2spec, or why there is none.
fn h2spec() -> Result<String, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/h2spec.sh");
    let built = Command::new(script).output().map_err(|error| error.to_string())?;
    match built.status.code() {
        Some(0) => Ok(String::from_utf8_lossy(&built.stdout).trim().to_owned()),
        Some(3) => Err("h2spec needs Go to be built".into()),
        _ => Err(format!("h2spec is not built: {}", String::from_utf8_lossy(&built.stderr))),
    }
}

#[test]
fn each_case_passes() {
    let h2spec = match h2spec() {
        Ok(path) => path,
        Err(why) => {
            assert!(std::env::var_os("CI").is_none(), "SKIPPED in CI: {why}");
            return eprintln!("SKIPPED: {why}");
        }
    };
    let body = "long enough to be sent in parts\n";
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let origin = http_support::origin(move |mut peer, _| {
        loop {
            peer.request()?;
            // Some cases send a frame on a stream that must not have been answered by then.
            std::thread::park_timeout(Duration::from_millis(20));
            peer.say(&answer)?;
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let (app, _lines) = start(dir.path(), "", |config| config.threads = 1);
    let proxy = app.http_proxies[0];
    // h2spec asks for the address that it connects to.
    let port = format!("number: {}, name: http, protocol: HTTP", proxy.port());
    write(dir.path(), &entry("a", "localhost", &port, origin));
    until(proxy, &format!("http://localhost:{}/", proxy.port()), body);

    let report = dir.path().join("report.xml");
    let port = proxy.port().to_string();
    let mut command = Command::new(h2spec);
    command.args(["--strict", "--host", "localhost", "--timeout", "5", "--port", &port, "--junit-report"]).arg(&report);
    let output = command.output().unwrap();
    let report = fs::read_to_string(report).unwrap();
    let cases: Vec<_> = report.split("<testcase ").skip(1).collect();
    assert!(cases.len() > 140, "only {} cases ran", cases.len());
    let failed: Vec<_> = cases.iter().filter(|case| case.contains("<failure>") || case.contains("<error>")).collect();
    let said = String::from_utf8_lossy(&output.stdout);
    let expected = failed.len() == 1 && failed[0].contains(NO_PREFACE);
    assert!(expected, "{}", said.split_once("Failures:").map_or(&*said, |(_, failures)| failures));
}
