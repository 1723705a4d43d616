//! What a person types, right and wrong.

use std::{fs, process::Command};

use crate::modules::filters;

fn run(args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_proxy-host")).arg("filter").args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

const NEEDED: [&str; 4] = ["--listen", "127.0.0.1:0", "--upstream", "127.0.0.1:1"];

#[test]
fn help_teaches() {
    let (code, text) = run(&["--help"]);
    assert_eq!(code, Some(0));
    for word in ["proxy-host filter --wasm", "--cluster <NAME=HOST:PORT>", "--network", "Examples:", "413"] {
        assert!(text.contains(word), "{word} in {text}");
    }
}

#[test]
fn mistakes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let not_wasm = dir.path().join("text.wasm");
    fs::write(&not_wasm, "no module").unwrap();
    let filters = filters().to_str().unwrap();
    for (args, expected, words) in [
        (&["--wasm", "/none/such.wasm"][..], 2, "--wasm /none/such.wasm: "),
        (&["--wasm", not_wasm.to_str().unwrap()], 2, "does not compile"),
        (&["--wasm", filters, "--cluster", "a"], 2, "write NAME=HOST:PORT"),
        (&["--wasm", filters, "--configuration", "@/none/such"], 2, "--configuration /none/such: "),
        (&["--wasm", filters, "--root-id", "headers", "--configuration", "refuse"], 1, "proxy_on_configure"),
    ] {
        let (code, text) = run(&[&NEEDED, args].concat());
        assert!(code == Some(expected) && text.contains(words), "{args:?}: {code:?} {text}");
    }
}
