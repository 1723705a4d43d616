//! From the text of a document to checked objects: read, decode, validate, and say what was found.

use std::sync::Arc;

use crate::api::{self, decode::Path, message::Decode};
use crate::config::documents::Document;
use crate::config::tree::{self, Node, Value};
use crate::model::{Checked, Kind, MeshConfig, Meta, Object, ObjectKey, WorkloadEntry};
use crate::validate::finding::{Finding, Gate, Issue, Severity};
use crate::validate::{self, schema};

/// What one resource came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// A checked object and the line it begins on.
    Object(Object, u32),
    /// A resource that was refused, so that its last good version stays.
    Refused(ObjectKey),
    /// The mesh configuration; `None` if it was refused.
    Mesh(Option<Box<MeshConfig>>),
    /// Text or metadata that cannot be read, so that nobody knows which resource it was meant to be.
    Unreadable,
}

/// The resources of one document, with everything there is to say about them. A list counts as its items.
pub fn document(document: &Document<'_>, file: &Arc<str>) -> (Vec<Outcome>, Vec<Finding>) {
    let mut reader = Reader { file, outcomes: Vec::new(), findings: Vec::new() };
    match tree::parse(document.text, document.line) {
        Ok(parsed) => {
            for duplicate in parsed.duplicates {
                let message = format!("key {:?} is given twice, the later one counts", duplicate.key);
                reader.finding(duplicate.line, Issue::warned("duplicate-key", "", message), &Name::default());
            }
            reader.resource(&parsed.root);
        }
        Err(error) => {
            let message = format!("cannot be read: {error}");
            reader.finding(error.line, Issue::refused("syntax", "", message), &Name::default());
            reader.outcomes.push(Outcome::Unreadable);
        }
    }
    (reader.outcomes, reader.findings)
}

/// A resource that was read already, of a place without lines. As [`document`] otherwise.
pub fn resource(root: &Node, place: &Arc<str>) -> (Vec<Outcome>, Vec<Finding>) {
    let mut reader = Reader { file: place, outcomes: Vec::new(), findings: Vec::new() };
    reader.resource(root);
    (reader.outcomes, reader.findings)
}

/// Reads the text of a MeshConfig file.
///
/// # Errors
/// `None` beside the findings if any of them is an error.
pub fn mesh(text: &str, file: &Arc<str>) -> (Option<MeshConfig>, Vec<Finding>) {
    let mut reader = Reader { file, outcomes: Vec::new(), findings: Vec::new() };
    match tree::parse(text, 1) {
        Ok(parsed) => {
            let mesh = reader.mesh(&parsed.root);
            (mesh, reader.findings)
        }
        Err(error) => {
            let message = format!("cannot be read: {error}");
            reader.finding(error.line, Issue::refused("syntax", "", message), &Name::mesh());
            (None, reader.findings)
        }
    }
}

/// How findings call a resource.
#[derive(Default)]
struct Name {
    kind: String,
    namespace: String,
    name: String,
}

impl Name {
    fn mesh() -> Name {
        Name { kind: "MeshConfig".into(), namespace: "istio-system".into(), name: "istio".into() }
    }
}

struct Reader<'f> {
    file: &'f Arc<str>,
    outcomes: Vec<Outcome>,
    findings: Vec<Finding>,
}

impl Reader<'_> {
    fn finding(&mut self, line: u32, issue: Issue, name: &Name) {
        self.findings.push(Finding {
            file: Arc::clone(self.file),
            line,
            kind: name.kind.clone(),
            namespace: name.namespace.clone(),
            name: name.name.clone(),
            field: issue.field,
            gate: issue.gate,
            severity: issue.severity,
            code: issue.code,
            message: issue.message,
        });
    }

    fn findings(&mut self, root: &Node, issues: Vec<Issue>, name: &Name) {
        for issue in issues {
            let line = root.line_of(&issue.field);
            self.finding(line, issue, name);
        }
    }

    fn resource(&mut self, root: &Node) {
        let text = |name: &str| root.get(name).and_then(Node::as_str).unwrap_or_default();
        let (version, kind) = (text("apiVersion"), text("kind"));
        let group = version.rsplit_once('/').map_or("", |(group, _)| group);
        if root.is_null() {
            return;
        }
        if version.is_empty() && kind.is_empty() {
            if self.is_mesh_file(root) {
                let mesh = self.mesh(root);
                self.outcomes.push(Outcome::Mesh(mesh.map(Box::new)));
            } else {
                let issue = Issue::refused("no-kind", "", "no resource: apiVersion and kind are missing");
                self.finding(root.line, issue, &Name::default());
                self.outcomes.push(Outcome::Unreadable);
            }
            return;
        }
        if kind == "List" || kind.ends_with("List") && root.get("items").is_some() {
            if let Some(Value::List(items)) = root.get("items").map(|items| &items.value) {
                items.iter().for_each(|item| self.resource(item));
            }
            return;
        }
        let kind = match (group, kind) {
            ("networking.istio.io", "ServiceEntry") => Kind::ServiceEntry,
            ("networking.istio.io", "WorkloadEntry") => Kind::WorkloadEntry,
            ("networking.istio.io", "VirtualService") => Kind::VirtualService,
            ("networking.istio.io", "DestinationRule") => Kind::DestinationRule,
            ("networking.istio.io", "Gateway") => Kind::Gateway,
            ("networking.istio.io", "Sidecar") => Kind::Sidecar,
            ("", "Service") => Kind::Service,
            ("" | "discovery.k8s.io", "EndpointSlice" | "Endpoints") => Kind::EndpointSlice,
            ("", "Pod") => Kind::Pod,
            ("", "Namespace") => Kind::Namespace,
            ("", "ConfigMap") if self.config_map(root) => return,
            _ => return self.foreign(root, group, version, kind),
        };
        self.known(kind, root);
    }

    fn foreign(&mut self, root: &Node, group: &str, version: &str, kind: &str) {
        let message = if group == "istio.io" || group.ends_with(".istio.io") {
            format!("{kind} is not supported yet, ignored")
        } else {
            format!("{version} {kind} does not concern Portolan, ignored")
        };
        let meta = api::meta::read(root, &mut Vec::new());
        let name = Name { kind: kind.to_owned(), namespace: meta.namespace.to_string(), name: meta.name.to_string() };
        self.finding(root.line_of("kind"), Issue::warned("ignored-kind", "kind", message), &name);
    }

    fn known(&mut self, kind: Kind, root: &Node) {
        let mut issues = Vec::new();
        let mut meta = api::meta::read(root, &mut issues);
        if kind == Kind::Namespace {
            api::kubernetes::namespace(&mut meta, &mut issues);
        }
        let key = ObjectKey { kind, namespace: meta.namespace.clone(), name: meta.name.clone() };
        let (namespace, name) = (meta.namespace.to_string(), meta.name.to_string());
        let name = Name { kind: kind_name(kind).into(), namespace, name };
        let unreadable = issues.iter().any(Issue::rejects);
        let objects = match kind {
            Kind::ServiceEntry => vec![Object::ServiceEntry(Arc::new(service_entry(meta, root, &mut issues)))],
            Kind::WorkloadEntry => vec![Object::WorkloadEntry(Arc::new(workload_entry(meta, root, &mut issues)))],
            Kind::VirtualService => {
                let object = checked(kind, meta, root, &mut issues, validate::virtual_service::validate);
                vec![Object::VirtualService(Arc::new(object))]
            }
            Kind::DestinationRule => {
                let object = checked(kind, meta, root, &mut issues, validate::destination_rule::validate);
                vec![Object::DestinationRule(Arc::new(object))]
            }
            Kind::Gateway => {
                let object = checked(kind, meta, root, &mut issues, validate::gateway::validate);
                vec![Object::Gateway(Arc::new(object))]
            }
            Kind::Sidecar => {
                let object = checked(kind, meta, root, &mut issues, validate::sidecar::validate);
                vec![Object::Sidecar(Arc::new(object))]
            }
            Kind::Service => vec![Object::Service(Arc::new(api::kubernetes::service(meta, root, &mut issues)))],
            Kind::Pod => vec![Object::Pod(Arc::new(api::kubernetes::pod(meta, root, &mut issues)))],
            Kind::Namespace => vec![Object::Namespace(Arc::new(meta))],
            Kind::EndpointSlice if root.get("subsets").is_some() => {
                let slices = api::kubernetes::endpoints(&meta, root, &mut issues);
                slices.into_iter().map(|slice| Object::EndpointSlice(Arc::new(slice))).collect()
            }
            Kind::EndpointSlice => {
                vec![Object::EndpointSlice(Arc::new(api::kubernetes::endpoint_slice(meta, root, &mut issues)))]
            }
        };
        issues.extend(objects.iter().filter(|_| !unreadable).flat_map(validate::unserved::of));
        issues.extend(schema::validate(kind, root));
        // A version that no cluster serves is no resource, whatever istiod would say of the rest.
        let refused = issues.iter().any(|issue| issue.rejects() || issue.code == "no such resource");
        match (refused, unreadable) {
            (false, _) => self.outcomes.extend(objects.into_iter().map(|object| Outcome::Object(object, root.line))),
            (true, false) => self.outcomes.push(Outcome::Refused(key)),
            (true, true) => self.outcomes.push(Outcome::Unreadable),
        }
        self.findings(root, issues, &name);
    }

    /// A document without a kind in a file called `mesh.yaml` is a MeshConfig.
    fn is_mesh_file(&self, root: &Node) -> bool {
        let name = self.file.rsplit('/').next().unwrap_or_default();
        matches!(name, "mesh.yaml" | "mesh.yml" | "mesh.json") && matches!(root.value, Value::Map(_))
    }

    fn mesh(&mut self, root: &Node) -> Option<MeshConfig> {
        let mut issues = Vec::new();
        let mesh = api::mesh::read(root, &mut issues);
        let refused = issues.iter().any(Issue::rejects);
        self.findings(root, issues, &Name::mesh());
        (!refused).then_some(mesh)
    }

    /// Istio keeps its MeshConfig as text in the ConfigMap `istio`, under the key `mesh`. False for any other ConfigMap.
    fn config_map(&mut self, root: &Node) -> bool {
        let meta = api::meta::read(root, &mut Vec::new());
        let Some(node) = root.get("data").and_then(|data| data.get("mesh")).filter(|_| meta.name == "istio") else {
            return false;
        };
        let text = node.as_str().unwrap_or_default();
        // The text of a block scalar begins on the line after its key.
        let mesh = match tree::parse(text, node.line.saturating_add(1)) {
            Ok(parsed) => self.mesh(&parsed.root),
            Err(error) => {
                let message = format!("cannot be read: {error}");
                self.finding(error.line, Issue::refused("syntax", "", message), &Name::mesh());
                None
            }
        };
        self.outcomes.push(Outcome::Mesh(mesh.map(Box::new)));
        true
    }
}

/// The name of a kind as YAML has it.
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::ServiceEntry => "ServiceEntry",
        Kind::WorkloadEntry => "WorkloadEntry",
        Kind::VirtualService => "VirtualService",
        Kind::DestinationRule => "DestinationRule",
        Kind::Gateway => "Gateway",
        Kind::Sidecar => "Sidecar",
        Kind::Service => "Service",
        Kind::EndpointSlice => "EndpointSlice",
        Kind::Pod => "Pod",
        Kind::Namespace => "Namespace",
    }
}

/// Fields beside the known ones are an error at the top level of an Istio resource.
fn top_level(root: &Node, kind: &str, meta: &Meta, issues: &mut Vec<Issue>) {
    let Value::Map(fields) = &root.value else { return };
    for field in fields {
        if !matches!(field.key.as_str(), "apiVersion" | "kind" | "metadata" | "spec" | "status") {
            let message = format!("unknown field {:?} on {kind} resource {}/{}", field.key, meta.namespace, meta.name);
            issues.push(Issue::refused("unknown-field", Path::root(&field.key), message));
        }
    }
}

/// A resource whose spec is checked as it was decoded.
fn checked<S: Decode>(
    kind: Kind,
    meta: Meta,
    root: &Node,
    issues: &mut Vec<Issue>,
    validate: fn(&Meta, &S) -> Vec<Issue>,
) -> Checked<S> {
    top_level(root, kind_name(kind), &meta, issues);
    let spec = S::decode(root.get("spec"), &Path::root("spec"), issues);
    if !issues.iter().any(Issue::rejects) {
        issues.extend(validate::metadata(&meta));
        if !issues.iter().any(Issue::rejects) {
            issues.extend(validate(&meta, &spec));
        }
    }
    Checked { meta, spec }
}

fn service_entry(meta: Meta, root: &Node, issues: &mut Vec<Issue>) -> crate::model::ServiceEntry {
    top_level(root, "ServiceEntry", &meta, issues);
    let spec = api::service_entry::read(root.get("spec"), issues);
    let status = api::service_entry::read_status(root.get("status"), issues);
    if !issues.iter().any(Issue::rejects) {
        issues.extend(validate::metadata(&meta));
        if !issues.iter().any(Issue::rejects) {
            issues.extend(validate::service_entry::validate(&meta, &spec));
        }
    }
    validate::service_entry::checked(meta, spec, status)
}

fn workload_entry(meta: Meta, root: &Node, issues: &mut Vec<Issue>) -> WorkloadEntry {
    top_level(root, "WorkloadEntry", &meta, issues);
    let path = Path::root("spec");
    let spec = api::workload_entry::read(root.get("spec"), &path, issues);
    let healthy = api::workload_entry::read_health(root.get("status"), issues);
    if !issues.iter().any(Issue::rejects) {
        issues.extend(validate::metadata(&meta));
        if !issues.iter().any(Issue::rejects) {
            issues.extend(validate::workload_entry::validate(&spec));
        }
    }
    WorkloadEntry { meta, workload: validate::workload_entry::checked(spec), healthy }
}

/// A finding about a file as a whole.
pub fn about_file(file: &Arc<str>, code: &'static str, severity: Severity, message: impl Into<String>) -> Finding {
    Finding {
        file: Arc::clone(file),
        line: 1,
        kind: String::new(),
        namespace: String::new(),
        name: String::new(),
        field: String::new(),
        gate: Gate::Webhook,
        severity,
        code,
        message: message.into(),
    }
}
