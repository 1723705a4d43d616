//! The modules that the tests run, built when they are first asked for.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use crate::support::{repository, skip};

/// The module with all test filters, built once.
pub fn filters() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("filters");
        let status = Command::new(env!("CARGO"))
            .current_dir(repository().join("tests/filters/rust"))
            .args(["build", "--locked", "--quiet", "--release", "--target", "wasm32-wasip1", "--target-dir"])
            .arg(&target)
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .status()
            .expect("cargo starts");
        assert!(status.success(), "the test filters do not build");
        target.join("wasm32-wasip1/release/portolan_test_filters.wasm")
    })
}

/// The filter in Go that declares the ABI itself, built once; `None` without Go, which is told.
pub fn go_filter() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    BUILT.get_or_init(|| build_go("go")).as_deref()
}

/// The filter on the public Go SDK, built once; `None` without Go or the SDK, which is told.
pub fn go_sdk_filter() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let directory = repository().join("tests/filters/go-sdk");
        // Of the commands that need the SDK this one alone fails for nothing else than its want.
        match Command::new("go").current_dir(directory).args(["mod", "download"]).status() {
            Ok(status) if status.success() => build_go("go-sdk"),
            Ok(_) => {
                skip("the Go SDK cannot be had from the module proxy");
                None
            }
            Err(error) => {
                skip(&format!("go does not start: {error}"));
                None
            }
        }
    });
    built.as_deref()
}

fn build_go(name: &str) -> Option<PathBuf> {
    let wasm = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}_filter.wasm"));
    let built = Command::new("go")
        .current_dir(repository().join("tests/filters").join(name))
        .args(["build", "-buildmode=c-shared", "-o"])
        .arg(&wasm)
        .arg(".")
        .env("GOOS", "wasip1")
        .env("GOARCH", "wasm")
        .status();
    match built {
        Ok(status) => {
            assert!(status.success(), "the Go filter {name} does not build");
            Some(wasm)
        }
        Err(error) => {
            skip(&format!("go does not start: {error}"));
            None
        }
    }
}
