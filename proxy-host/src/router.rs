//! From a cluster to a response: an endpoint is chosen, connected to and asked, and another one tried where none
//! could be connected to (Istio's default retry policy, as far as it can be carried out before a body has been sent).

use std::{rc::Rc, time::Duration};

use ::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header::HOST};
use hyper::body::Incoming;

use crate::{
    access_log::Entry,
    body::RequestBody,
    listener::http::target,
    upstream::{
        Active, ChooseError, Cluster, Endpoint, Wanted,
        cluster::Protocol,
        connect::{ConnectError, Stream},
        http::{self, Lease, SendError},
    },
    vm::RequestHead,
    worker::Worker,
};

/// Retries after a failed connection (Istio's default policy).
const RETRIES: u32 = 2;
/// Attempts to find an endpoint that has not been tried (Istio's `hostSelectionRetryMaxAttempts`).
const SELECTIONS: u32 = 5;
/// Envoy's base interval between retries.
const BACKOFF: Duration = Duration::from_millis(25);

const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");

/// A request whose way is decided.
pub struct Outgoing {
    /// Headers, as the filter left them.
    pub head: RequestHead,
    /// The client's body.
    pub body: RequestBody,
}

/// Why there is no response; texts, statuses and flags are Envoy's (SEMANTICS 8.4).
#[derive(Debug)]
pub enum Failure {
    /// The cluster has nowhere to go.
    Choose(ChooseError),
    /// No endpoint could be connected to; how often it was tried again.
    Connect(ConnectError, u32),
    /// The connection ended before the response.
    Reset(hyper::Error),
    /// The application's own timeout has passed.
    Timeout,
    /// The filter left headers that make no request, or did not let the response pass.
    Filter,
}

impl Failure {
    /// Status for the client.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Reset(error) if error.is_parse() => StatusCode::BAD_GATEWAY,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// Flags for the access log.
    #[must_use]
    pub fn flags(&self) -> &'static str {
        match self {
            Self::Choose(ChooseError::NoEndpoint) => "UH",
            Self::Choose(ChooseError::Resolve(_)) => "DF",
            Self::Connect(_, 0) => "UF",
            Self::Connect(..) => "UF,URX",
            Self::Reset(error) if error.is_parse() => "UPE",
            Self::Reset(_) => "UC",
            Self::Timeout => "UT",
            Self::Filter => "",
        }
    }

    /// Body for the client.
    #[must_use]
    pub fn body(&self) -> String {
        let before = "upstream connect error or disconnect/reset before headers.";
        match self {
            Self::Choose(ChooseError::NoEndpoint) => "no healthy upstream".into(),
            Self::Choose(ChooseError::Resolve(_)) => "DNS resolution failure".into(),
            Self::Connect(error, 0) => format!("{before} reset reason: {error}"),
            Self::Connect(error, _) => format!("{before} retried and the latest reset reason: {error}"),
            Self::Reset(error) if error.is_parse() => format!("{before} reset reason: protocol error"),
            Self::Reset(_) => format!("{before} reset reason: connection termination"),
            Self::Timeout => "upstream request timeout".into(),
            Self::Filter => "portolan: the filter failed\n".into(),
        }
    }

    /// Response code details.
    #[must_use]
    pub fn details(&self) -> String {
        match self {
            Self::Choose(ChooseError::NoEndpoint) => "no_healthy_upstream".into(),
            Self::Choose(ChooseError::Resolve(error)) => format!("dns_resolution_failure{{{error}}}"),
            Self::Connect(error, _) => format!("upstream_reset_before_response_started{{{error}}}"),
            Self::Reset(error) => format!("upstream_reset_before_response_started{{{error}}}"),
            Self::Timeout => "response_timeout".into(),
            Self::Filter => "portolan_filter_failed".into(),
        }
    }
}

/// An endpoint, and not one of those tried before where another can be found.
async fn choose(
    worker: &Worker,
    cluster: &Cluster,
    wanted: &Wanted,
    tried: &[Rc<Endpoint>],
) -> Result<Rc<Endpoint>, ChooseError> {
    let mut endpoint = cluster.choose(wanted, &worker.resolver).await?;
    for _ in 1..SELECTIONS {
        if !tried.iter().any(|before| Rc::ptr_eq(before, &endpoint)) {
            break;
        }
        endpoint = cluster.choose(wanted, &worker.resolver).await?;
    }
    Ok(endpoint)
}

async fn back_off(retry: u32) {
    let longest = BACKOFF * ((1 << retry) - 1);
    tokio::time::sleep(longest.mul_f64(fastrand::f64())).await;
}

/// Sends a request; `http2`: the client speaks HTTP/2.
///
/// # Errors
/// There is no response.
pub async fn send(
    worker: &Worker,
    cluster: &Cluster,
    wanted: &Wanted,
    outgoing: Outgoing,
    http2: bool,
    entry: &mut Entry,
) -> Result<(Response<Incoming>, Lease), Failure> {
    let http2 = match cluster.spec().protocol {
        Protocol::Http1 => false,
        Protocol::Http2 => true,
        Protocol::SameAsClient => http2,
    };
    let Outgoing { mut head, body } = outgoing;
    let own = OwnPolicy::take(&mut head.headers);
    let mut request = Request::new(body);
    *request.uri_mut() = target(&head, http2).map_err(|_| Failure::Filter)?;
    *request.method_mut() = head.method;
    *request.headers_mut() = head.headers;
    if http2 {
        *request.version_mut() = ::http::Version::HTTP_2;
        request.headers_mut().remove(::http::header::CONNECTION);
        request.headers_mut().remove(::http::header::UPGRADE);
    }
    if let Some(authority) = head.authority.filter(|_| !http2 || request.uri().authority().is_none()) {
        request.headers_mut().insert(HOST, authority);
    }
    let mut sending = std::pin::pin!(attempts(worker, cluster, wanted, request, http2, own.retries, entry));
    match own.timeout {
        Some(timeout) => tokio::time::timeout(timeout, sending.as_mut()).await.unwrap_or(Err(Failure::Timeout)),
        None => sending.await,
    }
}

async fn attempts(
    worker: &Worker,
    cluster: &Cluster,
    wanted: &Wanted,
    mut request: Request<RequestBody>,
    http2: bool,
    retries: u32,
    entry: &mut Entry,
) -> Result<(Response<Incoming>, Lease), Failure> {
    let mut tried = Vec::new();
    let mut retry = 0;
    loop {
        let endpoint = choose(worker, cluster, wanted, &tried).await.map_err(Failure::Choose)?;
        request.headers_mut().insert(ATTEMPT_COUNT, HeaderValue::from(retry + 1));
        match http::send(cluster, &endpoint, request, http2).await {
            Ok((response, lease)) => {
                entry.upstream = Some(lease.address.to_string());
                return Ok((response, lease));
            }
            Err(SendError::Reset { error, address }) => {
                entry.upstream = Some(address.to_string());
                return Err(Failure::Reset(error));
            }
            Err(SendError::Connect(error, address, unsent)) => {
                entry.upstream = address.map(|address| address.to_string());
                if retry >= retries {
                    return Err(Failure::Connect(error, retry));
                }
                request = *unsent;
            }
        }
        tried.push(endpoint);
        retry += 1;
        back_off(retry).await;
    }
}

/// Opens a connection for a tunnel.
///
/// # Errors
/// There is none.
pub async fn connect(
    worker: &Worker,
    cluster: &Cluster,
    wanted: &Wanted,
    entry: &mut Entry,
) -> Result<(Stream, Active), Failure> {
    let endpoint = choose(worker, cluster, wanted, &[]).await.map_err(Failure::Choose)?;
    entry.upstream = endpoint.address().map(ToString::to_string);
    let active = endpoint.begin();
    let (stream, address) = cluster.connect(&endpoint).await.map_err(|error| Failure::Connect(error, 0))?;
    entry.upstream = Some(address.to_string());
    Ok((stream, active))
}

/// What an application, or the filter, asks of the router by Envoy's headers; they do not go on to the upstream.
struct OwnPolicy {
    timeout: Option<Duration>,
    retries: u32,
}

impl OwnPolicy {
    fn take(headers: &mut HeaderMap) -> Self {
        if !headers.keys().any(|name| name.as_str().starts_with("x-envoy-")) {
            return Self { timeout: None, retries: RETRIES };
        }
        let mut number = |name: &str| {
            let value = headers.remove(name)?;
            value.to_str().ok()?.parse::<u32>().ok()
        };
        let timeout = number("x-envoy-upstream-rq-timeout-ms").filter(|ms| *ms > 0);
        let retries = number("x-envoy-max-retries").unwrap_or(RETRIES).min(10);
        for name in [
            "x-envoy-upstream-rq-per-try-timeout-ms",
            "x-envoy-upstream-rq-timeout-alt-response",
            "x-envoy-retry-on",
            "x-envoy-retry-grpc-on",
            "x-envoy-retriable-status-codes",
            "x-envoy-retriable-header-names",
            "x-envoy-hedge-on-per-try-timeout",
        ] {
            headers.remove(name);
        }
        if let Some(ms) = timeout {
            headers.insert("x-envoy-expected-rq-timeout-ms", HeaderValue::from(ms));
        }
        Self { timeout: timeout.map(|ms| Duration::from_millis(ms.into())), retries }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_applications_timeout_is_taken_and_announced() {
        let mut headers = HeaderMap::new();
        headers.insert("x-envoy-upstream-rq-timeout-ms", HeaderValue::from_static("250"));
        headers.insert("x-envoy-retry-on", HeaderValue::from_static("5xx"));
        let own = OwnPolicy::take(&mut headers);
        assert_eq!((own.timeout, own.retries), (Some(Duration::from_millis(250)), RETRIES));
        assert_eq!(headers.len(), 1);
        assert_eq!(headers["x-envoy-expected-rq-timeout-ms"], "250");
    }
}
