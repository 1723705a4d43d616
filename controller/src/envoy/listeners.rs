//! Listener plans as Envoy listeners, as istiod arranges them: one on the port that iptables redirects to, which hands
//! each connection to the listener of its address and port, if there is one, else to that of its port, and keeps the rest.
//!
//! A listener is made only where it reads other first bytes than the one that would take its connections otherwise. What
//! a connection means the filter decides, so there are no more of them than ports, and addresses where a server speaks
//! first on a port that is sniffed elsewhere. A gateway has none of these, but the ports of its servers.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use portolan_proto::envoy::envoy::config::core::v3::{Address, CidrRange, Pipe, TrafficDirection, address};
use portolan_proto::envoy::envoy::config::listener::v3::{
    AdditionalAddress, FilterChain, FilterChainMatch, Listener, ListenerFilter, listener_filter,
};
use portolan_proto::envoy::envoy::extensions::filters::listener::http_inspector::v3::HttpInspector;
use portolan_proto::envoy::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use portolan_proto::envoy::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
use portolan_proto::envoy::google::protobuf::Duration;
use portolan_proto::v1::{GatewayListener, Inspection, ListenerPlan};
use prost::{Message, Name};

use super::chains::Chains;
use super::settings::Settings;
use super::{any, number, socket_address, switch};
use crate::compile::needs::Needs;
use crate::model::Scope;

/// Makes the listeners of one Envoy.
pub struct Renderer {
    chains: Chains,
    settings: Settings,
    /// The wildcard addresses of the workload's IP versions.
    wildcards: Vec<IpAddr>,
}

impl Renderer {
    /// For an Envoy with these settings.
    pub fn new(settings: &Settings, scope: &Scope, node: &str) -> Self {
        let ips: Vec<IpAddr> = scope.ips.iter().filter_map(|ip| ip.parse().ok()).collect();
        let mut wildcards: Vec<IpAddr> = Vec::new();
        if ips.iter().any(IpAddr::is_ipv4) || ips.is_empty() {
            wildcards.push(Ipv4Addr::UNSPECIFIED.into());
        }
        if ips.iter().any(IpAddr::is_ipv6) {
            wildcards.push(Ipv6Addr::UNSPECIFIED.into());
        }
        Renderer { chains: Chains::new(settings, scope, node), settings: settings.clone(), wildcards }
    }

    /// Says where the Envoy has the mesh's certificates.
    pub fn with_mesh_certificates(mut self, folder: Option<&str>) -> Self {
        self.chains.mesh_certificates = folder.map(str::to_owned);
        self
    }

    /// From now on listeners are made to suit what routes need.
    pub fn suit(&mut self, needs: &Arc<Needs>) {
        self.chains.needs = Arc::clone(needs);
    }

    /// The listeners that no port's plan makes: the transparent one, which is the catch-all, and the HTTP proxies.
    pub fn general(&self, catch_all: &Inspection, proxy_http_port: Option<u16>) -> Vec<Listener> {
        let mut out = Vec::new();
        if let Some(port) = self.settings.transparent {
            let mut listener = self.listener("virtualOutbound", &self.wildcards, port, true, catch_all, None);
            let itself = FilterChainMatch { destination_port: number(port.into()), ..FilterChainMatch::default() };
            listener.filter_chains.push(FilterChain { filter_chain_match: Some(itself), ..self.chains.black_hole() });
            listener.use_original_dst = switch(true);
            listener
                .listener_filters
                .insert(0, inspector("envoy.filters.listener.original_dst", &OriginalDst::default()));
            out.push(listener);
        }
        let mut proxies = self.settings.http_proxy.clone();
        if let Some(port) = proxy_http_port.filter(|port| proxies.iter().all(|own| own.port() != *port)) {
            proxies.push(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        }
        for at in proxies {
            let name = format!("{}_{}", at.ip(), at.port());
            let chain = self.chains.http_proxy(&name);
            out.push(Listener { filter_chains: vec![chain], ..blank(&name, &[at.ip()], at.port(), true) });
        }
        out
    }

    /// The listeners of one port.
    pub fn port(&self, plan: &ListenerPlan, catch_all: &Inspection) -> Vec<Listener> {
        if plan.port == 0 {
            return plan.gateway.iter().filter_map(|listener| self.egress_socket(listener)).collect();
        }
        let Some(port) = u16::try_from(plan.port).ok().filter(|p| *p != 0 && Some(*p) != self.settings.transparent)
        else {
            return Vec::new();
        };
        let mut out: Vec<Listener> = plan.gateway.iter().map(|listener| self.socket(listener, port)).collect();
        let at = |ip: &IpAddr| format!("{ip}_{port}");
        if let (Some(ip), Some(inspection)) = (self.settings.bind_ports, &plan.wildcard) {
            out.push(self.listener(&at(&ip), &[ip], port, true, inspection, Some(plan)));
        }
        if self.settings.transparent.is_none() {
            return out;
        }
        let around = plan.wildcard.as_ref().unwrap_or(catch_all);
        if let (Some(inspection), Some(first)) = (&plan.wildcard, self.wildcards.first())
            && (inspection != catch_all || plan.dials_server_names)
        {
            let (name, all) = (at(first), self.wildcards.as_slice());
            out.push(self.listener(&name, all, port, false, inspection, Some(plan)));
        }
        for listener in &plan.addresses {
            let inspection = listener.inspection.unwrap_or_default();
            // To read a server name where none is asked for does no harm.
            let covered = inspection.http == around.http && (inspection.http || inspection.tls == around.tls);
            if let Some(ip) = listener.address.parse().ok().filter(|_| !covered) {
                out.push(self.listener(&at(&ip), &[ip], port, false, &inspection, None));
            }
        }
        out
    }

    /// A Unix socket or a forward proxy of a Sidecar's.
    fn egress_socket(&self, listener: &GatewayListener) -> Option<Listener> {
        let bind = listener.bind.as_str();
        let mut out = match bind.strip_prefix("unix://") {
            Some(path) => {
                let pipe = Pipe { path: path.to_owned(), ..Pipe::default() };
                let address = Some(Address { address: Some(address::Address::Pipe(pipe)) });
                Listener { address, ..blank(bind, &[], 0, true) }
            }
            None => {
                let at: SocketAddr = bind.parse().ok()?;
                blank(&format!("{}_{}", at.ip(), at.port()), &[at.ip()], at.port(), true)
            }
        };
        if listener.inspects {
            let tls = inspector("envoy.filters.listener.tls_inspector", &TlsInspector::default());
            out.listener_filters.push(tls);
        }
        let name = out.name.clone();
        out.filter_chains = listener.servers.iter().map(|server| self.chains.egress_socket(&name, server)).collect();
        Some(out)
    }

    /// A listener with a socket of its own: a chain for each server. What no chain takes is closed.
    fn socket(&self, listener: &GatewayListener, port: u16) -> Listener {
        let own = listener.bind.parse().ok();
        let ips = own.map_or_else(|| self.wildcards.clone(), |ip| vec![ip]);
        let name = format!("{}_{port}", ips.first().unwrap_or(&IpAddr::V4(Ipv4Addr::UNSPECIFIED)));
        let mut out = blank(&name, &ips, port, true);
        if listener.inspects {
            let tls = inspector("envoy.filters.listener.tls_inspector", &TlsInspector::default());
            out.listener_filters.push(tls);
        }
        if listener.sniffs_http {
            let http = inspector("envoy.filters.listener.http_inspector", &HttpInspector::default());
            out.listener_filters.push(http);
        }
        let chain = |server| self.chains.server(&name, server, listener.sniffs_http);
        out.filter_chains = listener.servers.iter().map(chain).collect();
        out
    }

    fn listener(
        &self,
        name: &str,
        ips: &[IpAddr],
        port: u16,
        bound: bool,
        inspection: &Inspection,
        plan: Option<&ListenerPlan>,
    ) -> Listener {
        let mut listener = blank(name, ips, port, bound);
        let dials = plan.is_some_and(|plan| plan.dials_server_names).then_some(port);
        if inspection.tls {
            let tls = inspector("envoy.filters.listener.tls_inspector", &TlsInspector::default());
            listener.listener_filters.push(tls);
        }
        if inspection.http {
            let http = inspector("envoy.filters.listener.http_inspector", &HttpInspector::default());
            listener.listener_filters.push(http);
            let prefix_ranges: Vec<CidrRange> =
                plan.into_iter().flat_map(|plan| &plan.tcp_prefixes).filter_map(|p| cidr(p)).collect();
            if !prefix_ranges.is_empty() {
                let addressed = FilterChainMatch { prefix_ranges, ..FilterChainMatch::default() };
                let tcp = self.chains.tcp(name, dials);
                let name = "tcp_prefixes".to_owned();
                listener.filter_chains.push(FilterChain { filter_chain_match: Some(addressed), name, ..tcp });
            }
            listener.filter_chains.push(self.chains.http(name));
        }
        listener.default_filter_chain = Some(self.chains.tcp(name, dials));
        listener
    }
}

fn blank(name: &str, ips: &[IpAddr], port: u16, bound: bool) -> Listener {
    let mut addresses = ips.iter().map(|ip| socket_address(*ip, port));
    Listener {
        name: name.to_owned(),
        address: addresses.next(),
        additional_addresses: addresses
            .map(|address| AdditionalAddress { address: Some(address), ..AdditionalAddress::default() })
            .collect(),
        bind_to_port: if bound { None } else { switch(false) },
        // A client that says nothing is waited for, as under Istio.
        listener_filters_timeout: Some(Duration::default()),
        traffic_direction: TrafficDirection::Outbound.into(),
        ..Listener::default()
    }
}

fn inspector<M: Message + Name>(name: &str, config: &M) -> ListenerFilter {
    ListenerFilter {
        name: name.to_owned(),
        config_type: Some(listener_filter::ConfigType::TypedConfig(any(config))),
        ..ListenerFilter::default()
    }
}

fn cidr(prefix: &str) -> Option<CidrRange> {
    let net: IpNet = prefix.parse().ok()?;
    Some(CidrRange { address_prefix: net.network().to_string(), prefix_len: number(net.prefix_len().into()) })
}

/// Which listeners follow from these plans; the whole at once, for a dump and for tests.
pub fn all<'p>(
    renderer: &Renderer,
    plans: impl IntoIterator<Item = &'p ListenerPlan>,
    proxy_http_port: Option<u16>,
) -> BTreeMap<String, Listener> {
    let plans: Vec<&ListenerPlan> = plans.into_iter().collect();
    let catch_all = plans.iter().find(|p| p.port == 0).and_then(|p| p.wildcard).unwrap_or_default();
    let general = renderer.general(&catch_all, proxy_http_port);
    let ports = plans.iter().flat_map(|plan| renderer.port(plan, &catch_all));
    general.into_iter().chain(ports).map(|listener| (listener.name.clone(), listener)).collect()
}
