//! Host headers of strangers, taken apart and looked up.
#![no_main]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use portolan_registry::authority::split;
use portolan_registry::decision::Verdict;
use portolan_registry::lookup::{Connection, Listener, Request};
use portolan_registry::row::{Choice, Globals, HostPort, Origin, OriginKind, Row};
use portolan_registry::snapshot::Snapshot;
use portolan_registry::write::Writer;

/// REGISTRY_ONLY with `a.example` and `*.w.example` on port 80.
fn snapshot() -> &'static Snapshot {
    static SNAPSHOT: OnceLock<Snapshot> = OnceLock::new();
    SNAPSHOT.get_or_init(|| {
        let mut writer = Writer::new();
        writer.put(&Row::Globals(Globals::default())).unwrap();
        writer.put(&Row::Port { port: 80, http: true, tcp: None, prefixes: vec![] }).unwrap();
        for host in ["a.example", "*.w.example"] {
            let winner = Origin { namespace: "default".parse().unwrap(), name: "a".parse().unwrap(), kind: OriginKind::ServiceEntry };
            let choice = Choice { cluster: format!("outbound|80||{host}").parse().unwrap(), routes: None, winner, losers: vec![] };
            let port = HostPort { port: 80, server: 0, http: Some(choice.clone()), sni: Some(choice.clone()), proxy: Some(choice) };
            writer.put(&Row::Host { pattern: host.parse().unwrap(), ports: vec![port] }).unwrap();
        }
        writer.commit();
        let mut snapshot = Snapshot::new();
        snapshot.reset();
        for (id, page) in writer.pages() {
            snapshot.stage(id, page.to_vec()).unwrap();
        }
        snapshot.commit(writer.digest()).unwrap();
        snapshot
    })
}

fuzz_target!(|data: &[u8]| {
    let (host, _) = split(data);
    assert!(data.starts_with(host));

    let destination = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 80));
    let name = host.strip_suffix(b".").unwrap_or(host).to_ascii_lowercase();
    let known = name == b"a.example" || (name.len() > 10 && name.ends_with(b".w.example"));
    for listener in [Listener::Captured(destination), Listener::Proxy] {
        for connect in [false, true] {
            let decision = snapshot().request(&Request { listener, authority: data, connect });
            let allowed = matches!(decision.verdict, Verdict::Route { .. });
            assert!(known || !allowed, "{:?} was allowed: {}", String::from_utf8_lossy(data), decision.reason);
        }
    }
    let _ = snapshot().connection(&Connection { destination, sni: Some(data) });
});
