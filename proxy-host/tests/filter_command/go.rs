//! A filter in Go: its runtime needs WASI, and it finds streams by the plugin's context that answers are delivered to.

use crate::{
    calls::asked,
    http::same,
    support::{Host, Setup, go_filter, origin, post},
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
