//! Attributes of a stream by Envoy's names and in Envoy's encodings: strings as they are, numbers, times (nanoseconds
//! since the epoch) and durations (nanoseconds) as 8 bytes little-endian, booleans as one byte.

use std::{
    any::Any,
    borrow::Cow,
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use http::StatusCode;

use super::client::{Peers, flag_names};
use crate::{
    headers,
    listener::{
        guard::{Control, End},
        strict::Refusal,
    },
    stats::{Ending, Recorder},
    vm::{ConnectionState, Properties},
};

/// The cluster that `--upstream` is.
pub const UPSTREAM_CLUSTER: &str = "upstream";

/// Envoy's response flags `DC`, `DPE` and `DR`.
const DISCONNECTED: i64 = 0x4000;
/// The client's fault, and not that of what it asks.
pub const PROTOCOL_ERROR: i64 = 0x4_0000;
const RESET: i64 = 0x1000_0000;

/// A client's connection.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    /// Unique in this process.
    pub id: u64,
    /// The client.
    pub source: SocketAddr,
    /// The listener.
    pub destination: SocketAddr,
}

/// What is known of a stream: a connection, or a request on it.
pub struct Info {
    connection: Connection,
    /// `HTTP/1.1` or the like; `None` on a plain connection.
    protocol: Option<&'static str>,
    start: SystemTime,
    begun: Instant,
    /// Set when the stream is complete.
    duration: Cell<Option<Duration>>,
    /// What the request says of its body.
    pub content_length: Cell<Option<u64>>,
    /// Bytes of the request's body, and of it with its headers.
    pub request_size: Cell<(u64, u64)>,
    /// Bytes of the response's body, and of it with its headers.
    pub response_size: Cell<(u64, u64)>,
    /// Status sent to the client; 0 before there is one.
    pub code: Cell<u16>,
    /// Response code details; empty before there are any.
    pub details: RefCell<String>,
    /// Envoy's response flags as a bit set.
    pub flags: Cell<i64>,
    /// Time from the request's start to the response's.
    pub backend_latency: Cell<Option<Duration>>,
    /// gRPC status of the response.
    pub grpc_status: Cell<Option<i64>>,
    /// Name of the cluster; empty before it is known.
    pub cluster: RefCell<String>,
    /// The connection to the upstream.
    pub upstream: Cell<Option<Peers>>,
    /// Attempts to ask the upstream.
    pub attempts: Cell<u64>,
    /// Pieces that have moved so far, either way.
    pub moved: Cell<u64>,
    /// What a request came over; HTTP/2?
    client: Option<(Arc<Control>, bool)>,
    /// How the stream ends is not its client's doing.
    settled: Cell<bool>,
    held: Option<Rc<dyn Any>>,
    shared: Option<Rc<ConnectionState>>,
    recorder: Option<Rc<Recorder>>,
}

impl Info {
    /// Of a stream that begins now.
    #[must_use]
    pub fn new(connection: Connection, protocol: Option<&'static str>) -> Self {
        Self {
            connection,
            protocol,
            start: SystemTime::now(),
            begun: Instant::now(),
            duration: Cell::default(),
            content_length: Cell::default(),
            request_size: Cell::default(),
            response_size: Cell::default(),
            code: Cell::default(),
            details: RefCell::default(),
            flags: Cell::default(),
            backend_latency: Cell::default(),
            grpc_status: Cell::default(),
            // The one route leads there.
            cluster: RefCell::new(if protocol.is_some() { UPSTREAM_CLUSTER.to_owned() } else { String::new() }),
            upstream: Cell::default(),
            attempts: Cell::default(),
            moved: Cell::default(),
            client: None,
            settled: Cell::default(),
            held: None,
            shared: None,
            recorder: None,
        }
    }

    /// Keeps this for as long as the stream goes on.
    #[must_use]
    pub fn holding(mut self, held: Rc<dyn Any>) -> Self {
        self.held = Some(held);
        self
    }

    /// One of several streams that share this with their connection.
    #[must_use]
    pub fn sharing(mut self, shared: Rc<ConnectionState>) -> Self {
        self.shared = Some(shared);
        self
    }

    /// Counts how the stream ends.
    #[must_use]
    pub fn counted(mut self, recorder: Rc<Recorder>) -> Self {
        self.recorder = Some(recorder);
        self
    }

    /// Says what a request came over, and whether that is HTTP/2.
    #[must_use]
    pub fn over(mut self, control: Arc<Control>, http2: bool) -> Self {
        self.client = Some((control, http2));
        self
    }

    /// How the stream ends is known, and not its client's doing.
    pub fn settle(&self) {
        self.settled.set(true);
    }

    /// Adds one of Envoy's response flags.
    pub fn flag(&self, flag: i64) {
        self.flags.set(self.flags.get() | flag);
    }

    /// Why the client's body under way ended early, where that is its fault.
    #[must_use]
    pub fn broken(&self) -> Option<Refusal> {
        self.client.as_ref().and_then(|(control, _)| control.broken())
    }

    /// Whether the client has closed its connection.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.client.as_ref().is_some_and(|(control, _)| control.end() == End::Gone)
    }

    /// A stream that nobody else ended was ended by its client.
    fn left(&self) {
        let Some((control, http2)) = self.client.as_ref().filter(|_| !self.settled.get()) else { return };
        let (flag, details) = match control.end() {
            _ if let Some(refusal) = control.broken() => (PROTOCOL_ERROR, refusal.details),
            End::Gone => (DISCONNECTED, "downstream_remote_disconnect"),
            End::Broken => (PROTOCOL_ERROR, "codec_error"),
            End::Open if *http2 => (RESET, "http2.remote_reset"),
            End::Open | End::Stopped => return,
        };
        self.flag(flag);
        self.details.replace(details.to_owned());
    }

    /// Something has moved.
    pub fn touch(&self) {
        self.moved.set(self.moved.get() + 1);
    }

    /// The stream is complete.
    pub fn complete(&self) {
        if self.duration.get().is_none() {
            self.duration.set(Some(self.begun.elapsed()));
            self.left();
        }
    }

    /// Time since the stream began.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Counts bytes of the request's body.
    pub fn count_request(&self, bytes: usize) {
        self.touch();
        let (body, all) = self.request_size.get();
        self.request_size.set((body + bytes as u64, all + bytes as u64));
    }

    /// Counts bytes of the response's body.
    pub fn count_response(&self, bytes: usize) {
        self.touch();
        let (body, all) = self.response_size.get();
        self.response_size.set((body + bytes as u64, all + bytes as u64));
    }

    fn request(&self, name: &[u8]) -> Option<Cow<'_, [u8]>> {
        match name {
            b"time" => {
                let since = self.start.duration_since(UNIX_EPOCH).unwrap_or_default();
                number(since.as_nanos())
            }
            b"duration" => number(self.duration.get()?.as_nanos()),
            b"protocol" => text(self.protocol?),
            b"size" => number(self.content_length.get().unwrap_or(self.request_size.get().0).into()),
            b"total_size" => number(self.request_size.get().1.into()),
            _ => None,
        }
    }

    fn response(&self, name: &[u8]) -> Option<Cow<'_, [u8]>> {
        match name {
            b"code" if self.code.get() > 0 => number(self.code.get().into()),
            b"code_details" => some(self.details.borrow().as_bytes()),
            b"flags" => Some(Cow::Owned(self.flags.get().to_le_bytes().to_vec())),
            b"size" => number(self.response_size.get().0.into()),
            b"total_size" => number(self.response_size.get().1.into()),
            b"grpc_status" => {
                // As Envoy: where a response has none, its HTTP status stands for one.
                let of_code =
                    || StatusCode::from_u16(self.code.get()).ok().map(|code| headers::grpc_status(code).into());
                Some(Cow::Owned(self.grpc_status.get().or_else(of_code)?.to_le_bytes().to_vec()))
            }
            b"backend_latency" => number(self.backend_latency.get()?.as_nanos()),
            _ => None,
        }
    }

    fn of_upstream(&self, name: &[u8]) -> Option<Cow<'_, [u8]>> {
        match name {
            b"address" => Some(Cow::Owned(self.upstream.get()?.remote.to_string().into_bytes())),
            b"port" => number(self.upstream.get()?.remote.port().into()),
            b"local_address" => Some(Cow::Owned(self.upstream.get()?.local.to_string().into_bytes())),
            b"request_attempt_count" => number(self.attempts.get().into()),
            _ => None,
        }
    }

    fn xds(&self, name: &[u8]) -> Option<Cow<'_, [u8]>> {
        match name {
            b"cluster_name" => some(self.cluster.borrow().as_bytes()),
            b"route_name" | b"filter_chain_name" => text(""),
            b"virtual_host_name" => self.protocol.and_then(|_| text("upstream")),
            // Envoy's `TrafficDirection.UNSPECIFIED`.
            b"listener_direction" => number(0),
            _ => None,
        }
    }
}

fn text(text: &str) -> Option<Cow<'_, [u8]>> {
    Some(Cow::Borrowed(text.as_bytes()))
}

fn some(bytes: &[u8]) -> Option<Cow<'static, [u8]>> {
    (!bytes.is_empty()).then(|| Cow::Owned(bytes.to_vec()))
}

fn number(number: u128) -> Option<Cow<'static, [u8]>> {
    Some(Cow::Owned(u64::try_from(number).unwrap_or(u64::MAX).to_le_bytes().to_vec()))
}

impl Drop for Info {
    fn drop(&mut self) {
        let Some(recorder) = &self.recorder else { return };
        let flags = flag_names(self.flags.get());
        let ending = Ending { http: self.protocol.is_some(), code: self.code.get(), flags };
        let took = self.duration.get().unwrap_or_else(|| self.begun.elapsed());
        recorder.ended(ending, took, self.request_size.get().0, self.response_size.get().0);
    }
}

impl Properties for Info {
    fn get(&self, path: &[&[u8]]) -> Option<Cow<'_, [u8]>> {
        let Connection { id, source, destination } = self.connection;
        match path {
            [b"request", name] => self.request(name),
            [b"response", name] => self.response(name),
            [b"upstream", name] => self.of_upstream(name),
            [b"source", b"address"] => Some(Cow::Owned(source.to_string().into_bytes())),
            [b"source", b"port"] => number(source.port().into()),
            [b"destination", b"address"] => Some(Cow::Owned(destination.to_string().into_bytes())),
            [b"destination", b"port"] => number(destination.port().into()),
            [b"connection", b"id"] | [b"connection_id"] => number(id.into()),
            // No TLS on the way in.
            [b"connection", b"mtls"] => Some(Cow::Borrowed(&[0])),
            [b"xds", name] => self.xds(name),
            _ => None,
        }
    }

    fn connection(&self) -> Option<&ConnectionState> {
        self.shared.as_deref()
    }
}
