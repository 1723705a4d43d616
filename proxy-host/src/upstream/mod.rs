//! The way out: clusters, their endpoints, and the connections kept to them. All of it belongs to one thread.

pub mod answer;
pub mod balance;
pub mod breakers;
pub mod cluster;
pub mod connect;
pub mod hash;
pub mod health;
pub mod http;
pub mod http2;
pub mod options;
pub mod proxy_protocol;
pub mod tls;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    dns::{ResolveError, Resolver},
    filter::Connection,
    stats,
};
use balance::{Balancer, Rules, Weighted};
use cluster::{Address, Discovery, Family, Spec};
use connect::{ConnectError, Stream};
use health::{Health, Outcome};

/// A cluster whose names are resolved: each endpoint has the addresses to try, in order.
pub type Resolved = Spec<Vec<Address>>;

/// Where the client wanted to go; what some clusters go by.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Address that the client dialled, on captured connections.
    pub destination: Option<SocketAddr>,
    /// Host that the client named.
    pub host: Option<String>,
    /// Port that the client named.
    pub port: Option<u16>,
    /// What keeps requests together.
    pub hash: Option<u64>,
    /// Who wants it, where it is a client.
    pub client: Option<Rc<Connection>>,
}

/// What a connection is for, where that keeps it apart from others of its endpoint.
#[derive(Debug, Default)]
pub struct Apart {
    /// The host that is asked for.
    host: Option<String>,
    /// The client's ends, where the upstream is told.
    client: Option<proxy_protocol::Ends>,
    /// Ends with the client's connection.
    life: Weak<Connection>,
}

impl PartialEq for Apart {
    fn eq(&self, other: &Self) -> bool {
        (&self.host, self.client) == (&other.host, other.client)
    }
}

impl Apart {
    /// Nobody will ask for such a connection again.
    fn is_over(&self) -> bool {
        self.client.is_some() && self.life.strong_count() == 0
    }
}

/// Why a cluster has nowhere to go.
#[derive(Debug, thiserror::Error)]
pub enum ChooseError {
    /// The cluster has no endpoint (Envoy's flag UH).
    #[error("no healthy upstream")]
    NoEndpoint,
    /// The host could not be resolved (Envoy's flag DF).
    #[error("dns resolution failure: {0}")]
    Resolve(#[from] ResolveError),
}

/// A cluster as one thread sees it.
pub struct Cluster {
    spec: Arc<Resolved>,
    endpoints: Vec<Rc<Endpoint>>,
    balancer: RefCell<Rc<Balancer<Endpoint>>>,
    /// The version of the shared state that the balancer knows, and when the next endpoint comes back.
    known: Cell<(u64, Option<u64>)>,
    tls: tls::Connector,
    /// Endpoints of clusters that go wherever the client says.
    dialled: RefCell<HashMap<Vec<Address>, Rc<Endpoint>>>,
}

/// An endpoint with the connections that are kept to it.
pub struct Endpoint {
    addresses: Vec<Address>,
    weight: u32,
    priority: u32,
    locality: (usize, u32),
    active: Cell<u32>,
    pool: http::Pool,
    /// Where endpoints that fail are left out, or new ones begin with less.
    health: Option<Arc<Health>>,
}

impl Weighted for Endpoint {
    fn active(&self) -> u32 {
        self.active.get()
    }
    fn weight(&self) -> u32 {
        self.weight
    }
    fn priority(&self) -> u32 {
        self.priority
    }
    fn locality(&self) -> (usize, u32) {
        self.locality
    }
    fn key(&self) -> String {
        self.addresses.first().map(ToString::to_string).unwrap_or_default()
    }
    fn age(&self) -> Duration {
        self.health.as_ref().map_or(Duration::MAX, |health| health.age())
    }
}

/// What one worker has to do with one endpoint.
#[derive(Debug, Clone)]
pub struct EndpointReport {
    /// Name of the cluster.
    pub cluster: String,
    /// The endpoint's addresses.
    pub addresses: Vec<Address>,
    /// Requests and connections in progress.
    pub active: u32,
    /// Share within its locality.
    pub weight: u32,
    /// 0 is used first.
    pub priority: u32,
}

/// Counts a request or connection as in progress for as long as it lives.
pub struct Active(Rc<Endpoint>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get().saturating_sub(1));
    }
}

impl Endpoint {
    fn new(addresses: Vec<Address>, weight: u32, priority: u32, locality: (usize, u32)) -> Self {
        let (active, pool) = (Cell::new(0), http::Pool::default());
        Self { addresses, weight, priority, locality, active, pool, health: None }
    }

    /// Counts one more in progress.
    #[must_use]
    pub fn begin(self: &Rc<Self>) -> Active {
        self.active.set(self.active.get() + 1);
        Active(self.clone())
    }

    /// The address to show in logs before a connection is open.
    #[must_use]
    pub fn address(&self) -> Option<&Address> {
        self.addresses.first()
    }
}

impl Cluster {
    /// The cluster; endpoints that `before` had keep their connections.
    #[must_use]
    pub fn new(spec: Arc<Resolved>, before: Option<&Cluster>) -> Self {
        let mut old: HashMap<&[Address], Vec<&Rc<Endpoint>>> = HashMap::new();
        if let Some(before) =
            before.filter(|before| before.spec.protocol == spec.protocol && before.spec.options == spec.options)
        {
            for endpoint in &before.endpoints {
                old.entry(&endpoint.addresses).or_default().push(endpoint);
            }
        }
        let endpoints: Vec<_> = match &spec.discovery {
            Discovery::Endpoints(list) => list
                .iter()
                .map(|new| match old.get_mut(new.at.as_slice()).and_then(Vec::pop) {
                    Some(kept)
                        if (kept.weight, kept.priority, kept.locality) == (new.weight, new.priority, new.locality) =>
                    {
                        kept.clone()
                    }
                    _ => {
                        let known = spec.options.ejection.is_some() || spec.options.warmup.is_some();
                        let health = known.then(|| spec.shared.host(&new.at));
                        let new = Endpoint::new(new.at.clone(), new.weight, new.priority, new.locality);
                        Rc::new(Endpoint { health, ..new })
                    }
                })
                .collect(),
            Discovery::OriginalDst { .. } | Discovery::DynamicForwardProxy { .. } => Vec::new(),
        };
        let dialled = match before {
            Some(before) if before.spec.discovery == spec.discovery && before.spec.options == spec.options => {
                before.dialled.take()
            }
            _ => HashMap::new(),
        };
        let cluster = Self {
            balancer: RefCell::new(Rc::new(Balancer::new(rules(&spec), &[], |_| true))),
            known: Cell::default(),
            spec,
            endpoints,
            tls: tls::Connector::default(),
            dialled: RefCell::new(dialled),
        };
        cluster.look();
        cluster
    }

    /// Makes the balancer anew, with what is known of the endpoints now.
    fn look(&self) {
        let version = self.spec.shared.version();
        let now = if self.spec.options.ejection.is_some() { self.spec.shared.now() } else { 0 };
        let well = |endpoint: &Endpoint| endpoint.health.as_ref().is_none_or(|health| !health.is_ejected(now));
        let healths = self.endpoints.iter().filter_map(|endpoint| endpoint.health.as_ref());
        let back = healths.filter_map(|health| health.back_at(now)).min();
        *self.balancer.borrow_mut() = Rc::new(Balancer::new(rules(&self.spec), &self.endpoints, well));
        self.known.set((version, back));
    }

    /// The endpoints of other priorities than those that were tried, after every second attempt (Envoy's
    /// `previous_priorities`); `None` where the usual choice holds.
    #[must_use]
    pub fn elsewhere(&self, tried: &[Rc<Endpoint>]) -> Option<Balancer<Endpoint>> {
        let counted = tried.len() / 2 * 2;
        let left_out: Vec<u32> = tried.get(..counted)?.iter().map(|endpoint| endpoint.priority).collect();
        let now = if self.spec.options.ejection.is_some() { self.spec.shared.now() } else { 0 };
        let well = |endpoint: &Endpoint| endpoint.health.as_ref().is_none_or(|health| !health.is_ejected(now));
        let others = self.endpoints.iter().filter(|endpoint| !left_out.contains(&endpoint.priority));
        let others: Vec<Rc<Endpoint>> = others.cloned().collect();
        let usable = counted > 0 && others.iter().any(|endpoint| well(endpoint));
        usable.then(|| Balancer::new(rules(&self.spec), &others, well))
    }

    fn pick(&self, hash: Option<(u64, u32)>) -> Option<Rc<Endpoint>> {
        if self.spec.options.ejection.is_some() {
            let (version, back) = self.known.get();
            if version != self.spec.shared.version() || back.is_some_and(|back| self.spec.shared.now() >= back) {
                self.look();
            }
        }
        self.balancer.borrow().pick(hash)
    }

    /// Takes note of how a request or connection went, where endpoints that fail are left out.
    pub fn note(&self, endpoint: &Endpoint, outcome: Outcome) {
        if let (Some(rules), Some(health)) = (&self.spec.options.ejection, &endpoint.health) {
            self.spec.shared.note(rules, health, self.endpoints.len(), outcome);
        }
    }

    /// What the cluster was made of.
    #[must_use]
    pub fn spec(&self) -> &Resolved {
        &self.spec
    }

    /// What this thread has to do with each endpoint right now.
    #[must_use]
    pub fn report(&self) -> Vec<EndpointReport> {
        let dialled = self.dialled.borrow();
        let endpoints = self.endpoints.iter().chain(dialled.values());
        endpoints
            .map(|endpoint| EndpointReport {
                cluster: self.spec.name.clone(),
                addresses: endpoint.addresses.clone(),
                active: endpoint.active.get(),
                weight: endpoint.weight,
                priority: endpoint.priority,
            })
            .collect()
    }

    /// The endpoint for one connection or request.
    ///
    /// # Errors
    /// Where there is none.
    pub async fn choose(&self, wanted: &Wanted, resolver: &Resolver) -> Result<Rc<Endpoint>, ChooseError> {
        self.choose_again(wanted, resolver, 0).await
    }

    /// The same, where an endpoint was chosen `attempt` times before and shall be another one.
    ///
    /// # Errors
    /// Where there is none.
    pub async fn choose_again(
        &self,
        wanted: &Wanted,
        resolver: &Resolver,
        attempt: u32,
    ) -> Result<Rc<Endpoint>, ChooseError> {
        match &self.spec.discovery {
            Discovery::Endpoints(_) => {
                self.pick(wanted.hash.map(|hash| (hash, attempt))).ok_or(ChooseError::NoEndpoint)
            }
            Discovery::OriginalDst { port } => {
                let mut address = wanted.destination.ok_or(ChooseError::NoEndpoint)?;
                if let Some(port) = port {
                    address.set_port(*port);
                }
                Ok(self.dial(vec![Address::Ip(address)]))
            }
            Discovery::DynamicForwardProxy { port } => {
                let host = wanted.host.as_deref().filter(|h| !h.is_empty()).ok_or(ChooseError::NoEndpoint)?;
                let port = port.or(wanted.port).or(wanted.destination.map(|d| d.port())).unwrap_or(80);
                let ips = match host.trim_matches(['[', ']']).parse() {
                    Ok(ip) => vec![ip],
                    Err(_) => Box::pin(resolver.lookup(host, Family::V4Preferred)).await?.addresses,
                };
                if ips.is_empty() {
                    return Err(ChooseError::NoEndpoint);
                }
                Ok(self.dial(ips.into_iter().map(|ip| Address::Ip(SocketAddr::new(ip, port))).collect()))
            }
        }
    }

    fn dial(&self, addresses: Vec<Address>) -> Rc<Endpoint> {
        let mut dialled = self.dialled.borrow_mut();
        (dialled.entry(addresses))
            .or_insert_with_key(|addresses| Rc::new(Endpoint::new(addresses.clone(), 1, 0, (0, 1))))
            .clone()
    }

    /// Opens a connection for a TCP stream, or for a CONNECT request to this host.
    ///
    /// # Errors
    /// The endpoint refuses or does not answer in time.
    pub async fn connect(
        &self,
        endpoint: &Endpoint,
        wanted: &Wanted,
        host: Option<String>,
    ) -> Result<(Stream, Address), ConnectError> {
        let apart = Apart { host, client: self.told(wanted), ..Apart::default() };
        let connected = self.connect_for(endpoint, Some(&apart), false).await;
        match &connected {
            Ok(_) => self.note(endpoint, Outcome::Connected),
            Err(ConnectError::Overflow) => stats::here(|stats| stats.upstream_overflows.add(1)),
            Err(_) => self.note(endpoint, Outcome::Broken),
        }
        connected
    }

    /// Opens a connection for such requests; `first`: it may, whatever the limit.
    ///
    /// # Errors
    /// As [`Cluster::connect`].
    pub async fn connect_for(
        &self,
        endpoint: &Endpoint,
        apart: Option<&Apart>,
        first: bool,
    ) -> Result<(Stream, Address), ConnectError> {
        connect::connect(&endpoint.addresses, &self.spec, &self.tls, apart, first).await
    }

    /// What connections have to be kept apart by, where they do.
    #[must_use]
    pub fn apart(&self, wanted: &Wanted) -> Option<Rc<Apart>> {
        let options = &self.spec.options;
        if options.tls.is_none() && options.proxy.is_none() {
            return None;
        }
        let by_host = options.tls.as_ref().is_some_and(|tls| tls.name_of_host || tls.certified_host);
        // One that is missing is one that no certificate has.
        let host = by_host.then(|| wanted.host.clone().unwrap_or_default());
        let client = self.told(wanted);
        if host.is_none() && client.is_none() {
            return None;
        }
        let life = wanted.client.as_ref().map(Rc::downgrade).unwrap_or_default();
        Some(Rc::new(Apart { host, client, life }))
    }

    /// The client's ends, where the upstream is told.
    fn told(&self, wanted: &Wanted) -> Option<proxy_protocol::Ends> {
        self.spec.options.proxy?;
        wanted.client.as_ref().map(|client| (client.source, client.destination))
    }

    /// Closes connections that nobody has used for long, and forgets dialled endpoints without any.
    pub fn sweep(&self, now: Instant) {
        for endpoint in &self.endpoints {
            endpoint.pool.sweep(now, self.spec.options.idle);
        }
        self.dialled.borrow_mut().retain(|_, endpoint| {
            endpoint.pool.sweep(now, self.spec.options.idle);
            Rc::strong_count(endpoint) > 1 || !endpoint.pool.is_empty()
        });
    }
}

fn rules(spec: &Resolved) -> Rules {
    let (panic, warmup) = (spec.options.panic, spec.options.warmup);
    Rules { policy: spec.policy, localities: spec.weighted_localities, panic, warmup }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::{Policy, Protocol};

    fn spec(discovery: Discovery<Vec<Address>>) -> Arc<Resolved> {
        Arc::new(Spec {
            name: "c".into(),
            connect_timeout: Duration::from_secs(1),
            discovery,
            policy: Policy::RoundRobin,
            weighted_localities: false,
            protocol: Protocol::Http1,
            options: options::Options::default(),
            shared: health::Shared::default(),
            dns: None,
        })
    }

    fn at(addresses: &[&str]) -> Discovery<Vec<Address>> {
        Discovery::Endpoints(
            (addresses.iter())
                .map(|a| cluster::Endpoint {
                    at: vec![Address::Ip(a.parse().unwrap())],
                    weight: 1,
                    priority: 0,
                    locality: (0, 0),
                })
                .collect(),
        )
    }

    #[test]
    fn an_update_keeps_the_endpoints_that_stay() {
        let before = Cluster::new(spec(at(&["1.1.1.1:1", "2.2.2.2:2", "2.2.2.2:2"])), None);
        let after = Cluster::new(spec(at(&["2.2.2.2:2", "3.3.3.3:3"])), Some(&before));
        assert!(before.endpoints[1..].iter().any(|e| Rc::ptr_eq(e, &after.endpoints[0])));
        assert_eq!(after.endpoints.len(), 2);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn original_destination_takes_the_port_override() {
        let resolver = Resolver::default();
        let cluster = Cluster::new(spec(Discovery::OriginalDst { port: Some(8080) }), None);
        let wanted = Wanted { destination: Some("9.9.9.9:80".parse().unwrap()), ..Wanted::default() };
        let endpoint = cluster.choose(&wanted, &resolver).await.unwrap();
        assert_eq!(endpoint.addresses, [Address::Ip("9.9.9.9:8080".parse().unwrap())]);
        assert!(matches!(cluster.choose(&Wanted::default(), &resolver).await, Err(ChooseError::NoEndpoint)));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_forward_proxy_prefers_its_own_port_then_the_one_asked_for_then_the_one_dialled() {
        let resolver = Resolver::default();
        let mut wanted = Wanted { host: Some("[::1]".into()), ..Wanted::default() };
        let mut seen = Vec::new();
        let any = Cluster::new(spec(Discovery::DynamicForwardProxy { port: None }), None);
        let fixed = Cluster::new(spec(Discovery::DynamicForwardProxy { port: Some(7) }), None);
        seen.push(any.choose(&wanted, &resolver).await.unwrap().addresses[0].to_string());
        wanted.destination = Some("9.9.9.9:443".parse().unwrap());
        seen.push(any.choose(&wanted, &resolver).await.unwrap().addresses[0].to_string());
        wanted.port = Some(8443);
        seen.push(any.choose(&wanted, &resolver).await.unwrap().addresses[0].to_string());
        seen.push(fixed.choose(&wanted, &resolver).await.unwrap().addresses[0].to_string());
        assert_eq!(seen, ["[::1]:80", "[::1]:443", "[::1]:8443", "[::1]:7"]);
    }
}
