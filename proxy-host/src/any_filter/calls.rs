//! HTTP calls, gRPC calls and gRPC streams that a filter makes.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, TE},
};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::sync::mpsc;

use super::{
    body::Body,
    client::{self, Cluster, Failure},
    outside::Asker,
};
use crate::vm::{self, HttpCall, HttpCallResponse, Pairs, ResponseHead};

/// A gRPC message may be this large.
const LARGEST: usize = 64 << 20;
/// A response to an HTTP call may be this large.
const LARGEST_BODY: usize = 64 << 20;

/// gRPC's codes that are used here.
mod code {
    pub const OK: u32 = 0;
    pub const UNKNOWN: u32 = 2;
    pub const INTERNAL: u32 = 13;
    pub const UNAVAILABLE: u32 = 14;
}

/// Makes an HTTP call. As with Envoy's client, a failure of the connection is a response with 503, and a timeout one
/// with 504; none at all means that a response broke off.
pub async fn http(asker: Asker, cluster: Rc<Cluster>, call: HttpCall) {
    let timeout = call.timeout;
    let begun = Instant::now();
    let exchange = async {
        let answer = match http_request(call) {
            Some(request) => cluster.send(request, false).await,
            None => Err(Failure::Request),
        };
        match answer {
            Ok(answer) => {
                let (mut parts, body) = answer.response.into_parts();
                let millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                vm::join(&mut parts.headers, vm::once_in_response);
                parts.headers.insert("x-envoy-upstream-service-time", HeaderValue::from(millis));
                let (body, trailers) = collect(body).await?;
                answer.lease.finish();
                let head = ResponseHead { status: parts.status, headers: parts.headers };
                Some(HttpCallResponse { head, body, trailers })
            }
            Err(failure) => Some(local(&failure)),
        }
    };
    let response = if timeout.is_zero() {
        exchange.await
    } else {
        tokio::time::timeout(timeout, exchange).await.unwrap_or_else(|_| Some(local(&Failure::Timeout)))
    };
    asker.ended();
    asker.tell(|vm| vm.on_http_call_response(asker.token, response));
}

fn http_request(call: HttpCall) -> Option<Request<Body>> {
    let HttpCall { head, body, trailers, timeout, .. } = call;
    let method = head.method.clone();
    let mut request = Request::builder()
        .method(head.method)
        .uri(head.path.as_ref().map_or(&b"/"[..], HeaderValue::as_bytes))
        .body(Body::empty())
        .ok()?;
    *request.headers_mut() = head.headers;
    let headers = request.headers_mut();
    headers.insert(HOST, head.authority?);
    headers.insert("x-envoy-internal", HeaderValue::from_static("true"));
    if !timeout.is_zero() {
        let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        headers.insert("x-envoy-expected-rq-timeout-ms", HeaderValue::from(millis));
    }
    if !body.is_empty() {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    } else if client::tells_no_body(&method) && !headers.contains_key(CONTENT_LENGTH) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(0));
    }
    // HTTP/1.1 carries no trailers here, as in Envoy.
    drop(trailers);
    *request.body_mut() = Body::Whole(body);
    Some(request)
}

async fn collect(mut body: Incoming) -> Option<(Bytes, HeaderMap)> {
    let mut all = BytesMut::new();
    let mut trailers = HeaderMap::new();
    while let Some(frame) = body.frame().await {
        match frame.ok()?.into_data() {
            Ok(data) if all.len() + data.len() > LARGEST_BODY => return None,
            Ok(data) => all.extend_from_slice(&data),
            Err(frame) => trailers = frame.into_trailers().unwrap_or_default(),
        }
    }
    Some((all.freeze(), trailers))
}

fn local(failure: &Failure) -> HttpCallResponse {
    let body = Bytes::from(failure.to_string());
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    let status = StatusCode::from_u16(failure.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    HttpCallResponse { head: ResponseHead { status, headers }, body, trailers: HeaderMap::new() }
}

/// Where a gRPC call goes.
pub struct GrpcTarget {
    /// The cluster.
    pub cluster: Rc<Cluster>,
    /// `:authority`
    pub authority: String,
    /// `/package.Service/Method`
    pub path: String,
    /// Metadata to send first.
    pub metadata: Pairs,
}

/// How a gRPC exchange ended: code and message.
struct Ended(u32, Bytes);

impl GrpcTarget {
    fn request(&self, body: Body, timeout: Duration) -> Result<Request<Body>, Ended> {
        let uri = http::Uri::builder().scheme("http").authority(self.authority.as_str()).path_and_query(&*self.path);
        let uri = uri.build().map_err(|_| Ended(code::INTERNAL, Bytes::from_static(b"not a method's name")))?;
        let mut request = Request::new(body);
        *request.uri_mut() = uri;
        *request.method_mut() = http::Method::POST;
        let headers = request.headers_mut();
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("x-envoy-internal", HeaderValue::from_static("true"));
        if !timeout.is_zero() {
            let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            headers.insert("x-envoy-expected-rq-timeout-ms", HeaderValue::from(millis));
            let value = format!("{millis}m");
            headers.extend(HeaderValue::from_str(&value).ok().map(|v| (HeaderName::from_static("grpc-timeout"), v)));
        }
        for (name, value) in &self.metadata {
            if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
                headers.append(name, value);
            }
        }
        Ok(request)
    }

    /// Headers, body, and how it ended where it ended with its headers.
    async fn send(&self, body: Body, timeout: Duration) -> Result<(HeaderMap, Incoming, Option<Ended>), Ended> {
        let request = self.request(body, timeout)?;
        let answer = self.cluster.send(request, true).await.map_err(|failure| unavailable(&failure))?;
        let (parts, body) = answer.response.into_parts();
        if parts.status != StatusCode::OK {
            let text = Bytes::from(format!("HTTP status {}", parts.status.as_u16()));
            return Err(status(&parts.headers).unwrap_or(Ended(crate::headers::grpc_status(parts.status), text)));
        }
        // Only headers that are also the end can tell how the call ended.
        let ended = body.is_end_stream().then(|| status(&parts.headers)).flatten();
        Ok((parts.headers, body, ended))
    }
}

fn unavailable(failure: &Failure) -> Ended {
    Ended(code::UNAVAILABLE, Bytes::from(failure.to_string()))
}

/// `grpc-status` and `grpc-message`, where they are.
fn status(headers: &HeaderMap) -> Option<Ended> {
    let code = headers.get("grpc-status")?.to_str().ok()?.parse().unwrap_or(code::UNKNOWN);
    let message = headers.get("grpc-message").map_or(&b""[..], HeaderValue::as_bytes);
    Some(Ended(code, percent_decoded(message)))
}

fn percent_decoded(text: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let hex = (*first == b'%').then(|| after.first_chunk::<2>()).flatten();
        let byte = hex.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match byte {
            Some(byte) => {
                out.push(byte);
                rest = &after[2..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out.into()
}

fn framed(message: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(message.len() + 5);
    out.put_u8(0);
    out.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    out.extend_from_slice(message);
    out.freeze()
}

/// What comes of a gRPC response.
enum Event {
    Message(Bytes),
    Trailers(HeaderMap),
}

struct Messages {
    body: Incoming,
    read: BytesMut,
}

impl Messages {
    /// The next message or the trailers; may be dropped and called again.
    async fn next(&mut self) -> Result<Event, Ended> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Event::Message(message));
            }
            match self.body.frame().await {
                None => return Ok(Event::Trailers(HeaderMap::new())),
                Some(Err(_)) => {
                    return Err(Ended(code::UNAVAILABLE, Bytes::from_static(b"upstream connection termination")));
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.read.extend_from_slice(&data),
                    Err(frame) => return Ok(Event::Trailers(frame.into_trailers().unwrap_or_default())),
                },
            }
        }
    }

    fn take(&mut self) -> Result<Option<Bytes>, Ended> {
        let Some(&[compressed, a, b, c, d]) = self.read.first_chunk::<5>() else { return Ok(None) };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if compressed != 0 || length > LARGEST {
            return Err(Ended(code::INTERNAL, Bytes::from_static(b"a message that cannot be read")));
        }
        if self.read.len() < 5 + length {
            return Ok(None);
        }
        self.read.advance(5);
        Ok(Some(self.read.split_to(length).freeze()))
    }
}

/// Makes a unary gRPC call.
pub async fn grpc(asker: Asker, target: GrpcTarget, message: Bytes, timeout: Duration) {
    let exchange = async {
        // By a channel, so that no length is told, as Envoy tells none.
        let (sink, whole) = Body::channel();
        // There is room for one.
        let _ = sink.try_send(Ok(Frame::data(framed(&message))));
        drop(sink);
        let (_, body, only) = target.send(whole, timeout).await?;
        let mut messages = Messages { body, read: BytesMut::new() };
        let mut response = None;
        let trailers = loop {
            match messages.next().await? {
                Event::Message(message) => response = Some(message),
                Event::Trailers(trailers) => break trailers,
            }
        };
        let missing = || Ended(code::UNKNOWN, Bytes::new());
        match status(&trailers).or(only).unwrap_or_else(missing) {
            Ended(code::OK, _) => response.ok_or(Ended(code::INTERNAL, Bytes::new())),
            ended => Err(ended),
        }
    };
    let ended = if timeout.is_zero() {
        exchange.await
    } else {
        tokio::time::timeout(timeout, exchange).await.unwrap_or_else(|_| Err(unavailable(&Failure::Timeout)))
    };
    asker.ended();
    match ended {
        Ok(message) => asker.tell(|vm| vm.on_grpc_receive(asker.token, message)),
        Err(Ended(code, text)) => asker.tell(|vm| vm.on_grpc_close(asker.token, code, text)),
    };
}

/// Carries a gRPC stream.
pub async fn grpc_stream(asker: Asker, target: GrpcTarget, mut outgoing: mpsc::UnboundedReceiver<Bytes>) {
    let (sink, body) = Body::channel();
    let write = async move {
        while let Some(message) = outgoing.recv().await {
            if sink.send(Ok(Frame::data(framed(&message)))).await.is_err() {
                return;
            }
        }
    };
    let read = async {
        let (headers, body, only) = target.send(body, Duration::ZERO).await?;
        asker.tell(|vm| vm.on_grpc_receive_initial_metadata(asker.token, pairs(&headers)));
        let mut messages = Messages { body, read: BytesMut::new() };
        let trailers = loop {
            match messages.next().await? {
                Event::Message(message) => {
                    if !asker.tell(|vm| vm.on_grpc_receive(asker.token, message)) {
                        return Ok(Ended(code::OK, Bytes::new()));
                    }
                }
                Event::Trailers(trailers) => break trailers,
            }
        };
        asker.tell(|vm| vm.on_grpc_receive_trailing_metadata(asker.token, pairs(&trailers)));
        Ok(status(&trailers).or(only).unwrap_or(Ended(code::UNKNOWN, Bytes::new())))
    };
    let mut write = std::pin::pin!(write);
    let mut read = std::pin::pin!(read);
    let mut writing = true;
    let Ended(code, message) = loop {
        tokio::select! {
            () = write.as_mut(), if writing => writing = false,
            ended = read.as_mut() => break ended.unwrap_or_else(|ended| ended),
        }
    };
    asker.ended();
    asker.tell(|vm| vm.on_grpc_close(asker.token, code, message));
}

fn pairs(headers: &HeaderMap) -> Pairs {
    let own = |bytes: &[u8]| Bytes::copy_from_slice(bytes);
    headers.iter().map(|(name, value)| (own(name.as_str().as_bytes()), own(value.as_bytes()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_messages_are_percent_decoded() {
        assert_eq!(percent_decoded(b"50%25 %C3%A9%2"), "50% é%2".as_bytes());
    }

    #[test]
    fn a_message_has_its_length_before_it() {
        assert_eq!(framed(b"ab"), &b"\0\0\0\0\x02ab"[..]);
    }
}
