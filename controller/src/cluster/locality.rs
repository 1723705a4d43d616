//! Localities: shares, and who stands in for whom (SEMANTICS 5.7).

use std::collections::BTreeMap;

use portolan_proto::envoy::envoy::config::cluster::v3::Cluster;
use portolan_proto::envoy::envoy::config::cluster::v3::cluster::LbPolicy;
use portolan_proto::envoy::envoy::config::cluster::v3::cluster::common_lb_config::{
    LocalityConfigSpecifier, LocalityWeightedLbConfig, ZoneAwareLbConfig,
};
use portolan_proto::envoy::envoy::config::core::v3::{self as core, address, socket_address::PortSpecifier};
use portolan_proto::envoy::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use portolan_proto::envoy::envoy::config::endpoint::v3::{LbEndpoint, LocalityLbEndpoints};
use portolan_proto::envoy::envoy::r#type::v3::Percent;
use portolan_proto::envoy::google::protobuf::{UInt32Value, UInt64Value};

use super::endpoints::{Endpoint, with_topology};
use crate::api::destination_rule::{Distribute, Failover, LoadBalancer, LocalityLb, TrafficPolicy, ZoneAwareLb};
use crate::model::{Labels, Scope};

/// Begins a list of labels by which endpoints are ranked, and counts for all.
const NETWORK: &str = "topology.istio.io/network";

/// Puts what the policy says of localities into the cluster, as the subscriber sees them from where it is. `all` are
/// the endpoints with their labels.
pub(super) fn apply(cluster: &mut Cluster, policy: &TrafficPolicy, all: &[Endpoint], scope: &Scope) {
    if cluster.lb_policy == i32::from(LbPolicy::ClusterProvided) {
        return;
    }
    let here = Here::of(scope);
    let blank = LoadBalancer::default();
    let settings = policy.load_balancer.as_ref().unwrap_or(&blank);
    if let Some(zones) = &settings.zone_aware_lb_setting {
        return zone_aware(cluster, zones, all, &here);
    }
    // The mesh has locality failover on by default: outlier detection alone brings it about.
    let mesh = LocalityLb::default();
    let setting = settings.locality_lb_setting.as_ref().unwrap_or(&mesh);
    if setting.enabled == Some(false) {
        return;
    }
    let fails_over = policy.outlier_detection.is_some();
    let asked = !setting.failover.is_empty() || !setting.failover_priority.is_empty();
    if !setting.distribute.is_empty() || fails_over && asked {
        let weighted = LocalityConfigSpecifier::LocalityWeightedLbConfig(LocalityWeightedLbConfig::default());
        cluster.common_lb_config.get_or_insert_default().locality_config_specifier = Some(weighted);
    }
    let Some(assignment) = &mut cluster.load_assignment else { return };
    if !setting.distribute.is_empty() {
        distribute(&mut assignment.endpoints, &setting.distribute, &here);
    } else if fails_over {
        if !setting.failover_priority.is_empty() {
            by_labels(&mut assignment.endpoints, &setting.failover_priority, all, &here);
        }
        if setting.failover_priority.is_empty() || !setting.failover.is_empty() {
            rank(&mut assignment.endpoints, 5, |there| here.distance(there, &setting.failover));
        }
    }
}

/// Where the subscriber is.
struct Here {
    locality: [String; 3],
    labels: Labels,
}

impl Here {
    fn of(scope: &Scope) -> Here {
        let mut parts = scope.locality.split('/').map(str::to_owned);
        let locality = [(); 3].map(|()| parts.next().unwrap_or_default());
        Here { locality, labels: with_topology(&scope.labels, &scope.locality) }
    }

    /// 0 to 2 within the region; 3 beyond, and 4 where another region is to stand in.
    fn distance(&self, there: &[String; 3], failover: &[Failover]) -> u32 {
        let same = self.locality.iter().zip(there).take_while(|(a, b)| a == b).count();
        match same {
            3.. => 0,
            2 => 1,
            1 => 2,
            _ => match failover.iter().find(|rule| rule.from == self.locality[0]) {
                Some(rule) if rule.to != there[0] => 4,
                _ => 3,
            },
        }
    }
}

fn place(locality: Option<&core::Locality>) -> [String; 3] {
    locality.map_or_else(Default::default, |l| [l.region.clone(), l.zone.clone(), l.sub_zone.clone()])
}

/// Whether a locality is of those that a rule names: `region/zone/subzone`, `*` or nothing for any.
fn within(locality: &[String; 3], rule: &str) -> bool {
    let mut parts = rule.split('/');
    let region = parts.next().unwrap_or_default();
    (region == "*" || region == locality[0])
        && locality[1..].iter().zip(parts).all(|(part, rule)| matches!(rule, "" | "*") || rule == part)
}

fn distribute(groups: &mut [LocalityLbEndpoints], rules: &[Distribute], here: &Here) {
    let Some(rule) = rules.iter().find(|rule| within(&here.locality, &rule.from)) else { return };
    let mut given = vec![false; groups.len()];
    for (to, share) in &rule.to {
        let weight = |group: &LocalityLbEndpoints| group.load_balancing_weight.map_or(1, |weight| weight.value);
        let matching: Vec<usize> = groups
            .iter()
            .enumerate()
            .filter(|(index, group)| !given[*index] && within(&place(group.locality.as_ref()), to))
            .map(|(index, _)| index)
            .collect();
        let total: u64 = matching.iter().map(|&index| u64::from(weight(&groups[index]))).sum();
        for index in matching {
            given[index] = true;
            let part = u64::from(weight(&groups[index])) * u64::from(*share);
            let value = u32::try_from(part.div_ceil(total.max(1))).unwrap_or(u32::MAX);
            groups[index].load_balancing_weight = Some(UInt32Value { value });
        }
    }
    for (group, given) in groups.iter_mut().zip(given) {
        if !given {
            group.lb_endpoints.clear();
        }
    }
}

/// Ranks the groups by `distance`, which is below `spread`, within the ranks that they have.
fn rank(groups: &mut [LocalityLbEndpoints], spread: u32, distance: impl Fn(&[String; 3]) -> u32) {
    for group in groups.iter_mut() {
        group.priority = group.priority * spread + distance(&place(group.locality.as_ref()));
    }
    close_gaps(groups);
}

/// Envoy wants priorities from 0 on without a gap.
fn close_gaps(groups: &mut [LocalityLbEndpoints]) {
    let mut ranks: BTreeMap<u32, u32> = groups.iter().map(|group| (group.priority, 0)).collect();
    for (rank, place) in (0..).zip(ranks.values_mut()) {
        *place = rank;
    }
    for group in groups {
        group.priority = ranks.get(&group.priority).copied().unwrap_or_default();
    }
}

/// Splits each group by how many of the labels, from the first on, the endpoints share with the subscriber.
fn by_labels(groups: &mut Vec<LocalityLbEndpoints>, keys: &[String], all: &[Endpoint], here: &Here) {
    if here.labels.is_empty() {
        return;
    }
    let count = u32::try_from(keys.len()).unwrap_or(u32::MAX);
    let mut out = Vec::new();
    for group in groups.drain(..) {
        let mut ranked: BTreeMap<u32, Vec<LbEndpoint>> = BTreeMap::new();
        for endpoint in group.lb_endpoints {
            let labels = labels_of(&endpoint, all);
            let (mut rank, mut beyond) = (0, 0);
            for (index, key) in (0..).zip(keys) {
                let (key, wanted) = match key.split_once('=') {
                    Some((key, value)) => (key, Some(value)),
                    None => (key.as_str(), here.labels.get(key).map(String::as_str)),
                };
                if wanted.unwrap_or_default() == labels.and_then(|l| l.get(key)).map_or("", String::as_str) {
                    continue;
                }
                if index == 0 && key == NETWORK {
                    beyond = count;
                    continue;
                }
                rank = count - index;
                break;
            }
            ranked.entry(rank + beyond).or_default().push(endpoint);
        }
        for (priority, lb_endpoints) in ranked {
            let weights = lb_endpoints.iter().map(|e| e.load_balancing_weight.map_or(1, |weight| weight.value));
            let load_balancing_weight = Some(UInt32Value { value: weights.fold(0, u32::saturating_add) });
            let locality = group.locality.clone();
            out.push(LocalityLbEndpoints {
                locality,
                priority,
                load_balancing_weight,
                lb_endpoints,
                ..LocalityLbEndpoints::default()
            });
        }
    }
    close_gaps(&mut out);
    *groups = out;
}

fn labels_of<'e>(endpoint: &LbEndpoint, all: &'e [Endpoint]) -> Option<&'e Labels> {
    let Some(HostIdentifier::Endpoint(endpoint)) = &endpoint.host_identifier else { return None };
    let (host, port) = match endpoint.address.as_ref()?.address.as_ref()? {
        address::Address::SocketAddress(socket) => match socket.port_specifier {
            Some(PortSpecifier::PortValue(port)) => (&socket.address, port),
            _ => return None,
        },
        address::Address::Pipe(pipe) => (&pipe.path, 0),
        address::Address::EnvoyInternalAddress(_) => return None,
    };
    all.iter().find(|e| e.address == *host && u32::from(e.port) == port).map(|e| &e.labels)
}

/// Envoy's own way within a region; regions rank after each other.
fn zone_aware(cluster: &mut Cluster, setting: &ZoneAwareLb, all: &[Endpoint], here: &Here) {
    let off = setting.enabled == Some(false);
    let zones = ZoneAwareLbConfig {
        routing_enabled: off.then_some(Percent { value: 0.0 }),
        min_cluster_size: setting.min_cluster_size.map(|value| UInt64Value { value }),
        ..ZoneAwareLbConfig::default()
    };
    let specifier = LocalityConfigSpecifier::ZoneAwareLbConfig(zones);
    cluster.common_lb_config.get_or_insert_default().locality_config_specifier = Some(specifier);
    let Some(assignment) = cluster.load_assignment.as_mut().filter(|_| !off) else { return };
    if !setting.failover_priority.is_empty() {
        by_labels(&mut assignment.endpoints, &setting.failover_priority, all, here);
    }
    rank(&mut assignment.endpoints, 3, |there| {
        match setting.failover.iter().find(|rule| rule.from == here.locality[0]) {
            _ if there[0] == here.locality[0] => 0,
            Some(rule) if rule.to == there[0] => 1,
            _ => 2,
        }
    });
}
