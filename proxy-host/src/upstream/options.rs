//! What a cluster says besides its endpoints: TLS, limits, ejection of endpoints that fail, and how long connections live.

use std::{path::PathBuf, time::Duration};

use portolan_proto::envoy::envoy::{
    config::{
        cluster::v3::{Cluster, OutlierDetection, cluster::LbConfig},
        common::matcher::v3::{MatchPredicate, match_predicate::Rule},
        core::v3::{
            DataSource, TransportSocket, data_source::Specifier, proxy_protocol_config, transport_socket::ConfigType,
        },
        route::v3::{HeaderMatcher, header_matcher::HeaderMatchSpecifier::StringMatch},
    },
    extensions::{
        transport_sockets::{
            proxy_protocol::v3::ProxyProtocolUpstreamTransport,
            tls::v3::{UpstreamTlsContext, common_tls_context::ValidationContextType},
        },
        upstreams::http::v3::HttpProtocolOptions,
    },
    r#type::matcher::v3::string_matcher::MatchPattern,
};
use portolan_proto::envoy::google::protobuf::{self, UInt32Value};
use prost::Message as _;

use super::{cluster::ClusterError, proxy_protocol::Version, tls::Tls};

/// Under this name stand a cluster's options for HTTP.
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
/// Name of the transport socket that begins with a header of the PROXY protocol.
const PROXY_PROTOCOL: &str = "envoy.transport_sockets.upstream_proxy_protocol";
/// Unused connections are closed after this time (Envoy's default for HTTP).
pub const IDLE: Duration = Duration::from_secs(3600);
/// Envoy's default for the share of endpoints that have to be well, in percent.
const PANIC: u32 = 50;

/// The options of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// TLS towards endpoints.
    pub tls: Option<Tls>,
    /// The header of the PROXY protocol that begins a connection.
    pub proxy: Option<Version>,
    /// TCP keepalive: idle time, interval, probes; what is not said is the system's.
    pub keepalive: Option<Keepalive>,
    /// Unused connections are closed after this time; `None`: never.
    pub idle: Option<Duration>,
    /// Silence that ends a TCP connection; `None` where the proxy's own limit holds, zero for no limit.
    pub tcp_idle: Option<Duration>,
    /// Longest life of a TCP connection.
    pub tcp_life: Option<Duration>,
    /// Requests that a connection carries in its life.
    pub requests_per_connection: Option<u32>,
    /// Most that may be going on at a time.
    pub limits: Limits,
    /// When endpoints that fail are left out.
    pub ejection: Option<Ejection>,
    /// Where fewer endpoints than this are well, in percent, all are used.
    pub panic: u32,
    /// How new endpoints begin.
    pub warmup: Option<Warmup>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tls: None,
            proxy: None,
            keepalive: None,
            idle: Some(IDLE),
            tcp_idle: None,
            tcp_life: None,
            requests_per_connection: None,
            limits: Limits::default(),
            ejection: None,
            panic: PANIC,
            warmup: None,
        }
    }
}

/// Envoy's slow start: the weight of a new endpoint grows for a while. `DestinationRule.trafficPolicy.loadBalancer.warmup`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Warmup {
    /// For how long.
    pub window: Duration,
    /// How steeply, in thousandths: from 1,000, evenly, on it grows faster at the beginning.
    pub aggression: u32,
    /// Least share of its weight, in thousandths.
    pub least: u32,
}

impl Warmup {
    /// Which part of its weight an endpoint of this age has.
    #[must_use]
    pub fn factor(&self, age: Duration) -> f64 {
        if age >= self.window {
            return 1.0;
        }
        let passed = age.max(Duration::from_millis(1)).as_secs_f64() / self.window.as_secs_f64();
        let grown = passed.powf(1000.0 / f64::from(self.aggression));
        grown.max(f64::from(self.least) / 1000.0)
    }
}

/// `SO_KEEPALIVE` and what belongs to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Keepalive {
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
    /// Probes without an answer that end a connection.
    pub probes: Option<u32>,
}

/// Envoy's circuit breakers; `None` for what has no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Connections.
    pub connections: Option<u32>,
    /// Requests that wait for a connection.
    pub pending: Option<u32>,
    /// Requests.
    pub requests: Option<u32>,
    /// Attempts after the first.
    pub retries: Option<u32>,
    /// In place of `retries`: percent of the requests, and the least.
    pub retry_budget: Option<(u32, u32)>,
}

impl Limits {
    /// Whether anything is limited.
    #[must_use]
    pub fn any(&self) -> bool {
        *self != Self::default()
    }
}

/// Outlier detection. A threshold of `None` is switched off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ejection {
    /// Statuses that are failures, and no others; none: those from 500 on.
    pub codes: Vec<u16>,
    /// Failures with a status of 500 or above in a row.
    pub errors: Option<u32>,
    /// Failures with 502, 503 or 504 in a row.
    pub gateway_errors: Option<u32>,
    /// Failures to connect or to get a response in a row, where they are told apart.
    pub local: Option<u32>,
    /// Local failures are told apart from statuses.
    pub split: bool,
    /// Time between looks at ejected endpoints.
    pub interval: Duration,
    /// Time that an endpoint is left out the first time.
    pub time: Duration,
    /// Longest time that it is left out.
    pub longest: Duration,
    /// Share of the endpoints that may be left out, in percent.
    pub share: u32,
}

fn unsupported(what: &str) -> ClusterError {
    ClusterError::Transport(what.to_owned())
}

fn time(duration: Option<&protobuf::Duration>) -> Option<Duration> {
    let duration = duration?;
    Some(Duration::new(u64::try_from(duration.seconds).ok()?, u32::try_from(duration.nanos).ok()?))
}

fn number(value: Option<&UInt32Value>) -> Option<u32> {
    value.map(|value| value.value)
}

/// What the cluster says for HTTP, if anything.
///
/// # Errors
/// It cannot be read.
pub fn http(cluster: &Cluster) -> Result<Option<HttpProtocolOptions>, ClusterError> {
    let Some(any) = cluster.typed_extension_protocol_options.get(HTTP_OPTIONS) else { return Ok(None) };
    HttpProtocolOptions::decode(any.value.as_slice()).map(Some).map_err(|e| ClusterError::Protocol(e.to_string()))
}

/// Reads a cluster's options.
///
/// # Errors
/// What cannot be carried out faithfully.
pub fn read(cluster: &Cluster) -> Result<Options, ClusterError> {
    if let Some(socket) = cluster.transport_socket_matches.first() {
        return Err(unsupported(&socket.name));
    }
    let http = http(cluster)?.unwrap_or_default();
    let outer = cluster.transport_socket.as_ref().filter(|socket| socket.name == PROXY_PROTOCOL);
    let outer = outer.map(proxy_protocol).transpose()?;
    let (proxy, socket) = match &outer {
        Some((version, inner)) => (Some(*version), inner.as_ref()),
        None => (None, cluster.transport_socket.as_ref()),
    };
    let tls = match socket {
        None => None,
        Some(socket) if socket.name == "envoy.transport_sockets.raw_buffer" => None,
        Some(socket) if socket.name == "envoy.transport_sockets.tls" => Some(tls(socket, &http)?),
        Some(socket) => return Err(unsupported(&socket.name)),
    };
    let common = http.common_http_protocol_options.as_ref();
    let said = time(common.and_then(|common| common.idle_timeout.as_ref()));
    let idle = match said {
        Some(idle) => Some(idle).filter(|idle| !idle.is_zero()),
        None => Some(IDLE),
    };
    let mut codes = Vec::new();
    if let Some(matcher) = http.outlier_detection.as_ref().and_then(|outlier| outlier.error_matcher.as_ref()) {
        statuses(matcher, &mut codes)?;
    }
    let keepalive = cluster.upstream_connection_options.as_ref().and_then(|o| o.tcp_keepalive.as_ref());
    let panic = cluster.common_lb_config.as_ref().and_then(|common| common.healthy_panic_threshold.as_ref());
    Ok(Options {
        tls,
        proxy,
        keepalive: keepalive.map(|keepalive| Keepalive {
            time: number(keepalive.keepalive_time.as_ref()).map(|s| Duration::from_secs(s.into())),
            interval: number(keepalive.keepalive_interval.as_ref()).map(|s| Duration::from_secs(s.into())),
            probes: number(keepalive.keepalive_probes.as_ref()),
        }),
        idle,
        tcp_idle: said,
        tcp_life: time(common.and_then(|common| common.max_connection_duration.as_ref()))
            .filter(|life| !life.is_zero()),
        requests_per_connection: number(common.and_then(|common| common.max_requests_per_connection.as_ref()))
            .filter(|most| *most > 0),
        limits: limits(cluster),
        ejection: cluster.outlier_detection.as_ref().map(|settings| ejection(settings, codes)),
        panic: panic.map_or(PANIC, |panic| percent(panic.value)),
        warmup: warmup(cluster),
    })
}

fn warmup(cluster: &Cluster) -> Option<Warmup> {
    let settings = match cluster.lb_config.as_ref()? {
        LbConfig::RoundRobinLbConfig(config) => config.slow_start_config.as_ref()?,
        LbConfig::LeastRequestLbConfig(config) => config.slow_start_config.as_ref()?,
        _ => return None,
    };
    let aggression = settings.aggression.as_ref().map_or(1.0, |aggression| aggression.default_value);
    let least = settings.min_weight_percent.as_ref().map_or(10.0, |least| least.value);
    Some(Warmup {
        window: time(settings.slow_start_window.as_ref()).filter(|window| !window.is_zero())?,
        // As Envoy takes what makes no sense.
        aggression: if aggression > 0.0 { thousandths(aggression).max(1) } else { 1000 },
        least: thousandths(least / 100.0).min(1000),
    })
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
fn thousandths(value: f64) -> u32 {
    (value * 1000.0).round() as u32
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 100")]
fn percent(value: f64) -> u32 {
    value.clamp(0.0, 100.0).round() as u32
}

fn limits(cluster: &Cluster) -> Limits {
    let thresholds = cluster.circuit_breakers.as_ref().and_then(|breakers| breakers.thresholds.first());
    // Envoy's own limits hold where a cluster says nothing; ours always does.
    let Some(thresholds) = thresholds else { return Limits::default() };
    let limit = |value: Option<&UInt32Value>| number(value).filter(|limit| *limit < u32::MAX);
    Limits {
        connections: limit(thresholds.max_connections.as_ref()),
        pending: limit(thresholds.max_pending_requests.as_ref()),
        requests: limit(thresholds.max_requests.as_ref()),
        retries: limit(thresholds.max_retries.as_ref()),
        retry_budget: thresholds.retry_budget.as_ref().map(|budget| {
            let share = budget.budget_percent.as_ref().map_or(20, |share| percent(share.value));
            (share, number(budget.min_retry_concurrency.as_ref()).unwrap_or(3))
        }),
    }
}

/// The statuses that a matcher of responses takes.
fn statuses(matcher: &MatchPredicate, into: &mut Vec<u16>) -> Result<(), ClusterError> {
    let other = || unsupported("outlier detection by anything but a response's status");
    match &matcher.rule {
        Some(Rule::OrMatch(any)) => any.rules.iter().try_for_each(|one| statuses(one, into)),
        Some(Rule::HttpResponseHeadersMatch(all)) => {
            let [HeaderMatcher { name, header_match_specifier: Some(StringMatch(text)), invert_match: false, .. }] =
                &all.headers[..]
            else {
                return Err(other());
            };
            match &text.match_pattern {
                Some(MatchPattern::Exact(code)) if name == ":status" => into.push(code.parse().map_err(|_| other())?),
                _ => return Err(other()),
            }
            Ok(())
        }
        _ => Err(other()),
    }
}

fn ejection(settings: &OutlierDetection, codes: Vec<u16>) -> Ejection {
    // The share of cases in which a threshold is kept to; Envoy draws lots, which nobody asks for.
    let check = |threshold: Option<&UInt32Value>, enforced: Option<&UInt32Value>, by_default: bool| {
        let enforced = number(enforced).map_or(by_default, |share| share > 0);
        Some(number(threshold).unwrap_or(5)).filter(|threshold| enforced && *threshold > 0)
    };
    let base = time(settings.base_ejection_time.as_ref()).unwrap_or(Duration::from_secs(30));
    Ejection {
        codes,
        errors: check(settings.consecutive_5xx.as_ref(), settings.enforcing_consecutive_5xx.as_ref(), true),
        gateway_errors: check(
            settings.consecutive_gateway_failure.as_ref(),
            settings.enforcing_consecutive_gateway_failure.as_ref(),
            false,
        ),
        local: check(
            settings.consecutive_local_origin_failure.as_ref(),
            settings.enforcing_consecutive_local_origin_failure.as_ref(),
            true,
        ),
        split: settings.split_external_local_origin_errors,
        interval: time(settings.interval.as_ref()).unwrap_or(Duration::from_secs(10)),
        time: base,
        longest: time(settings.max_ejection_time.as_ref()).unwrap_or(Duration::from_secs(300).max(base)),
        share: number(settings.max_ejection_percent.as_ref()).unwrap_or(10).min(100),
    }
}

/// The version, and the socket within.
fn proxy_protocol(socket: &TransportSocket) -> Result<(Version, Option<TransportSocket>), ClusterError> {
    let Some(ConfigType::TypedConfig(config)) = &socket.config_type else {
        return Err(unsupported("PROXY protocol without a configuration"));
    };
    let outer = ProxyProtocolUpstreamTransport::decode(config.value.as_slice())
        .map_err(|error| ClusterError::Transport(format!("PROXY protocol: {error}")))?;
    let version = outer.config.unwrap_or_default().version;
    let is_v2 = version == i32::from(proxy_protocol_config::Version::V2);
    Ok((if is_v2 { Version::V2 } else { Version::V1 }, outer.transport_socket))
}

fn path(source: &DataSource) -> Result<PathBuf, ClusterError> {
    match &source.specifier {
        Some(Specifier::Filename(path)) if !path.is_empty() => Ok(path.into()),
        _ => Err(unsupported("TLS with a certificate that is not in a file")),
    }
}

// Envoy's newer field takes one matcher for each type of name; the older one, which istiod writes, takes any type.
#[allow(deprecated)]
fn tls(socket: &TransportSocket, http: &HttpProtocolOptions) -> Result<Tls, ClusterError> {
    let Some(ConfigType::TypedConfig(config)) = &socket.config_type else {
        return Err(unsupported("TLS without a configuration"));
    };
    let context = UpstreamTlsContext::decode(config.value.as_slice())
        .map_err(|error| ClusterError::Transport(format!("TLS: {error}")))?;
    let common = context.common_tls_context.unwrap_or_default();
    if !common.tls_certificate_sds_secret_configs.is_empty() {
        return Err(unsupported("TLS with certificates of a secret discovery service"));
    }
    let validation = match common.validation_context_type {
        None => None,
        Some(ValidationContextType::ValidationContext(validation)) => Some(validation),
        Some(_) => return Err(unsupported("TLS with authorities of a secret discovery service")),
    };
    let mut tls = Tls {
        name: Some(context.sni).filter(|name| !name.is_empty()),
        protocols: common.alpn_protocols,
        ..Tls::default()
    };
    if let Some(validation) = validation {
        tls.authorities = validation.trusted_ca.as_ref().map(path).transpose()?;
        tls.revoked = validation.crl.as_ref().map(path).transpose()?;
        for matcher in &validation.match_subject_alt_names {
            match &matcher.match_pattern {
                Some(MatchPattern::Exact(name)) => tls.names.push(name.clone()),
                _ => return Err(unsupported("TLS with names that are not exact")),
            }
        }
    }
    if let Some(own) = common.tls_certificates.first() {
        let half = || unsupported("TLS with half a certificate");
        let chain = own.certificate_chain.as_ref().ok_or_else(half)?;
        tls.own = Some((path(chain)?, path(own.private_key.as_ref().ok_or_else(half)?)?));
    }
    if let Some(upstream) = &http.upstream_http_protocol_options {
        tls.name_of_host = upstream.auto_sni && tls.name.is_none();
        tls.certified_host = upstream.auto_san_validation;
    }
    Ok(tls)
}
