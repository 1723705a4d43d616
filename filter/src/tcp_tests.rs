use portolan_registry::object::ClusterName;
use portolan_registry::route::{Action as RouteAction, Route, Target, TargetExtras, TextMatch};
use portolan_registry::row::{CatchAll, Routes, Row};
use prost::Message as _;

use super::*;
use crate::envoy::SetFilterState;
use crate::host::fake::{Call, Fake};
use crate::testing::{CONFIGURATION, STATUSES, configured, deliver, ready, rows, whole, writer};

fn connect(vm: &mut Vm<Fake>, destination: &str, sni: &[u8]) -> (Action, Vec<Call>) {
    vm.host.set_property("destination\0address", destination.as_bytes());
    vm.host.set_property("connection\0requested_server_name", sni);
    vm.host.take_calls();
    let action = vm.on_new_connection();
    let calls = vm.host.take_calls();
    let told = |call: &Call| !matches!(call, Call::Log(..) | Call::DefineMetric(_));
    (action, calls.into_iter().filter(told).collect())
}

fn routed(cluster: &str) -> (Action, Vec<Call>) {
    let mut arguments = vec![0x0a, 23];
    arguments.extend(CLUSTER_STATE.as_bytes());
    arguments.extend([0x12, u8::try_from(cluster.len()).unwrap()]);
    arguments.extend(cluster.as_bytes());
    arguments.extend([0x18, 1]);
    (Action::Continue, vec![Call::Foreign("set_envoy_filter_state".into(), arguments)])
}

fn closed() -> (Action, Vec<Call>) {
    (Action::Pause, vec![Call::CloseDownstream])
}

#[test]
fn a_server_name_goes_to_its_cluster() {
    let mut vm = ready(CatchAll::Block);
    assert_eq!(connect(&mut vm, "192.0.2.1:443", b"a.com"), routed("outbound|443||a.com"));
    assert_eq!(vm.host.metrics().get("portolan.tcp.route.sni_exact"), Some(&1));
}

#[test]
fn an_address_goes_to_its_cluster_whatever_the_server_name() {
    let mut vm = ready(CatchAll::Block);
    for sni in [b"".as_slice(), b"x.com", b"\xff\xfe"] {
        assert_eq!(connect(&mut vm, "10.0.0.1:3306", sni), routed("outbound|3306||db"));
    }
}

#[test]
fn an_unknown_connection_is_closed_and_the_log_says_why() {
    let mut vm = ready(CatchAll::Block);
    vm.host.set_property("destination\0address", b"192.0.2.1:443");
    vm.host.set_property("connection\0requested_server_name", b"b.com");
    assert_eq!(vm.on_new_connection(), Action::Pause);
    let line = "portolan: connection closed: 192.0.2.1:443 (b.com) is refused (blocked)";
    assert_eq!(vm.host.logs(), [line]);
    assert!(vm.host.calls().contains(&Call::CloseDownstream));
    assert_eq!(vm.host.metrics().get("portolan.tcp.deny.blocked"), Some(&1));
}

#[test]
fn a_server_name_that_cannot_be_is_refused() {
    let mut vm = ready(CatchAll::PassThrough);
    assert_eq!(connect(&mut vm, "192.0.2.1:443", b"a/\xff"), closed());
    assert_eq!(vm.host.metrics().get("portolan.tcp.deny.bad_name"), Some(&1));
}

#[test]
fn before_the_first_snapshot_the_configuration_decides() {
    assert_eq!(connect(&mut configured(CONFIGURATION), "192.0.2.1:443", b""), closed());
    let mut open = configured(br#"{"namespace":"n","no_snapshot":"open"}"#);
    assert_eq!(connect(&mut open, "192.0.2.1:443", b""), routed(PASSTHROUGH_CLUSTER));
}

#[test]
fn whatever_call_fails_the_connection_is_closed_or_not_let_on() {
    for call in Fake::FALLIBLE {
        for status in STATUSES {
            let mut vm = ready(CatchAll::Block);
            vm.host.fail(call, status);
            let (action, calls) = connect(&mut vm, "192.0.2.1:443", b"a.com");
            let expected = if ["property", "foreign"].contains(&call) { Action::Pause } else { Action::Continue };
            assert_eq!(action, expected, "{call} {status}");
            assert_eq!(calls.contains(&Call::CloseDownstream), expected == Action::Pause, "{call} {status}");
        }
        let mut vm = ready(CatchAll::Block);
        vm.host.fail("close_downstream", 10);
        assert_eq!(connect(&mut vm, "192.0.2.1:443", b"b.com"), closed());
    }
}

#[test]
fn a_tunnel_is_asked_for_before_the_cluster_is_named() {
    let extras = TargetExtras { tunnel: "far.com:9".into(), ..TargetExtras::default() };
    let target = Target { cluster: "outbound|3128||proxy".into(), weight: 1, extras: Some(Box::new(extras)) };
    let route = Route {
        name: "tunnel".into(),
        index: 0,
        path: TextMatch::Present,
        ignore_case: false,
        conditions: Vec::new(),
        action: RouteAction { outcome: Routed::Forward(vec![target]), extras: None },
    };
    let mut all = rows(CatchAll::Block);
    if let Some(Row::Address { tcp: Some(choice), .. }) = all.last_mut() {
        (choice.cluster, choice.routes) = (ClusterName::default(), Some(Routes::Inline(vec![route])));
    }
    let mut vm = configured(CONFIGURATION);
    deliver(&mut vm, &whole(&writer(&all), 1));
    let (action, calls) = connect(&mut vm, "10.0.0.1:3306", b"");
    assert_eq!(action, Action::Continue);
    let [Call::Property(name, to), Call::Foreign(_, off), Call::Foreign(_, cluster)] = &calls[..] else {
        panic!("{calls:?}")
    };
    assert_eq!((name.as_str(), to.as_slice()), (TUNNEL, b"far.com:9".as_slice()));
    let off = SetFilterState::decode(off.as_slice()).unwrap();
    assert_eq!((off.path.as_str(), off.value.as_slice(), off.span), (NO_TUNNEL_STATE, b"false".as_slice(), 2));
    assert_eq!(SetFilterState::decode(cluster.as_slice()).unwrap().value, b"outbound|3128||proxy");
}

#[test]
fn a_unix_socket_is_known_by_its_chain() {
    let chain = b"egress_socket:unix:///run/t";
    let mut all = rows(CatchAll::Block);
    let taken = all.iter().find_map(|row| match row {
        Row::Address { tcp: Some(tcp), .. } => Some(tcp.clone()),
        _ => None,
    });
    let at = socket_address(chain);
    all.push(Row::Address { address: at.ip(), port: at.port(), http: None, tcp: taken, sni: Vec::new() });
    let mut vm = configured(CONFIGURATION);
    deliver(&mut vm, &whole(&writer(&all), 1));
    vm.host.set_property("xds\0filter_chain_name", chain);
    assert_eq!(connect(&mut vm, "/run/t", b""), routed("outbound|3306||db"));
    vm.host.set_property("xds\0filter_chain_name", b"egress_socket:unix:///run/other");
    assert_eq!(connect(&mut vm, "/run/other", b""), closed());
    vm.host.set_property("xds\0filter_chain_name", b"tcp");
    assert_eq!(connect(&mut vm, "/run/t", b""), closed());
}
