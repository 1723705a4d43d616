//! What a DNS proxy answers for a host of the registry, as Istio's name table has it (SEMANTICS 2.9).

use std::net::IpAddr;

use portolan_proto::v1::DnsName;

use super::service::{Addr, Context, Member, Resolved, alternate_hosts};
use crate::cluster::endpoints::{Workloads, host_endpoints};
use crate::model::Resolution;

/// The answer; `None`: the host has no address, and other name servers are asked.
pub(crate) fn answer(
    key: &str,
    resolved: &Resolved,
    members: &[Member],
    workloads: &Workloads,
    cx: &Context,
) -> Option<DnsName> {
    // A Service goes before the entries that decorate it.
    let kube = resolved.services.iter().any(|service| service.member.source.is_kube());
    let mut addresses: Vec<IpAddr> = Vec::new();
    for service in resolved.services.iter().filter(|service| service.member.source.is_kube() == kube) {
        for address in &service.addresses {
            let source = &service.member.source;
            match address {
                Addr::Ip(ip, _) => addresses.push(*ip),
                // Those of a headless service are its endpoints'.
                Addr::Any if source.resolution() == Resolution::None && service.ports().next().is_some() => {
                    let endpoints = host_endpoints(members, &source.meta().namespace, workloads);
                    addresses.extend(endpoints.iter().filter_map(|e| e.address.parse::<IpAddr>().ok()));
                }
                Addr::Any | Addr::Net(_) => {}
            }
        }
    }
    addresses.sort();
    addresses.dedup();
    if addresses.is_empty() {
        return None;
    }
    let mut names = vec![key.to_owned()];
    if kube {
        names.extend(alternate_hosts(key, cx));
    }
    Some(DnsName { names, addresses: addresses.iter().map(ToString::to_string).collect() })
}
