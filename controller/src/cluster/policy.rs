//! A DestinationRule's trafficPolicy as Envoy's cluster has it (SEMANTICS 5.6 to 5.9).

use jiff::SignedDuration;
use portolan_proto::envoy::envoy::config::cluster::v3::circuit_breakers::{Thresholds, thresholds};
use portolan_proto::envoy::envoy::config::cluster::v3::cluster::{
    self, DiscoveryType, LbConfig, LbPolicy, LeastRequestLbConfig, MaglevLbConfig, RingHashLbConfig,
    RoundRobinLbConfig, SlowStartConfig,
};
use portolan_proto::envoy::envoy::config::cluster::v3::{
    CircuitBreakers, Cluster, OutlierDetection, UpstreamConnectionOptions,
};
use portolan_proto::envoy::envoy::config::common::matcher::v3::match_predicate::{MatchSet, Rule};
use portolan_proto::envoy::envoy::config::common::matcher::v3::{HttpHeadersMatch, MatchPredicate};
use portolan_proto::envoy::envoy::config::core::v3 as core;
use portolan_proto::envoy::envoy::config::route::v3::HeaderMatcher;
use portolan_proto::envoy::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use portolan_proto::envoy::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use portolan_proto::envoy::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use portolan_proto::envoy::envoy::extensions::upstreams::http::v3::{HttpProtocolOptions, http_protocol_options};
use portolan_proto::envoy::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};
use portolan_proto::envoy::envoy::r#type::v3 as kind;
use portolan_proto::envoy::google::protobuf::{Duration, UInt32Value, UInt64Value};
use prost::Message;

use super::{HTTP_OPTIONS, any, tls};
use crate::api::destination_rule::{
    ConnectionPool, H2UpgradePolicy, HttpPool, LoadBalancer, ProxyProtocolVersion, RetryBudget, SimpleLb, TcpPool,
    TrafficPolicy,
};

/// Smallest ring where nothing else is said.
const RING: u64 = 1024;

/// Puts the policy into the cluster. `names` are what the server's certificate must hold where the policy does not
/// say.
pub(super) fn apply(cluster: &mut Cluster, policy: &TrafficPolicy, names: &[String]) {
    let mut options = options_of(cluster);
    connection_pool(cluster, &mut options, policy.connection_pool.as_ref(), policy.retry_budget.as_ref());
    load_balancer(cluster, policy.load_balancer.as_ref());
    if let Some(outlier) = &policy.outlier_detection {
        cluster.outlier_detection = Some(outlier_detection(outlier));
        let error_matcher = error_matcher(&outlier.outlier_detection_http_error_codes);
        if error_matcher.is_some() {
            options.outlier_detection = Some(http_protocol_options::OutlierDetection { error_matcher });
        }
        let least = u32::try_from(outlier.min_health_percent).unwrap_or_default();
        let panic = kind::Percent { value: f64::from(least) };
        cluster.common_lb_config.get_or_insert_default().healthy_panic_threshold = Some(panic);
    }
    if let Some(settings) = &policy.tls {
        cluster.transport_socket = tls::socket(settings, &cluster.name, &mut options, names);
    }
    if let Some(proxy) = &policy.proxy_protocol {
        cluster.transport_socket = Some(proxy_protocol(proxy.version, cluster.transport_socket.take()));
    }
    put_options(cluster, options);
}

/// Istio limits nothing where a rule does not.
pub(super) fn unlimited() -> CircuitBreakers {
    CircuitBreakers { thresholds: vec![no_limits()], ..CircuitBreakers::default() }
}

fn no_limits() -> Thresholds {
    let most = Some(UInt32Value { value: u32::MAX });
    Thresholds {
        max_connections: most,
        max_pending_requests: most,
        max_requests: most,
        max_retries: most,
        track_remaining: true,
        ..Thresholds::default()
    }
}

fn options_of(cluster: &Cluster) -> HttpProtocolOptions {
    let held = cluster.typed_extension_protocol_options.get(HTTP_OPTIONS);
    held.and_then(|any| HttpProtocolOptions::decode(any.value.as_slice()).ok()).unwrap_or_default()
}

/// Envoy wants a protocol to be named as soon as there are options.
fn put_options(cluster: &mut Cluster, mut options: HttpProtocolOptions) {
    use http_protocol_options::explicit_http_config::ProtocolConfig;
    if options == HttpProtocolOptions::default() {
        return;
    }
    options.upstream_protocol_options.get_or_insert_with(|| {
        let protocol_config = Some(ProtocolConfig::HttpProtocolOptions(core::Http1ProtocolOptions::default()));
        let explicit = http_protocol_options::ExplicitHttpConfig { protocol_config };
        http_protocol_options::UpstreamProtocolOptions::ExplicitHttpConfig(explicit)
    });
    cluster.typed_extension_protocol_options.insert(HTTP_OPTIONS.to_owned(), any(&options));
}

fn limit(number: i32) -> Option<UInt32Value> {
    u32::try_from(number).ok().filter(|&number| number > 0).map(|value| UInt32Value { value })
}

pub(super) fn duration(duration: SignedDuration) -> Duration {
    Duration { seconds: duration.as_secs(), nanos: duration.subsec_nanos() }
}

fn connection_pool(
    cluster: &mut Cluster,
    options: &mut HttpProtocolOptions,
    pool: Option<&ConnectionPool>,
    budget: Option<&RetryBudget>,
) {
    let mut thresholds = no_limits();
    if let Some(budget) = budget {
        thresholds.retry_budget = Some(thresholds::RetryBudget {
            budget_percent: Some(kind::Percent { value: budget.percent.unwrap_or(20.0) }),
            min_retry_concurrency: Some(UInt32Value {
                value: if budget.min_retry_concurrency > 0 { budget.min_retry_concurrency } else { 3 },
            }),
            budget_interval: budget.budget_interval.map(duration),
        });
    }
    let blank = (HttpPool::default(), TcpPool::default());
    let http = pool.and_then(|pool| pool.http.as_ref()).unwrap_or(&blank.0);
    let tcp = pool.and_then(|pool| pool.tcp.as_ref()).unwrap_or(&blank.1);
    thresholds.max_requests = limit(http.http2_max_requests).or(thresholds.max_requests);
    thresholds.max_pending_requests = limit(http.http1_max_pending_requests).or(thresholds.max_pending_requests);
    thresholds.max_retries = limit(http.max_retries).or(thresholds.max_retries);
    thresholds.max_connections = limit(tcp.max_connections).or(thresholds.max_connections);
    cluster.circuit_breakers = Some(CircuitBreakers { thresholds: vec![thresholds], ..CircuitBreakers::default() });
    cluster.connect_timeout = tcp.connect_timeout.map(duration).or(cluster.connect_timeout);
    if let Some(keepalive) = &tcp.tcp_keepalive {
        let seconds = |duration: Option<SignedDuration>| {
            let whole = duration.and_then(|duration| u32::try_from(duration.as_secs()).ok());
            whole.filter(|&seconds| seconds > 0).map(|value| UInt32Value { value })
        };
        let keepalive = core::TcpKeepalive {
            keepalive_probes: Some(UInt32Value { value: keepalive.probes }).filter(|probes| probes.value > 0),
            keepalive_time: seconds(keepalive.time),
            keepalive_interval: seconds(keepalive.interval),
        };
        let connection = UpstreamConnectionOptions { tcp_keepalive: Some(keepalive), ..Default::default() };
        cluster.upstream_connection_options = Some(connection);
    }
    http_version(options, http);
    let idle_timeout = http.idle_timeout.or(tcp.idle_timeout).map(duration);
    let max_requests_per_connection = limit(http.max_requests_per_connection);
    let max_connection_duration = tcp.max_connection_duration.map(duration);
    if idle_timeout.is_some() || max_requests_per_connection.is_some() || max_connection_duration.is_some() {
        options.common_http_protocol_options = Some(core::HttpProtocolOptions {
            idle_timeout,
            max_requests_per_connection,
            max_connection_duration,
            ..core::HttpProtocolOptions::default()
        });
    }
}

/// The version towards the upstream, where the pool has a say, and what holds for HTTP/2 alone.
fn http_version(options: &mut HttpProtocolOptions, http: &HttpPool) {
    use http_protocol_options::UpstreamProtocolOptions::{ExplicitHttpConfig, UseDownstreamProtocolConfig};
    use http_protocol_options::explicit_http_config::ProtocolConfig;
    if http.use_client_protocol {
        options.upstream_protocol_options =
            Some(UseDownstreamProtocolConfig(http_protocol_options::UseDownstreamHttpConfig {
                http_protocol_options: Some(core::Http1ProtocolOptions::default()),
                http2_protocol_options: Some(core::Http2ProtocolOptions::default()),
                http3_protocol_options: None,
            }));
    } else if http.h2_upgrade_policy == H2UpgradePolicy::Upgrade {
        let protocol_config = Some(ProtocolConfig::Http2ProtocolOptions(core::Http2ProtocolOptions::default()));
        let explicit = http_protocol_options::ExplicitHttpConfig { protocol_config };
        options.upstream_protocol_options = Some(ExplicitHttpConfig(explicit));
    }
    if let Some(ExplicitHttpConfig(explicit)) = &mut options.upstream_protocol_options
        && let Some(ProtocolConfig::Http2ProtocolOptions(http2)) = &mut explicit.protocol_config
    {
        http2.max_concurrent_streams = limit(http.max_concurrent_streams).or(http2.max_concurrent_streams);
        if let Some(keep_alive) = &http.http2_keep_alive {
            http2.connection_keepalive = Some(core::KeepaliveSettings {
                interval: keep_alive.interval.map(duration),
                timeout: keep_alive.timeout.map(duration),
                ..core::KeepaliveSettings::default()
            });
        }
    }
}

fn load_balancer(cluster: &mut Cluster, settings: Option<&LoadBalancer>) {
    // Such a cluster has no endpoints to choose from.
    if cluster.lb_policy == i32::from(LbPolicy::ClusterProvided) {
        return;
    }
    let Some(settings) = settings else { return };
    if let Some(hash) = &settings.consistent_hash {
        if let Some(maglev) = &hash.maglev {
            cluster.lb_policy = LbPolicy::Maglev.into();
            let table_size = Some(UInt64Value { value: maglev.table_size });
            cluster.lb_config = Some(LbConfig::MaglevLbConfig(MaglevLbConfig { table_size }));
            return;
        }
        let ring = hash.ring_hash.as_ref().map(|ring| ring.minimum_ring_size).filter(|&size| size > 0);
        let old = Some(hash.minimum_ring_size).filter(|&size| size > 0);
        cluster.lb_policy = LbPolicy::RingHash.into();
        cluster.lb_config = Some(LbConfig::RingHashLbConfig(RingHashLbConfig {
            minimum_ring_size: Some(UInt64Value { value: ring.or(old).unwrap_or(RING) }),
            ..RingHashLbConfig::default()
        }));
        return;
    }
    let old = settings
        .warmup_duration_secs
        .map(|window| SlowStartConfig { slow_start_window: Some(duration(window)), ..SlowStartConfig::default() });
    let slow_start_config = settings.warmup.as_ref().map(|warmup| SlowStartConfig {
        slow_start_window: warmup.duration.map(duration),
        aggression: Some(core::RuntimeDouble {
            default_value: warmup.aggression.unwrap_or(1.0),
            runtime_key: String::new(),
        }),
        min_weight_percent: Some(kind::Percent { value: warmup.minimum_percent.unwrap_or(10.0) }),
    });
    let slow_start_config = slow_start_config.or(old);
    match settings.simple.unwrap_or_default() {
        SimpleLb::Random => cluster.lb_policy = LbPolicy::Random.into(),
        SimpleLb::RoundRobin => {
            cluster.lb_policy = LbPolicy::RoundRobin.into();
            cluster.lb_config = slow_start_config.map(|slow_start_config| {
                let slow_start_config = Some(slow_start_config);
                LbConfig::RoundRobinLbConfig(RoundRobinLbConfig { slow_start_config })
            });
        }
        SimpleLb::Passthrough => {
            cluster.lb_policy = LbPolicy::ClusterProvided.into();
            cluster.cluster_discovery_type =
                Some(cluster::ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into()));
            cluster.load_assignment = None;
        }
        SimpleLb::Unspecified | SimpleLb::LeastConn | SimpleLb::LeastRequest | SimpleLb::Other(_) => {
            cluster.lb_policy = LbPolicy::LeastRequest.into();
            cluster.lb_config = slow_start_config.map(|slow_start_config| {
                LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
                    slow_start_config: Some(slow_start_config),
                    ..LeastRequestLbConfig::default()
                })
            });
        }
    }
}

fn outlier_detection(settings: &crate::api::destination_rule::OutlierDetection) -> OutlierDetection {
    let number = |value: u32| Some(UInt32Value { value });
    // A threshold of 0 switches its check off.
    let check = |value: Option<u32>| value.map(|value| (number(value), number(if value > 0 { 100 } else { 0 })));
    let mut out = OutlierDetection {
        interval: settings.interval.map(duration),
        base_ejection_time: settings.base_ejection_time.map(duration),
        // Istio leaves the statistical check out.
        enforcing_success_rate: number(0),
        max_ejection_percent: limit(settings.max_ejection_percent),
        ..OutlierDetection::default()
    };
    if let Some((errors, enforcing)) = check(settings.consecutive_5xx_errors) {
        (out.consecutive_5xx, out.enforcing_consecutive_5xx) = (errors, enforcing);
    }
    if let Some((errors, enforcing)) = check(settings.consecutive_gateway_errors) {
        (out.consecutive_gateway_failure, out.enforcing_consecutive_gateway_failure) = (errors, enforcing);
    }
    if settings.split_external_local_origin_errors {
        out.split_external_local_origin_errors = true;
        if let Some(failures) = settings.consecutive_local_origin_failures.filter(|&failures| failures > 0) {
            out.consecutive_local_origin_failure = number(failures);
            out.enforcing_consecutive_local_origin_failure = number(100);
        }
        out.enforcing_local_origin_success_rate = number(0);
    }
    out
}

/// What is a failure in place of the 5xx: a response with one of these codes.
fn error_matcher(codes: &[u32]) -> Option<MatchPredicate> {
    let one = |code: &u32| {
        let exact = StringMatcher { match_pattern: Some(MatchPattern::Exact(code.to_string())), ..Default::default() };
        let header = HeaderMatcher {
            name: ":status".to_owned(),
            header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(exact)),
            ..HeaderMatcher::default()
        };
        MatchPredicate { rule: Some(Rule::HttpResponseHeadersMatch(HttpHeadersMatch { headers: vec![header] })) }
    };
    match codes {
        [] => None,
        [code] => Some(one(code)),
        codes => {
            let rules = codes.iter().map(one).collect();
            Some(MatchPredicate { rule: Some(Rule::OrMatch(MatchSet { rules })) })
        }
    }
}

fn proxy_protocol(version: ProxyProtocolVersion, inner: Option<core::TransportSocket>) -> core::TransportSocket {
    let version = match version {
        ProxyProtocolVersion::V2 => core::proxy_protocol_config::Version::V2,
        ProxyProtocolVersion::V1 | ProxyProtocolVersion::Other(_) => core::proxy_protocol_config::Version::V1,
    };
    let inner = inner.unwrap_or_else(|| socket("envoy.transport_sockets.raw_buffer", &RawBuffer::default()));
    let outer = ProxyProtocolUpstreamTransport {
        config: Some(core::ProxyProtocolConfig { version: version.into(), ..Default::default() }),
        transport_socket: Some(inner),
        ..ProxyProtocolUpstreamTransport::default()
    };
    socket("envoy.transport_sockets.upstream_proxy_protocol", &outer)
}

pub(super) fn socket<M: Message + prost::Name>(name: &str, config: &M) -> core::TransportSocket {
    let config = core::transport_socket::ConfigType::TypedConfig(any(config));
    core::TransportSocket { name: name.to_owned(), config_type: Some(config) }
}
