use std::time::Duration;

use portolan_registry::route::{
    ALL, Action, Cors, Extras, Fault, HashCookie, HashKey, HeaderOps, Mirror, Outcome, PathRewrite, Redirect, Respond,
    Retry, Route, Target, TargetExtras, TextMatch, rows,
};
use portolan_registry::row::{CatchAll, Choice, HostPort, Origin, OriginKind, Routes, Row, TableName};

use prost::Message;

use crate::envoy::SetFilterState;
use crate::host::fake::{Call, Fake};
use crate::host::{Action as Told, Answer};
use crate::testing::{CONFIGURATION, ROOT, configured, deliver, whole, writer};
use crate::vm::Vm;

const CONTEXT: u32 = 7;

fn target(cluster: &str) -> Target {
    Target { cluster: cluster.into(), weight: 1, extras: None }
}

fn forward(extras: Extras) -> Action {
    Action { outcome: Outcome::Forward(vec![target("c")]), extras: Some(Box::new(extras)) }
}

/// A VM in which requests to r.com:80 whose path begins with /p are for this action.
fn vm(action: Action) -> Vm<Fake> {
    let table: TableName = "n/v:80".parse().unwrap();
    let path = TextMatch::Prefix("/p".into());
    let route = Route { name: "it".into(), index: 3, path, ignore_case: false, conditions: vec![], action };
    let winner =
        Origin { namespace: "n".parse().unwrap(), name: "v".parse().unwrap(), kind: OriginKind::VirtualService };
    let choice =
        Choice { cluster: Default::default(), routes: Some(Routes::Table(table.clone())), winner, losers: vec![] };
    let port = HostPort { port: 80, http: Some(choice), ..HostPort::default() };
    let mut all = crate::testing::rows(CatchAll::Block);
    all.push(Row::Host { pattern: "r.com".parse().unwrap(), ports: vec![port] });
    all.extend(rows(&table, &[route]));
    let mut vm = configured(CONFIGURATION);
    deliver(&mut vm, &whole(&writer(&all), 1));
    vm.host.set_property("destination\0address", b"192.0.2.1:80");
    vm
}

fn ask(vm: &mut Vm<Fake>, path: &str, headers: &[(&str, &str)]) -> (Told, Vec<Call>) {
    let mut all = vec![(":authority", "r.com"), (":scheme", "http"), (":path", path)];
    if !headers.iter().any(|(name, _)| *name == ":method") {
        all.push((":method", "GET"));
    }
    all.extend_from_slice(headers);
    let all: Vec<(&[u8], &[u8])> = all.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes())).collect();
    vm.host.set_headers(&all);
    vm.host.take_calls();
    let told = vm.on_request_headers(CONTEXT);
    let quiet = |call: &Call| !matches!(call, Call::Log(..) | Call::DefineMetric(_));
    (told, vm.host.take_calls().into_iter().filter(quiet).collect())
}

fn set(name: &str, value: &str) -> Call {
    Call::Replace(name.into(), value.into())
}

/// The calls of a request that goes on to cluster `c`, after these.
fn on(mut calls: Vec<Call>) -> (Told, Vec<Call>) {
    calls.push(set("x-portolan-cluster", "c"));
    (Told::Continue, calls)
}

fn answered(status: u16, details: &'static str, body: &str, headers: &[(&str, &str)]) -> (Told, Vec<Call>) {
    let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), v.as_bytes().to_vec())).collect();
    let answer = Answer { status, details, body: body.into(), headers, grpc: None };
    (Told::Pause, vec![Call::Answer(answer)])
}

#[test]
fn a_plain_route_costs_what_a_host_without_routes_does() {
    let mut vm = vm(Action { outcome: Outcome::Forward(vec![target("c")]), extras: None });
    assert_eq!(ask(&mut vm, "/p", &[]), on(vec![]));
    assert_eq!(vm.on_response_headers(CONTEXT), Told::Continue);
    assert_eq!(vm.host.take_calls(), []);
}

#[test]
fn without_a_route_there_is_nothing() {
    let mut vm = vm(forward(Extras::default()));
    let body = "portolan: no route takes the request to r.com (no_route: VirtualService n/v)\n";
    let answer = Call::Respond(404, "portolan_denied{no_route}".into(), body.into());
    assert_eq!(ask(&mut vm, "/q", &[]), (Told::Pause, vec![answer]));
}

#[test]
fn paths_are_rewritten_and_keep_their_query() {
    let rewritten = |rewrite: PathRewrite, path: &str| {
        let mut vm = vm(forward(Extras { path: Some(rewrite), ..Extras::default() }));
        let (_, calls) = ask(&mut vm, path, &[]);
        calls.iter().find_map(|call| match call {
            Call::Replace(name, value) if name == ":path" => Some(String::from_utf8(value.clone()).unwrap()),
            _ => None,
        })
    };
    let matched = |text: &str| PathRewrite::Matched(text.into());
    assert_eq!(rewritten(matched("/"), "/p/v1?x=1").as_deref(), Some("//v1?x=1"));
    assert_eq!(rewritten(matched("/new"), "/p").as_deref(), Some("/new"));
    let regex = PathRewrite::Regex("/(v[0-9]+)/([a-z]+)".into(), r"/\2/\1\\".into());
    assert_eq!(rewritten(regex, "/p/v1/a/v2/b?/v1/a").as_deref(), Some(r"/p/a/v1\/b/v2\?/v1/a"));
}

#[test]
fn headers_of_the_destination_then_those_of_the_route() {
    let pair = |n: &str, v: &str| (n.to_owned(), v.to_owned());
    let own = TargetExtras {
        authority: "own".into(),
        request: HeaderOps { set: vec![pair("a", "own")], ..HeaderOps::default() },
        ..TargetExtras::default()
    };
    let ops =
        HeaderOps { set: vec![pair("a", "%REQ(:method)%%%")], add: vec![pair("b", "2")], remove: vec!["c".into()] };
    let extras = Extras { request: ops.clone(), response: ops, ..Extras::default() };
    let target = Target { extras: Some(Box::new(own)), ..target("c") };
    let mut vm = vm(Action { outcome: Outcome::Forward(vec![target]), extras: Some(Box::new(extras)) });
    let add = Call::Add("b".into(), b"2".to_vec());
    let expected = vec![set("a", "own"), Call::Remove(b"c".to_vec()), set("a", "GET%"), add, set(":authority", "own")];
    assert_eq!(ask(&mut vm, "/p", &[]), on(expected));
    vm.on_response_headers(CONTEXT);
    let expected = [
        Call::RemoveResponse("c".into()),
        Call::ReplaceResponse("a".into(), b"GET%".to_vec()),
        Call::AddResponse("b".into(), b"2".to_vec()),
    ];
    assert_eq!(vm.host.take_calls(), expected);
    vm.on_response_headers(CONTEXT);
    assert_eq!(vm.host.take_calls(), [], "once");
}

#[test]
fn orders_to_the_host_and_those_of_the_application() {
    let retry = Retry { attempts: 3, on: "5xx".into(), statuses: "418".into(), per_try_ms: 20, ..Retry::default() };
    let mirror = |cluster: &str, share| Mirror { cluster: cluster.into(), share };
    let mirrors = vec![mirror("m", ALL), mirror("never", 0), mirror("n", ALL)];
    let extras = Extras { timeout_ms: 1500, retry: Some(retry), mirrors, ..Extras::default() };
    let mut vm = vm(forward(extras));
    let ours = vec![
        set("x-envoy-upstream-rq-timeout-ms", "1500"),
        set("x-portolan-retry", "own"),
        set("x-envoy-max-retries", "3"),
        set("x-envoy-upstream-rq-per-try-timeout-ms", "20"),
        set("x-envoy-retry-on", "5xx"),
        set("x-envoy-retry-grpc-on", "5xx"),
        set("x-envoy-retriable-status-codes", "418"),
        set("x-portolan-mirror", "m,n"),
    ];
    assert_eq!(ask(&mut vm, "/p", &[]), on(ours));
    let theirs = [("x-envoy-upstream-rq-timeout-ms", "9"), ("x-envoy-max-retries", "1"), ("x-envoy-retry-on", "reset")];
    let joined = vec![
        set("x-portolan-retry", "own"),
        set("x-envoy-upstream-rq-per-try-timeout-ms", "20"),
        set("x-envoy-retry-on", "reset,5xx"),
        set("x-envoy-retry-grpc-on", "5xx"),
        set("x-envoy-retriable-status-codes", "418"),
        set("x-portolan-mirror", "m,n"),
    ];
    assert_eq!(ask(&mut vm, "/p", &theirs), on(joined));
}

#[test]
fn no_attempts_are_no_policy_and_no_conditions_leave_the_hosts_own() {
    let asked = |attempts| {
        let extras = Extras { retry: Some(Retry { attempts, ..Retry::default() }), ..Extras::default() };
        ask(&mut vm(forward(extras)), "/p", &[])
    };
    assert_eq!(asked(0), on(vec![set("x-portolan-retry", "own")]));
    assert_eq!(asked(4), on(vec![set("x-envoy-max-retries", "4")]));
}

#[test]
fn faults() {
    let delay = Fault { delay_share: ALL, delay_ms: 70, ..Fault::default() };
    let mut delayed = vm(forward(Extras { fault: Some(delay), ..Extras::default() }));
    assert_eq!(ask(&mut delayed, "/p", &[]), on(vec![set("x-envoy-fault-delay-request", "70")]));
    let abort = Fault { abort_share: ALL, abort_status: 555, ..Fault::default() };
    let mut aborted = vm(forward(Extras { fault: Some(abort), ..Extras::default() }));
    let text = [("content-type", "text/plain")];
    assert_eq!(ask(&mut aborted, "/p", &[]), answered(555, "fault_filter_abort", "fault filter abort", &text));
}

#[test]
fn an_answer_waits_for_the_delay() {
    let fault = Fault { delay_share: ALL, delay_ms: 700, ..Fault::default() };
    let extras = Extras { fault: Some(fault), ..Extras::default() };
    let direct = Outcome::Respond(Respond { status: 418, body: b"teapot".to_vec() });
    let mut vm = vm(Action { outcome: direct, extras: Some(Box::new(extras)) });
    let waiting = [Call::Context(ROOT), Call::Tick(700), Call::Context(CONTEXT)];
    assert_eq!(ask(&mut vm, "/p", &[]), (Told::Pause, waiting.to_vec()));
    vm.host.pass(Duration::from_millis(400));
    vm.on_tick(ROOT);
    assert_eq!(vm.host.take_calls(), [Call::Context(ROOT), Call::Tick(300)]);
    vm.host.pass(Duration::from_millis(300));
    vm.on_tick(ROOT);
    let (_, answer) = answered(418, "direct_response", "teapot", &[("content-type", "text/plain")]);
    let after = [vec![Call::Context(CONTEXT)], answer, vec![Call::Context(ROOT), Call::Tick(0)]].concat();
    assert_eq!(vm.host.take_calls(), after);
}

#[test]
fn nobody_answers_a_request_that_is_gone() {
    let fault = Fault { delay_share: ALL, delay_ms: 700, ..Fault::default() };
    let extras = Extras { fault: Some(fault), ..Extras::default() };
    let mut vm = vm(Action { outcome: Outcome::Redirect(Redirect::default()), extras: Some(Box::new(extras)) });
    ask(&mut vm, "/p", &[]);
    vm.on_delete(CONTEXT);
    vm.host.pass(Duration::from_secs(1));
    vm.on_tick(ROOT);
    assert!(!vm.host.calls().iter().any(|call| matches!(call, Call::Answer(_))));
}

#[test]
fn the_manner_of_retries_is_one_word() {
    let asked = |retry| {
        let extras = Extras { retry: Some(retry), ..Extras::default() };
        ask(&mut vm(forward(extras)), "/p", &[])
    };
    let usual = Retry { attempts: Retry::ATTEMPTS, ..Retry::default() };
    assert_eq!(asked(usual.clone()), on(vec![]));
    let other = Retry { base_ms: 50, same_hosts: true, remote: true, ..usual };
    assert_eq!(asked(other), on(vec![set("x-portolan-retry", "base-ms=50,same-hosts,remote")]));
}

#[test]
fn an_abort_waits_for_the_delay() {
    let both = Fault { delay_share: ALL, delay_ms: 700, abort_share: ALL, abort_status: 418, ..Fault::default() };
    let with = |fault: &Fault| Extras { fault: Some(fault.clone()), ..Extras::default() };
    let delay = || set("x-envoy-fault-delay-request", "700");
    let mut http = vm(forward(with(&both)));
    assert_eq!(ask(&mut http, "/p", &[]), on(vec![delay(), set("x-envoy-fault-abort-request", "418")]));
    let mut grpc = vm(forward(with(&Fault { abort_grpc: Some(14), ..both })));
    assert_eq!(ask(&mut grpc, "/p", &[]), on(vec![delay(), set("x-envoy-fault-abort-grpc-request", "14")]));
}

#[test]
fn answers_of_a_route() {
    let set = |n: &str, v: &str| HeaderOps { set: vec![(n.into(), v.into())], ..HeaderOps::default() };
    let extras = Extras { response: set("content-type", "a/b"), ..Extras::default() };
    let direct = Outcome::Respond(Respond { status: 418, body: b"teapot".to_vec() });
    let mut vm = vm(Action { outcome: direct, extras: Some(Box::new(extras)) });
    assert_eq!(ask(&mut vm, "/p", &[]), answered(418, "direct_response", "teapot", &[("content-type", "a/b")]));
}

#[test]
fn redirects_as_envoy_puts_them_together() {
    let location = |redirect: Redirect, rewrite: Option<&str>, authority: &str, path: &str| {
        let path_rewrite = rewrite.map(|text| PathRewrite::Matched(text.into()));
        let extras = Extras { path: path_rewrite, ..Extras::default() };
        let mut vm = vm(Action { outcome: Outcome::Redirect(redirect), extras: Some(Box::new(extras)) });
        let named: Vec<(&[u8], &[u8])> = vec![
            (b":authority", authority.as_bytes()),
            (b":scheme", b"http"),
            (b":path", path.as_bytes()),
            (b"x-forwarded-proto", b"http"),
        ];
        vm.host.set_headers(&named);
        vm.on_request_headers(CONTEXT);
        vm.host.take_calls().into_iter().find_map(|call| match call {
            Call::Answer(answer) => Some((answer.status, String::from_utf8(answer.headers[0].1.clone()).unwrap())),
            _ => None,
        })
    };
    let redirect = |change: fn(&mut Redirect)| {
        let mut redirect = Redirect { status: 302, ..Redirect::default() };
        change(&mut redirect);
        redirect
    };
    for (change, rewrite, authority, path, expected) in [
        ((|r| r.path = "/x".into()) as fn(&mut Redirect), None, "r.com", "/p?a=1", "http://r.com/x?a=1"),
        (|r| r.path = "/x?b".into(), None, "r.com", "/p?a=1", "http://r.com/x?b"),
        (|_| {}, Some("/new"), "r.com", "/p/q?a=1", "http://r.com/new/q?a=1"),
        (|r| r.authority = "b.com".into(), None, "r.com", "/p", "http://b.com/p"),
        (|r| r.scheme = "https".into(), None, "r.com:80", "/p", "https://r.com/p"),
        (|r| r.scheme = "https".into(), None, "r.com:8080", "/p", "https://r.com:8080/p"),
        (|r| (r.scheme, r.keeps_port) = ("https".into(), true), None, "r.com:80", "/p", "https://r.com:80/p"),
        (|r| r.port = 8443, None, "r.com:80", "/p", "http://r.com:8443/p"),
    ] {
        let told = location(redirect(change), rewrite, authority, path);
        assert_eq!(told, Some((302, expected.to_owned())), "{authority} {path}");
    }
}

#[test]
fn cross_origin_requests() {
    let cors = Cors {
        origins: vec![TextMatch::Exact("https://a.com".into())],
        methods: "GET,PUT".into(),
        max_age: "60".into(),
        expose: "x-e".into(),
        credentials: true,
        ..Cors::default()
    };
    let preflight =
        |origin: &'static str| [(":method", "OPTIONS"), ("origin", origin), ("access-control-request-method", "PUT")];
    let mut open = vm(forward(Extras { cors: Some(cors.clone()), ..Extras::default() }));
    let headers = [
        ("access-control-allow-origin", "https://a.com"),
        ("access-control-allow-credentials", "true"),
        ("access-control-allow-methods", "GET,PUT"),
        ("access-control-max-age", "60"),
    ];
    assert_eq!(ask(&mut open, "/p", &preflight("https://a.com")), answered(200, "cors_response", "", &headers));
    assert_eq!(ask(&mut open, "/p", &preflight("https://z.com")), on(vec![]));
    assert_eq!(ask(&mut open, "/p", &[("origin", "https://a.com")]), on(vec![]));
    open.on_response_headers(CONTEXT);
    let response = |n: &str, v: &str| Call::ReplaceResponse(n.into(), v.into());
    let expected = [
        response("access-control-allow-origin", "https://a.com"),
        response("access-control-allow-credentials", "true"),
        response("access-control-expose-headers", "x-e"),
    ];
    assert_eq!(open.host.take_calls(), expected);
    let mut closed = vm(forward(Extras { cors: Some(Cors { refuse_unmatched: true, ..cors }), ..Extras::default() }));
    assert_eq!(ask(&mut closed, "/p", &preflight("https://z.com")), answered(200, "cors_response", "", &[]));
}

#[test]
fn weights_are_kept_to() {
    let weighted = |cluster: &str, weight| Target { weight, ..target(cluster) };
    let targets = [weighted("a", 1), weighted("b", 3), weighted("never", 0)];
    let mut seen = std::collections::BTreeMap::new();
    for _ in 0..4000 {
        *seen.entry(super::pick(&targets).unwrap().cluster.clone()).or_insert(0) += 1;
    }
    // One in four, give or take what chance gives once in a million runs.
    assert!((860..1140).contains(&seen["a"]), "{seen:?}");
    assert_eq!(seen.len(), 2);
    assert_eq!(super::pick(&[weighted("only", 0)]).map(|t| t.cluster.as_str()), Some("only"));
    assert_eq!(super::pick(&[]), None);
}

/// What the host is told by for a request with these headers, and the cookie that the client gets.
fn kept_by(key: HashKey, path: &str, headers: &[(&str, &str)]) -> (Option<String>, Option<String>) {
    let extras = TargetExtras { hash: Some(key), ..TargetExtras::default() };
    let target = Target { extras: Some(Box::new(extras)), ..target("c") };
    let mut vm = vm(Action { outcome: Outcome::Forward(vec![target]), extras: None });
    vm.host.set_property("source\0address", b"10.1.1.1:5000");
    let (told, calls) = ask(&mut vm, path, headers);
    assert_eq!(told, Told::Continue);
    let hash = calls.into_iter().find_map(|call| match call {
        Call::Foreign(name, arguments) if name == "set_envoy_filter_state" => {
            let state = SetFilterState::decode(&*arguments).unwrap();
            (state.path == super::HASH_STATE).then(|| String::from_utf8(state.value).unwrap())
        }
        _ => None,
    });
    vm.on_response_headers(CONTEXT);
    let cookie = vm.host.take_calls().into_iter().find_map(|call| match call {
        Call::AddResponse(name, value) if name == "set-cookie" => String::from_utf8(value).ok(),
        _ => None,
    });
    (hash, cookie)
}

#[test]
fn requests_are_kept_together_by_what_the_rule_says() {
    let only = |value: &str| (Some(value.to_owned()), None);
    let header = || HashKey::Header("x-u".into());
    assert_eq!(kept_by(header(), "/p", &[("x-u", "ann")]), only("ann"));
    assert_eq!(kept_by(header(), "/p", &[]), (None, None));
    assert_eq!(kept_by(HashKey::Query("u".into()), "/p?a=1&u=b%20c#u=d", &[]), only("b c"));
    assert_eq!(kept_by(HashKey::Query("u".into()), "/p", &[]), (None, None));
    assert_eq!(kept_by(HashKey::SourceIp, "/p", &[]), only("10.1.1.1"));
    let cookie = HashCookie { name: "s".into(), path: "/p".into(), ..HashCookie::default() };
    let known = HashKey::Cookie(cookie.clone());
    assert_eq!(kept_by(known.clone(), "/p", &[("cookie", "a=b; s=\"it\"")]), only("it"));
    assert_eq!(kept_by(known, "/p", &[("cookie", "as=b; s=")]), (None, None));
    let attributes = vec![("SameSite".into(), "Strict".into()), ("Secure".into(), String::new())];
    for (ttl, age) in [(0, ""), (60, "; Max-Age=60")] {
        let given = HashKey::Cookie(HashCookie { ttl: Some(ttl), attributes: attributes.clone(), ..cookie.clone() });
        let (hash, cookie) = kept_by(given.clone(), "/p", &[]);
        let hash = hash.expect("a new cookie counts at once");
        let wanted = format!("s=\"{hash}\"{age}; Path=/p; SameSite=Strict; Secure; HttpOnly");
        assert_eq!(cookie, Some(wanted));
        assert_eq!(kept_by(given, "/p", &[("cookie", "s=it")]), only("it"));
    }
}

#[test]
fn a_host_that_does_not_carry_it_out_lets_nothing_on() {
    for call in ["answer", "replace_request_header", "add_request_header", "remove_request_header"] {
        let ops = HeaderOps { add: vec![("a".into(), "b".into())], remove: vec!["c".into()], ..HeaderOps::default() };
        let extras = Extras { request: ops, timeout_ms: 5, ..Extras::default() };
        let outcome = match call {
            "answer" => Outcome::Respond(Respond { status: 200, body: vec![] }),
            _ => Outcome::Forward(vec![target("c")]),
        };
        let mut vm = vm(Action { outcome, extras: Some(Box::new(extras)) });
        vm.host.fail(call, 10);
        let (told, calls) = ask(&mut vm, "/p", &[]);
        assert_eq!(told, Told::Pause, "{call}");
        assert!(calls.iter().any(|c| matches!(c, Call::Respond(503, ..))), "{call}: {calls:?}");
    }
}
