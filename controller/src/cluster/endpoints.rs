//! Endpoints of a host name: where they come from and on which port they listen (SEMANTICS 2.3 to 2.7).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use portolan_registry::object::{Namespace, ObjectName};

use crate::compile::service::{Member, Source};
use crate::model::{
    EndpointSlice, Kind, Labels, Object, Pod, Resolution, Service, ServiceEntry, ServicePort, Workload, WorkloadEntry,
};

/// Istio's annotation by which a workload's health counts.
const HEALTH_CHECKED: &str = "proxy.istio.io/health-checks-enabled";

/// One endpoint of one port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// IP address, name, or path of a Unix socket where `port` is 0.
    pub(crate) address: String,
    pub(crate) port: u16,
    /// The service port that it serves, by number and name.
    pub(crate) service_port: u16,
    pub(crate) port_name: String,
    pub(crate) weight: u32,
    pub(crate) locality: String,
    /// By which subsets are told apart.
    pub(crate) labels: Labels,
    /// Service account as `ns/NAMESPACE/sa/NAME`, empty if none.
    pub(crate) account: String,
}

#[derive(Debug, Clone)]
enum Selectable {
    Pod(Arc<Pod>),
    Entry(Arc<WorkloadEntry>),
}

/// What services select their endpoints from.
#[derive(Debug, Default)]
pub(crate) struct Workloads {
    /// By namespace; Pods come before WorkloadEntries.
    selectable: HashMap<Namespace, BTreeMap<(bool, ObjectName), Selectable>>,
    /// By namespace and service.
    slices: HashMap<(Namespace, String), BTreeMap<ObjectName, Arc<EndpointSlice>>>,
}

/// Who may be concerned when a workload comes or goes.
pub(crate) enum Concern<'o> {
    Labels { namespace: &'o str, labels: Labels, pod: bool },
    Service { namespace: &'o str, name: &'o str },
}

impl Concern<'_> {
    pub(crate) fn selected_by(&self, source: &Source) -> bool {
        let meta = source.meta();
        match (self, source) {
            (Concern::Labels { namespace, labels, .. }, Source::Entry(entry)) => {
                meta.namespace == *namespace && entry.workload_selector.as_ref().is_some_and(|s| selects(s, labels))
            }
            (Concern::Labels { namespace, labels, pod: false }, Source::Kube(service)) => {
                meta.namespace == *namespace && kube_selector(service).is_some_and(|s| selects(s, labels))
            }
            (Concern::Service { namespace, name }, Source::Kube(_)) => {
                meta.namespace == *namespace && meta.name == *name
            }
            _ => false,
        }
    }
}

fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

/// A Kubernetes Service without a selector selects nothing.
fn kube_selector(service: &Service) -> Option<&Labels> {
    service.selector.as_ref().filter(|s| !s.is_empty())
}

/// The labels of a WorkloadEntry: metadata's win over the spec's.
fn entry_labels(entry: &WorkloadEntry) -> Labels {
    let mut labels = entry.workload.labels.clone();
    labels.extend(entry.meta.labels.clone());
    labels
}

impl Workloads {
    /// Who may take the object for an endpoint; `None` for kinds that nobody does.
    pub(crate) fn labels(object: &Object) -> Option<Concern<'_>> {
        match object {
            Object::WorkloadEntry(o) => {
                Some(Concern::Labels { namespace: &o.meta.namespace, labels: entry_labels(o), pod: false })
            }
            Object::Pod(o) => {
                Some(Concern::Labels { namespace: &o.meta.namespace, labels: o.meta.labels.clone(), pod: true })
            }
            Object::EndpointSlice(o) => Some(Concern::Service { namespace: &o.meta.namespace, name: &o.service }),
            _ => None,
        }
    }

    pub(crate) fn insert(&mut self, object: &Object) {
        let (selectable, key) = match object {
            Object::WorkloadEntry(o) => (Selectable::Entry(o.clone()), (true, o.meta.name.clone())),
            Object::Pod(o) => (Selectable::Pod(o.clone()), (false, o.meta.name.clone())),
            Object::EndpointSlice(o) => {
                let of = (o.meta.namespace.clone(), o.service.clone());
                self.slices.entry(of).or_default().insert(o.meta.name.clone(), o.clone());
                return;
            }
            _ => return,
        };
        self.selectable.entry(object.meta().namespace.clone()).or_default().insert(key, selectable);
    }

    pub(crate) fn remove(&mut self, object: &Object) {
        let key = object.key();
        match (object, key.kind) {
            (Object::EndpointSlice(o), _) => {
                let of = (o.meta.namespace.clone(), o.service.clone());
                if let Some(slices) = self.slices.get_mut(&of) {
                    slices.remove(&key.name);
                }
            }
            (_, kind @ (Kind::WorkloadEntry | Kind::Pod)) => {
                if let Some(all) = self.selectable.get_mut(&key.namespace) {
                    all.remove(&(kind == Kind::WorkloadEntry, key.name));
                }
            }
            _ => {}
        }
    }

    /// The Pods of a namespace by address.
    fn pods(&self, namespace: &str) -> HashMap<&str, &Pod> {
        let all = self.selectable.get(namespace).into_iter().flat_map(BTreeMap::values);
        let pods = all.filter_map(|selectable| match selectable {
            Selectable::Pod(pod) => Some(pod.as_ref()),
            Selectable::Entry(_) => None,
        });
        pods.flat_map(|pod| pod.ips.iter().map(move |ip| (ip.as_str(), pod))).collect()
    }

    fn selected<'w>(&'w self, namespace: &str, selector: &'w Labels) -> impl Iterator<Item = &'w Selectable> {
        self.selectable.get(namespace).into_iter().flat_map(BTreeMap::values).filter(move |s| match s {
            Selectable::Pod(pod) => pod.ready && !pod.ips.is_empty() && selects(selector, &pod.meta.labels),
            Selectable::Entry(entry) => healthy(entry) && selects(selector, &entry_labels(entry)),
        })
    }
}

fn healthy(entry: &WorkloadEntry) -> bool {
    let checked = entry.meta.annotations.get(HEALTH_CHECKED).is_some_and(|v| v == "true");
    !checked || entry.healthy == Some(true)
}

/// All endpoints of a host name in one namespace, whoever may see their entries: the oldest entry's first.
pub(crate) fn host_endpoints(members: &[Member], namespace: &str, workloads: &Workloads) -> Vec<Endpoint> {
    let mut members: Vec<&Member> = members.iter().filter(|m| m.source.meta().namespace == namespace).collect();
    members.sort_by(|a, b| a.age(b));
    let mut out = Vec::new();
    for member in members {
        match &member.source {
            Source::Entry(entry) => entry_endpoints(entry, &member.host, workloads, &mut out),
            Source::Kube(service) => kube_endpoints(service, workloads, &mut out),
        }
    }
    out
}

fn entry_endpoints(entry: &ServiceEntry, host: &str, workloads: &Workloads, out: &mut Vec<Endpoint>) {
    let dns = matches!(entry.resolution, Resolution::Dns | Resolution::DnsRoundRobin);
    let namespace = entry.meta.namespace.as_str();
    if let Some(selector) = &entry.workload_selector {
        for selected in workloads.selected(&entry.meta.namespace, selector) {
            let owned;
            let workload = match selected {
                Selectable::Entry(entry) => &entry.workload,
                Selectable::Pod(pod) => {
                    owned = Workload {
                        address: pod.ips.first().cloned().unwrap_or_default(),
                        ports: pod.ports.clone(),
                        labels: pod.meta.labels.clone(),
                        service_account: pod.service_account.clone(),
                        ..Workload::default()
                    };
                    &owned
                }
            };
            // Names and Unix sockets are for DNS only, where workloads are selected.
            if dns || workload.address.parse::<std::net::IpAddr>().is_ok() {
                let labels = match selected {
                    Selectable::Entry(entry) => entry_labels(entry),
                    Selectable::Pod(pod) => pod.meta.labels.clone(),
                };
                out.extend(entry.ports.iter().filter_map(|p| endpoint(p, workload, &labels, namespace)));
            }
        }
    } else if !entry.endpoints.is_empty() {
        for workload in &entry.endpoints {
            out.extend(entry.ports.iter().filter_map(|p| endpoint(p, workload, &workload.labels, namespace)));
        }
    } else if dns {
        let own = Workload { address: host.to_owned(), ..Workload::default() };
        out.extend(entry.ports.iter().filter_map(|p| endpoint(p, &own, &Labels::new(), namespace)));
    }
}

/// Port precedence: Unix socket, the workload's port of that name, `targetPort`, the port itself. An endpoint of which
/// only the network is known is out of reach.
fn endpoint(port: &ServicePort, workload: &Workload, labels: &Labels, namespace: &str) -> Option<Endpoint> {
    if workload.address.is_empty() {
        return None;
    }
    let named = workload.ports.get(&port.name).copied().filter(|p| *p > 0);
    let number = named.or(port.target_port.filter(|p| *p > 0)).unwrap_or(port.number);
    let (address, number) = match workload.address.strip_prefix("unix://") {
        Some(path) => (path, 0),
        None => (workload.address.as_str(), number),
    };
    let locality = locality(workload, labels);
    Some(Endpoint {
        address: address.to_owned(),
        port: number,
        service_port: port.number,
        port_name: port.name.clone(),
        weight: workload.weight.max(1),
        labels: with_topology(labels, &locality),
        locality,
        account: match workload.service_account.as_str() {
            "" => String::new(),
            account => format!("ns/{namespace}/sa/{account}"),
        },
    })
}

/// The labels of an endpoint and those of where it is.
pub(super) fn with_topology(labels: &Labels, locality: &str) -> Labels {
    const TOPOLOGY: [&str; 3] =
        ["topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"];
    let mut out = labels.clone();
    for (key, part) in TOPOLOGY.iter().zip(locality.split('/')).filter(|(_, part)| !part.is_empty()) {
        out.insert((*key).to_owned(), part.to_owned());
    }
    out
}

fn locality(workload: &Workload, labels: &Labels) -> String {
    if !workload.locality.is_empty() {
        return workload.locality.clone();
    }
    let label = ["topology.istio.io/locality", "istio-locality"].iter().find_map(|l| labels.get(*l));
    label.map_or_else(String::new, |l| if l.contains('/') { l.clone() } else { l.replace('.', "/") })
}

fn kube_endpoints(service: &Service, workloads: &Workloads, out: &mut Vec<Endpoint>) {
    let meta = &service.meta;
    let slices = workloads.slices.get(&(meta.namespace.clone(), meta.name.to_string()));
    let pods = slices.map_or_else(HashMap::new, |_| workloads.pods(&meta.namespace));
    for slice in slices.into_iter().flat_map(BTreeMap::values) {
        for port in &service.ports {
            let Some(number) = slice.ports.get(&port.name) else { continue };
            out.extend(slice.addresses.iter().map(|address| Endpoint {
                address: address.clone(),
                port: *number,
                service_port: port.number,
                port_name: port.name.clone(),
                weight: 1,
                locality: String::new(),
                labels: pods.get(address.as_str()).map_or_else(Labels::new, |pod| pod.meta.labels.clone()),
                account: match pods.get(address.as_str()) {
                    Some(pod) if !pod.service_account.is_empty() => {
                        format!("ns/{}/sa/{}", meta.namespace, pod.service_account)
                    }
                    _ => String::new(),
                },
            }));
        }
    }
    let Some(selector) = kube_selector(service) else { return };
    for selected in workloads.selected(&meta.namespace, selector) {
        // Pods come by their slices.
        let Selectable::Entry(entry) = selected else { continue };
        if entry.workload.address.parse::<std::net::IpAddr>().is_err() {
            continue;
        }
        for port in &service.ports {
            let target = service.target_port_names.get(&port.name);
            let named = target.and_then(|name| entry.workload.ports.get(name)).copied();
            let port = ServicePort { target_port: named.or(port.target_port), ..port.clone() };
            out.extend(endpoint(&port, &entry.workload, &entry_labels(entry), &meta.namespace));
        }
    }
}
