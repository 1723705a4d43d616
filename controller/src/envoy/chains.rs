//! The two filter chains of every listener: HTTP, and everything else. Both ask the filter, and go where it says.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use portolan_proto::envoy::envoy::config::accesslog::v3::{AccessLog, access_log};
use portolan_proto::envoy::envoy::config::common::mutation_rules::v3::{HeaderMutation, header_mutation};
use portolan_proto::envoy::envoy::config::core::v3 as core;
use portolan_proto::envoy::envoy::config::listener::v3::{Filter, FilterChain, FilterChainMatch, filter};
use portolan_proto::envoy::envoy::config::route::v3 as route;
use portolan_proto::envoy::envoy::config::route::v3::route_match::PathSpecifier;
use portolan_proto::envoy::envoy::extensions::access_loggers::file::v3::{FileAccessLog, file_access_log};
use portolan_proto::envoy::envoy::extensions::filters::common::fault::v3::{FaultDelay, fault_delay};
use portolan_proto::envoy::envoy::extensions::filters::common::set_filter_state::v3::{
    FilterStateValue, filter_state_value,
};
use portolan_proto::envoy::envoy::extensions::filters::http::fault::v3::{FaultAbort, HttpFault, fault_abort};
use portolan_proto::envoy::envoy::extensions::filters::http::on_demand::v3::{OnDemand, OnDemandCds};
use portolan_proto::envoy::envoy::extensions::filters::http::router::v3::Router;
use portolan_proto::envoy::envoy::extensions::filters::http::wasm::v3::Wasm as HttpWasm;
use portolan_proto::envoy::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, http_connection_manager as hcm,
};
use portolan_proto::envoy::envoy::extensions::filters::network::set_filter_state::v3::Config as SetFilterState;
use portolan_proto::envoy::envoy::extensions::filters::network::sni_dynamic_forward_proxy::v3::{
    FilterConfig as SniFilterConfig, filter_config::PortSpecifier,
};
use portolan_proto::envoy::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy};
use portolan_proto::envoy::envoy::extensions::filters::network::wasm::v3::Wasm as NetworkWasm;
use portolan_proto::envoy::envoy::extensions::http::early_header_mutation::header_mutation::v3::HeaderMutation as EarlyHeaderMutation;
use portolan_proto::envoy::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use portolan_proto::envoy::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig;
use portolan_proto::envoy::envoy::extensions::wasm::v3::{FailurePolicy, PluginConfig, VmConfig, plugin_config};
use portolan_proto::envoy::envoy::r#type::matcher::v3::{StringMatcher, string_matcher};
use portolan_proto::envoy::envoy::r#type::v3::{FractionalPercent, HashPolicy, hash_policy};
use portolan_proto::envoy::google::protobuf::{self, StringValue};
use portolan_proto::v1::GatewayServer;
use portolan_registry::route::Manner;
use prost::{Message, Name};
use serde_json::json;

use super::cluster::{dns_cache, filter as http_filter};
use super::settings::{NoSnapshot, Settings};
use super::{BLACK_HOLE, any, number, server_tls, switch};
use crate::compile::needs::Needs;
use crate::model::{Role, Scope};

/// The header by which the route chooses the cluster.
const CLUSTER_HEADER: &str = "x-portolan-cluster";
/// The header that tells the filter where a request came in, which costs a request half of what the question does.
const DESTINATION_HEADER: &str = "x-portolan-destination";
/// The filter state by which it balances consistently, with each attempt.
const HASH_STATE: &str = "envoy.hashable_string";
/// The header by which it mirrors.
const MIRROR_HEADER: &str = "x-portolan-mirror";
/// The header by which it retries otherwise than Istio does by default.
const RETRY_HEADER: &str = "x-portolan-retry";
/// The header by which the fault filter delays.
const DELAY_HEADER: &str = "x-envoy-fault-delay-request";

/// The chain by whose name the filter knows requests to the HTTP proxy.
const PROXY_CHAIN: &str = "http_proxy";
/// Both plugins and all workers' contexts share one VM on each thread.
const VM_ID: &str = "portolan";
/// How long a request or connection waits for a cluster that is not known yet.
const CLUSTER_TIMEOUT: Duration = Duration::from_secs(5);
/// A line for each request and connection; the last field is the filter's decision.
const ACCESS_LOG: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% \
%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %DOWNSTREAM_LOCAL_ADDRESS% \
\"%REQ(:AUTHORITY)%\" \"%REQUESTED_SERVER_NAME%\" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_HOST% \
\"%FILTER_STATE(wasm.portolan.decision:PLAIN)%\"\n";
/// Istio's default retry policy.
const RETRY_ON: &str = "connect-failure,refused-stream,unavailable,cancelled";

/// What the chains of one Envoy have in common.
pub(super) struct Chains {
    settings: Settings,
    /// Configuration of the plugins.
    plugin: String,
    v6_only: bool,
    /// Whether the filter is told where a request came in.
    says_destination: bool,
    /// What routes need.
    pub(super) needs: Arc<Needs>,
    /// Folder of the mesh's certificates.
    pub(super) mesh_certificates: Option<String>,
}

impl Chains {
    pub(super) fn new(settings: &Settings, scope: &Scope, node: &str) -> Self {
        let no_snapshot = match settings.no_snapshot {
            NoSnapshot::Closed => "closed",
            NoSnapshot::Open => "open",
        };
        // A gateway's filter asks for the chain in any case.
        let says_destination = scope.role == Role::Sidecar;
        let mut plugin = json!({
            "controller": settings.controller,
            "namespace": scope.namespace,
            "labels": scope.labels,
            "role": if scope.role == Role::Gateway { "gateway" } else { "sidecar" },
            "ips": scope.ips,
            "no_snapshot": no_snapshot,
            // Costs a host call for each request: only where somebody reads it.
            "report_decisions": settings.access_log.is_some(),
            "destination_header": says_destination,
        });
        for (field, value) in [("locality", scope.locality.as_str()), ("subscriber", node)] {
            if !value.is_empty() {
                plugin[field] = value.into();
            }
        }
        let mut ips = scope.ips.iter().filter_map(|ip| ip.parse::<IpAddr>().ok()).peekable();
        let v6_only = ips.peek().is_some() && ips.all(|ip| ip.is_ipv6());
        Chains {
            settings: settings.clone(),
            plugin: plugin.to_string(),
            v6_only,
            says_destination,
            needs: Arc::default(),
            mesh_certificates: None,
        }
    }

    /// Plain-text HTTP of captured connections.
    pub(super) fn http(&self, listener: &str) -> FilterChain {
        FilterChain {
            name: "http".to_owned(),
            filter_chain_match: Some(FilterChainMatch {
                transport_protocol: "raw_buffer".to_owned(),
                application_protocols: vec!["http/1.1".to_owned(), "h2c".to_owned()],
                ..FilterChainMatch::default()
            }),
            filters: vec![self.connection_manager(
                &format!("outbound_{listener};"),
                "%DOWNSTREAM_LOCAL_ADDRESS%",
                self.routes(&prefix(), &[]),
            )],
            ..FilterChain::default()
        }
    }

    /// A Unix socket or a forward proxy of a Sidecar's.
    pub(super) fn egress_socket(&self, listener: &str, server: &GatewayServer) -> FilterChain {
        let filters = match server.http {
            true => self.forward_proxy(listener, &server.name).filters,
            false => self.tcp(listener, None).filters,
        };
        FilterChain { name: server.name.clone(), filters, ..FilterChain::default() }
    }

    /// Requests to the HTTP proxy, CONNECT among them.
    pub(super) fn http_proxy(&self, listener: &str) -> FilterChain {
        self.forward_proxy(listener, "proxy")
    }

    /// The filter is told of it by this word.
    fn forward_proxy(&self, listener: &str, said: &str) -> FilterChain {
        let connect = route::route_action::UpgradeConfig {
            upgrade_type: "CONNECT".to_owned(),
            connect_config: Some(route::route_action::upgrade_config::ConnectConfig::default()),
            ..Default::default()
        };
        let matcher = PathSpecifier::ConnectMatcher(route::route_match::ConnectMatcher {});
        let mut routes = self.routes(&matcher, &[connect]);
        routes.extend(self.routes(&prefix(), &[]));
        FilterChain {
            name: PROXY_CHAIN.to_owned(),
            filters: vec![self.connection_manager(&format!("outbound_{listener};"), said, routes)],
            ..FilterChain::default()
        }
    }

    /// The routes of requests with such a path: what a header can only choose, and not say, each has as its own.
    fn routes(&self, path: &PathSpecifier, upgrades: &[route::route_action::UpgradeConfig]) -> Vec<route::Route> {
        let retries = || self.needs.retries.iter().copied().map(Some).chain([None]);
        let mirrors = self.needs.mirrors.iter().map(Vec::as_slice).chain([&[][..]]);
        mirrors
            .flat_map(|mirrors| retries().map(move |manner| (mirrors, manner)))
            .map(|(mirrors, manner)| routed(path.clone(), upgrades.to_vec(), mirrors, manner))
            .collect()
    }

    fn connection_manager(&self, stat_prefix: &str, destination: &str, routes: Vec<route::Route>) -> Filter {
        let mut manager = self.manager(stat_prefix, routes);
        if self.says_destination {
            manager.early_header_mutation_extensions = vec![say_destination(destination)];
        }
        filter("envoy.filters.network.http_connection_manager", &manager)
    }

    fn manager(&self, stat_prefix: &str, routes: Vec<route::Route>) -> HttpConnectionManager {
        let upgrade = |kind: &str| hcm::UpgradeConfig { upgrade_type: kind.to_owned(), ..Default::default() };
        let mut upgrades = vec![upgrade("websocket")];
        if routes.len() > 1 {
            upgrades.push(upgrade("CONNECT"));
        }
        let mut filters = vec![
            http_filter("portolan", &HttpWasm { config: Some(self.plugin("portolan_http")) }),
            http_filter("envoy.filters.http.on_demand", &on_demand()),
        ];
        // Each filter costs every request something.
        if self.needs.delays {
            filters.push(http_filter("envoy.filters.http.fault", &fault()));
        }
        filters.push(http_filter("envoy.filters.http.router", &Router::default()));
        let virtual_host = route::VirtualHost {
            name: "portolan".to_owned(),
            domains: vec!["*".to_owned()],
            routes,
            include_request_attempt_count: true,
            ..route::VirtualHost::default()
        };
        HttpConnectionManager {
            stat_prefix: stat_prefix.to_owned(),
            // Bodies of any length and pauses of any length, as istiod has it.
            stream_idle_timeout: Some(protobuf::Duration::default()),
            use_remote_address: switch(false),
            normalize_path: switch(true),
            proxy_100_continue: true,
            upgrade_configs: upgrades,
            access_log: self.access_log(),
            http_filters: filters,
            route_specifier: Some(hcm::RouteSpecifier::RouteConfig(route::RouteConfiguration {
                name: "portolan".to_owned(),
                virtual_hosts: vec![virtual_host],
                // Clusters come later than the routes that name them.
                validate_clusters: switch(false),
                ..route::RouteConfiguration::default()
            })),
            ..HttpConnectionManager::default()
        }
    }

    /// Everything that is not HTTP. `dials`: the server name may be resolved and dialled, at the port that the client
    /// dialled (SEMANTICS 3.3). The TCP proxy wants the name resolved before it chooses an upstream.
    pub(super) fn tcp(&self, listener: &str, dials: Option<u16>) -> FilterChain {
        let mut filters = vec![filter("portolan", &NetworkWasm { config: Some(self.plugin("portolan_tcp")) })];
        if let Some(port) = dials {
            filters.insert(0, filter("envoy.filters.network.set_filter_state", &dialled_port()));
            let resolve = SniFilterConfig {
                dns_cache_config: Some(dns_cache(self.v6_only)),
                port_specifier: Some(PortSpecifier::PortValue(port.into())),
                ..SniFilterConfig::default()
            };
            filters.push(filter("envoy.filters.network.sni_dynamic_forward_proxy", &resolve));
        }
        if self.needs.tunnels {
            // None but those that the filter says.
            let off = state("envoy.tcp_proxy.disable_tunneling", "true");
            filters.insert(0, filter("envoy.filters.network.set_filter_state", &off));
        }
        filters.push(filter("envoy.filters.network.tcp_proxy", &self.tcp_proxy(listener)));
        FilterChain { name: "tcp".to_owned(), filters, ..FilterChain::default() }
    }

    /// A server of a gateway, or of a Sidecar's listener with a socket of its own. `sniffed`: what is HTTP the first bytes
    /// say.
    pub(super) fn server(&self, listener: &str, server: &GatewayServer, sniffed: bool) -> FilterChain {
        let mut chain = if server.http && self.says_destination {
            let http = self.http(listener);
            FilterChain { filter_chain_match: http.filter_chain_match.filter(|_| sniffed), ..http }
        } else if server.http {
            // Clients are strangers: what they say of themselves is not believed, as istiod has it.
            let manager = HttpConnectionManager {
                use_remote_address: switch(true),
                forward_client_cert_details: hcm::ForwardClientCertDetails::SanitizeSet.into(),
                set_current_client_cert_details: Some(hcm::SetCurrentClientCertDetails {
                    subject: switch(true),
                    cert: true,
                    dns: true,
                    uri: true,
                    ..hcm::SetCurrentClientCertDetails::default()
                }),
                ..self.manager(&format!("outbound_{listener};"), self.routes(&prefix(), &[]))
            };
            let filters = vec![filter("envoy.filters.network.http_connection_manager", &manager)];
            FilterChain { filters, ..FilterChain::default() }
        } else {
            self.tcp(listener, None)
        };
        chain.name.clone_from(&server.name);
        if !server.server_names.is_empty() {
            let server_names = server.server_names.clone();
            chain.filter_chain_match = Some(FilterChainMatch { server_names, ..FilterChainMatch::default() });
        }
        let (credentials, mesh) = (self.settings.credentials.as_deref(), self.mesh_certificates.as_deref());
        let folders = server_tls::Folders { credentials, mesh };
        chain.transport_socket = server.tls.as_ref().map(|tls| server_tls::socket(tls, folders));
        chain
    }

    /// A chain that closes every connection.
    pub(super) fn black_hole(&self) -> FilterChain {
        let refuse = TcpProxy { on_demand: None, tunneling_config: None, ..self.tcp_proxy(BLACK_HOLE) };
        let filters = vec![filter("envoy.filters.network.tcp_proxy", &refuse)];
        FilterChain { name: "blackhole".to_owned(), filters, ..FilterChain::default() }
    }

    fn tcp_proxy(&self, listener: &str) -> TcpProxy {
        TcpProxy {
            stat_prefix: format!("outbound_{listener};"),
            // The filter names the cluster; where it says nothing, nothing is let on.
            cluster_specifier: Some(tcp_proxy::ClusterSpecifier::Cluster(BLACK_HOLE.to_owned())),
            on_demand: Some(tcp_proxy::OnDemand {
                odcds_config: Some(aggregated()),
                timeout: Some(duration(CLUSTER_TIMEOUT)),
                ..tcp_proxy::OnDemand::default()
            }),
            access_log: self.access_log(),
            tunneling_config: self.needs.tunnels.then(|| tcp_proxy::TunnelingConfig {
                hostname: "%FILTER_STATE(wasm.portolan.tunnel:PLAIN)%".to_owned(),
                ..tcp_proxy::TunnelingConfig::default()
            }),
            // Only a cluster that balances by hash asks for it.
            hash_policy: vec![HashPolicy {
                policy_specifier: Some(hash_policy::PolicySpecifier::SourceIp(hash_policy::SourceIp {})),
            }],
            ..TcpProxy::default()
        }
    }

    fn plugin(&self, root: &str) -> PluginConfig {
        let file = core::DataSource {
            specifier: Some(core::data_source::Specifier::Filename(self.settings.filter.clone())),
            ..core::DataSource::default()
        };
        let code = core::AsyncDataSource { specifier: Some(core::async_data_source::Specifier::Local(file)) };
        PluginConfig {
            name: root.to_owned(),
            root_id: root.to_owned(),
            configuration: Some(any(&StringValue { value: self.plugin.clone() })),
            // A trap refuses, and the next request gets a fresh VM: never open.
            failure_policy: FailurePolicy::FailReload.into(),
            vm: Some(plugin_config::Vm::VmConfig(VmConfig {
                vm_id: VM_ID.to_owned(),
                runtime: "envoy.wasm.runtime.v8".to_owned(),
                code: Some(code),
                ..VmConfig::default()
            })),
            ..PluginConfig::default()
        }
    }

    fn access_log(&self) -> Vec<AccessLog> {
        let Some(path) = &self.settings.access_log else { return Vec::new() };
        let source = core::DataSource {
            specifier: Some(core::data_source::Specifier::InlineString(ACCESS_LOG.to_owned())),
            ..core::DataSource::default()
        };
        let format = core::SubstitutionFormatString {
            format: Some(core::substitution_format_string::Format::TextFormatSource(source)),
            ..core::SubstitutionFormatString::default()
        };
        let file = FileAccessLog {
            path: path.clone(),
            access_log_format: Some(file_access_log::AccessLogFormat::LogFormat(format)),
        };
        vec![AccessLog {
            name: "envoy.access_loggers.file".to_owned(),
            config_type: Some(access_log::ConfigType::TypedConfig(any(&file))),
            ..AccessLog::default()
        }]
    }
}

fn filter<M: Message + Name>(name: &str, config: &M) -> Filter {
    Filter { name: name.to_owned(), config_type: Some(filter::ConfigType::TypedConfig(any(config))) }
}

fn duration(time: Duration) -> protobuf::Duration {
    protobuf::Duration { seconds: i64::try_from(time.as_secs()).unwrap_or(i64::MAX), nanos: 0 }
}

/// The stream on which listeners come as well.
pub(super) fn aggregated() -> core::ConfigSource {
    core::ConfigSource {
        resource_api_version: core::ApiVersion::V3.into(),
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(
            core::AggregatedConfigSource::default(),
        )),
        ..core::ConfigSource::default()
    }
}

fn on_demand() -> OnDemand {
    let source =
        OnDemandCds { source: Some(aggregated()), timeout: Some(duration(CLUSTER_TIMEOUT)), ..OnDemandCds::default() };
    OnDemand { odcds: Some(source) }
}

/// Delays, and answers after them, that the filter orders; a client's own order has been removed by then.
fn fault() -> HttpFault {
    let always = FractionalPercent { numerator: 100, ..FractionalPercent::default() };
    let delay = FaultDelay {
        percentage: Some(always),
        fault_delay_secifier: Some(fault_delay::FaultDelaySecifier::HeaderDelay(fault_delay::HeaderDelay {})),
    };
    let abort = FaultAbort {
        percentage: Some(always),
        error_type: Some(fault_abort::ErrorType::HeaderAbort(fault_abort::HeaderAbort {})),
        ..FaultAbort::default()
    };
    HttpFault { delay: Some(delay), abort: Some(abort), ..HttpFault::default() }
}

/// Says where a request came in, in place of whatever its client says there.
fn say_destination(value: &str) -> core::TypedExtensionConfig {
    let header = core::HeaderValue {
        key: DESTINATION_HEADER.to_owned(),
        value: value.to_owned(),
        ..core::HeaderValue::default()
    };
    let append = core::HeaderValueOption {
        header: Some(header),
        append_action: core::header_value_option::HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        ..core::HeaderValueOption::default()
    };
    let mutation = HeaderMutation { action: Some(header_mutation::Action::Append(append)) };
    core::TypedExtensionConfig {
        name: "envoy.http.early_header_mutation.header_mutation".to_owned(),
        typed_config: Some(any(&EarlyHeaderMutation { mutations: vec![mutation] })),
    }
}

/// The port at which a name is dialled, as the cluster wants to be told.
fn dialled_port() -> SetFilterState {
    state("envoy.upstream.dynamic_port", "%DOWNSTREAM_LOCAL_PORT%")
}

/// Says something of a connection at its begin.
fn state(key: &str, text: &str) -> SetFilterState {
    let format = core::SubstitutionFormatString {
        format: Some(core::substitution_format_string::Format::TextFormatSource(core::DataSource {
            specifier: Some(core::data_source::Specifier::InlineString(text.to_owned())),
            ..core::DataSource::default()
        })),
        ..core::SubstitutionFormatString::default()
    };
    let value = FilterStateValue {
        key: Some(filter_state_value::Key::ObjectKey(key.to_owned())),
        value: Some(filter_state_value::Value::FormatString(format)),
        ..FilterStateValue::default()
    };
    SetFilterState { on_new_connection: vec![value], ..SetFilterState::default() }
}

fn prefix() -> PathSpecifier {
    PathSpecifier::Prefix("/".to_owned())
}

/// The route of requests that the filter has decided about, to be mirrored there, and to be retried in this
/// manner or in Istio's own. Others have no route, and get a 404.
fn routed(
    path: PathSpecifier,
    upgrade_configs: Vec<route::route_action::UpgradeConfig>,
    mirrors: &[String],
    manner: Option<Manner>,
) -> route::Route {
    let header = |name: &str, how| route::HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(how),
        ..route::HeaderMatcher::default()
    };
    let present = || route::header_matcher::HeaderMatchSpecifier::PresentMatch(true);
    let mut headers = vec![header(CLUSTER_HEADER, present())];
    let exactly = |text: String| {
        let match_pattern = Some(string_matcher::MatchPattern::Exact(text));
        let text = StringMatcher { match_pattern, ..StringMatcher::default() };
        route::header_matcher::HeaderMatchSpecifier::StringMatch(text)
    };
    headers.extend(manner.map(|manner| header(RETRY_HEADER, exactly(manner.to_string()))));
    if !mirrors.is_empty() {
        headers.push(header(MIRROR_HEADER, exactly(mirrors.join(","))));
    }
    let hash = route::route_action::hash_policy::FilterState { key: HASH_STATE.to_owned() };
    let action = route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::ClusterHeader(CLUSTER_HEADER.to_owned())),
        timeout: Some(protobuf::Duration::default()),
        retry_policy: Some(retry_policy(manner.unwrap_or_default())),
        hash_policy: vec![route::route_action::HashPolicy {
            policy_specifier: Some(route::route_action::hash_policy::PolicySpecifier::FilterState(hash)),
            terminal: false,
        }],
        request_mirror_policies: mirrors.iter().map(|cluster| mirror(cluster)).collect(),
        upgrade_configs,
        ..route::RouteAction::default()
    };
    route::Route {
        r#match: Some(route::RouteMatch { path_specifier: Some(path), headers, ..route::RouteMatch::default() }),
        request_headers_to_remove: [CLUSTER_HEADER, DESTINATION_HEADER, RETRY_HEADER, MIRROR_HEADER, DELAY_HEADER]
            .map(str::to_owned)
            .into(),
        action: Some(route::route::Action::Route(action)),
        ..route::Route::default()
    }
}

fn retry_policy(manner: Manner) -> route::RetryPolicy {
    let Manner { own, base_ms, same_hosts, remote } = manner;
    let others = route::retry_policy::RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(route::retry_policy::retry_host_predicate::ConfigType::TypedConfig(any(
            &PreviousHostsPredicate {},
        ))),
    };
    let priorities = route::retry_policy::RetryPriority {
        name: "envoy.retry_priorities.previous_priorities".to_owned(),
        config_type: Some(route::retry_policy::retry_priority::ConfigType::TypedConfig(any(
            &PreviousPrioritiesConfig { update_frequency: 2 },
        ))),
    };
    let back_off = route::retry_policy::RetryBackOff {
        base_interval: Some(protobuf::Duration {
            seconds: i64::from(base_ms / 1000),
            nanos: i32::try_from(base_ms % 1000 * 1_000_000).unwrap_or_default(),
        }),
        ..route::retry_policy::RetryBackOff::default()
    };
    route::RetryPolicy {
        retry_on: if own { String::new() } else { RETRY_ON.to_owned() },
        num_retries: if own { None } else { number(2) },
        retry_host_predicate: if same_hosts { Vec::new() } else { vec![others] },
        retry_priority: remote.then_some(priorities),
        retry_back_off: (base_ms > 0).then_some(back_off),
        host_selection_retry_max_attempts: 5,
        ..route::RetryPolicy::default()
    }
}

/// The router reads a `cluster_header` of a mirror policy only after the cluster's filters have run, so that it could not
/// be kept from the upstream: mirrors are named in routes, which the header chooses.
fn mirror(cluster: &str) -> route::route_action::RequestMirrorPolicy {
    route::route_action::RequestMirrorPolicy {
        cluster: cluster.to_owned(),
        trace_sampled: switch(false),
        disable_shadow_host_suffix_append: true,
        ..Default::default()
    }
}
