//! Requests through a filter, in the order in which Envoy's filter manager calls it.
//!
//! ```text
//! request headers → request body, trailers ─→ upstream ─→ response headers → response body, trailers → log, done
//!        └─ a local response, from any of these ─────────────────↗ (directly to the client once there is a response)
//! ```
//! Headers that are paused hold everything behind them back. A body that is paused is collected, up to [`pump::LIMIT`], and
//! shown as a whole each time more of it comes. Once response headers have left, a local response is a reset.

use std::{cell::Cell, pin::pin, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST, SERVER},
};
use hyper::{
    body::{Body as _, Incoming},
    service::service_fn,
};
use tokio::sync::watch;

use super::{
    Proxy,
    attributes::{Connection, Info, PROTOCOL_ERROR},
    body::{Body, Source},
    client::{self, Failure, Lease},
    host::{Abort, Step, Stream},
    pump::{self, Pump, Silence, note_grpc},
};
use crate::{
    exec, headers, idle,
    listener::{
        guard::{self, Control},
        http::target,
        rewind::Rewind,
        server::{self, HttpLimits},
        strict::{self, Refusal},
    },
    vm::{self, ConnectionState, LocalResponse, MapType, RequestHead, ResponseHead, StreamType},
};

/// Envoy's default for a route.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Envoy's response flag `NR`.
const NO_ROUTE: i64 = 0x100;

/// A reset of the stream, said to hyper.
#[derive(Debug, thiserror::Error)]
#[error("the stream was reset")]
pub struct Reset;

/// Serves the requests of one connection.
pub async fn serve(proxy: Rc<Proxy>, connection: Connection, client: Rewind, http2: bool) {
    let (stop, limits) = (proxy.stop.clone(), proxy.limits);
    let control = Arc::new(Control::default());
    let guarded = control.clone();
    // Each request under way holds it.
    let requests = Rc::new(Cell::new(0));
    let seen = Rc::downgrade(&requests);
    let shared = Rc::<ConnectionState>::default();
    let service = service_fn(move |request: Request<Incoming>| {
        let (proxy, control) = (proxy.clone(), guarded.clone());
        let (requests, shared) = (requests.clone(), shared.clone());
        requests.set(requests.get() + 1);
        async move {
            let held = request.version() != Version::HTTP_2
                && (request.method() == Method::CONNECT || headers::upgrade(request.headers()).is_some());
            let closes = guard::refused(&request).is_some() || headers::closes(request.headers());
            let old = (request.version() == Version::HTTP_10).then(|| headers::keeps_alive(request.headers()));
            let mut answered = handle(proxy, connection, control.clone(), request, (requests, shared)).await;
            if held {
                control.answered(false);
            }
            // A client that took its upgrade for granted must not have its next bytes taken for a request.
            if let Ok(response) = &mut answered
                && (held
                    || closes
                    || old.is_some_and(|kept| {
                        !kept || !headers::ends_by_itself(response, response.body().size_hint().exact().is_some())
                    }))
            {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            answered
        }
    });
    let look = || (seen.strong_count() == 1).then(|| seen.upgrade().map_or(0, |requests| requests.get()));
    server::serve(client, http2, limits, stop, control, service, look).await;
}

/// What does not change during a request.
struct Exchange {
    proxy: Rc<Proxy>,
    info: Rc<Info>,
    http2: bool,
    grpc: bool,
    is_head: bool,
}

async fn handle(
    proxy: Rc<Proxy>,
    connection: Connection,
    control: Arc<Control>,
    request: Request<Incoming>,
    (held, shared): (Rc<Cell<u64>>, Rc<ConnectionState>),
) -> Result<Response<Body>, Reset> {
    let protocol = match request.version() {
        Version::HTTP_2 => "HTTP/2",
        Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    };
    let info = Info::new(connection, Some(protocol)).over(control, request.version() == Version::HTTP_2);
    let exchange = Exchange {
        info: Rc::new(info.holding(held).sharing(shared).counted(proxy.recorder.clone())),
        http2: request.version() == Version::HTTP_2,
        grpc: headers::is_grpc(request.headers()),
        is_head: *request.method() == Method::HEAD,
        proxy,
    };
    let refused = guard::refused(&request);
    let (head, body) = match read(request, exchange.proxy.limits) {
        Ok(read) => read,
        Err((status, details)) => {
            let said = status == StatusCode::REQUEST_TIMEOUT || refused.is_some() && strict::is_of_codec(&details);
            let text = if said { guard::refusal_text(status) } else { "" };
            let text = Bytes::from_static(text.as_bytes());
            if said && status != StatusCode::REQUEST_TIMEOUT {
                exchange.info.flag(PROTOCOL_ERROR);
            }
            exchange.info.details.replace(details);
            let mut head = exchange.local_head(status, HeaderMap::new(), None, &text);
            // What has no place is well formed.
            if status != StatusCode::NOT_FOUND {
                head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            return Ok(exchange.send_whole(head, text));
        }
    };
    let Ok(stream) = exchange.proxy.host.http(exchange.info.clone()) else {
        return Ok(exchange.failed());
    };
    exchange.run(Rc::new(stream), head, Source::incoming(body, protocol == "HTTP/2")).await
}

/// Brings a request into the shape in which a filter sees it, as Envoy's connection manager does.
fn read(request: Request<Incoming>, limits: HttpLimits) -> Result<(RequestHead, Incoming), (StatusCode, String)> {
    if let Some(refused) = guard::refused(&request) {
        return Err(refused);
    }
    let (mut parts, body) = request.into_parts();
    let names: Vec<_> = parts.headers.keys().cloned().collect();
    let host = parts.headers.remove(HOST);
    let authority = match parts.uri.authority() {
        // The target's authority wins over Host (RFC 9112, 3.2.2); without who the client says it is.
        Some(authority) => {
            let text = authority.as_str();
            HeaderValue::from_str(text.rsplit_once('@').map_or(text, |(_, host)| host)).ok()
        }
        None => host,
    };
    if matches!(parts.version, Version::HTTP_10 | Version::HTTP_09) && !limits.http10 {
        return Err((StatusCode::UPGRADE_REQUIRED, "low_version".into()));
    }
    if parts.headers.len() > limits.headers {
        return Err((StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "http2.too_many_headers".into()));
    }
    let Some(authority) = authority else { return Err((StatusCode::BAD_REQUEST, "missing_host_header".into())) };
    if parts.method == Method::CONNECT {
        // As Envoy without a route for it.
        return Err((StatusCode::NOT_FOUND, "route_not_found".into()));
    }
    if headers::upgrade(&parts.headers).is_some() {
        // As Envoy without `upgrade_configs`.
        return Err((StatusCode::FORBIDDEN, "upgrade_failed".into()));
    }
    if parts.uri.path_and_query().is_some_and(|path| !matches!(path.as_str().as_bytes(), [] | [b'/', ..])) {
        return Err((StatusCode::NOT_FOUND, "absolute_path_rejected".into()));
    }
    headers::prepare(&mut parts.headers);
    headers::remove_orders(&mut parts.headers);
    // hyper answers it when the body is wanted.
    if parts.headers.get(EXPECT).is_some_and(|expected| expected.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        parts.headers.remove(EXPECT);
    }
    in_order(&mut parts.headers, &names);
    vm::join(&mut parts.headers, vm::once_in_request);
    let path = match parts.uri.path_and_query() {
        Some(path) if !path.as_str().is_empty() => HeaderValue::from_str(path.as_str()).ok(),
        _ => Some(HeaderValue::from_static("/")),
    };
    let scheme = Some(HeaderValue::from_static("http"));
    let head = RequestHead { method: parts.method, scheme, authority: Some(authority), path, headers: parts.headers };
    Ok((head, body))
}

/// Puts headers into the order in which they came: removing one puts the last one in its place.
fn in_order(headers: &mut HeaderMap, names: &[HeaderName]) {
    let mut ordered = HeaderMap::with_capacity(headers.keys_len());
    for name in names.iter().chain(headers.keys()) {
        if !ordered.contains_key(name) {
            for value in headers.get_all(name) {
                ordered.append(name.clone(), value.clone());
            }
        }
    }
    *headers = ordered;
}

impl Exchange {
    async fn run(self, stream: Rc<Stream>, head: RequestHead, mut source: Source) -> Result<Response<Body>, Reset> {
        let size = head_size(&head);
        let (body, _) = self.info.request_size.get();
        self.info.request_size.set((body, size));
        let length = head.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        self.info.content_length.set(length);
        let end = source.is_end();
        let step = {
            stream.http(|http| {
                http.request = head;
                http.shown.set(MapType::RequestHeaders, true);
            });
            stream.pausing(StreamType::Request);
            stream.call(|vm, context| vm.on_request_headers(context, end))
        };
        let settled = {
            let settling = pin!(settle(&stream, StreamType::Request, step, &mut source));
            self.within(settling).await
        };
        match settled {
            Some(Ok(())) => {}
            Some(Err(abort)) => return self.aborted(stream, abort, None).await,
            None => return self.unanswered(stream, &Failure::Idle { whole: end }, None).await,
        }
        let head = stream.http(|http| {
            http.shown.set(MapType::RequestHeaders, false);
            (std::mem::take(&mut http.request), http.route_cleared)
        });
        let Some((mut head, rerouted)) = head else { return self.aborted(stream, Abort::Failed, None).await };
        if rerouted && !is_routable(&head) {
            self.info.details.replace("route_not_found".to_owned());
            self.info.flag(NO_ROUTE);
            return self.local(stream, StatusCode::NOT_FOUND, HeaderMap::new(), None, Bytes::new(), None).await;
        }
        let timeout = timeout(&mut head.headers);
        stream.keep_request(&head);
        let (complete, completed) = watch::channel(end);
        let (body, request) = if end {
            (Body::empty(), None)
        } else {
            let (sink, body) = Body::channel();
            let task = pump::request_body(stream.clone(), source, sink, complete);
            (body, Some(Pump(tokio::task::spawn_local(task).abort_handle())))
        };
        let seen = completed.clone();
        let sent = tokio::select! {
            biased;
            abort = stream.aborted() => Err(abort),
            sent = async { self.within(pin!(self.send(head, body, timeout, completed))).await } => Ok(sent),
        };
        match sent {
            Err(abort) => self.aborted(stream, abort, request).await,
            Ok(Some(Ok((head, source, lease)))) => self.respond(stream, head, source, Some(lease), request).await,
            Ok(Some(Err(failure))) => {
                let whole = *seen.borrow();
                match self.info.broken() {
                    // It failed because the client's body did.
                    Some(refusal) if !whole => self.cut_off(stream, refusal, request).await,
                    // There is nobody to be answered.
                    None if !whole && self.info.is_gone() => Err(Reset),
                    _ => self.unanswered(stream, &failure, request).await,
                }
            }
            Ok(None) => {
                let whole = *seen.borrow();
                self.unanswered(stream, &Failure::Idle { whole }, request).await
            }
        }
    }

    /// The result of a part of the request's way; `None` where nothing moved for too long.
    async fn within<T>(&self, work: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
        idle::within(self.proxy.limits.stream_idle, || Some(self.info.moved.get()), work).await
    }

    /// Ends a request that the upstream has not answered.
    async fn unanswered(
        self,
        stream: Rc<Stream>,
        failure: &Failure,
        pump: Option<Pump>,
    ) -> Result<Response<Body>, Reset> {
        self.info.details.replace(failure.details());
        self.info.flag(failure.flag().0);
        let status = StatusCode::from_u16(failure.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        self.local(stream, status, HeaderMap::new(), None, Bytes::from(failure.to_string()), pump).await
    }

    /// Ends a request whose body is broken.
    async fn cut_off(
        self,
        stream: Rc<Stream>,
        Refusal { status, details }: Refusal,
        pump: Option<Pump>,
    ) -> Result<Response<Body>, Reset> {
        self.info.details.replace(details.to_owned());
        self.info.flag(PROTOCOL_ERROR);
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST);
        let text = Bytes::from_static(guard::refusal_text(status).as_bytes());
        let mut answered = self.local(stream, status, HeaderMap::new(), None, text, pump).await;
        if let Ok(response) = &mut answered {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        answered
    }

    /// Asks the upstream.
    async fn send(
        &self,
        mut head: RequestHead,
        body: Body,
        timeout: Duration,
        mut complete: watch::Receiver<bool>,
    ) -> Result<(ResponseHead, Source, Lease), Failure> {
        if !self.http2 {
            headers::frame(&mut head.headers, &head.method, body.size_hint().exact());
        }
        let mut request = Request::new(body);
        *request.uri_mut() = target(&head, self.http2).map_err(|_| Failure::Request)?;
        *request.method_mut() = head.method;
        *request.headers_mut() = head.headers;
        if !self.http2 && request.body().is_end_stream() && client::tells_no_body(request.method()) {
            request.headers_mut().entry(CONTENT_LENGTH).or_insert(HeaderValue::from_static("0"));
        }
        if let Some(authority) = head.authority.filter(|_| !self.http2 || request.uri().authority().is_none()) {
            request.headers_mut().insert(HOST, authority);
        }
        self.info.attempts.set(1);
        let too_long = async {
            // Time counts from the end of the request; a sender that is gone has ended it.
            let _ = complete.wait_for(|complete| *complete).await;
            if timeout.is_zero() { std::future::pending().await } else { tokio::time::sleep(timeout).await }
        };
        let answer = tokio::select! {
            answer = self.proxy.upstream.send(request, self.http2) => answer?,
            () = too_long => return Err(Failure::Timeout),
        };
        self.info.upstream.set(Some(answer.lease.peers));
        let time = self.info.elapsed();
        self.info.backend_latency.set(Some(time));
        let (mut parts, body) = answer.response.into_parts();
        let names: Vec<_> = parts.headers.keys().cloned().collect();
        headers::remove_hop_by_hop(&mut parts.headers);
        in_order(&mut parts.headers, &names);
        vm::join(&mut parts.headers, vm::once_in_response);
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        parts.headers.insert("x-envoy-upstream-service-time", HeaderValue::from(millis));
        self.info.details.replace("via_upstream".to_owned());
        let head = ResponseHead { status: parts.status, headers: parts.headers };
        Ok((head, Source::incoming(body, self.http2), answer.lease))
    }

    /// Ends a request that has no response yet.
    async fn aborted(self, stream: Rc<Stream>, abort: Abort, pump: Option<Pump>) -> Result<Response<Body>, Reset> {
        match abort {
            Abort::Respond(response) => {
                let LocalResponse { status, details, body, headers, grpc_status } = *response;
                self.info.details.replace(details_of(&details));
                self.local(stream, status, headers, grpc_status, body, pump).await
            }
            Abort::TooLarge => {
                self.info.details.replace("request_payload_too_large".to_owned());
                let body = Bytes::from_static(b"Payload Too Large");
                self.local(stream, StatusCode::PAYLOAD_TOO_LARGE, HeaderMap::new(), None, body, pump).await
            }
            Abort::Close => Err(self.reset()),
            Abort::Failed => Ok(self.failed()),
        }
    }

    /// The filter, and not the client, ends the stream.
    fn reset(&self) -> Reset {
        self.info.settle();
        Reset
    }

    /// A response of our own before there is one of the upstream's: it goes through the filter.
    async fn local(
        self,
        stream: Rc<Stream>,
        status: StatusCode,
        headers: HeaderMap,
        grpc_status: Option<u32>,
        body: Bytes,
        pump: Option<Pump>,
    ) -> Result<Response<Body>, Reset> {
        let head = self.local_head(status, headers, grpc_status, &body);
        let body = if self.is_head || self.grpc { Bytes::new() } else { body };
        self.respond(stream, head, Source::whole(body), None, pump).await
    }

    /// Shows the filter a response, and sends it to the client.
    async fn respond(
        self,
        stream: Rc<Stream>,
        head: ResponseHead,
        mut source: Source,
        lease: Option<Lease>,
        pump: Option<Pump>,
    ) -> Result<Response<Body>, Reset> {
        let end = source.is_end();
        self.info.code.set(head.status.as_u16());
        note_grpc(&self.info, &head.headers);
        stream.http(|http| {
            http.response = head;
            http.shown.set(MapType::ResponseHeaders, true);
        });
        stream.pausing(StreamType::Response);
        let step = stream.call(|vm, context| vm.on_response_headers(context, end));
        match settle(&stream, StreamType::Response, step, &mut source).await {
            Ok(()) => {}
            // There is a response already, so this one goes past the filter.
            Err(Abort::Respond(response)) => {
                let LocalResponse { status, details, body, headers, grpc_status } = *response;
                self.info.details.replace(details_of(&details));
                let head = self.local_head(status, headers, grpc_status, &body);
                stream.keep_response(&head);
                return Ok(self.send_whole(head, body));
            }
            Err(Abort::TooLarge | Abort::Close) => return Err(self.reset()),
            Err(Abort::Failed) => return Ok(self.failed()),
        }
        let head = stream.http(|http| {
            http.shown.set(MapType::ResponseHeaders, false);
            std::mem::take(&mut http.response)
        });
        let Some(mut head) = head else { return Ok(self.failed()) };
        stream.keep_response(&head);
        self.info.code.set(head.status.as_u16());
        self.info.response_size.set((0, header_size(&head.headers)));
        if lease.is_none() {
            head.headers.insert(SERVER, HeaderValue::from_static("portolan"));
        }
        if end {
            self.info.settle();
            if let Some(lease) = lease {
                lease.finish();
            }
            return Ok(response(head, Body::empty()));
        }
        let (sink, body) = Body::channel();
        let silence = Silence { time: self.proxy.limits.stream_idle, end: exec::end() };
        tokio::task::spawn_local(pump::response_body(stream, source, sink, lease, pump, silence));
        Ok(response(head, body))
    }

    /// The filter crashed, or there is none right now: as Envoy with a filter that fails closed.
    fn failed(&self) -> Response<Body> {
        self.info.details.replace("wasm_fail_stream".to_owned());
        let head = self.local_head(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new(), None, &Bytes::new());
        self.send_whole(head, Bytes::new())
    }

    fn send_whole(&self, mut head: ResponseHead, body: Bytes) -> Response<Body> {
        self.info.settle();
        self.info.code.set(head.status.as_u16());
        head.headers.insert(SERVER, HeaderValue::from_static("portolan"));
        let empty = self.is_head || self.grpc;
        response(head, if empty { Body::empty() } else { Body::Whole(body) })
    }

    /// Head of a response of our own, in the form that the client's protocol has for it.
    fn local_head(
        &self,
        status: StatusCode,
        mut headers: HeaderMap,
        grpc_status: Option<u32>,
        body: &Bytes,
    ) -> ResponseHead {
        headers.remove(CONTENT_LENGTH);
        if self.grpc {
            // A gRPC client reads the status of its call, not that of HTTP.
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            if !headers.contains_key("grpc-status") {
                let code = grpc_status.unwrap_or_else(|| headers::grpc_status(status));
                headers.insert("grpc-status", HeaderValue::from(code));
            }
            if !headers.contains_key("grpc-message")
                && let Some(message) = grpc_message(body)
            {
                headers.insert("grpc-message", message);
            }
            return ResponseHead { status: StatusCode::OK, headers };
        }
        if body.is_empty() {
            headers.remove(CONTENT_TYPE);
        } else {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
            if !headers.contains_key(CONTENT_TYPE) {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            }
        }
        ResponseHead { status, headers }
    }
}

fn response(head: ResponseHead, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    response
}

/// As Envoy, which unlike our own answers keeps a line's end.
fn grpc_message(body: &[u8]) -> Option<HeaderValue> {
    let message = headers::grpc_message(body)?;
    let end: String = body[body.trim_ascii_end().len()..].iter().map(|byte| format!("%{byte:02X}")).collect();
    HeaderValue::from_str(&format!("{}{end}", message.to_str().ok()?)).ok()
}

/// Details hold no white space, as in Envoy.
fn details_of(details: &[u8]) -> String {
    String::from_utf8_lossy(details).replace(char::is_whitespace, "_")
}

/// Whether a route of Envoy's can take a request whose headers the filter has changed.
fn is_routable(head: &RequestHead) -> bool {
    let is_there = |value: &HeaderValue| !value.is_empty();
    head.path.as_ref().is_some_and(is_there) && head.headers.get("x-forwarded-proto").is_some_and(is_there)
}

/// Takes the time that the request may take out of its headers, and announces it.
fn timeout(headers: &mut HeaderMap) -> Duration {
    let own = headers.remove("x-envoy-upstream-rq-timeout-ms");
    let own = own.and_then(|value| value.to_str().ok()?.parse::<u32>().ok()).map(|ms| Duration::from_millis(ms.into()));
    let timeout = own.unwrap_or(TIMEOUT);
    if !timeout.is_zero() {
        let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        headers.insert("x-envoy-expected-rq-timeout-ms", HeaderValue::from(millis));
    }
    timeout
}

fn header_size(headers: &HeaderMap) -> u64 {
    headers.iter().map(|(name, value)| (name.as_str().len() + value.len()) as u64).sum()
}

fn head_size(head: &RequestHead) -> u64 {
    let pseudo = [(":authority", &head.authority), (":path", &head.path), (":scheme", &head.scheme)];
    let pseudo = pseudo.iter().filter_map(|(name, value)| value.as_ref().map(|v| (name.len() + v.len()) as u64));
    header_size(&head.headers) + pseudo.sum::<u64>() + (":method".len() + head.method.as_str().len()) as u64
}

async fn settle(stream: &Stream, direction: StreamType, step: Step, source: &mut Source) -> Result<(), Abort> {
    match step {
        Step::Go => Ok(()),
        Step::Wait => tokio::select! {
            resumed = stream.resumed(direction) => resumed,
            never = source.gather() => match never {},
        },
        Step::Abort(abort) => Err(abort),
    }
}
