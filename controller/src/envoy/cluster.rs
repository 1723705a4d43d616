//! Clusters as Envoy needs them beyond what every host does.

use portolan_proto::envoy::envoy::config::cluster::v3::Cluster;
use portolan_proto::envoy::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, DiscoveryType, DnsLookupFamily, LbPolicy,
};
use portolan_proto::envoy::envoy::config::common::mutation_rules::v3::{HeaderMutation, header_mutation::Action};
use portolan_proto::envoy::envoy::config::core::v3::Http1ProtocolOptions;
use portolan_proto::envoy::envoy::extensions::clusters::dynamic_forward_proxy::v3::{
    ClusterConfig, cluster_config::ClusterImplementationSpecifier as Specifier,
};
use portolan_proto::envoy::envoy::extensions::common::dynamic_forward_proxy::v3::DnsCacheConfig;
use portolan_proto::envoy::envoy::extensions::filters::http::header_mutation::v3 as mutation;
use portolan_proto::envoy::envoy::extensions::filters::http::upstream_codec::v3::UpstreamCodec;
use portolan_proto::envoy::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpFilter, http_filter::ConfigType,
};
use portolan_proto::envoy::envoy::extensions::upstreams::http::v3::{
    HttpProtocolOptions, http_protocol_options as options,
};
use prost::{Message, Name};

use super::chains::HASH_HEADER;
use super::{any, client_tls};

/// Fits a cluster to an Envoy.
pub fn adapt(cluster: &mut Cluster) {
    share_cache(cluster);
    let sockets = cluster.transport_socket_matches.iter_mut().filter_map(|one| one.transport_socket.as_mut());
    cluster.transport_socket.iter_mut().chain(sockets).for_each(client_tls::renew_files);
    if [LbPolicy::RingHash, LbPolicy::Maglev].iter().any(|policy| cluster.lb_policy == i32::from(*policy)) {
        remove_hash(cluster);
    }
}

/// Has the cluster drop the header that it balances by. The route cannot: it would be gone when a request is sent again.
/// Other clusters do without, for a filter of theirs costs every request something.
fn remove_hash(cluster: &mut Cluster) {
    const KEY: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let held = cluster.typed_extension_protocol_options.get(KEY);
    let mut http = held.and_then(|any| HttpProtocolOptions::decode(&*any.value).ok()).unwrap_or_default();
    http.upstream_protocol_options.get_or_insert_with(|| {
        let http1 = options::explicit_http_config::ProtocolConfig::HttpProtocolOptions(Http1ProtocolOptions::default());
        let explicit = options::ExplicitHttpConfig { protocol_config: Some(http1) };
        options::UpstreamProtocolOptions::ExplicitHttpConfig(explicit)
    });
    let remove = HeaderMutation { action: Some(Action::Remove(HASH_HEADER.to_owned())) };
    let mutations = mutation::Mutations { request_mutations: vec![remove], ..mutation::Mutations::default() };
    let mutation = mutation::HeaderMutation { mutations: Some(mutations), ..mutation::HeaderMutation::default() };
    http.http_filters = vec![
        filter("envoy.filters.http.header_mutation", &mutation),
        filter("envoy.filters.http.upstream_codec", &UpstreamCodec {}),
    ];
    cluster.typed_extension_protocol_options.insert(KEY.to_owned(), any(&http));
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
