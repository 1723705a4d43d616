//! Regenerates the committed code from the `.proto` files and compares. `UPDATE=1` writes it.

use std::path::Path;

fn generate(out: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = ["portolan/v1/registry.proto", "portolan/v1/listener.proto"];
    let descriptors = protox::compile(files, [root.join("proto")]).expect("the proto files compile");
    tonic_prost_build::configure()
        .out_dir(out)
        .build_transport(false)
        .btree_map(".")
        .client_mod_attribute(".", "#[cfg(feature = \"grpc\")]")
        .server_mod_attribute(".", "#[cfg(feature = \"grpc\")]")
        .compile_fds(descriptors)
        .expect("code is generated");
}

#[test]
fn generated_code_is_what_the_proto_files_say() {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gen");
    if std::env::var_os("UPDATE").is_some() {
        generate(&committed);
    }
    let fresh = tempfile::tempdir().expect("a temporary directory");
    generate(fresh.path());
    let read = |d: &Path| std::fs::read_to_string(d.join("portolan.v1.rs")).unwrap_or_default();
    assert!(
        read(fresh.path()) == read(&committed),
        "src/gen differs from proto/: run `UPDATE=1 cargo test -p portolan-proto`"
    );
}
