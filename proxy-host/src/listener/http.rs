//! Requests: the filter names a cluster in a header, the one route goes by it, and bodies stream through.

use std::{borrow::Cow, cell::Cell, pin::pin, rc::Rc, sync::Arc, time::Duration};

use ::http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header::{CONNECTION, CONTENT_TYPE, EXPECT, HOST, SERVER, UPGRADE, USER_AGENT},
};
use bytes::Bytes;
use hyper::{
    body::{Body as _, Incoming},
    service::service_fn,
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;

use super::{
    Open,
    guard::{self, Control, End},
    rewind::Rewind,
    server::{self, HttpLimits},
    strict::{self, Refusal},
};
use crate::{
    access_log::Entry,
    body::{Received, ResponseBody},
    exec,
    filter::{Connection, HttpVerdict, Stream, Via},
    flags,
    headers::{self, authority_parts},
    idle::{self, Copied, Side},
    path,
    router::{self, Failure},
    upstream::{Wanted, hash},
    vm::{LocalResponse, RequestHead, ResponseHead},
    worker::Worker,
};

/// The header by which the one route chooses its cluster.
const CLUSTER: HeaderName = HeaderName::from_static("x-portolan-cluster");
const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");

/// The connection that a request came over.
struct Client {
    connection: Rc<Connection>,
    control: Arc<Control>,
    open: Rc<Open>,
    /// Requests so far.
    requests: Cell<u64>,
    /// It ends with the answer to the request under way.
    closes: Cell<bool>,
}

/// Serves the requests of one connection.
pub async fn serve(worker: Rc<Worker>, connection: Rc<Connection>, client: Rewind, http2: bool, open: Rc<Open>) {
    let stop = worker.stop.clone();
    let limits = worker.config.http;
    let control = Arc::new(Control::default());
    let from = Rc::new(Client {
        connection,
        control: control.clone(),
        open,
        requests: Cell::new(0),
        closes: Cell::new(false),
    });
    let seen = Rc::downgrade(&from);
    let service = service_fn(move |request| {
        // Read before there is a future, which would have room for all that is moved in it.
        let exchange = Exchange::read(&worker, &from, request);
        // In a box: hyper moves the future, and keeps room for one as long as the connection lives.
        Box::pin(handle(worker.clone(), exchange))
    });
    // Each request under way holds what it came over.
    let look = || (seen.strong_count() == 1).then(|| seen.upgrade().map_or(0, |from| from.requests.get()));
    server::serve(client, http2, limits, stop, control, service, look).await;
}

/// A reset of the stream, said to hyper.
#[derive(Debug, thiserror::Error)]
#[error("the filter reset the request")]
struct Reset;

async fn handle(worker: Rc<Worker>, exchange: Box<Exchange>) -> Result<Response<ResponseBody>, Reset> {
    let from = exchange.from.clone();
    let Asked { connect, upgrades, old, .. } = exchange.asked;
    let mut answered = answer(&worker, exchange).await;
    if let Ok(response) = &mut answered
        && (from.closes.get()
            || old.is_some_and(|kept| {
                !kept || !headers::ends_by_itself(response, response.body().size_hint().exact().is_some())
            }))
    {
        // hyper leaves it out of HTTP/2.
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if upgrades {
        let status = answered.as_ref().map_or(StatusCode::BAD_GATEWAY, Response::status);
        let upgraded = status == StatusCode::SWITCHING_PROTOCOLS || connect && status.is_success();
        from.control.answered(upgraded);
        // A client that took its upgrade for granted must not have its next bytes taken for a request.
        if let Ok(response) = &mut answered
            && !upgraded
        {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }
    answered
}

async fn answer(worker: &Rc<Worker>, mut exchange: Box<Exchange>) -> Result<Response<ResponseBody>, Reset> {
    if let Some((status, flags)) = exchange.refused {
        return Ok(exchange.refuse_text(status, flags));
    }
    let connection = exchange.from.connection.clone();
    let end = exchange.body.as_ref().is_none_or(Incoming::is_end_stream);
    let hash = match worker.filter.request(&connection, &mut exchange.head, end).await {
        HttpVerdict::Continue(hash, stream) => {
            exchange.entry.decision = stream.decision();
            exchange.stream = Some(stream);
            hash
        }
        HttpVerdict::Respond(response, decision) => {
            exchange.entry.decision = decision;
            return Ok(exchange.local(*response));
        }
        HttpVerdict::Reset => {
            exchange.entry.reason = Some("portolan_filter_reset".into());
            return Err(Reset);
        }
        HttpVerdict::Failed => {
            exchange.entry.reason = Some("portolan_filter_failed".into());
            let body = Bytes::from_static(b"portolan: the filter failed\n");
            return Ok(exchange.refuse(StatusCode::SERVICE_UNAVAILABLE, body, ""));
        }
    };
    let connect = exchange.asked.connect;
    let name = exchange.head.headers.remove(CLUSTER).and_then(|name| name.to_str().ok().map(str::to_owned));
    let Some(name) = name.filter(|_| !connect || connection.is_proxied()) else {
        exchange.entry.reason = Some("route_not_found".into());
        return Ok(Box::pin(exchange.shown(|e| e.refuse(StatusCode::NOT_FOUND, Bytes::new(), "NR"))).await);
    };
    let faulty = router::has_fault(&exchange.head.headers);
    let delay = if faulty { router::delay(&mut exchange.head.headers) } else { None };
    if faulty && let Some((status, grpc)) = router::abort(&mut exchange.head.headers) {
        if let Some(delay) = delay {
            exchange.entry.flags = "DI";
            Box::pin(tokio::time::sleep(delay)).await;
        }
        exchange.entry.flags = flags::join(exchange.entry.flags, "FI");
        exchange.entry.reason = Some("fault_filter_abort".into());
        return Ok(exchange.reply(status, Bytes::from_static(b"fault filter abort"), grpc));
    }
    let found = worker.cluster(&name).await;
    exchange.entry.cluster = Some(name);
    let cluster = match found {
        Ok(cluster) => cluster,
        Err(error) => {
            exchange.entry.reason = Some(error.to_string());
            let refuse = |e: Box<Exchange>| e.refuse(StatusCode::SERVICE_UNAVAILABLE, Bytes::new(), "NC");
            return Ok(Box::pin(exchange.shown(refuse)).await);
        }
    };
    if let Some(delay) = delay {
        exchange.entry.flags = flags::join(exchange.entry.flags, "DI");
        Box::pin(tokio::time::sleep(delay)).await;
    }
    let (host, port) = authority_parts(exchange.head.authority.as_ref());
    let destination = connection.meant_for();
    let hash = hash.map(|value| hash::of(&value));
    let wanted = Wanted { destination, host, port, hash, client: Some(connection) };
    let answered = if connect {
        Box::pin(exchange.tunnel(worker, &cluster, &wanted)).await
    } else {
        exchange.forward(worker, &cluster, &wanted).await
    };
    match answered {
        Ok(response) => Ok(response),
        Err((mut exchange, failure)) => match exchange.from.control.broken() {
            // It failed because the client's body did.
            Some(Refusal { status, details }) => {
                exchange.entry.reason = Some(details.into());
                Ok(exchange.refuse_text(StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST), "DPE"))
            }
            // The client left in the middle of its request: there is nobody to be answered.
            None if exchange.from.control.end() == End::Gone && !exchange.received.is_whole() => {
                exchange.entry.received = exchange.received.bytes();
                Err(Reset)
            }
            None => Ok(Box::pin(exchange.shown(|e| e.failed(&failure))).await),
        },
    }
}

/// Status and flags of an answer to a request that goes nowhere.
type Refused = (StatusCode, &'static str);

/// What a request is, before anything is changed in it.
#[derive(Clone, Copy)]
struct Asked {
    connect: bool,
    http2: bool,
    /// Its connection may become another one.
    upgrades: bool,
    /// HTTP/1.0; whether the connection is to be kept.
    old: Option<bool>,
}

/// One request on its way. In a box wherever it goes, as it is large.
struct Exchange {
    from: Rc<Client>,
    entry: Box<Entry>,
    received: Rc<Received>,
    grpc: bool,
    asked: Asked,
    refused: Option<Refused>,
    head: RequestHead,
    /// `None` for a request that is refused.
    body: Option<Incoming>,
    /// The connection, once it is no longer HTTP.
    upgrade: Option<OnUpgrade>,
    /// The filter's part in it, until it has seen the answer.
    stream: Option<Stream>,
}

impl Exchange {
    /// A request as it came.
    fn read(worker: &Worker, from: &Rc<Client>, mut request: Request<Incoming>) -> Box<Self> {
        from.requests.set(from.requests.get() + 1);
        let version = request.version();
        let http2 = version == Version::HTTP_2;
        let connect = request.method() == Method::CONNECT;
        let upgrades = !http2 && (connect || headers::upgrade(request.headers()).is_some());
        let asked = Asked {
            connect,
            http2,
            upgrades,
            old: (version == Version::HTTP_10).then(|| headers::keeps_alive(request.headers())),
        };
        let mut entry = Box::new(Entry::new(&worker.log));
        entry.client = Some((from.control.clone(), http2));
        let mut exchange = Box::new(Self {
            from: from.clone(),
            entry,
            received: Rc::default(),
            grpc: headers::is_grpc(request.headers()),
            asked,
            refused: None,
            head: RequestHead::default(),
            body: None,
            upgrade: (connect || upgrades).then(|| hyper::upgrade::on(&mut request)),
            stream: None,
        });
        exchange.refused = exchange.prepare(request, worker.config.http, worker.log.is_on()).err();
        exchange
    }

    /// Brings a request into the shape in which a filter sees it, as Envoy's connection manager does.
    fn prepare(&mut self, request: Request<Incoming>, limits: HttpLimits, logged: bool) -> Result<(), Refused> {
        if let Some((status, details)) = guard::refused(&request) {
            self.entry.request = Some(("-".into(), "-".into(), "HTTP/1.1"));
            let flag = if strict::is_of_codec(&details) { "DPE" } else { "" };
            self.entry.reason = Some(details);
            return Err((status, flag));
        }
        let (mut parts, body) = request.into_parts();
        let host = parts.headers.remove(HOST);
        let authority = match parts.uri.authority() {
            // The target's authority wins over Host (RFC 9112, 3.2.2); without who the client says it is.
            Some(authority) => {
                let text = authority.as_str();
                HeaderValue::from_str(text.rsplit_once('@').map_or(text, |(_, host)| host)).ok()
            }
            None => host,
        };
        let connect = self.asked.connect;
        let path = parts.uri.path_and_query().filter(|_| !connect).map_or("/", |path| path.as_str());
        let path = if path.is_empty() { "/" } else { path };
        let normal = path::normalize(path.as_bytes());
        let shown = |value: Option<&HeaderValue>| value.map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
        let refused = if parts.headers.len() > limits.headers {
            Some((StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "DPE", "http2.too_many_headers"))
        } else if authority.is_none() {
            Some((StatusCode::BAD_REQUEST, "", "missing_host_header"))
        } else if !path.starts_with('/') {
            Some((StatusCode::NOT_FOUND, "", "absolute_path_rejected"))
        } else if normal.is_err() {
            Some((StatusCode::BAD_REQUEST, "", "path_normalization_failed"))
        } else if headers::upgrade(&parts.headers).is_some_and(|u| !u.as_bytes().eq_ignore_ascii_case(b"websocket")) {
            // Of the upgrades Istio enables this one alone.
            Some((StatusCode::FORBIDDEN, "", "upgrade_failed"))
        } else {
            None
        };
        let connection = &self.from.connection;
        if let Via::Gateway { .. } = connection.via {
            headers::from_outside(&mut parts.headers, connection.source.ip(), connection.scheme());
        }
        if headers::prepare(&mut parts.headers) {
            self.from.closes.set(true);
        }
        if let Some(certificate) = &connection.client_certificate {
            parts.headers.insert(headers::X_FORWARDED_CLIENT_CERT, certificate.clone());
        }
        let protocol = match parts.version {
            Version::HTTP_2 => "HTTP/2",
            Version::HTTP_10 => "HTTP/1.0",
            _ => "HTTP/1.1",
        };
        if logged {
            let path = if connect { "" } else { path };
            self.entry.request = Some((parts.method.to_string(), path.to_owned(), protocol));
            self.entry.authority = shown(authority.as_ref());
            let header = |name: HeaderName| shown(parts.headers.get(name));
            self.entry.headers = [header(headers::X_FORWARDED_FOR), header(USER_AGENT), header(headers::X_REQUEST_ID)];
        } else {
            // Enough to be counted as a request.
            self.entry.request = Some((String::new(), String::new(), protocol));
        }
        if let Some((status, flags, details)) = refused {
            self.entry.reason = Some(details.into());
            return Err((status, flags));
        }
        let path = match normal {
            _ if connect => None,
            Ok(Cow::Owned(path)) => HeaderValue::from_maybe_shared(Bytes::from(path)).ok(),
            _ => HeaderValue::from_str(path).ok(),
        };
        self.head.method = parts.method;
        self.head.scheme = Some(HeaderValue::from_static(self.from.connection.scheme()));
        self.head.authority = authority;
        self.head.path = path;
        self.head.headers = parts.headers;
        self.body = Some(body);
        Ok(())
    }

    async fn forward(
        mut self: Box<Self>,
        worker: &Rc<Worker>,
        cluster: &crate::upstream::Cluster,
        wanted: &Wanted,
    ) -> Result<Response<ResponseBody>, (Box<Self>, Failure)> {
        let upgrade = self.upgrade.take().filter(|_| self.head.headers.contains_key(UPGRADE));
        let client = self.asked.http2;
        let expects = (!client && is_expected(&self.head.headers)).then(|| self.from.control.clone());
        if let Some(control) = &expects {
            control.expects();
        }
        let idle = worker.config.http.stream_idle;
        let sent = {
            let Self { head, body, received, grpc, entry, .. } = &mut *self;
            let Some(body) = body.take() else { return Err((self, Failure::Filter)) };
            let request = router::Outgoing { head, body, received, grpc: *grpc, expects, client };
            let sending = pin!(router::send(worker, cluster, wanted, request, entry));
            idle::within(idle, || Some(received.moved()), sending).await
        };
        let mut response = match sent {
            Some(Ok(response)) => response,
            Some(Err(failure)) => return Err((self, failure)),
            None => {
                let whole = self.received.is_whole();
                return Err((self, Failure::Idle { whole }));
            }
        };
        let time = self.entry.elapsed();
        self.entry.service_time = Some(time);
        let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let mut ends = None;
        if upgraded && let Some(client) = upgrade {
            ends = Some((client, hyper::upgrade::on(&mut response)));
        } else {
            headers::remove_hop_by_hop(response.headers_mut());
        }
        let (parts, carried) = response.into_parts();
        let mut head = ResponseHead { status: parts.status, headers: parts.headers };
        head.headers.insert(SERVICE_TIME, HeaderValue::from(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)));
        if let Some(stream) = self.stream.take() {
            match stream.response(&mut head, carried.body.is_end_stream()).await {
                Ok(()) => {}
                Err(Some(response)) => return Ok(self.local(*response)),
                Err(None) => return Err((self, Failure::Filter)),
            }
        }
        self.entry.status = head.status.as_u16();
        let body = match ends {
            None => ResponseBody::upstream(carried, self.received, self.entry).limited(idle),
            Some((client, upstream)) => {
                let held = (self.from.open.clone(), carried);
                exec::spawn(both_ways(client, upstream, idle, self.entry, held));
                // Its line is written at the end of the connection.
                ResponseBody::silent(self.received)
            }
        };
        let mut response = Response::new(body.holding(self.from));
        *response.status_mut() = head.status;
        *response.headers_mut() = head.headers;
        Ok(response)
    }

    /// CONNECT on the HTTP proxy listener: bytes both ways once there is a connection.
    async fn tunnel(
        mut self: Box<Self>,
        worker: &Rc<Worker>,
        cluster: &crate::upstream::Cluster,
        wanted: &Wanted,
    ) -> Result<Response<ResponseBody>, (Box<Self>, Failure)> {
        let (upstream, active) = match router::connect(worker, cluster, wanted, &mut self.entry).await {
            Ok(connected) => connected,
            Err(failure) => return Err((self, failure)),
        };
        let Some(client) = self.upgrade.take() else { return Err((self, Failure::Filter)) };
        self.entry.status = 200;
        let stream = self.stream.take();
        let entry = self.entry;
        let received = self.received;
        let open = self.from.open.clone();
        let idle = worker.config.http.stream_idle;
        exec::spawn(async move {
            let mut entry = entry;
            let _held = (stream, active, open);
            let Ok(client) = client.await else { return entry.broke_off() };
            note(idle::copy_until_one_ends(TokioIo::new(client), upstream, idle).await, true, &mut entry);
        });
        // The tunnel's line is written at its end, by its task.
        Ok(Response::new(ResponseBody::silent(received)))
    }

    /// An answer of our own to a request that the filter let pass. It may change its headers, as in Envoy, where local
    /// replies go by all filters.
    async fn shown(
        mut self: Box<Self>,
        reply: impl FnOnce(Box<Self>) -> Response<ResponseBody>,
    ) -> Response<ResponseBody> {
        let stream = self.stream.take();
        let mut response = reply(self);
        let Some(stream) = stream else { return response };
        let mut head = ResponseHead { status: response.status(), headers: response.headers().clone() };
        // Where the filter fails, what was to be said is still true.
        if stream.response(&mut head, response.body().is_end_stream()).await.is_ok() {
            *response.status_mut() = head.status;
            *response.headers_mut() = head.headers;
        }
        response
    }

    /// An answer of the filter's.
    fn local(mut self: Box<Self>, response: LocalResponse) -> Response<ResponseBody> {
        self.entry.reason = Some(String::from_utf8_lossy(&response.details).into_owned());
        let grpc = self.grpc;
        let mut answer = self.reply(response.status, response.body, response.grpc_status);
        // One content type: the filter's own, but for gRPC, whose form of an answer is fixed.
        if !grpc && response.headers.contains_key(CONTENT_TYPE) {
            answer.headers_mut().remove(CONTENT_TYPE);
        }
        for (name, value) in response.headers.iter().filter(|(name, _)| !grpc || **name != CONTENT_TYPE) {
            answer.headers_mut().append(name, value.clone());
        }
        answer
    }

    /// An answer of our own, with Envoy's flag for it.
    fn refuse(mut self: Box<Self>, status: StatusCode, body: Bytes, flags: &'static str) -> Response<ResponseBody> {
        self.entry.flags = flags::join(self.entry.flags, flags);
        self.reply(status, body, None)
    }

    /// The same with the status's name as its body, as Envoy's codec answers; its connection ends.
    fn refuse_text(self: Box<Self>, status: StatusCode, flags: &'static str) -> Response<ResponseBody> {
        let said = flags == "DPE" || status == StatusCode::REQUEST_TIMEOUT;
        let text = if said { guard::refusal_text(status) } else { "" };
        let mut response = self.refuse(status, Bytes::from_static(text.as_bytes()), flags);
        // What has no place is well formed.
        if status != StatusCode::NOT_FOUND {
            // hyper leaves it out of HTTP/2.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    fn failed(mut self: Box<Self>, failure: &Failure) -> Response<ResponseBody> {
        self.entry.reason = Some(failure.details());
        let mut answer = self.refuse(failure.status(), Bytes::from(failure.body()), failure.flags());
        match failure {
            Failure::Overflow(_) => {
                answer.headers_mut().insert("x-envoy-overloaded", HeaderValue::from_static("true"));
            }
            // Nobody waits for the rest of it.
            Failure::Idle { whole: false } => {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        answer
    }

    fn reply(mut self: Box<Self>, status: StatusCode, body: Bytes, grpc_status: Option<u32>) -> Response<ResponseBody> {
        let mut headers = HeaderMap::new();
        headers.insert(SERVER, HeaderValue::from_static("portolan"));
        let (status, body) = if self.grpc {
            // A gRPC client reads the status of its call, not that of HTTP.
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            let code = grpc_status.unwrap_or_else(|| headers::grpc_status(status));
            headers.insert("grpc-status", HeaderValue::from(code));
            if let Some(message) = headers::grpc_message(&body) {
                headers.insert("grpc-message", message);
            }
            (StatusCode::OK, Bytes::new())
        } else {
            if !body.is_empty() {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            }
            (status, body)
        };
        self.entry.status = status.as_u16();
        let mut response = Response::new(ResponseBody::local(body, self.received, self.entry).holding(self.from));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }
}

/// Carries the bytes of an upgraded connection; `_held` lives as long.
async fn both_ways(client: OnUpgrade, upstream: OnUpgrade, idle: Duration, mut entry: Box<Entry>, _held: impl Sized) {
    if let (Ok(client), Ok(upstream)) = (client.await, upstream.await) {
        let copied = idle::copy_until_one_ends(TokioIo::new(client), TokioIo::new(upstream), idle).await;
        note(copied, false, &mut entry);
    } else {
        entry.broke_off();
    }
}

/// Notes how a connection that is no longer HTTP ended; `tunnel`: towards the upstream it never was.
fn note((copied, bytes): (Copied, idle::Bytes), tunnel: bool, entry: &mut Entry) {
    (entry.received, entry.sent) = (bytes.received, bytes.sent);
    let (flag, details) = match copied {
        Copied::Idle => ("SI", "stream_idle_timeout"),
        Copied::Whole(Some(Side::Client)) | Copied::Broken(Side::Client) => ("DC", "downstream_remote_disconnect"),
        Copied::Whole(_) if tunnel => return,
        // As Envoy has it, an answer that has no end is not at its end.
        Copied::Whole(_) | Copied::Broken(Side::Upstream) => {
            ("UC", "upstream_reset_after_response_started{connection_termination}")
        }
    };
    entry.flags = flags::join(entry.flags, flag);
    entry.reason = Some(details.into());
}

/// Whether a client waits for a 100 before it sends its body.
fn is_expected(headers: &HeaderMap) -> bool {
    headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// The target of a request to an upstream of either version.
///
/// # Errors
/// The filter wrote a path or an authority that no request can have.
pub fn target(head: &RequestHead, http2: bool) -> Result<Uri, ::http::Error> {
    let path = head.path.as_ref().map_or(&b"/"[..], HeaderValue::as_bytes);
    if http2 {
        let authority = head.authority.as_ref().map_or(&b""[..], HeaderValue::as_bytes);
        if let Ok(uri) = Uri::builder().scheme("http").authority(authority).path_and_query(path).build() {
            return Ok(uri);
        }
    }
    Uri::builder().path_and_query(path).build()
}
