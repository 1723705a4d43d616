//! Resolution of names, by the system's `resolv.conf` and hosts file.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use hickory_resolver::{
    TokioResolver,
    config::{LookupIpStrategy, NameServerConfig, ResolverConfig},
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
    proto::op::ResponseCode,
};

use crate::upstream::cluster::Family;

/// How long a lookup may take in all; less than a request waits for its cluster, so that it hears why.
const LOOKUP: Duration = Duration::from_secs(4);

/// Why a name has no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The system's configuration cannot be used.
    #[error("resolv.conf: {0}")]
    Configuration(String),
    /// The name server said no, or nothing.
    #[error("{0}")]
    Lookup(String),
}

/// What a name resolves to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The addresses, in the order of the answer.
    pub addresses: Vec<IpAddr>,
    /// When it has to be asked again.
    pub valid_until: Instant,
}

/// A resolver with its cache (answers live as long as their TTL says). It belongs to one thread.
#[derive(Default)]
pub struct Resolver {
    /// In place of those in `resolv.conf`; none: those.
    servers: Vec<SocketAddr>,
    by_family: RefCell<HashMap<Family, TokioResolver>>,
}

impl Resolver {
    /// Asks these name servers; where there are none, those of `resolv.conf`.
    #[must_use]
    pub fn new(servers: &[SocketAddr]) -> Self {
        Self { servers: servers.to_vec(), by_family: RefCell::default() }
    }

    /// The addresses of a name; none where a name server says that there are none.
    ///
    /// # Errors
    /// Nobody could say, or not in time.
    pub async fn lookup(&self, name: &str, family: Family) -> Result<Answer, ResolveError> {
        let resolver = self.of(family)?;
        let found = tokio::time::timeout(LOOKUP, resolver.lookup_ip(name)).await;
        let late = |_| ResolveError::Lookup(format!("no name server answered in {} s", LOOKUP.as_secs()));
        match found.map_err(late)? {
            Ok(found) => Ok(Answer {
                // ::ffff:1.2.3.4 is 1.2.3.4.
                addresses: found.iter().map(|ip| ip.to_canonical()).collect(),
                valid_until: found.valid_until(),
            }),
            // As with Envoy, this is an answer.
            Err(error) if is_answer(&error) => Ok(Answer { addresses: Vec::new(), valid_until: Instant::now() }),
            Err(error) => Err(ResolveError::Lookup(error.to_string())),
        }
    }

    fn of(&self, family: Family) -> Result<TokioResolver, ResolveError> {
        if let Some(resolver) = self.by_family.borrow().get(&family) {
            return Ok(resolver.clone());
        }
        let unusable = |e: NetError| ResolveError::Configuration(e.to_string());
        let mut builder = if self.servers.is_empty() {
            TokioResolver::builder_tokio().map_err(unusable)?
        } else {
            let servers = self.servers.iter().map(|server| {
                let mut config = NameServerConfig::udp_and_tcp(server.ip());
                config.connections.iter_mut().for_each(|connection| connection.port = server.port());
                config
            });
            let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
            let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
            // As resolv.conf would have to be told; the whole has to fit into the time of a lookup.
            builder.options_mut().timeout = LOOKUP / 4;
            builder
        };
        builder.options_mut().ip_strategy = match family {
            Family::V4 => LookupIpStrategy::Ipv4Only,
            Family::V6 => LookupIpStrategy::Ipv6Only,
            Family::Auto => LookupIpStrategy::Ipv6thenIpv4,
            Family::V4Preferred => LookupIpStrategy::Ipv4thenIpv6,
            Family::All => LookupIpStrategy::Ipv4AndIpv6,
        };
        let resolver = builder.build().map_err(unusable)?;
        self.by_family.borrow_mut().insert(family, resolver.clone());
        Ok(resolver)
    }
}

/// Whether a name server has said that there is no such name, or no address of that family.
fn is_answer(error: &NetError) -> bool {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(none)) => {
            matches!(none.response_code, ResponseCode::NXDomain | ResponseCode::NoError)
        }
        _ => false,
    }
}
