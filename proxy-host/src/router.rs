//! From a cluster to a response: an endpoint is chosen, connected to and asked, within the time that the request has,
//! and another one is asked where the request's policy says so.

mod failure;
mod mirror;
mod policy;

use std::{future::Future, pin::Pin, rc::Rc, sync::Arc};

use ::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header::HOST};
use hyper::body::{Body as _, Incoming};

use self::policy::{Ended, back_off};
pub use self::{
    failure::{Failure, Tries, cut},
    policy::{Policy, abort, delay, has_fault},
};
use crate::{
    access_log::Entry,
    body::{Received, RequestBody},
    flags,
    headers::{self, Orders, Retries, X_REQUEST_ID},
    listener::{guard::Control, http::target},
    replay::Held,
    stats,
    upstream::{
        Active, ChooseError, Cluster, Endpoint, Wanted,
        breakers::{Overflow, Taken},
        cluster::Protocol,
        connect::{ConnectError, Stream},
        health::Outcome,
        http::{self, Carried, SendError},
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
pub struct Outgoing<'r> {
    /// Headers, as the filter left them; they are taken.
    pub head: &'r mut RequestHead,
    /// The client's body.
    pub body: Incoming,
    /// Counts the body's bytes.
    pub received: &'r Rc<Received>,
    /// It is a gRPC call.
    pub grpc: bool,
    /// Who waits for a 100 of the upstream's.
    pub expects: Option<Arc<Control>>,
    /// The client speaks HTTP/2.
    pub client: bool,
}

/// An endpoint, and not one of those tried before where another can be found.
async fn choose(
    worker: &Worker,
    cluster: &Cluster,
    wanted: &Wanted,
    tried: &[Rc<Endpoint>],
    manner: Retries,
) -> Result<Rc<Endpoint>, ChooseError> {
    let fresh = |endpoint: &Rc<Endpoint>| manner.same_hosts || !tried.iter().any(|before| Rc::ptr_eq(before, endpoint));
    if let Some(balancer) = manner.remote.then(|| cluster.elsewhere(tried)).flatten() {
        let picks = (0..SELECTIONS).filter_map(|attempt| balancer.pick(wanted.hash.map(|hash| (hash, attempt))));
        let mut last = None;
        for endpoint in picks {
            if fresh(&endpoint) {
                return Ok(endpoint);
            }
            last = Some(endpoint);
        }
        return last.ok_or(ChooseError::NoEndpoint);
    }
    let mut endpoint = cluster.choose(wanted, &worker.resolver).await?;
    for attempt in 1..SELECTIONS {
        if fresh(&endpoint) {
            break;
        }
        endpoint = cluster.choose_again(wanted, &worker.resolver, attempt).await?;
    }
    Ok(endpoint)
}

/// The request, for one attempt after another.
struct Source {
    /// For the next attempt, which takes it when it sends it.
    request: Option<Request<RequestBody>>,
    again: Option<Box<Again>>,
}

/// What a request is made of anew.
struct Again {
    method: Method,
    uri: Uri,
    version: Version,
    headers: HeaderMap,
    /// `None`: there is none.
    body: Option<Rc<Held>>,
}

impl Again {
    fn of(request: &Request<RequestBody>, body: Option<Rc<Held>>) -> Box<Self> {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        Box::new(Self { method, uri, version: request.version(), headers: request.headers().clone(), body })
    }

    fn make(&self) -> Request<RequestBody> {
        let body = self.body.as_ref().map_or_else(RequestBody::default, |body| RequestBody::Held(body.read()));
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = self.version;
        *request.headers_mut() = self.headers.clone();
        request
    }
}

impl Source {
    /// Has a request for an attempt after the first, where there can be one.
    fn renew(&mut self) {
        if let Some(again) = &self.again {
            self.request = Some(again.make());
        }
    }

    /// Whether there can be another attempt.
    fn is_left(&self) -> bool {
        match &self.again {
            None => self.request.is_some(),
            Some(again) => again.body.as_ref().is_none_or(|body| body.is_whole()),
        }
    }

    fn body(&self) -> Option<&Rc<Held>> {
        self.again.as_ref()?.body.as_ref()
    }
}

/// Whether a cluster is spoken to in HTTP/2; `client`: the client speaks it.
fn speaks_http2(cluster: &Cluster, client: bool) -> bool {
    match cluster.spec().protocol {
        Protocol::Http1 => false,
        Protocol::Http2 => true,
        Protocol::SameAsClient => client,
    }
}

/// A request towards an upstream of either version; takes the headers.
fn towards(head: &mut RequestHead, http2: bool, body: RequestBody) -> Result<Request<RequestBody>, Failure> {
    let uri = target(head, http2).map_err(|_| Failure::Filter)?;
    let mut request = Request::new(body);
    *request.method_mut() = std::mem::take(&mut head.method);
    let headers = request.headers_mut();
    *headers = std::mem::take(&mut head.headers);
    if http2 {
        headers::for_http2(headers);
        if let Some(id) = headers.get_mut(X_REQUEST_ID) {
            // It is never the same again: to compress it would compare it with all that went before, for nothing.
            id.set_sensitive(true);
        }
    }
    if let Some(authority) = head.authority.take().filter(|_| !http2 || uri.authority().is_none()) {
        headers.insert(HOST, authority);
    }
    *request.uri_mut() = uri;
    if http2 {
        *request.version_mut() = Version::HTTP_2;
    }
    Ok(request)
}

/// Sends a request.
///
/// # Errors
/// There is no response.
pub async fn send(
    worker: &Rc<Worker>,
    cluster: &Cluster,
    wanted: &Wanted,
    outgoing: Outgoing<'_>,
    entry: &mut Entry,
) -> Result<Response<Box<Carried>>, Failure> {
    let Outgoing { head, body, received, grpc, expects, client } = outgoing;
    let http2 = speaks_http2(cluster, client);
    if http2 && let Some(control) = &expects {
        // What an HTTP/2 server says before its answer is not looked at.
        control.go_on();
    }
    if !http2 {
        let length = if body.is_end_stream() { Some(0) } else { body.size_hint().exact() };
        headers::frame(&mut head.headers, &head.method, length);
    }
    let Orders { mirrors, retries } = headers::take_orders(&mut head.headers);
    let mut policy = Policy::take(&mut head.headers, grpc, retries);
    let way = Way { worker, cluster, wanted, http2, expects };
    // A server of HTTP/2 may refuse a stream, as it does at its own end.
    let repeats = policy.repeats || http2 && !body.is_end_stream();
    if repeats || policy.timeout.is_some() || !mirrors.is_empty() {
        let body = Held::new(body, received.clone());
        for mirror in mirrors {
            mirror::start(worker, mirror, head.clone(), &body, client, policy.timeout);
        }
        let request = towards(head, http2, RequestBody::Held(body.read()))?;
        let again = Again::of(&request, Some(body));
        let mut source = Source { request: Some(request), again: Some(again) };
        // Rare, and its state must not weigh on each request.
        return Box::pin(async move { way.within(&mut source, &mut policy, entry).await }).await;
    }
    let mut source = if http2 {
        received.end();
        let request = towards(head, http2, RequestBody::default())?;
        let again = Again::of(&request, None);
        Source { request: Some(request), again: Some(again) }
    } else {
        let request = towards(head, http2, RequestBody::new(body, received.clone()))?;
        Source { request: Some(request), again: None }
    };
    way.attempts(&mut source, &mut policy, entry, &mut Progress::default()).await
}

/// Where a request goes.
struct Way<'w> {
    worker: &'w Worker,
    cluster: &'w Cluster,
    wanted: &'w Wanted,
    http2: bool,
    expects: Option<Arc<Control>>,
}

/// How far a request has come.
#[derive(Default)]
struct Progress {
    tries: Tries,
    /// The endpoint that is being asked.
    endpoint: Option<Rc<Endpoint>>,
    /// Counts as a retry.
    retry: Option<Taken>,
}

impl Way<'_> {
    /// All attempts, with a time limit where the policy has one: it begins at the end of the request.
    async fn within(
        &self,
        source: &mut Source,
        policy: &mut Policy,
        entry: &mut Entry,
    ) -> Result<Response<Box<Carried>>, Failure> {
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
        let mut progress = Progress::default();
        let ended = {
            let sending = self.attempts(source, policy, entry, &mut progress);
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
            Some(answered) => {
                let mut answered = answered?;
                answered.body_mut().deadline = deadline;
                Ok(answered)
            }
            None => {
                stats::here(|stats| stats.upstream_request_timeouts.add(1));
                if let Some(endpoint) = &progress.endpoint {
                    self.cluster.note(endpoint, Outcome::Late);
                }
                Err(Failure::Timeout { attempt: false, no_content, tries: progress.tries })
            }
        }
    }

    async fn attempts(
        &self,
        source: &mut Source,
        policy: &mut Policy,
        entry: &mut Entry,
        progress: &mut Progress,
    ) -> Result<Response<Box<Carried>>, Failure> {
        let mut tried = Vec::new();
        let mut retry = 0;
        let apart = self.cluster.apart(self.wanted);
        loop {
            let chosen = choose(self.worker, self.cluster, self.wanted, &tried, policy.manner).await;
            let endpoint = progress.endpoint.insert(chosen.map_err(Failure::Choose)?).clone();
            entry.upstream = endpoint.address().cloned();
            let limit = policy.per_try.map(|time| (time, source.body().cloned()));
            let Some(request) = &mut source.request else { return Err(Failure::Filter) };
            request.headers_mut().insert(ATTEMPT_COUNT, HeaderValue::from(retry + 1));
            if let Some(control) = self.expects.clone().filter(|_| !self.http2) {
                hyper::ext::on_informational(request, move |said| {
                    if said.status() == StatusCode::CONTINUE {
                        control.go_on();
                    }
                });
            }
            if retry > 0 && policy.timeout.is_some() {
                policy.announce(request.headers_mut(), entry.elapsed());
            }
            let unsent = &mut source.request;
            let failure = match http::send(self.cluster, &endpoint, unsent, self.http2, apart.as_ref(), limit).await {
                Ok(response) => {
                    entry.upstream = response.body().address().cloned();
                    self.cluster.note(&endpoint, Outcome::Status(response.status().as_u16()));
                    if !policy.rejects(&response) {
                        return Ok(response);
                    }
                    if !self.may_retry(policy, source, progress) {
                        entry.flags = flags::join(entry.flags, progress.tries.flag);
                        return Ok(response);
                    }
                    None
                }
                Err(error) => self.failed(error, &endpoint, source, policy, entry, progress),
            };
            if let Some(failure) = failure {
                return Err(failure);
            }
            tried.push(endpoint);
            retry += 1;
            progress.tries.retried = true;
            source.renew();
            back_off(retry, policy.manner.base_ms).await;
        }
    }

    /// What an attempt without a response comes to; `None`: there is another one.
    fn failed(
        &self,
        error: SendError,
        endpoint: &Endpoint,
        source: &Source,
        policy: &mut Policy,
        entry: &mut Entry,
        progress: &mut Progress,
    ) -> Option<Failure> {
        let mut again = |source: &Source, ended, begun| {
            policy.retries_after(ended, begun) && self.may_retry(policy, source, progress)
        };
        match error {
            SendError::Reset { error, address } => {
                entry.upstream = Some(address);
                // Where the client's body broke off, the upstream is not to blame.
                if !error.is_user() {
                    self.cluster.note(endpoint, Outcome::Broken);
                }
                let ended = if error.is_refused() { Ended::Refused } else { Ended::Reset };
                (!again(source, ended, true)).then(|| Failure::Reset(error, progress.tries))
            }
            SendError::Timeout(address) => {
                entry.upstream = Some(address);
                self.cluster.note(endpoint, Outcome::Late);
                stats::here(|stats| stats.upstream_try_timeouts.add(1));
                let over = !again(source, Ended::Timeout, true);
                let (no_content, tries) = (policy.no_content, progress.tries);
                over.then_some(Failure::Timeout { attempt: true, no_content, tries })
            }
            // What is too much already is not tried again.
            SendError::Overflow => Some(Failure::Overflow(progress.tries)),
            SendError::Connect(error, address) => {
                entry.upstream = address;
                if let ConnectError::Overflow = error {
                    return Some(Failure::Overflow(progress.tries));
                }
                self.cluster.note(endpoint, Outcome::Broken);
                (!again(source, Ended::Connect, false)).then(|| Failure::Connect(error, progress.tries))
            }
        }
    }

    /// Takes one of the retries that are left, or notes why there is none.
    fn may_retry(&self, policy: &mut Policy, source: &Source, progress: &mut Progress) -> bool {
        if !source.is_left() {
            return false;
        }
        if policy.retries == 0 {
            stats::here(|stats| stats.upstream_retries_exceeded.add(1));
            progress.tries.flag = "URX";
            return false;
        }
        policy.retries -= 1;
        progress.retry = None;
        let spec = self.cluster.spec();
        match spec.shared.retry(&spec.options.limits) {
            Ok(taken) => progress.retry = taken,
            Err(Overflow) => {
                stats::here(|stats| stats.upstream_overflows.add(1));
                progress.tries.flag = "UO";
                return false;
            }
        }
        stats::here(|stats| stats.upstream_retries.add(1));
        true
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
    let endpoint = choose(worker, cluster, wanted, &[], Retries::default()).await.map_err(Failure::Choose)?;
    entry.upstream = endpoint.address().cloned();
    let active = endpoint.begin();
    let connected = cluster.connect(&endpoint, wanted, Some(wanted.host.clone().unwrap_or_default())).await;
    let (stream, address) = connected.map_err(|error| match error {
        ConnectError::Overflow => Failure::Overflow(Tries::default()),
        error => Failure::Connect(error, Tries::default()),
    })?;
    entry.upstream = Some(address);
    Ok((stream, active))
}
