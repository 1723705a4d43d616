//! Builds `filter.wasm` from the filter crate and compiles it ahead of time, so that the binary carries both.
//!
//! `PORTOLAN_FILTER_WASM=path` takes a module that is already built instead.

#[path = "src/vm/settings.rs"]
mod settings;

use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// What the filter is made of; anything else that changes does not build it again.
const SOURCES: [&str; 9] = [
    "Cargo.lock",
    "Cargo.toml",
    "rust-toolchain.toml",
    "filter/Cargo.toml",
    "filter/src",
    "registry/Cargo.toml",
    "registry/src",
    "proto/Cargo.toml",
    "proto/src",
];

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-env-changed=PORTOLAN_FILTER_WASM");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/vm/settings.rs");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let built = match env::var_os("PORTOLAN_FILTER_WASM") {
        Some(path) => {
            println!("cargo::rerun-if-changed={}", Path::new(&path).display());
            PathBuf::from(path)
        }
        None => build(&out)?,
    };
    let wasm = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    let engine = wasmtime::Engine::new(&settings::wasmtime_config()).map_err(words)?;
    let artifact = engine.precompile_module(&wasm).map_err(words)?;
    fs::write(out.join("filter.wasm"), wasm)?;
    fs::write(out.join("filter.cwasm"), artifact)?;
    Ok(())
}

fn words(error: wasmtime::Error) -> anyhow::Error {
    anyhow::anyhow!("wasmtime: {error:#}")
}

/// Builds the filter crate in a target directory of its own: the one in use is locked by the cargo that runs us.
fn build(out: &Path) -> anyhow::Result<PathBuf> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("..").canonicalize()?;
    for source in SOURCES {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    // OUT_DIR is TARGET/PROFILE/build/PACKAGE-HASH/out; profiles share the filter.
    let target = out.ancestors().nth(4).context("OUT_DIR is not below a target directory")?.join("filter");
    let mut cargo = Command::new(env::var_os("CARGO").context("cargo does not say where it is")?);
    cargo
        .current_dir(&root)
        .args(["build", "--package", "portolan-filter", "--lib", "--target", "wasm32-wasip1", "--profile", "wasm"])
        .arg("--target-dir")
        .arg(&target);
    // Settings of the build that runs us are for the host and not for wasm: flags, wrappers (clippy) and build targets.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let of_this_build = ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", "RUSTC", "RUSTC_WORKSPACE_WRAPPER", "CLIPPY_ARGS"];
        if of_this_build.contains(&name.as_str())
            || name.starts_with("CARGO_FEATURE_")
            || name.starts_with("CARGO_CFG_")
        {
            cargo.env_remove(&name);
        }
    }
    let status = cargo.status().context("cargo does not start")?;
    if !status.success() {
        bail!("the filter does not build; is the target there? (rustup target add wasm32-wasip1)");
    }
    Ok(target.join("wasm32-wasip1/wasm/portolan_filter.wasm"))
}
