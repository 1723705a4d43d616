//! Start, limits, reload and end of the program, as an operator sees them.

use crate::proxy_support;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use proxy_support::*;

/// The program with these files, an HTTP proxy port and an admin port, once it is ready.
fn run(dir: &std::path::Path, more: &[&str]) -> (Program, SocketAddr, SocketAddr) {
    let mut command = Program::command();
    command.args(["--threads", "2", "--http-proxy", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--config"]).arg(dir);
    let mut program = Program::start(command.args(more));
    let ready = program.line("ready after");
    let (proxy, admin) = (Program::address(&ready, "HTTP proxy on"), Program::address(&ready, "admin on"));
    (program, proxy, admin)
}

#[test]
fn the_end_waits_for_what_is_under_way_and_loses_no_line() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &entry("a", "a.test", HTTP, origin("first", Duration::from_secs(2))));
    let (mut program, proxy, admin) = run(dir.path(), &["--access-log", "json"]);
    let idle = TcpStream::connect(proxy).unwrap();
    let mut slow = TcpStream::connect(proxy).unwrap();
    slow.set_read_timeout(Some(PATIENCE)).unwrap();
    slow.write_all(b"GET http://a.test/slow HTTP/1.1\r\nHost: a.test\r\n\r\n").unwrap();
    until(admin, "/clusters", "rq_active::1");
    program.signal("TERM");
    program.line("ending");
    assert!(get(admin, "/ready").ends_with("DRAINING\n"));
    let head = read_head(&mut slow).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 200 ") && head.contains("\r\nconnection: close\r\n"), "{head}");
    let (status, lines) = program.output();
    assert_eq!(status, Some(0));
    let line: serde_json::Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!((lines.lines().count(), &line["path"], &line["response_code"]), (1, &"/slow".into(), &200.into()));
    drop(idle);
}

#[test]
fn the_second_signal_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &entry("a", "a.test", HTTP, origin("first", Duration::from_secs(60))));
    let (mut program, proxy, admin) = run(dir.path(), &["--drain-time", "1h"]);
    let mut slow = TcpStream::connect(proxy).unwrap();
    slow.write_all(b"GET http://a.test/slow HTTP/1.1\r\nHost: a.test\r\n\r\n").unwrap();
    until(admin, "/clusters", "rq_active::1");
    program.signal("TERM");
    program.line("ending");
    program.signal("INT");
    program.line("ending at once");
    assert_eq!(program.output().0, Some(0));
}

#[test]
fn connections_that_are_too_many_are_refused_politely() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &entry("a", "a.test", HTTP, origin("first", Duration::ZERO)));
    let (_program, proxy, admin) = run(dir.path(), &["--max-connections", "1"]);
    let first = TcpStream::connect(proxy).unwrap();
    until(admin, "/metrics", "portolan_connections_open{listener=\"http_proxy\"} 1");
    let answer = get(proxy, "http://a.test/");
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("too many connections; try again soon"),
        "{answer}"
    );
    until(admin, "/metrics", "portolan_connections_refused_total 1\n");
    drop(first);
    until(proxy, "http://a.test/", "first");
}

/// Requests without a pause until it is told to stop; what came back otherwise than with 200.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(proxy: SocketAddr) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = |keep_alive: bool| {
            let (stop, answered) = (stop.clone(), answered.clone());
            thread::spawn(move || {
                let mut wrong = Vec::new();
                let mut kept: Option<TcpStream> = None;
                while !stop.load(Relaxed) {
                    let mut stream = kept.take().unwrap_or_else(|| TcpStream::connect(proxy).unwrap());
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    stream.write_all(b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n").unwrap();
                    let head = read_head(&mut stream).unwrap_or_default();
                    let mut body = [0; 5];
                    if head.starts_with("HTTP/1.1 200 ") && stream.read_exact(&mut body).is_ok() {
                        answered.fetch_add(1, Relaxed);
                        kept = keep_alive.then_some(stream);
                    } else {
                        wrong.push(head);
                    }
                }
                wrong
            })
        };
        let threads = vec![client(true), client(true), client(false)];
        Self { stop, answered, threads }
    }

    /// Waits until this many more requests have been answered.
    fn more(&self, requests: u64) {
        let goal = self.answered.load(Relaxed) + requests;
        while self.answered.load(Relaxed) < goal {
            assert!(!self.threads.iter().any(thread::JoinHandle::is_finished), "a client gave up");
            thread::yield_now();
        }
    }

    fn end(self) -> Vec<String> {
        self.stop.store(true, Relaxed);
        self.threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    }
}

#[test]
fn files_change_and_are_read_again_without_a_dropped_request() {
    let dir = tempfile::tempdir().unwrap();
    let first = origin("first", Duration::ZERO);
    let resources = entry("a", "a.test", HTTP, first);
    write(dir.path(), &resources);
    let (mut program, proxy, admin) = run(dir.path(), &["--access-log=off"]);
    let load = Load::start(proxy);
    load.more(100);
    let moved = origin("other", Duration::ZERO);
    for round in 0..5 {
        // Another endpoint for what is in use, and another entry beside it.
        let endpoint = if round % 2 == 0 { moved } else { first };
        let more = entry("b", &format!("b{round}.test"), HTTP, first);
        fs::write(dir.path().join("entries.yaml"), entry("a", "a.test", HTTP, endpoint) + &more).unwrap();
        until(proxy, &format!("http://b{round}.test/"), "first");
        load.more(100);
        program.signal("HUP");
        program.line("reading all files again");
    }
    // A file that is broken keeps the last good state, and is said once.
    fs::write(dir.path().join("entries.yaml"), resources.replace("hosts: [a.test]", "hosts: []")).unwrap();
    program.line("the last good version stays");
    load.more(100);
    let refused = "portolan_config_findings{gate=\"webhook\",severity=\"error\"";
    until(admin, "/metrics", refused);
    fs::write(dir.path().join("entries.yaml"), &resources).unwrap();
    program.line("no longer:");
    assert!(!get(admin, "/metrics").contains(refused));
    assert_eq!(load.end(), Vec::<String>::new());
    // The last SIGHUP may have been late enough to meet the broken file as well.
    until(admin, "/metrics", "portolan_config_reloads_total{result=\"with_errors\"} ");
}

#[test]
fn logs_are_json_where_that_is_wanted_and_their_level_changes_at_run_time() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "");
    let (mut program, proxy, admin) = run(dir.path(), &["--log-format", "json", "--log-level", "error"]);
    let ready: serde_json::Value = serde_json::from_str(program.seen.last().unwrap()).unwrap();
    assert_eq!(ready["level"], "INFO");
    let answer = exchange(admin, "POST /logging?level=debug HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(get(admin, "/logging").ends_with("debug\n"));
    let line: serde_json::Value = serde_json::from_str(&program.line("level of the log was changed")).unwrap();
    assert_eq!(line["level"], "INFO");
    get(proxy, "http://b.test/");
    assert!(program.line("b.test is not in the registry").contains("\"target\":\"filter\""));
}

#[test]
fn sockets_of_systemd_are_taken_by_their_names() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &entry("a", "a.test", HTTP, origin("first", Duration::ZERO)));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // A client that comes before the proxy runs is not refused.
    let early = thread::spawn(move || get(address, "http://a.test/"));
    let start = |names: &str, listener: &TcpListener| {
        let mut shell = Command::new("sh");
        // The shell's process becomes the proxy's, as LISTEN_PID has to say.
        let script = r#"exec 3<&0 </dev/null; LISTEN_PID=$$ exec "$0" --config "$1" --access-log=off"#;
        shell.args(["-c", script, env!("CARGO_BIN_EXE_proxy-host")]).arg(dir.path());
        shell.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", names);
        shell.stdin(Stdio::from(OwnedFd::from(listener.try_clone().unwrap())));
        Program::start(&mut shell)
    };
    let mut misnamed = start("web", &listener);
    misnamed.line("FileDescriptorName=transparent, http-proxy or admin");
    assert_eq!(misnamed.output().0, Some(2));
    let mut program = start("http-proxy", &listener);
    assert_eq!(Program::address(&program.line("ready after"), "HTTP proxy on"), address);
    assert!(early.join().unwrap().ends_with("first"));
}

#[test]
fn what_is_wrong_on_the_command_line_is_named() {
    let complaint = |args: &[&str]| {
        let output = Program::command().args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(complaint(&["--config", "/nowhere/at/all"]).contains("/nowhere/at/all: "));
    assert!(complaint(&["--config", ".", "--log-level", "loud"]).contains("\"loud\""));
    assert!(complaint(&["--config", ".", "--controller", "x:1"]).contains("--controller"));
    assert!(complaint(&["--controller", "nonsense"]).contains("a controller is written http://HOST:PORT"));
    let missing =
        complaint(&["--controller", "https://a:1", "--controller-ca", "/nowhere/ca.pem", "--http-proxy", "[::1]:0"]);
    assert!(missing.contains("/nowhere/ca.pem: ") && missing.contains("check the path"), "{missing}");
    assert!(complaint(&["capture", "print", "--istio-service-cidr", "10.0.0.0/40"]).contains("10.0.0.0/40"));
}

#[test]
fn the_units_of_systemd_give_arguments_that_there_are() {
    use clap::Parser as _;
    use portolan_proxy_host::{capture::Capture, config::Args};
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/systemd/");
    let mut commands = 0;
    for unit in ["portolan.service", "portolan-capture.service"] {
        let text = fs::read_to_string(format!("{folder}{unit}")).unwrap();
        for line in text.lines().filter(|line| line.starts_with("ExecStart=") || line.starts_with("ExecStop=")) {
            let words: Vec<_> = line.split_once('=').unwrap().1.split(' ').collect();
            if words[1] == "capture" {
                Capture::try_parse_from(&words[1..]).unwrap();
            } else {
                Args::try_parse_from(words).unwrap();
            }
            commands += 1;
        }
    }
    assert_eq!(commands, 3);
    let socket = fs::read_to_string(format!("{folder}portolan.socket")).unwrap();
    assert!(socket.contains("FileDescriptorName=transparent\n"));
}

#[test]
fn systemd_understands_the_units() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/systemd/");
    let dir = tempfile::tempdir().unwrap();
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]);
    for unit in fs::read_dir(folder).unwrap() {
        let unit = unit.unwrap();
        let text = fs::read_to_string(unit.path()).unwrap();
        // The program is not installed here.
        let text = text.replace("/usr/local/bin/proxy-host", env!("CARGO_BIN_EXE_proxy-host"));
        let path = dir.path().join(unit.file_name());
        fs::write(&path, text).unwrap();
        verify.arg(path);
    }
    match verify.output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let ours: Vec<_> = said.lines().filter(|line| line.contains("portolan")).collect();
            assert!(output.status.success() && ours.is_empty(), "{said}");
        }
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "SKIPPED in CI: systemd-analyze: {error}");
            println!("SKIPPED: systemd-analyze does not start: {error}");
        }
    }
}
