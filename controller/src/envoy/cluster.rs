//! Clusters as Envoy needs them beyond what every host does.

use portolan_proto::envoy::envoy::config::cluster::v3::Cluster;
use portolan_proto::envoy::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, DiscoveryType, DnsLookupFamily,
};
use portolan_proto::envoy::envoy::extensions::clusters::dynamic_forward_proxy::v3::{
    ClusterConfig, cluster_config::ClusterImplementationSpecifier as Specifier,
};
use portolan_proto::envoy::envoy::extensions::common::dynamic_forward_proxy::v3::DnsCacheConfig;
use portolan_proto::envoy::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpFilter, http_filter::ConfigType,
};
use prost::{Message, Name};

use super::{any, client_tls};

/// Fits a cluster to an Envoy.
pub fn adapt(cluster: &mut Cluster) {
    share_cache(cluster);
    let sockets = cluster.transport_socket_matches.iter_mut().filter_map(|one| one.transport_socket.as_mut());
    cluster.transport_socket.iter_mut().chain(sockets).for_each(client_tls::renew_files);
}

/// The cache of names that all clusters share which dial them, for the listeners' filter fills it before a cluster is
/// chosen.
pub(super) fn dns_cache(v6_only: bool) -> DnsCacheConfig {
    let family = if v6_only { DnsLookupFamily::V6Only } else { DnsLookupFamily::V4Only };
    DnsCacheConfig { name: "portolan".to_owned(), dns_lookup_family: family.into(), ..DnsCacheConfig::default() }
}

/// Has the name cache of a forward proxy cluster shared with the listeners.
fn share_cache(cluster: &mut Cluster) {
    let Some(ClusterDiscoveryType::ClusterType(custom)) = &mut cluster.cluster_discovery_type else { return };
    let Some(config) = &mut custom.typed_config else { return };
    let Ok(mut proxy) = ClusterConfig::decode(&*config.value) else { return };
    if let Some(Specifier::DnsCacheConfig(cache)) = &mut proxy.cluster_implementation_specifier {
        *cache = dns_cache(cache.dns_lookup_family == i32::from(DnsLookupFamily::V6Only));
        *config = any(&proxy);
    }
}

/// A cluster that has nowhere to go.
pub fn absent(name: &str) -> Cluster {
    let kind = ClusterDiscoveryType::Type(DiscoveryType::Static.into());
    Cluster { name: name.to_owned(), cluster_discovery_type: Some(kind), ..Cluster::default() }
}

pub(super) fn filter<M: Message + Name>(name: &str, config: &M) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(config))),
        ..HttpFilter::default()
    }
}
