//! TLS and TCP routes of VirtualServices, as filter chains of a service (SEMANTICS 4.11, 4.12).

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_registry::name::HostPattern;
use portolan_registry::object::ClusterName;
use portolan_registry::route::{Action, Outcome, Route, Target, TargetExtras, TextMatch};
use portolan_registry::row::{Choice, Routes};

use super::chains::{Bind, Chain};
use super::http_routes::{MESH, Others, Place};
use super::service::Context;
use super::virtual_services::Virtual;
use crate::api::virtual_service::RouteDestination;
use crate::cluster::parse;
use crate::model::Labels;
use crate::validate::predicates;

/// What the chains of a service port are made of.
pub(crate) struct L4<'l> {
    pub(crate) cx: &'l Context,
    /// Those that the port's listener sees, in order.
    pub(crate) seen: &'l [Arc<Virtual>],
    /// The service's host as written.
    pub(crate) host: &'l str,
    pub(crate) port: u16,
    pub(crate) others: &'l dyn Others,
}

/// Conditions that do not depend on the connection.
struct Client<'m> {
    gateways: &'m [String],
    labels: &'m Labels,
    port: u32,
    namespace: &'m str,
}

impl L4<'_> {
    fn about(&self) -> impl Iterator<Item = &Arc<Virtual>> {
        self.seen.iter().filter(|one| one.hosts.iter().any(|host| predicates::hosts_match(self.host, host)))
    }

    fn applies(&self, client: &Client<'_>) -> bool {
        (client.gateways.is_empty() || client.gateways.iter().any(|gateway| gateway == MESH))
            && client.labels.iter().all(|(k, v)| self.cx.scope.labels.get(k) == Some(v))
            && (client.port == 0 || client.port == u32::from(self.port))
            && (client.namespace.is_empty() || client.namespace == self.cx.scope.namespace)
    }

    /// A route's destinations, as a table of one route.
    fn choice(&self, one: &Virtual, kind: &str, index: u32, to: &[RouteDestination]) -> Option<Choice> {
        let (cx, port, namespace) = (self.cx, self.port, &one.object.meta.namespace);
        let place = Place { cx, namespace, port, others: self.others, gateway: None, tls: false };
        choice(&place, one, kind, index, to)
    }

    /// The chains of a TLS port in place of the service's own; none: those stand.
    pub(crate) fn tls(&self, base: &Chain) -> Vec<Chain> {
        let mut out = Vec::new();
        let mut seen: Vec<(&[String], Vec<IpNet>)> = Vec::new();
        // What one match says of destinations holds for those behind it that say nothing.
        let mut nets: Vec<IpNet> = Vec::new();
        for one in self.about() {
            for (index, route) in (0..).zip(&one.object.spec.tls) {
                let Some(choice) = self.choice(one, "tls", index, &route.route) else { continue };
                for m in &route.matches {
                    let (gateways, labels) = (m.gateways.as_slice(), &m.source_labels);
                    let client = Client { gateways, labels, port: m.port, namespace: &m.source_namespace };
                    if !self.applies(&client) {
                        continue;
                    }
                    if !m.destination_subnets.is_empty() {
                        nets = subnets(&m.destination_subnets);
                    }
                    let key = (m.sni_hosts.as_slice(), nets.clone());
                    if seen.contains(&key) {
                        continue;
                    }
                    seen.push(key);
                    let any = m.sni_hosts.iter().any(|host| host == "*");
                    let names: Vec<Option<HostPattern>> = match any {
                        true => vec![None],
                        false => m.sni_hosts.iter().filter_map(|host| host.parse().ok()).map(Some).collect(),
                    };
                    for sni in names {
                        let chain = Chain { sni, routed: Some(Arc::new(choice.clone())), ..base.clone() };
                        out.extend(bound(&chain, &nets));
                    }
                }
            }
        }
        out
    }

    /// The chains of a TCP port in front of the service's own, and whether that stands.
    pub(crate) fn tcp(&self, base: &Chain) -> (Vec<Chain>, bool) {
        let mut out = Vec::new();
        let mut own = true;
        for one in self.about() {
            for (index, route) in (0..).zip(&one.object.spec.tcp) {
                let Some(choice) = self.choice(one, "tcp", index, &route.route) else { continue };
                let chain = Chain { routed: Some(Arc::new(choice)), ..base.clone() };
                if route.matches.is_empty() {
                    out.push(chain);
                    return (out, false);
                }
                let mut nets: Vec<IpNet> = Vec::new();
                for m in &route.matches {
                    let (gateways, labels) = (m.gateways.as_slice(), &m.source_labels);
                    let client = Client { gateways, labels, port: m.port, namespace: &m.source_namespace };
                    if !self.applies(&client) {
                        continue;
                    }
                    if m.destination_subnets.is_empty() {
                        out.push(chain);
                        return (out, false);
                    }
                    nets.extend(subnets(&m.destination_subnets));
                }
                if !nets.is_empty() {
                    own &= !matches!(&base.bind, Bind::Net(net) if nets == [*net]);
                    out.extend(bound(&chain, &nets));
                }
            }
        }
        (out, own)
    }
}

/// A route's destinations, as a table of one route.
pub(crate) fn choice(
    place: &Place<'_>,
    one: &Virtual,
    kind: &str,
    index: u32,
    to: &[RouteDestination],
) -> Option<Choice> {
    let single = to.len() == 1;
    let target = |to: &RouteDestination| {
        let weight = if single { 1 } else { u32::try_from(to.weight).ok().filter(|weight| *weight > 0)? };
        let cluster = place.cluster(to.destination.as_ref()?);
        let tunnel = parse(&cluster).and_then(|to| place.others.tunnel(to.host, if single { to.subset } else { "" }));
        Some(Target { cluster, weight, extras: tunnel.map(tunnelled) })
    };
    let targets: Vec<Target> = to.iter().filter_map(target).collect();
    if targets.is_empty() {
        return None;
    }
    let route = Route {
        name: kind.to_owned(),
        index,
        path: TextMatch::Present,
        ignore_case: false,
        conditions: Vec::new(),
        action: Action { outcome: Outcome::Forward(targets), extras: None },
    };
    let routes = Some(Routes::Inline(vec![route]));
    Some(Choice { cluster: ClusterName::default(), routes, winner: one.origin(), losers: Vec::new() })
}

pub(crate) fn tunnelled(tunnel: String) -> Box<TargetExtras> {
    Box::new(TargetExtras { tunnel, ..TargetExtras::default() })
}

fn subnets(list: &[String]) -> Vec<IpNet> {
    let net = |text: &String| text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    list.iter().filter_map(net).map(|net: IpNet| net.trunc()).collect()
}

/// A chain for these destinations; without any, for those of the service.
fn bound(chain: &Chain, nets: &[IpNet]) -> Vec<Chain> {
    if nets.is_empty() {
        return vec![chain.clone()];
    }
    let within = |net: &IpNet| match chain.bind {
        Bind::Address(_) => Chain { within: Some(*net), ..chain.clone() },
        Bind::Wildcard | Bind::Net(_) => Chain { bind: Bind::Net(*net), ..chain.clone() },
    };
    nets.iter().map(within).collect()
}
