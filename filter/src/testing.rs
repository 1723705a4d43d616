//! What the tests share: a small registry, and a VM that has received it.

use portolan_proto::v1::watch_request::Message as Outgoing;
use portolan_proto::v1::{Page, WatchRequest, WatchResponse};
use portolan_registry::row::{CatchAll, Choice, Globals, HostPort, Origin, OriginKind, Row};
use portolan_registry::write::Writer;
use prost::Message;

use crate::host::fake::{Call, Fake};
use crate::vm::Vm;

pub(crate) const CONFIGURATION: &[u8] = br#"{"namespace":"n"}"#;
pub(crate) const ROOT: u32 = 1;

pub(crate) fn choice(cluster: &str) -> Choice {
    let winner =
        Origin { namespace: "n".parse().unwrap(), name: "entry".parse().unwrap(), kind: OriginKind::ServiceEntry };
    Choice { cluster: cluster.parse().unwrap(), routes: None, winner, losers: Vec::new() }
}

/// HTTP on a.com:80, TLS on a.com:443, TCP on 10.0.0.1:3306, the proxy port for a.com:80; all else as `catch_all`.
pub(crate) fn rows(catch_all: CatchAll) -> Vec<Row> {
    let http = Some(choice("outbound|80||a.com"));
    let port80 = HostPort { port: 80, server: 0, http: http.clone(), sni: None, proxy: http };
    let port443 = HostPort { port: 443, server: 0, http: None, sni: Some(choice("outbound|443||a.com")), proxy: None };
    vec![
        Row::Globals(Globals { catch_all, gateway: false, retry: None }),
        Row::Host { pattern: "a.com".parse().unwrap(), ports: vec![port80, port443] },
        Row::Port { port: 443, http: false, tcp: None, prefixes: Vec::new() },
        Row::Address {
            address: "10.0.0.1".parse().unwrap(),
            port: 3306,
            http: None,
            tcp: Some(choice("outbound|3306||db")),
            sni: Vec::new(),
        },
    ]
}

/// A writer with these rows.
pub(crate) fn writer(rows: &[Row]) -> Writer {
    let mut writer = Writer::new();
    for row in rows {
        writer.put(row).unwrap();
    }
    writer.commit();
    writer
}

/// Everything the writer holds, one page in each part.
pub(crate) fn whole(writer: &Writer, version: u64) -> Vec<WatchResponse> {
    let part = |pages| WatchResponse { version, pages, ..Default::default() };
    let mut parts: Vec<_> = writer.pages().map(|(id, data)| part(vec![Page { id, data: data.to_vec() }])).collect();
    if let Some(part) = parts.last_mut() {
        part.last = true;
        part.digest = writer.digest();
    }
    parts
}

/// What the subscriber says in a message that it sent.
pub(crate) fn outgoing(message: &[u8]) -> Outgoing {
    WatchRequest::decode(message).unwrap().message.unwrap()
}

/// Messages among the calls.
pub(crate) fn sent(calls: &[Call]) -> Vec<Outgoing> {
    let message = |call: &Call| if let Call::Send(_, message) = call { Some(outgoing(message)) } else { None };
    calls.iter().filter_map(message).collect()
}

/// A VM that is configured and has received nothing.
pub(crate) fn configured(configuration: &[u8]) -> Vm<Fake> {
    let mut vm = Vm::new(Fake::default());
    *vm.host.configuration.borrow_mut() = configuration.to_vec();
    assert!(vm.on_configure(ROOT), "{:?}", vm.host.logs());
    vm
}

/// Delivers parts on the open stream.
pub(crate) fn deliver(vm: &mut Vm<Fake>, parts: &[WatchResponse]) {
    for part in parts {
        *vm.host.message.borrow_mut() = part.encode_to_vec();
        vm.on_stream_message(vm.host.token());
    }
}

/// A VM that has received [`rows`].
pub(crate) fn ready(catch_all: CatchAll) -> Vm<Fake> {
    let mut vm = configured(CONFIGURATION);
    deliver(&mut vm, &whole(&writer(&rows(catch_all)), 1));
    assert!(vm.subscription().and_then(|s| s.snapshot()).is_some(), "{:?}", vm.host.logs());
    vm.host.take_calls();
    vm
}

/// Statuses that a host may give: all that the ABI knows, and some that it does not.
pub(crate) const STATUSES: [u32; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 255, 65_536, u32::MAX];
