//! Native lookups: hit, miss and wildcard at several sizes, and the bytes that a host costs; `written` is a hit of which the
//! cluster's name is written and the entry that won is read. Each answer is checked before it is timed. CPU time, not
//! wall time: the machines are shared.

use std::fmt::Debug;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use cpu_time::ProcessTime;
use portolan_registry::decision::{Decision, Rule, Verdict};
use portolan_registry::lookup::{Listener, Request};
use portolan_registry::row::{Choice, Globals, HostPort, Origin, OriginKind, Row};
use portolan_registry::snapshot::Snapshot;
use portolan_registry::write::Writer;

const ROUNDS: usize = 200;
const PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 18, 5, 5)), 80);

fn text<T: FromStr<Err: Debug>>(text: &str) -> T {
    text.parse().expect("a name")
}

fn row(pattern: &str, name: &str) -> Row {
    let port = |port: u16| {
        let choice = Choice {
            cluster: text(&format!("outbound|{port}||{pattern}")),
            routes: None,
            winner: Origin { namespace: text("default"), name: text(name), kind: OriginKind::ServiceEntry },
            losers: vec![],
        };
        let (http, sni) = if port == 80 { (Some(choice.clone()), None) } else { (None, Some(choice.clone())) };
        HostPort { port, server: 0, http, sni, proxy: Some(choice) }
    };
    Row::Host { pattern: pattern.parse().expect("a pattern"), ports: vec![port(80), port(443)] }
}

fn pattern(i: usize) -> String {
    if i % 10 == 9 { format!("*.w{i}.example.com") } else { format!("host-{i}.example.com") }
}

fn build(n: usize) -> (Snapshot, usize) {
    let mut writer = Writer::new();
    let mut names = 0;
    for i in 0..n {
        let pattern = pattern(i);
        names += pattern.len();
        writer.put(&row(&pattern, &format!("entry-{i}"))).expect("the row fits");
    }
    writer.put(&Row::Globals(Globals::default())).expect("the row fits");
    writer.put(&Row::Port { port: 80, http: true, tcp: None, prefixes: vec![] }).expect("the row fits");
    writer.commit();
    let mut snapshot = Snapshot::new();
    snapshot.reset();
    for (id, page) in writer.pages() {
        snapshot.stage(id, page.to_vec()).expect("a good page");
    }
    snapshot.commit(writer.digest()).expect("a whole snapshot");
    (snapshot, names)
}

fn ask<'s>(snapshot: &'s Snapshot, name: &str) -> Decision<'s> {
    snapshot.request(&Request { listener: Listener::Captured(PORT), authority: name.as_bytes(), connect: false })
}

/// A decision, and whatever is made of it.
fn measure<T>(snapshot: &Snapshot, names: &[String], rule: Rule, mut then: impl FnMut(Decision<'_>) -> T) -> f64 {
    for name in names {
        assert_eq!(ask(snapshot, name).reason.rule, rule, "{name}");
    }
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = ProcessTime::now();
            for _ in 0..20_000 / names.len() {
                for name in names {
                    black_box(then(ask(snapshot, black_box(name))));
                }
            }
            start.elapsed().as_nanos() as f64 / (20_000 / names.len() * names.len()) as f64
        })
        .collect();
    // Neighbours share the caches: the quarter of the rounds that they disturbed least.
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 4]
}

fn main() {
    println!(
        "{:>9} {:>8} {:>8} {:>8} {:>10} {:>12}",
        "hosts", "hit ns", "wild ns", "miss ns", "written ns", "bytes/host"
    );
    // Sizes may be given; cargo adds `--bench`.
    let mut sizes: Vec<usize> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    if sizes.is_empty() {
        sizes = vec![1, 100, 10_000, 1_000_000];
    }
    for n in sizes {
        let (snapshot, names) = build(n);
        // Spread over all of it, in an order that caches cannot foresee.
        let sample = |kind: usize| -> Vec<usize> {
            let mut x = 88_172_645_463_325_252u64;
            (0..20_000)
                .map(|_| {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    (x % n.max(10) as u64) as usize / 10 * 10 + kind
                })
                .filter(|i| *i < n)
                .collect()
        };
        let hits: Vec<String> = sample(0).into_iter().map(pattern).collect();
        let wild: Vec<String> = sample(9).into_iter().map(|i| format!("api.w{i}.example.com")).collect();
        let misses: Vec<String> = (0..20_000).map(|i| format!("nobody-{i}.example.org")).collect();
        let rule = |decision: Decision<'_>| decision.reason.rule;
        let hit = measure(&snapshot, &hits, Rule::HostExact, rule);
        let wildcard = if wild.is_empty() { f64::NAN } else { measure(&snapshot, &wild, Rule::HostWildcard, rule) };
        let miss = measure(&snapshot, &misses, Rule::Blocked, rule);
        let mut room = Vec::new();
        let written = measure(&snapshot, &hits, Rule::HostExact, |decision| match decision.verdict {
            Verdict::Route { cluster } => {
                (cluster.bytes(&mut room).len(), decision.reason.winner().map(|winner| winner.name.len()))
            }
            Verdict::Table { .. } | Verdict::Deny { .. } => (0, None),
        });
        let bytes = (snapshot.bytes() - names) as f64 / n as f64;
        println!("{n:>9} {hit:>8.0} {wildcard:>8.0} {miss:>8.0} {written:>10.0} {bytes:>12.1}");
    }
}
