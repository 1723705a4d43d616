//! HTTP connections to endpoints: kept open, reused, and replaced once when a kept one turns out to be closed.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    rc::{Rc, Weak},
    time::{Duration, Instant},
};

use ::http::{Request, Response, Version};
use bytes::Bytes;
use h2::client::SendRequest;
use http_body::Body as _;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::sync::Notify;

use super::{
    Active, Apart, Cluster, Endpoint,
    answer::{Answer, Broken},
    breakers::{Overflow, Taken},
    cluster::Address,
    connect::ConnectError,
    http2, options,
};
use crate::{body::RequestBody, exec, headers, replay::Held, router::Deadline, stats};

/// Connections of one endpoint that carry nothing right now, and its HTTP/2 connection.
#[derive(Default)]
pub struct Pool {
    idle: RefCell<Vec<Idle>>,
    /// Connections that are open, in use or not.
    open: Cell<u32>,
    /// Told when one becomes free, or ends.
    freed: Notify,
    http2: RefCell<Option<Shared>>,
}

struct Idle {
    sender: http1::SendRequest<RequestBody>,
    address: Address,
    /// What the connection is for, where that matters.
    apart: Option<Rc<Apart>>,
    /// Requests that it may still carry.
    left: u32,
    since: Instant,
}

#[derive(Clone)]
struct Shared {
    sender: SendRequest<Bytes>,
    /// It has ended.
    closed: Rc<Cell<bool>>,
    address: Address,
    apart: Option<Rc<Apart>>,
    left: Rc<Cell<u32>>,
    used: Rc<Cell<Instant>>,
}

impl Pool {
    /// Drops connections that are closed or have been idle for too long.
    pub fn sweep(&self, now: Instant, idle: Option<Duration>) {
        let old = |since: Instant| idle.is_some_and(|idle| now.saturating_duration_since(since) >= idle);
        let over = |apart: &Option<Rc<Apart>>| apart.as_ref().is_some_and(|apart| apart.is_over());
        self.idle.borrow_mut().retain(|c| !c.sender.is_closed() && !old(c.since) && !over(&c.apart));
        let mut http2 = self.http2.borrow_mut();
        // Its requests, if there are any, go on.
        if http2.as_ref().is_some_and(|shared| shared.closed.get() || old(shared.used.get())) {
            *http2 = None;
        }
    }

    /// Whether nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.idle.borrow().is_empty() && self.http2.borrow().is_none()
    }
}

/// The body of a response, and what it came over. In a box, as it goes a long way.
pub struct Carried {
    /// The body.
    pub body: Answer,
    /// When it has to be through.
    pub deadline: Option<Deadline>,
    lease: Option<Lease>,
}

/// A connection that is in use.
struct Lease {
    endpoint: Rc<Endpoint>,
    sender: Option<http1::SendRequest<RequestBody>>,
    apart: Option<Rc<Apart>>,
    left: u32,
    address: Address,
    _active: Active,
    _request: Option<Taken>,
}

impl Carried {
    /// The address that answered, while the connection is in use.
    #[must_use]
    pub fn address(&self) -> Option<&Address> {
        self.lease.as_ref().map(|lease| &lease.address)
    }

    /// Whether the connection is in use.
    #[must_use]
    pub fn is_leased(&self) -> bool {
        self.lease.is_some()
    }

    /// Leaves the connection, for nobody to use again.
    pub fn leave(&mut self) {
        self.lease = None;
    }

    /// The body has been read to its end: the connection is there for the next request.
    pub fn finish(&mut self) {
        let Some(mut lease) = self.lease.take() else { return };
        if let Some(sender) = lease.sender.take().filter(|sender| !sender.is_closed() && lease.left > 0) {
            let (address, apart) = (lease.address.clone(), lease.apart.take());
            let idle = Idle { sender, address, apart, left: lease.left, since: Instant::now() };
            lease.endpoint.pool.idle.borrow_mut().push(idle);
            lease.endpoint.pool.freed.notify_one();
        }
    }
}

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No connection; the request was not sent and may go elsewhere.
    #[error("{0}")]
    Connect(#[source] ConnectError, Option<Address>),
    /// There are as many requests as there may be.
    #[error("overflow")]
    Overflow,
    /// There was no response in time.
    #[error("upstream request timeout")]
    Timeout(Address),
    /// The connection ended before the response's headers, or what came was not HTTP.
    #[error("{error}")]
    Reset {
        /// Why.
        error: Broken,
        /// Who was asked.
        address: Address,
    },
}

/// The time for a response's head, from the end of the request's body on.
pub type Limit = (Duration, Option<Rc<Held>>);

async fn in_time<T>(limit: Option<&Limit>, sending: impl Future<Output = T>) -> Option<T> {
    let Some((time, body)) = limit else { return Some(sending.await) };
    let over = async {
        if let Some(body) = body {
            body.ended().await;
        }
        tokio::time::sleep(*time).await;
    };
    tokio::select! {
        biased;
        sent = sending => Some(sent),
        () = over => None,
    }
}

/// Sends the request over a kept or a new connection. It is taken, unless nothing of it was sent.
///
/// # Errors
/// See [`SendError`].
pub async fn send(
    cluster: &Cluster,
    endpoint: &Rc<Endpoint>,
    request: &mut Option<Request<RequestBody>>,
    http2: bool,
    apart: Option<&Rc<Apart>>,
    limit: Option<Limit>,
) -> Result<Response<Box<Carried>>, SendError> {
    let spec = cluster.spec();
    let Ok(counted) = spec.shared.request(&spec.options.limits) else {
        stats::here(|stats| stats.upstream_overflows.add(1));
        return Err(SendError::Overflow);
    };
    let active = endpoint.begin();
    loop {
        let Checked { mut sender, address, apart, left, kept } = match checkout(cluster, endpoint, http2, apart).await {
            Ok(found) => found,
            Err(error) => return Err(SendError::Connect(error, endpoint.address().cloned())),
        };
        let sent = match &limit {
            None => sender.send(request).await,
            limit => {
                let sent = Box::pin(in_time(limit.as_ref(), sender.send(request))).await;
                sent.ok_or_else(|| SendError::Timeout(address.clone()))?
            }
        };
        match sent {
            Ok(response) => {
                let sender = match sender {
                    Sender::Http1(_)
                        if headers::is_ambiguous(response.headers(), response.body().size_hint().exact().is_some()) =>
                    {
                        return Err(SendError::Reset { error: Broken::Ambiguous, address });
                    }
                    // To a server that once answered so hyper would speak HTTP/1.0 from now on.
                    Sender::Http1(sender) => (response.version() != Version::HTTP_10).then_some(sender),
                    Sender::Http2(_) => None,
                };
                let lease = Lease {
                    endpoint: endpoint.clone(),
                    sender,
                    apart,
                    left,
                    address,
                    _active: active,
                    _request: counted,
                };
                return Ok(response.map(|body| Box::new(Carried { body, deadline: None, lease: Some(lease) })));
            }
            // The far end closed a kept connection while it was idle: nothing of the request has left.
            Err(_) if kept && request.is_some() => {}
            Err(error) => {
                *request = None;
                return Err(SendError::Reset { error, address });
            }
        }
    }
}

enum Sender {
    Http1(http1::SendRequest<RequestBody>),
    Http2(SendRequest<Bytes>),
}

impl Sender {
    /// Leaves the request where it is if nothing of it was sent.
    async fn send(&mut self, place: &mut Option<Request<RequestBody>>) -> Result<Response<Answer>, Broken> {
        // Who calls has one.
        let request = place.take().unwrap_or_default();
        match self {
            Self::Http1(sender) => match sender.try_send_request(request).await {
                Ok(response) => Ok(response.map(Answer::Http1)),
                Err(mut failure) => {
                    *place = failure.take_message();
                    Err(failure.into_error().into())
                }
            },
            Self::Http2(sender) => Ok(http2::send(sender, request).await?.map(Answer::Http2)),
        }
    }
}

/// A sender that is ready.
struct Checked {
    sender: Sender,
    address: Address,
    apart: Option<Rc<Apart>>,
    /// Requests that the connection may carry after this one.
    left: u32,
    /// It had been used before.
    kept: bool,
}

async fn checkout(
    cluster: &Cluster,
    endpoint: &Rc<Endpoint>,
    http2: bool,
    apart: Option<&Rc<Apart>>,
) -> Result<Checked, ConnectError> {
    if let Some(kept) = reuse(cluster, endpoint, http2, apart).await {
        return Ok(kept);
    }
    // Opening one is rare: its state must not weigh on each request.
    let limits = cluster.spec().options.limits;
    if limits.connections.is_some() || limits.pending.is_some() {
        return Box::pin(wait(cluster, endpoint, http2, apart)).await;
    }
    Box::pin(open(cluster, endpoint, http2, apart)).await
}

/// A connection of those that are kept.
async fn reuse(cluster: &Cluster, endpoint: &Rc<Endpoint>, http2: bool, apart: Option<&Rc<Apart>>) -> Option<Checked> {
    if http2 {
        let kept = endpoint.pool.http2.borrow().clone();
        let Shared { sender, closed: _, address, apart: its, left, used } = kept?;
        if its.as_ref() != apart || left.get() == 0 {
            return None;
        }
        let sender = sender.ready().await.ok()?;
        left.set(left.get().saturating_sub(1));
        used.set(Instant::now());
        return Some(Checked { sender: Sender::Http2(sender), address, apart: its, left: left.get(), kept: true });
    }
    loop {
        let kept = {
            let mut idle = endpoint.pool.idle.borrow_mut();
            match apart {
                None => idle.pop(),
                Some(_) => idle.iter().rposition(|c| c.apart.as_ref() == apart).map(|at| idle.swap_remove(at)),
            }
        };
        let Idle { mut sender, address, apart, left, since } = kept?;
        // Where the time is short, looking for old ones now and then is not enough.
        let short = cluster.spec().options.idle.filter(|idle| *idle < options::IDLE);
        if short.is_some_and(|idle| since.elapsed() >= idle) {
            continue;
        }
        if !sender.is_closed() && sender.ready().await.is_ok() {
            return Some(Checked { sender: Sender::Http1(sender), address, apart, left: left - 1, kept: true });
        }
    }
}

/// Opens a connection where there may be one more, else waits for one that becomes free.
async fn wait(
    cluster: &Cluster,
    endpoint: &Rc<Endpoint>,
    http2: bool,
    apart: Option<&Rc<Apart>>,
) -> Result<Checked, ConnectError> {
    let spec = cluster.spec();
    let overflow = || {
        stats::here(|stats| stats.upstream_overflows.add(1));
        ConnectError::Overflow
    };
    let _waiting = spec.shared.waiting(&spec.options.limits).map_err(|Overflow| overflow())?;
    loop {
        match open(cluster, endpoint, http2, apart).await {
            Err(ConnectError::Overflow) => {}
            opened => return opened,
        }
        endpoint.pool.freed.notified().await;
        if let Some(kept) = reuse(cluster, endpoint, http2, apart).await {
            return Ok(kept);
        }
    }
}

/// Requests that a new connection may carry after its first.
fn most(cluster: &Cluster) -> u32 {
    cluster.spec().options.requests_per_connection.map_or(u32::MAX, |most| most - 1)
}

/// Counts a connection as one of its pool; and whether its end makes room for another one.
///
/// The endpoint owns the pool, and the pool the connection: this must not be a circle.
struct Open(Weak<Endpoint>, bool);

impl Drop for Open {
    fn drop(&mut self) {
        let Some(endpoint) = self.0.upgrade() else { return };
        endpoint.pool.open.set(endpoint.pool.open.get().saturating_sub(1));
        if self.1 {
            endpoint.pool.freed.notify_one();
        }
    }
}

async fn open(
    cluster: &Cluster,
    endpoint: &Rc<Endpoint>,
    http2: bool,
    apart: Option<&Rc<Apart>>,
) -> Result<Checked, ConnectError> {
    // Each endpoint may have one on each worker, or its requests would wait for ever.
    let first = endpoint.pool.open.get() == 0;
    endpoint.pool.open.set(endpoint.pool.open.get() + 1);
    let mut open = Open(Rc::downgrade(endpoint), true);
    let (stream, address) =
        cluster.connect_for(endpoint, apart.map(|apart| &**apart), first).await.inspect_err(|error| {
            // By a connection that there may not be none becomes free.
            open.1 = !matches!(error, ConnectError::Overflow);
        })?;
    let (apart, left) = (apart.cloned(), most(cluster));
    let sender = if http2 {
        let (sender, connection) = http2::handshake(stream).await.map_err(broken)?;
        let closed = Rc::new(Cell::new(false));
        let ended = closed.clone();
        exec::spawn(async move {
            // Its requests report how it ended.
            let _ = connection.await;
            ended.set(true);
            drop(open);
        });
        *endpoint.pool.http2.borrow_mut() = Some(Shared {
            sender: sender.clone(),
            closed,
            address: address.clone(),
            apart: apart.clone(),
            left: Rc::new(Cell::new(left)),
            used: Rc::new(Cell::new(Instant::now())),
        });
        Sender::Http2(sender)
    } else {
        let (sender, connection) = http1::Builder::new().handshake(TokioIo::new(stream)).await.map_err(broken)?;
        exec::spawn(async move {
            // Its requests report how it ended.
            let _ = connection.with_upgrades().await;
            drop(open);
        });
        Sender::Http1(sender)
    };
    Ok(Checked { sender, address, apart, left, kept: false })
}

fn broken(error: impl std::error::Error + Send + Sync + 'static) -> ConnectError {
    ConnectError::Io(std::io::Error::other(error))
}
