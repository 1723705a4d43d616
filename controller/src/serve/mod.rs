//! The controller's gRPC services, for a listener of any kind: TCP, or a pipe within the process.

pub mod admin;
mod discovery;
mod listeners;
mod parts;
pub mod peer;
mod registry;
pub mod sessions;
pub mod tcp;
pub mod webhook;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use portolan_proto::envoy::envoy::service::cluster::v3::cluster_discovery_service_server::ClusterDiscoveryServiceServer;
use portolan_proto::envoy::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use portolan_proto::v1;
use portolan_proto::v1::registry_server::RegistryServer;
use tonic::service::Routes;

use self::sessions::Sessions;
use crate::model::{Role, Scope};
use crate::publish::Publisher;

/// What was served, since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Registry streams that are open.
    pub subscribers: AtomicU64,
    /// Registry updates sent, each to one subscriber.
    pub updates: AtomicU64,
    /// Pages in them.
    pub pages: AtomicU64,
    /// Their size in bytes, as messages.
    pub bytes: AtomicU64,
    /// Registry updates refused.
    pub nacks: AtomicU64,
    /// Discovery streams that are open.
    pub discovery_streams: AtomicU64,
    /// Resources sent by discovery.
    pub resources: AtomicU64,
    /// Discovery responses refused.
    pub discovery_nacks: AtomicU64,
    /// Subscribers refused because of who they are.
    pub denied: AtomicU64,
    /// The streams that are open.
    pub sessions: Sessions,
    /// The admission webhook's.
    pub webhook: webhook::Counters,
}

impl Counters {
    fn add(counter: &AtomicU64, by: usize) {
        counter.fetch_add(by as u64, Ordering::Relaxed);
    }

    /// All counters with their names.
    pub fn all(&self) -> [(&'static str, u64); 9] {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        [
            ("subscribers", read(&self.subscribers)),
            ("updates", read(&self.updates)),
            ("pages", read(&self.pages)),
            ("bytes", read(&self.bytes)),
            ("nacks", read(&self.nacks)),
            ("discovery_streams", read(&self.discovery_streams)),
            ("resources", read(&self.resources)),
            ("discovery_nacks", read(&self.discovery_nacks)),
            ("denied", read(&self.denied)),
        ]
    }
}

/// Counts an open stream for as long as it lives.
struct Open(Arc<Counters>, fn(&Counters) -> &AtomicU64);

impl Open {
    fn new(counters: Arc<Counters>, which: fn(&Counters) -> &AtomicU64) -> Self {
        which(&counters).fetch_add(1, Ordering::Relaxed);
        Open(counters, which)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Ordering::Relaxed);
    }
}

/// The services: `portolan.v1.Registry`, and delta discovery, aggregated and of clusters alone.
pub fn router(publisher: Publisher, counters: Arc<Counters>) -> Routes {
    let registry = RegistryServer::new(registry::Service::new(publisher.clone(), counters.clone()));
    let discovery = discovery::Service::new(publisher, counters);
    Routes::new(registry)
        .add_service(ClusterDiscoveryServiceServer::new(discovery.clone()))
        .add_service(AggregatedDiscoveryServiceServer::new(discovery))
}

/// The scope that a subscriber names.
fn scope(scope: v1::Scope) -> Scope {
    let role = if scope.role() == v1::Role::Gateway { Role::Gateway } else { Role::Sidecar };
    let labels: BTreeMap<_, _> = scope.labels.into_iter().collect();
    Scope {
        namespace: scope.namespace,
        labels,
        role,
        ips: scope.ips,
        locality: scope.locality,
        dns_capture: scope.dns_capture,
    }
}
