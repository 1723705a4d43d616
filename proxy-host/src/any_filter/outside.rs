//! What a filter's VM asks of its surroundings: its log, its timers, its calls.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::HashMap,
    rc::{Rc, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use portolan_proto::envoy::envoy::config::core::v3::{GrpcService, grpc_service::TargetSpecifier};
use prost::Message as _;
use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
};

use super::{
    calls::{self, GrpcTarget},
    client::{Cluster, Clusters},
    host::Host,
};
use crate::vm::{CallToken, ContextId, Env, GrpcRequest, HttpCall, LogLevel, Status, Trap, Vm};

/// What this proxy calls itself as a node.
const NODE: &str = "proxy-host";

/// Calls and timers of one thread's VM, whichever VM that is.
pub struct Outside {
    clusters: Rc<Clusters>,
    log_level: watch::Receiver<LogLevel>,
    begun: Instant,
    ticks: RefCell<HashMap<ContextId, AbortHandle>>,
    calls: RefCell<HashMap<CallToken, Call>>,
}

struct Call {
    task: AbortHandle,
    /// The guest's side of a gRPC stream; `None` once it is closed, and for calls.
    messages: Option<mpsc::UnboundedSender<Bytes>>,
}

impl Outside {
    /// Calls go to these clusters.
    #[must_use]
    pub fn new(clusters: Rc<Clusters>, log_level: watch::Receiver<LogLevel>) -> Self {
        Self { clusters, log_level, begun: Instant::now(), ticks: RefCell::default(), calls: RefCell::default() }
    }

    /// Ends all that an earlier VM had under way.
    pub fn clear(&self) {
        for (_, call) in self.calls.take() {
            call.task.abort();
        }
        for (_, tick) in self.ticks.take() {
            tick.abort();
        }
    }
}

/// The surroundings of one VM.
pub struct HostEnv {
    host: Weak<Host>,
    generation: u64,
    outside: Rc<Outside>,
}

/// The way of an answer back into the VM that asked.
pub struct Asker {
    host: Weak<Host>,
    generation: u64,
    outside: Rc<Outside>,
    /// The call.
    pub token: CallToken,
}

impl Asker {
    /// Tells the VM; `false` where it is gone.
    pub fn tell(&self, event: impl FnOnce(&mut Vm) -> Result<(), Trap>) -> bool {
        self.host.upgrade().is_some_and(|host| host.with(Some(self.generation), event).is_ok())
    }

    /// The call has ended; to be said before the VM is told, which may make the next one.
    pub fn ended(&self) {
        self.outside.calls.borrow_mut().remove(&self.token);
    }
}

impl HostEnv {
    /// For the VM of this generation.
    #[must_use]
    pub fn new(host: Weak<Host>, generation: u64, outside: Rc<Outside>) -> Self {
        Self { host, generation, outside }
    }

    fn asker(&self, token: CallToken) -> Asker {
        Asker { host: self.host.clone(), generation: self.generation, outside: self.outside.clone(), token }
    }

    fn cluster(&self, name: &[u8]) -> Option<Rc<Cluster>> {
        std::str::from_utf8(name).ok().and_then(|name| self.outside.clusters.get(name))
    }

    /// An upstream as gRPC calls name it: a serialized `GrpcService`, or just a cluster.
    fn target(&self, request: GrpcRequest) -> Result<GrpcTarget, Status> {
        let GrpcRequest { upstream, service, method, initial_metadata } = request;
        let path = format!("/{service}/{method}");
        let of = |cluster: Rc<Cluster>, authority: String, own: Vec<(Bytes, Bytes)>| {
            let metadata = own.into_iter().chain(initial_metadata).collect();
            GrpcTarget {
                authority: if authority.is_empty() { cluster.name.clone() } else { authority },
                cluster,
                path,
                metadata,
            }
        };
        let parsed = GrpcService::decode(upstream.clone()).ok();
        match parsed.as_ref().and_then(|service| service.target_specifier.as_ref()) {
            Some(TargetSpecifier::EnvoyGrpc(envoy)) => {
                // As Envoy: the cluster is looked for when the call is made, and that is a failure of the call.
                let cluster = self.cluster(envoy.cluster_name.as_bytes()).ok_or(Status::InternalFailure)?;
                let own = parsed.iter().flat_map(|service| &service.initial_metadata);
                let own = own.map(|header| (header.key.clone().into(), header.value.clone().into())).collect();
                Ok(of(cluster, envoy.authority.clone(), own))
            }
            Some(_) => Err(Status::InternalFailure),
            None => Ok(of(self.cluster(&upstream).ok_or(Status::ParseFailure)?, String::new(), Vec::new())),
        }
    }

    fn start(
        &self,
        token: CallToken,
        messages: Option<mpsc::UnboundedSender<Bytes>>,
        call: impl Future<Output = ()> + 'static,
    ) {
        let task = tokio::task::spawn_local(call).abort_handle();
        self.outside.calls.borrow_mut().insert(token, Call { task, messages });
    }
}

impl Env for HostEnv {
    fn log(&mut self, level: LogLevel, message: &[u8]) {
        if level < *self.outside.log_level.borrow() {
            return;
        }
        let text = String::from_utf8_lossy(message);
        match level {
            LogLevel::Trace => tracing::trace!(target: "filter", "{text}"),
            LogLevel::Debug => tracing::debug!(target: "filter", "{text}"),
            LogLevel::Info => tracing::info!(target: "filter", "{text}"),
            LogLevel::Warn => tracing::warn!(target: "filter", "{text}"),
            LogLevel::Error | LogLevel::Critical => tracing::error!(target: "filter", "{text}"),
        }
    }

    fn log_level(&self) -> LogLevel {
        *self.outside.log_level.borrow()
    }

    fn monotonic(&self) -> u64 {
        u64::try_from(self.outside.begun.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn set_tick(&mut self, root: ContextId, period: Duration) {
        if let Some(before) = self.outside.ticks.borrow_mut().remove(&root) {
            before.abort();
        }
        if period.is_zero() {
            return;
        }
        let (host, generation) = (self.host.clone(), self.generation);
        let task = tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(period).await;
                let Some(host) = host.upgrade() else { return };
                if host.with(Some(generation), |vm| vm.on_tick(root)).is_err() {
                    return;
                }
            }
        });
        self.outside.ticks.borrow_mut().insert(root, task.abort_handle());
    }

    fn property(&self, path: &[&[u8]]) -> Option<Cow<'_, [u8]>> {
        match path {
            // Not under `node`: Envoy 1.40 has it under `xds` only.
            [b"xds", b"node", b"id" | b"cluster"] => Some(Cow::Borrowed(NODE.as_bytes())),
            _ => None,
        }
    }

    fn http_call(&mut self, token: CallToken, call: HttpCall) -> Result<(), Status> {
        let cluster = self.cluster(&call.upstream).ok_or(Status::BadArgument)?;
        self.start(token, None, calls::http(self.asker(token), cluster, call));
        Ok(())
    }

    fn grpc_call(
        &mut self,
        token: CallToken,
        request: GrpcRequest,
        message: Bytes,
        timeout: Duration,
    ) -> Result<(), Status> {
        let target = self.target(request)?;
        self.start(token, None, calls::grpc(self.asker(token), target, message, timeout));
        Ok(())
    }

    fn open_grpc_stream(&mut self, token: CallToken, request: GrpcRequest) -> Result<(), Status> {
        let target = self.target(request)?;
        let (messages, outgoing) = mpsc::unbounded_channel();
        self.start(token, Some(messages), calls::grpc_stream(self.asker(token), target, outgoing));
        Ok(())
    }

    fn send_grpc(&mut self, token: CallToken, message: Bytes, end_of_stream: bool) -> Result<(), Status> {
        let mut calls = self.outside.calls.borrow_mut();
        let call = calls.get_mut(&token).ok_or(Status::NotFound)?;
        if let Some(messages) = &call.messages {
            // Where the stream has just ended, the guest is about to hear of it.
            let _ = messages.send(message);
        }
        if end_of_stream {
            call.messages = None;
        }
        Ok(())
    }

    fn close_grpc(&mut self, token: CallToken) {
        if let Some(call) = self.outside.calls.borrow_mut().get_mut(&token) {
            call.messages = None;
        }
    }

    fn cancel_call(&mut self, token: CallToken) {
        if let Some(call) = self.outside.calls.borrow_mut().remove(&token) {
            call.task.abort();
        }
    }
}
