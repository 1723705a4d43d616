//! The filter under wasmtime: CPU of a request at several sizes of the registry, and how long an update holds a worker
//! up. Each answer is checked before it is timed.
//!
//! `own` is the filter's whole share: what a request costs more than with a module that has no callbacks, where only the
//! harness works. Of that, `calls` is what a module costs that makes the same host calls and does nothing else. `lookup` is
//! what a request costs more than one that the filter routes unasked, for want of a snapshot: asking for the destination,
//! and the lookup.

use std::fmt::Debug;
use std::hint::black_box;
use std::net::SocketAddr;
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

use cpu_time::ProcessTime;
use portolan_proxy_host::vm::{Engine, Limits};
use portolan_registry::row::{Choice, Globals, HostPort, Origin, OriginKind, Row};
use portolan_registry::write::Writer;
use portolan_tests::wasm::{Connection, Filter, HttpDecision, engine, http_state, parts};

fn name<T: FromStr<Err: Debug>>(text: &str) -> T {
    text.parse().expect("a name")
}

fn row(i: usize) -> Row {
    let pattern = format!("host-{i}.example.com");
    let choice = Choice {
        routes: None,
        cluster: name(&format!("outbound|80||{pattern}")),
        winner: Origin {
            namespace: name("default"),
            name: name(&format!("entry-{i}")),
            kind: OriginKind::ServiceEntry,
        },
        losers: vec![],
    };
    let port = HostPort { port: 80, server: 0, http: Some(choice.clone()), sni: None, proxy: Some(choice) };
    Row::Host { pattern: pattern.parse().expect("a pattern"), ports: vec![port] }
}

/// Makes the calls that a routed request makes, and nothing else.
const CALLS: &str = r#"(module
    (import "env" "proxy_get_header_map_pairs" (func $pairs (param i32 i32 i32) (result i32)))
    (import "env" "proxy_get_property" (func $property (param i32 i32 i32 i32) (result i32)))
    (import "env" "proxy_replace_header_map_value" (func $replace (param i32 i32 i32 i32 i32) (result i32)))
    (import "env" "proxy_define_metric" (func $define (param i32 i32 i32 i32) (result i32)))
    (import "env" "proxy_increment_metric" (func $increment (param i32 i64) (result i32)))
    (memory (export "memory") 1)
    (data (i32.const 64) "destination\00address")
    (data (i32.const 96) "x-portolan-cluster")
    (data (i32.const 128) "outbound|80||host-1000.example.com")
    (data (i32.const 192) "portolan.decision")
    (func (export "proxy_abi_version_0_2_1"))
    (func (export "proxy_on_memory_allocate") (param i32) (result i32) i32.const 4096)
    (func (export "proxy_on_configure") (param i32 i32) (result i32)
        (drop (call $define (i32.const 0) (i32.const 192) (i32.const 17) (i32.const 32))) i32.const 1)
    (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (drop (call $pairs (i32.const 0) (i32.const 0) (i32.const 4)))
        (drop (call $property (i32.const 64) (i32.const 19) (i32.const 0) (i32.const 4)))
        (drop (call $replace (i32.const 0) (i32.const 96) (i32.const 18) (i32.const 128) (i32.const 34)))
        (drop (call $increment (i32.load (i32.const 32)) (i64.const 1)))
        i32.const 0)
    (func (export "proxy_on_delete") (param i32)))"#;

/// Has the same callbacks and leaves each at once.
const NOTHING: &str = r#"(module
    (memory (export "memory") 1)
    (func (export "proxy_abi_version_0_2_1"))
    (func (export "proxy_on_memory_allocate") (param i32) (result i32) i32.const 4096))"#;

fn headers(host: &str) -> [(&str, &[u8]); 7] {
    [
        (":authority", host.as_bytes()),
        (":path", b"/orders/42"),
        (":method", b"GET"),
        (":scheme", b"http"),
        ("user-agent", b"bench/1"),
        ("accept", b"*/*"),
        ("x-request-id", b"c4f388e6-564c-4387-b2d1-48b35b1dc001"),
    ]
}

/// CPU of one request after another, in nanoseconds each.
fn time(filter: &mut Filter, hosts: &[String], destination: SocketAddr) -> f64 {
    let properties = Rc::new(Connection { destination: destination.to_string(), ..Connection::default() });
    let rounds = 400_000 / hosts.len();
    let start = ProcessTime::now();
    for _ in 0..rounds {
        for host in hosts {
            let answer = filter.request(http_state(&headers(host)), properties.clone());
            assert!(black_box(answer).is_ok());
        }
    }
    start.elapsed().as_nanos() as f64 / (rounds * hosts.len()) as f64
}

fn measure(
    filter: &mut Filter,
    hosts: &[String],
    destination: SocketAddr,
    wanted: fn(&str, &HttpDecision) -> bool,
) -> f64 {
    for host in hosts {
        let decision = filter.decide_http(&headers(host), destination).expect("no trap");
        assert!(wanted(host, &decision), "{host}: {decision:?}");
    }
    time(filter, hosts, destination)
}

/// CPU of a request with a module in place of the filter.
fn bare(module: &str, hosts: &[String], destination: SocketAddr) -> f64 {
    let wasm = wat::parse_str(module).expect("a module");
    time(&mut Filter::of(Engine::compile(&wasm).expect("a module"), limits(), ""), hosts, destination)
}

fn limits() -> Limits {
    Limits { deadline: Duration::from_secs(10), ..Limits::default() }
}

fn main() {
    let destination: SocketAddr = "198.18.5.5:80".parse().expect("an address");
    let any: Vec<String> = (0..2000).map(|i| format!("host-{i}.example.com")).collect();
    let nothing = bare(NOTHING, &any, destination);
    let calls = bare(CALLS, &any, destination) - nothing;
    let mut open = Filter::of(engine().clone(), limits(), r#"{"no_snapshot":"open"}"#);
    let passed =
        |_: &str, d: &HttpDecision| matches!(d, HttpDecision::Route { cluster, .. } if cluster == "PassthroughCluster");
    let unasked = measure(&mut open, &any, destination, passed);
    println!("harness {nothing:.0} ns, calls {calls:.0} ns, without a lookup {:.0} ns", unasked - nothing);
    println!(
        "{:>9} {:>8} {:>10} {:>8} {:>14} {:>16}",
        "hosts", "own ns", "lookup ns", "miss ns", "load, blocked", "change, blocked"
    );
    for n in [1usize, 100, 10_000, 1_000_000] {
        let mut writer = Writer::new();
        writer.put(&Row::Globals(Globals::default())).expect("the row fits");
        writer.put(&Row::Port { port: 80, http: true, tcp: None, prefixes: vec![] }).expect("the row fits");
        (0..n).for_each(|i| writer.put(&row(i)).expect("the row fits"));
        writer.commit();
        let mut filter = Filter::start(limits());
        filter.wait_for_stream().expect("no trap");
        let mut load = Duration::ZERO;
        let pages: Vec<u32> = writer.pages().map(|(id, _)| id).collect();
        for part in parts(1, &writer, &pages, &[]) {
            let start = ProcessTime::now();
            filter.receive(&part).expect("no trap");
            load = load.max(start.elapsed());
        }
        let hosts: Vec<String> = (0..2000).map(|i| format!("host-{}.example.com", i * 7919 % n)).collect();
        let nobody: Vec<String> = (0..2000).map(|i| format!("nobody-{i}.example.org")).collect();
        let hit = measure(
            &mut filter,
            &hosts,
            destination,
            |host, d| matches!(d, HttpDecision::Route { cluster, .. } if *cluster == format!("outbound|80||{host}")),
        );
        let miss = measure(&mut filter, &nobody, destination, |_, d| !matches!(d, HttpDecision::Route { .. }));
        let mut change = Duration::ZERO;
        for version in 2..52 {
            writer.put(&row(n + version as usize)).expect("the row fits");
            let commit = writer.commit();
            for part in parts(version, &writer, &commit.changed, &commit.removed) {
                let start = ProcessTime::now();
                filter.receive(&part).expect("no trap");
                change = change.max(start.elapsed());
            }
        }
        let (own, refused) = (hit - nothing, miss - nothing);
        let lookup = hit - unasked;
        println!("{n:>9} {own:>8.0} {lookup:>10.0} {refused:>8.0} {load:>14.1?} {change:>16.1?}");
    }
}
