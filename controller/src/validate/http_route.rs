//! The HTTP routes of a VirtualService: istiod's `validateHTTPRoute`.

use crate::api::virtual_service::{
    self, CorsPolicy, DirectResponse, Fault, FaultAbort, FaultDelay, HeaderOperations, Headers, HttpMatch, HttpRoute,
    HttpRouteDestination, MirrorPolicy, Percent, Redirect, RegexRewrite, Retry, Rewrite, StringMatch,
};
use crate::validate::finding::Issue;
use crate::validate::shared::{self, check, refuse};
use crate::validate::virtual_service::{Semantics, destinations, match_gateways};
use crate::validate::{header_value, predicates, regex};

/// What `retryOn` may hold beside status codes.
const RETRY_ON: [&str; 16] = [
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "envoy-ratelimited",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
];

/// The header names with which a gateway routes by the claims of a token.
pub(super) fn is_jwt_claim(header: &str) -> bool {
    const PREFIX: &str = "@request.auth.claims";
    let Some((prefix, rest)) = header.split_at_checked(PREFIX.len()) else { return false };
    prefix.eq_ignore_ascii_case(PREFIX)
        && rest.len() > 1
        && (rest.starts_with('.') || rest.len() > 2 && rest.starts_with('[') && rest.ends_with(']'))
}

/// What the webhook says of one route; `delegate` if its VirtualService has no hosts.
pub(super) fn validate(route: &HttpRoute, delegate: bool, semantics: Semantics, path: &str, issues: &mut Vec<Issue>) {
    conflicts(route, delegate, path, issues);
    for (index, item) in route.matches.iter().enumerate() {
        conditions(item, &format!("{path}.match[{index}]"), issues);
    }
    if let Some(headers) = &route.headers {
        header_operations(headers, &format!("{path}.headers"), issues);
    }
    if let Some(policy) = &route.cors_policy {
        cors(policy, &format!("{path}.corsPolicy"), issues);
    }
    if let Some(fault) = &route.fault {
        faults(fault, &format!("{path}.fault"), issues);
    }
    mirrors(route, path, issues);
    if let Some(redirect) = &route.redirect {
        check(issues, "redirect", format!("{path}.redirect"), redirects(redirect, &route.matches));
    }
    if let Some(response) = &route.direct_response {
        direct_response(response, &format!("{path}.directResponse"), issues);
    }
    if let Some(retry) = &route.retries {
        retries(retry, &format!("{path}.retries"), issues);
    }
    if let Some(rewrite) = &route.rewrite {
        check(issues, "rewrite", format!("{path}.rewrite"), rewrites(rewrite));
    }
    authority_once(route, path, issues);
    let route_path = format!("{path}.route");
    for (index, HttpRouteDestination { headers, .. }) in route.route.iter().enumerate() {
        if let Some(headers) = headers {
            header_operations(headers, &format!("{route_path}[{index}].headers"), issues);
        }
    }
    destinations(route.route.iter().map(|item| (&item.destination, item.weight)), semantics, &route_path, issues);
    shared::duration(route.timeout, &format!("{path}.timeout"), issues);
}

/// Actions that exclude each other.
fn conflicts(route: &HttpRoute, delegate: bool, path: &str, issues: &mut Vec<Issue>) {
    let mut conflict = |field: &str, message: &str| {
        refuse(issues, "route-conflict", format!("{path}.{field}"), message);
    };
    let has_route = !route.route.is_empty();
    if route.delegate.is_some() && !delegate {
        if route.redirect.is_some() {
            conflict("redirect", &format!("root HTTP route {} must not specify redirect", route.name));
        }
        if has_route {
            conflict("route", &format!("root HTTP route {} must not specify route", route.name));
        }
        return;
    }
    if route.delegate.is_some() {
        conflict("delegate", "delegate HTTP route cannot contain delegate");
    }
    if route.redirect.is_some() {
        if has_route {
            conflict("redirect", "HTTP route cannot contain both route and redirect");
        }
        if route.fault.is_some() {
            conflict("fault", "HTTP route cannot contain both fault and redirect");
        }
        if route.rewrite.is_some() {
            conflict("rewrite", "HTTP route rule cannot contain both rewrite and redirect");
        }
        if route.direct_response.is_some() {
            conflict("directResponse", "HTTP route rule cannot contain both direct_response and redirect");
        }
    } else if route.direct_response.is_some() {
        if has_route {
            conflict("directResponse", "HTTP route cannot contain both route and direct_response");
        }
        if route.fault.is_some() {
            conflict("fault", "HTTP route cannot contain both fault and direct_response");
        }
        if route.rewrite.is_some() {
            conflict("rewrite", "HTTP route rule cannot contain both rewrite and direct_response");
        }
    } else if !has_route {
        conflict("route", "HTTP route, redirect or direct_response is required");
    }
    if route.mirror.is_some() && !route.mirrors.is_empty() {
        conflict("mirror", "HTTP route cannot contain both mirror and mirrors");
    }
}

fn conditions(item: &HttpMatch, path: &str, issues: &mut Vec<Issue>) {
    for (name, condition) in &item.headers {
        let field = format!("{path}.headers.{name}");
        check(issues, "header-name", &field, match_header_name(name));
        check(issues, "match", &field, string_match(condition, "headers"));
    }
    for (name, condition) in &item.without_headers {
        let field = format!("{path}.withoutHeaders.{name}");
        check(issues, "header-name", &field, match_header_name(name));
        // A lone star is no expression but means that the header is there.
        if condition.regex.as_deref() != Some("*") {
            check(issues, "match", &field, string_match(condition, "withoutHeaders"));
        }
    }
    if let Some(uri) = &item.uri {
        // A path may have the empty prefix, the others may not.
        check(issues, "match", format!("{path}.uri"), string_match_regex(uri, "uri"));
    }
    for (condition, name) in [(&item.scheme, "scheme"), (&item.method, "method"), (&item.authority, "authority")] {
        if let Some(condition) = condition {
            check(issues, "match", format!("{path}.{name}"), string_match(condition, name));
        }
    }
    for (name, condition) in &item.query_params {
        check(issues, "match", format!("{path}.queryParams.{name}"), string_match(condition, "queryParams"));
    }
    shared::optional_port(item.port, format!("{path}.port"), issues);
    shared::labels(&item.source_labels, &format!("{path}.sourceLabels"), issues);
    match_gateways(&item.gateways, path, issues);
    if !item.source_namespace.is_empty() && !predicates::is_dns_label(&item.source_namespace) {
        let message = format!("sourceNamespace match {} is invalid", item.source_namespace);
        refuse(issues, "source-namespace", format!("{path}.sourceNamespace"), message);
    }
}

fn string_match(condition: &StringMatch, field: &str) -> Result<(), String> {
    if condition.prefix.as_deref() == Some("") {
        return Err(format!("{field:?}: prefix string match should not be empty"));
    }
    string_match_regex(condition, field)
}

fn string_match_regex(condition: &StringMatch, field: &str) -> Result<(), String> {
    condition.regex.as_ref().map_or(Ok(()), |text| regex::check(text, field))
}

fn is_token(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn match_header_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("header name cannot be empty".into());
    }
    let pseudo = matches!(name, ":method" | ":scheme" | ":authority" | ":path" | ":status");
    if is_jwt_claim(name) || pseudo || is_token(name) {
        return Ok(());
    }
    Err(format!("header name {name} is not a valid header name"))
}

fn is_authority(header: &str) -> bool {
    header.eq_ignore_ascii_case(":authority") || header.eq_ignore_ascii_case("host")
}

fn header_operations(headers: &Headers, path: &str, issues: &mut Vec<Issue>) {
    let sides = [(&headers.request, "request", true), (&headers.response, "response", false)];
    for (operations, side, authority_allowed) in sides {
        let Some(operations) = operations else { continue };
        for (map, name) in [(&operations.add, "add"), (&operations.set, "set")] {
            for (header, value) in map {
                let field = format!("{path}.{side}.{name}.{header}");
                check(issues, "header-name", &field, operation_header_name(header, authority_allowed));
                check(issues, "header-value", &field, header_value::check(value));
            }
        }
        for (index, header) in operations.remove.iter().enumerate() {
            let field = format!("{path}.{side}.remove[{index}]");
            check(issues, "header-name", field, operation_header_name(header, false));
        }
    }
}

fn operation_header_name(name: &str, authority_allowed: bool) -> Result<(), String> {
    if name.is_empty() {
        return Err("header name cannot be empty".into());
    }
    if authority_allowed && is_authority(name) {
        return Ok(());
    }
    if name.eq_ignore_ascii_case("host") {
        return Err(format!("invalid header {name:?}: cannot set Host header"));
    }
    if name.starts_with(':') {
        return Err(format!("invalid header {name:?}: header cannot have \":\" prefix"));
    }
    Ok(())
}

/// The authority may be rewritten in one place only.
fn authority_once(route: &HttpRoute, path: &str, issues: &mut Vec<Issue>) {
    let none = HeaderOperations::default();
    let request = route.headers.as_ref().and_then(|headers| headers.request.as_ref()).unwrap_or(&none);
    let mut current = route.rewrite.as_ref().map_or("", |rewrite| rewrite.authority.as_str());
    for (header, value) in request.set.iter().chain(&request.add).filter(|(header, _)| is_authority(header)) {
        if !current.is_empty() {
            let message =
                format!("authority header cannot be set multiple times: have {current:?}, attempting to set {value:?}");
            refuse(issues, "authority-twice", format!("{path}.headers.request.set.{header}"), message);
            return;
        }
        current = value;
    }
}

fn cors(policy: &CorsPolicy, path: &str, issues: &mut Vec<Issue>) {
    for (index, origin) in policy.allow_origins.iter().enumerate() {
        let field = format!("{path}.allowOrigins[{index}]");
        let given = origin.exact.as_ref().or(origin.prefix.as_ref()).or(origin.regex.as_ref());
        if given.is_none_or(String::is_empty) {
            refuse(issues, "cors-origin", field, "'' is not a valid match type for CORS allow origins");
        } else {
            check(issues, "cors-origin", field, string_match_regex(origin, "corsPolicy.allowOrigins"));
        }
    }
    for (index, method) in policy.allow_methods.iter().enumerate() {
        const METHODS: [&str; 10] =
            ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "*"];
        if !METHODS.contains(&method.as_str()) {
            let message = format!("{method:?} is not a supported HTTP method");
            refuse(issues, "cors-method", format!("{path}.allowMethods[{index}]"), message);
        }
    }
    for (names, list) in [(&policy.allow_headers, "allowHeaders"), (&policy.expose_headers, "exposeHeaders")] {
        for (index, name) in names.iter().enumerate().filter(|(_, name)| !is_token(name)) {
            let message = match name.as_str() {
                "" => "header name cannot be empty".to_owned(),
                name => format!("header name {name} is not a valid header name"),
            };
            refuse(issues, "cors-header", format!("{path}.{list}[{index}]"), message);
        }
    }
    let field = format!("{path}.maxAge");
    shared::duration(policy.max_age, &field, issues);
    if policy.max_age.is_some_and(|age| age.subsec_nanos() > 0) {
        refuse(issues, "duration", field, "max_age duration is accurate only to seconds precision");
    }
}

fn faults(fault: &Fault, path: &str, issues: &mut Vec<Issue>) {
    if fault.abort.is_none() && fault.delay.is_none() {
        refuse(issues, "fault", path, "HTTP fault injection must have an abort and/or a delay");
    }
    if let Some(FaultAbort { http_status, grpc_status, http2_error, percentage }) = &fault.abort {
        let path = format!("{path}.abort");
        fault_percentage(percentage.as_ref(), &path, issues);
        if let Some(status) = http_status {
            check(issues, "http-status", format!("{path}.httpStatus"), self::http_status(*status));
        } else if let Some(status) = grpc_status {
            if virtual_service::grpc_status(status).is_none() {
                let message = format!("gRPC status {status:?} is not supported, for example 'NOT_FOUND' is");
                refuse(issues, "grpc-status", format!("{path}.grpcStatus"), message);
            }
        } else if http2_error.is_some() {
            let message = "HTTP/2 abort fault injection not supported yet";
            refuse(issues, "http2-error", format!("{path}.http2Error"), message);
        } else {
            issues.push(Issue::warned("fault", path, "abort configured, but error type not set"));
        }
    }
    if let Some(FaultDelay { fixed_delay, exponential_delay, percentage, .. }) = &fault.delay {
        let path = format!("{path}.delay");
        fault_percentage(percentage.as_ref(), &path, issues);
        shared::duration(*fixed_delay, &format!("{path}.fixedDelay"), issues);
        if exponential_delay.is_some() && fixed_delay.is_none() {
            let field = format!("{path}.exponentialDelay");
            shared::duration(*exponential_delay, &field, issues);
            refuse(issues, "exponential-delay", field, "exponentialDelay not supported yet");
        }
    }
}

fn fault_percentage(percentage: Option<&Percent>, path: &str, issues: &mut Vec<Issue>) {
    let Some(Percent { value }) = percentage else { return };
    if *value != 0.0 && !(0.0001..=100.0).contains(value) {
        let message = format!("percentage {value} is neither 0.0, nor in range [0.0001, 100.0]");
        refuse(issues, "percentage", format!("{path}.percentage.value"), message);
    }
}

fn http_status(status: i32) -> Result<(), String> {
    if (200..=600).contains(&status) {
        return Ok(());
    }
    Err(format!("HTTP status {status} is not in range 200-599"))
}

fn mirrors(route: &HttpRoute, path: &str, issues: &mut Vec<Issue>) {
    if let Some(percent) = route.mirror_percent {
        let field = format!("{path}.mirrorPercent");
        if percent > 100 {
            let message = format!("mirror_percent must have a max value of 100 (it has {percent})");
            refuse(issues, "percentage", &field, message);
        }
        let message = "using deprecated setting \"mirrorPercent\", use \"mirrorPercentage\" instead";
        issues.push(Issue::warned("deprecated", field, message));
    }
    mirror_percentage(route.mirror_percentage.as_ref(), &format!("{path}.mirrorPercentage"), issues);
    if let Some(mirror) = &route.mirror {
        shared::destination(mirror, &format!("{path}.mirror"), issues);
    }
    for (index, MirrorPolicy { destination, percentage }) in route.mirrors.iter().enumerate() {
        let path = format!("{path}.mirrors[{index}]");
        let Some(destination) = destination else {
            let message = "destination is required for mirrors";
            refuse(issues, "destination-required", format!("{path}.destination"), message);
            continue;
        };
        shared::destination(destination, &format!("{path}.destination"), issues);
        mirror_percentage(percentage.as_ref(), &format!("{path}.percentage"), issues);
    }
}

fn mirror_percentage(percentage: Option<&Percent>, field: &str, issues: &mut Vec<Issue>) {
    let Some(Percent { value }) = percentage else { return };
    if !(0.0..=100.0).contains(value) {
        refuse(issues, "percentage", field, format!("mirror percentage must be from 0 to 100 (it is {value})"));
    }
}

fn redirects(redirect: &Redirect, matches: &[HttpMatch]) -> Result<(), String> {
    if !redirect.uri.is_empty() && !redirect.prefix_rewrite.is_empty() {
        return Err("redirect may only specify one of uri or prefix_rewrite".into());
    }
    let prefix_only = |item: &HttpMatch| item.uri.as_ref().is_none_or(|uri| uri.prefix.is_some());
    if !redirect.prefix_rewrite.is_empty() && !matches.iter().all(prefix_only) {
        return Err("redirect prefix_rewrite requires all URI matches to use prefix match type".into());
    }
    let nothing = [&redirect.uri, &redirect.prefix_rewrite, &redirect.authority, &redirect.scheme];
    if nothing.iter().all(|text| text.is_empty()) && redirect.port.is_none() && redirect.derive_port.is_none() {
        return Err("redirect must specify URI, authority, scheme, or port".into());
    }
    let code = redirect.redirect_code;
    if code != 0 && !(300..=399).contains(&code) {
        return Err(format!("{code} is not a valid redirect code, must be 3xx"));
    }
    if !matches!(redirect.scheme.as_str(), "" | "http" | "https") {
        return Err("invalid redirect scheme, must be \"http\" or \"https\"".into());
    }
    match redirect.port {
        None | Some(0) => Ok(()),
        Some(port) => predicates::port(port),
    }
}

fn direct_response(response: &DirectResponse, path: &str, issues: &mut Vec<Issue>) {
    let body = response.body.as_ref();
    let size = body.map_or(0, |body| {
        body.string.as_ref().map(String::len).or(body.bytes.as_ref().map(|bytes| bytes.0.len())).unwrap_or(0)
    });
    let field = format!("{path}.body");
    if size > 1024 * 1024 {
        let message = "large direct_responses may impact control plane performance, must be less than 1MB";
        refuse(issues, "large-body", field, message);
    } else if size > 100 * 1024 {
        let message = "large direct_responses may impact control plane performance";
        issues.push(Issue::warned("large-body", field, message));
    }
    let status = i32::try_from(response.status).unwrap_or(i32::MAX);
    check(issues, "http-status", format!("{path}.status"), http_status(status));
}

/// Judges retries, of a route or of the mesh.
pub(crate) fn retries(retry: &Retry, path: &str, issues: &mut Vec<Issue>) {
    let field = format!("{path}.attempts");
    if retry.attempts < 0 {
        refuse(issues, "attempts", &field, "attempts cannot be negative");
    }
    let configured =
        retry.per_try_timeout.is_some() || !retry.retry_on.is_empty() || retry.retry_remote_localities.is_some();
    if retry.attempts == 0 && configured {
        refuse(issues, "attempts", field, "http retry policy configured when attempts are set to 0 (disabled)");
    }
    shared::duration(retry.per_try_timeout, &format!("{path}.perTryTimeout"), issues);
    if !retry.retry_on.is_empty() {
        for policy in retry.retry_on.split(',') {
            if !RETRY_ON.contains(&policy) && !policy.parse().is_ok_and(is_http_status) {
                let message = format!("{policy:?} is not a valid retryOn policy");
                refuse(issues, "retry-on", format!("{path}.retryOn"), message);
            }
        }
    }
    shared::duration(retry.backoff, &format!("{path}.backoff"), issues);
}

/// The status codes that have a name in Go's `net/http`.
fn is_http_status(status: u16) -> bool {
    matches!(status, 100..=103 | 200..=208 | 226 | 300..=305 | 307 | 308 | 400..=418 | 421..=426 | 428 | 429 | 431 | 451)
        || matches!(status, 500..=508 | 510 | 511)
}

fn rewrites(rewrite: &Rewrite) -> Result<(), String> {
    let regex = rewrite.uri_regex_rewrite.as_ref();
    if !rewrite.uri.is_empty() && regex.is_some() {
        return Err("rewrite may only contain one of URI or UriRegexRewrite".into());
    }
    if rewrite.uri.is_empty() && regex.is_none() && rewrite.authority.is_empty() {
        return Err("rewrite must specify at least one of URI, UriRegexRewrite, or authority".into());
    }
    let Some(RegexRewrite { pattern, rewrite }) = regex else { return Ok(()) };
    if pattern.is_empty() || rewrite.is_empty() {
        return Err("UriRegexRewrite requires both Rewrite and Match fields to be specified".into());
    }
    regex::check(pattern, "HTTPRewrite.UriRegexRewrite.Match")
}
