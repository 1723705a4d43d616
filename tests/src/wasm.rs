//! `filter.wasm` in the ABI host, with a registry stream whose other end the test holds.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use portolan_proto::v1::watch_request::Message as Request;
use portolan_proto::v1::{Page, Subscribe, WatchRequest, WatchResponse};
use portolan_proxy_host::vm::{
    CallToken, ContextId, Engine, Env, GrpcRequest, HttpState, Limits, LogLevel, Outcome, PluginConfig, PluginKind,
    Properties, Shared, StartError, Status, Trap, Vm, VmConfig, embedded,
};
use portolan_registry::write::{PageId, Writer};
use prost::Message;
use std::borrow::Cow;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Most bytes of pages in one part of an update, as the controller sends them.
const PART: usize = 128 << 10;

/// The filter of this build, loaded once for all tests of a process.
pub fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| embedded::filter().expect("the filter loads"))
}

/// What the filter asked of its surroundings.
#[derive(Default)]
struct Record {
    logs: Vec<(LogLevel, String)>,
    stream: Option<CallToken>,
    opened: usize,
    sent: Vec<WatchRequest>,
    tick: Option<(ContextId, Duration)>,
}

struct Fake(Rc<RefCell<Record>>);

impl Env for Fake {
    fn log(&mut self, level: LogLevel, message: &[u8]) {
        self.0.borrow_mut().logs.push((level, String::from_utf8_lossy(message).into_owned()));
    }

    fn set_tick(&mut self, root: ContextId, period: Duration) {
        self.0.borrow_mut().tick = (!period.is_zero()).then_some((root, period));
    }

    fn property(&self, path: &[&[u8]]) -> Option<Cow<'_, [u8]>> {
        (path == [b"node".as_slice(), b"id"])
            .then_some(Cow::Borrowed(b"sidecar~10.0.0.9~app.default~default.svc.cluster.local"))
    }

    fn open_grpc_stream(&mut self, token: CallToken, _: GrpcRequest) -> Result<(), Status> {
        let mut record = self.0.borrow_mut();
        record.stream = Some(token);
        record.opened += 1;
        Ok(())
    }

    fn send_grpc(&mut self, token: CallToken, message: Bytes, _: bool) -> Result<(), Status> {
        let mut record = self.0.borrow_mut();
        if record.stream != Some(token) {
            return Err(Status::NotFound);
        }
        record.sent.push(WatchRequest::decode(message).map_err(|_| Status::ParseFailure)?);
        Ok(())
    }

    fn cancel_call(&mut self, token: CallToken) {
        let mut record = self.0.borrow_mut();
        if record.stream == Some(token) {
            record.stream = None;
        }
    }
}

/// Attributes of a connection, by Envoy's names.
#[derive(Debug, Default)]
pub struct Connection {
    /// `destination.address`
    pub destination: String,
    /// `connection.requested_server_name`
    pub sni: Vec<u8>,
    /// Came to the HTTP proxy port.
    pub proxy: bool,
}

impl Properties for Connection {
    fn get(&self, path: &[&[u8]]) -> Option<Cow<'_, [u8]>> {
        let value = match path {
            [b"destination", b"address"] => self.destination.as_bytes(),
            [b"connection", b"requested_server_name"] => &self.sni,
            [b"xds", b"filter_chain_name"] if self.proxy => b"http_proxy",
            _ => return None,
        };
        Some(Cow::Borrowed(value))
    }
}

/// What the filter decided about a request.
#[derive(Debug)]
pub enum HttpDecision {
    /// Let it go to this cluster, with these headers.
    Route {
        /// The value of `x-portolan-cluster`.
        cluster: String,
        /// Headers that go on.
        headers: HeaderMap,
    },
    /// Answered in place of the upstream.
    Deny {
        /// HTTP status.
        status: StatusCode,
        /// Response code details.
        details: String,
        /// Body.
        body: String,
    },
}

/// What the filter decided about a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TcpDecision {
    /// Let it go to this cluster.
    Route(String),
    /// Closed.
    Close,
}

/// What runs, and how it is configured.
struct Plugins {
    engine: Engine,
    configuration: &'static str,
}

/// One instance of the filter, as a thread of the proxy has it.
pub struct Filter {
    plugins: Plugins,
    vm: Vm,
    record: Rc<RefCell<Record>>,
    shared: Arc<Shared>,
    limits: Limits,
}

impl Default for Filter {
    fn default() -> Self {
        Self::start(Limits::default())
    }
}

impl Filter {
    /// Starts the filter; it opens its registry stream.
    pub fn start(limits: Limits) -> Self {
        Self::of(engine().clone(), limits, "")
    }

    /// Starts a module, the filter or another in its place, with this configuration of the plugins.
    pub fn of(engine: Engine, limits: Limits, configuration: &'static str) -> Self {
        let (shared, record) = (Arc::default(), Rc::default());
        let plugins = Plugins { engine, configuration };
        let vm = start_vm(&plugins, &shared, &record, limits).expect("the filter starts");
        Self { plugins, vm, record, shared, limits }
    }

    /// A fresh instance in place of this one, as after a trap. It holds no snapshot.
    pub fn restart(&mut self, limits: Limits) {
        self.limits = limits;
        *self.record.borrow_mut() = Record::default();
        self.vm = start_vm(&self.plugins, &self.shared, &self.record, limits).expect("the filter starts");
    }

    /// Whether a callback has trapped.
    pub fn is_dead(&self) -> bool {
        self.vm.is_dead()
    }

    /// Streams the filter has not let go of.
    pub fn streams(&self) -> usize {
        self.vm.streams()
    }

    /// Decides a request with these headers, pseudo headers among them, that was captured on its way to `destination`.
    ///
    /// # Errors
    /// When the filter traps.
    pub fn decide_http(&mut self, headers: &[(&str, &[u8])], destination: SocketAddr) -> Result<HttpDecision, Trap> {
        self.http(headers, destination, false)
    }

    /// Decides a request that came to the HTTP proxy port.
    ///
    /// # Errors
    /// When the filter traps.
    pub fn decide_proxy(&mut self, headers: &[(&str, &[u8])]) -> Result<HttpDecision, Trap> {
        self.http(headers, SocketAddr::from(([127, 0, 0, 1], 15080)), true)
    }

    /// What a request without a body comes to, and what the filter made of it.
    ///
    /// # Errors
    /// When the filter traps.
    pub fn request(&mut self, state: HttpState, properties: Rc<dyn Properties>) -> Result<(Outcome, HttpState), Trap> {
        let root = self.vm.root("portolan_http").expect("the HTTP root");
        let context = self.vm.create_http(root, state, properties)?;
        let outcome = self.vm.on_request_headers(context, true)?;
        let state = std::mem::take(self.vm.http(context).expect("the stream is there until it is finished"));
        self.vm.finish(context)?;
        Ok((outcome, state))
    }

    fn http(&mut self, headers: &[(&str, &[u8])], to: SocketAddr, proxy: bool) -> Result<HttpDecision, Trap> {
        let properties = Connection { destination: to.to_string(), sni: Vec::new(), proxy };
        let (outcome, state) = self.request(http_state(headers), Rc::new(properties))?;
        Ok(match outcome {
            Outcome::Continue => {
                let mut headers = state.request.headers;
                let cluster = headers.remove("x-portolan-cluster").expect("a request that goes on has a cluster");
                assert!(state.route_cleared, "the route has to be chosen again");
                HttpDecision::Route { cluster: cluster.to_str().expect("clusters are ASCII").to_owned(), headers }
            }
            Outcome::Respond(response) => HttpDecision::Deny {
                status: response.status,
                details: String::from_utf8_lossy(&response.details).into_owned(),
                body: String::from_utf8_lossy(&response.body).into_owned(),
            },
            outcome => panic!("the filter neither routes nor answers: {outcome:?}"),
        })
    }

    /// Decides a connection that is not HTTP.
    ///
    /// # Errors
    /// When the filter traps.
    pub fn decide_tcp(&mut self, destination: SocketAddr, sni: Option<&[u8]>) -> Result<TcpDecision, Trap> {
        let root = self.vm.root("portolan_tcp").expect("the TCP root");
        let sni = sni.unwrap_or_default().to_vec();
        let properties = Connection { destination: destination.to_string(), sni, proxy: false };
        let context = self.vm.create_network(root, Rc::new(properties))?;
        let outcome = self.vm.on_new_connection(context)?;
        let state = std::mem::take(self.vm.filter_state(context).expect("the stream is there until it is finished"));
        self.vm.finish(context)?;
        Ok(match outcome {
            Outcome::Continue => {
                let cluster = state.get("envoy.tcp_proxy.cluster").expect("a connection that goes on has a cluster");
                TcpDecision::Route(String::from_utf8_lossy(cluster).into_owned())
            }
            Outcome::Close(_) => TcpDecision::Close,
            outcome => panic!("the filter neither routes nor closes: {outcome:?}"),
        })
    }

    /// Gives the filter one message of the registry stream.
    ///
    /// # Errors
    /// When the filter traps.
    pub fn receive(&mut self, part: &WatchResponse) -> Result<(), Trap> {
        self.receive_bytes(part.encode_to_vec())
    }

    /// Gives the filter any bytes as a message of the registry stream.
    ///
    /// # Errors
    /// When the filter traps.
    pub fn receive_bytes(&mut self, message: Vec<u8>) -> Result<(), Trap> {
        let token = self.record.borrow().stream.expect("the stream is open");
        self.vm.on_grpc_receive(token, message.into())
    }

    /// Sends the whole snapshot, and expects it to be acknowledged.
    ///
    /// # Errors
    /// When the filter traps.
    pub fn load(&mut self, version: u64, writer: &Writer) -> Result<(), Trap> {
        let pages: Vec<PageId> = writer.pages().map(|(id, _)| id).collect();
        for part in parts(version, writer, &pages, &[]) {
            self.receive(&part)?;
        }
        Ok(())
    }

    /// Ends the registry stream with this gRPC status.
    ///
    /// # Errors
    /// When the filter traps.
    pub fn close_stream(&mut self, code: u32) -> Result<(), Trap> {
        let token = self.record.borrow_mut().stream.take().expect("the stream is open");
        self.vm.on_grpc_close(token, code, Bytes::new())
    }

    /// Lets the timer fire until the filter has opened a stream, at most 10,000 times.
    ///
    /// # Errors
    /// When the filter traps.
    pub fn wait_for_stream(&mut self) -> Result<(), Trap> {
        for _ in 0..10_000 {
            if self.record.borrow().stream.is_some() {
                return Ok(());
            }
            self.tick()?;
        }
        panic!("the filter does not open its stream again");
    }

    /// Lets the timer fire once, if it is set.
    ///
    /// # Errors
    /// When the filter traps.
    pub fn tick(&mut self) -> Result<(), Trap> {
        let tick = self.record.borrow().tick;
        tick.map_or(Ok(()), |(root, _)| self.vm.on_tick(root))
    }

    /// What the filter has sent since the last time.
    pub fn sent(&self) -> Vec<Request> {
        let sent = std::mem::take(&mut self.record.borrow_mut().sent);
        sent.into_iter().filter_map(|request| request.message).collect()
    }

    /// The subscription that was just sent; it must be the only message.
    pub fn subscription(&self) -> Subscribe {
        match self.sent().as_slice() {
            [Request::Subscribe(subscribe)] => subscribe.clone(),
            sent => panic!("expected one subscription: {sent:?}"),
        }
    }

    /// What the filter has logged since the last time.
    pub fn logs(&self) -> Vec<(LogLevel, String)> {
        std::mem::take(&mut self.record.borrow_mut().logs)
    }

    /// What all instances share, metrics among them.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }
}

fn start_vm(
    plugins: &Plugins,
    shared: &Arc<Shared>,
    record: &Rc<RefCell<Record>>,
    limits: Limits,
) -> Result<Vm, StartError> {
    let plugin = |root_id: &str, kind| PluginConfig {
        name: root_id.to_owned(),
        root_id: root_id.to_owned(),
        configuration: Bytes::from_static(plugins.configuration.as_bytes()),
        kind,
    };
    let config = VmConfig {
        vm_id: "portolan".to_owned(),
        plugins: vec![plugin("portolan_http", PluginKind::Http), plugin("portolan_tcp", PluginKind::Network)],
        limits,
        shared: shared.clone(),
        ..VmConfig::default()
    };
    Vm::start(&plugins.engine, config, Box::new(Fake(record.clone())))
}

/// A request with these headers, pseudo headers among them; headers that no parser would let through are left out.
pub fn http_state(headers: &[(&str, &[u8])]) -> HttpState {
    let mut state = HttpState::default();
    let head = &mut state.request;
    head.path = Some(HeaderValue::from_static("/"));
    head.scheme = Some(HeaderValue::from_static("http"));
    for (name, value) in headers {
        let Ok(parsed) = HeaderValue::from_bytes(value) else { continue };
        match *name {
            ":authority" => head.authority = Some(parsed),
            ":path" => head.path = Some(parsed),
            ":scheme" => head.scheme = Some(parsed),
            ":method" => head.method = Method::from_bytes(value).unwrap_or_default(),
            name => {
                if let Ok(name) = HeaderName::from_bytes(name.as_bytes()) {
                    head.headers.append(name, parsed);
                }
            }
        }
    }
    state
}

/// The messages that carry these pages, as the controller cuts them.
pub fn parts(version: u64, writer: &Writer, pages: &[PageId], removed: &[PageId]) -> Vec<WatchResponse> {
    let mut parts = vec![WatchResponse { version, removed: removed.to_vec(), ..WatchResponse::default() }];
    let mut bytes = 0;
    for &id in pages {
        let data = writer.page(id).expect("the page is the writer's").to_vec();
        if bytes > 0 && bytes + data.len() > PART {
            parts.push(WatchResponse { version, ..WatchResponse::default() });
            bytes = 0;
        }
        bytes += data.len();
        let part = parts.last_mut().expect("there is always one");
        part.pages.push(Page { id, data });
    }
    let last = parts.last_mut().expect("there is always one");
    (last.last, last.digest) = (true, writer.digest());
    parts
}
