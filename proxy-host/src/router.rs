//! From a cluster to a response: an endpoint is chosen, connected to and asked, within the time that the request has,
//! and another one is asked where the request's policy says so.

mod failure;
mod policy;

use std::{future::Future, pin::Pin, rc::Rc, sync::Arc};

use ::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header::HOST};
use hyper::body::Incoming;

use self::policy::{Ended, back_off};
pub use self::{
    failure::{Failure, Tries},
    policy::{Policy, delay},
};
use crate::{
    access_log::Entry,
    body::{Received, RequestBody},
    flags,
    listener::{guard::Control, http::target},
    replay::Held,
    stats,
    upstream::{
        Active, ChooseError, Cluster, Endpoint, Wanted,
        cluster::Protocol,
        connect::Stream,
        http::{self, Lease, SendError},
    },
    vm::RequestHead,
    worker::Worker,
};

/// Attempts to find an endpoint that has not been tried (Istio's `hostSelectionRetryMaxAttempts`).
const SELECTIONS: u32 = 5;

const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");

/// Ends when the time for a request has passed.
pub type Deadline = Pin<Box<dyn Future<Output = ()>>>;

/// A request whose way is decided.
pub struct Outgoing {
    /// Headers, as the filter left them.
    pub head: RequestHead,
    /// The client's body.
    pub body: Incoming,
    /// Counts the body's bytes.
    pub received: Rc<Received>,
    /// It is a gRPC call.
    pub grpc: bool,
    /// Who waits for a 100 of the upstream's.
    pub expects: Option<Arc<Control>>,
}

/// A response, and what there is to know of it.
pub struct Answered {
    /// The upstream's.
    pub response: Response<Incoming>,
    /// What it came over.
    pub lease: Lease,
    /// When it has to be through.
    pub deadline: Option<Deadline>,
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

/// The request, for one attempt after another.
enum Source {
    /// Gone with the first attempt that sends it.
    Once(Option<Request<RequestBody>>),
    /// Made anew for each attempt.
    Held { method: Method, uri: Uri, version: Version, headers: HeaderMap, body: Rc<Held> },
}

impl Source {
    fn next(&mut self) -> Option<Request<RequestBody>> {
        match self {
            Self::Once(request) => request.take(),
            Self::Held { method, uri, version, headers, body } => {
                let mut request = Request::new(RequestBody::Held(body.read()));
                *request.method_mut() = method.clone();
                *request.uri_mut() = uri.clone();
                *request.version_mut() = *version;
                *request.headers_mut() = headers.clone();
                Some(request)
            }
        }
    }

    /// Whether there can be another attempt.
    fn is_left(&self) -> bool {
        match self {
            Self::Once(request) => request.is_some(),
            Self::Held { body, .. } => body.is_whole(),
        }
    }

    fn body(&self) -> Option<&Rc<Held>> {
        match self {
            Self::Once(_) => None,
            Self::Held { body, .. } => Some(body),
        }
    }
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
) -> Result<Answered, Failure> {
    let http2 = match cluster.spec().protocol {
        Protocol::Http1 => false,
        Protocol::Http2 => true,
        Protocol::SameAsClient => http2,
    };
    let Outgoing { mut head, body, received, grpc, expects } = outgoing;
    if http2 && let Some(control) = &expects {
        // hyper does not say what an HTTP/2 server said before its answer.
        control.go_on();
    }
    let policy = Policy::take(&mut head.headers, grpc);
    let uri = target(&head, http2).map_err(|_| Failure::Filter)?;
    let mut headers = head.headers;
    if http2 {
        headers.remove(::http::header::CONNECTION);
        headers.remove(::http::header::UPGRADE);
    }
    if let Some(authority) = head.authority.filter(|_| !http2 || uri.authority().is_none()) {
        headers.insert(HOST, authority);
    }
    let version = if http2 { Version::HTTP_2 } else { Version::HTTP_11 };
    if policy.repeats || policy.timeout.is_some() {
        let body = Held::new(body, received);
        let source = Source::Held { method: head.method, uri, version, headers, body };
        // Rare, and its state must not weigh on each request.
        return Box::pin(within(worker, cluster, wanted, source, http2, policy, entry, expects)).await;
    }
    let mut request = Request::new(RequestBody::new(body, received));
    *request.method_mut() = head.method;
    *request.uri_mut() = uri;
    *request.version_mut() = version;
    *request.headers_mut() = headers;
    let source = Source::Once(Some(request));
    let mut tries = Tries::default();
    let (response, lease) =
        attempts(worker, cluster, wanted, source, http2, policy, entry, &mut tries, expects).await?;
    Ok(Answered { response, lease, deadline: None })
}

/// The same, with a time limit where the policy has one: it begins at the end of the request.
#[allow(clippy::too_many_arguments, reason = "each is one thing that an attempt goes by")]
async fn within(
    worker: &Worker,
    cluster: &Cluster,
    wanted: &Wanted,
    source: Source,
    http2: bool,
    policy: Policy,
    entry: &mut Entry,
    expects: Option<Arc<Control>>,
) -> Result<Answered, Failure> {
    let no_content = policy.no_content;
    let mut deadline: Option<Deadline> = policy.timeout.map(|timeout| {
        let body = source.body().cloned();
        let wait: Deadline = Box::pin(async move {
            if let Some(body) = body {
                body.ended().await;
            }
            tokio::time::sleep(timeout).await;
        });
        wait
    });
    let mut tries = Tries::default();
    let ended = {
        let sending = attempts(worker, cluster, wanted, source, http2, policy, entry, &mut tries, expects);
        match &mut deadline {
            None => Some(sending.await),
            Some(deadline) => tokio::select! {
                biased;
                ended = sending => Some(ended),
                () = deadline.as_mut() => None,
            },
        }
    };
    match ended {
        Some(Ok((response, lease))) => Ok(Answered { response, lease, deadline }),
        Some(Err(failure)) => Err(failure),
        None => {
            stats::here(|stats| stats.upstream_request_timeouts.add(1));
            Err(Failure::Timeout { attempt: false, no_content, tries })
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "each is one thing that an attempt goes by")]
async fn attempts(
    worker: &Worker,
    cluster: &Cluster,
    wanted: &Wanted,
    mut source: Source,
    http2: bool,
    mut policy: Policy,
    entry: &mut Entry,
    tries: &mut Tries,
    expects: Option<Arc<Control>>,
) -> Result<(Response<Incoming>, Lease), Failure> {
    let mut tried = Vec::new();
    let mut retry = 0;
    loop {
        let endpoint = choose(worker, cluster, wanted, &tried).await.map_err(Failure::Choose)?;
        let Some(mut request) = source.next() else { return Err(Failure::Filter) };
        request.headers_mut().insert(ATTEMPT_COUNT, HeaderValue::from(retry + 1));
        if let Some(control) = expects.clone() {
            hyper::ext::on_informational(&mut request, move |said| {
                if said.status() == StatusCode::CONTINUE {
                    control.go_on();
                }
            });
        }
        let begun = retry > 0 && policy.timeout.is_some();
        if begun {
            policy.announce(request.headers_mut(), entry.elapsed());
        }
        let limit = policy.per_try.map(|time| (time, source.body().cloned()));
        let (failure, again): (_, bool) =
            match http::send(cluster, &endpoint, request, http2, cluster.host_of(wanted), limit).await {
                Ok((response, lease)) => {
                    entry.upstream = Some(lease.address.to_string());
                    if !policy.rejects(&response) {
                        return Ok((response, lease));
                    }
                    if !may_retry(&mut policy, &source, tries) {
                        entry.flags = flags::join(entry.flags, tries.flag);
                        return Ok((response, lease));
                    }
                    (None, true)
                }
                Err(SendError::Reset { error, address }) => {
                    entry.upstream = Some(address.to_string());
                    let ended = if http::is_refused(&error) { Ended::Refused } else { Ended::Reset };
                    let again = policy.retries_after(ended, true) && may_retry(&mut policy, &source, tries);
                    (Some(Failure::Reset(error, *tries)), again)
                }
                Err(SendError::Timeout(address)) => {
                    entry.upstream = Some(address.to_string());
                    stats::here(|stats| stats.upstream_try_timeouts.add(1));
                    let again = policy.retries_after(Ended::Timeout, true) && may_retry(&mut policy, &source, tries);
                    let no_content = policy.no_content;
                    (Some(Failure::Timeout { attempt: true, no_content, tries: *tries }), again)
                }
                Err(SendError::Connect(error, address, unsent)) => {
                    entry.upstream = address.map(|address| address.to_string());
                    if let Source::Once(request) = &mut source {
                        *request = Some(*unsent);
                    }
                    let again = policy.retries_after(Ended::Connect, false) && may_retry(&mut policy, &source, tries);
                    (Some(Failure::Connect(error, *tries)), again)
                }
            };
        match failure {
            Some(failure) if !again => return Err(failure),
            _ => {}
        }
        tried.push(endpoint);
        retry += 1;
        tries.retried = true;
        back_off(retry).await;
    }
}

/// Takes one of the retries that are left, or notes why there is none.
fn may_retry(policy: &mut Policy, source: &Source, tries: &mut Tries) -> bool {
    if !source.is_left() {
        return false;
    }
    if policy.retries == 0 {
        stats::here(|stats| stats.upstream_retries_exceeded.add(1));
        tries.flag = "URX";
        return false;
    }
    policy.retries -= 1;
    stats::here(|stats| stats.upstream_retries.add(1));
    true
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
    let connected = cluster.connect(&endpoint).await;
    let (stream, address) = connected.map_err(|error| Failure::Connect(error, Tries::default()))?;
    entry.upstream = Some(address.to_string());
    Ok((stream, active))
}
