//! A cluster as Envoy's message says it, checked: what the rest of the proxy may rely on.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use portolan_proto::envoy::envoy::{
    config::{
        cluster::v3::{
            Cluster,
            cluster::{
                ClusterDiscoveryType, DiscoveryType, DnsLookupFamily, LbConfig, LbPolicy,
                common_lb_config::LocalityConfigSpecifier,
            },
        },
        core::v3::{HealthStatus, address, socket_address::PortSpecifier},
        endpoint::v3::lb_endpoint::HostIdentifier,
    },
    extensions::upstreams::http::v3::http_protocol_options::{
        UpstreamProtocolOptions, explicit_http_config::ProtocolConfig,
    },
};
use prost::Message as _;

use super::{
    health::Shared,
    options::{self, Options},
};

/// Envoy's default (`Cluster.connect_timeout`).
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Envoy's default (`Cluster.dns_refresh_rate`).
const DEFAULT_DNS_REFRESH: Duration = Duration::from_secs(5);

/// Envoy's default for the points of a ring.
const RING: u64 = 1024;
/// Envoy's default for the size of a Maglev table.
const MAGLEV: u64 = 65537;

/// Where a connection is opened to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// IP and port.
    Ip(SocketAddr),
    /// Path of a Unix-domain socket.
    Unix(PathBuf),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// An endpoint's address before DNS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Needs no resolution.
    Address(Address),
    /// A name that has to be resolved, and the port.
    Name(String, u16),
}

/// One endpoint of a cluster; `A` is [`Target`] before DNS and a list of [`Address`] (to be tried in turn) after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint<A> {
    /// Where it is.
    pub at: A,
    /// Share within its locality; at least 1.
    pub weight: u32,
    /// 0 is used first; others only while all lower ones have no endpoint.
    pub priority: u32,
    /// Index of the locality, and its weight (0: takes no traffic where localities are weighted).
    pub locality: (usize, u32),
}

/// Which addresses of a name are used (`Cluster.dns_lookup_family`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv6, and IPv4 where there is none.
    Auto,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// IPv4, and IPv6 where there is none.
    V4Preferred,
    /// Both.
    All,
}

/// How a DNS cluster is resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dns {
    /// One endpoint with whatever the name resolves to now, in place of an endpoint for each address.
    pub logical: bool,
    /// Which addresses count.
    pub family: Family,
    /// Whether answers live as long as their TTL says; else as long as `refresh`.
    pub respect_ttl: bool,
    /// Time between resolutions without a TTL.
    pub refresh: Duration,
    /// Time until the next resolution after one that failed.
    pub failure_refresh: Duration,
}

/// Where the endpoints of a cluster come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Discovery<A> {
    /// Listed, or resolved from the list.
    Endpoints(Vec<Endpoint<A>>),
    /// Wherever the client dialled; the port may be another one.
    OriginalDst {
        /// `upstream_port_override`.
        port: Option<u16>,
    },
    /// Whatever host the client asked for.
    DynamicForwardProxy {
        /// Port to dial; else the one asked for, else the one dialled, else 80.
        port: Option<u16>,
    },
}

/// How an endpoint is picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// In turn.
    RoundRobin,
    /// The less busy of two.
    LeastRequest,
    /// Any.
    Random,
    /// By a request's hash on a ring of at least so many points.
    RingHash(u64),
    /// By a request's hash in a Maglev table of this size.
    Maglev(u64),
}

/// The protocol spoken upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 by prior knowledge.
    Http2,
    /// Whatever the client speaks.
    SameAsClient,
}

/// A checked cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec<A> {
    /// Its name.
    pub name: String,
    /// Time that a connection may take to open.
    pub connect_timeout: Duration,
    /// Where endpoints come from.
    pub discovery: Discovery<A>,
    /// How one is picked.
    pub policy: Policy,
    /// Whether localities are picked by weight before endpoints.
    pub weighted_localities: bool,
    /// The protocol spoken to endpoints.
    pub protocol: Protocol,
    /// TLS, limits and what else there is to a connection.
    pub options: Options,
    /// What all workers know of its endpoints.
    pub shared: Shared,
    /// Set where endpoints are names.
    pub dns: Option<Dns>,
}

/// A cluster that this proxy cannot carry out. It is refused as a whole: half of a configuration is another one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ClusterError {
    /// The bytes are not a `Cluster`.
    #[error("not a cluster: {0}")]
    Decode(String),
    /// A discovery type that is not known here.
    #[error("discovery type {0} is not supported")]
    Discovery(String),
    /// TLS or another transport towards the endpoints.
    #[error("transport socket {0:?} is not supported")]
    Transport(String),
    /// A load-balancing policy that is not known here.
    #[error("load balancing policy {0} is not supported")]
    Policy(String),
    /// An endpoint that has no address, or one that cannot be read.
    #[error("endpoint address {0} cannot be used")]
    Address(String),
    /// An upstream protocol that is not known here.
    #[error("upstream protocol options: {0}")]
    Protocol(String),
}

impl Spec<Target> {
    /// Reads the bytes of an Envoy `Cluster`.
    ///
    /// # Errors
    /// What cannot be carried out faithfully.
    pub fn decode(bytes: &[u8]) -> Result<Self, ClusterError> {
        Self::read(Cluster::decode(bytes).map_err(|e| ClusterError::Decode(e.to_string()))?)
    }

    /// Reads an Envoy `Cluster`.
    ///
    /// # Errors
    /// What cannot be carried out faithfully.
    pub fn read(cluster: Cluster) -> Result<Self, ClusterError> {
        let kind = match &cluster.cluster_discovery_type {
            None => DiscoveryType::Static,
            Some(ClusterDiscoveryType::Type(kind)) => {
                DiscoveryType::try_from(*kind).map_err(|_| ClusterError::Discovery(kind.to_string()))?
            }
            Some(ClusterDiscoveryType::ClusterType(custom))
                if custom.name == "envoy.clusters.dynamic_forward_proxy" =>
            {
                let port = metadata_port(&cluster)?;
                return Self::with(&cluster, Discovery::DynamicForwardProxy { port }, None);
            }
            Some(ClusterDiscoveryType::ClusterType(custom)) => {
                return Err(ClusterError::Discovery(custom.name.clone()));
            }
        };
        match kind {
            DiscoveryType::OriginalDst => {
                let port = match &cluster.lb_config {
                    Some(LbConfig::OriginalDstLbConfig(config)) => config.upstream_port_override.as_ref(),
                    _ => None,
                };
                let port = port.map(|port| to_port(port.value)).transpose()?;
                Self::with(&cluster, Discovery::OriginalDst { port }, None)
            }
            DiscoveryType::Static => {
                let mut endpoints = endpoints(&cluster, false)?;
                // Envoy keeps the first of several endpoints at one address.
                let mut seen = std::collections::HashSet::new();
                endpoints.retain(|endpoint| match &endpoint.at {
                    Target::Address(address) => seen.insert(address.clone()),
                    Target::Name(..) => true,
                });
                Self::with(&cluster, Discovery::Endpoints(endpoints), None)
            }
            DiscoveryType::StrictDns | DiscoveryType::LogicalDns => {
                let dns = dns(&cluster, kind == DiscoveryType::LogicalDns);
                let endpoints = endpoints(&cluster, true)?;
                Self::with(&cluster, Discovery::Endpoints(endpoints), Some(dns))
            }
            DiscoveryType::Eds => Err(ClusterError::Discovery("EDS".into())),
        }
    }

    fn with(cluster: &Cluster, discovery: Discovery<Target>, dns: Option<Dns>) -> Result<Self, ClusterError> {
        let policy = match LbPolicy::try_from(cluster.lb_policy) {
            Ok(LbPolicy::RoundRobin) => Policy::RoundRobin,
            Ok(LbPolicy::LeastRequest) => Policy::LeastRequest,
            Ok(LbPolicy::Random) => Policy::Random,
            Ok(LbPolicy::RingHash) => match &cluster.lb_config {
                Some(LbConfig::RingHashLbConfig(ring)) => {
                    Policy::RingHash(ring.minimum_ring_size.as_ref().map_or(RING, |size| size.value))
                }
                _ => Policy::RingHash(RING),
            },
            Ok(LbPolicy::Maglev) => match &cluster.lb_config {
                Some(LbConfig::MaglevLbConfig(maglev)) => {
                    Policy::Maglev(maglev.table_size.as_ref().map_or(MAGLEV, |size| size.value))
                }
                _ => Policy::Maglev(MAGLEV),
            },
            Ok(LbPolicy::ClusterProvided) if !matches!(discovery, Discovery::Endpoints(_)) => Policy::RoundRobin,
            Ok(other) => return Err(ClusterError::Policy(other.as_str_name().into())),
            Err(_) => return Err(ClusterError::Policy(cluster.lb_policy.to_string())),
        };
        let locality = cluster.common_lb_config.as_ref().and_then(|c| c.locality_config_specifier.as_ref());
        Ok(Self {
            name: cluster.name.clone(),
            connect_timeout: cluster
                .connect_timeout
                .as_ref()
                .and_then(|d| duration(d.seconds, d.nanos))
                .unwrap_or(DEFAULT_CONNECT_TIMEOUT),
            discovery,
            policy,
            weighted_localities: matches!(locality, Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_))),
            protocol: protocol(cluster)?,
            // Plain text must never stand in for TLS: what is not known is refused.
            options: options::read(cluster)?,
            shared: Shared::default(),
            dns,
        })
    }
}

fn duration(seconds: i64, nanos: i32) -> Option<Duration> {
    let whole = Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanos).ok()?);
    (!whole.is_zero()).then_some(whole)
}

fn to_port(port: u32) -> Result<u16, ClusterError> {
    u16::try_from(port).map_err(|_| ClusterError::Address(format!("port {port}")))
}

/// The port that the controller notes for a dynamic forward proxy.
fn metadata_port(cluster: &Cluster) -> Result<Option<u16>, ClusterError> {
    use portolan_proto::envoy::google::protobuf::value::Kind;
    let value = (cluster.metadata.as_ref())
        .and_then(|metadata| metadata.filter_metadata.get("portolan"))
        .and_then(|fields| fields.fields.get("port"))
        .and_then(|value| value.kind.as_ref());
    match value {
        None => Ok(None),
        Some(Kind::NumberValue(number)) => {
            let text = number.to_string();
            text.parse().map(Some).map_err(|_| ClusterError::Address(format!("port {text}")))
        }
        Some(_) => Err(ClusterError::Address("port".into())),
    }
}

/// Envoy's DNS fields are deprecated in favour of a typed extension, but they are what istiod sends.
#[allow(deprecated)]
fn dns(cluster: &Cluster, logical: bool) -> Dns {
    let refresh = cluster.dns_refresh_rate.as_ref().and_then(|d| duration(d.seconds, d.nanos));
    let refresh = refresh.unwrap_or(DEFAULT_DNS_REFRESH);
    let failure = (cluster.dns_failure_refresh_rate.as_ref())
        .and_then(|rate| rate.base_interval.as_ref())
        .and_then(|d| duration(d.seconds, d.nanos));
    let family = match DnsLookupFamily::try_from(cluster.dns_lookup_family) {
        Ok(DnsLookupFamily::V4Only) => Family::V4,
        Ok(DnsLookupFamily::V6Only) => Family::V6,
        Ok(DnsLookupFamily::V4Preferred) => Family::V4Preferred,
        Ok(DnsLookupFamily::All) => Family::All,
        Ok(DnsLookupFamily::Auto) | Err(_) => Family::Auto,
    };
    Dns { logical, family, respect_ttl: cluster.respect_dns_ttl, refresh, failure_refresh: failure.unwrap_or(refresh) }
}

fn endpoints(cluster: &Cluster, names: bool) -> Result<Vec<Endpoint<Target>>, ClusterError> {
    let mut out = Vec::new();
    let groups = cluster.load_assignment.as_ref().map(|a| a.endpoints.as_slice()).unwrap_or_default();
    for (index, group) in groups.iter().enumerate() {
        let locality = (index, group.load_balancing_weight.as_ref().map_or(0, |w| w.value));
        for endpoint in &group.lb_endpoints {
            if !matches!(
                HealthStatus::try_from(endpoint.health_status),
                Ok(HealthStatus::Unknown | HealthStatus::Healthy | HealthStatus::Degraded)
            ) {
                continue;
            }
            let address = match &endpoint.host_identifier {
                Some(HostIdentifier::Endpoint(inner)) => inner.address.as_ref().and_then(|a| a.address.as_ref()),
                _ => None,
            };
            out.push(Endpoint {
                at: target(address, names)?,
                weight: endpoint.load_balancing_weight.as_ref().map_or(1, |w| w.value).max(1),
                priority: group.priority,
                locality,
            });
        }
    }
    Ok(out)
}

fn target(address: Option<&address::Address>, names: bool) -> Result<Target, ClusterError> {
    match address {
        Some(address::Address::SocketAddress(socket)) => {
            let port = match &socket.port_specifier {
                Some(PortSpecifier::PortValue(port)) => to_port(*port)?,
                _ => return Err(ClusterError::Address(format!("{} without a port number", socket.address))),
            };
            match socket.address.parse() {
                Ok(ip) => Ok(Target::Address(Address::Ip(SocketAddr::new(ip, port)))),
                Err(_) if names && !socket.address.is_empty() => Ok(Target::Name(socket.address.clone(), port)),
                Err(_) => Err(ClusterError::Address(format!("{:?}", socket.address))),
            }
        }
        Some(address::Address::Pipe(pipe)) if !pipe.path.is_empty() => {
            Ok(Target::Address(Address::Unix(PathBuf::from(&pipe.path))))
        }
        other => Err(ClusterError::Address(format!("{other:?}"))),
    }
}

#[allow(deprecated)]
fn protocol(cluster: &Cluster) -> Result<Protocol, ClusterError> {
    let Some(options) = options::http(cluster)? else {
        return Ok(if cluster.http2_protocol_options.is_some() { Protocol::Http2 } else { Protocol::Http1 });
    };
    match options.upstream_protocol_options {
        None => Ok(Protocol::Http1),
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(_)) => Ok(Protocol::SameAsClient),
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => match explicit.protocol_config {
            None | Some(ProtocolConfig::HttpProtocolOptions(_)) => Ok(Protocol::Http1),
            Some(ProtocolConfig::Http2ProtocolOptions(_)) => Ok(Protocol::Http2),
            Some(ProtocolConfig::Http3ProtocolOptions(_)) => Err(ClusterError::Protocol("HTTP/3".into())),
        },
        // Without TLS there is no ALPN to choose by, and Envoy falls back to HTTP/1.1.
        Some(UpstreamProtocolOptions::AutoConfig(_)) => Ok(Protocol::Http1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use options::Warmup;
    use portolan_proto::envoy::envoy::config::{
        cluster::v3::cluster::{CustomClusterType, RoundRobinLbConfig, SlowStartConfig},
        core::v3::{self as core, TransportSocket},
        endpoint::v3 as endpoint,
    };
    use portolan_proto::envoy::envoy::r#type::v3::Percent;
    use portolan_proto::envoy::google::protobuf;

    fn at(address: &str, port: u32) -> endpoint::LbEndpoint {
        let socket = core::SocketAddress {
            address: address.into(),
            port_specifier: Some(PortSpecifier::PortValue(port)),
            ..Default::default()
        };
        endpoint::LbEndpoint {
            host_identifier: Some(HostIdentifier::Endpoint(endpoint::Endpoint {
                address: Some(core::Address { address: Some(address::Address::SocketAddress(socket)) }),
                ..Default::default()
            })),
            ..Default::default()
        }
    }

    fn cluster(kind: DiscoveryType, endpoints: Vec<endpoint::LbEndpoint>) -> Cluster {
        Cluster {
            name: "c".into(),
            cluster_discovery_type: Some(ClusterDiscoveryType::Type(kind.into())),
            load_assignment: Some(endpoint::ClusterLoadAssignment {
                endpoints: vec![endpoint::LocalityLbEndpoints { lb_endpoints: endpoints, ..Default::default() }],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn count(spec: &Spec<Target>) -> usize {
        match &spec.discovery {
            Discovery::Endpoints(endpoints) => endpoints.len(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn static_keeps_the_first_of_one_address_and_dns_keeps_both() {
        let twice = || vec![at("1.2.3.4", 80), at("1.2.3.4", 80), at("1.2.3.4", 81)];
        assert_eq!(count(&Spec::read(cluster(DiscoveryType::Static, twice())).unwrap()), 2);
        assert_eq!(count(&Spec::read(cluster(DiscoveryType::StrictDns, twice())).unwrap()), 3);
    }

    #[test]
    fn names_are_only_for_dns() {
        let named = || vec![at("a.com", 80)];
        assert!(matches!(Spec::read(cluster(DiscoveryType::Static, named())), Err(ClusterError::Address(_))));
        assert_eq!(count(&Spec::read(cluster(DiscoveryType::LogicalDns, named())).unwrap()), 1);
    }

    #[test]
    fn a_warmup_is_read_with_envoys_defaults() {
        let window = Some(protobuf::Duration { seconds: 30, nanos: 0 });
        let started = |settings: SlowStartConfig| {
            let mut cluster = cluster(DiscoveryType::Static, vec![at("1.2.3.4", 80)]);
            let slow_start_config = Some(settings);
            cluster.lb_config = Some(LbConfig::RoundRobinLbConfig(RoundRobinLbConfig { slow_start_config }));
            Spec::read(cluster).unwrap().options.warmup
        };
        let warmup = |aggression, least| Some(Warmup { window: Duration::from_secs(30), aggression, least });
        let bare = SlowStartConfig { slow_start_window: window, ..SlowStartConfig::default() };
        assert_eq!(started(bare.clone()), warmup(1000, 100));
        let aggression = Some(core::RuntimeDouble { default_value: 1.5, ..Default::default() });
        let min_weight_percent = Some(Percent { value: 25.0 });
        assert_eq!(started(SlowStartConfig { aggression, min_weight_percent, ..bare }), warmup(1500, 250));
        assert_eq!(started(SlowStartConfig::default()), None);
    }

    #[test]
    fn a_transport_that_is_not_known_is_refused_and_not_left_out() {
        for name in ["envoy.transport_sockets.quic", "envoy.transport_sockets.tap"] {
            let mut other = cluster(DiscoveryType::Static, vec![at("1.2.3.4", 80)]);
            other.transport_socket = Some(TransportSocket { name: name.into(), config_type: None });
            assert_eq!(Spec::read(other), Err(ClusterError::Transport(name.into())));
        }
        let mut tls = cluster(DiscoveryType::Static, vec![at("1.2.3.4", 80)]);
        tls.transport_socket = Some(TransportSocket { name: "envoy.transport_sockets.tls".into(), config_type: None });
        assert!(matches!(Spec::read(tls), Err(ClusterError::Transport(_))));
    }

    #[test]
    fn unknown_cluster_types_are_refused() {
        let mut custom = cluster(DiscoveryType::Static, vec![]);
        custom.cluster_discovery_type = Some(ClusterDiscoveryType::ClusterType(CustomClusterType {
            name: "envoy.clusters.redis".into(),
            typed_config: None,
        }));
        assert_eq!(Spec::read(custom), Err(ClusterError::Discovery("envoy.clusters.redis".into())));
    }
}
