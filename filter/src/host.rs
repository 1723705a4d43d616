//! What the filter asks of its host. Every call may fail; none panics.

#[cfg(target_arch = "wasm32")]
mod abi;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod pairs;

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

/// What the host is to do after a callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Action {
    /// Go on with the next filter.
    Continue = 0,
    /// Stop here: the request has been answered, or the connection closed.
    Pause = 1,
}

/// Level of a log line, numbered as in the ABI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Level {
    /// Every decision that lets something through.
    Debug = 1,
    /// Refusals and updates.
    Info = 2,
    /// The registry stream is lost.
    Warn = 3,
    /// A configuration or an update that cannot be used.
    Error = 4,
    /// A panic, which is always a bug.
    Critical = 5,
}

/// Kind of a metric, numbered as in the ABI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MetricKind {
    /// Rises only.
    Counter = 0,
    /// Is set.
    Gauge = 1,
}

/// A status other than OK, as the host gave it; it need not be one that the ABI knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u32);

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("not found"),
            2 => f.write_str("bad argument"),
            3 => f.write_str("serialization failure"),
            4 => f.write_str("parse failure"),
            6 => f.write_str("invalid memory access"),
            7 => f.write_str("empty"),
            8 => f.write_str("compare-and-swap mismatch"),
            10 => f.write_str("internal failure"),
            12 => f.write_str("unimplemented"),
            n => write!(f, "status {n}"),
        }
    }
}

/// Result of a host call.
pub type Result<T = ()> = std::result::Result<T, Status>;

/// An answer to a request in place of the upstream's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Why, in one word.
    pub details: &'static str,
    /// Body.
    pub body: Vec<u8>,
    /// Headers.
    pub headers: Vec<(String, Vec<u8>)>,
    /// Status for a gRPC request.
    pub grpc: Option<u32>,
}

impl Answer {
    /// An answer in plain text.
    pub fn new(status: u16, details: &'static str, body: Vec<u8>) -> Self {
        let text = (!body.is_empty()).then(|| ("content-type".to_owned(), b"text/plain".to_vec()));
        Answer { status, details, body, headers: text.into_iter().collect(), grpc: None }
    }
}

/// The host calls that the filter uses (proxy-wasm 0.2.1). What the host says reaches the caller as it is: bytes are
/// bytes, and an unknown status is an error like any other.
pub trait Host {
    /// Writes a log line; a host that cannot is not told twice.
    fn log(&self, level: Level, message: &str);
    /// The least level that the host writes, as the ABI numbers it.
    fn log_level(&self) -> Result<u32>;
    /// Time since the Unix epoch.
    fn now(&self) -> Result<Duration>;
    /// Asks for a tick in each period, in milliseconds, or for none (0).
    fn set_tick(&self, period: u32) -> Result;
    /// Makes the calls that follow calls of this context.
    fn set_context(&self, context: u32) -> Result;
    /// The value at a path, its parts joined by NUL. A failure means that there is none.
    fn property(&self, path: &str) -> Option<Vec<u8>>;
    /// Sets a property of the stream; Envoy keeps it as the filter state `wasm.NAME`.
    fn set_property(&self, name: &str, value: &[u8]) -> Result;
    /// The configuration of the plugin that is being configured.
    fn plugin_configuration(&self) -> Result<Vec<u8>>;

    /// Headers of the request, as [`pairs::Pairs`] reads them.
    fn request_headers(&self) -> Result<Vec<u8>>;
    /// Sets a header in place of any of its name.
    fn replace_request_header(&self, name: &str, value: &[u8]) -> Result;
    /// Adds a header beside any of its name.
    fn add_request_header(&self, name: &str, value: &[u8]) -> Result;
    /// Removes a header.
    fn remove_request_header(&self, name: &[u8]) -> Result;
    /// Answers the request with plain text.
    fn local_response(&self, status: u16, details: &str, body: &str) -> Result;
    /// Answers the request.
    fn answer(&self, answer: &Answer) -> Result;
    /// Sets a header of the response in place of any of its name.
    fn replace_response_header(&self, name: &str, value: &[u8]) -> Result;
    /// Adds a header to the response.
    fn add_response_header(&self, name: &str, value: &[u8]) -> Result;
    /// Removes a header of the response.
    fn remove_response_header(&self, name: &str) -> Result;
    /// Resets the request.
    fn reset_request(&self) -> Result;
    /// Closes the client's connection.
    fn close_downstream(&self) -> Result;
    /// Calls a function that only this kind of host has.
    fn foreign(&self, function: &str, arguments: &[u8]) -> Result;

    /// Opens `portolan.v1.Registry/Watch`; `service` is an Envoy `GrpcService`. Gives the stream's token.
    fn open_stream(&self, service: &[u8]) -> Result<u32>;
    /// Sends a message.
    fn send(&self, token: u32, message: &[u8]) -> Result;
    /// Resets the stream; nothing more is heard of it.
    fn cancel(&self, token: u32) -> Result;
    /// The message that has just been received.
    fn stream_message(&self) -> Result<Vec<u8>>;

    /// Defines a metric, or finds the one of this name.
    fn define_metric(&self, kind: MetricKind, name: &str) -> Result<u32>;
    /// Adds to a counter.
    fn increment_metric(&self, id: u32, by: i64) -> Result;
    /// Sets a gauge.
    fn record_metric(&self, id: u32, value: u64) -> Result;
}

/// The property that says why a request or connection was decided as it was: the rule, the entry that won, and those
/// that lost. An access log of Envoy's shows it as `%FILTER_STATE(wasm.portolan.decision:PLAIN)%`.
pub const DECISION: &str = "portolan.decision";

/// Where the connection goes: its original destination if it was captured, the local address otherwise.
pub fn destination(host: &impl Host) -> Option<SocketAddr> {
    address(&host.property("destination\0address")?)
}

/// An address and port as hosts write them.
pub(crate) fn address(bytes: &[u8]) -> Option<SocketAddr> {
    let address: SocketAddr = std::str::from_utf8(bytes).ok()?.parse().ok()?;
    // A dual-stack socket shows IPv4 as ::ffff:1.2.3.4.
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// Bytes of a client as they may stand in a log line or an answer.
pub fn printable(bytes: &[u8]) -> String {
    let shown = bytes.iter().take(portolan_registry::name::MAX_NAME);
    shown.map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '?' }).collect()
}
