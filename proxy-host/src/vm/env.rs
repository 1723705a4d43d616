//! What a VM asks of its surroundings.

use super::abi::{LogLevel, Pairs, Status};
use super::stored::ConnectionState;
use super::stream::RequestHead;
use bytes::Bytes;
use http::HeaderMap;
use std::borrow::Cow;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A context of the VM: a root context (one per plugin) or a stream context.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContextId(pub(super) u32);

impl ContextId {
    /// The number the guest knows it by.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for ContextId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "context {}", self.0)
    }
}

/// An HTTP or gRPC call, or a gRPC stream, that the guest started; unique within its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallToken(pub(super) u32);

impl CallToken {
    /// The number the guest knows it by.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// A gRPC stream or call that the guest opens.
#[derive(Debug)]
pub struct GrpcRequest {
    /// The upstream: a serialized Envoy `GrpcService`, or a cluster's name.
    pub upstream: Bytes,
    /// Fully qualified service name.
    pub service: String,
    /// Method name.
    pub method: String,
    /// Metadata to send first.
    pub initial_metadata: Pairs,
}

/// An HTTP call that the guest makes.
#[derive(Debug)]
pub struct HttpCall {
    /// The upstream: a cluster's name, or a serialized Envoy `HttpUri`'s cluster.
    pub upstream: Bytes,
    /// Method, authority, path and headers.
    pub head: RequestHead,
    /// Whole body.
    pub body: Bytes,
    /// Trailers; empty for none.
    pub trailers: HeaderMap,
    /// How long to wait for the whole response.
    pub timeout: Duration,
}

/// The surroundings of one VM.
///
/// Its methods run inside a hostcall, so they may not call back into the VM: answers to calls are delivered later by
/// [`Vm::on_grpc_receive`](super::Vm::on_grpc_receive) and its siblings.
pub trait Env {
    /// Writes a line of the guest's log. The message may hold any bytes.
    fn log(&mut self, level: LogLevel, message: &[u8]);

    /// Lines below this level are not wanted.
    fn log_level(&self) -> LogLevel {
        LogLevel::Info
    }

    /// Wall clock, in nanoseconds since the epoch.
    fn now(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Monotonic clock, in nanoseconds since any fixed point.
    fn monotonic(&self) -> u64 {
        self.now()
    }

    /// Fills `out` with random bytes.
    ///
    /// # Errors
    /// [`Status::InternalFailure`] when the system has none.
    fn random(&mut self, out: &mut [u8]) -> Result<(), Status> {
        getrandom::fill(out).map_err(|_| Status::InternalFailure)
    }

    /// Calls `proxy_on_tick` of `root` every `period` from now on; zero stops it.
    fn set_tick(&mut self, root: ContextId, period: Duration) {
        let _ = (root, period);
    }

    /// A property that belongs to no stream, for example `node.id`.
    fn property(&self, path: &[&[u8]]) -> Option<Cow<'_, [u8]>> {
        let _ = path;
        None
    }

    /// Opens a bidirectional gRPC stream.
    ///
    /// # Errors
    /// [`Status::BadArgument`] for an upstream that does not exist or does not parse.
    fn open_grpc_stream(&mut self, token: CallToken, request: GrpcRequest) -> Result<(), Status> {
        let _ = (token, request);
        Err(Status::Unimplemented)
    }

    /// Sends a message on a stream, and half-closes it when `end_of_stream`.
    ///
    /// # Errors
    /// [`Status::NotFound`] for a stream that has ended.
    fn send_grpc(&mut self, token: CallToken, message: Bytes, end_of_stream: bool) -> Result<(), Status> {
        let _ = (token, message, end_of_stream);
        Err(Status::NotFound)
    }

    /// Half-closes a stream; the rest of its responses may still be delivered.
    fn close_grpc(&mut self, token: CallToken) {
        let _ = token;
    }

    /// Gives up a stream or call; nothing more of it is delivered.
    fn cancel_call(&mut self, token: CallToken) {
        let _ = token;
    }

    /// Makes a unary gRPC call.
    ///
    /// # Errors
    /// [`Status::BadArgument`] for an upstream that does not exist or does not parse.
    fn grpc_call(
        &mut self,
        token: CallToken,
        request: GrpcRequest,
        message: Bytes,
        timeout: Duration,
    ) -> Result<(), Status> {
        let _ = (token, request, message, timeout);
        Err(Status::Unimplemented)
    }

    /// Makes an HTTP call.
    ///
    /// # Errors
    /// [`Status::BadArgument`] for an upstream that does not exist.
    fn http_call(&mut self, token: CallToken, call: HttpCall) -> Result<(), Status> {
        let _ = (token, call);
        Err(Status::Unimplemented)
    }

    /// A foreign function that the ABI host itself does not know.
    ///
    /// # Errors
    /// [`Status::NotFound`] for an unknown name.
    fn foreign(&mut self, name: &str, arguments: &[u8]) -> Result<Vec<u8>, Status> {
        let _ = (name, arguments);
        Err(Status::NotFound)
    }
}

/// Attributes of one stream: Envoy's names split at the dots; strings as they are, integers as 8 bytes little-endian,
/// booleans as one byte.
pub trait Properties {
    /// The attribute at `path`, if the stream has it.
    fn get(&self, path: &[&[u8]]) -> Option<Cow<'_, [u8]>>;

    /// What streams of the same connection share; `None` where they share nothing.
    fn connection(&self) -> Option<&ConnectionState> {
        None
    }
}

/// A stream without attributes.
impl Properties for () {
    fn get(&self, _path: &[&[u8]]) -> Option<Cow<'_, [u8]>> {
        None
    }
}
