//! What the filter's VM asks of its surroundings: its log, its timers, and its stream to the registry.

use std::{
    cell::RefCell,
    collections::HashMap,
    rc::{Rc, Weak},
    str::FromStr as _,
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, Bytes};
use http::uri::PathAndQuery;
use portolan_proto::{
    envoy::envoy::config::core::v3::{GrpcService, grpc_service::TargetSpecifier},
    v1::{WatchRequest, watch_request},
};
use prost::Message as _;
use tokio::{sync::mpsc, task::AbortHandle};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{
    Code, Request,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    metadata::{KeyAndValueRef, MetadataKey, MetadataMap, MetadataValue},
    transport::Channel,
};

use crate::{
    filter::Inner,
    vm::{CallToken, ContextId, Env, GrpcRequest, LogLevel, Pairs, Status, Trap, Vm},
};

/// The cluster that stands for the controller.
pub const CONTROLLER_CLUSTER: &str = "portolan";
/// The registry stream's method; its first acknowledgement makes the worker ready.
const WATCH: &str = "/portolan.v1.Registry/Watch";
/// Messages of a stream may be this large.
const LARGEST: usize = 64 << 20;

/// Calls and timers of one worker's VM, whichever VM that is.
pub struct Calls {
    channel: Channel,
    worker: usize,
    streams: RefCell<HashMap<CallToken, Open>>,
    ticks: RefCell<HashMap<ContextId, AbortHandle>>,
    ready: mpsc::UnboundedSender<usize>,
}

struct Open {
    /// `None` once the guest has closed its side.
    messages: Option<mpsc::UnboundedSender<Bytes>>,
    task: AbortHandle,
    registry: bool,
}

impl Calls {
    /// Calls go over `channel`; `ready` is told the worker's number when its registry has been received.
    #[must_use]
    pub fn new(channel: Channel, worker: usize, ready: mpsc::UnboundedSender<usize>) -> Self {
        Self { channel, worker, streams: RefCell::default(), ticks: RefCell::default(), ready }
    }

    /// Ends all that an earlier VM had under way.
    pub fn clear(&self) {
        for (_, open) in self.streams.take() {
            open.task.abort();
        }
        for (_, tick) in self.ticks.take() {
            tick.abort();
        }
    }
}

/// The surroundings of one VM.
pub struct HostEnv {
    filter: Weak<Inner>,
    generation: u64,
    calls: Rc<Calls>,
}

impl HostEnv {
    /// For the VM of this generation.
    #[must_use]
    pub fn new(filter: Weak<Inner>, generation: u64, calls: Rc<Calls>) -> Self {
        Self { filter, generation, calls }
    }
}

impl Env for HostEnv {
    fn log(&mut self, level: LogLevel, message: &[u8]) {
        let text = String::from_utf8_lossy(message);
        let worker = self.calls.worker;
        match level {
            LogLevel::Trace => tracing::trace!(target: "filter", worker, "{text}"),
            LogLevel::Debug => tracing::debug!(target: "filter", worker, "{text}"),
            // One for each refusal, which the access log shows as well.
            LogLevel::Info => tracing::debug!(target: "filter", worker, "{text}"),
            LogLevel::Warn => tracing::warn!(target: "filter", worker, "{text}"),
            _ => tracing::error!(target: "filter", worker, "{text}"),
        }
    }

    fn log_level(&self) -> LogLevel {
        if tracing::enabled!(target: "filter", tracing::Level::TRACE) {
            LogLevel::Trace
        } else if tracing::enabled!(target: "filter", tracing::Level::DEBUG) {
            LogLevel::Debug
        } else {
            LogLevel::Info
        }
    }

    fn set_tick(&mut self, root: ContextId, period: Duration) {
        if let Some(before) = self.calls.ticks.borrow_mut().remove(&root) {
            before.abort();
        }
        if period.is_zero() {
            return;
        }
        let (filter, generation) = (self.filter.clone(), self.generation);
        let task = tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(period).await;
                let Some(filter) = filter.upgrade() else { return };
                if filter.with(Some(generation), |vm| vm.on_tick(root)).is_err() {
                    return;
                }
            }
        });
        self.calls.ticks.borrow_mut().insert(root, task.abort_handle());
    }

    fn open_grpc_stream(&mut self, token: CallToken, request: GrpcRequest) -> Result<(), Status> {
        if !is_controller(&request.upstream) {
            return Err(Status::BadArgument);
        }
        let text = format!("/{}/{}", request.service, request.method);
        let path = PathAndQuery::from_str(&text).map_err(|_| Status::BadArgument)?;
        let registry = text == WATCH;
        let (messages, outgoing) = mpsc::unbounded_channel();
        let guest =
            Guest { filter: self.filter.clone(), generation: self.generation, token, calls: self.calls.clone() };
        let metadata = metadata(&request.initial_metadata);
        let task = tokio::task::spawn_local(guest.serve(self.calls.channel.clone(), path, metadata, outgoing));
        let open = Open { messages: Some(messages), task: task.abort_handle(), registry };
        self.calls.streams.borrow_mut().insert(token, open);
        Ok(())
    }

    fn send_grpc(&mut self, token: CallToken, message: Bytes, end_of_stream: bool) -> Result<(), Status> {
        let mut streams = self.calls.streams.borrow_mut();
        let open = streams.get_mut(&token).ok_or(Status::NotFound)?;
        let messages = open.messages.as_ref().ok_or(Status::BadArgument)?;
        let acknowledges = open.registry
            && matches!(
                WatchRequest::decode(message.clone()),
                Ok(WatchRequest { message: Some(watch_request::Message::Ack(_)) })
            );
        messages.send(message).map_err(|_| Status::NotFound)?;
        if end_of_stream {
            open.messages = None;
        }
        if acknowledges {
            // After the first time nobody listens.
            let _ = self.calls.ready.send(self.calls.worker);
        }
        Ok(())
    }

    fn close_grpc(&mut self, token: CallToken) {
        if let Some(open) = self.calls.streams.borrow_mut().get_mut(&token) {
            open.messages = None;
        }
    }

    fn cancel_call(&mut self, token: CallToken) {
        if let Some(open) = self.calls.streams.borrow_mut().remove(&token) {
            open.task.abort();
        }
    }
}

/// Whether the upstream of a call is the controller: by a `GrpcService`, or by the cluster's bare name.
fn is_controller(upstream: &[u8]) -> bool {
    if upstream == CONTROLLER_CLUSTER.as_bytes() {
        return true;
    }
    match GrpcService::decode(upstream).ok().and_then(|service| service.target_specifier) {
        Some(TargetSpecifier::EnvoyGrpc(envoy)) => envoy.cluster_name == CONTROLLER_CLUSTER,
        _ => false,
    }
}

fn metadata(pairs: &Pairs) -> MetadataMap {
    let mut map = MetadataMap::new();
    for (name, value) in pairs {
        if let (Ok(name), Ok(value)) = (MetadataKey::from_bytes(name), MetadataValue::try_from(value.as_ref())) {
            map.append(name, value);
        }
    }
    map
}

fn pairs(metadata: &MetadataMap) -> Pairs {
    let pair = |entry| match entry {
        KeyAndValueRef::Ascii(name, value) => pair_of(name.as_str(), value.as_encoded_bytes()),
        KeyAndValueRef::Binary(name, value) => pair_of(name.as_str(), value.as_encoded_bytes()),
    };
    metadata.iter().map(pair).collect()
}

fn pair_of(name: &str, value: &[u8]) -> (Bytes, Bytes) {
    (Bytes::copy_from_slice(name.as_bytes()), Bytes::copy_from_slice(value))
}

/// The guest's end of a stream.
struct Guest {
    filter: Weak<Inner>,
    generation: u64,
    token: CallToken,
    calls: Rc<Calls>,
}

impl Guest {
    /// Tells the VM; `false` where it is gone.
    fn tell(&self, event: impl FnOnce(&mut Vm) -> Result<(), Trap>) -> bool {
        self.filter.upgrade().is_some_and(|filter| filter.with(Some(self.generation), event).is_ok())
    }

    async fn serve(
        self,
        channel: Channel,
        path: PathAndQuery,
        metadata: MetadataMap,
        outgoing: mpsc::UnboundedReceiver<Bytes>,
    ) {
        let (code, message) = match self.carry(channel, path, metadata, outgoing).await {
            Ok(()) => (Code::Ok, Bytes::new()),
            Err(status) => (status.code(), Bytes::copy_from_slice(status.message().as_bytes())),
        };
        self.calls.streams.borrow_mut().remove(&self.token);
        let code = u32::try_from(i32::from(code)).unwrap_or(2);
        self.tell(|vm| vm.on_grpc_close(self.token, code, message));
    }

    async fn carry(
        &self,
        channel: Channel,
        path: PathAndQuery,
        metadata: MetadataMap,
        outgoing: mpsc::UnboundedReceiver<Bytes>,
    ) -> Result<(), tonic::Status> {
        let mut client = tonic::client::Grpc::new(channel).max_decoding_message_size(LARGEST);
        client.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let mut request = Request::new(UnboundedReceiverStream::new(outgoing));
        *request.metadata_mut() = metadata;
        let response = client.streaming(request, path, Raw).await?;
        let (initial, mut messages, _) = response.into_parts();
        self.tell(|vm| vm.on_grpc_receive_initial_metadata(self.token, pairs(&initial)));
        while let Some(message) = messages.message().await? {
            if !self.tell(|vm| vm.on_grpc_receive(self.token, message)) {
                return Ok(());
            }
            // Requests get their turn between two parts of an update.
            tokio::task::yield_now().await;
        }
        let trailing = messages.trailers().await?.unwrap_or_default();
        self.tell(|vm| vm.on_grpc_receive_trailing_metadata(self.token, pairs(&trailing)));
        Ok(())
    }
}

/// Messages as the bytes that they are; the guest knows what they mean.
#[derive(Debug, Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }
    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = tonic::Status;

    fn encode(&mut self, item: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), tonic::Status> {
        into.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = tonic::Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, tonic::Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}
