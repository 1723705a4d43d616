//! A filter's host as a process (`proxy-host filter`, or Envoy), origins for it, and clients.

use std::{
    convert::Infallible,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex, OnceLock},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::runtime::Runtime;

use crate::modules::filters;

/// Longest wait for anything that is certain to come.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Says that a test cannot run here; where nothing may be skipped, it fails.
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "SKIPPED in CI: {why}");
    println!("SKIPPED: {why}");
    eprintln!("SKIPPED: {why}");
}

/// What runs a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Portolan,
    Envoy,
}

/// Envoy, where the project has installed it.
fn envoy() -> Option<PathBuf> {
    Some(repository().join(".venv/bin/envoy")).filter(|path| path.exists())
}

/// Both hosts, or ours alone where there is no Envoy.
pub fn hosts() -> Vec<Kind> {
    if envoy().is_some() {
        return vec![Kind::Portolan, Kind::Envoy];
    }
    skip("no .venv/bin/envoy: the comparison with Envoy is left out");
    vec![Kind::Portolan]
}

/// How to run a filter.
#[derive(Clone)]
pub struct Setup<'a> {
    pub wasm: &'a Path,
    pub root_id: &'a str,
    pub configuration: &'a str,
    pub network: bool,
    pub upstream: SocketAddr,
    /// The HTTP and the gRPC cluster that the filter calls.
    pub calls: SocketAddr,
    pub grpc: SocketAddr,
    /// Clients and the upstream speak HTTP/2.
    pub http2: bool,
    /// Silence that ends a stream, in milliseconds.
    pub stream_idle: Option<u32>,
    /// Silence that ends a connection of a network filter, in milliseconds.
    pub tcp_idle: Option<u32>,
}

impl<'a> Setup<'a> {
    pub fn new(root_id: &'a str, upstream: SocketAddr) -> Self {
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
        Self {
            wasm: filters(),
            root_id,
            configuration: "",
            network: false,
            upstream,
            calls: nowhere,
            grpc: nowhere,
            http2: false,
            stream_idle: None,
            tcp_idle: None,
        }
    }
}

/// A filter that runs in a process of its own.
pub struct Host {
    pub address: SocketAddr,
    child: Mutex<Child>,
    lines: Arc<Lines>,
    _dir: tempfile::TempDir,
}

#[derive(Default)]
struct Lines {
    lines: Mutex<Vec<String>>,
    came: Condvar,
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may have ended already.
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Host {
    pub fn start(kind: Kind, setup: &Setup) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = match kind {
            Kind::Portolan => portolan(setup, address),
            Kind::Envoy => {
                let path = dir.path().join("envoy.yaml");
                fs::write(&path, bootstrap(setup, address)).unwrap();
                let mut command = Command::new(envoy().expect("checked before"));
                command.args(["--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"]);
                command.args(["--component-log-level", "wasm:info", "-c"]).arg(path);
                command
            }
        };
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the host starts");
        let lines = Arc::<Lines>::default();
        let (stderr, to) = (child.stderr.take().unwrap(), lines.clone());
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if std::env::var_os("SHOW").is_some() {
                    eprintln!("{line}");
                }
                to.lines.lock().unwrap().push(line);
                to.came.notify_all();
            }
        });
        let host = Self { address, child: Mutex::new(child), lines, _dir: dir };
        let end = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < end, "{kind:?} does not listen: {:?}", host.all());
            // Ours says that it listens; Envoy does not.
            let lines = host.lines.lines.lock().unwrap();
            drop(host.lines.came.wait_timeout(lines, Duration::from_millis(10)).unwrap());
        }
        if setup.network {
            // The attempt was a connection like any other.
            host.wait("delete");
        }
        if setup.network {
            host.lines.lines.lock().unwrap().clear();
        }
        host
    }

    /// Sends SIGTERM, and gives the exit status.
    pub fn terminate(&self) -> Option<i32> {
        let mut child = self.child.lock().unwrap();
        let killed = Command::new("kill").arg(child.id().to_string()).status().expect("kill runs");
        assert!(killed.success());
        child.wait().unwrap().code()
    }

    /// Everything that the host has written.
    pub fn all(&self) -> Vec<String> {
        self.lines.lines.lock().unwrap().clone()
    }

    /// Waits for a line that holds this.
    pub fn printed(&self, text: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.all().iter().any(|line| line.contains(text)) {
            assert!(Instant::now() < end, "{text:?} did not come: {:#?}", self.all());
            let lines = self.lines.lines.lock().unwrap();
            // A line may have come meanwhile; the next look finds it.
            drop(self.lines.came.wait_timeout(lines, Duration::from_millis(50)).unwrap());
        }
    }

    /// What the filter has said.
    pub fn said(&self) -> Vec<String> {
        let said = |line: &String| {
            let (_, said) = line.split_once("@@ ")?;
            // Envoy starts each filter twice: once on its main thread.
            let start = ["configure ", "vm start ", "printed ", "file ", "from a "];
            (!start.iter().any(|start| said.starts_with(start))).then(|| said.trim_end().to_owned())
        };
        self.all().iter().filter_map(said).collect()
    }

    /// What the filter said, up to a line that begins like this, which has to come; then it is forgotten.
    pub fn wait(&self, last: &str) -> Vec<String> {
        self.wait_count(last, 1)
    }

    /// As [`Host::wait`], for the `count`th such line.
    pub fn wait_count(&self, last: &str, count: usize) -> Vec<String> {
        let end = Instant::now() + PATIENCE;
        loop {
            let said = self.said();
            if said.iter().filter(|line| line.starts_with(last)).count() >= count {
                self.lines.lines.lock().unwrap().clear();
                return said;
            }
            let lines = self.lines.lines.lock().unwrap();
            let rest = end.saturating_duration_since(Instant::now());
            assert!(!rest.is_zero(), "{last:?} did not come: {lines:#?}");
            // A line may have come meanwhile; the next look finds it.
            drop(self.lines.came.wait_timeout(lines, rest.min(Duration::from_millis(50))).unwrap());
        }
    }
}

fn portolan(setup: &Setup, address: SocketAddr) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_proxy-host"));
    command.arg("filter").arg("--wasm").arg(setup.wasm);
    command.args(["--root-id", setup.root_id, "--configuration", setup.configuration]);
    command.args(["--vm-configuration", "vm text", "--listen", &address.to_string()]);
    command.args(["--upstream", &setup.upstream.to_string()]);
    command.args(["--cluster", &format!("calls={}", setup.calls), "--cluster", &format!("grpc={}", setup.grpc)]);
    if setup.network {
        command.arg("--network");
    }
    if let Some(ms) = setup.stream_idle {
        command.args(["--stream-idle-timeout", &format!("{ms}ms")]);
    }
    if let Some(ms) = setup.tcp_idle {
        command.args(["--tcp-idle-timeout", &format!("{ms}ms")]);
    }
    command
}

fn bootstrap(setup: &Setup, address: SocketAddr) -> String {
    let string =
        |value: &str| serde_json::json!({"@type": "type.googleapis.com/google.protobuf.StringValue", "value": value});
    let plugin = serde_json::json!({
        "name": setup.wasm.file_stem().unwrap().to_str(),
        "root_id": setup.root_id,
        "configuration": string(setup.configuration),
        "vm_config": {
            "runtime": "envoy.wasm.runtime.v8",
            "configuration": string("vm text"),
            "code": {"local": {"filename": setup.wasm}},
        },
    });
    let wasm = |kind: &str| {
        serde_json::json!({
            "name": "wasm",
            "typed_config": {
                "@type": format!("type.googleapis.com/envoy.extensions.filters.{kind}.wasm.v3.Wasm"),
                "config": plugin,
            },
        })
    };
    let socket = |address: SocketAddr| serde_json::json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}});
    let seconds = |ms: u32| format!("{}s", f64::from(ms) / 1000.0);
    let filters = if setup.network {
        let proxy = serde_json::json!({
            "name": "tcp",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": "tcp",
                "cluster": "upstream",
                "idle_timeout": seconds(setup.tcp_idle.unwrap_or(3_600_000)),
            },
        });
        vec![wasm("network"), proxy]
    } else {
        let router = serde_json::json!({
            "name": "router",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
        });
        vec![serde_json::json!({
            "name": "http",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": "http",
                "stream_idle_timeout": seconds(setup.stream_idle.unwrap_or(300_000)),
                "route_config": {"virtual_hosts": [{
                    "name": "upstream",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "upstream"}}],
                }]},
                "http_filters": [wasm("http"), router],
            },
        })]
    };
    let cluster = |name: &str, address: SocketAddr, http2: bool| {
        let mut cluster = serde_json::json!({
            "name": name,
            "type": "STATIC",
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket(address)}}]}],
            },
        });
        if http2 {
            cluster["typed_extension_protocol_options"] = serde_json::json!({
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": {"http2_protocol_options": {}},
                },
            });
        }
        cluster
    };
    let clusters = [
        cluster("upstream", setup.upstream, setup.http2),
        cluster("calls", setup.calls, false),
        cluster("grpc", setup.grpc, true),
    ];
    let listener = serde_json::json!({
        "name": "l",
        "address": socket(address),
        "filter_chains": [{"filters": filters}],
    });
    // JSON is YAML.
    serde_json::json!({
        "node": {"id": "proxy-host", "cluster": "proxy-host"},
        "static_resources": {"listeners": [listener], "clusters": clusters},
    })
    .to_string()
}

/// The runtime of origins and HTTP/2 clients.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap())
}

pub type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// A body of these bytes, then these trailers.
pub fn body(bytes: impl Into<Bytes>, trailers: &[(&'static str, &'static str)]) -> UnsyncBoxBody<Bytes, Infallible> {
    let bytes = bytes.into();
    if bytes.is_empty() && trailers.is_empty() {
        // Known to be the end, so that HTTP/2 says it with the headers.
        return http_body_util::Empty::new().boxed_unsync();
    }
    let mut frames: Vec<Result<Frame<Bytes>, Infallible>> = Vec::new();
    if !bytes.is_empty() {
        frames.push(Ok(Frame::data(bytes)));
    }
    if !trailers.is_empty() {
        let map: HeaderMap = trailers.iter().map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap())).collect();
        frames.push(Ok(Frame::trailers(map)));
    }
    StreamBody::new(tokio_stream::iter(frames)).boxed_unsync()
}

/// A server for HTTP/1.1 or HTTP/2.
pub fn server<F, A>(http2: bool, answer: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    runtime().spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        while let Ok((stream, _)) = listener.accept().await {
            let answer = answer.clone();
            let service = service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let io = TokioIo::new(stream);
            runtime().spawn(async move {
                // How a connection ends is the client's affair.
                if http2 {
                    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(io, service)
                        .await;
                } else {
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
                }
            });
        }
    });
    address
}

/// An origin that answers with what it was asked, in a body of lines: the request line, the headers that begin with
/// `x-` and are the client's or the filter's, the length of a body above 100 bytes or else the body, the trailers.
pub fn origin(http2: bool) -> SocketAddr {
    server(http2, |request| async move {
        let (parts, incoming) = request.into_parts();
        let collected = incoming.collect().await;
        let path = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
        let mut lines = format!("{} {path}\n", parts.method);
        let mut headers: Vec<_> = parts.headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect();
        headers.retain(|line| line.starts_with("x-") && !line.starts_with("x-request-id"));
        headers.sort();
        for header in headers {
            lines += &format!("{header}\n");
        }
        if let Ok(collected) = collected {
            let trailers = collected.trailers().cloned();
            let body = collected.to_bytes();
            match body.len() {
                0..=100 => lines += &format!("{}\n", String::from_utf8_lossy(&body)),
                length => lines += &format!("{length} bytes\n"),
            }
            for (name, value) in trailers.iter().flatten() {
                lines += &format!("trailer {name}: {}\n", value.to_str().unwrap());
            }
        }
        let answer = Response::builder().header("x-origin", "yes");
        match parts.uri.path() {
            "/missing" => answer.status(404).body(body("", &[])).unwrap(),
            "/secret" => answer.body(body("a secret thing", &[])).unwrap(),
            "/large" => answer.body(body(vec![b'x'; 3 << 20], &[])).unwrap(),
            "/trailers" => answer.body(body(lines, &[("x-origin", "trailer")])).unwrap(),
            "/hang" => std::future::pending().await,
            _ => answer.header("content-length", lines.len()).body(body(lines, &[])).unwrap(),
        }
    })
}

/// What a client got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Got {
    /// 0: none.
    pub status: u16,
    pub headers: Vec<String>,
    pub body: String,
    /// It broke off.
    pub broken: bool,
}

impl Got {
    /// Without what differs between hosts, runs and moments.
    pub fn compared(mut self) -> Self {
        let volatile = ["date:", "server:", "x-envoy-upstream-service-time:", "connection:", "transfer-encoding:"];
        self.headers.retain(|header| !volatile.iter().any(|name| header.starts_with(name)));
        self.headers.sort();
        self
    }

    pub fn has(&self, header: &str) -> bool {
        self.headers.iter().any(|have| have == header)
    }
}

/// Sends a request by HTTP/1.1 as it is written, and reads to the end of the connection.
pub fn exchange(address: SocketAddr, request: &str) -> Got {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // A reset, before or after the request is written, ends the answer as well as an end does.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    parse(&answer)
}

fn parse(answer: &[u8]) -> Got {
    let none = Got { status: 0, headers: Vec::new(), body: String::new(), broken: true };
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return none };
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).unwrap_or(0);
    let headers: Vec<_> = lines
        .map(|line| match line.split_once(':') {
            Some((name, value)) => format!("{}: {}", name.to_lowercase(), value.trim()),
            None => line.to_owned(),
        })
        .collect();
    let has = |header: &str| headers.iter().any(|have| have == header);
    let length = headers.iter().find_map(|have| have.strip_prefix("content-length: ")?.parse::<usize>().ok());
    let (body, broken) = if has("transfer-encoding: chunked") {
        let (body, whole) = unchunk(body);
        (body, !whole)
    } else {
        (body.to_owned(), length.is_some_and(|length| length != body.len()))
    };
    Got { status, headers, body, broken }
}

fn unchunk(mut rest: &str) -> (String, bool) {
    let mut out = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let Ok(size) = usize::from_str_radix(size, 16) else { break };
        if size == 0 {
            return (out, true);
        }
        let Some(data) = after.get(..size) else { break };
        out += data;
        rest = after.get(size + 2..).unwrap_or_default();
    }
    (out, false)
}

/// `GET path` with these headers.
pub fn get(address: SocketAddr, path: &str, headers: &str) -> Got {
    exchange(address, &format!("GET {path} HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\n{headers}\r\n"))
}

/// `POST path` with these headers and this body.
pub fn post(address: SocketAddr, path: &str, headers: &str, body: &str) -> Got {
    let length = body.len();
    exchange(
        address,
        &format!(
            "POST {path} HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
        ),
    )
}

/// A request by HTTP/2 with trailers; the answer's trailers stand among its headers as `trailer NAME: VALUE`.
pub fn http2(
    address: SocketAddr,
    path: &str,
    headers: &[(&str, &str)],
    bytes: &str,
    trailers: &[(&'static str, &'static str)],
) -> Got {
    let mut request = Request::builder().method("POST").uri(format!("http://a.example{path}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(body(bytes.to_owned(), trailers)).unwrap();
    let exchange = async move {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let Ok(response) = sender.send_request(request).await else {
            return Got { status: 0, headers: Vec::new(), body: String::new(), broken: true };
        };
        let (parts, body) = response.into_parts();
        let line = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
            format!("{name}: {}", String::from_utf8_lossy(value.as_bytes()))
        };
        let mut headers: Vec<_> = parts.headers.iter().map(line).collect();
        let (body, broken) = match body.collect().await {
            Ok(collected) => {
                let trailers = collected.trailers().into_iter().flatten().map(line);
                headers.extend(trailers.map(|line| format!("trailer {line}")));
                (String::from_utf8_lossy(&collected.to_bytes()).into_owned(), false)
            }
            Err(_) => (String::new(), true),
        };
        Got { status: parts.status.as_u16(), headers, body, broken }
    };
    runtime().block_on(async { tokio::time::timeout(PATIENCE, exchange).await.expect("an answer in time") })
}
