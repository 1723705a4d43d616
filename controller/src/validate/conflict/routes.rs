//! VirtualServices that route the same host, and routes that lead nowhere.

use std::collections::{BTreeSet, HashMap};

use super::audience::{self, Claims};
use super::hosts::{broad, is_broad};
use super::{Placed, finding, place};
use crate::api::virtual_service::{Destination, VirtualService};
use crate::model::{Checked, Object, Protocol, ServicePort};
use crate::validate::finding::Finding;
use crate::validate::predicates;

/// What destinations can be: the hosts of ServiceEntries and Services, and the subsets of DestinationRules.
struct Known<'o> {
    exact: HashMap<String, Vec<&'o [ServicePort]>>,
    wildcards: Vec<(&'o str, &'o [ServicePort])>,
    subsets: HashMap<String, BTreeSet<&'o str>>,
    gateways: BTreeSet<(&'o str, &'o str)>,
    delegates: BTreeSet<(&'o str, &'o str)>,
    /// Whether there are Kubernetes Services: where there are none, the cluster's names cannot be judged.
    cluster: bool,
}

/// Between the VirtualServices among all objects.
pub(super) fn between(objects: &[Placed], findings: &mut Vec<Finding>) {
    let mut routes: Vec<(&Placed, &Checked<VirtualService>)> = objects
        .iter()
        .filter_map(|placed| match &placed.object {
            Object::VirtualService(object) => Some((placed, object.as_ref())),
            _ => None,
        })
        .collect();
    if routes.is_empty() {
        return;
    }
    routes.sort_by(|(_, a), (_, b)| {
        (a.meta.created, &a.meta.name, &a.meta.namespace).cmp(&(b.meta.created, &b.meta.name, &b.meta.namespace))
    });
    let known = Known::of(objects);
    let mut hosts: HashMap<String, Claims<'_, usize>> = HashMap::new();
    for (number, (placed, route)) in routes.iter().enumerate() {
        let audience = audience::of(route.meta.namespace.as_str(), &route.spec.export_to);
        for (index, host) in route.spec.hosts.iter().enumerate().filter(|_| in_mesh(&route.spec)) {
            let field = format!("spec.hosts[{index}]");
            if is_broad(host) {
                findings.push(finding(placed, &field, "broad-wildcard", broad(host)));
            }
            let name = expand(host, route.meta.namespace.as_str()).to_ascii_lowercase();
            let claims = hosts.entry(name).or_default();
            if let Some(other) = claims.seen_with(&audience).min() {
                let message = format!(
                    "host {host} is also routed by {}: a sidecar that sees both uses one and does not merge them",
                    place(routes[other].0)
                );
                findings.push(finding(placed, &field, "duplicate-host", message));
            } else {
                claims.add(number, &audience);
            }
        }
        known.judge(placed, route, findings);
    }
}

/// Whether sidecars have these routes.
fn in_mesh(spec: &VirtualService) -> bool {
    spec.gateways.is_empty() || spec.gateways.iter().any(|gateway| gateway == "mesh")
}

/// A short name is one of the resource's namespace.
fn expand(host: &str, namespace: &str) -> String {
    if host.contains(['.', ':']) || host == "*" {
        return host.to_owned();
    }
    format!("{host}.{namespace}.svc.cluster.local")
}

impl<'o> Known<'o> {
    fn of(objects: &'o [Placed]) -> Known<'o> {
        let mut known = Known {
            exact: HashMap::new(),
            wildcards: Vec::new(),
            subsets: HashMap::new(),
            gateways: BTreeSet::new(),
            delegates: BTreeSet::new(),
            cluster: false,
        };
        for placed in objects {
            let meta = placed.object.meta();
            match &placed.object {
                Object::ServiceEntry(entry) => {
                    for host in &entry.hosts {
                        if host.starts_with('*') {
                            known.wildcards.push((host, &entry.ports));
                        } else {
                            known.exact.entry(host.to_ascii_lowercase()).or_default().push(&entry.ports);
                        }
                    }
                }
                Object::Service(service) => {
                    known.cluster = true;
                    let host = expand(meta.name.as_str(), meta.namespace.as_str());
                    known.exact.entry(host).or_default().push(&service.ports);
                }
                Object::DestinationRule(rule) => {
                    let names = known.subsets.entry(expand(&rule.spec.host, meta.namespace.as_str())).or_default();
                    names.extend(rule.spec.subsets.iter().map(|subset| subset.name.as_str()));
                }
                Object::Gateway(_) => {
                    known.gateways.insert((meta.namespace.as_str(), meta.name.as_str()));
                }
                Object::VirtualService(route) if route.spec.hosts.is_empty() => {
                    known.delegates.insert((meta.namespace.as_str(), meta.name.as_str()));
                }
                _ => {}
            }
        }
        known
    }

    /// The ports of a host; `None` if nothing declares it.
    fn ports(&self, host: &str) -> Option<Vec<&'o [ServicePort]>> {
        let exact = self.exact.get(&host.to_ascii_lowercase()).into_iter().flatten().copied();
        let wildcards =
            self.wildcards.iter().filter(|(known, _)| predicates::is_host_subset(host, known)).map(|(_, ports)| *ports);
        let found: Vec<_> = exact.chain(wildcards).collect();
        (!found.is_empty()).then_some(found)
    }

    fn judge(&self, placed: &Placed, route: &Checked<VirtualService>, findings: &mut Vec<Finding>) {
        let spec = &route.spec;
        let mut nowhere = |field: String, message: String| {
            findings.push(finding(placed, &field, "unreachable-route", message));
        };
        let namespace = route.meta.namespace.as_str();
        for (index, name) in spec.gateways.iter().enumerate().filter(|(_, name)| *name != "mesh") {
            let (there, short) = match name.split_once('/') {
                Some((".", short)) => (namespace, short),
                Some((there, short)) => (there, short),
                None => (namespace, name.split('.').next().unwrap_or(name)),
            };
            if !self.gateways.is_empty() && !self.gateways.contains(&(there, short)) && !name.contains('.') {
                nowhere(format!("spec.gateways[{index}]"), format!("there is no Gateway {there}/{short}"));
            }
        }
        for (index, http) in spec.http.iter().enumerate() {
            let path = format!("spec.http[{index}]");
            if let Some(delegate) = &http.delegate {
                let there = if delegate.namespace.is_empty() { namespace } else { &delegate.namespace };
                if !self.delegates.contains(&(there, &delegate.name)) {
                    let message = format!("there is no VirtualService {there}/{} without hosts", delegate.name);
                    nowhere(format!("{path}.delegate"), message);
                }
            }
            let mirrors = http.mirrors.iter().map(|mirror| &mirror.destination);
            for (index, to) in http.route.iter().map(|to| &to.destination).enumerate() {
                self.destination(to.as_ref(), namespace, format!("{path}.route[{index}].destination"), &mut nowhere);
            }
            self.destination(http.mirror.as_ref(), namespace, format!("{path}.mirror"), &mut nowhere);
            for (index, to) in mirrors.enumerate() {
                self.destination(to.as_ref(), namespace, format!("{path}.mirrors[{index}].destination"), &mut nowhere);
            }
        }
        let tls = spec.tls.iter().map(|route| &route.route);
        let tcp = spec.tcp.iter().map(|route| &route.route);
        for (kind, routes) in [("tls", tls.collect::<Vec<_>>()), ("tcp", tcp.collect())] {
            for (index, items) in routes.iter().enumerate() {
                for (to_index, to) in items.iter().enumerate() {
                    let field = format!("spec.{kind}[{index}].route[{to_index}].destination");
                    self.destination(to.destination.as_ref(), namespace, field, &mut nowhere);
                }
            }
        }
        if spec.gateways.is_empty() {
            self.protocols(spec, namespace, &mut nowhere);
        }
    }

    /// Routes of a protocol that no port of the hosts speaks; sidecars alone ask for one.
    fn protocols(&self, spec: &VirtualService, namespace: &str, nowhere: &mut impl FnMut(String, String)) {
        let ports = spec.hosts.iter().map(|host| self.ports(&expand(host, namespace)));
        let Some(ports) = ports.collect::<Option<Vec<_>>>() else { return };
        let speaks = |wanted: fn(Protocol) -> bool| {
            ports.iter().flatten().copied().flatten().any(|port: &ServicePort| wanted(port.protocol))
        };
        if !spec.tls.is_empty() && !spec.hosts.is_empty() && !speaks(|p| matches!(p, Protocol::Tls | Protocol::Https)) {
            nowhere("spec.tls".into(), "no port of the hosts is TLS or HTTPS".into());
        }
        let raw = |p| {
            use Protocol::{Auto, Mongo, Mysql, Redis, Tcp};
            matches!(p, Auto | Tcp | Mongo | Redis | Mysql)
        };
        if !spec.tcp.is_empty() && !spec.hosts.is_empty() && !speaks(raw) {
            nowhere("spec.tcp".into(), "no port of the hosts is TCP".into());
        }
    }

    fn destination(
        &self,
        to: Option<&Destination>,
        namespace: &str,
        field: String,
        nowhere: &mut impl FnMut(String, String),
    ) {
        let Some(Destination { host, subset, port }) = to else { return };
        let host = expand(host, namespace);
        if host.contains(".svc.") && !self.cluster {
            return;
        }
        let Some(ports) = self.ports(&host) else {
            return nowhere(format!("{field}.host"), format!("no resource declares the host {host}"));
        };
        let number = port.as_ref().map(|port| port.number);
        let has = |number: u32| ports.iter().copied().flatten().any(|port| u32::from(port.number) == number);
        if let Some(number) = number.filter(|&number| !has(number)) {
            nowhere(format!("{field}.port.number"), format!("the host {host} has no port {number}"));
        }
        let defined = |rule: &String| predicates::is_host_subset(&host, rule);
        let mut rules = self.subsets.iter().filter(|(rule, _)| defined(rule));
        if !subset.is_empty() && !rules.any(|(_, names)| names.contains(subset.as_str())) {
            nowhere(format!("{field}.subset"), format!("no DestinationRule defines the subset {subset} of {host}"));
        }
    }
}
