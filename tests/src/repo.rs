//! Where things are in the repository, and its binaries.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests are a folder of the repository")
}

/// The binary `name` of the workspace, built first if need be.
pub fn binary(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        // As `make test` builds them, with the tests' features of dependencies: otherwise much would be built twice.
        cargo.args(["test", "--no-run", "--quiet", "--workspace"]).current_dir(root());
        // What cargo told this test of its package, ring's build script would take for a change: everything above it
        // would be built again, now and in the next build.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
                cargo.env_remove(&*name);
            }
        }
        let built = cargo.status().expect("cargo runs");
        assert!(built.success(), "the binaries do not build");
    });
    // The test itself is target/PROFILE/deps/NAME.
    let test = std::env::current_exe().expect("the test has a path");
    test.ancestors().nth(2).expect("target/PROFILE/deps").join(name)
}

/// The files that git knows, relative to the root.
pub fn files() -> Vec<String> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().expect("git runs");
    assert!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    String::from_utf8_lossy(&listed.stdout).split_terminator('\0').map(str::to_owned).collect()
}
