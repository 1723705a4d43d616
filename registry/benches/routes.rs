//! A route table of 1, 100 and 1,000 routes: exact paths and prefixes, the first and the last of them asked for, against a
//! host without routes. Each answer is checked before it is timed. CPU time of the process, in nanoseconds.

use std::borrow::Cow;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use cpu_time::ProcessTime;
use portolan_registry::decision::Verdict;
use portolan_registry::lookup::{Listener, Request};
use portolan_registry::route::{Action, Outcome, Route, Target, TextMatch, rows};
use portolan_registry::routing::{Asked, Patterns};
use portolan_registry::row::{Choice, Globals, HostPort, Origin, OriginKind, Routes, Row, TableName};
use portolan_registry::snapshot::Snapshot;
use portolan_registry::write::Writer;

const AT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 18, 5, 5)), 80);
const ASKED: usize = 2_000;

struct Path(String);

impl Asked for Path {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        (name == ":path").then_some(Cow::Borrowed(self.0.as_bytes()))
    }
}

fn snapshot(n: usize, exact: bool) -> Snapshot {
    let table: TableName = "default/v:80".parse().expect("a name");
    let routes: Vec<Route> = (0..n)
        .map(|i| {
            let path = format!("/api/service-{i}/v1");
            let path = if exact { TextMatch::Exact(path) } else { TextMatch::Prefix(path) };
            let targets = vec![Target { cluster: format!("outbound|80||s{i}.example.com"), weight: 1, extras: None }];
            let action = Action { outcome: Outcome::Forward(targets), extras: None };
            let (name, index) = (String::new(), u32::try_from(i).expect("a few"));
            Route { name, index, path, ignore_case: false, conditions: Vec::new(), action }
        })
        .collect();
    let winner = Origin {
        namespace: "default".parse().expect("a name"),
        name: "v".parse().expect("a name"),
        kind: OriginKind::VirtualService,
    };
    let routes_of = Some(Routes::Table(table.clone()));
    let choice = Choice { cluster: Default::default(), routes: routes_of, winner, losers: vec![] };
    let ports = vec![HostPort { port: 80, http: Some(choice), ..HostPort::default() }];
    let mut writer = Writer::new();
    writer.put(&Row::Host { pattern: "a.example.com".parse().expect("a pattern"), ports }).expect("fits");
    writer.put(&Row::Globals(Globals::default())).expect("fits");
    rows(&table, &routes).iter().for_each(|row| writer.put(row).expect("fits"));
    writer.commit();
    let mut snapshot = Snapshot::new();
    snapshot.reset();
    for (id, page) in writer.pages() {
        snapshot.stage(id, page.to_vec()).expect("a good page");
    }
    snapshot.commit(writer.digest()).expect("a whole snapshot");
    snapshot
}

fn ask(snapshot: &Snapshot, path: &Path, patterns: &Patterns) -> Option<u32> {
    let request = Request { listener: Listener::Captured(AT), authority: b"a.example.com", connect: false };
    let Verdict::Table { table } = snapshot.request(&request).verdict else { return None };
    snapshot.routed(table, path, patterns).map(|matched| matched.index)
}

fn measure(snapshot: &Snapshot, at: usize) -> f64 {
    let (path, patterns) = (Path(format!("/api/service-{at}/v1")), Patterns::default());
    assert_eq!(ask(snapshot, &path, &patterns), u32::try_from(at).ok());
    let mut rounds: Vec<f64> = (0..20)
        .map(|_| {
            let start = ProcessTime::now();
            for _ in 0..ASKED {
                black_box(ask(snapshot, black_box(&path), &patterns));
            }
            start.elapsed().as_nanos() as f64 / ASKED as f64
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[5]
}

fn main() {
    println!("{:>7} {:>7} {:>9} {:>9} {:>10}", "routes", "paths", "first ns", "last ns", "ns/route");
    for exact in [true, false] {
        for n in [1, 100, 1_000] {
            let snapshot = snapshot(n, exact);
            let (first, last) = (measure(&snapshot, 0), measure(&snapshot, n - 1));
            let kind = if exact { "exact" } else { "prefix" };
            println!("{n:>7} {kind:>7} {first:>9.0} {last:>9.0} {:>10.1}", (last - first) / (n.max(2) - 1) as f64);
        }
    }
}
