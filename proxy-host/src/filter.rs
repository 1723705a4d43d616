//! The filter as the data path sees it: one VM per worker, asked about each request and connection.
//!
//! A callback that does not return refuses what it was about, and the VM is replaced. Until the new one has its
//! snapshot, the filter itself answers 503; nothing is ever let through unasked.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::Arc,
    time::{Duration, Instant},
};

use ::http::HeaderValue;
use tokio::sync::oneshot;

use crate::{
    exec,
    filter_env::{Calls, HostEnv},
    vm::{
        ContextId, EffectKind, Engine, HttpState, LocalResponse, Outcome, Properties, RequestHead, ResponseHead, Trap,
        Vm, VmConfig,
    },
};

/// Root id of the plugin for requests.
pub const HTTP_ROOT: &str = "portolan_http";
/// Root id of the plugin for connections.
pub const TCP_ROOT: &str = "portolan_tcp";
/// The filter state that names a connection's cluster.
const TCP_CLUSTER: &str = "envoy.tcp_proxy.cluster";
/// Filter state by which requests are kept together.
const HASH: &str = "envoy.hashable_string";
/// The property in which the filter says why, if its configuration asks for it.
const DECISION: &[u8] = b"portolan.decision";
/// The property that names what is asked for in a tunnel.
const TUNNEL: &[u8] = b"portolan.tunnel";
/// The filter state that says that there is none.
const NO_TUNNEL: &str = "envoy.tcp_proxy.disable_tunneling";
/// A VM that traps sooner after its start than this is replaced only after this time.
const RESTART: Duration = Duration::from_secs(1);

/// What is known of a client's connection.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Unique in this process.
    pub id: u64,
    /// The client.
    pub source: SocketAddr,
    /// Where the client was going; on the HTTP proxy listener, the listener.
    pub destination: SocketAddr,
    /// How it came.
    pub via: Via,
    /// Server name of its `ClientHello`.
    pub server_name: Option<Vec<u8>>,
    /// What an upstream is told of the certificate that the client showed (`x-forwarded-client-cert`).
    pub client_certificate: Option<HeaderValue>,
}

/// How a connection came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Via {
    /// By the transparent listener.
    Captured,
    /// By an HTTP proxy listener.
    HttpProxy,
    /// By a socket of a Sidecar's egress listener.
    Egress,
    /// By a Unix socket or a forward proxy of a Sidecar's: the name of its chain.
    EgressSocket(Arc<str>),
    /// By a port of a gateway.
    Gateway {
        /// Name of the server's filter chain.
        chain: Arc<str>,
        /// In TLS that ends here.
        secure: bool,
    },
}

impl Connection {
    /// Where the client was going, if we know better than that it was to us.
    #[must_use]
    pub fn meant_for(&self) -> Option<SocketAddr> {
        (self.via == Via::Captured).then_some(self.destination)
    }

    /// Whether the client knows us as its forward proxy.
    #[must_use]
    pub fn is_proxied(&self) -> bool {
        matches!(self.via, Via::HttpProxy | Via::EgressSocket(_))
    }

    /// What stands before `://` in what the client asks for.
    #[must_use]
    pub fn scheme(&self) -> &'static str {
        if matches!(self.via, Via::Gateway { secure: true, .. }) { "https" } else { "http" }
    }
}

/// An address as text. Each request has one: by the formatter it would take twenty times as long.
fn address_text(address: SocketAddr) -> Vec<u8> {
    fn number(out: &mut Vec<u8>, number: u16) {
        for unit in [10_000, 1000, 100, 10, 1] {
            if number >= unit || unit == 1 {
                out.push(b"0123456789"[usize::from(number / unit % 10)]);
            }
        }
    }
    let SocketAddr::V4(address) = address else { return address.to_string().into_bytes() };
    let mut out = Vec::with_capacity("255.255.255.255:65535".len());
    for (index, octet) in address.ip().octets().into_iter().enumerate() {
        if index > 0 {
            out.push(b'.');
        }
        number(&mut out, octet.into());
    }
    out.push(b':');
    number(&mut out, address.port());
    out
}

impl Properties for Connection {
    fn get(&self, path: &[&[u8]]) -> Option<Cow<'_, [u8]>> {
        let number = |number: u64| Some(Cow::Owned(number.to_le_bytes().to_vec()));
        match path {
            [b"destination", b"address"] => Some(Cow::Owned(address_text(self.destination))),
            [b"destination", b"port"] => number(self.destination.port().into()),
            [b"source", b"address"] => Some(Cow::Owned(address_text(self.source))),
            [b"source", b"port"] => number(self.source.port().into()),
            [b"connection", b"id"] => number(self.id),
            [b"connection", b"requested_server_name"] => self.server_name.as_deref().map(Cow::Borrowed),
            [b"xds", b"filter_chain_name"] => Some(Cow::Borrowed(match &self.via {
                Via::Captured => b"captured",
                Via::HttpProxy => b"http_proxy",
                Via::Egress => b"egress",
                Via::EgressSocket(chain) => chain.as_bytes(),
                Via::Gateway { chain, .. } => chain.as_bytes(),
            })),
            _ => None,
        }
    }
}

/// What becomes of a request.
pub enum HttpVerdict {
    /// Route it by its headers, and keep it with others of this value.
    Continue(Option<bytes::Bytes>, Stream),
    /// Answer it with this; why, if the filter said.
    Respond(Box<LocalResponse>, Option<String>),
    /// End its stream.
    Reset,
    /// The filter did not return, or there is none right now.
    Failed,
}

/// What becomes of a connection.
pub enum TcpVerdict {
    /// It goes to the cluster of this name, which is to be asked for a tunnel to this host and port.
    Cluster(String, Option<String>, Stream),
    /// It is refused; why, if the filter said.
    Close(Option<String>),
}

/// A worker's filter.
#[derive(Clone)]
pub struct Filter(Rc<Inner>);

/// A stream context of the VM, ended when it is dropped.
pub struct Stream {
    filter: Rc<Inner>,
    generation: u64,
    context: ContextId,
}

impl Stream {
    /// Why the filter decided as it did, if it said.
    #[must_use]
    pub fn decision(&self) -> Option<String> {
        let value = self.filter.with(Some(self.generation), |vm| Ok(vm.own_property(self.context, DECISION)));
        value.ok().flatten().map(|value| String::from_utf8_lossy(&value).into_owned())
    }

    /// Shows the filter the response's headers, which it may change.
    ///
    /// # Errors
    /// What to send in place of the response; `None` for a reset.
    pub async fn response(&self, head: &mut ResponseHead, end: bool) -> Result<(), Option<Box<LocalResponse>>> {
        let context = self.context;
        let outcome = self.filter.with(Some(self.generation), |vm| {
            if let Some(http) = vm.http(context) {
                http.response = std::mem::take(head);
            }
            vm.on_response_headers(context, end)
        });
        let Ok(outcome) = outcome else { return Err(None) };
        match self.filter.settle(self.generation, context, outcome).await {
            Some(EffectKind::Continue(_)) => {
                let take = |vm: &mut Vm| Ok(vm.http(context).map(|http| *head = std::mem::take(&mut http.response)));
                self.filter.with(Some(self.generation), take).ok().flatten().ok_or(None)
            }
            Some(EffectKind::Respond(response)) => Err(Some(response)),
            Some(EffectKind::Close(_)) | None => Err(None),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A VM that is gone has no streams left to end.
        let _ = self.filter.with(Some(self.generation), |vm| vm.finish(self.context));
    }
}

/// The VM, and what is needed to start another one.
pub struct Inner {
    vm: RefCell<Option<Vm>>,
    /// Number of the VM; what was meant for an earlier one is dropped.
    generation: Cell<u64>,
    started: Cell<Instant>,
    traps: Cell<u64>,
    engine: Engine,
    config: VmConfig,
    calls: Rc<Calls>,
    paused: RefCell<HashMap<ContextId, oneshot::Sender<EffectKind>>>,
}

/// There is no VM, or it trapped.
#[derive(Debug)]
pub struct Unavailable;

impl Filter {
    /// Starts the first VM. Has to be called on the worker's thread, inside its `LocalSet`.
    ///
    /// # Errors
    /// The module or its configuration cannot be used.
    pub fn start(engine: Engine, config: VmConfig, calls: Rc<Calls>) -> Result<Self, crate::vm::StartError> {
        let inner = Rc::new(Inner {
            vm: RefCell::new(None),
            generation: Cell::new(0),
            started: Cell::new(Instant::now()),
            traps: Cell::new(0),
            engine,
            config,
            calls,
            paused: RefCell::default(),
        });
        inner.restart()?;
        Ok(Self(inner))
    }

    /// Callbacks that did not return since the start.
    #[must_use]
    pub fn traps(&self) -> u64 {
        self.0.traps.get()
    }

    /// Asks about a request, whose headers the filter may change; `end`: it has no body.
    pub async fn request(&self, connection: &Rc<Connection>, head: &mut RequestHead, end: bool) -> HttpVerdict {
        let inner = &self.0;
        let generation = inner.generation.get();
        let asked = inner.with(None, |vm| {
            let Some(root) = vm.root(HTTP_ROOT) else { return Ok(None) };
            let state = HttpState { request: std::mem::take(head), ..HttpState::default() };
            let context = vm.create_http(root, state, connection.clone())?;
            vm.on_request_headers(context, end).map(|outcome| Some((context, outcome)))
        });
        let Ok(Some((context, outcome))) = asked else { return HttpVerdict::Failed };
        let stream = Stream { filter: inner.clone(), generation, context };
        match inner.settle(generation, context, outcome).await {
            Some(EffectKind::Continue(_)) => {
                let take = |vm: &mut Vm| {
                    let hash = vm.filter_state(context).and_then(|state| state.get(HASH).cloned());
                    Ok(vm.http(context).map(|http| {
                        *head = std::mem::take(&mut http.request);
                        hash
                    }))
                };
                match inner.with(Some(generation), take) {
                    Ok(Some(hash)) => HttpVerdict::Continue(hash, stream),
                    _ => HttpVerdict::Failed,
                }
            }
            Some(EffectKind::Respond(response)) => HttpVerdict::Respond(response, stream.decision()),
            Some(EffectKind::Close(_)) => HttpVerdict::Reset,
            None => HttpVerdict::Failed,
        }
    }

    /// Asks about a connection.
    pub async fn connection(&self, connection: &Rc<Connection>) -> TcpVerdict {
        let inner = &self.0;
        let generation = inner.generation.get();
        let asked = inner.with(None, |vm| {
            let Some(root) = vm.root(TCP_ROOT) else { return Ok(None) };
            let context = vm.create_network(root, connection.clone())?;
            vm.on_new_connection(context).map(|outcome| Some((context, outcome)))
        });
        let Ok(Some((context, outcome))) = asked else { return TcpVerdict::Close(Some("filter failed".into())) };
        let stream = Stream { filter: inner.clone(), generation, context };
        let Some(EffectKind::Continue(_)) = inner.settle(generation, context, outcome).await else {
            return TcpVerdict::Close(stream.decision());
        };
        let said = |vm: &mut Vm| {
            let state = vm.filter_state(context);
            let cluster = state.as_ref().and_then(|state| state.get(TCP_CLUSTER).cloned());
            let tunnels = state.and_then(|state| state.get(NO_TUNNEL).cloned()).is_some_and(|off| *off == *b"false");
            Ok(cluster.map(|name| (name, if tunnels { vm.own_property(context, TUNNEL) } else { None })))
        };
        let text = |bytes: bytes::Bytes| String::from_utf8(bytes.to_vec());
        match inner.with(Some(generation), said).ok().flatten().map(|(name, to)| (text(name), to.map(text).transpose()))
        {
            Some((Ok(name), Ok(tunnel))) => TcpVerdict::Cluster(name, tunnel, stream),
            _ => TcpVerdict::Close(Some("the filter named no cluster".into())),
        }
    }
}

impl Inner {
    /// Uses the VM, of one generation where that matters; a trap replaces it.
    ///
    /// # Errors
    /// There is no such VM, or it trapped.
    pub fn with<R>(
        self: &Rc<Self>,
        generation: Option<u64>,
        use_it: impl FnOnce(&mut Vm) -> Result<R, Trap>,
    ) -> Result<R, Unavailable> {
        if generation.is_some_and(|generation| generation != self.generation.get()) {
            return Err(Unavailable);
        }
        let mut slot = self.vm.try_borrow_mut().map_err(|_| Unavailable)?;
        let vm = slot.as_mut().ok_or(Unavailable)?;
        let result = use_it(vm);
        while let Some(effect) = vm.next_effect() {
            if let Some(waiting) = self.paused.borrow_mut().remove(&effect.context) {
                // Whoever waited may have gone away.
                let _ = waiting.send(effect.kind);
            }
        }
        drop(slot);
        result.map_err(|trap| {
            self.trapped(&trap);
            Unavailable
        })
    }

    /// What a callback's outcome comes to, after a pause if need be; `None` where the VM is gone meanwhile.
    async fn settle(self: &Rc<Self>, generation: u64, context: ContextId, outcome: Outcome) -> Option<EffectKind> {
        match outcome {
            Outcome::Continue => Some(EffectKind::Continue(crate::vm::StreamType::Request)),
            Outcome::Respond(response) => Some(EffectKind::Respond(response)),
            Outcome::Close(side) => Some(EffectKind::Close(side)),
            Outcome::Pause if generation == self.generation.get() => {
                let (sender, effect) = oneshot::channel();
                self.paused.borrow_mut().insert(context, sender);
                effect.await.ok()
            }
            Outcome::Pause => None,
        }
    }

    fn trapped(self: &Rc<Self>, trap: &Trap) {
        self.traps.set(self.traps.get() + 1);
        tracing::error!("filter: {trap}; its VM is replaced");
        self.vm.borrow_mut().take();
        self.generation.set(self.generation.get() + 1);
        self.paused.borrow_mut().clear();
        self.calls.clear();
        if self.started.get().elapsed() >= RESTART {
            self.try_restart();
        } else {
            self.restart_later();
        }
    }

    fn try_restart(self: &Rc<Self>) {
        if let Err(error) = self.restart() {
            tracing::error!("filter does not start: {error}");
            self.restart_later();
        }
    }

    fn restart_later(self: &Rc<Self>) {
        let (weak, generation) = (Rc::downgrade(self), self.generation.get());
        exec::spawn(async move {
            tokio::time::sleep(RESTART).await;
            if let Some(inner) = weak.upgrade().filter(|inner| inner.generation.get() == generation) {
                inner.try_restart();
            }
        });
    }

    fn restart(self: &Rc<Self>) -> Result<(), crate::vm::StartError> {
        self.calls.clear();
        self.generation.set(self.generation.get() + 1);
        self.started.set(Instant::now());
        let env = HostEnv::new(self.weak(), self.generation.get(), self.calls.clone());
        let vm = Vm::start(&self.engine, self.config.clone(), Box::new(env))?;
        *self.vm.borrow_mut() = Some(vm);
        Ok(())
    }

    fn weak(self: &Rc<Self>) -> Weak<Self> {
        Rc::downgrade(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{PluginConfig, PluginKind};
    use tokio::{sync::mpsc, task::LocalSet};
    use tonic::transport::Endpoint;

    #[test]
    fn an_address_has_the_text_that_the_formatter_gives() {
        for text in ["0.0.0.0:0", "255.255.255.255:65535", "10.20.30.104:8080", "1.2.3.4:10000", "[2001:db8::1]:443"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(address_text(address), text.as_bytes());
        }
    }

    /// A filter that crashes in the two callbacks that decide.
    const CRASHES: &str = r#"(module
        (memory (export "memory") 1)
        (func (export "proxy_abi_version_0_2_1"))
        (func (export "proxy_on_memory_allocate") (param i32) (result i32) i32.const 1024)
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) unreachable)
        (func (export "proxy_on_new_connection") (param i32) (result i32) unreachable))"#;

    fn crashing() -> Filter {
        let engine = Engine::compile(&wat::parse_str(CRASHES).unwrap()).unwrap();
        let plugin = |root_id: &str, kind| PluginConfig {
            name: root_id.into(),
            root_id: root_id.into(),
            configuration: bytes::Bytes::new(),
            kind,
        };
        let plugins = vec![plugin(HTTP_ROOT, PluginKind::Http), plugin(TCP_ROOT, PluginKind::Network)];
        let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let calls = Rc::new(Calls::new(channel, 0, mpsc::unbounded_channel().0));
        Filter::start(engine, VmConfig { plugins, ..VmConfig::default() }, calls).unwrap()
    }

    fn connection() -> Rc<Connection> {
        let address = SocketAddr::from(([127, 0, 0, 1], 80));
        let via = Via::Captured;
        Rc::new(Connection {
            id: 1,
            source: address,
            destination: address,
            via,
            server_name: None,
            client_certificate: None,
        })
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn a_crash_refuses_what_it_was_about_and_the_vm_is_replaced() {
        let all = async {
            let filter = crashing();
            for crashes in 1..4 {
                let verdict = filter.request(&connection(), &mut RequestHead::default(), true).await;
                assert!(matches!(verdict, HttpVerdict::Failed));
                assert_eq!(filter.traps(), crashes);
                // In a crash loop there is no VM until the pause is over; then too nothing is let through.
                let verdict = filter.request(&connection(), &mut RequestHead::default(), true).await;
                assert!(matches!(verdict, HttpVerdict::Failed));
                assert_eq!(filter.traps(), crashes);
                tokio::time::sleep(RESTART * 2).await;
            }
            assert!(matches!(filter.connection(&connection()).await, TcpVerdict::Close(_)));
            assert_eq!(filter.traps(), 4);
        };
        LocalSet::new().run_until(all).await;
    }
}
