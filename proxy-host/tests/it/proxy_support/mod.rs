//! A whole proxy for a test: in this process, or as the program that users start.

#![allow(dead_code, reason = "each test uses what it needs")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use portolan_proxy_host::{access_log::AccessLog, app::App, config::Config};

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// An HTTP/1.1 origin that answers each request with its name; `/slow` after `delay`.
pub fn origin(name: &'static str, delay: Duration) -> SocketAddr {
    origin_at("127.0.0.1:0", name, delay)
}

/// The same at a given address.
pub fn origin_at(address: &str, name: &'static str, delay: Duration) -> SocketAddr {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || talk(stream, name, delay));
        }
    });
    address
}

fn talk(mut stream: TcpStream, name: &str, delay: Duration) {
    while let Some(head) = read_head(&mut stream) {
        if head.starts_with("GET /slow ") {
            thread::park_timeout(delay);
        }
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len());
        let last = head.to_ascii_lowercase().contains("\r\nconnection: close\r\n");
        if stream.write_all(answer.as_bytes()).is_err() || last {
            return;
        }
    }
}

/// The head of a message, to its empty line; `None` at the end.
pub fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    Some(String::from_utf8_lossy(&head).into_owned())
}

/// A ServiceEntry for this host; `port` as in YAML, without braces.
pub fn entry(name: &str, host: &str, port: &str, endpoint: SocketAddr) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: default}}\n\
         spec:\n  hosts: [{host}]\n  resolution: STATIC\n  ports: [{{{port}, targetPort: {}}}]\n  \
         endpoints: [{{address: '{}'}}]\n---\n",
        endpoint.port(),
        endpoint.ip()
    )
}

/// Port 80 with HTTP.
pub const HTTP: &str = "number: 80, name: http, protocol: HTTP";

/// Files for a proxy in a mesh that refuses what is not in the registry.
pub fn write(dir: &Path, resources: &str) {
    fs::write(dir.join("mesh.yaml"), "outboundTrafficPolicy: {mode: REGISTRY_ONLY}\ndnsRefreshRate: 1s\n").unwrap();
    fs::write(dir.join("entries.yaml"), resources).unwrap();
}

/// A proxy in this process with an HTTP proxy port and an admin port.
pub fn start(dir: &Path, resources: &str, configure: impl FnOnce(&mut Config)) -> (App, Receiver<String>) {
    write(dir, resources);
    let mut config = Config::of_files(vec![dir.to_owned()]);
    config.http_proxies = vec!["127.0.0.1:0".parse().unwrap()];
    config.admin = Some("127.0.0.1:0".parse().unwrap());
    config.threads = 2;
    configure(&mut config);
    let (log, lines) = AccessLog::channel();
    (App::start(config, log).unwrap(), lines)
}

/// Sends this and reads until the end.
pub fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // A reset, before or after the request is written, ends the answer as well as an end does.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// GET through a proxy, or of a server.
pub fn get(address: SocketAddr, target: &str) -> String {
    let host = target.strip_prefix("http://").and_then(|rest| rest.split('/').next()).unwrap_or("localhost");
    exchange(address, &format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))
}

/// Asks until the answer holds `text`.
pub fn until(address: SocketAddr, target: &str, text: &str) -> String {
    let end = Instant::now() + PATIENCE;
    loop {
        let answer = get(address, target);
        if answer.contains(text) {
            return answer;
        }
        assert!(Instant::now() < end, "no {text:?} in the last answer to {target}: {answer}");
        thread::park_timeout(Duration::from_millis(20));
    }
}

/// The program, with what it writes to standard error.
pub struct Program {
    pub child: Child,
    log: Receiver<String>,
    pub seen: Vec<String>,
}

impl Program {
    /// Starts it; standard output is kept for [`Program::output`].
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, log) = mpsc::channel();
        let stderr = child.stderr.take().unwrap();
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, log, seen: Vec::new() }
    }

    /// The program of this crate.
    pub fn command() -> Command {
        Command::new(env!("CARGO_BIN_EXE_proxy-host"))
    }

    /// Waits for a line of its log that holds `text`.
    pub fn line(&mut self, text: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.log.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(_) => panic!("no line with {text:?} in {:#?}", self.seen),
            }
        }
    }

    /// The address after `what` in the line that says it is ready.
    pub fn address(ready: &str, what: &str) -> SocketAddr {
        let rest = ready.split_once(what).unwrap_or_else(|| panic!("no {what:?} in {ready:?}")).1;
        rest.trim_start().split([',', ' ', '"']).next().unwrap().parse().unwrap()
    }

    /// Sends a signal, by its name.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Waits for its end; gives its exit status and standard output.
    pub fn output(&mut self) -> (Option<i32>, String) {
        let mut out = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        (self.child.wait().unwrap().code(), out)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended on its own.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
