//! State of one HTTP stream or TCP connection while the guest may look at it, and what the guest asks for.

use super::abi::{MapType, Status, StreamType};
use super::env::{ContextId, Properties};
use super::stored::{Declarations, Stored};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use std::rc::Rc;

/// Head of a request; the pseudo headers stand beside the header map.
#[derive(Clone, Debug, Default)]
pub struct RequestHead {
    /// `:method`
    pub method: Method,
    /// `:scheme`
    pub scheme: Option<HeaderValue>,
    /// `:authority`, taken from `Host` under HTTP/1.1
    pub authority: Option<HeaderValue>,
    /// `:path` with its query
    pub path: Option<HeaderValue>,
    /// All other headers.
    pub headers: HeaderMap,
}

/// Head of a response.
#[derive(Clone, Debug, Default)]
pub struct ResponseHead {
    /// `:status`
    pub status: StatusCode,
    /// All other headers.
    pub headers: HeaderMap,
}

impl RequestHead {
    /// The pseudo headers, as far as there are any.
    pub(super) fn pseudo(&self) -> impl Iterator<Item = (&[u8], &[u8])> + Clone {
        [
            self.authority.as_ref().map(|value| (&b":authority"[..], value.as_bytes())),
            self.path.as_ref().map(|value| (&b":path"[..], value.as_bytes())),
            Some((&b":method"[..], self.method.as_str().as_bytes())),
            self.scheme.as_ref().map(|value| (&b":scheme"[..], value.as_bytes())),
        ]
        .into_iter()
        .flatten()
    }
}

impl ResponseHead {
    /// The one pseudo header.
    pub(super) fn pseudo(&self) -> impl Iterator<Item = (&[u8], &[u8])> + Clone {
        std::iter::once((&b":status"[..], self.status.as_str().as_bytes()))
    }
}

/// One HTTP stream. The embedder moves each part in before its callback and takes it out when the callback said
/// [`Outcome::Continue`]; a part that stays in can be changed by the guest from other callbacks.
#[derive(Debug, Default)]
pub struct HttpState {
    /// Request headers.
    pub request: RequestHead,
    /// Bytes of the request body not forwarded yet.
    pub request_body: Bytes,
    /// Request trailers.
    pub request_trailers: HeaderMap,
    /// Response headers.
    pub response: ResponseHead,
    /// Bytes of the response body not forwarded yet.
    pub response_body: Bytes,
    /// Response trailers.
    pub response_trailers: HeaderMap,
    /// The guest called `clear_route_cache` or changed request headers: the route has to be chosen again from them.
    pub route_cleared: bool,
    /// Which of the maps the guest may reach now.
    pub shown: Shown,
}

/// The maps of an HTTP stream that the guest may reach. All of them, unless the embedder keeps to Envoy's rule: each from
/// its own callback until it goes on, and all of them, only to be read, while the stream is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown(u8);

impl Default for Shown {
    fn default() -> Self {
        Self(0b1111)
    }
}

impl Shown {
    const READ_ONLY: u8 = 1 << 7;

    /// None of them.
    pub const NONE: Self = Self(0);

    fn bit(map: MapType) -> u8 {
        match map {
            MapType::RequestHeaders => 1,
            MapType::RequestTrailers => 2,
            MapType::ResponseHeaders => 4,
            MapType::ResponseTrailers => 8,
            _ => 0,
        }
    }

    /// Lets the guest reach a map, or not any more.
    pub fn set(&mut self, map: MapType, shown: bool) {
        if shown { self.0 |= Self::bit(map) } else { self.0 &= !Self::bit(map) }
    }

    /// Whether the guest may read a map.
    pub fn reads(self, map: MapType) -> bool {
        self.0 & Self::bit(map) != 0
    }

    /// Whether the guest may change a map.
    pub(super) fn writes(self, map: MapType) -> bool {
        self.reads(map) && self.0 & Self::READ_ONLY == 0
    }

    pub(super) fn log(&mut self) {
        self.0 |= Self::READ_ONLY;
    }

    /// What is answered where a map is not shown: in the log callback that is no mistake of the guest's.
    pub(super) fn refusal(self) -> Status {
        if self.0 & Self::READ_ONLY == 0 { Status::BadArgument } else { Status::NotFound }
    }
}

/// One TCP connection; the embedder moves received bytes in and out as for [`HttpState`].
#[derive(Debug, Default)]
pub struct NetworkState {
    /// Bytes from the client not forwarded yet.
    pub downstream: Bytes,
    /// Bytes from the upstream not forwarded yet.
    pub upstream: Bytes,
}

/// Values the guest stored by the foreign function `set_envoy_filter_state`, for example `envoy.tcp_proxy.cluster`.
#[derive(Debug, Default)]
pub struct FilterState(Vec<(String, Bytes)>);

impl FilterState {
    /// The value stored under `key`.
    pub fn get(&self, key: &str) -> Option<&Bytes> {
        self.0.iter().find(|(have, _)| have == key).map(|(_, value)| value)
    }

    /// Stores `value` under `key`, in place of any other.
    pub fn set(&mut self, key: String, value: Bytes) {
        match self.0.iter_mut().find(|(have, _)| *have == key) {
            Some((_, have)) => *have = value,
            None => self.0.push((key, value)),
        }
    }

    /// All values, in order of their first setting.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Bytes)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }
}

/// A response that the guest wants sent in place of going on.
#[derive(Debug)]
pub struct LocalResponse {
    /// HTTP status.
    pub status: StatusCode,
    /// Why, for logs: the response code details.
    pub details: Bytes,
    /// Body; empty for none.
    pub body: Bytes,
    /// Headers to add.
    pub headers: HeaderMap,
    /// For gRPC requests.
    pub grpc_status: Option<u32>,
}

/// How a stream callback ended.
#[derive(Debug)]
#[must_use]
pub enum Outcome {
    /// Go on with what the callback saw.
    Continue,
    /// Keep it until an [`Effect`] for this context says how to go on.
    Pause,
    /// Send this to the client, and nothing to the upstream.
    Respond(Box<LocalResponse>),
    /// Close that side of the connection, or reset the HTTP stream.
    Close(StreamType),
}

/// Something the guest asked for outside a callback of the stream that it concerns.
#[derive(Debug)]
pub struct Effect {
    /// The stream.
    pub context: ContextId,
    /// What is to happen to it.
    pub kind: EffectKind,
}

/// See [`Effect`].
#[derive(Debug)]
pub enum EffectKind {
    /// Go on with a paused direction.
    Continue(StreamType),
    /// Send this to the client.
    Respond(Box<LocalResponse>),
    /// Close that side of the connection, or reset the HTTP stream.
    Close(StreamType),
}

/// What the VM holds for a stream context.
pub(super) struct Stream {
    pub(super) root: ContextId,
    pub(super) properties: Rc<dyn Properties>,
    /// Written by `proxy_set_property`, by the path as it came, and by `set_envoy_filter_state`.
    pub(super) stored: Stored,
    /// Declared in place of the root context's, to no effect, as in Envoy.
    pub(super) declared: Declarations,
    pub(super) kind: StreamKind,
    /// `proxy_on_done` said no: deleted once the guest calls `proxy_done`.
    pub(super) draining: bool,
}

pub(super) enum StreamKind {
    Http(HttpState),
    Network(NetworkState),
}

/// Builds a header map from the guest's pairs; pairs no header can hold are left out and counted in the second value.
pub(super) fn header_map<'a>(pairs: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> (HeaderMap, usize) {
    let mut map = HeaderMap::new();
    let mut refused = 0;
    for (name, value) in pairs {
        let appended = match (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            (Ok(name), Ok(value)) => map.try_append(name, value).is_ok(),
            _ => false,
        };
        refused += usize::from(!appended);
    }
    (map, refused)
}

/// Builds a request head from the guest's pairs.
pub(super) fn request_head(pairs: &[(&[u8], &[u8])]) -> Option<RequestHead> {
    let mut head = RequestHead::default();
    for &(name, value) in pairs {
        let parsed = HeaderValue::from_bytes(value).ok();
        match name {
            b":method" => head.method = Method::from_bytes(value).ok()?,
            b":path" => head.path = Some(parsed?),
            // As Envoy, which has one header for both.
            b":authority" | b"host" | b"Host" => head.authority = Some(parsed?),
            b":scheme" => head.scheme = Some(parsed?),
            _ => {
                head.headers.try_append(HeaderName::from_bytes(name).ok()?, parsed?).ok()?;
            }
        }
    }
    Some(head)
}
