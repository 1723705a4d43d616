//! VirtualService.

use std::collections::BTreeMap;

use jiff::SignedDuration;

use crate::api::message::{Bytes, enumeration, message};
use crate::model::Labels;

message! {
    /// The spec. Without hosts it is a delegate.
    VirtualService {
        /// Host names, IP addresses or wildcards.
        hosts: Vec<String> = "hosts",
        /// Gateways (`namespace/name`) or `mesh`; none means `mesh`.
        gateways: Vec<String> = "gateways",
        /// HTTP routes in order.
        http: Vec<HttpRoute> = "http",
        /// Routes of TLS that is passed through.
        tls: Vec<TlsRoute> = "tls",
        /// Routes of opaque TCP.
        tcp: Vec<TcpRoute> = "tcp",
        /// `exportTo` as written; empty means the mesh's default.
        export_to: Vec<String> = "exportTo",
    }
}

message! {
    /// A host, and which of its ports and subsets.
    Destination {
        /// Host; a short name is one of the resource's namespace.
        host: String = "host",
        /// Subset of a DestinationRule, empty for all endpoints.
        subset: String = "subset",
        /// Port.
        port: Option<PortSelector> = "port",
    }
}

message! {
    /// A port by number.
    PortSelector {
        /// 1 to 65535
        number: u32 = "number",
    }
}

message! {
    /// A share of 100.
    Percent {
        /// 0 to 100
        value: f64 = "value",
    }
}

message! {
    /// One HTTP route.
    HttpRoute {
        /// Name, for logs.
        name: String = "name",
        /// Conditions of which one must hold; none means always.
        matches: Vec<HttpMatch> = "match",
        /// Weighted destinations.
        route: Vec<HttpRouteDestination> = "route",
        /// Answer with a redirect.
        redirect: Option<Redirect> = "redirect",
        /// Answer at once.
        direct_response: Option<DirectResponse> = "directResponse",
        /// Take the routes of another VirtualService.
        delegate: Option<Delegate> = "delegate",
        /// Rewrite of path and authority.
        rewrite: Option<Rewrite> = "rewrite",
        /// Timeout of a request; none by default.
        timeout: Option<SignedDuration> = "timeout",
        /// Retries.
        retries: Option<Retry> = "retries",
        /// Faults to inject.
        fault: Option<Fault> = "fault",
        /// Where copies of requests go.
        mirror: Option<Destination> = "mirror",
        /// Several such places.
        mirrors: Vec<MirrorPolicy> = "mirrors",
        /// Deprecated form of `mirrorPercentage`.
        mirror_percent: Option<u32> = "mirrorPercent",
        /// Share of requests that is copied to `mirror`.
        mirror_percentage: Option<Percent> = "mirrorPercentage",
        /// Cross-origin policy.
        cors_policy: Option<CorsPolicy> = "corsPolicy",
        /// Header operations.
        headers: Option<Headers> = "headers",
    }
}

message! {
    /// The VirtualService whose routes are taken.
    Delegate {
        /// Its name.
        name: String = "name",
        /// Its namespace, that of the root where empty.
        namespace: String = "namespace",
    }
}

message! {
    /// Header operations of both directions.
    Headers {
        /// On requests.
        request: Option<HeaderOperations> = "request",
        /// On responses.
        response: Option<HeaderOperations> = "response",
    }
}

message! {
    /// Header operations.
    HeaderOperations {
        /// Replaced.
        set: BTreeMap<String, String> = "set",
        /// Appended.
        add: BTreeMap<String, String> = "add",
        /// Removed.
        remove: Vec<String> = "remove",
    }
}

message! {
    /// Conditions on a request, all of which must hold.
    HttpMatch {
        /// Name, for logs.
        name: String = "name",
        /// Path without query.
        uri: Option<StringMatch> = "uri",
        /// `:scheme`
        scheme: Option<StringMatch> = "scheme",
        /// `:method`
        method: Option<StringMatch> = "method",
        /// `:authority`, port included.
        authority: Option<StringMatch> = "authority",
        /// Headers; an empty condition is presence.
        headers: BTreeMap<String, StringMatch> = "headers",
        /// Listener port, 0 for any.
        port: u32 = "port",
        /// Labels of the client workload.
        source_labels: Labels = "sourceLabels",
        /// Gateways for which this holds.
        gateways: Vec<String> = "gateways",
        /// Query parameters; an empty condition is presence.
        query_params: BTreeMap<String, StringMatch> = "queryParams",
        /// Whether exact and prefix matches of the path disregard case.
        ignore_uri_case: bool = "ignoreUriCase",
        /// Negated header conditions.
        without_headers: BTreeMap<String, StringMatch> = "withoutHeaders",
        /// Namespace of the client workload.
        source_namespace: String = "sourceNamespace",
        /// Prefix of statistics.
        stat_prefix: String = "statPrefix",
    }
}

message! {
    /// A condition on a string: one of three kinds, or none.
    StringMatch {
        /// Equality.
        exact: Option<String> = "exact",
        /// Prefix.
        prefix: Option<String> = "prefix",
        /// RE2 expression that matches all of it.
        regex: Option<String> = "regex",
    }
}

message! {
    /// A weighted HTTP destination.
    HttpRouteDestination {
        /// Where to.
        destination: Option<Destination> = "destination",
        /// Relative weight.
        weight: i32 = "weight",
        /// Header operations for this destination.
        headers: Option<Headers> = "headers",
    }
}

message! {
    /// A weighted destination of TLS or TCP.
    RouteDestination {
        /// Where to.
        destination: Option<Destination> = "destination",
        /// Relative weight.
        weight: i32 = "weight",
    }
}

message! {
    /// A route by SNI.
    TlsRoute {
        /// Conditions of which one must hold.
        matches: Vec<TlsMatch> = "match",
        /// Weighted destinations.
        route: Vec<RouteDestination> = "route",
    }
}

message! {
    /// A route of TCP connections.
    TcpRoute {
        /// Conditions of which one must hold; none means always.
        matches: Vec<L4Match> = "match",
        /// Weighted destinations.
        route: Vec<RouteDestination> = "route",
    }
}

message! {
    /// Conditions on a TCP connection.
    L4Match {
        /// Destination addresses or CIDRs.
        destination_subnets: Vec<String> = "destinationSubnets",
        /// Listener port, 0 for any.
        port: u32 = "port",
        /// Not honoured by Istio.
        source_subnet: String = "sourceSubnet",
        /// Labels of the client workload.
        source_labels: Labels = "sourceLabels",
        /// Gateways for which this holds.
        gateways: Vec<String> = "gateways",
        /// Namespace of the client workload.
        source_namespace: String = "sourceNamespace",
    }
}

message! {
    /// Conditions on a TLS connection.
    TlsMatch {
        /// Server names, perhaps with a wildcard.
        sni_hosts: Vec<String> = "sniHosts",
        /// Destination addresses or CIDRs.
        destination_subnets: Vec<String> = "destinationSubnets",
        /// Listener port, 0 for any.
        port: u32 = "port",
        /// Labels of the client workload.
        source_labels: Labels = "sourceLabels",
        /// Gateways for which this holds.
        gateways: Vec<String> = "gateways",
        /// Namespace of the client workload.
        source_namespace: String = "sourceNamespace",
    }
}

message! {
    /// A redirect.
    Redirect {
        /// New path.
        uri: String = "uri",
        /// New authority.
        authority: String = "authority",
        /// New port.
        port: Option<u32> = "port",
        /// How the port is chosen where `port` is absent.
        derive_port: Option<RedirectPort> = "derivePort",
        /// New scheme.
        scheme: String = "scheme",
        /// Status, 0 for 301.
        redirect_code: u32 = "redirectCode",
        /// Replacement of the matched prefix.
        prefix_rewrite: String = "prefixRewrite",
    }
}

enumeration! {
    /// How a redirect chooses its port.
    RedirectPort {
        /// That of the scheme.
        FromProtocolDefault = 0 "FROM_PROTOCOL_DEFAULT",
        /// That of the request.
        FromRequestPort = 1 "FROM_REQUEST_PORT",
    }
}

message! {
    /// An answer.
    DirectResponse {
        /// Status.
        status: u32 = "status",
        /// Body.
        body: Option<Body> = "body",
    }
}

message! {
    /// A body: one of two kinds, or none.
    Body {
        /// Text.
        string: Option<String> = "string",
        /// Bytes.
        bytes: Option<Bytes> = "bytes",
    }
}

message! {
    /// A rewrite.
    Rewrite {
        /// Replacement of the matched prefix or path.
        uri: String = "uri",
        /// New authority.
        authority: String = "authority",
        /// Substitution over the path.
        uri_regex_rewrite: Option<RegexRewrite> = "uriRegexRewrite",
    }
}

message! {
    /// A substitution.
    RegexRewrite {
        /// RE2 expression.
        pattern: String = "match",
        /// Replacement, with `\1` for groups.
        rewrite: String = "rewrite",
    }
}

message! {
    /// Retries.
    Retry {
        /// How many; 0 means none.
        attempts: i32 = "attempts",
        /// Timeout of each.
        per_try_timeout: Option<SignedDuration> = "perTryTimeout",
        /// Conditions and status codes, separated by commas.
        retry_on: String = "retryOn",
        /// Whether other localities may be tried.
        retry_remote_localities: Option<bool> = "retryRemoteLocalities",
        /// Whether hosts that were tried are avoided.
        retry_ignore_previous_hosts: Option<bool> = "retryIgnorePreviousHosts",
        /// First interval between tries.
        backoff: Option<SignedDuration> = "backoff",
    }
}

impl Eq for Retry {}

message! {
    /// A cross-origin policy.
    CorsPolicy {
        /// Deprecated form of `allowOrigins`.
        allow_origin: Vec<String> = "allowOrigin",
        /// Origins.
        allow_origins: Vec<StringMatch> = "allowOrigins",
        /// Methods.
        allow_methods: Vec<String> = "allowMethods",
        /// Request headers.
        allow_headers: Vec<String> = "allowHeaders",
        /// Response headers that a script may read.
        expose_headers: Vec<String> = "exposeHeaders",
        /// How long an answer to a preflight holds.
        max_age: Option<SignedDuration> = "maxAge",
        /// Whether credentials may be sent.
        allow_credentials: Option<bool> = "allowCredentials",
        /// What happens to preflights that match no origin.
        unmatched_preflights: UnmatchedPreflights = "unmatchedPreflights",
    }
}

enumeration! {
    /// What happens to preflights that match no origin.
    UnmatchedPreflights {
        /// As `Forward`.
        Unspecified = 0 "UNSPECIFIED",
        /// They go upstream.
        Forward = 1 "FORWARD",
        /// They are answered here.
        Ignore = 2 "IGNORE",
    }
}

message! {
    /// Faults.
    Fault {
        /// Delay.
        delay: Option<FaultDelay> = "delay",
        /// Abort.
        abort: Option<FaultAbort> = "abort",
    }
}

message! {
    /// A delay.
    FaultDelay {
        /// Deprecated form of `percentage`.
        percent: i32 = "percent",
        /// How long.
        fixed_delay: Option<SignedDuration> = "fixedDelay",
        /// Not honoured by Istio.
        exponential_delay: Option<SignedDuration> = "exponentialDelay",
        /// Share of requests.
        percentage: Option<Percent> = "percentage",
    }
}

message! {
    /// An abort.
    FaultAbort {
        /// HTTP status.
        http_status: Option<i32> = "httpStatus",
        /// gRPC status by name.
        grpc_status: Option<String> = "grpcStatus",
        /// Not honoured by Istio.
        http2_error: Option<String> = "http2Error",
        /// Share of requests.
        percentage: Option<Percent> = "percentage",
    }
}

message! {
    /// Where copies go.
    MirrorPolicy {
        /// Where to.
        destination: Option<Destination> = "destination",
        /// Share of requests; all where absent.
        percentage: Option<Percent> = "percentage",
    }
}

/// The names that an abort may give, by their number.
const GRPC_STATUS: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// The number of a gRPC status that is given by name; `None`: there is none of this name (SEMANTICS 7.3).
pub fn grpc_status(name: &str) -> Option<u32> {
    GRPC_STATUS.iter().position(|known| *known == name).and_then(|at| u32::try_from(at).ok())
}
