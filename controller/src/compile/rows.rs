//! Rows out of claims: who wins each key, and who loses (SEMANTICS 1.5, 3.5).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_proto::v1::Inspection;
use portolan_registry::name::HostPattern;
use portolan_registry::object::ClusterName;
use portolan_registry::row::{Choice, HostPort, MAX_LOSERS, Origin, Row};

use super::chains::{Bind, Chain, Group};
use super::ports::{At, Mode};
use super::service::{Order, http_class};
use super::virtual_services::{Routed, Spot};
use crate::model::Protocol;

/// A chain with its place in the order and the group that it is from.
type Ranked<'g> = (Order, &'g Chain, &'g Group);

/// The row of a host pattern, from the host name that is the pattern and from those that have it as a further domain.
pub(crate) fn host(
    pattern: &HostPattern,
    own: Option<&Group>,
    others: &[Arc<Group>],
    only: Option<&BTreeMap<Spot, Routed>>,
    mode: impl Fn(u16) -> Mode,
    alone: impl Fn(u32) -> Option<u16>,
) -> Option<Row> {
    let mut ports: BTreeMap<(u16, u32), HostPort> = BTreeMap::new();
    let blank = |(socket, port): Spot| HostPort { port, server: socket, ..HostPort::default() };
    let mut groups: Vec<(&Group, Option<Vec<Option<usize>>>)> = own.map(|g| (g, None)).into_iter().collect();
    let mut further: Vec<&Group> = others.iter().map(Arc::as_ref).collect();
    let first = |g: &Group| g.resolved.services.first().map(|s| s.order(0));
    further.sort_by_cached_key(|g| first(g));
    for group in further {
        let of = group.domains.iter().filter(|d| d.pattern == *pattern).map(|d| d.of).collect();
        groups.push((group, Some(of)));
    }
    // A name that a VirtualService brings is of nobody's but as a further domain: there the first VirtualService has it.
    for (spot, routed) in only.into_iter().flatten() {
        let (socket, number) = *spot;
        let slot = ports.entry((number, socket)).or_insert_with(|| blank(*spot));
        let before = |group: &&(&Group, Option<Vec<Option<usize>>>)| {
            let taken = group.1.iter().flatten().any(|of| match socket {
                0 => group.0.http_choice(number, *of).is_some(),
                _ => group.0.proxy_choice(*spot).is_some(),
            });
            taken && group.0.routed.get(spot).is_some_and(|other| other.order < routed.order)
        };
        let first = groups.iter().filter(before).filter_map(|g| g.0.routed.get(spot)).min_by_key(|r| r.order);
        slot.proxy = Some(first.unwrap_or(routed).choice());
        slot.http = slot.proxy.clone().filter(|_| socket == 0);
    }
    for (group, domains) in &groups {
        for owner in &group.resolved.ports {
            let number = owner.number;
            let slot = ports.entry((number, 0)).or_insert_with(|| blank((0, number)));
            let there = |spot: Spot| match domains {
                Some(of) if of.is_empty() => None,
                _ => group.proxy_choice(spot),
            };
            let http = match domains {
                None => group.http_choice(number, None),
                Some(of) => of.iter().find_map(|of| group.http_choice(number, *of)),
            };
            claim(&mut slot.http, http);
            claim(&mut slot.proxy, there((0, number)));
            for socket in owner.sockets.iter().filter(|socket| **socket != 0) {
                let spot = (*socket, number);
                claim(&mut ports.entry((number, *socket)).or_insert_with(|| blank(spot)).proxy, there(spot));
            }
        }
    }
    let sockets: BTreeSet<u32> = ports.keys().map(|(_, socket)| *socket).filter(|socket| *socket != 0).collect();
    for socket in sockets {
        // A name without a port means the listener's own where the host has it, as under Istio, else 80.
        let meant = alone(socket).into_iter().chain([80]).find_map(|port| ports.get(&(port, socket))?.proxy.clone());
        ports.extend(meant.map(|meant| ((0, socket), HostPort { proxy: Some(meant), ..blank((socket, 0)) })));
    }
    let all: Vec<&Group> = groups.iter().map(|(group, _)| *group).collect();
    for slot in ports.values_mut().filter(|slot| slot.server == 0) {
        slot.sni = server_name(&all, pattern, slot.port, mode(slot.port));
    }
    let ports: Vec<HostPort> =
        ports.into_values().filter(|p| p.http.is_some() || p.sni.is_some() || p.proxy.is_some()).collect();
    (!ports.is_empty()).then(|| Row::Host { pattern: pattern.clone(), ports })
}

/// The oldest chain that asks for this server name and for no destination.
fn server_name(groups: &[&Group], pattern: &HostPattern, port: u16, mode: Mode) -> Option<Choice> {
    first(&ranked(groups.iter().copied(), |c| {
        c.port == port && c.bind == Bind::Wildcard && c.sni.as_ref() == Some(pattern) && mode.takes(c.protocol)
    }))
}

/// The row of a listener of one address; none where nothing claims it.
pub(crate) fn address(address: IpAddr, port: u16, groups: &[Arc<Group>]) -> Option<(Row, At)> {
    let groups = || groups.iter().map(Arc::as_ref);
    let mut ranked = ranked(groups(), |c| c.listens() == port && c.bind == Bind::Address(address));
    let mode = Mode::of(ranked.first()?.1.protocol);
    ranked.retain(|(_, c, _)| mode.takes(c.protocol));
    // The destination is known: of the chains that ask for one, those of the longest prefix that holds it are left.
    ranked.retain(|(_, c, _)| c.within.is_none_or(|net| net.contains(&address)));
    let longest = |c: &Chain| c.within.map(|net| net.prefix_len());
    let deepest = ranked.iter().map(|(_, c, _)| longest(c)).max().flatten();
    ranked.retain(|(_, c, _)| longest(c) == deepest);
    // HTTP on an address has the virtual hosts of the port.
    let hosts = ranked.iter().any(|(_, c, _)| http_class(c.protocol));
    let bound = ranked.iter().any(|(_, c, _)| c.bound);
    let only_http = bound && ranked.iter().all(|(_, c, _)| http_class(c.protocol));
    let sniffed: Vec<Ranked<'_>> =
        ranked.iter().filter(|(_, c, _)| c.http && !http_class(c.protocol)).cloned().collect();
    let http = first(&sniffed).map(|mut choice| {
        let Some((_, chain, group)) = sniffed.first() else { return choice };
        // Requests are in no tunnel.
        (choice.cluster, choice.routes) = (group.cluster(chain.port), None);
        if !single_route(group, chain) {
            choice.cluster = ClusterName::default();
            return choice;
        }
        match group.routed.get(&(0, chain.port)) {
            Some(routed) => routed.choice(),
            None => group.kept_together(chain.port, choice),
        }
    });
    let (plain, sni) = by_server_name(&ranked);
    let plain: Vec<Ranked<'_>> = plain.into_iter().filter(|(_, c, _)| c.tcp).collect();
    let inspection = Inspection { http: http.is_some() || hosts, tls: !sni.is_empty() };
    Some((Row::Address { address, port, http, tcp: first(&plain), sni }, At { inspection, only_http, bound }))
}

/// Whether the sniffed listeners of a host name have the one virtual host that they are to have. Istio names their
/// routes by host and port alone: two addresses share a name, and the second to ask for it is left without any. The same
/// where the virtual host is gone because a later entry makes the port TCP.
fn single_route(group: &Group, chain: &Chain) -> bool {
    let same = |c: &&Chain| c.port == chain.port && c.protocol == Protocol::Auto && matches!(c.bind, Bind::Address(_));
    let from_entries = group.service(chain.service).is_some_and(|s| !s.member.source.is_kube());
    group.owner(chain.port).is_some_and(|o| o.http.is_some())
        && (!from_entries || group.chains.iter().filter(same).count() <= 1)
}

/// The row of a destination prefix; none where nothing claims it.
pub(crate) fn prefix(port: u16, net: IpNet, groups: &[Arc<Group>], mode: Mode) -> Option<Row> {
    let groups = groups.iter().map(Arc::as_ref);
    let ranked = ranked(groups, |c| c.port == port && c.bind == Bind::Net(net) && mode.takes(c.protocol));
    if ranked.is_empty() {
        return None;
    }
    let (plain, sni) = by_server_name(&ranked);
    Some(Row::Prefix { port, net, tcp: first(&plain), sni })
}

/// Chains without a server name, and who has each server name.
fn by_server_name<'g>(ranked: &[Ranked<'g>]) -> (Vec<Ranked<'g>>, Vec<(HostPattern, Choice)>) {
    let mut plain = Vec::new();
    let mut by_name: BTreeMap<&HostPattern, Vec<Ranked<'_>>> = BTreeMap::new();
    for entry in ranked {
        match &entry.1.sni {
            Some(sni) => by_name.entry(sni).or_default().push(entry.clone()),
            None => plain.push(entry.clone()),
        }
    }
    let sni = by_name.into_iter().filter_map(|(name, list)| Some((name.clone(), first(&list)?))).collect();
    (plain, sni)
}

fn ranked<'g>(groups: impl Iterator<Item = &'g Group>, wanted: impl Fn(&Chain) -> bool) -> Vec<Ranked<'g>> {
    let mut out: Vec<Ranked<'g>> = groups
        .flat_map(|g| g.chains.iter().filter(|c| wanted(c)).map(move |c| (c, g)).collect::<Vec<_>>())
        .filter_map(|(c, g)| Some((g.order(c)?, c, g)))
        .collect();
    out.sort_by(|a, b| a.0.cmp(&b.0));
    out
}

/// The first takes it; the others lose.
fn first(ranked: &[Ranked<'_>]) -> Option<Choice> {
    let ((order, chain, group), rest) = ranked.split_first()?;
    let origins = rest.iter().map(|(o, _, _)| o.member.source.origin());
    Some(match &chain.routed {
        Some(routed) => {
            let losers = decide(ClusterName::default(), routed.winner.clone(), origins).losers;
            Choice { losers, ..Choice::clone(routed) }
        }
        None => group.tunnelled(decide(group.cluster(chain.port), order.member.source.origin(), origins)),
    })
}

/// A choice with its losers, each named once.
pub(crate) fn decide(cluster: ClusterName, winner: Origin, rest: impl Iterator<Item = Origin>) -> Choice {
    let mut losers: Vec<Origin> = Vec::new();
    for origin in rest {
        if losers.len() == MAX_LOSERS {
            break;
        }
        if origin != winner && !losers.contains(&origin) {
            losers.push(origin);
        }
    }
    Choice { cluster, routes: None, winner, losers }
}

/// Fills a slot, or joins the losers of the one who has it.
fn claim(slot: &mut Option<Choice>, choice: Option<Choice>) {
    match (slot, choice) {
        (Some(held), Some(choice)) => {
            let fits = held.losers.len() < MAX_LOSERS && !held.losers.contains(&choice.winner);
            if fits && held.winner != choice.winner {
                held.losers.push(choice.winner);
            }
        }
        (slot @ None, choice) => *slot = choice,
        (Some(_), None) => {}
    }
}
