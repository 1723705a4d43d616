//! Each folder of `examples/` is valid, and those that need no namespace are probed here through the HTTP proxy port. The
//! others are probed by `make conformance` with the cases in `tests/conformance/examples`.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use portolan_tests::{origin, repo};

const PATIENCE: Duration = Duration::from_secs(15);

/// A copy of an example with other ports, and proxy-host serving it.
struct Example {
    folder: tempfile::TempDir,
    proxy: SocketAddr,
    child: Child,
}

impl Example {
    /// Starts proxy-host on the example after replacing texts in its files.
    fn start(name: &str, replace: &[(&str, &str)]) -> Example {
        let folder = tempfile::tempdir().unwrap();
        let proxy = free_port();
        let port = proxy.port().to_string();
        for file in fs::read_dir(repo::root().join("examples").join(name)).unwrap() {
            let file = file.unwrap().path();
            if file.extension().is_some_and(|e| e == "yaml") {
                let mut text = fs::read_to_string(&file).unwrap().replace("15080", &port);
                for (from, to) in replace {
                    text = text.replace(from, to);
                }
                fs::write(folder.path().join(file.file_name().unwrap()), text).unwrap();
            }
        }
        let mut child = Command::new(repo::binary("proxy-host"))
            .args(["--log-level", "warn", "--access-log=false", "--config"])
            .arg(folder.path())
            .spawn()
            .unwrap();
        let end = Instant::now() + PATIENCE;
        while TcpStream::connect(proxy).is_err() {
            assert!(child.try_wait().unwrap().is_none(), "proxy-host ended");
            assert!(Instant::now() < end, "proxy-host does not listen");
        }
        Example { folder, proxy, child }
    }

    /// Status and body of a GET through the HTTP proxy port.
    fn get(&self, url: &str) -> (u16, String) {
        let host = url.trim_start_matches("http://").split('/').next().unwrap();
        let mut stream = TcpStream::connect(self.proxy).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {url} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let status = answer.split(' ').nth(1).unwrap_or_else(|| panic!("no status in {answer:?}")).parse().unwrap();
        let body = answer.split_once("\r\n\r\n").unwrap().1.to_owned();
        (status, body)
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        // It may have ended on its own; the test has said so then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address on loopback that nobody uses at the moment.
fn free_port() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

fn examples() -> Vec<PathBuf> {
    fs::read_dir(repo::root().join("examples")).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect()
}

fn names(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn each_example_is_valid() {
    for example in examples() {
        let said = Command::new(repo::binary("portolan")).arg("validate").arg(&example).output().unwrap();
        let findings = String::from_utf8_lossy(&said.stdout);
        assert!(said.status.success(), "{}: {findings}{}", example.display(), String::from_utf8_lossy(&said.stderr));
        assert!(!findings.contains("warning"), "{}: {findings}", example.display());
    }
}

#[test]
fn each_example_is_probed() {
    let mut probed = names(&repo::root().join("tests/conformance/examples"));
    probed.extend(["quickstart", "moving-vm"].map(str::to_owned));
    assert_eq!(names(&repo::root().join("examples")), probed);
}

#[test]
fn quickstart_lets_one_host_through_and_refuses_another() {
    let origin = origin::tcp(free_port()).unwrap();
    let example = Example::start("quickstart", &[("18080", &origin.port().to_string())]);
    let (status, body) = example.get("http://hello.example.com/");
    assert_eq!((status, body), (200, format!("{origin} got GET / HTTP/1.1 for hello.example.com\n")));
    let (status, _) = example.get("http://forbidden.example.com/");
    assert_eq!(status, 502);
}

#[test]
fn unix_socket_is_reached_by_name() {
    let sockets = tempfile::tempdir().unwrap();
    let path = sockets.path().join("print.sock");
    origin::unix(&path).unwrap();
    let example = Example::start("unix-socket", &[("/tmp/portolan-example/print.sock", path.to_str().unwrap())]);
    let (status, body) = example.get("http://print.local.example/jobs");
    assert_eq!(status, 200);
    assert_eq!(body, format!("unix:{} got GET /jobs HTTP/1.1 for print.local.example\n", path.display()));
}

#[test]
fn moving_vm_is_followed() {
    let everywhere = origin::tcp(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
    let example = Example::start("moving-vm", &[("18080", &everywhere.port().to_string())]);
    let (status, body) = example.get("http://billing.example/");
    assert_eq!(status, 200);
    assert!(body.starts_with("127.0.0.2:"), "{body}");

    let vm = example.folder.path().join("vm.yaml");
    let moved = fs::read_to_string(&vm).unwrap().replace("127.0.0.2", "127.0.0.3");
    fs::write(vm, moved).unwrap();
    let end = Instant::now() + PATIENCE;
    loop {
        let (status, body) = example.get("http://billing.example/");
        if status == 200 && body.starts_with("127.0.0.3:") {
            break;
        }
        assert!(Instant::now() < end, "still {status} {body}");
    }
}
