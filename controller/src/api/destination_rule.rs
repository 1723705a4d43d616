//! DestinationRule.

use std::collections::BTreeMap;

use jiff::SignedDuration;

use crate::api::message::{enumeration, message};
use crate::api::virtual_service::PortSelector;
use crate::model::Labels;

message! {
    /// The spec.
    DestinationRule {
        /// Host or wildcard; a short name is one of the resource's namespace.
        host: String = "host",
        /// Policy of all ports and subsets.
        traffic_policy: Option<TrafficPolicy> = "trafficPolicy",
        /// Subsets.
        subsets: Vec<Subset> = "subsets",
        /// `exportTo` as written; empty means the mesh's default.
        export_to: Vec<String> = "exportTo",
        /// Client workloads for which this holds.
        workload_selector: Option<WorkloadSelector> = "workloadSelector",
    }
}

message! {
    /// Workloads by label.
    WorkloadSelector {
        /// Labels that they must have.
        match_labels: Labels = "matchLabels",
    }
}

message! {
    /// Endpoints of a host by label.
    Subset {
        /// Name.
        name: String = "name",
        /// Labels that they must have.
        labels: Labels = "labels",
        /// Policy, over that of the rule.
        traffic_policy: Option<TrafficPolicy> = "trafficPolicy",
    }
}

message! {
    /// How to talk to a host.
    TrafficPolicy {
        /// Choice of an endpoint.
        load_balancer: Option<LoadBalancer> = "loadBalancer",
        /// Limits on connections.
        connection_pool: Option<ConnectionPool> = "connectionPool",
        /// Ejection of endpoints that fail.
        outlier_detection: Option<OutlierDetection> = "outlierDetection",
        /// TLS to the host.
        tls: Option<ClientTls> = "tls",
        /// Policies of single ports, each in place of the four above.
        port_level_settings: Vec<PortTrafficPolicy> = "portLevelSettings",
        /// Tunnel through a proxy.
        tunnel: Option<Tunnel> = "tunnel",
        /// PROXY protocol.
        proxy_protocol: Option<ProxyProtocol> = "proxyProtocol",
        /// Limit on retries.
        retry_budget: Option<RetryBudget> = "retryBudget",
    }
}

message! {
    /// The policy of one port.
    PortTrafficPolicy {
        /// Port.
        port: Option<PortSelector> = "port",
        /// Choice of an endpoint.
        load_balancer: Option<LoadBalancer> = "loadBalancer",
        /// Limits on connections.
        connection_pool: Option<ConnectionPool> = "connectionPool",
        /// Ejection of endpoints that fail.
        outlier_detection: Option<OutlierDetection> = "outlierDetection",
        /// TLS to the host.
        tls: Option<ClientTls> = "tls",
    }
}

message! {
    /// A tunnel by HTTP.
    Tunnel {
        /// `CONNECT` (also where empty) or `POST`.
        protocol: String = "protocol",
        /// Target of the tunnel.
        target_host: String = "targetHost",
        /// Port of the target.
        target_port: u32 = "targetPort",
    }
}

message! {
    /// PROXY protocol.
    ProxyProtocol {
        /// Version.
        version: ProxyProtocolVersion = "version",
    }
}

enumeration! {
    /// Version of the PROXY protocol.
    ProxyProtocolVersion {
        /// Text.
        V1 = 0 "V1",
        /// Binary.
        V2 = 1 "V2",
    }
}

message! {
    /// A limit on retries.
    RetryBudget {
        /// Share of active requests, 20 where absent.
        percent: Option<f64> = "percent",
        /// Retries that are always allowed.
        min_retry_concurrency: u32 = "minRetryConcurrency",
        /// Interval over which requests are counted.
        budget_interval: Option<SignedDuration> = "budgetInterval",
    }
}

message! {
    /// Choice of an endpoint.
    LoadBalancer {
        /// By one of the simple algorithms.
        simple: Option<SimpleLb> = "simple",
        /// By a hash of something that the request holds.
        consistent_hash: Option<ConsistentHash> = "consistentHash",
        /// By the load that endpoints report.
        backend_utilization: Option<BackendUtilization> = "backendUtilization",
        /// Localities in the user's order.
        locality_lb_setting: Option<LocalityLb> = "localityLbSetting",
        /// Localities in Envoy's zone-aware way.
        zone_aware_lb_setting: Option<ZoneAwareLb> = "zoneAwareLbSetting",
        /// Deprecated form of `warmup`.
        warmup_duration_secs: Option<SignedDuration> = "warmupDurationSecs",
        /// Slow start of new endpoints.
        warmup: Option<Warmup> = "warmup",
    }
}

enumeration! {
    /// Simple algorithms.
    SimpleLb {
        /// Istio's default.
        Unspecified = 0 "UNSPECIFIED",
        /// Old name of `LeastRequest`.
        LeastConn = 1 "LEAST_CONN",
        /// Any.
        Random = 2 "RANDOM",
        /// The address that the client dialled.
        Passthrough = 3 "PASSTHROUGH",
        /// In turn.
        RoundRobin = 4 "ROUND_ROBIN",
        /// The less busy of two.
        LeastRequest = 5 "LEAST_REQUEST",
    }
}

message! {
    /// Consistent hashing: one key and one algorithm.
    ConsistentHash {
        /// Key: a header.
        http_header_name: Option<String> = "httpHeaderName",
        /// Key: a cookie.
        http_cookie: Option<HttpCookie> = "httpCookie",
        /// Key: the client's address.
        use_source_ip: Option<bool> = "useSourceIp",
        /// Key: a query parameter.
        http_query_parameter_name: Option<String> = "httpQueryParameterName",
        /// Algorithm: ring.
        ring_hash: Option<RingHash> = "ringHash",
        /// Algorithm: Maglev.
        maglev: Option<Maglev> = "maglev",
        /// Deprecated form of `ringHash.minimumRingSize`.
        minimum_ring_size: u64 = "minimumRingSize",
    }
}

message! {
    /// Choice by the load that endpoints report.
    BackendUtilization {
        /// Time between two computations of the weights.
        weight_update_period: Option<SignedDuration> = "weightUpdatePeriod",
        /// Age below which a report is not trusted.
        weight_stabilization_period: Option<SignedDuration> = "weightStabilizationPeriod",
        /// Age above which a report is forgotten.
        weight_expiration_period: Option<SignedDuration> = "weightExpirationPeriod",
        /// Penalty for errors, in percent of the utilization.
        error_utilization_penalty_percent: u32 = "errorUtilizationPenaltyPercent",
        /// Metrics that the utilization is made of.
        metric_names_for_computing_utilization: Vec<String> = "metricNamesForComputingUtilization",
    }
}

message! {
    /// Ring hashing.
    RingHash {
        /// Least number of entries, 1024 where absent or 0.
        minimum_ring_size: u64 = "minimumRingSize",
    }
}

message! {
    /// Maglev hashing.
    Maglev {
        /// Prime number of entries.
        table_size: u64 = "tableSize",
    }
}

message! {
    /// A cookie.
    HttpCookie {
        /// Name.
        name: String = "name",
        /// Path.
        path: String = "path",
        /// Lifetime of a generated cookie; without one none is generated.
        ttl: Option<SignedDuration> = "ttl",
        /// More attributes.
        attributes: Vec<CookieAttribute> = "attributes",
    }
}

message! {
    /// An attribute of a cookie.
    CookieAttribute {
        /// Name.
        name: String = "name",
        /// Value.
        value: String = "value",
    }
}

message! {
    /// Localities in the user's order.
    LocalityLb {
        /// Shares by locality.
        distribute: Vec<Distribute> = "distribute",
        /// Region to fail over to.
        failover: Vec<Failover> = "failover",
        /// Labels by which endpoints are ranked.
        failover_priority: Vec<String> = "failoverPriority",
        /// False switches it off.
        enabled: Option<bool> = "enabled",
    }
}

message! {
    /// Shares for clients of a locality.
    Distribute {
        /// `region/zone/subzone`, `*` for the rest.
        from: String = "from",
        /// Share by locality, 100 together.
        to: BTreeMap<String, u32> = "to",
    }
}

message! {
    /// A region and its stand-in.
    Failover {
        /// Region.
        from: String = "from",
        /// Its stand-in.
        to: String = "to",
    }
}

message! {
    /// Localities in Envoy's zone-aware way.
    ZoneAwareLb {
        /// False switches it off.
        enabled: Option<bool> = "enabled",
        /// Region to fail over to.
        failover: Vec<Failover> = "failover",
        /// Labels by which endpoints are ranked.
        failover_priority: Vec<String> = "failoverPriority",
        /// Fewer endpoints are not split by zone.
        min_cluster_size: Option<u64> = "minClusterSize",
    }
}

message! {
    /// Slow start.
    Warmup {
        /// How long.
        duration: Option<SignedDuration> = "duration",
        /// Share at the beginning, 10 where absent.
        minimum_percent: Option<f64> = "minimumPercent",
        /// Shape of the curve, 1 where absent.
        aggression: Option<f64> = "aggression",
    }
}

message! {
    /// Limits on connections.
    ConnectionPool {
        /// Of TCP.
        tcp: Option<TcpPool> = "tcp",
        /// Of HTTP.
        http: Option<HttpPool> = "http",
    }
}

message! {
    /// Limits on TCP connections.
    TcpPool {
        /// Connections, 0 for no limit.
        max_connections: i32 = "maxConnections",
        /// Time to connect.
        connect_timeout: Option<SignedDuration> = "connectTimeout",
        /// Keep-alive probes.
        tcp_keepalive: Option<TcpKeepalive> = "tcpKeepalive",
        /// Longest life of a connection.
        max_connection_duration: Option<SignedDuration> = "maxConnectionDuration",
        /// Longest idle time; 0 for no limit.
        idle_timeout: Option<SignedDuration> = "idleTimeout",
    }
}

message! {
    /// Keep-alive probes.
    TcpKeepalive {
        /// How many may go unanswered.
        probes: u32 = "probes",
        /// Idle time before the first.
        time: Option<SignedDuration> = "time",
        /// Time between two.
        interval: Option<SignedDuration> = "interval",
    }
}

message! {
    /// Limits on HTTP.
    HttpPool {
        /// Requests that wait for a connection, 0 for no limit.
        http1_max_pending_requests: i32 = "http1MaxPendingRequests",
        /// Active requests, 0 for no limit.
        http2_max_requests: i32 = "http2MaxRequests",
        /// Requests on one connection, 0 for no limit.
        max_requests_per_connection: i32 = "maxRequestsPerConnection",
        /// Retries at one time, 0 for no limit.
        max_retries: i32 = "maxRetries",
        /// Longest idle time.
        idle_timeout: Option<SignedDuration> = "idleTimeout",
        /// Whether HTTP/1.1 becomes HTTP/2.
        h2_upgrade_policy: H2UpgradePolicy = "h2UpgradePolicy",
        /// Whether the client's protocol is kept.
        use_client_protocol: bool = "useClientProtocol",
        /// Streams of one HTTP/2 connection, 0 for no limit.
        max_concurrent_streams: i32 = "maxConcurrentStreams",
        /// HTTP/2 pings.
        http2_keep_alive: Option<Http2KeepAlive> = "http2KeepAlive",
    }
}

enumeration! {
    /// Whether HTTP/1.1 becomes HTTP/2.
    H2UpgradePolicy {
        /// As the mesh says.
        Default = 0 "DEFAULT",
        /// No.
        DoNotUpgrade = 1 "DO_NOT_UPGRADE",
        /// Yes.
        Upgrade = 2 "UPGRADE",
    }
}

message! {
    /// HTTP/2 pings.
    Http2KeepAlive {
        /// Time between two.
        interval: Option<SignedDuration> = "interval",
        /// Time to answer.
        timeout: Option<SignedDuration> = "timeout",
    }
}

message! {
    /// Ejection of endpoints that fail.
    OutlierDetection {
        /// Deprecated.
        consecutive_errors: i32 = "consecutiveErrors",
        /// Whether failures of the connection are counted apart.
        split_external_local_origin_errors: bool = "splitExternalLocalOriginErrors",
        /// Failures of the connection in a row.
        consecutive_local_origin_failures: Option<u32> = "consecutiveLocalOriginFailures",
        /// 502, 503 and 504 in a row.
        consecutive_gateway_errors: Option<u32> = "consecutiveGatewayErrors",
        /// 5xx in a row.
        consecutive_5xx_errors: Option<u32> = "consecutive5xxErrors",
        /// Time between sweeps.
        interval: Option<SignedDuration> = "interval",
        /// First ejection time.
        base_ejection_time: Option<SignedDuration> = "baseEjectionTime",
        /// Largest share that is ejected.
        max_ejection_percent: i32 = "maxEjectionPercent",
        /// Below this share of healthy endpoints all are used.
        min_health_percent: i32 = "minHealthPercent",
        /// Status codes that count as errors.
        outlier_detection_http_error_codes: Vec<u32> = "outlierDetectionHttpErrorCodes",
    }
}

message! {
    /// TLS to a host.
    ClientTls {
        /// Mode.
        mode: ClientTlsMode = "mode",
        /// File of the client's certificate.
        client_certificate: String = "clientCertificate",
        /// File of its key.
        private_key: String = "privateKey",
        /// File of certificate authorities.
        ca_certificates: String = "caCertificates",
        /// File of revocations.
        ca_crl: String = "caCrl",
        /// Secret that holds them.
        credential_name: String = "credentialName",
        /// Names of which the server's certificate must have one.
        subject_alt_names: Vec<String> = "subjectAltNames",
        /// Server name to ask for.
        sni: String = "sni",
        /// Whether the server's certificate is taken unseen.
        insecure_skip_verify: Option<bool> = "insecureSkipVerify",
    }
}

enumeration! {
    /// Modes of TLS to a host.
    ClientTlsMode {
        /// Plain text.
        Disable = 0 "DISABLE",
        /// Server certificate.
        Simple = 1 "SIMPLE",
        /// Both certificates.
        Mutual = 2 "MUTUAL",
        /// Both, from the mesh.
        IstioMutual = 3 "ISTIO_MUTUAL",
    }
}
