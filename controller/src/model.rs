//! Resources that passed validation, in the shape that compilation reads. They cannot be wrong any more: what istiod's
//! webhook refuses never becomes one of these.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use portolan_registry::object::{Namespace, ObjectName};

use crate::api::destination_rule::DestinationRule;
use crate::api::gateway::Gateway;
use crate::api::sidecar::Sidecar;
use crate::api::virtual_service::{Retry, VirtualService};

/// Labels of an object or a selector, sorted.
pub type Labels = BTreeMap<String, String>;

/// Object metadata that bears on traffic.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Namespace; `default` where a file names none.
    pub namespace: Namespace,
    /// Object name.
    pub name: ObjectName,
    /// Creation time in seconds since 1970; 0 where none is given, so that such objects are all of the same age.
    pub created: i64,
    /// `metadata.labels`
    pub labels: Labels,
    /// `metadata.annotations`
    pub annotations: Labels,
}

/// The kinds that Portolan reads. Each object is known by its kind, namespace and name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `networking.istio.io` ServiceEntry
    ServiceEntry,
    /// `networking.istio.io` WorkloadEntry
    WorkloadEntry,
    /// `networking.istio.io` VirtualService
    VirtualService,
    /// `networking.istio.io` DestinationRule
    DestinationRule,
    /// `networking.istio.io` Gateway
    Gateway,
    /// `networking.istio.io` Sidecar
    Sidecar,
    /// Kubernetes core `Service`
    Service,
    /// Kubernetes `discovery.k8s.io` EndpointSlice
    EndpointSlice,
    /// Kubernetes core `Pod`
    Pod,
    /// Kubernetes core `Namespace`
    Namespace,
}

/// What an object is known by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Kind.
    pub kind: Kind,
    /// Namespace; of a Namespace its own name.
    pub namespace: Namespace,
    /// Name.
    pub name: ObjectName,
}

/// One checked object.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// A ServiceEntry.
    ServiceEntry(Arc<ServiceEntry>),
    /// A WorkloadEntry.
    WorkloadEntry(Arc<WorkloadEntry>),
    /// A VirtualService.
    VirtualService(Arc<Checked<VirtualService>>),
    /// A DestinationRule.
    DestinationRule(Arc<Checked<DestinationRule>>),
    /// A Gateway.
    Gateway(Arc<Checked<Gateway>>),
    /// A Sidecar.
    Sidecar(Arc<Checked<Sidecar>>),
    /// A Kubernetes Service.
    Service(Arc<Service>),
    /// A Kubernetes EndpointSlice.
    EndpointSlice(Arc<EndpointSlice>),
    /// A Kubernetes Pod.
    Pod(Arc<Pod>),
    /// A Kubernetes Namespace, of which only labels matter. It lies in itself.
    Namespace(Arc<Meta>),
}

impl Object {
    /// The object's metadata.
    pub fn meta(&self) -> &Meta {
        match self {
            Object::ServiceEntry(o) => &o.meta,
            Object::WorkloadEntry(o) => &o.meta,
            Object::VirtualService(o) => &o.meta,
            Object::DestinationRule(o) => &o.meta,
            Object::Gateway(o) => &o.meta,
            Object::Sidecar(o) => &o.meta,
            Object::Service(o) => &o.meta,
            Object::EndpointSlice(o) => &o.meta,
            Object::Pod(o) => &o.meta,
            Object::Namespace(meta) => meta,
        }
    }

    /// The object's kind.
    pub fn kind(&self) -> Kind {
        match self {
            Object::ServiceEntry(_) => Kind::ServiceEntry,
            Object::WorkloadEntry(_) => Kind::WorkloadEntry,
            Object::VirtualService(_) => Kind::VirtualService,
            Object::DestinationRule(_) => Kind::DestinationRule,
            Object::Gateway(_) => Kind::Gateway,
            Object::Sidecar(_) => Kind::Sidecar,
            Object::Service(_) => Kind::Service,
            Object::EndpointSlice(_) => Kind::EndpointSlice,
            Object::Pod(_) => Kind::Pod,
            Object::Namespace(_) => Kind::Namespace,
        }
    }

    /// What the object is known by.
    pub fn key(&self) -> ObjectKey {
        let meta = self.meta();
        ObjectKey { kind: self.kind(), namespace: meta.namespace.clone(), name: meta.name.clone() }
    }
}

/// One change to the set of objects.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// The object is new or replaces the one of its key.
    Apply(Object),
    /// The object is gone.
    Delete(ObjectKey),
}

impl Change {
    /// Whose it is.
    pub fn key(&self) -> ObjectKey {
        match self {
            Change::Apply(object) => object.key(),
            Change::Delete(key) => key.clone(),
        }
    }

    /// Of which kind that is.
    pub fn kind(&self) -> Kind {
        match self {
            Change::Apply(object) => object.kind(),
            Change::Delete(key) => key.kind,
        }
    }
}

/// Application protocol of a port (SEMANTICS: `pkg/config/protocol`), parsed without regard to case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// Sniffed: none given, or one that Istio does not know on a Kubernetes port.
    Auto,
    /// Plain HTTP/1.1.
    Http,
    /// `HTTP_PROXY`: like [`Protocol::Http`].
    HttpProxy,
    /// HTTP/2 in plain text.
    Http2,
    /// gRPC.
    Grpc,
    /// gRPC-Web.
    GrpcWeb,
    /// TLS that the client begins, routed by SNI; never HTTP.
    Https,
    /// As [`Protocol::Https`].
    Tls,
    /// Opaque bytes.
    Tcp,
    /// MongoDB: TCP.
    Mongo,
    /// Redis: TCP.
    Redis,
    /// MySQL: TCP, the server speaks first.
    Mysql,
    /// No listener, no cluster.
    Udp,
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// 1 to 65535
    pub number: u16,
    /// Port name.
    pub name: String,
    /// Application protocol.
    pub protocol: Protocol,
    /// `targetPort`, where given.
    pub target_port: Option<u16>,
}

/// `spec.location`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Location {
    /// Outside the mesh.
    #[default]
    MeshExternal,
    /// Inside the mesh.
    MeshInternal,
}

/// `spec.resolution`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Resolution {
    /// The address that the client dialled.
    #[default]
    None,
    /// The endpoints' IP addresses.
    Static,
    /// Asynchronous DNS, all addresses.
    Dns,
    /// Asynchronous DNS, one address at a time.
    DnsRoundRobin,
    /// The name that the client asked for, resolved when asked.
    DynamicDns,
}

/// The spec of a WorkloadEntry, also used for `spec.endpoints` of a ServiceEntry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Workload {
    /// IP, host name, or `unix://` path; empty where only a network is given.
    pub address: String,
    /// Port by service port name; values above 0 override.
    pub ports: BTreeMap<String, u16>,
    /// Labels of the endpoint.
    pub labels: Labels,
    /// Network, empty if none.
    pub network: String,
    /// `region/zone/subzone`, empty if none.
    pub locality: String,
    /// Load-balancing weight; 0 counts as 1.
    pub weight: u32,
    /// Service account name, empty if none.
    pub service_account: String,
}

/// A checked ServiceEntry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Metadata.
    pub meta: Meta,
    /// Hosts as written.
    pub hosts: Vec<String>,
    /// IP addresses and CIDRs as written.
    pub addresses: Vec<String>,
    /// Ports in order.
    pub ports: Vec<ServicePort>,
    /// Location.
    pub location: Location,
    /// Resolution.
    pub resolution: Resolution,
    /// Inline endpoints.
    pub endpoints: Vec<Workload>,
    /// `workloadSelector.labels`; `Some` of an empty map selects every workload of the namespace.
    pub workload_selector: Option<Labels>,
    /// `exportTo` as written; empty means the mesh's default.
    pub export_to: Vec<String>,
    /// `subjectAltNames`
    pub subject_alt_names: Vec<String>,
    /// `status.addresses`: address and the host it stands for.
    pub status_addresses: Vec<(String, String)>,
}

/// A checked WorkloadEntry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkloadEntry {
    /// Metadata.
    pub meta: Meta,
    /// Spec.
    pub workload: Workload,
    /// Status of the condition `Healthy`, where there is one.
    pub healthy: Option<bool>,
}

/// A resource whose spec is kept as it was decoded, after validation found no error in it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Checked<S> {
    /// Metadata.
    pub meta: Meta,
    /// Spec.
    pub spec: S,
}

/// A Kubernetes Service, as far as matching needs it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Service {
    /// Metadata.
    pub meta: Meta,
    /// Ports; `protocol` is settled by appProtocol, then by name (SEMANTICS 2.12).
    pub ports: Vec<ServicePort>,
    /// `targetPort` given as a name, by service port name.
    pub target_port_names: BTreeMap<String, String>,
    /// Cluster IPs; empty for a headless Service.
    pub cluster_ips: Vec<String>,
    /// `clusterIP: None`
    pub headless: bool,
    /// Target of an ExternalName Service.
    pub external_name: Option<String>,
    /// `spec.selector`; `None` where absent.
    pub selector: Option<Labels>,
    /// From the annotation `networking.istio.io/exportTo`.
    pub export_to: Vec<String>,
}

/// A Kubernetes EndpointSlice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Metadata.
    pub meta: Meta,
    /// Label `kubernetes.io/service-name`.
    pub service: String,
    /// Addresses of ready endpoints.
    pub addresses: Vec<String>,
    /// Port number by port name.
    pub ports: BTreeMap<String, u16>,
}

/// A Kubernetes Pod that may be an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// Metadata.
    pub meta: Meta,
    /// `status.podIPs`, or `status.podIP`.
    pub ips: Vec<String>,
    /// Ready, not terminal and not being deleted.
    pub ready: bool,
    /// First TCP container port of each name.
    pub ports: BTreeMap<String, u16>,
    /// `spec.serviceAccountName`
    pub service_account: String,
}

/// `outboundTrafficPolicy.mode`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum OutboundMode {
    /// Unknown destinations are refused.
    RegistryOnly,
    /// Unknown destinations are passed through.
    #[default]
    AllowAny,
    /// As `AllowAny`, with HTTP sent to the name it asks for.
    AllowAnyDynamicDns,
}

/// Chooses by labels, as Kubernetes does; one that asks nothing chooses everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    /// `matchLabels`
    pub labels: Labels,
    /// `matchExpressions`: key, and what is asked of its value.
    pub expressions: Vec<(String, LabelOperator)>,
}

/// What a selector's expression asks of the label with its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelOperator {
    /// One of these values.
    In(Vec<String>),
    /// None of these values, be it that there is no such label.
    NotIn(Vec<String>),
    /// Any value.
    Exists,
    /// No such label.
    DoesNotExist,
}

/// The fields of Istio's MeshConfig that Portolan honours, over Istio's defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshConfig {
    /// `outboundTrafficPolicy.mode`
    pub outbound: OutboundMode,
    /// `proxyHttpPort`; `None` for 0.
    pub proxy_http_port: Option<u16>,
    /// `rootNamespace`
    pub root_namespace: String,
    /// `trustDomain`
    pub trust_domain: String,
    /// `defaultServiceExportTo`; never empty.
    pub default_service_export_to: Vec<String>,
    /// `defaultVirtualServiceExportTo`; never empty.
    pub default_virtual_service_export_to: Vec<String>,
    /// `connectTimeout`
    pub connect_timeout: Duration,
    /// `dnsRefreshRate`: used after a failed resolution; the TTL otherwise.
    pub dns_refresh_rate: Duration,
    /// `defaultHttpRetryPolicy`: in place of Istio's own.
    pub default_retry: Option<Retry>,
    /// Domain of the Kubernetes cluster.
    pub cluster_domain: String,
    /// `discoverySelectors`: which namespaces are considered; with none, all are.
    pub discovery_selectors: Vec<LabelSelector>,
}

impl Default for MeshConfig {
    fn default() -> Self {
        MeshConfig {
            outbound: OutboundMode::AllowAny,
            proxy_http_port: None,
            root_namespace: "istio-system".into(),
            trust_domain: "cluster.local".into(),
            default_service_export_to: vec!["*".into()],
            default_virtual_service_export_to: vec!["*".into()],
            connect_timeout: Duration::from_secs(10),
            dns_refresh_rate: Duration::from_secs(60),
            default_retry: None,
            cluster_domain: "cluster.local".into(),
            discovery_selectors: Vec::new(),
        }
    }
}

/// Whether a subscriber is a sidecar or a gateway.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Beside an application.
    #[default]
    Sidecar,
    /// Istio's `router`.
    Gateway,
}

/// Who a subscriber is, as far as it decides what it may see. One snapshot is compiled for each distinct scope.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Scope {
    /// Namespace of the workload.
    pub namespace: String,
    /// Labels of the workload.
    pub labels: Labels,
    /// Sidecar or gateway.
    pub role: Role,
    /// The workload's own addresses.
    pub ips: Vec<String>,
    /// `region/zone/subzone`
    pub locality: String,
    /// Its names are resolved by a DNS proxy that answers with allocated addresses, so that those count.
    pub dns_capture: bool,
}
