//! What an application, or the filter, asks of the router by Envoy's headers. None of them goes on to the upstream.

use std::time::Duration;

use ::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

use crate::headers::Retries;

/// Retries of Istio's default policy.
const RETRIES: u32 = 2;
/// Milliseconds of Envoy's first interval between retries.
const BASE: u32 = 25;
/// An interval grows to this many times the first.
const GROWTH: u32 = 10;
/// A delay is never longer than this, whoever asks for it.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

const RATE_LIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const EXPECTED: &str = "x-envoy-expected-rq-timeout-ms";

/// On what a request is tried again (`x-envoy-retry-on` and `x-envoy-retry-grpc-on`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Conditions(u16);

impl Conditions {
    const STATUS_5XX: u16 = 1;
    const GATEWAY_ERROR: u16 = 1 << 1;
    const RESET: u16 = 1 << 2;
    const RESET_BEFORE_REQUEST: u16 = 1 << 3;
    const CONNECT_FAILURE: u16 = 1 << 4;
    const RETRIABLE_4XX: u16 = 1 << 5;
    const REFUSED_STREAM: u16 = 1 << 6;
    const STATUS_CODES: u16 = 1 << 7;
    const HEADERS: u16 = 1 << 8;
    const RATE_LIMITED: u16 = 1 << 9;
    const CANCELLED: u16 = 1 << 10;
    const DEADLINE_EXCEEDED: u16 = 1 << 11;
    const INTERNAL: u16 = 1 << 12;
    const RESOURCE_EXHAUSTED: u16 = 1 << 13;
    const UNAVAILABLE: u16 = 1 << 14;

    /// Istio's default policy.
    const ISTIO: Self = Self(Self::CONNECT_FAILURE | Self::REFUSED_STREAM | Self::UNAVAILABLE | Self::CANCELLED);

    fn has(self, any: u16) -> bool {
        self.0 & any != 0
    }

    /// A list of conditions; those of one list are not known in the other, but Istio puts all into one.
    fn read(list: &str) -> u16 {
        let one = |name: &str| match name.trim() {
            "5xx" => Self::STATUS_5XX,
            "gateway-error" => Self::GATEWAY_ERROR,
            "reset" => Self::RESET,
            "reset-before-request" => Self::RESET_BEFORE_REQUEST,
            "connect-failure" => Self::CONNECT_FAILURE,
            "retriable-4xx" => Self::RETRIABLE_4XX,
            "refused-stream" => Self::REFUSED_STREAM,
            "retriable-status-codes" => Self::STATUS_CODES,
            "retriable-headers" => Self::HEADERS,
            "envoy-ratelimited" => Self::RATE_LIMITED,
            "cancelled" => Self::CANCELLED,
            "deadline-exceeded" => Self::DEADLINE_EXCEEDED,
            "internal" => Self::INTERNAL,
            "resource-exhausted" => Self::RESOURCE_EXHAUSTED,
            "unavailable" => Self::UNAVAILABLE,
            _ => 0,
        };
        list.split(',').map(one).fold(0, |all, one| all | one)
    }
}

/// How an attempt ended without a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// There was no connection.
    Connect,
    /// The server refused the stream.
    Refused,
    /// The connection or stream ended.
    Reset,
    /// The attempt took too long.
    Timeout,
}

/// What to do with a request besides sending it.
#[derive(Debug)]
pub struct Policy {
    /// Time from the end of the request to the end of the response.
    pub timeout: Option<Duration>,
    /// Time of one attempt, from the end of the request, to the head of the response.
    pub per_try: Option<Duration>,
    /// A timeout is answered with 204.
    pub no_content: bool,
    /// Retries that are left.
    pub retries: u32,
    /// Attempts after the first may follow a request that has been sent.
    pub repeats: bool,
    /// When and where it is tried again.
    pub manner: Retries,
    on: Conditions,
    codes: Vec<StatusCode>,
    headers: Vec<HeaderName>,
}

impl Policy {
    /// Takes what the headers say out of them; `grpc`: the request is a gRPC call; `manner`: whether they are all
    /// that is said of retries, or Istio's default policy holds too, and how it is retried.
    #[must_use]
    pub fn take(headers: &mut HeaderMap, grpc: bool, manner: Retries) -> Self {
        let own = manner.own;
        let mut policy = Self {
            timeout: None,
            per_try: None,
            no_content: false,
            retries: if own { 1 } else { RETRIES },
            repeats: grpc,
            manner,
            on: if own { Conditions(0) } else { Conditions::ISTIO },
            codes: Vec::new(),
            headers: Vec::new(),
        };
        if headers.keys().any(|name| name.as_str().starts_with("x-envoy-")) {
            policy.read(headers);
        }
        policy
    }

    fn read(&mut self, headers: &mut HeaderMap) {
        let text = |value: HeaderValue| value.to_str().ok().map(str::to_owned);
        let mut taken = |name: &str| headers.remove(name).and_then(text);
        let millis = |text: String| text.trim().parse::<u64>().ok().map(Duration::from_millis);
        let global = taken("x-envoy-upstream-rq-timeout-ms").and_then(millis);
        self.timeout = global.filter(|time| !time.is_zero());
        self.per_try = taken("x-envoy-upstream-rq-per-try-timeout-ms")
            .and_then(millis)
            .filter(|time| !time.is_zero() && self.timeout.is_none_or(|whole| *time < whole));
        self.no_content = taken("x-envoy-upstream-rq-timeout-alt-response").is_some();
        let before = self.on.0;
        for list in ["x-envoy-retry-on", "x-envoy-retry-grpc-on"].map(&mut taken).into_iter().flatten() {
            self.on.0 |= Conditions::read(&list);
            // Istio writes a status among the conditions, as its own route configuration does not.
            self.codes.extend(list.split(',').filter_map(|code| code.trim().parse::<StatusCode>().ok()));
        }
        if !self.codes.is_empty() {
            self.on.0 |= Conditions::STATUS_CODES;
        }
        if let Some(codes) = taken("x-envoy-retriable-status-codes") {
            self.codes.extend(codes.split(',').filter_map(|code| code.trim().parse::<StatusCode>().ok()));
        }
        if let Some(names) = taken("x-envoy-retriable-header-names") {
            self.headers.extend(names.split(',').filter_map(|name| name.trim().parse::<HeaderName>().ok()));
        }
        self.retries = taken("x-envoy-max-retries").and_then(|n| n.trim().parse().ok()).unwrap_or(self.retries);
        self.repeats |= self.on.0 != before || self.per_try.is_some();
        let _ = taken("x-envoy-hedge-on-per-try-timeout");
        self.announce(headers, Duration::ZERO);
    }

    /// Tells the upstream how long it has, `elapsed` after the begin.
    pub fn announce(&self, headers: &mut HeaderMap, elapsed: Duration) {
        let left = self.timeout.map(|whole| whole.saturating_sub(elapsed));
        let expected = match (self.per_try, left) {
            (Some(attempt), Some(left)) => Some(attempt.min(left)),
            (attempt, left) => attempt.or(left),
        };
        if let Some(time) = expected {
            let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            headers.insert(EXPECTED, HeaderValue::from(ms));
        }
    }

    /// Whether a response is one that asks for another attempt.
    #[must_use]
    pub fn rejects<B>(&self, response: &Response<B>) -> bool {
        if response.headers().contains_key(RATE_LIMITED) {
            return self.on.has(Conditions::RATE_LIMITED);
        }
        let status = response.status();
        let code = status.as_u16();
        self.on.has(Conditions::STATUS_5XX) && status.is_server_error()
            || self.on.has(Conditions::GATEWAY_ERROR) && matches!(code, 502..=504)
            || self.on.has(Conditions::RETRIABLE_4XX) && code == 409
            || self.on.has(Conditions::STATUS_CODES) && self.codes.contains(&status)
            || self.on.has(Conditions::HEADERS) && self.headers.iter().any(|n| response.headers().contains_key(n))
            || response.headers().get(GRPC_STATUS).is_some_and(|status| {
                let condition = match status.as_bytes() {
                    b"1" => Conditions::CANCELLED,
                    b"4" => Conditions::DEADLINE_EXCEEDED,
                    b"8" => Conditions::RESOURCE_EXHAUSTED,
                    b"13" => Conditions::INTERNAL,
                    b"14" => Conditions::UNAVAILABLE,
                    _ => 0,
                };
                self.on.has(condition)
            })
    }

    /// Whether an attempt that ended like this asks for another one; `begun`: some of the request had been sent.
    #[must_use]
    pub fn retries_after(&self, ended: Ended, begun: bool) -> bool {
        self.on.has(Conditions::RESET | Conditions::STATUS_5XX | Conditions::GATEWAY_ERROR)
            || self.on.has(Conditions::RESET_BEFORE_REQUEST) && !begun
            || self.on.has(Conditions::REFUSED_STREAM) && ended == Ended::Refused
            || self.on.has(Conditions::CONNECT_FAILURE) && ended == Ended::Connect
    }
}

/// Waits before the retry of this number, from 1 on.
pub async fn back_off(retry: u32, base_ms: Option<u32>) {
    tokio::time::sleep(longest(retry, base_ms).mul_f64(fastrand::f64())).await;
}

/// The longest wait (Envoy's `JitteredExponentialBackOffStrategy`): it doubles, to ten times the first.
fn longest(retry: u32, base_ms: Option<u32>) -> Duration {
    let times = 1u32.checked_shl(retry.saturating_sub(1)).unwrap_or(GROWTH).min(GROWTH);
    Duration::from_millis(base_ms.unwrap_or(BASE).max(1).into()) * times
}

/// Whether the filter orders a fault. One look at all names costs less than one look for each.
#[must_use]
pub fn has_fault(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| name.as_str().starts_with("x-envoy-fault-"))
}

/// The delay that the filter orders; a client's own order the filter has removed.
pub fn delay(headers: &mut HeaderMap) -> Option<Duration> {
    let value = headers.remove("x-envoy-fault-delay-request")?;
    let ms = value.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_millis(ms).min(LONGEST)).filter(|delay| !delay.is_zero())
}

/// Takes out the order to answer a request in place of the upstream: the status, and that of gRPC.
pub fn abort(headers: &mut HeaderMap) -> Option<(StatusCode, Option<u32>)> {
    let http = headers.remove("x-envoy-fault-abort-request");
    let grpc = headers.remove("x-envoy-fault-abort-grpc-request");
    let number = |value: HeaderValue| value.to_str().ok()?.trim().parse::<u32>().ok();
    if let Some(code) = grpc.and_then(number) {
        return Some((StatusCode::OK, Some(code)));
    }
    let status = u16::try_from(http.and_then(number)?).ok()?;
    Some((StatusCode::from_u16(status).ok()?, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    fn response(status: u16, header: Option<(&'static str, &'static str)>) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        response.headers_mut().extend(headers(header.as_slice()));
        response
    }

    #[test]
    fn an_applications_timeout_is_taken_and_announced() {
        let mut headers = headers(&[("x-envoy-upstream-rq-timeout-ms", "250"), ("x-envoy-retry-on", "5xx")]);
        let policy = Policy::take(&mut headers, false, Retries::default());
        assert_eq!((policy.timeout, policy.retries), (Some(Duration::from_millis(250)), RETRIES));
        assert_eq!(headers.len(), 1);
        assert_eq!(headers[EXPECTED], "250");
    }

    #[test]
    fn an_attempt_gets_less_time_than_the_whole_or_has_no_time_of_its_own() {
        for (whole, attempt, expected) in [("100", "30", "30"), ("100", "100", "100"), ("0", "70", "70")] {
            let mut headers = headers(&[
                ("x-envoy-upstream-rq-timeout-ms", whole),
                ("x-envoy-upstream-rq-per-try-timeout-ms", attempt),
            ]);
            let policy = Policy::take(&mut headers, false, Retries::default());
            assert_eq!(headers[EXPECTED], expected);
            assert_eq!(policy.per_try.is_some(), attempt == expected && whole != attempt, "{whole} {attempt}");
        }
    }

    #[test]
    fn each_condition_asks_for_its_own_responses() {
        let asked = |on: &'static str, more: (&'static str, &'static str), answer: Response<()>| {
            Policy::take(&mut headers(&[("x-envoy-retry-on", on), more]), false, Retries::default()).rejects(&answer)
        };
        let none = ("x-other", "1");
        assert!(asked("5xx", none, response(500, None)));
        assert!(!asked("gateway-error", none, response(500, None)));
        assert!(asked("gateway-error,reset", none, response(502, None)));
        assert!(asked("retriable-4xx", none, response(409, None)));
        assert!(!asked("retriable-4xx", none, response(404, None)));
        assert!(asked("retriable-status-codes", ("x-envoy-retriable-status-codes", "404, 418"), response(418, None)));
        assert!(!asked("reset", ("x-envoy-retriable-status-codes", "418"), response(418, None)));
        assert!(asked("503,reset", none, response(503, None)));
        let named = ("x-envoy-retriable-header-names", "x-again");
        assert!(asked("retriable-headers", named, response(200, Some(("x-again", "1")))));
        assert!(!asked("retriable-headers", named, response(200, None)));
        assert!(asked("internal", none, response(200, Some(("grpc-status", "13")))));
        assert!(!asked("internal", none, response(200, Some(("grpc-status", "5")))));
        assert!(!asked("5xx", none, response(503, Some(("x-envoy-ratelimited", "true")))));
    }

    #[test]
    fn each_condition_asks_for_its_own_endings() {
        let asked = |on: &'static str, ended, begun| {
            Policy::take(&mut headers(&[("x-envoy-retry-on", on)]), false, Retries::default())
                .retries_after(ended, begun)
        };
        assert!(asked("reset", Ended::Reset, true));
        assert!(asked("5xx", Ended::Timeout, true));
        assert!(!asked("retriable-4xx", Ended::Reset, true));
        assert!(asked("retriable-4xx", Ended::Connect, false), "Istio's default stays");
        assert!(asked("reset-before-request", Ended::Reset, false));
        assert!(!asked("reset-before-request", Ended::Reset, true));
        assert!(asked("retriable-4xx", Ended::Refused, true));
    }

    #[test]
    fn conditions_of_its_own_are_all_that_there_are() {
        let take = |pairs: &[(&'static str, &'static str)]| {
            Policy::take(&mut headers(pairs), false, Retries { own: true, ..Retries::default() })
        };
        let own = take(&[("x-envoy-retry-on", "retriable-4xx"), ("x-envoy-max-retries", "4")]);
        assert!(own.rejects(&response(409, None)) && !own.retries_after(Ended::Connect, false));
        assert_eq!(own.retries, 4);
        let none = take(&[]);
        assert!(!none.retries_after(Ended::Connect, false) && !none.retries_after(Ended::Refused, false));
        assert_eq!(take(&[("x-envoy-retry-on", "5xx")]).retries, 1, "Envoy's own number");
    }

    #[test]
    fn intervals_double_to_ten_times_the_first() {
        let millis = |base| [1, 2, 3, 4, 5, 40].map(|retry| longest(retry, base).as_millis());
        assert_eq!(millis(None), [25, 50, 100, 200, 250, 250]);
        assert_eq!(millis(Some(3)), [3, 6, 12, 24, 30, 30]);
    }

    #[test]
    fn a_delay_is_taken() {
        let mut delayed = headers(&[("x-envoy-fault-delay-request", "5")]);
        assert_eq!(delay(&mut delayed), Some(Duration::from_millis(5)));
        assert!(delayed.is_empty());
    }
}
