//! The real `filter.wasm` in the real ABI host: snapshots and headers in, decisions out.

use http::StatusCode;
use portolan_proto::v1::WatchResponse;
use portolan_proto::v1::watch_request::Message as Sent;
use portolan_proxy_host::vm::{Limits, MetricValue};
use portolan_registry::row::{CatchAll, Choice, Globals, HostPort, Origin, OriginKind, Row};
use portolan_registry::write::Writer;
use portolan_tests::wasm::{Filter, HttpDecision, TcpDecision, parts};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::cell::RefCell;
use std::net::SocketAddr;

const WEB: &str = "outbound|80||web.example.com";

fn web() -> SocketAddr {
    SocketAddr::from(([10, 1, 2, 3], 80))
}

fn tls() -> SocketAddr {
    SocketAddr::from(([10, 1, 2, 3], 443))
}

fn choice(cluster: &str) -> Option<Choice> {
    let winner = Origin {
        namespace: "default".parse().expect("a name"),
        name: "entry".parse().expect("a name"),
        kind: OriginKind::ServiceEntry,
    };
    Some(Choice { cluster: cluster.parse().expect("a name"), routes: None, winner, losers: Vec::new() })
}

fn host(pattern: &str, cluster: &str) -> Row {
    let port = |port, http, sni| HostPort { port, server: 0, http, sni, proxy: choice(cluster) };
    let ports = vec![port(80, choice(cluster), None), port(443, None, choice(cluster))];
    Row::Host { pattern: pattern.parse().expect("a pattern"), ports }
}

/// A registry that knows `web.example.com` and blocks the rest.
fn registry(cluster: &str) -> Writer {
    let mut writer = Writer::new();
    let rows = [
        Row::Globals(Globals { catch_all: CatchAll::Block, gateway: false, retry: None }),
        Row::Port { port: 80, http: true, tcp: None, prefixes: Vec::new() },
        Row::Port { port: 443, http: false, tcp: None, prefixes: Vec::new() },
        host("web.example.com", cluster),
        host("*.wild.example.com", "outbound|80||*.wild.example.com"),
    ];
    for row in &rows {
        writer.put(row).expect("the row fits");
    }
    writer.commit();
    writer
}

/// A filter that has the registry of [`registry`].
fn loaded() -> Filter {
    let mut filter = Filter::default();
    filter.load(1, &registry(WEB)).expect("no trap");
    assert!(matches!(filter.sent().last(), Some(Sent::Ack(ack)) if ack.version == 1));
    filter
}

fn get(filter: &mut Filter, authority: &str) -> HttpDecision {
    filter.decide_http(&[(":authority", authority.as_bytes())], web()).expect("no trap")
}

#[track_caller]
fn cluster(decision: HttpDecision) -> String {
    match decision {
        HttpDecision::Route { cluster, .. } => cluster,
        denied => panic!("{denied:?}"),
    }
}

#[track_caller]
fn status(decision: HttpDecision) -> StatusCode {
    match decision {
        HttpDecision::Deny { status, .. } => status,
        routed => panic!("{routed:?}"),
    }
}

#[test]
fn requests_go_to_the_cluster_of_their_host() {
    let mut filter = loaded();
    assert_eq!(cluster(get(&mut filter, "web.example.com")), WEB);
    assert_eq!(cluster(get(&mut filter, "WEB.example.com:80")), WEB);
    assert_eq!(cluster(get(&mut filter, "a.wild.example.com")), "outbound|80||*.wild.example.com");
    let proxied = filter.decide_proxy(&[(":authority", b"web.example.com")]).expect("no trap");
    assert_eq!(cluster(proxied), WEB);
    assert_eq!(filter.streams(), 0);
    let counted = filter.shared().metrics.get("portolan.http.route.host_exact");
    assert_eq!(counted, Some(MetricValue::Counter(3)));
}

#[test]
fn an_unknown_host_is_refused_with_the_reason() {
    let mut filter = loaded();
    let HttpDecision::Deny { status, details, body } = get(&mut filter, "other.example.com") else {
        panic!("it is not in the registry")
    };
    assert_eq!((status, details.as_str()), (StatusCode::BAD_GATEWAY, "portolan_denied{blocked}"));
    assert!(body.contains("other.example.com"), "{body}");
}

#[test]
fn connections_go_by_server_name() {
    let mut filter = loaded();
    let routed = filter.decide_tcp(tls(), Some(b"web.example.com")).expect("no trap");
    assert_eq!(routed, TcpDecision::Route(WEB.into()));
    assert_eq!(filter.decide_tcp(tls(), Some(b"other.example.com")), Ok(TcpDecision::Close));
    assert_eq!(filter.decide_tcp(tls(), None), Ok(TcpDecision::Close));
    assert_eq!(filter.decide_tcp(SocketAddr::from(([10, 1, 2, 3], 9)), None), Ok(TcpDecision::Close));
}

#[test]
fn control_headers_of_a_client_are_removed() {
    let mut filter = loaded();
    let headers: &[(&str, &[u8])] = &[
        (":authority", b"web.example.com"),
        ("x-portolan-cluster", b"outbound|80||secret"),
        ("x-portolan-cluster", b"twice"),
        ("x-portolan-anything", b"1"),
        ("x-envoy-original-dst-host", b"10.0.0.1:22"),
        ("x-envoy-fault-abort-request", b"500"),
        ("x-envoy-upstream-rq-timeout-ms", b"50"),
        ("accept", b"*/*"),
    ];
    let decision = filter.decide_http(headers, web()).expect("no trap");
    let HttpDecision::Route { cluster, headers } = decision else { panic!("{decision:?}") };
    assert_eq!(cluster, WEB);
    let mut left: Vec<&str> = headers.keys().map(|name| name.as_str()).collect();
    left.sort_unstable();
    assert_eq!(left, ["accept", "x-envoy-upstream-rq-timeout-ms"]);
}

#[test]
fn without_a_snapshot_everything_is_refused() {
    let mut filter = Filter::default();
    assert_eq!(status(get(&mut filter, "web.example.com")), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(filter.decide_tcp(tls(), Some(b"web.example.com")), Ok(TcpDecision::Close));
}

#[test]
fn it_subscribes_for_its_node() {
    let subscribe = Filter::default().subscription();
    assert_eq!(subscribe.scope.map(|scope| scope.namespace), Some("default".into()));
    assert!(subscribe.held.is_empty());
}

#[test]
fn a_refused_snapshot_leaves_the_last_good_one() {
    let mut filter = loaded();
    let next = registry("outbound|80||next");
    let pages: Vec<u32> = next.pages().map(|(id, _)| id).collect();

    // A page with one wrong bit.
    let mut broken = parts(2, &next, &pages, &[]);
    let page = broken[0].pages.first_mut().expect("a page");
    *page.data.last_mut().expect("a byte") ^= 1;
    filter.receive(&broken[0]).expect("no trap");
    assert!(matches!(filter.sent().as_slice(), [Sent::Nack(nack)] if nack.version == 2));
    assert_eq!(cluster(get(&mut filter, "web.example.com")), WEB);

    // The controller goes on with the whole state of a later version.
    filter.load(3, &next).expect("no trap");
    assert!(matches!(filter.sent().as_slice(), [Sent::Ack(ack)] if ack.version == 3));
    assert_eq!(cluster(get(&mut filter, "web.example.com")), "outbound|80||next");
}

#[test]
fn a_wrong_digest_is_refused() {
    let mut filter = loaded();
    let next = registry("outbound|80||next");
    let pages: Vec<u32> = next.pages().map(|(id, _)| id).collect();
    let mut update = parts(2, &next, &pages, &[]);
    update.last_mut().expect("a part").digest ^= 1;
    for part in &update {
        filter.receive(part).expect("no trap");
    }
    assert!(matches!(filter.sent().as_slice(), [Sent::Nack(_)]));
    assert_eq!(cluster(get(&mut filter, "web.example.com")), WEB);
}

#[test]
fn a_lost_stream_is_resumed_from_what_is_held() {
    let mut filter = loaded();
    filter.close_stream(14).expect("no trap");
    // Stale keeps deciding.
    assert_eq!(cluster(get(&mut filter, "web.example.com")), WEB);
    filter.wait_for_stream().expect("no trap");
    let subscribe = filter.subscription();
    let held = registry(WEB).pages().count() * 12;
    assert_eq!((subscribe.version, subscribe.held.len()), (1, held));

    let mut writer = registry(WEB);
    writer.put(&host("new.example.com", "outbound|80||new.example.com")).expect("the row fits");
    let commit = writer.commit();
    for part in parts(2, &writer, &commit.changed, &commit.removed) {
        filter.receive(&part).expect("no trap");
    }
    assert!(matches!(filter.sent().as_slice(), [Sent::Ack(ack)] if ack.version == 2));
    assert_eq!(cluster(get(&mut filter, "new.example.com")), "outbound|80||new.example.com");
    assert_eq!(cluster(get(&mut filter, "web.example.com")), WEB);
}

#[test]
fn a_snapshot_is_replaced_under_load() {
    let mut filter = loaded();
    let mut writer = registry(WEB);
    let mut current = WEB.to_owned();
    for version in 2..20 {
        let next = format!("outbound|80||version-{version}");
        let names = (0..3_000).map(|n| format!("h{n}.example.com")).chain(["web.example.com".to_owned()]);
        for name in names {
            writer.put(&host(&name, &next)).expect("the row fits");
        }
        let commit = writer.commit();
        let update = parts(version, &writer, &commit.changed, &commit.removed);
        assert!(update.len() > 1, "an update of several parts");
        for part in &update {
            // In force whole, or not at all.
            assert_eq!(cluster(get(&mut filter, "web.example.com")), current);
            filter.receive(part).expect("no trap");
            filter.tick().expect("no trap");
        }
        assert!(matches!(filter.sent().last(), Some(Sent::Ack(ack)) if ack.version == version));
        current = next;
        assert_eq!(cluster(get(&mut filter, "web.example.com")), current);
        assert_eq!(cluster(get(&mut filter, "h2999.example.com")), current);
    }
}

#[test]
fn a_registry_too_large_for_the_memory_ends_in_an_error_and_a_fresh_instance() {
    let mut writer = registry(WEB);
    for n in 0..30_000 {
        writer.put(&host(&format!("h{n}.example.com"), &format!("outbound|80||cluster-{n}"))).expect("the row fits");
    }
    writer.commit();
    let mut filter = Filter::start(Limits { memory: 3 << 20, ..Limits::default() });
    filter.load(1, &writer).expect_err("it does not fit");
    assert!(filter.is_dead());
    filter.decide_http(&[(":authority", b"web.example.com")], web()).expect_err("a dead VM decides nothing");
    filter.decide_tcp(tls(), None).expect_err("a dead VM decides nothing");

    filter.restart(Limits::default());
    assert_eq!(status(get(&mut filter, "web.example.com")), StatusCode::SERVICE_UNAVAILABLE);
    filter.load(1, &writer).expect("no trap");
    assert_eq!(cluster(get(&mut filter, "h29999.example.com")), "outbound|80||cluster-29999");
}

#[test]
fn no_header_bytes_make_it_trap() {
    let filter = RefCell::new(loaded());
    let name = prop_oneof!["[a-z0-9-]{1,20}", "x-portolan-[a-z]{0,5}", "x-envoy-[a-z-]{0,20}"];
    let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
    let headers = proptest::collection::vec((name, bytes()), 0..12);
    let names = prop_oneof![bytes(), "[a-zA-Z0-9.*:\\[\\]-]{0,30}".prop_map(String::into_bytes)];
    let strategy = (names, bytes(), headers, any::<bool>(), any::<u16>());
    let result = TestRunner::default().run(&strategy, |(authority, path, headers, proxy, port)| {
        let mut all: Vec<(&str, &[u8])> = vec![(":authority", &authority), (":path", &path)];
        all.extend(headers.iter().map(|(name, value)| (name.as_str(), value.as_slice())));
        let mut filter = filter.borrow_mut();
        let destination = SocketAddr::from(([10, 0, 0, 1], port));
        let decided = if proxy { filter.decide_proxy(&all) } else { filter.decide_http(&all, destination) };
        prop_assert!(decided.is_ok(), "{decided:?}");
        if let Ok(HttpDecision::Route { headers, .. }) = &decided {
            prop_assert!(!headers.keys().any(|name| name.as_str().starts_with("x-portolan-")));
        }
        Ok(())
    });
    result.unwrap();
    assert_eq!(cluster(get(&mut filter.into_inner(), "web.example.com")), WEB);
}

#[test]
fn no_server_name_makes_it_trap() {
    let filter = RefCell::new(loaded());
    let strategy = (proptest::collection::vec(any::<u8>(), 0..300), any::<u16>());
    let result = TestRunner::default().run(&strategy, |(sni, port)| {
        let decided = filter.borrow_mut().decide_tcp(SocketAddr::from(([10, 0, 0, 1], port)), Some(&sni));
        prop_assert!(decided.is_ok(), "{decided:?}");
        Ok(())
    });
    result.unwrap();
}

#[test]
fn no_stream_message_makes_it_trap() {
    let filter = RefCell::new(loaded());
    let page = registry(WEB).pages().next().map(|(_, data)| data.to_vec()).expect("a page");
    let cut = any::<prop::sample::Index>();
    let strategy = (proptest::collection::vec(any::<u8>(), 0..200), cut, any::<u8>(), any::<bool>(), any::<u64>());
    let result = TestRunner::default().run(&strategy, |(noise, at, flip, raw, digest)| {
        let mut filter = filter.borrow_mut();
        prop_assert!(filter.wait_for_stream().is_ok());
        let received = if raw {
            filter.receive_bytes(noise)
        } else {
            let mut data = page.clone();
            let at = at.index(data.len());
            data[at] ^= flip;
            let page = portolan_proto::v1::Page { id: u32::from(flip), data };
            filter.receive(&WatchResponse { version: 9, pages: vec![page], removed: vec![], last: true, digest })
        };
        prop_assert!(received.is_ok(), "{received:?}");
        prop_assert_eq!(cluster(get(&mut filter, "web.example.com")), WEB);
        Ok(())
    });
    result.unwrap();
}
