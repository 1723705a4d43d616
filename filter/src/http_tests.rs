use portolan_registry::row::CatchAll;

use super::*;
use crate::host::fake::{Call, Fake};
use crate::testing::{CONFIGURATION, ROOT, STATUSES, configured, deliver, ready, whole, writer};

fn request(vm: &mut Vm<Fake>, destination: &str, headers: &[(&[u8], &[u8])]) -> (Action, Vec<Call>) {
    vm.host.set_property("destination\0address", destination.as_bytes());
    vm.host.set_headers(headers);
    vm.host.take_calls();
    let action = vm.on_request_headers(2);
    let calls = vm.host.take_calls();
    let told = |call: &Call| !matches!(call, Call::Log(..) | Call::DefineMetric(_));
    (action, calls.into_iter().filter(told).collect())
}

fn routed(cluster: &str) -> (Action, Vec<Call>) {
    (Action::Continue, vec![Call::Replace(CLUSTER_HEADER.into(), cluster.into())])
}

fn refused(status: u16, details: &str, body: &str) -> (Action, Vec<Call>) {
    (Action::Pause, vec![Call::Respond(status, details.into(), format!("{body}\n"))])
}

#[test]
fn a_known_host_goes_to_its_cluster() {
    let mut vm = ready(CatchAll::Block);
    let told = request(&mut vm, "192.0.2.1:80", &[(b":method", b"GET"), (b":authority", b"A.com")]);
    assert_eq!(told, routed("outbound|80||a.com"));
    assert_eq!(vm.host.metrics().get("portolan.http.route.host_exact"), Some(&1));
}

#[test]
fn an_unknown_host_is_refused_with_a_reason() {
    let mut vm = ready(CatchAll::Block);
    let told = request(&mut vm, "192.0.2.1:80", &[(b":authority", b"b.com:80")]);
    let body = "portolan: b.com:80 is not in the registry (blocked)";
    assert_eq!(told, refused(502, "portolan_denied{blocked}", body));
    assert_eq!(vm.host.metrics().get("portolan.http.deny.blocked"), Some(&1));
}

#[test]
fn a_name_that_cannot_be_is_refused_and_shown_harmless() {
    let mut vm = ready(CatchAll::PassThrough);
    let told = request(&mut vm, "192.0.2.1:80", &[(b":authority", b"a\xff\n<b>/")]);
    let body = "portolan: a??<b>/ cannot be a host name (bad_name)";
    assert_eq!(told, refused(400, "portolan_denied{bad_name}", body));
}

#[test]
fn an_unknown_host_passes_where_the_policy_says_so() {
    let mut vm = ready(CatchAll::PassThrough);
    let told = request(&mut vm, "192.0.2.1:80", &[(b":authority", b"b.com")]);
    assert_eq!(told, routed(PASSTHROUGH_CLUSTER));
}

#[test]
fn the_proxy_port_is_known_by_loopback_and_chain() {
    let host: &[(&[u8], &[u8])] = &[(b":authority", b"a.com")];
    let mut vm = ready(CatchAll::Block);
    // Captured, there is nothing on port 15080.
    assert_eq!(request(&mut vm, "127.0.0.1:15080", host).0, Action::Pause);
    vm.host.set_property("xds\0filter_chain_name", b"http_proxy");
    assert_eq!(request(&mut vm, "127.0.0.1:15080", host), routed("outbound|80||a.com"));
    assert_eq!(request(&mut vm, "[::ffff:127.0.0.1]:15080", host), routed("outbound|80||a.com"));
    assert_eq!(request(&mut vm, "192.0.2.1:15080", host).0, Action::Pause);
    // CONNECT without a port means 443, which a.com does not offer there.
    let connect: &[(&[u8], &[u8])] = &[(b":method", b"CONNECT"), (b":authority", b"a.com")];
    assert_eq!(request(&mut vm, "127.0.0.1:15080", connect).0, Action::Pause);
}

#[test]
fn a_host_that_promises_to_says_by_a_header_where_a_request_came_in() {
    let mut vm = ready(CatchAll::Block);
    vm.destination_header = true;
    let mut ask = |values: &[&'static [u8]]| {
        let mut headers: Vec<(&[u8], &[u8])> = vec![(b":authority", b"a.com")];
        headers.extend(values.iter().map(|value| (DESTINATION_HEADER.as_bytes(), *value)));
        // The property says otherwise, and is not asked.
        request(&mut vm, "127.0.0.1:1", &headers)
    };
    let unknown = || refused(503, "portolan_no_destination", "portolan: the host does not say the destination");
    assert_eq!(ask(&[b"192.0.2.1:80"]), routed("outbound|80||a.com"));
    assert_eq!(ask(&[b"proxy"]), routed("outbound|80||a.com"));
    assert_eq!(ask(&[b"192.0.2.1:81"]).0, Action::Pause);
    for values in [&[][..], &[b"".as_slice()], &[b"PROXY".as_slice()], &[b"192.0.2.1:80".as_slice(), b"proxy"]] {
        assert_eq!(ask(values), unknown(), "{values:?}");
    }
}

#[test]
fn every_plugin_of_a_vm_must_promise_it() {
    let mut vm = configured(br#"{"namespace":"n","destination_header":true}"#);
    assert!(vm.destination_header);
    *vm.host.configuration.borrow_mut() = CONFIGURATION.to_vec();
    assert!(vm.on_configure(ROOT + 1));
    assert!(!vm.destination_header);
}

#[test]
fn a_request_must_name_one_host() {
    let mut vm = ready(CatchAll::PassThrough);
    let body = "portolan: the request does not name one host";
    let cases: [&[(&[u8], &[u8])]; 3] =
        [&[], &[(b":method", b"GET")], &[(b":authority", b"a.com"), (b":authority", b"b.com")]];
    for headers in cases {
        assert_eq!(request(&mut vm, "192.0.2.1:80", headers), refused(400, "portolan_no_authority", body));
    }
}

#[test]
fn a_client_cannot_give_the_hosts_orders() {
    let forged: [&[u8]; 8] = [
        b"x-portolan-cluster",
        b"X-Portolan-Anything",
        b"x-portolan-",
        b"x-envoy-original-dst-host",
        b"x-envoy-fault-delay-request",
        b"x-envoy-fault-abort-request",
        b"x-envoy-decorator-operation",
        b"X-Envoy-Internal",
    ];
    let mut headers: Vec<(&[u8], &[u8])> = vec![(b":authority", b"a.com")];
    headers.extend(forged.iter().map(|name| (*name, b"x".as_slice())));
    let (action, calls) = request(&mut ready(CatchAll::Block), "192.0.2.1:80", &headers);
    let mut expected: Vec<Call> = forged.iter().map(|name| Call::Remove(name.to_vec())).collect();
    expected.extend(routed("outbound|80||a.com").1);
    assert_eq!((action, calls), (Action::Continue, expected));
}

#[test]
fn an_applications_own_headers_stay() {
    let own: [&[u8]; 6] = [
        b"x-envoy-upstream-rq-timeout-ms",
        b"x-envoy-retry-on",
        b"x-envoy-external-address",
        b"x-portolan",
        b"x-request-id",
        b"",
    ];
    let mut headers: Vec<(&[u8], &[u8])> = vec![(b":authority", b"a.com")];
    headers.extend(own.iter().map(|name| (*name, b"x".as_slice())));
    assert_eq!(request(&mut ready(CatchAll::Block), "192.0.2.1:80", &headers), routed("outbound|80||a.com"));
}

#[test]
fn before_the_first_snapshot_the_configuration_decides() {
    let host: &[(&[u8], &[u8])] = &[(b":authority", b"a.com"), (b"x-portolan-cluster", b"evil")];
    let mut closed = configured(CONFIGURATION);
    let (action, calls) = request(&mut closed, "192.0.2.1:80", host);
    let body = "portolan: the registry has not been received yet\n";
    let answer = Call::Respond(503, "portolan_no_snapshot".into(), body.into());
    assert_eq!((action, calls), (Action::Pause, vec![Call::Remove(b"x-portolan-cluster".to_vec()), answer]));
    assert_eq!(closed.host.metrics().get("portolan.http.deny.no_snapshot"), Some(&1));

    let mut open = configured(br#"{"namespace":"n","no_snapshot":"open"}"#);
    let (action, calls) = request(&mut open, "192.0.2.1:80", host);
    let mut expected = vec![Call::Remove(b"x-portolan-cluster".to_vec())];
    expected.extend(routed(PASSTHROUGH_CLUSTER).1);
    assert_eq!((action, calls), (Action::Continue, expected));
    assert_eq!(open.host.metrics().get("portolan.http.route.no_snapshot"), Some(&1));
}

#[test]
fn what_passes_is_logged_at_debug_only() {
    let headers: &[(&[u8], &[u8])] = &[(b":authority", b"a.com")];
    let mut vm = ready(CatchAll::Block);
    vm.host.set_property("destination\0address", b"192.0.2.1:80");
    vm.host.set_headers(headers);
    vm.on_request_headers(2);
    let line = "portolan: a.com goes to outbound|80||a.com (host_exact: ServiceEntry n/entry)";
    assert_eq!(vm.host.logs(), [line]);
    // A host that does not say its level has that of Info.
    vm.host.fail("log_level", 12);
    assert!(vm.on_configure(ROOT));
    vm.host.take_calls();
    vm.on_request_headers(2);
    assert_eq!(vm.host.logs(), [""; 0]);
}

#[test]
fn without_a_configuration_nothing_passes() {
    let mut vm = Vm::new(Fake::default());
    assert_eq!(request(&mut vm, "192.0.2.1:80", &[(b":authority", b"a.com")]).0, Action::Pause);
}

#[test]
fn a_destination_that_cannot_be_read_is_refused() {
    let mut vm = ready(CatchAll::PassThrough);
    for destination in ["", "192.0.2.1", "a.com:80", "192.0.2.1:99999", "/var/run/a.sock"] {
        let told = request(&mut vm, destination, &[(b":authority", b"a.com")]);
        let body = "portolan: the host does not say the destination";
        assert_eq!(told, refused(503, "portolan_no_destination", body), "{destination}");
    }
}

#[test]
fn headers_cut_anywhere_are_refused() {
    let mut vm = ready(CatchAll::PassThrough);
    vm.host.set_property("destination\0address", b"192.0.2.1:80");
    vm.host.set_headers(&[(b":authority", b"a.com"), (b"x-portolan-cluster", b"evil")]);
    let bytes = vm.host.headers.borrow().clone();
    for cut in 0..bytes.len() {
        *vm.host.headers.borrow_mut() = bytes[..cut].to_vec();
        assert_eq!(vm.on_request_headers(2), Action::Pause, "cut at {cut}");
    }
}

#[test]
fn whatever_call_fails_the_request_is_answered_or_not_let_on() {
    let answers = ["local_response", "reset_request"];
    let harmless = ["log_level", "define_metric", "increment_metric", "record_metric", "now"];
    let used = ["property", "request_headers", "replace_request_header", "remove_request_header"];
    for call in Fake::FALLIBLE {
        for status in STATUSES {
            let mut vm = ready(CatchAll::Block);
            vm.host.fail(call, status);
            let headers: &[(&[u8], &[u8])] = &[(b":authority", b"a.com"), (b"x-envoy-internal", b"true")];
            let (action, calls) = request(&mut vm, "192.0.2.1:80", headers);
            let expected = if used.contains(&call) { Action::Pause } else { Action::Continue };
            assert_eq!(action, expected, "{call} {status}");
            let answered = calls.iter().any(|c| matches!(c, Call::Respond(503, ..)));
            assert_eq!(answered, expected == Action::Pause, "{call} {status}");
            assert!(!harmless.contains(&call) || action == Action::Continue);
        }
    }
    for status in STATUSES {
        let mut vm = ready(CatchAll::Block);
        answers.iter().for_each(|call| vm.host.fail(call, status));
        let (action, calls) = request(&mut vm, "192.0.2.1:80", &[(b":authority", b"b.com")]);
        assert_eq!((action, calls.last()), (Action::Pause, Some(&Call::Reset)));
    }
}

#[test]
fn a_chain_of_a_gateway_without_a_name_is_that_of_plain_http() {
    use portolan_registry::lookup::server_id;
    use portolan_registry::row::{Globals, HostPort, Row};

    let mut vm = configured(br#"{"namespace":"n","role":"gateway"}"#);
    let served = |port, name: &str, cluster| HostPort {
        port,
        server: server_id(name.as_bytes()),
        http: Some(crate::testing::choice(cluster)),
        sni: None,
        proxy: None,
    };
    let ports = vec![served(80, "http.80", "plain"), served(443, "https.443.https.g.n", "secure")];
    let rows = [
        Row::Globals(Globals { catch_all: CatchAll::Block, gateway: true, retry: None }),
        Row::Host { pattern: "a.com".parse().unwrap(), ports },
    ];
    deliver(&mut vm, &whole(&writer(&rows), 1));
    let host: &[(&[u8], &[u8])] = &[(b":authority", b"a.com")];
    let mut ask = |destination, chain: Option<&[u8]>| {
        if let Some(chain) = chain {
            vm.host.set_property("xds\0filter_chain_name", chain);
        }
        request(&mut vm, destination, host)
    };
    // Envoys say that there is no name in either way.
    assert_eq!(ask("192.0.2.1:80", None), routed("plain"));
    assert_eq!(ask("192.0.2.1:80", Some(b"")), routed("plain"));
    assert_eq!(ask("192.0.2.1:443", Some(b"")).0, Action::Pause, "TLS ends in a chain with a name");
    assert_eq!(ask("192.0.2.1:443", Some(b"https.443.https.g.n")), routed("secure"));
    assert_eq!(ask("192.0.2.1:80", Some(b"http.80")), routed("plain"));
    assert_eq!(ask("192.0.2.1:80", Some(b"another")).0, Action::Pause);
}
