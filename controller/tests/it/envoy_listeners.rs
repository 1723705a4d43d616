//! Which listeners an Envoy gets for which plans.

use std::collections::BTreeMap;
use std::sync::Arc;

use portolan_controller::compile::needs::Needs;
use portolan_controller::envoy::listeners::{Renderer, all};
use portolan_controller::envoy::settings::{NoSnapshot, Settings};
use portolan_controller::model::Scope;
use portolan_proto::envoy::envoy::config::listener::v3::{Filter, FilterChain, Listener, filter::ConfigType};
use portolan_proto::v1::{AddressListener, Inspection, ListenerPlan};
use portolan_registry::route::Manner;

const HTTP: Option<Inspection> = Some(Inspection { tls: false, http: true });
const TLS: Option<Inspection> = Some(Inspection { tls: true, http: false });
const BOTH: Option<Inspection> = Some(Inspection { tls: true, http: true });
const TCP: Option<Inspection> = Some(Inspection { tls: false, http: false });

fn settings() -> Settings {
    Settings {
        filter: "/etc/portolan/filter.wasm".into(),
        controller: "portolan".into(),
        transparent: Some(15001),
        http_proxy: Vec::new(),
        bind_ports: None,
        credentials: None,
        no_snapshot: NoSnapshot::Closed,
        access_log: None,
    }
}

fn render(settings: &Settings, ips: &[&str], plans: &[ListenerPlan], proxy: Option<u16>) -> BTreeMap<String, Listener> {
    let scope = Scope { ips: ips.iter().map(|ip| (*ip).to_owned()).collect(), ..Scope::default() };
    let mut plans = plans.to_vec();
    if plans.iter().all(|plan| plan.port != 0) {
        plans.push(plan(0, TCP));
    }
    all(&Renderer::new(settings, &scope, "test"), &plans, proxy)
}

fn plan(port: u32, wildcard: Option<Inspection>) -> ListenerPlan {
    ListenerPlan { port, wildcard, ..ListenerPlan::default() }
}

fn address(ip: &str, inspection: Option<Inspection>) -> AddressListener {
    AddressListener { address: ip.into(), inspection }
}

fn names(listeners: &BTreeMap<String, Listener>) -> Vec<&str> {
    listeners.keys().map(String::as_str).collect()
}

fn inspectors(listener: &Listener) -> Vec<&str> {
    listener.listener_filters.iter().map(|f| f.name.rsplit('.').next().unwrap()).collect()
}

fn chains(listener: &Listener) -> Vec<&str> {
    listener.filter_chains.iter().chain(&listener.default_filter_chain).map(|c| c.name.as_str()).collect()
}

fn filters(chain: &FilterChain) -> Vec<&str> {
    chain.filters.iter().map(|f| f.name.rsplit('.').next().unwrap()).collect()
}

#[test]
fn ports_are_listeners_where_they_are_read_otherwise_than_the_rest() {
    let plans = [plan(80, HTTP), plan(443, TLS), plan(8443, BOTH), plan(3306, TCP)];
    let listeners = render(&settings(), &["10.0.0.1"], &plans, None);
    assert_eq!(names(&listeners), ["0.0.0.0_443", "0.0.0.0_80", "0.0.0.0_8443", "virtualOutbound"]);
    assert_eq!(inspectors(&listeners["0.0.0.0_80"]), ["http_inspector"]);
    assert_eq!(inspectors(&listeners["0.0.0.0_443"]), ["tls_inspector"]);
    assert_eq!(inspectors(&listeners["0.0.0.0_8443"]), ["tls_inspector", "http_inspector"]);
    assert_eq!(inspectors(&listeners["virtualOutbound"]), ["original_dst"]);
    assert_eq!(chains(&listeners["0.0.0.0_80"]), ["http", "tcp"]);
    assert_eq!(chains(&listeners["0.0.0.0_443"]), ["tcp"]);
    assert_eq!(chains(&listeners["virtualOutbound"]), ["blackhole", "tcp"]);
    for (name, listener) in &listeners {
        let bound = listener.bind_to_port.is_none();
        assert_eq!(bound, name == "virtualOutbound", "{name}");
    }
}

#[test]
fn a_server_that_speaks_first_has_its_own_listener_where_the_port_is_sniffed() {
    let sniffed =
        ListenerPlan { addresses: vec![address("10.9.9.9", TCP), address("10.9.9.8", HTTP)], ..plan(80, BOTH) };
    let quiet = ListenerPlan { addresses: vec![address("10.9.9.9", TCP)], ..plan(3306, None) };
    let listeners = render(&settings(), &["10.0.0.1"], &[sniffed, quiet], None);
    assert_eq!(names(&listeners), ["0.0.0.0_80", "10.9.9.9_80", "virtualOutbound"]);
    assert_eq!(inspectors(&listeners["10.9.9.9_80"]), [""; 0]);
    assert_eq!(chains(&listeners["10.9.9.9_80"]), ["tcp"]);
}

#[test]
fn prefixes_share_one_chain() {
    let prefixes = ["10.2.0.0/16", "10.3.0.0/16", "fd00::/8"].map(str::to_owned).to_vec();
    let listeners =
        render(&settings(), &["10.0.0.1"], &[ListenerPlan { tcp_prefixes: prefixes, ..plan(80, HTTP) }], None);
    let listener = &listeners["0.0.0.0_80"];
    assert_eq!(chains(listener), ["tcp_prefixes", "http", "tcp"]);
    let ranges = &listener.filter_chains[0].filter_chain_match.as_ref().unwrap().prefix_ranges;
    assert_eq!(ranges.len(), 3);
    assert_eq!((ranges[2].address_prefix.as_str(), ranges[2].prefix_len.unwrap().value), ("fd00::", 8));
}

#[test]
fn a_catch_all_that_reads_http_makes_tcp_ports_listeners() {
    let listeners = render(&settings(), &["10.0.0.1"], &[plan(0, HTTP), plan(80, HTTP), plan(3306, TCP)], None);
    assert_eq!(names(&listeners), ["0.0.0.0_3306", "virtualOutbound"]);
}

#[test]
fn names_are_resolved_where_they_may_be_dialled() {
    let plans = [ListenerPlan { dials_server_names: true, ..plan(443, TLS) }, plan(8443, TLS)];
    let listeners = render(&settings(), &["10.0.0.1"], &plans, None);
    let of = |name: &str| filters(listeners[name].default_filter_chain.as_ref().unwrap());
    assert_eq!(of("0.0.0.0_443"), ["set_filter_state", "portolan", "sni_dynamic_forward_proxy", "tcp_proxy"]);
    assert_eq!(of("0.0.0.0_8443"), ["portolan", "tcp_proxy"]);
}

#[test]
fn ways_in_can_be_combined() {
    let settings = Settings {
        transparent: None,
        bind_ports: Some("127.0.0.1".parse().unwrap()),
        http_proxy: vec!["127.0.0.1:15080".parse().unwrap()],
        ..settings()
    };
    let sniffed = ListenerPlan { addresses: vec![address("10.9.9.9", TCP)], ..plan(80, HTTP) };
    let listeners = render(&settings, &["10.0.0.1"], &[sniffed, plan(3306, TCP)], Some(15090));
    assert_eq!(names(&listeners), ["127.0.0.1_15080", "127.0.0.1_15090", "127.0.0.1_3306", "127.0.0.1_80"]);
    assert!(listeners.values().all(|l| l.bind_to_port.is_none()));
    assert_eq!(chains(&listeners["127.0.0.1_15090"]), ["http_proxy"], "the filter knows the chain by its name");
    let same = render(&settings, &["10.0.0.1"], &[], Some(15080));
    assert_eq!(names(&same), ["127.0.0.1_15080"]);
}

#[test]
fn two_ip_versions_share_a_listener() {
    let of = |ips: &[&str]| {
        let listeners = render(&settings(), ips, &[plan(80, HTTP)], None);
        let additional = listeners["virtualOutbound"].additional_addresses.len();
        (listeners.keys().next().unwrap().clone(), additional)
    };
    assert_eq!(of(&["10.0.0.1", "fd00::1"]), ("0.0.0.0_80".to_owned(), 1));
    assert_eq!(of(&["fd00::1"]), ("::_80".to_owned(), 0));
}

#[test]
fn the_same_plan_gives_the_same_bytes() {
    use prost::Message;
    let bytes = || {
        let listeners = render(&settings(), &["10.0.0.1"], &[plan(80, BOTH)], Some(15080));
        listeners.values().map(Message::encode_to_vec).collect::<Vec<_>>()
    };
    assert_eq!(bytes(), bytes());
}

#[test]
fn what_no_route_needs_is_not_there() {
    let own = Manner { own: true, ..Manner::default() };
    let text_of = |needs: &Needs| {
        let mut renderer = Renderer::new(&settings(), &Scope::default(), "test");
        renderer.suit(&Arc::new(needs.clone()));
        let listeners = all(&renderer, &[plan(0, TCP), plan(80, HTTP)], None);
        listeners["0.0.0.0_80"].filter_chains[0].filters.iter().map(text).collect::<String>()
    };
    let routes = |text: &str| text.matches("x-envoy-fault-delay-request").count();
    let plain = text_of(&Needs::default());
    assert_eq!((routes(&plain), plain.contains("envoy.filters.http.fault")), (1, false));
    assert!(text_of(&Needs { delays: true, ..Needs::default() }).contains("envoy.filters.http.fault"));
    assert_eq!(routes(&text_of(&Needs { retries: [own].into(), ..Needs::default() })), 2);
    let mirrors = [vec!["outbound|80||a".to_owned(), "outbound|80||b".to_owned()], vec!["outbound|80||b".to_owned()]];
    let mirrored = text_of(&Needs { retries: [own].into(), mirrors: mirrors.into(), ..Needs::default() });
    assert_eq!(routes(&mirrored), 6);
    assert_eq!(mirrored.matches("outbound|80||a,outbound|80||b").count(), 2, "the header that chooses it, twice");
}

/// What a chain's typed configurations hold, as bytes: enough to find a string in.
fn text(filter: &Filter) -> String {
    let Some(ConfigType::TypedConfig(any)) = &filter.config_type else { return String::new() };
    String::from_utf8_lossy(&any.value).into_owned()
}

#[test]
fn every_chain_but_the_black_hole_asks_the_filter_first() {
    let settings = Settings { http_proxy: vec!["127.0.0.1:15080".parse().unwrap()], ..settings() };
    let prefixed = ListenerPlan { tcp_prefixes: vec!["10.2.0.0/16".into()], ..plan(80, BOTH) };
    for (name, listener) in render(&settings, &["10.0.0.1"], &[prefixed], None) {
        for chain in listener.filter_chains.iter().chain(&listener.default_filter_chain) {
            let all: String = chain.filters.iter().map(text).collect();
            let asked = all.contains("/etc/portolan/filter.wasm");
            assert_eq!(asked, chain.name != "blackhole", "{name} {}", chain.name);
        }
    }
}
