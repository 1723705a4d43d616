//! The kinds that are watched, and how an API server calls them.

use std::borrow::Cow;

use kube::Resource;
use kube::core::{ApiResource, DynamicResourceScope, ObjectMeta};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::model::Kind;

/// A kind and the versions under which it may be served, the preferred one first.
#[derive(Debug)]
pub struct Watched {
    /// The kind.
    pub kind: Kind,
    /// API group, empty for the core.
    pub group: &'static str,
    /// Versions.
    pub versions: &'static [&'static str],
    /// Name in plural, as addresses have it.
    pub plural: &'static str,
    /// Name as resources have it.
    pub name: &'static str,
}

const ISTIO: &str = "networking.istio.io";
const ISTIO_VERSIONS: &[&str] = &["v1", "v1beta1", "v1alpha3"];

const fn istio(kind: Kind, plural: &'static str, name: &'static str) -> Watched {
    Watched { kind, group: ISTIO, versions: ISTIO_VERSIONS, plural, name }
}

/// Pods, which are watched only while something selects them.
pub static PODS: Watched = Watched { kind: Kind::Pod, group: "", versions: &["v1"], plural: "pods", name: "Pod" };

/// Namespaces, which are watched only while the mesh has selectors for them.
pub static NAMESPACES: Watched =
    Watched { kind: Kind::Namespace, group: "", versions: &["v1"], plural: "namespaces", name: "Namespace" };

/// All others, which are always watched.
pub static WATCHED: [Watched; 8] = [
    istio(Kind::ServiceEntry, "serviceentries", "ServiceEntry"),
    istio(Kind::WorkloadEntry, "workloadentries", "WorkloadEntry"),
    istio(Kind::VirtualService, "virtualservices", "VirtualService"),
    istio(Kind::DestinationRule, "destinationrules", "DestinationRule"),
    istio(Kind::Gateway, "gateways", "Gateway"),
    istio(Kind::Sidecar, "sidecars", "Sidecar"),
    Watched { kind: Kind::Service, group: "", versions: &["v1"], plural: "services", name: "Service" },
    Watched {
        kind: Kind::EndpointSlice,
        group: "discovery.k8s.io",
        versions: &["v1"],
        plural: "endpointslices",
        name: "EndpointSlice",
    },
];

impl Watched {
    /// Whether it is one of Istio's kinds.
    pub fn is_istio(&self) -> bool {
        self.group == ISTIO
    }

    /// `apiVersion` of resources.
    pub fn api_version(&self, version: &str) -> String {
        if self.group.is_empty() { version.to_owned() } else { format!("{}/{version}", self.group) }
    }

    /// What to ask an API server for.
    pub fn resource(&self, version: &str) -> ApiResource {
        ApiResource {
            group: self.group.into(),
            version: version.into(),
            api_version: self.api_version(version),
            kind: self.name.into(),
            plural: self.plural.into(),
        }
    }
}

/// A resource as an API server sends it. Whatever JSON it is, it can be read, so that an odd one takes no list down.
#[derive(Debug, Clone)]
pub struct Raw {
    /// What watching needs: name, namespace and version.
    metadata: ObjectMeta,
    /// The resource, without what only costs memory.
    pub value: Value,
}

/// What `kubectl apply` keeps of a resource in the resource.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(from)?;
        let mut metadata = ObjectMeta::default();
        if let Some(meta) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            let text = |name: &str| meta.get(name).and_then(Value::as_str).map(str::to_owned);
            metadata.name = text("name");
            metadata.namespace = text("namespace");
            metadata.resource_version = text("resourceVersion");
            meta.remove("managedFields");
            if let Some(annotations) = meta.get_mut("annotations").and_then(Value::as_object_mut) {
                annotations.remove(LAST_APPLIED);
            }
        }
        Ok(Raw { metadata, value })
    }
}

impl Resource for Raw {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(of: &ApiResource) -> Cow<'_, str> {
        of.kind.as_str().into()
    }

    fn group(of: &ApiResource) -> Cow<'_, str> {
        of.group.as_str().into()
    }

    fn version(of: &ApiResource) -> Cow<'_, str> {
        of.version.as_str().into()
    }

    fn api_version(of: &ApiResource) -> Cow<'_, str> {
        of.api_version.as_str().into()
    }

    fn plural(of: &ApiResource) -> Cow<'_, str> {
        of.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
