//! The index against a naive scan: every lookup of the fast matcher must be what reading all rows in turn would give.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::IpNet;
use portolan_registry::decision::{Rule, Verdict};
use portolan_registry::lookup::{Connection, DYNAMIC_CLUSTER, Listener, PASSTHROUGH_CLUSTER, Request};
use portolan_registry::name::HostPattern;
use portolan_registry::row::{CatchAll, Choice, Globals, HostPort, Origin, OriginKind, Row};
use portolan_registry::snapshot::Snapshot;
use portolan_registry::write::Writer;
use proptest::prelude::*;

fn choice(cluster: String, name: &str) -> Choice {
    let origin = |name: &str| Origin {
        namespace: "default".parse().expect("a name"),
        name: name.parse().expect("a name"),
        kind: OriginKind::ServiceEntry,
    };
    Choice {
        cluster: cluster.parse().expect("a name"),
        routes: None,
        winner: origin(name),
        losers: vec![origin("older")],
    }
}

fn host_row(pattern: &str, http: &[u16], sni: &[u16]) -> Row {
    let mut ports: BTreeMap<u16, HostPort> = BTreeMap::new();
    for (list, is_sni) in [(http, false), (sni, true)] {
        for port in list {
            let at = ports.entry(*port).or_insert_with(|| HostPort { port: *port, ..HostPort::default() });
            let made = Some(choice(format!("outbound|{port}||{pattern}"), pattern));
            if is_sni {
                at.sni = made
            } else {
                at.http = made
            }
            at.proxy = Some(choice(format!("forward|{port}||{pattern}"), pattern));
        }
    }
    Row::Host { pattern: pattern.parse().expect("a pattern"), ports: ports.into_values().collect() }
}

fn build(rows: &[Row]) -> (Writer, Snapshot) {
    let mut writer = Writer::new();
    for row in rows {
        writer.put(row).expect("the row fits");
    }
    writer.commit();
    let snapshot = open(&writer);
    (writer, snapshot)
}

fn open(writer: &Writer) -> Snapshot {
    let mut snapshot = Snapshot::new();
    snapshot.reset();
    for (id, page) in writer.pages() {
        snapshot.stage(id, page.to_vec()).expect("a good page");
    }
    snapshot.commit(writer.digest()).expect("a whole snapshot");
    snapshot
}

/// (cluster or status, rule) as a scan over all rows finds it.
#[derive(Debug, PartialEq)]
struct Answer(Result<String, u16>, Rule);

fn ask(snapshot: &Snapshot, name: &str, destination: SocketAddr, sni: bool) -> Answer {
    let decision = if sni {
        snapshot.connection(&Connection { destination, sni: Some(name.as_bytes()) })
    } else {
        let listener = Listener::Captured(destination);
        snapshot.request(&Request { listener, authority: name.as_bytes(), connect: false })
    };
    let verdict = match decision.verdict {
        Verdict::Route { cluster } => Ok(cluster.to_string()),
        Verdict::Table { table } => Ok(format!("{table:?}")),
        Verdict::Deny { status } => Err(status),
    };
    Answer(verdict, decision.reason.rule)
}

fn scan(rows: &[Row], name: &str, destination: SocketAddr, sni: bool) -> Answer {
    let port = destination.port();
    for row in rows {
        if let Row::Address { address, port: p, http, tcp, .. } = row
            && *p == port
            && *address == destination.ip()
        {
            let found = if sni { tcp } else { http };
            if let Some(c) = found.as_ref().or(tcp.as_ref()) {
                return Answer(Ok(c.cluster.to_string()), Rule::Address);
            }
        }
    }
    let match_all = rows.iter().find_map(|r| match r {
        Row::Port { port: p, tcp: Some(tcp), .. } if *p == port => Some(tcp.cluster.to_string()),
        _ => None,
    });
    let rest = || match &match_all {
        Some(cluster) if sni => Answer(Ok(cluster.clone()), Rule::Port),
        _ => catch_all(rows),
    };
    let known = rows.iter().any(|r| matches!(r, Row::Port { port: p, .. } if *p == port));
    if sni && !known {
        return catch_all(rows);
    }
    if sni {
        let best = rows
            .iter()
            .filter_map(|r| match r {
                Row::Prefix { port: p, net, tcp, sni } if *p == port && net.contains(&destination.ip()) => {
                    Some((net.prefix_len(), tcp, sni))
                }
                _ => None,
            })
            .max_by_key(|(len, ..)| *len);
        if let Some((_, tcp, names)) = best {
            let named = names.iter().filter(|(p, _)| p.matches(name)).max_by_key(|(p, _)| specificity(p));
            return match (named, tcp) {
                (Some((_, c)), _) => Answer(Ok(c.cluster.to_string()), Rule::PrefixSni),
                (None, Some(c)) => Answer(Ok(c.cluster.to_string()), Rule::Prefix),
                (None, None) => rest(),
            };
        }
    }
    let best = rows
        .iter()
        .filter_map(|r| match r {
            Row::Host { pattern, ports } if pattern.matches(name) => {
                let at = ports.iter().find(|p| p.port == port)?;
                let c = if sni { at.sni.as_ref() } else { at.http.as_ref() };
                Some((pattern, c?.cluster.to_string()))
            }
            _ => None,
        })
        .max_by_key(|(p, _)| specificity(p));
    match best {
        Some((HostPattern::Exact(_), c)) => Answer(Ok(c), if sni { Rule::SniExact } else { Rule::HostExact }),
        Some((_, c)) => Answer(Ok(c), if sni { Rule::SniWildcard } else { Rule::HostWildcard }),
        None => rest(),
    }
}

fn catch_all(rows: &[Row]) -> Answer {
    let mode = rows.iter().find_map(|r| match r {
        Row::Globals(g) => Some(g.catch_all),
        _ => None,
    });
    match mode.unwrap_or_default() {
        CatchAll::Block => Answer(Err(502), Rule::Blocked),
        _ => Answer(Ok(PASSTHROUGH_CLUSTER.into()), Rule::PassThrough),
    }
}

fn specificity(pattern: &HostPattern) -> usize {
    match pattern {
        HostPattern::Exact(_) => usize::MAX,
        HostPattern::Suffix(s) => s.len(),
    }
}

fn rows_of(n: usize) -> Vec<Row> {
    let mut rows = vec![Row::Globals(Globals { catch_all: CatchAll::Block, gateway: false, retry: None })];
    for i in 0..n {
        rows.push(match i % 4 {
            0 => host_row(&format!("*.w{i}.example.com"), &[80], &[443]),
            _ => host_row(&format!("h{i}.example.com"), &[80], &[443]),
        });
    }
    rows.push(Row::Port { port: 80, http: true, tcp: None, prefixes: vec![] });
    rows.push(Row::Port { port: 443, http: false, tcp: None, prefixes: vec![] });
    rows
}

const PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 18, 5, 5)), 443);

#[test]
fn the_index_agrees_with_a_scan_at_every_size() {
    for n in [1, 99, 101, 10_000] {
        let rows = rows_of(n);
        let (_, snapshot) = build(&rows);
        for i in (0..n + 3).step_by(1 + n / 40) {
            for name in [format!("h{i}.example.com"), format!("a.b.w{i}.example.com"), format!("w{i}.example.com")] {
                let destination = if i % 2 == 0 { PORT } else { SocketAddr::new(PORT.ip(), 80) };
                let sni = i % 2 == 0;
                assert_eq!(
                    ask(&snapshot, &name, destination, sni),
                    scan(&rows, &name, destination, sni),
                    "{name} {destination} of {n}"
                );
            }
        }
    }
}

#[test]
fn the_index_agrees_with_a_scan_at_a_million_hosts() {
    let rows = rows_of(1_000_000);
    let (_, snapshot) = build(&rows);
    for name in ["h999999.example.com", "x.w999996.example.com", "w4.example.com", "nothing.example.org"] {
        assert_eq!(ask(&snapshot, name, PORT, true), scan(&rows, name, PORT, true), "{name}");
    }
}

fn name() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "com", "x1"]), 1..4).prop_map(|l| l.join("."))
}

fn pattern() -> impl Strategy<Value = String> {
    (name(), 0..4).prop_map(|(n, kind)| match kind {
        0 => format!("*.{n}"),
        1 => format!("*{n}"),
        _ => n,
    })
}

fn net() -> impl Strategy<Value = IpNet> {
    (0u8..3, 0u8..3, prop::sample::select(vec![8u8, 16, 24, 32]))
        .prop_map(|(a, b, len)| IpNet::new(IpAddr::V4(Ipv4Addr::new(10, a, b, 1)), len).expect("a length").trunc())
}

fn row() -> impl Strategy<Value = Row> {
    let port = || prop::sample::select(vec![80u16, 443]);
    let made = |s: &'static str| (0..9).prop_map(move |i| choice(format!("{s}{i}"), "e"));
    prop_oneof![
        6 => (pattern(), prop::collection::btree_set(port(), 0..2), prop::collection::btree_set(port(), 0..2))
            .prop_map(|(p, h, s)| host_row(&p, &Vec::from_iter(h), &Vec::from_iter(s))),
        2 => (port(), net(), prop::option::of(made("p")), prop::collection::btree_map(pattern(), made("ps"), 0..3))
            .prop_map(|(port, net, tcp, sni)| Row::Prefix {
                port, net, tcp,
                sni: sni.into_iter().map(|(p, c)| (p.parse().expect("a pattern"), c)).collect(),
            }),
        1 => (net(), port(), made("v")).prop_map(|(n, port, c)| Row::Address {
            address: n.addr(), port, http: None, tcp: Some(c), sni: vec![],
        }),
    ]
}

fn table() -> impl Strategy<Value = Vec<Row>> {
    let port = |port| {
        prop::option::of((0..3).prop_map(move |i| choice(format!("all{i}"), "e"))).prop_map(move |tcp| (port, tcp))
    };
    (prop::collection::vec(row(), 0..40), port(80u16), port(443u16), any::<bool>()).prop_map(|(rows, a, b, open)| {
        let mut by_key = BTreeMap::new();
        rows.into_iter().for_each(|r| drop(by_key.insert(r.key(), r)));
        let mut rows: Vec<Row> = by_key.into_values().collect();
        for (port, tcp) in [a, b] {
            let prefixes = rows
                .iter()
                .filter_map(|r| match r {
                    Row::Prefix { port: p, net, .. } if *p == port => Some(*net),
                    _ => None,
                })
                .collect();
            rows.push(Row::Port { port, http: true, tcp, prefixes });
        }
        let catch_all = if open { CatchAll::PassThrough } else { CatchAll::Block };
        rows.push(Row::Globals(Globals { catch_all, gateway: false, retry: None }));
        rows
    })
}

proptest! {
    #[test]
    fn any_table_is_read_as_a_scan_reads_it(
        rows in table(), name in name(), a in 0u8..3, b in 0u8..3,
        port in prop::sample::select(vec![80u16, 443, 81]), sni in any::<bool>(),
    ) {
        let (_, snapshot) = build(&rows);
        let destination = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, a, b, 1)), port);
        prop_assert_eq!(ask(&snapshot, &name, destination, sni), scan(&rows, &name, destination, sni));
    }

    #[test]
    fn order_and_history_leave_no_trace(rows in prop::collection::vec(row(), 1..60), extra in prop::collection::vec(row(), 0..200)) {
        let mut by_key = BTreeMap::new();
        rows.iter().for_each(|r| drop(by_key.insert(r.key(), r.clone())));
        let mut straight = Writer::new();
        for row in by_key.values() {
            straight.put(row).expect("fits");
        }
        straight.commit();
        let mut winding = Writer::new();
        for row in extra.iter().chain(by_key.values().rev()) {
            winding.put(row).expect("fits");
            winding.commit();
        }
        for row in &extra {
            if !by_key.contains_key(&row.key()) {
                winding.remove(&row.key());
            }
        }
        winding.commit();
        prop_assert_eq!(straight.digest(), winding.digest());
        prop_assert!(straight.pages().eq(winding.pages()));
    }

    #[test]
    fn a_patched_snapshot_is_the_new_one(before in table(), after in table()) {
        let (mut writer, mut snapshot) = build(&before);
        for row in &before {
            writer.remove(&row.key());
        }
        for row in &after {
            writer.put(row).expect("fits");
        }
        let commit = writer.commit();
        commit.removed.iter().for_each(|id| snapshot.unstage(*id));
        for id in &commit.changed {
            snapshot.stage(*id, writer.page(*id).expect("it changed").to_vec()).expect("a good page");
        }
        prop_assert!(snapshot.commit(writer.digest()).is_ok());
        prop_assert_eq!(snapshot.held().len(), open(&writer).held().len());
        prop_assert_eq!(snapshot.digest(), writer.digest());
    }

    #[test]
    fn damaged_pages_are_refused_and_the_last_good_snapshot_stays(
        rows in table(), at in any::<prop::sample::Index>(), flip in 1u8..=255, which in any::<prop::sample::Index>(),
    ) {
        let (writer, mut snapshot) = build(&rows);
        let pages: Vec<_> = writer.pages().collect();
        let (id, page) = which.get(&pages);
        let mut bytes = page.to_vec();
        *at.get_mut(&mut bytes) ^= flip;
        prop_assert!(snapshot.stage(*id, bytes).is_err());
        prop_assert!(snapshot.commit(writer.digest()).is_err());
        prop_assert_eq!(snapshot.digest(), writer.digest());
        prop_assert_eq!(ask(&snapshot, "a.com", PORT, true), scan(&rows, "a.com", PORT, true));
    }

    #[test]
    fn no_bytes_make_it_panic(pages in prop::collection::vec((any::<u32>(), prop::collection::vec(any::<u8>(), 0..80)), 0..5), name: Vec<u8>) {
        let mut snapshot = Snapshot::new();
        for (id, bytes) in pages {
            let _refused = snapshot.stage(id, bytes);
        }
        prop_assert!(snapshot.commit(0).is_err());
        let decision = snapshot.request(&Request { listener: Listener::Proxy, authority: &name, connect: true });
        let denied = matches!(decision.verdict, Verdict::Deny { .. });
        prop_assert!(denied);
    }
}

#[test]
fn the_proxy_port_takes_the_port_from_the_authority() {
    let rows = [host_row("a.example.com", &[80, 8080], &[443]), Row::Globals(Globals::default())];
    let (_, snapshot) = build(&rows);
    let ask = |authority: &str, connect| match snapshot
        .request(&Request { listener: Listener::Proxy, authority: authority.as_bytes(), connect })
        .verdict
    {
        Verdict::Route { cluster } => cluster.to_string(),
        Verdict::Table { table } => format!("{table:?}"),
        Verdict::Deny { status } => status.to_string(),
    };
    assert_eq!(ask("a.example.com", false), "forward|80||a.example.com");
    assert_eq!(ask("A.example.com.:8080", false), "forward|8080||a.example.com");
    assert_eq!(ask("a.example.com:443", true), "forward|443||a.example.com");
    assert_eq!(ask("a.example.com:9", false), "502");
    assert_eq!(ask("a b", false), "400");
}

#[test]
fn an_open_mesh_dials_unknown_names_of_the_proxy_port() {
    let (_, snapshot) =
        build(&[Row::Globals(Globals { catch_all: CatchAll::PassThrough, gateway: false, retry: None })]);
    let decision = snapshot.request(&Request { listener: Listener::Proxy, authority: b"z.com", connect: false });
    assert!(matches!(decision.verdict, Verdict::Route { cluster } if cluster == *DYNAMIC_CLUSTER));
}

/// An update of so many pages has a table of its own, which small ones have not.
#[test]
fn half_of_all_rows_change_at_once_or_not_at_all() {
    let host = |i: usize| host_row(&format!("host-{i}.example.com"), &[], &[443]);
    let before: Vec<Row> = (0..8_000).map(host).chain(rows_of(0)).collect();
    let (mut writer, mut snapshot) = build(&before);
    before[..4_000].iter().for_each(|row| writer.remove(&row.key()));
    // Fewer and then more than there were, so that pages take the places of their children and of their parents.
    for count in [100, 12_000] {
        (8_000..8_000 + count).for_each(|i| writer.put(&host(i)).expect("fits"));
        let commit = writer.commit();
        assert!(commit.changed.len() > 200, "{} pages", commit.changed.len());
        let old = snapshot.digest();
        for wanted in [writer.digest() ^ 1, writer.digest()] {
            commit.removed.iter().for_each(|id| snapshot.unstage(*id));
            for id in &commit.changed {
                snapshot.stage(*id, writer.page(*id).expect("it changed").to_vec()).expect("a good page");
            }
            assert_eq!(snapshot.digest(), old);
            assert!(ask(&snapshot, "host-7999.example.com", PORT, true).0.is_ok());
            assert_eq!(snapshot.commit(wanted).is_ok(), wanted == writer.digest());
        }
        assert_eq!(snapshot.digest(), writer.digest());
        assert_eq!(sorted(snapshot.held()), sorted(open(&writer).held()));
        assert!(snapshot.is_retiring());
        while snapshot.retire_some(1) {}
        assert!(!snapshot.is_retiring());
        for host in ["host-0.example.com", "host-7999.example.com", "host-8099.example.com"] {
            let there = ask(&snapshot, host, PORT, true).0.is_ok();
            assert_eq!(there, host != "host-0.example.com", "{host} after {count}");
        }
    }
    // What was freed is used again.
    assert!(snapshot.bytes() < open(&writer).bytes() * 11 / 10);
}

fn sorted(held: Vec<u8>) -> Vec<[u8; 12]> {
    let mut pages = held.as_chunks::<12>().0.to_vec();
    pages.sort_unstable();
    pages
}
