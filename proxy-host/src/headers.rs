//! Headers as Envoy's connection manager and router change them.

use std::net::IpAddr;

use ::http::{
    HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, Entry, GetAll, TE, TRANSFER_ENCODING, UPGRADE},
};

/// Whether Envoy takes a request of HTTP/1.1 of this method: those that its parser knows; it answers any other with 400.
#[must_use]
pub fn is_method_name(method: &[u8]) -> bool {
    match method.len() {
        3 => matches!(method, b"GET" | b"PUT" | b"ACL"),
        4 => matches!(method, b"HEAD" | b"POST" | b"BIND" | b"COPY" | b"LINK" | b"LOCK" | b"MOVE"),
        5 => matches!(method, b"PATCH" | b"TRACE" | b"MERGE" | b"MKCOL" | b"PURGE"),
        6 => matches!(
            method,
            b"DELETE" | b"NOTIFY" | b"REBIND" | b"REPORT" | b"SEARCH" | b"SOURCE" | b"UNBIND" | b"UNLINK" | b"UNLOCK"
        ),
        7 => matches!(method, b"OPTIONS" | b"CONNECT" | b"MSEARCH"),
        8 => matches!(method, b"CHECKOUT" | b"PROPFIND"),
        _ => matches!(method, b"PROPPATCH" | b"SUBSCRIBE" | b"MKACTIVITY" | b"MKCALENDAR" | b"UNSUBSCRIBE"),
    }
}

/// `proxy-connection`
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// `x-forwarded-proto`
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// `x-forwarded-for`
pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// `x-forwarded-client-cert`
pub const X_FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// `x-request-id`
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Whether a request is a gRPC call.
#[must_use]
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    kind.and_then(|kind| kind.strip_prefix(b"application/grpc")).is_some_and(|rest| matches!(rest, [] | [b'+', ..]))
}

/// Whether a header is for one hop (RFC 9110, 7.6.1), or decides about such headers; that of the client's certificate is
/// this proxy's to say.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "upgrade"
            | "te"
            | "transfer-encoding"
            | "keep-alive"
            | "proxy-connection"
            | "http2-settings"
            | "x-forwarded-client-cert"
    )
}

/// Whether a list has this word.
fn lists(values: GetAll<'_, HeaderValue>, word: &str) -> bool {
    let is = |part: &[u8]| part.trim_ascii().eq_ignore_ascii_case(word.as_bytes());
    values.iter().any(|value| value.as_bytes().split(|b| *b == b',').any(is))
}

/// What a request wants its connection to become. HTTP/2 is not offered by an upgrade, as in Envoy: such a request is
/// answered in HTTP/1.1.
#[must_use]
pub fn upgrade(headers: &HeaderMap) -> Option<&HeaderValue> {
    let protocol = headers.get(UPGRADE).filter(|protocol| !protocol.as_bytes().eq_ignore_ascii_case(b"h2c"))?;
    lists(headers.get_all(CONNECTION), "upgrade").then_some(protocol)
}

/// Makes a request's headers those that a filter sees: without those that are for one hop, with what Envoy adds. Says
/// whether its connection is to end by a header that is not looked at elsewhere.
pub fn prepare(headers: &mut HeaderMap) -> bool {
    let mut closes = false;
    if headers.keys().any(is_hop_by_hop) {
        let upgrade = upgrade(headers).cloned();
        let trailers = lists(headers.get_all(TE), "trailers");
        closes = self::closes(headers);
        remove_hop_by_hop(headers);
        headers.remove(TE);
        headers.remove("http2-settings");
        headers.remove(X_FORWARDED_CLIENT_CERT);
        if trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
        if let Some(upgrade) = upgrade {
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(UPGRADE, upgrade);
        }
    }
    // An application that knows better is believed, as by a sidecar's Envoy.
    headers.entry(X_FORWARDED_PROTO).or_insert_with(|| HeaderValue::from_static("http"));
    let new = || HeaderValue::from_bytes(&uuid()).ok();
    match headers.entry(X_REQUEST_ID) {
        Entry::Occupied(mut id) if id.get().is_empty() => {
            new().map(|new| id.insert(new));
        }
        Entry::Occupied(_) => {}
        Entry::Vacant(place) => {
            new().map(|new| place.insert(new));
        }
    }
    closes
}

/// Says how long a request to a server of HTTP/1.1 is, where it would not be understood, or would have no body, without
/// that; `length`: of its body, where that is known.
pub fn frame(headers: &mut HeaderMap, method: &Method, length: Option<u64>) {
    match (length, method.as_str()) {
        (None, "GET" | "HEAD") if !headers.contains_key(CONTENT_LENGTH) => {
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        (Some(0), "GET" | "HEAD" | "DELETE" | "TRACE" | "CONNECT") => {}
        (Some(0), _) => {
            headers.entry(CONTENT_LENGTH).or_insert_with(|| HeaderValue::from_static("0"));
        }
        _ => {}
    }
}

/// Whether a request's connection is to end by a header that hyper does not look at.
#[must_use]
pub fn closes(headers: &HeaderMap) -> bool {
    lists(headers.get_all(PROXY_CONNECTION), "close")
}

/// Removes what only requests from within may ask of Envoy, by whose defaults there are none.
pub fn remove_orders(headers: &mut HeaderMap) {
    if !headers.keys().any(|name| name.as_str().starts_with("x-envoy-")) {
        return;
    }
    for order in [
        "expected-rq-timeout-ms",
        "force-trace",
        "hedge-on-per-try-timeout",
        "internal",
        "ip-tags",
        "max-retries",
        "original-url",
        "retriable-header-names",
        "retriable-status-codes",
        "retry-grpc-on",
        "retry-on",
        "upstream-alt-stat-name",
        "upstream-rq-per-try-timeout-ms",
        "upstream-rq-timeout-alt-response",
        "upstream-rq-timeout-ms",
        "upstream-stream-duration-ms",
    ] {
        headers.remove(format!("x-envoy-{order}").as_str());
    }
}

/// Whether a request of HTTP/1.0 wants its connection to go on after its answer.
#[must_use]
pub fn keeps_alive(headers: &HeaderMap) -> bool {
    lists(headers.get_all(CONNECTION), "keep-alive")
}

/// Whether a connection of HTTP/1.0 can go on after this answer, of a length that is `known`: its end has to be told by
/// its head, as Envoy sees it.
#[must_use]
pub fn ends_by_itself<B>(response: &Response<B>, known: bool) -> bool {
    (known || response.headers().contains_key(CONTENT_LENGTH)) && response.status() != StatusCode::NO_CONTENT
}

/// Whether an answer says twice how long it is; `known`: its body's length is.
#[must_use]
pub fn is_ambiguous(headers: &HeaderMap, known: bool) -> bool {
    if known {
        headers.len() > headers.keys_len() && headers.get_all(CONTENT_LENGTH).iter().nth(1).is_some()
    } else {
        headers.contains_key(CONTENT_LENGTH)
    }
}

/// Makes a request from outside one of ours, as the Envoy of a gateway does: nobody there gives the proxy orders, or says
/// who a client is or how it came.
pub fn from_outside(headers: &mut HeaderMap, client: IpAddr, scheme: &'static str) {
    let client = client.to_canonical().to_string();
    let foreign = |name: &&HeaderName| name.as_str().starts_with("x-envoy-") || *name == X_FORWARDED_CLIENT_CERT;
    let foreign: Vec<HeaderName> = headers.keys().filter(foreign).cloned().collect();
    for name in foreign {
        headers.remove(name);
    }
    headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(scheme));
    let before = headers.get_all(X_FORWARDED_FOR).iter().map(HeaderValue::as_bytes);
    let all = before.chain([client.as_bytes()]).collect::<Vec<_>>().join(&b","[..]);
    if let Ok(all) = HeaderValue::from_bytes(&all) {
        headers.insert(X_FORWARDED_FOR, all);
    }
    if let Ok(client) = HeaderValue::from_str(&client) {
        headers.insert(HeaderName::from_static("x-envoy-external-address"), client);
    }
}

/// Removes the headers that are for one hop (RFC 9110, 7.6.1), and those that `Connection` names.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if !headers.keys().any(is_hop_by_hop) {
        return;
    }
    let mut named = Vec::new();
    for value in headers.get_all(CONNECTION) {
        for name in value.as_bytes().split(|b| *b == b',') {
            // Of what it may name, nothing that decides where a request goes.
            match HeaderName::from_bytes(name.trim_ascii()) {
                Ok(name) if name != "host" && !name.as_str().starts_with("x-forwarded") => named.push(name),
                _ => {}
            }
        }
    }
    for name in named {
        headers.remove(name);
    }
    for name in [CONNECTION, UPGRADE, TRANSFER_ENCODING] {
        headers.remove(name);
    }
    headers.remove("keep-alive");
    headers.remove(PROXY_CONNECTION);
}

/// Removes what no request of HTTP/2 may have (RFC 9113, 8.2.2), in case the filter has written it.
pub fn for_http2(headers: &mut HeaderMap) {
    remove_hop_by_hop(headers);
    if headers.get(TE).is_some_and(|te| te != "trailers") {
        headers.remove(TE);
    }
}

/// What the filter says to the router.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// Clusters that get a copy.
    pub mirrors: Vec<String>,
    /// How it is retried.
    pub retries: Retries,
}

/// How a request is retried, in one word of the filter's (`x-portolan-retry`); without it as Istio does by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retries {
    /// Not on the conditions that hold otherwise.
    pub own: bool,
    /// Milliseconds of the first interval; `None` for Envoy's own.
    pub base_ms: Option<u32>,
    /// Endpoints that were tried may be tried again.
    pub same_hosts: bool,
    /// Priorities that were tried are left out.
    pub remote: bool,
}

impl Retries {
    fn read(words: &HeaderValue) -> Self {
        let mut out = Self::default();
        for word in words.to_str().unwrap_or_default().split(',') {
            match word {
                "own" => out.own = true,
                "same-hosts" => out.same_hosts = true,
                "remote" => out.remote = true,
                _ => out.base_ms = word.strip_prefix("base-ms=").and_then(|ms| ms.parse().ok()).or(out.base_ms),
            }
        }
        out
    }
}

/// Removes what is between the filter and this proxy, so that none of it leaves.
pub fn take_orders(headers: &mut HeaderMap) -> Orders {
    let mut orders = Orders::default();
    while let Some(own) = headers.keys().find(|name| name.as_str().starts_with("x-portolan-")).cloned() {
        match own.as_str() {
            "x-portolan-mirror" => {
                let all = headers.get_all(&own).iter();
                let names = all.filter_map(|names| names.to_str().ok()).flat_map(|names| names.split(','));
                orders.mirrors.extend(names.map(str::to_owned));
                headers.remove(own);
            }
            "x-portolan-retry" => orders.retries = headers.remove(own).as_ref().map(Retries::read).unwrap_or_default(),
            _ => {
                headers.remove(own);
            }
        }
    }
    orders
}

/// The host and port that an authority names.
#[must_use]
pub fn authority_parts(authority: Option<&HeaderValue>) -> (Option<String>, Option<u16>) {
    let Some(text) = authority.and_then(|a| a.to_str().ok()) else { return (None, None) };
    let colon = match text.rfind(']') {
        Some(end) => text[end..].find(':').map(|at| end + at),
        None if text.matches(':').count() > 1 => None,
        None => text.find(':'),
    };
    match colon {
        Some(at) => (Some(text[..at].to_owned()), text[at + 1..].parse().ok()),
        None => (Some(text.to_owned()), None),
    }
}

/// The gRPC status that stands for an HTTP status (gRPC's own table, as in Envoy).
#[must_use]
pub fn grpc_status(status: StatusCode) -> u32 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

/// A body as `grpc-message`: percent-encoded where it has to be; `None` for an empty one.
#[must_use]
pub fn grpc_message(body: &[u8]) -> Option<HeaderValue> {
    let mut out = String::new();
    for byte in body.trim_ascii_end() {
        match byte {
            b' '..=b'~' if *byte != b'%' => out.push(char::from(*byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    if out.is_empty() { None } else { HeaderValue::from_str(&out).ok() }
}

/// A random UUID (RFC 9562, version 4); it names a request and guards nothing.
fn uuid() -> [u8; 36] {
    let bits = fastrand::u128(..) & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let mut text = [0; 36];
    let mut at = 0;
    for (index, byte) in bits.to_be_bytes().into_iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text[at] = b'-';
            at += 1;
        }
        for digit in [byte >> 4, byte & 0xf] {
            text[at] = b"0123456789abcdef"[usize::from(digit)];
            at += 1;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn headers_of_one_hop_do_not_go_on() {
        let mut headers = map(&[
            ("connection", "close, x-mine, x-forwarded-proto"),
            ("keep-alive", "1"),
            ("transfer-encoding", "chunked"),
            ("te", "trailers"),
            ("x-mine", "1"),
            ("x-other", "2"),
        ]);
        prepare(&mut headers);
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["te", "x-forwarded-proto", "x-other", "x-request-id"]);
    }

    #[test]
    fn an_upgrade_keeps_its_two_headers() {
        let mut headers = map(&[("connection", "Upgrade"), ("upgrade", "websocket")]);
        prepare(&mut headers);
        assert_eq!(headers["connection"], "upgrade");
        assert_eq!(headers["upgrade"], "websocket");
    }

    #[test]
    fn an_upgrade_that_the_connection_does_not_name_is_none() {
        let mut headers = map(&[("connection", "keep-alive"), ("upgrade", "websocket")]);
        prepare(&mut headers);
        assert!(!headers.contains_key("connection") && !headers.contains_key("upgrade"));
    }

    #[test]
    fn of_what_may_be_encoded_only_trailers_go_on() {
        for (te, goes) in [("gzip, trailers", true), ("trailers;q=0.5, gzip", false), ("", false)] {
            let mut headers = map(&[("te", te)]);
            prepare(&mut headers);
            assert_eq!(headers.get("te"), goes.then_some(&HeaderValue::from_static("trailers")), "{te}");
        }
    }

    #[test]
    fn requests_say_how_long_they_are_where_they_have_to() {
        for (method, length, said) in [
            (Method::GET, Some(0), ""),
            (Method::GET, None, "transfer-encoding"),
            (Method::GET, Some(5), ""),
            (Method::DELETE, Some(0), ""),
            (Method::POST, Some(0), "content-length"),
            (Method::POST, None, ""),
        ] {
            let mut headers = HeaderMap::new();
            frame(&mut headers, &method, length);
            assert_eq!(headers.keys().map(HeaderName::as_str).collect::<String>(), said, "{method} {length:?}");
        }
    }

    #[test]
    fn nothing_between_us_and_the_filter_leaves() {
        let ours = ["mirror", "any", "cluster", "retry"].map(|name| (format!("x-portolan-{name}"), name));
        let mut headers = map(&[("x-porto", "e")]);
        headers
            .extend(ours.map(|(name, value)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_static(value))));
        let orders = take_orders(&mut headers);
        assert_eq!(headers, map(&[("x-porto", "e")]));
        let retries = Retries::default();
        assert_eq!(orders, Orders { mirrors: vec!["mirror".into()], retries });
    }

    #[test]
    fn an_authority_has_a_host_and_perhaps_a_port() {
        let parts = |text| authority_parts(Some(&HeaderValue::from_static(text)));
        assert_eq!(parts("a.com"), (Some("a.com".into()), None));
        assert_eq!(parts("a.com:8080"), (Some("a.com".into()), Some(8080)));
        assert_eq!(parts("a.com:"), (Some("a.com".into()), None));
        assert_eq!(parts("[::1]:80"), (Some("[::1]".into()), Some(80)));
        assert_eq!(parts("::1"), (Some("::1".into()), None));
    }

    #[test]
    fn a_request_id_is_a_random_uuid() {
        let id = String::from_utf8(uuid().to_vec()).unwrap();
        assert_eq!((id.len(), &id[14..15]), (36, "4"));
        assert!(matches!(&id[19..20], "8" | "9" | "a" | "b"), "{id}");
        assert_ne!(id.as_bytes(), uuid());
    }

    #[test]
    fn grpc_is_told_by_its_content_type() {
        for (kind, grpc) in
            [("application/grpc", true), ("application/grpc+proto", true), ("application/grpc-web", false)]
        {
            assert_eq!(is_grpc(&map(&[("content-type", kind)])), grpc, "{kind}");
        }
        assert_eq!(grpc_message("50% é\n".as_bytes()).unwrap(), "50%25 %C3%A9");
    }
}
