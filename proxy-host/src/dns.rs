//! Resolution of names, by the system's `resolv.conf` and hosts file.

use std::{cell::RefCell, collections::HashMap, net::IpAddr, time::Instant};

use hickory_resolver::{TokioResolver, config::LookupIpStrategy};

use crate::upstream::cluster::Family;

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
pub struct Resolver(RefCell<HashMap<Family, TokioResolver>>);

impl Resolver {
    /// The addresses of a name.
    ///
    /// # Errors
    /// There are none, or nobody could say.
    pub async fn lookup(&self, name: &str, family: Family) -> Result<Answer, ResolveError> {
        let resolver = self.of(family)?;
        let found = resolver.lookup_ip(name).await.map_err(|e| ResolveError::Lookup(e.to_string()))?;
        Ok(Answer { addresses: found.iter().collect(), valid_until: found.valid_until() })
    }

    fn of(&self, family: Family) -> Result<TokioResolver, ResolveError> {
        if let Some(resolver) = self.0.borrow().get(&family) {
            return Ok(resolver.clone());
        }
        let unusable = |e: hickory_resolver::net::NetError| ResolveError::Configuration(e.to_string());
        let mut builder = TokioResolver::builder_tokio().map_err(unusable)?;
        builder.options_mut().ip_strategy = match family {
            Family::V4 => LookupIpStrategy::Ipv4Only,
            Family::V6 => LookupIpStrategy::Ipv6Only,
            Family::Auto => LookupIpStrategy::Ipv6thenIpv4,
            Family::V4Preferred => LookupIpStrategy::Ipv4thenIpv6,
            Family::All => LookupIpStrategy::Ipv4AndIpv6,
        };
        let resolver = builder.build().map_err(unusable)?;
        self.0.borrow_mut().insert(family, resolver.clone());
        Ok(resolver)
    }
}
