//! Filters in Go: their runtime needs WASI, and they find streams by the plugin's context that answers are delivered to.

use crate::{
    calls::asked,
    http::same,
    modules::{go_filter, go_sdk_filter},
    network::{echo, talk},
    support::{Host, Setup, get, origin, post},
};

#[test]
fn a_filter_in_go_starts_calls_and_changes_bodies() {
    let Some(wasm) = go_filter() else { return };
    let setup = Setup { wasm, configuration: "from go", calls: asked(), ..Setup::new("", origin(false)) };
    let got = same(&setup, "go", |host: &Host| {
        for line in [
            "@@ printed from go",
            "@@ file refused true, random true, clock true, environment 0, arguments 0",
            "@@ from a goroutine",
        ] {
            host.printed(line);
        }
        let got = post(host.address, "/go", "", "body").compared();
        assert_eq!(host.wait("delete"), ["/go end false", "delete"]);
        got
    });
    assert!(got.has("x-go: was here"), "{got:?}");
    assert!(got.body.contains("x-answer: alice 8\n") && got.body.ends_with("BODY\n"), "{got:?}");
}

#[test]
fn a_filter_on_the_go_sdk_does_with_requests_as_in_envoy() {
    let Some(wasm) = go_sdk_filter() else { return };
    let setup = Setup { wasm, configuration: "http", calls: asked(), ..Setup::new("", origin(false)) };
    let (answers, body) = same(&setup, "requests through the Go SDK", |host| {
        let answers = ["/", "/call", "/wait", "/deny", "/queue"].map(|path| {
            let got = get(host.address, path, "").compared();
            // When a queue is told of its message is not the question.
            if path == "/queue" {
                host.printed("@@ queue true a message <nil>");
            }
            let mut said = host.wait("done");
            said.retain(|line| !line.starts_with("queue "));
            (got, said)
        });
        (answers, (post(host.address, "/body", "", "body").compared(), host.wait("done")))
    });
    let [_, (called, _), (waited, _), (denied, _), _] = &answers;
    assert!(called.body.contains("X-ANSWER: ALICE 1\n"), "{called:?}");
    assert!(waited.body.contains("X-WAITED: YES\n"), "{waited:?}");
    assert!(denied.status == 403 && denied.body == "NO\n" && denied.has("x-denied: 1"), "{denied:?}");
    assert!(body.0.body.ends_with("[PREPENDED]BODY[APPENDED]\n") && body.0.has("x-go-sdk: 3"), "{body:?}");
}

#[test]
fn a_filter_on_the_go_sdk_does_with_connections_as_in_envoy() {
    let Some(wasm) = go_sdk_filter() else { return };
    let setup = Setup { wasm, configuration: "tcp", network: true, ..Setup::new("", echo("main")) };
    let (got, said) = same(&setup, "connections through the Go SDK", |host| {
        (talk(host, &[("hello", "main:HELLO!".len())]), host.wait("delete"))
    });
    assert_eq!(got, "main:HELLO!");
    assert!(said.iter().any(|line| line == "upstream \"main:HELLO\" <nil>"), "{said:?}");
}
