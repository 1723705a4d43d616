//! By what subscribers can be told apart: two whose scopes differ in nothing that any object asks about share a snapshot,
//! such as the pods of two revisions of one workload.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portolan_registry::object::Namespace;

use crate::api::destination_rule::{DestinationRule, LoadBalancer};
use crate::api::virtual_service::VirtualService;
use crate::model::{Change, Kind, Labels, Object, Resolution, Role, Scope};

/// What objects ask about subscribers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Distinctions {
    /// Keys of labels.
    labels: BTreeSet<String>,
    /// Addresses of endpoints to which listeners are bound: those of a subscriber's own it does without.
    addresses: BTreeSet<IpAddr>,
}

impl Distinctions {
    /// Whether a change may bear on what is asked.
    pub fn concerned_by(change: &Change) -> bool {
        match change {
            Change::Apply(Object::ServiceEntry(entry)) => entry.workload_selector.is_some(),
            Change::Delete(key) => key.kind != Kind::ServiceEntry,
            Change::Apply(_) => true,
        }
    }

    /// What these objects ask.
    pub fn of<'o>(objects: impl Iterator<Item = &'o Object> + Clone) -> Distinctions {
        let mut out = Distinctions::default();
        let mut headless: HashSet<(&Namespace, &str)> = HashSet::new();
        let mut selecting: HashSet<&Namespace> = HashSet::new();
        for object in objects.clone() {
            match object {
                Object::Sidecar(o) => out.labels(o.spec.workload_selector.iter().map(|s| &s.labels)),
                Object::Gateway(o) => out.labels([&o.spec.selector].into_iter()),
                Object::VirtualService(o) => out.labels(sources(&o.spec).into_iter()),
                Object::DestinationRule(o) => {
                    out.labels(o.spec.workload_selector.iter().map(|s| &s.match_labels));
                    out.labels.extend(ranked(&o.spec));
                }
                Object::Service(o) if o.headless => {
                    headless.insert((&o.meta.namespace, &o.meta.name));
                    selecting.insert(&o.meta.namespace);
                }
                Object::ServiceEntry(o) if o.resolution == Resolution::None && o.workload_selector.is_some() => {
                    selecting.insert(&o.meta.namespace);
                }
                _ => {}
            }
        }
        for object in objects {
            let namespace = &object.meta().namespace;
            let found: Vec<&String> = match object {
                Object::EndpointSlice(o) if headless.contains(&(namespace, o.service.as_str())) => {
                    o.addresses.iter().collect()
                }
                Object::WorkloadEntry(o) if selecting.contains(namespace) => vec![&o.workload.address],
                Object::Pod(o) if selecting.contains(namespace) => o.ips.iter().collect(),
                _ => continue,
            };
            out.addresses.extend(found.into_iter().filter_map(|address| address.parse::<IpAddr>().ok()));
        }
        out
    }

    fn labels<'o>(&mut self, labels: impl Iterator<Item = &'o Labels>) {
        self.labels.extend(labels.flat_map(|labels| labels.keys().cloned()));
    }

    /// What of a scope bears on what is compiled. Of an address that nobody asks about its family is left.
    pub fn relevant(&self, scope: &Scope) -> Scope {
        let mut out = scope.clone();
        // A gateway's Services select it, by any label and by its addresses.
        if scope.role == Role::Sidecar {
            out.labels.retain(|key, _| self.labels.contains(key));
            for text in &mut out.ips {
                match text.parse::<IpAddr>() {
                    Ok(ip) if self.addresses.contains(&ip) => {}
                    Ok(IpAddr::V4(_)) => *text = Ipv4Addr::UNSPECIFIED.to_string(),
                    Ok(IpAddr::V6(_)) => *text = Ipv6Addr::UNSPECIFIED.to_string(),
                    Err(_) => {}
                }
            }
        }
        out.ips.sort();
        out.ips.dedup();
        out
    }
}

/// What routes ask about the client's labels.
fn sources(spec: &VirtualService) -> Vec<&Labels> {
    let http = spec.http.iter().flat_map(|route| &route.matches).map(|m| &m.source_labels);
    let tls = spec.tls.iter().flat_map(|route| &route.matches).map(|m| &m.source_labels);
    let tcp = spec.tcp.iter().flat_map(|route| &route.matches).map(|m| &m.source_labels);
    http.chain(tls).chain(tcp).collect()
}

/// The labels by which endpoints are ranked: those of the client's are compared with them.
fn ranked(spec: &DestinationRule) -> Vec<String> {
    let policies = spec.traffic_policy.iter().chain(spec.subsets.iter().filter_map(|s| s.traffic_policy.as_ref()));
    let balancers = policies.flat_map(|p| {
        [&p.load_balancer].into_iter().chain(p.port_level_settings.iter().map(|level| &level.load_balancer))
    });
    let labels = |balancer: &LoadBalancer| {
        let locality = balancer.locality_lb_setting.iter().flat_map(|l| l.failover_priority.clone());
        let zone = balancer.zone_aware_lb_setting.iter().flat_map(|l| l.failover_priority.clone());
        locality.chain(zone).collect::<Vec<String>>()
    };
    let entries = balancers.flatten().flat_map(labels);
    entries.map(|entry| entry.split('=').next().unwrap_or_default().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Labels;
    use crate::source::yaml::YamlSource;

    fn of(yaml: &str) -> Distinctions {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(&file, yaml).unwrap();
        let (_, loaded) = YamlSource::load(&[file], None).unwrap();
        let objects: Vec<Object> = loaded
            .changes
            .into_iter()
            .map(|change| match change {
                Change::Apply(object) => object,
                Change::Delete(key) => panic!("{key:?}"),
            })
            .collect();
        Distinctions::of(objects.iter())
    }

    fn scope(labels: &[(&str, &str)], ips: &[&str]) -> Scope {
        let labels: Labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Scope { labels, ips: ips.iter().map(|ip| (*ip).to_owned()).collect(), ..Scope::default() }
    }

    #[test]
    fn only_what_is_asked_about_counts() {
        let none = Distinctions::default();
        let pod = scope(&[("app", "a"), ("pod-template-hash", "1")], &["10.0.0.1", "10.0.0.2", "2001:db8::1"]);
        assert_eq!(none.relevant(&pod), scope(&[], &["0.0.0.0", "::"]));
        let gateway = Scope { role: Role::Gateway, ..pod.clone() };
        assert_eq!(none.relevant(&gateway), gateway);
        for (asks, key) in [
            ("kind: Sidecar\nspec: {workloadSelector: {labels: {app: x}}, egress: [{hosts: ['*/*']}]}", "app"),
            ("kind: DestinationRule\nspec: {host: a.com, workloadSelector: {matchLabels: {app: x}}}", "app"),
            (
                "kind: DestinationRule\nspec: {host: a.com, trafficPolicy: {outlierDetection: {}, loadBalancer: \
                 {localityLbSetting: {failoverPriority: [rack, 'zone=1']}}}}",
                "rack zone",
            ),
            (
                "kind: VirtualService\nspec: {hosts: [a.com], http: [{match: [{sourceLabels: {app: x}}], route: \
                 [{destination: {host: a.com}}]}]}",
                "app",
            ),
            (
                "kind: VirtualService\nspec: {hosts: [a.com], tcp: [{match: [{sourceLabels: {app: x}}], route: \
                 [{destination: {host: a.com}}]}]}",
                "app",
            ),
        ] {
            let found = of(&format!("apiVersion: networking.istio.io/v1\nmetadata: {{name: it}}\n{asks}"));
            let keys: Vec<&str> = found.labels.iter().map(String::as_str).collect();
            assert_eq!(keys.join(" "), key, "{asks}");
        }
    }

    #[test]
    fn own_addresses_count_where_listeners_would_be_bound_to_them() {
        let found = of("apiVersion: v1\nkind: Service\nmetadata: {name: h}\nspec: {clusterIP: None}\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: h-1, labels: \
             {kubernetes.io/service-name: h}}\nendpoints: [{addresses: [10.0.0.1]}]\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: i-1, labels: \
             {kubernetes.io/service-name: i}}\nendpoints: [{addresses: [10.0.0.2]}]\n");
        let of = |ip: &str| found.relevant(&scope(&[], &[ip])).ips;
        assert_eq!((of("10.0.0.1"), of("10.0.0.2")), (vec!["10.0.0.1".to_owned()], vec!["0.0.0.0".to_owned()]));
    }
}
