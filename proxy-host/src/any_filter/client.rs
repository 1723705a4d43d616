//! The way out of a filter's proxy: connections to the upstream and to the clusters that the filter calls.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use http::{Method, Request, Response, Version};
use hyper::{
    body::{Body as _, Incoming},
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;

use super::body::Body;
use crate::{
    exec::{self, LocalExec},
    flags, headers,
};

/// Envoy's default for a cluster.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that nobody uses are closed after this time (Envoy's default).
const IDLE: Duration = Duration::from_secs(3600);

/// Whether a request of this method that has no body says so in HTTP/1.1 (Envoy's codec).
#[must_use]
pub fn tells_no_body(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::DELETE | Method::TRACE | Method::CONNECT)
}

/// Why there is no response; statuses, texts and flags are those of Envoy's router.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// No address, or a name that does not resolve.
    #[error("no healthy upstream")]
    NoEndpoint,
    /// No connection.
    #[error("upstream connect error or disconnect/reset before headers. reset reason: remote connection failure")]
    Connect(std::io::Error),
    /// No connection in time.
    #[error("upstream connect error or disconnect/reset before headers. reset reason: connection timeout")]
    ConnectTimeout,
    /// The connection ended before the response, or what came was not HTTP.
    #[error("upstream connect error or disconnect/reset before headers. reset reason: {}", reset_reason(.0))]
    Reset(hyper::Error),
    /// The response says twice how long it is.
    #[error("upstream connect error or disconnect/reset before headers. reset reason: protocol error")]
    Ambiguous,
    /// The headers that the filter left make no request.
    #[error("upstream connect error or disconnect/reset before headers. reset reason: protocol error")]
    Request,
    /// No response in time.
    #[error("upstream request timeout")]
    Timeout,
    /// Nothing has moved for too long.
    #[error("stream timeout")]
    Idle {
        /// The client had said all.
        whole: bool,
    },
}

fn reset_reason(error: &hyper::Error) -> &'static str {
    if error.is_parse() { "protocol error" } else { "connection termination" }
}

impl Failure {
    /// Status for the client.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::Reset(error) if error.is_parse() => 502,
            Self::Ambiguous => 502,
            Self::Idle { whole: false } => 408,
            Self::Timeout | Self::Idle { whole: true } => 504,
            _ => 503,
        }
    }

    /// Envoy's response flag: its number in `response.flags`, and its name.
    #[must_use]
    pub fn flag(&self) -> (i64, &'static str) {
        match self {
            Self::NoEndpoint => (0x2, "UH"),
            Self::Timeout => (0x4, "UT"),
            Self::Idle { .. } => (0x1_0000, "SI"),
            Self::Connect(_) | Self::ConnectTimeout => (0x20, "UF"),
            Self::Reset(error) if error.is_parse() => (0x80_0000, "UPE"),
            Self::Ambiguous => (0x80_0000, "UPE"),
            Self::Reset(_) => (0x40, "UC"),
            Self::Request => (0, "-"),
        }
    }

    /// Response code details.
    #[must_use]
    pub fn details(&self) -> String {
        match self {
            Self::NoEndpoint => "no_healthy_upstream".into(),
            Self::Timeout => "response_timeout".into(),
            Self::Idle { .. } => "stream_idle_timeout".into(),
            Self::Connect(error) => {
                let text = error.to_string();
                let text = text.split_once(" (os error").map_or(&*text, |(text, _)| text).replace(' ', "_");
                format!(
                    "upstream_reset_before_response_started{{remote_connection_failure|delayed_connect_error:_{text}}}"
                )
            }
            Self::ConnectTimeout => "upstream_reset_before_response_started{connection_timeout}".into(),
            Self::Reset(error) => {
                format!("upstream_reset_before_response_started{{{}}}", reset_reason(error).replace(' ', "_"))
            }
            Self::Request | Self::Ambiguous => "upstream_reset_before_response_started{protocol_error}".into(),
        }
    }
}

/// The names of response flags that are given as a bit set.
#[must_use]
pub fn flag_names(bits: i64) -> &'static str {
    let known = [
        (0x2, "UH"),
        (0x4, "UT"),
        (0x10, "UR"),
        (0x20, "UF"),
        (0x40, "UC"),
        (0x100, "NR"),
        (0x4000, "DC"),
        (0x8000, "URX"),
        (0x1_0000, "SI"),
        (0x4_0000, "DPE"),
        (0x80_0000, "UPE"),
        (0x1000_0000, "DR"),
    ];
    known.iter().filter(|(bit, _)| bits & bit != 0).fold("", |names, (_, name)| flags::join(names, name))
}

/// Where something is: an address, or a name that is resolved for each new connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: u16,
}

impl std::str::FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an address; write HOST:PORT, 127.0.0.1:8080 or [::1]:8080");
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self { host: address.ip().to_string(), port: address.port() });
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| wrong())?;
        if host.is_empty() || host.contains([':', '/', ' ', '[', ']']) {
            return Err(wrong());
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// An upstream as one thread sees it.
pub struct Cluster {
    /// Its name.
    pub name: String,
    address: Address,
    idle: RefCell<Vec<(http1::SendRequest<Body>, Peers, Instant)>>,
    http2: RefCell<Option<(http2::SendRequest<Body>, Peers)>>,
}

/// Both ends of a connection to an upstream.
#[derive(Debug, Clone, Copy)]
pub struct Peers {
    /// The upstream.
    pub remote: SocketAddr,
    /// This end.
    pub local: SocketAddr,
}

/// A response, and what it came over. The connection is kept when the lease is finished.
pub struct Answer {
    /// Head and body.
    pub response: Response<Incoming>,
    /// To be given back.
    pub lease: Lease,
}

/// A connection in use.
pub struct Lease {
    cluster: Rc<Cluster>,
    sender: Option<http1::SendRequest<Body>>,
    /// Where it leads.
    pub peers: Peers,
}

impl Lease {
    /// Puts the connection back, once the response has been read to its end.
    pub fn finish(mut self) {
        if let Some(sender) = self.sender.take().filter(|sender| !sender.is_closed()) {
            self.cluster.idle.borrow_mut().push((sender, self.peers, Instant::now()));
        }
    }
}

impl Cluster {
    /// A cluster of this name at this address.
    #[must_use]
    pub fn new(name: String, address: Address) -> Self {
        Self { name, address, idle: RefCell::default(), http2: RefCell::default() }
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// There is none.
    pub async fn connect(&self) -> Result<(TcpStream, Peers), Failure> {
        let attempt = async {
            let addresses = tokio::net::lookup_host((self.address.host.as_str(), self.address.port)).await;
            let mut last = Failure::NoEndpoint;
            for address in addresses.map_err(|_| Failure::NoEndpoint)? {
                let opened = async {
                    let stream = TcpStream::connect(address).await?;
                    // Only costs latency where it cannot be set.
                    let _ = stream.set_nodelay(true);
                    let local = stream.local_addr()?;
                    Ok((stream, Peers { remote: address, local }))
                };
                match opened.await {
                    Ok(connected) => return Ok(connected),
                    Err(error) => last = Failure::Connect(error),
                }
            }
            Err(last)
        };
        tokio::time::timeout(CONNECT_TIMEOUT, attempt).await.unwrap_or(Err(Failure::ConnectTimeout))
    }

    /// Sends a request over a kept or a new connection.
    ///
    /// # Errors
    /// There is no response.
    pub async fn send(self: &Rc<Self>, mut request: Request<Body>, http2: bool) -> Result<Answer, Failure> {
        if http2 {
            *request.version_mut() = Version::HTTP_2;
        }
        loop {
            let (mut sender, peers, kept) = self.checkout(http2).await?;
            let sent = match &mut sender {
                Sender::Http1(sender) => sender.try_send_request(request).await,
                Sender::Http2(sender) => sender.try_send_request(request).await,
            };
            match sent {
                Ok(response) => {
                    let known = response.body().size_hint().exact().is_some();
                    let sender = match sender {
                        Sender::Http1(_) if headers::is_ambiguous(response.headers(), known) => {
                            return Err(Failure::Ambiguous);
                        }
                        // To a server that once answered so hyper would speak HTTP/1.0 from now on.
                        Sender::Http1(sender) => (response.version() != Version::HTTP_10).then_some(sender),
                        Sender::Http2(_) => None,
                    };
                    return Ok(Answer { response, lease: Lease { cluster: self.clone(), sender, peers } });
                }
                Err(mut failure) => match failure.take_message() {
                    // The far end closed a kept connection while it was idle: nothing of the request has left.
                    Some(unsent) if kept => {
                        if http2 {
                            self.http2.borrow_mut().take();
                        }
                        request = unsent;
                    }
                    _ => return Err(Failure::Reset(failure.into_error())),
                },
            }
        }
    }

    async fn checkout(&self, http2: bool) -> Result<(Sender, Peers, bool), Failure> {
        if http2 {
            let kept = self.http2.borrow().clone();
            if let Some((mut sender, peers)) = kept
                && sender.ready().await.is_ok()
            {
                return Ok((Sender::Http2(sender), peers, true));
            }
            let (stream, peers) = self.connect().await?;
            let mut builder = http2::Builder::new(LocalExec);
            builder.timer(TokioTimer::new());
            let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(Failure::Reset)?;
            exec::spawn(async move {
                // Its requests report how it ended.
                let _ = connection.await;
            });
            *self.http2.borrow_mut() = Some((sender.clone(), peers));
            return Ok((Sender::Http2(sender), peers, false));
        }
        loop {
            let kept = self.idle.borrow_mut().pop();
            let Some((mut sender, peers, since)) = kept else { break };
            if since.elapsed() < IDLE && !sender.is_closed() && sender.ready().await.is_ok() {
                return Ok((Sender::Http1(sender), peers, true));
            }
        }
        let (stream, peers) = self.connect().await?;
        let (sender, connection) =
            http1::Builder::new().handshake(TokioIo::new(stream)).await.map_err(Failure::Reset)?;
        exec::spawn(async move {
            // Its requests report how it ended.
            let _ = connection.await;
        });
        Ok((Sender::Http1(sender), peers, false))
    }
}

enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

/// The clusters of one thread, by name.
#[derive(Default)]
pub struct Clusters(HashMap<String, Rc<Cluster>>);

impl Clusters {
    /// Clusters of these names and addresses.
    #[must_use]
    pub fn new(named: &[(String, Address)]) -> Self {
        let cluster =
            |(name, address): &(String, Address)| (name.clone(), Rc::new(Cluster::new(name.clone(), address.clone())));
        Self(named.iter().map(cluster).collect())
    }

    /// The cluster of a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Rc<Cluster>> {
        self.0.get(name).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hosts_with_ports() {
        for (text, shown) in
            [("127.0.0.1:80", "127.0.0.1:80"), ("[::1]:80", "[::1]:80"), ("a.example:1", "a.example:1")]
        {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
        for text in ["", "a", ":80", "a:b", "::1:80", "http://a:80", "a:99999"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
