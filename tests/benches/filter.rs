//! The filter under wasmtime: CPU of a whole request at several sizes of the registry, and how long an update holds a
//! worker up. Each answer is checked before it is timed. What the harness itself costs (it makes each request's headers
//! and copies the answer) is included.

use std::hint::black_box;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use cpu_time::ProcessTime;
use portolan_proxy_host::vm::Limits;
use portolan_registry::row::{Choice, Globals, HostPort, Origin, OriginKind, Row};
use portolan_registry::write::Writer;
use portolan_tests::wasm::{Filter, HttpDecision, parts};

fn row(i: usize) -> Row {
    let pattern = format!("host-{i}.example.com");
    let choice = Choice {
        cluster: format!("outbound|80||{pattern}"),
        winner: Origin { namespace: "default".into(), name: format!("entry-{i}"), kind: OriginKind::ServiceEntry },
        losers: vec![],
    };
    let port = HostPort { port: 80, http: Some(choice.clone()), sni: None, proxy: Some(choice) };
    Row::Host { pattern: pattern.parse().expect("a pattern"), ports: vec![port] }
}

fn measure(
    filter: &mut Filter,
    hosts: &[String],
    destination: SocketAddr,
    wanted: fn(&str, &HttpDecision) -> bool,
) -> f64 {
    let ask = |filter: &mut Filter, host: &str| {
        let headers: [(&str, &[u8]); 7] = [
            (":authority", host.as_bytes()),
            (":path", b"/orders/42"),
            (":method", b"GET"),
            (":scheme", b"http"),
            ("user-agent", b"bench/1"),
            ("accept", b"*/*"),
            ("x-request-id", b"c4f388e6-564c-4387-b2d1-48b35b1dc001"),
        ];
        filter.decide_http(&headers, destination).expect("no trap")
    };
    for host in hosts {
        let decision = ask(filter, host);
        assert!(wanted(host, &decision), "{host}: {decision:?}");
    }
    let rounds = 200_000 / hosts.len();
    let start = ProcessTime::now();
    for _ in 0..rounds {
        for host in hosts {
            black_box(ask(filter, host));
        }
    }
    start.elapsed().as_nanos() as f64 / (rounds * hosts.len()) as f64
}

fn main() {
    let destination: SocketAddr = "198.18.5.5:80".parse().expect("an address");
    println!("{:>9} {:>8} {:>8} {:>14} {:>16}", "hosts", "hit ns", "miss ns", "load, blocked", "change, blocked");
    for n in [1usize, 100, 10_000, 1_000_000] {
        let mut writer = Writer::new();
        writer.put(&Row::Globals(Globals::default())).expect("the row fits");
        writer.put(&Row::Port { port: 80, http: true, tcp: None, prefixes: vec![] }).expect("the row fits");
        (0..n).for_each(|i| writer.put(&row(i)).expect("the row fits"));
        writer.commit();
        let mut filter = Filter::start(Limits { deadline: Duration::from_secs(10), ..Limits::default() });
        filter.wait_for_stream().expect("no trap");
        let mut load = Duration::ZERO;
        let pages: Vec<u32> = writer.pages().map(|(id, _)| id).collect();
        for part in parts(1, &writer, &pages, &[]) {
            let start = Instant::now();
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
                let start = Instant::now();
                filter.receive(&part).expect("no trap");
                change = change.max(start.elapsed());
            }
        }
        println!("{n:>9} {hit:>8.0} {miss:>8.0} {load:>14.1?} {change:>16.1?}");
    }
}
