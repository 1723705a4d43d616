//! Names of headers that Envoy keeps once only: a further value goes behind the first, with a comma between.

use http::{HeaderMap, HeaderName, HeaderValue};

/// In requests, sorted.
const REQUEST: [&str; 60] = [
    "accept",
    "accept-encoding",
    "access-control-request-headers",
    "access-control-request-method",
    "authorization",
    "cache-control",
    "cdn-loop",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "grpc-accept-encoding",
    "grpc-timeout",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "keep-alive",
    "origin",
    "pragma",
    "proxy-connection",
    "proxy-status",
    "referer",
    "te",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "via",
    "x-client-trace-id",
    "x-envoy-attempt-count",
    "x-envoy-decorator-operation",
    "x-envoy-downstream-service-cluster",
    "x-envoy-downstream-service-node",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-external-address",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-internal",
    "x-envoy-ip-tags",
    "x-envoy-is-timeout-retry",
    "x-envoy-max-retries",
    "x-envoy-original-host",
    "x-envoy-original-path",
    "x-envoy-original-url",
    "x-envoy-retriable-header-names",
    "x-envoy-retriable-status-codes",
    "x-envoy-retry-grpc-on",
    "x-envoy-retry-on",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-stream-duration-ms",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
    "x-request-id",
];

/// In responses, sorted.
const RESPONSE: [&str; 30] = [
    "access-control-allow-headers",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "access-control-max-age",
    "cache-control",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "date",
    "etag",
    "expires",
    "grpc-message",
    "grpc-status",
    "keep-alive",
    "last-modified",
    "location",
    "proxy-connection",
    "proxy-status",
    "server",
    "transfer-encoding",
    "upgrade",
    "vary",
    "via",
    "x-envoy-attempt-count",
    "x-envoy-decorator-operation",
    "x-envoy-degraded",
    "x-envoy-immediate-health-check-fail",
    "x-envoy-upstream-service-time",
    "x-request-id",
];

/// Whether a request's header of this name, in lower case, stands only once.
#[must_use]
pub fn once_in_request(name: &str) -> bool {
    REQUEST.binary_search(&name).is_ok()
}

/// Whether a response's header of this name, in lower case, stands only once.
#[must_use]
pub fn once_in_response(name: &str) -> bool {
    RESPONSE.binary_search(&name).is_ok()
}

/// Brings received headers into that shape; `once` is one of the two above.
pub fn join(headers: &mut HeaderMap, once: fn(&str) -> bool) {
    if headers.keys_len() == headers.len() {
        return;
    }
    let several = |name: &&HeaderName| once(name.as_str()) && headers.get_all(*name).iter().nth(1).is_some();
    let names: Vec<HeaderName> = headers.keys().filter(several).cloned().collect();
    for name in names {
        let values: Vec<_> = headers.get_all(&name).iter().map(HeaderValue::as_bytes).collect();
        if let Ok(joined) = HeaderValue::from_bytes(&values.join(&b","[..])) {
            headers.insert(name, joined);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_by_their_order() {
        assert!(REQUEST.is_sorted() && RESPONSE.is_sorted());
        assert!(once_in_request("x-request-id") && !once_in_request("cookie") && !once_in_request("etag"));
        assert!(once_in_response("etag") && !once_in_response("set-cookie"));
    }

    #[test]
    fn values_are_joined_where_envoy_joins_them() {
        let mut headers = HeaderMap::new();
        for (name, value) in [("accept", "a"), ("cookie", "c"), ("accept", "b"), ("cookie", "d")] {
            headers.append(name, HeaderValue::from_static(value));
        }
        join(&mut headers, once_in_request);
        assert_eq!(headers.get_all("accept").iter().collect::<Vec<_>>(), ["a,b"]);
        assert_eq!(headers.get_all("cookie").iter().count(), 2);
    }
}
