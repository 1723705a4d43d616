//! Modules of ABI 0.2.0. It differs from 0.2.1 in one function, which the test filters do not import: they are of
//! either version, as their export says.

use std::{fs, net::TcpListener, path::PathBuf, process::Command, sync::OnceLock};

use crate::{
    calls::asked,
    http::same,
    modules::filters,
    support::{Host, Setup, get, origin, post},
};

/// The test filters, as modules of ABI 0.2.0.
fn older() -> &'static PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let (new, old) = (&b"proxy_abi_version_0_2_1"[..], b"proxy_abi_version_0_2_0");
        let mut module = fs::read(filters()).unwrap();
        let places: Vec<_> = (0..module.len() - new.len()).filter(|at| module[*at..].starts_with(new)).collect();
        assert_eq!(places.len(), 1, "the version is exported once");
        module[places[0]..places[0] + old.len()].copy_from_slice(old);
        let path = filters().with_file_name("abi_0_2_0.wasm");
        // Another run may be reading it.
        let new = path.with_extension(std::process::id().to_string());
        fs::write(&new, module).unwrap();
        fs::rename(&new, &path).unwrap();
        path
    })
}

fn setup(root_id: &str) -> Setup<'_> {
    Setup { wasm: older(), calls: asked(), ..Setup::new(root_id, origin(false)) }
}

#[test]
fn headers_bodies_and_the_order_of_callbacks() {
    let (headers, said) = same(&setup("headers"), "0.2.0 headers", |host| {
        let got = get(host.address, "/path?query", "x-two: first\r\nx-gone: 1\r\n").compared();
        (got, host.wait(":status"))
    });
    assert!(headers.body.starts_with("GET /changed?by=filter\n") && !headers.body.contains("x-gone"), "{headers:?}");
    assert!(said.iter().any(|line| line == ":path = Some(\"/path?query\")"), "{said:?}");
    let body = same(&setup("bodies"), "0.2.0 bodies", |host| {
        post(host.address, "/", "x-do: request-append,response-append\r\n", "0123").compared()
    });
    assert!(body.body.ends_with("0123[appended]\n[appended]"), "{body:?}");
    let said = same(&setup("order"), "0.2.0 order", |host| {
        ["", "request-body=respond", "response-headers=empty"].map(|at| {
            let got = post(host.address, "/p", &format!("x-at: {at}\r\n"), "body").compared();
            (got, host.wait("delete"))
        })
    });
    assert_eq!([said[0].0.status, said[1].0.status, said[2].0.status], [200, 418, 204]);
}

#[test]
fn calls_timers_data_and_attributes() {
    let calls = same(&setup("http-call"), "0.2.0 calls", |host| {
        ["/allow", "/deny"].map(|path| (get(host.address, path, "").compared(), host.wait("call response")))
    });
    assert_eq!([calls[0].0.status, calls[1].0.status], [200, 403]);
    let passed = same(&setup("waiting"), "0.2.0 timers", |host| get(host.address, "/", "").compared());
    assert!(passed.body.contains("x-waited: yes\n"), "{passed:?}");
    same(&setup("shared"), "0.2.0 data", |host| {
        assert_eq!(get(host.address, "/", "").status, 200);
        let mut said = host.wait("then");
        // When timers fire, and on which of Envoy's threads, is not the question.
        said.retain(|line| !line.contains("tick"));
        said
    });
    let attributes = Setup { configuration: "request.path\nrequest.host\nresponse.code\nown", ..setup("properties") };
    let said = same(&attributes, "0.2.0 attributes", |host: &Host| {
        assert_eq!(get(host.address, "/p", "").status, 200);
        host.wait_count("log", 4)
    });
    assert_eq!(said.len(), 12);
}

#[test]
fn connections() {
    let setup = Setup { configuration: "shut", network: true, ..setup("net") };
    let said = same(&setup, "0.2.0 connections", |host| {
        let mut got = Vec::new();
        let mut stream = std::net::TcpStream::connect(host.address).unwrap();
        std::io::Read::read_to_end(&mut stream, &mut got).unwrap();
        (got, host.wait("delete"))
    });
    assert!(said.0.is_empty() && said.1.iter().any(|line| line == "downstream close local"), "{said:?}");
}

/// Both hosts refuse what they cannot link: ours says which import it is.
#[test]
fn the_level_of_the_log_is_asked_for_in_0_2_1_only() {
    let directory = tempfile::tempdir().unwrap();
    for (version, starts) in [("0_2_0", false), ("0_2_1", true)] {
        let module = format!(
            r#"(module (import "env" "proxy_get_log_level" (func (param i32) (result i32)))
                 (memory (export "memory") 1) (func (export "proxy_abi_version_{version}"))
                 (func (export "proxy_on_context_create") (param i32 i32))
                 (func (export "malloc") (param i32) (result i32) (i32.const 1024)))"#
        );
        let wasm = directory.path().join("level.wasm");
        fs::write(&wasm, wat::parse_str(module).unwrap()).unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_proxy-host"));
        command.args(["filter", "--upstream", "127.0.0.1:1", "--listen", &taken.local_addr().unwrap().to_string()]);
        let output = command.arg("--wasm").arg(&wasm).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        // A module that links comes as far as the address that another one has.
        let expected = if starts { "cannot listen on" } else { "proxy_get_log_level" };
        assert!(text.contains(expected), "{version}: {text}");
    }
}
