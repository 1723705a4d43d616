//! Envoy clusters, built when a host asks for one by name (SEMANTICS 2.2 to 2.9, 5.6, 5.7, 8.2).

pub(crate) mod endpoints;
mod locality;
pub mod mesh_tls;
mod policy;
mod tls;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher};
use std::time::Duration;

use portolan_proto::envoy::envoy::config::cluster::v3::{Cluster, cluster};
use portolan_proto::envoy::envoy::config::core::v3 as core;
use portolan_proto::envoy::envoy::config::endpoint::v3 as endpoint;
use portolan_proto::envoy::envoy::extensions::clusters::dynamic_forward_proxy::v3 as forward;
use portolan_proto::envoy::envoy::extensions::common::dynamic_forward_proxy::v3::DnsCacheConfig;
use portolan_proto::envoy::envoy::extensions::upstreams::http::v3::{HttpProtocolOptions, http_protocol_options};
use portolan_proto::envoy::google::protobuf::{self, Any, Struct, UInt32Value, Value};
use portolan_registry::object::ClusterName;
use prost::{Message, Name};

use self::endpoints::{Endpoint, Workloads, host_endpoints};
use crate::api::destination_rule::{ClientTlsMode, ConsistentHash};
use crate::compile::rules::Merged;
use crate::compile::service::{Context, Member, Resolved, Source, http_class};
use crate::model::{Protocol, Resolution, ServicePort};

/// Cluster that dials the address that the client dialled.
pub const PASSTHROUGH: &str = "PassthroughCluster";
/// Cluster that dials the name that the client asked for.
pub const ALLOW_ANY_DYNAMIC_DNS: &str = "AllowAnyDynamicDNSCluster";
/// Under this name stands what Portolan says in a cluster's metadata.
pub const METADATA: &str = "portolan";

const FORWARD_PROXY: &str = "envoy.clusters.dynamic_forward_proxy";
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
const CONNECT_STRATEGY: &str = "istio.io/connect-strategy";

/// Name of the cluster of a service port, as istiod forms it.
pub fn outbound_name(port: u16, host: &str) -> ClusterName {
    named(format!("outbound|{port}||{host}"))
}

/// Name of the cluster that dials, at this port, the name that was asked for.
pub fn forward_name(port: u16, host: &str) -> ClusterName {
    named(format!("forward|{port}||{host}"))
}

/// A host that passed validation makes a good name; any other has no route.
fn named(name: String) -> ClusterName {
    name.parse().unwrap_or_default()
}

/// What the name of a service's cluster says.
pub(crate) struct Named<'n> {
    pub(crate) port: u16,
    /// Empty for all endpoints.
    pub(crate) subset: &'n str,
    pub(crate) host: &'n str,
}

/// Reads `outbound|PORT|SUBSET|HOST` or `forward|PORT||HOST`.
pub(crate) fn parse(name: &str) -> Option<Named<'_>> {
    let (kind, rest) = name.split_once('|')?;
    let (port, rest) = rest.split_once('|')?;
    let (subset, host) = rest.split_once('|')?;
    let port = port.parse().ok()?;
    let known = kind == "outbound" || kind == "forward" && subset.is_empty();
    (known && !host.is_empty()).then_some(Named { port, subset, host })
}

/// The host name, in lower case, that a cluster's name is about.
pub fn host_of(name: &str) -> Option<String> {
    parse(name).map(|named| crate::compile::service::group_key(named.host).into_owned())
}

/// The clusters that belong to no service.
pub(crate) fn special(name: &str, cx: &Context) -> Option<Cluster> {
    match name {
        PASSTHROUGH => Some(downstream_protocol(original_destination(name, cx))),
        ALLOW_ANY_DYNAMIC_DNS => Some(downstream_protocol(forward_proxy(name, cx))),
        _ => None,
    }
}

/// The cluster of a port and subset; `None` where Istio makes none. `rule` finds the DestinationRule for a service's
/// namespace and host.
pub(crate) fn build(
    name: &str,
    named: &Named<'_>,
    resolved: &Resolved,
    members: &[Member],
    workloads: &Workloads,
    cx: &Context,
    rule: impl Fn(&str, &str) -> Option<Merged>,
) -> Option<Cluster> {
    let port = named.port;
    let owner = resolved.ports.iter().find(|o| o.number == port)?;
    let base = resolved.services.get(owner.base)?;
    let declared = resolved.services.get(owner.declared)?;
    let service_port = declared.port(port)?;
    // A TCP port of a service that did not merge has a listener but no cluster, and so is closed (recorded, gen-se-3);
    // over HTTP, Portolan lets the port belong to the entry that declares it.
    if !resolved.is_merged(owner) && !http_class(service_port.protocol) {
        return None;
    }
    let source = &base.member.source;
    if name.starts_with("forward|") {
        let cluster = (source.resolution() == Resolution::None).then(|| forward_proxy(name, cx))?;
        return Some(finish(with_protocol(cluster, service_port.protocol), &declared.member.source, Some(port)));
    }
    let rule = rule(&source.meta().namespace, &base.member.host);
    let mut all = host_endpoints(members, &source.meta().namespace, workloads);
    let tls = rule.as_ref().and_then(|rule| rule.policy(port, named.subset).tls);
    let mutual = tls.is_some_and(|tls| tls.mode == ClientTlsMode::IstioMutual);
    let identities = match source {
        Source::Kube(_) if !mutual => Vec::new(),
        Source::Entry(_) | Source::Kube(_) => identities(&all, members, &source.meta().namespace, cx),
    };
    if !named.subset.is_empty() {
        let labels = rule.as_ref()?.subset(named.subset)?;
        all.retain(|e| labels.iter().all(|(key, value)| e.labels.get(key) == Some(value)));
    }
    let cluster = match source.resolution() {
        Resolution::None if cx.gateway() => statics(name, &all, service_port, cx),
        Resolution::None => {
            let mut cluster = original_destination(name, cx);
            if let Some(target) = service_port.target_port.filter(|_| !source.is_kube()) {
                cluster.lb_config = Some(cluster::LbConfig::OriginalDstLbConfig(cluster::OriginalDstLbConfig {
                    upstream_port_override: Some(UInt32Value { value: target.into() }),
                    ..Default::default()
                }));
            }
            cluster
        }
        Resolution::Static => statics(name, &all, service_port, cx),
        Resolution::Dns | Resolution::DnsRoundRobin => dns(name, &all, service_port, source, cx)?,
        Resolution::DynamicDns if base.member.host.starts_with('*') && !named.subset.is_empty() => return None,
        Resolution::DynamicDns if base.member.host.starts_with('*') => {
            use Protocol::{Grpc, Http, Http2, Tls};
            if !matches!(service_port.protocol, Http | Http2 | Grpc | Tls) {
                return None;
            }
            let mut cluster = with_protocol(forward_proxy(name, cx), service_port.protocol);
            if let Some(rule) = &rule {
                policy::apply(&mut cluster, &rule.policy(port, named.subset), &identities);
            }
            return Some(finish(cluster, &declared.member.source, Some(service_port.target_port.unwrap_or(port))));
        }
        Resolution::DynamicDns => statics(name, &all, service_port, cx),
    };
    let mut cluster = with_protocol(cluster, service_port.protocol);
    if let Some(rule) = &rule {
        let policy = rule.policy(port, named.subset);
        policy::apply(&mut cluster, &policy, &identities);
        let hash = policy.load_balancer.as_ref().and_then(|balancer| balancer.consistent_hash.as_ref());
        // Of a connection that is not HTTP only the client's address is known.
        let unknown = |hash: &ConsistentHash| hash.use_source_ip != Some(true);
        if !http_class(service_port.protocol) && service_port.protocol != Protocol::Auto && hash.is_some_and(unknown) {
            (cluster.lb_policy, cluster.lb_config) = (cluster::LbPolicy::Random.into(), None);
        }
        locality::apply(&mut cluster, &policy, &all, &cx.scope);
    }
    Some(finish(cluster, &declared.member.source, None))
}

/// Names that the certificate of a ServiceEntry's server may hold (SEMANTICS 2.8): the identities of its endpoints, and
/// what the newest entry says.
fn identities(all: &[Endpoint], members: &[Member], namespace: &str, cx: &Context) -> Vec<String> {
    let accounts = all.iter().filter(|e| !e.account.is_empty());
    let mut out: BTreeSet<String> =
        accounts.map(|e| format!("spiffe://{}/{}", cx.mesh.trust_domain, e.account)).collect();
    let entries = members.iter().filter(|m| m.source.meta().namespace.as_str() == namespace);
    let newest = entries.filter(|m| !m.source.is_kube()).max_by(|a, b| a.age(b));
    if let Some(Source::Entry(entry)) = newest.map(|member| &member.source) {
        out.extend(entry.subject_alt_names.iter().cloned());
    }
    out.into_iter().collect()
}

fn blank(name: &str, kind: cluster::DiscoveryType, cx: &Context) -> Cluster {
    Cluster {
        name: name.to_owned(),
        // The semicolon ends the name for the extraction of tags, as in istiod's.
        alt_stat_name: format!("{name};"),
        connect_timeout: Some(duration(cx.mesh.connect_timeout)),
        circuit_breakers: Some(policy::unlimited()),
        lb_policy: cluster::LbPolicy::LeastRequest.into(),
        cluster_discovery_type: Some(cluster::ClusterDiscoveryType::Type(kind.into())),
        ..Cluster::default()
    }
}

fn original_destination(name: &str, cx: &Context) -> Cluster {
    Cluster {
        lb_policy: cluster::LbPolicy::ClusterProvided.into(),
        ..blank(name, cluster::DiscoveryType::OriginalDst, cx)
    }
}

fn forward_proxy(name: &str, cx: &Context) -> Cluster {
    let config = forward::ClusterConfig {
        cluster_implementation_specifier: Some(
            forward::cluster_config::ClusterImplementationSpecifier::DnsCacheConfig(DnsCacheConfig {
                name: format!("{name}_dfp_dns_cache"),
                dns_lookup_family: lookup_family(cx).into(),
                ..DnsCacheConfig::default()
            }),
        ),
        // It speaks plain text: there is no server name to set and no certificate to look at.
        allow_insecure_cluster_options: true,
        ..forward::ClusterConfig::default()
    };
    Cluster {
        lb_policy: cluster::LbPolicy::ClusterProvided.into(),
        cluster_discovery_type: Some(cluster::ClusterDiscoveryType::ClusterType(cluster::CustomClusterType {
            name: FORWARD_PROXY.to_owned(),
            typed_config: Some(any(&config)),
        })),
        ..blank(name, cluster::DiscoveryType::Static, cx)
    }
}

/// Endpoint discovery picks endpoints by the port's name and wants addresses (SEMANTICS 2.7); of equal ones the first
/// counts.
fn statics(name: &str, all: &[Endpoint], port: &ServicePort, cx: &Context) -> Cluster {
    let mut picked: Vec<&Endpoint> = Vec::new();
    for e in all.iter().filter(|e| e.port_name == port.name) {
        let reachable = e.port == 0 || e.address.parse::<std::net::IpAddr>().is_ok();
        if reachable && !picked.iter().any(|p| p.address == e.address && p.port == e.port) {
            picked.push(e);
        }
    }
    Cluster { load_assignment: Some(assignment(name, &picked)), ..blank(name, cluster::DiscoveryType::Static, cx) }
}

/// DNS clusters pick endpoints by the port's number, and without any there is no cluster.
// Envoy took these fields over into an extension; istiod and proxy-host speak the old ones.
#[allow(deprecated)]
fn dns(name: &str, all: &[Endpoint], port: &ServicePort, source: &Source, cx: &Context) -> Option<Cluster> {
    let mut picked: Vec<&Endpoint> = all.iter().filter(|e| e.service_port == port.number).collect();
    let robin = source.resolution() == Resolution::DnsRoundRobin;
    if robin {
        picked.truncate(1);
    }
    if picked.is_empty() {
        return None;
    }
    let strategy = source.meta().annotations.get(CONNECT_STRATEGY);
    let race = strategy.is_some_and(|s| s.eq_ignore_ascii_case("RACE_FIRST_TCP_CONNECT"));
    let kind = if robin || race { cluster::DiscoveryType::LogicalDns } else { cluster::DiscoveryType::StrictDns };
    let family = if race && !robin { cluster::DnsLookupFamily::All } else { lookup_family(cx) };
    let refresh = duration(cx.mesh.dns_refresh_rate);
    Some(Cluster {
        load_assignment: Some(assignment(name, &picked)),
        dns_refresh_rate: Some(refresh),
        dns_jitter: Some(duration(Duration::from_millis(100))),
        dns_lookup_family: family.into(),
        respect_dns_ttl: true,
        ..blank(name, kind, cx)
    })
}

fn lookup_family(cx: &Context) -> cluster::DnsLookupFamily {
    if cx.v6_only() { cluster::DnsLookupFamily::V6Only } else { cluster::DnsLookupFamily::V4Only }
}

fn assignment(name: &str, endpoints: &[&Endpoint]) -> endpoint::ClusterLoadAssignment {
    let mut by_locality: BTreeMap<&str, Vec<&Endpoint>> = BTreeMap::new();
    for e in endpoints {
        by_locality.entry(&e.locality).or_default().push(e);
    }
    let endpoints = by_locality.into_iter().map(|(locality, endpoints)| endpoint::LocalityLbEndpoints {
        locality: (!locality.is_empty()).then(|| {
            let mut parts = locality.splitn(4, '/').map(str::to_owned);
            core::Locality {
                region: parts.next().unwrap_or_default(),
                zone: parts.next().unwrap_or_default(),
                sub_zone: parts.next().unwrap_or_default(),
            }
        }),
        load_balancing_weight: Some(UInt32Value {
            value: endpoints.iter().fold(0, |sum, e| e.weight.saturating_add(sum)),
        }),
        lb_endpoints: endpoints.into_iter().map(lb_endpoint).collect(),
        ..Default::default()
    });
    endpoint::ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: endpoints.collect(),
        ..Default::default()
    }
}

fn lb_endpoint(e: &Endpoint) -> endpoint::LbEndpoint {
    let address = match e.port {
        0 => core::address::Address::Pipe(core::Pipe { path: e.address.clone(), mode: 0 }),
        port => core::address::Address::SocketAddress(core::SocketAddress {
            address: e.address.clone(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(port.into())),
            ..Default::default()
        }),
    };
    endpoint::LbEndpoint {
        load_balancing_weight: Some(UInt32Value { value: e.weight }),
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(endpoint::Endpoint {
            address: Some(core::Address { address: Some(address) }),
            ..Default::default()
        })),
        ..Default::default()
    }
}

/// HTTP version towards the upstream (SEMANTICS 5.6, 8.1).
fn with_protocol(cluster: Cluster, protocol: Protocol) -> Cluster {
    use http_protocol_options::explicit_http_config::ProtocolConfig;
    match protocol {
        Protocol::Http2 | Protocol::Grpc | Protocol::GrpcWeb => {
            let explicit = http_protocol_options::ExplicitHttpConfig {
                protocol_config: Some(ProtocolConfig::Http2ProtocolOptions(core::Http2ProtocolOptions::default())),
            };
            with_options(cluster, http_protocol_options::UpstreamProtocolOptions::ExplicitHttpConfig(explicit))
        }
        Protocol::Auto => downstream_protocol(cluster),
        _ => cluster,
    }
}

fn downstream_protocol(cluster: Cluster) -> Cluster {
    let same = http_protocol_options::UseDownstreamHttpConfig {
        http_protocol_options: Some(core::Http1ProtocolOptions::default()),
        http2_protocol_options: Some(core::Http2ProtocolOptions::default()),
        http3_protocol_options: None,
    };
    with_options(cluster, http_protocol_options::UpstreamProtocolOptions::UseDownstreamProtocolConfig(same))
}

fn with_options(mut cluster: Cluster, options: http_protocol_options::UpstreamProtocolOptions) -> Cluster {
    let options = HttpProtocolOptions { upstream_protocol_options: Some(options), ..HttpProtocolOptions::default() };
    cluster.typed_extension_protocol_options.insert(HTTP_OPTIONS.to_owned(), any(&options));
    cluster
}

/// Says in the metadata which object the cluster is from, and at which port names are dialled.
fn finish(mut cluster: Cluster, source: &Source, port: Option<u16>) -> Cluster {
    let meta = source.meta();
    let text = |s: &str| Value { kind: Some(protobuf::value::Kind::StringValue(s.to_owned())) };
    let number = |n: u16| Value { kind: Some(protobuf::value::Kind::NumberValue(n.into())) };
    let kind = if source.is_kube() { "Service" } else { "ServiceEntry" };
    let named = [("kind", text(kind)), ("namespace", text(&meta.namespace)), ("name", text(&meta.name))];
    let fields = named.into_iter().chain(port.map(|p| ("port", number(p)))).map(|(k, v)| (k.to_owned(), v)).collect();
    let metadata = cluster.metadata.get_or_insert_default();
    metadata.filter_metadata.insert(METADATA.to_owned(), Struct { fields });
    cluster
}

/// A digest of a cluster that does not depend on the order of its maps.
pub fn digest(cluster: &Cluster) -> u64 {
    let metadata = cluster.metadata.clone().unwrap_or_default();
    let mut hasher = DefaultHasher::new();
    hasher.write(&Cluster { metadata: None, ..cluster.clone() }.encode_to_vec());
    for (name, fields) in metadata.filter_metadata.into_iter().collect::<BTreeMap<_, _>>() {
        hasher.write(name.as_bytes());
        for (key, value) in fields.fields.into_iter().collect::<BTreeMap<_, _>>() {
            hasher.write(key.as_bytes());
            hasher.write(&value.encode_to_vec());
        }
    }
    hasher.finish()
}

fn duration(d: Duration) -> protobuf::Duration {
    protobuf::Duration {
        seconds: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(d.subsec_nanos()).unwrap_or_default(),
    }
}

fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}
