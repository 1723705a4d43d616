//! The API server's gate: a checker of structural schemas, as far as our CRDs use them, with the server's pruning.
//!
//! Unknown fields and nulls are dropped first, then the schema's keywords are checked, and the CEL rules last. The rules
//! stand in the CRD as CEL; each has a counterpart in Rust ([`super::schema_rules`]) that is found by its text, so the
//! two cannot part unnoticed.

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::api::decode::Path;
use crate::config::tree::{self, Node, Value};
use crate::model::Kind;
use crate::validate::finding::{Gate, Issue, Severity};
use crate::validate::predicates;
use crate::validate::schema_rules::{self, Check};

/// Our CRD of ServiceEntry.
pub const SERVICE_ENTRY_CRD: &str = include_str!("../../schema/serviceentries.yaml");
/// Our CRD of WorkloadEntry.
pub const WORKLOAD_ENTRY_CRD: &str = include_str!("../../schema/workloadentries.yaml");

/// Our CRD of VirtualService.
pub const VIRTUAL_SERVICE_CRD: &str = include_str!("../../schema/virtualservices.yaml");
/// Our CRD of DestinationRule.
pub const DESTINATION_RULE_CRD: &str = include_str!("../../schema/destinationrules.yaml");
/// Our CRD of Gateway.
pub const GATEWAY_CRD: &str = include_str!("../../schema/gateways.yaml");
/// Our CRD of Sidecar.
pub const SIDECAR_CRD: &str = include_str!("../../schema/sidecars.yaml");

/// All of them.
pub const CRDS: [&str; 6] =
    [SERVICE_ENTRY_CRD, WORKLOAD_ENTRY_CRD, VIRTUAL_SERVICE_CRD, DESTINATION_RULE_CRD, GATEWAY_CRD, SIDECAR_CRD];

static SERVICE_ENTRY: LazyLock<Crd> = LazyLock::new(|| Crd::read(SERVICE_ENTRY_CRD));
static WORKLOAD_ENTRY: LazyLock<Crd> = LazyLock::new(|| Crd::read(WORKLOAD_ENTRY_CRD));
static VIRTUAL_SERVICE: LazyLock<Crd> = LazyLock::new(|| Crd::read(VIRTUAL_SERVICE_CRD));
static DESTINATION_RULE: LazyLock<Crd> = LazyLock::new(|| Crd::read(DESTINATION_RULE_CRD));
static GATEWAY: LazyLock<Crd> = LazyLock::new(|| Crd::read(GATEWAY_CRD));
static SIDECAR: LazyLock<Crd> = LazyLock::new(|| Crd::read(SIDECAR_CRD));

struct Crd {
    versions: Vec<String>,
    schema: Schema,
}

#[derive(Default)]
struct Schema {
    kind: Option<&'static str>,
    properties: Vec<(String, Schema)>,
    additional: Option<Box<Schema>>,
    items: Option<Box<Schema>>,
    required: Vec<String>,
    minimum: Option<i64>,
    maximum: Option<i64>,
    min_items: Option<usize>,
    max_items: Option<usize>,
    max_length: Option<usize>,
    max_properties: Option<usize>,
    values: Vec<String>,
    list_keys: Vec<String>,
    format: Option<Format>,
    /// Fields of which at most one may be present, for each `oneOf`.
    exclusive: Vec<Vec<String>>,
    open: bool,
    rules: Vec<Rule>,
}

/// The formats that the API server checks; `double` holds for every number.
#[derive(Clone, Copy)]
enum Format {
    Int32,
    Byte,
}

struct Rule {
    message: String,
    check: Check,
}

/// What the API server says of a resource of `kind`.
pub fn validate(kind: Kind, root: &Node) -> Vec<Issue> {
    let crd = match kind {
        Kind::ServiceEntry => &*SERVICE_ENTRY,
        Kind::WorkloadEntry => &*WORKLOAD_ENTRY,
        Kind::VirtualService => &*VIRTUAL_SERVICE,
        Kind::DestinationRule => &*DESTINATION_RULE,
        Kind::Gateway => &*GATEWAY,
        Kind::Sidecar => &*SIDECAR,
        Kind::Service | Kind::EndpointSlice | Kind::Pod | Kind::Namespace => return Vec::new(),
    };
    let mut issues = Vec::new();
    let version = root.get("apiVersion").and_then(Node::as_str).and_then(|version| version.split_once('/'));
    if !version.is_some_and(|(_, version)| crd.versions.iter().any(|known| known == version)) {
        issues.push(error("no such resource", "apiVersion", "no such resource"));
    }
    metadata(root.get("metadata"), &mut issues);
    let mut blocked = issues.iter().any(|issue| blocks_rules(issue.code));
    for (name, schema) in &crd.schema.properties {
        let path = Path::root(name);
        match root.get(name).filter(|node| !node.is_null()) {
            Some(node) => keywords(schema, node, &path, &mut issues),
            None if crd.schema.required.contains(name) => issues.push(error("required", path, "required value")),
            None => {}
        }
    }
    blocked |= issues.iter().any(|issue| blocks_rules(issue.code));
    if !blocked {
        for (name, schema) in &crd.schema.properties {
            if let Some(node) = root.get(name).filter(|node| !node.is_null()) {
                rules(schema, node, &Path::root(name), &mut issues);
            }
        }
    }
    issues
}

fn error(code: &'static str, field: impl std::fmt::Display, message: impl Into<String>) -> Issue {
    Issue::new(Gate::Schema, Severity::Error, code, field, message)
}

/// The API server evaluates no CEL when one of these failed.
fn blocks_rules(code: &str) -> bool {
    matches!(code, "type" | "enum" | "required" | "maxItems" | "maxLength" | "maxProperties")
}

fn metadata(node: Option<&Node>, issues: &mut Vec<Issue>) {
    let text = |name: &str| node.and_then(|node| node.get(name)).and_then(Node::as_str).unwrap_or_default();
    match text("name") {
        "" => issues.push(error("required", "metadata.name", "name is required")),
        name if !predicates::is_object_name(name) => {
            issues.push(error("name", "metadata.name", format!("{name:?} is no lower-case RFC 1123 subdomain")));
        }
        _ => {}
    }
    let namespace = text("namespace");
    if !namespace.is_empty() && (!predicates::is_object_name(namespace) || !predicates::is_dns_label(namespace)) {
        issues.push(error("name", "metadata.namespace", format!("{namespace:?} is no lower-case RFC 1123 label")));
    }
    for map in ["labels", "annotations"] {
        let field = format!("metadata.{map}");
        let fields = match node.and_then(|node| node.get(map)).map(|node| &node.value) {
            None | Some(Value::Null) => continue,
            Some(Value::Map(fields)) => fields,
            Some(_) => {
                issues.push(error("type", field, "must be an object"));
                continue;
            }
        };
        for entry in fields {
            if predicates::label_key(&entry.key).is_err() {
                issues.push(error("label key", &field, format!("{:?} is no qualified name", entry.key)));
            }
            match &entry.value.value {
                Value::Null => {}
                Value::String(value) if map == "labels" && !predicates::is_kubernetes_label_value(value) => {
                    issues.push(error("label value", &field, format!("{value:?} is no label value")));
                }
                Value::String(_) => {}
                _ => issues.push(error("type", &field, format!("{:?} must be a string", entry.key))),
            }
        }
    }
}

fn keywords(schema: &Schema, node: &Node, path: &Path<'_>, issues: &mut Vec<Issue>) {
    let fits = match (schema.kind, &node.value) {
        (None, _)
        | (Some("object"), Value::Map(_))
        | (Some("array"), Value::List(_))
        | (Some("string"), Value::String(_))
        | (Some("integer"), Value::Int(_))
        | (Some("number"), Value::Int(_) | Value::Float(_))
        | (Some("boolean"), Value::Bool(_)) => true,
        (Some(_), _) => false,
    };
    if !fits {
        let wanted = schema.kind.unwrap_or("any");
        issues.push(error("type", path, format!("must be of type {wanted}, is {}", node.type_name())));
        return;
    }
    match &node.value {
        Value::Map(fields) => {
            let count = fields.iter().filter(|field| !field.value.is_null()).count();
            limit("maxProperties", count, schema.max_properties, path, issues);
            for names in &schema.exclusive {
                let given = names.iter().filter(|name| node.get(name).is_some_and(|node| !node.is_null())).count();
                if given > 1 {
                    issues.push(error("oneOf", path, format!("only one of {} may be set", names.join(", "))));
                }
            }
            for name in &schema.required {
                if node.get(name).is_none_or(Node::is_null) {
                    issues.push(error("required", path.field(name), "required value"));
                }
            }
            for field in fields.iter().filter(|field| !field.value.is_null()) {
                if let Some(property) = schema.property(&field.key) {
                    keywords(property, &field.value, &path.field(&field.key), issues);
                }
            }
        }
        Value::List(items) => {
            limit("maxItems", items.len(), schema.max_items, path, issues);
            if schema.min_items.is_some_and(|least| items.len() < least) {
                issues.push(error("minItems", path, format!("has {} items, too few", items.len())));
            }
            list_keys(schema, items, path, issues);
            for (index, item) in items.iter().enumerate() {
                if let Some(schema) = &schema.items {
                    keywords(schema, item, &path.item(index), issues);
                }
            }
        }
        Value::String(text) => {
            limit("maxLength", text.chars().count(), schema.max_length, path, issues);
            if !schema.values.is_empty() && !schema.values.contains(text) {
                let message = format!("{text:?} is none of {}", schema.values.join(", "));
                issues.push(error("enum", path, message));
            }
            if matches!(schema.format, Some(Format::Byte)) && BASE64.decode(text).is_err() {
                issues.push(error("format", path, "must be base64"));
            }
        }
        Value::Int(number) => {
            if schema.minimum.is_some_and(|least| *number < least) {
                issues.push(error("minimum", path, format!("{number} is too small")));
            }
            if schema.maximum.is_some_and(|most| *number > most) {
                issues.push(error("maximum", path, format!("{number} is too large")));
            }
            if matches!(schema.format, Some(Format::Int32)) && i32::try_from(*number).is_err() {
                issues.push(error("format", path, format!("{number} is no number of 32 bits")));
            }
        }
        Value::Null | Value::Bool(_) | Value::Float(_) => {}
    }
}

fn limit(code: &'static str, count: usize, most: Option<usize>, path: &Path<'_>, issues: &mut Vec<Issue>) {
    if let Some(most) = most.filter(|&most| count > most) {
        issues.push(error(code, path, format!("{count} is more than {most}")));
    }
}

fn list_keys(schema: &Schema, items: &[Node], path: &Path<'_>, issues: &mut Vec<Issue>) {
    if schema.list_keys.is_empty() {
        return;
    }
    let mut seen = std::collections::HashSet::new();
    for (index, item) in items.iter().enumerate() {
        let key: Vec<Option<&str>> =
            schema.list_keys.iter().map(|name| item.get(name).and_then(Node::as_str)).collect();
        if key.iter().all(Option::is_some) && !seen.insert(key) {
            issues.push(error("list-map-keys", path.item(index), "duplicate value"));
        }
    }
}

fn rules(schema: &Schema, node: &Node, path: &Path<'_>, issues: &mut Vec<Issue>) {
    for rule in &schema.rules {
        if !(rule.check)(node) {
            issues.push(error("cel", path, rule.message.clone()));
        }
    }
    match &node.value {
        Value::Map(fields) => {
            for field in fields.iter().filter(|field| !field.value.is_null()) {
                if let Some(property) = schema.property(&field.key) {
                    rules(property, &field.value, &path.field(&field.key), issues);
                }
            }
        }
        Value::List(items) => {
            for (index, item) in items.iter().enumerate() {
                if let Some(schema) = &schema.items {
                    rules(schema, item, &path.item(index), issues);
                }
            }
        }
        _ => {}
    }
}

impl Schema {
    fn property(&self, name: &str) -> Option<&Schema> {
        if self.open {
            return None;
        }
        let known = self.properties.iter().find(|(known, _)| known == name).map(|(_, schema)| schema);
        known.or(self.additional.as_deref())
    }

    fn read(node: &Node) -> Schema {
        let size = |name: &str| match node.get(name).map(|node| &node.value) {
            Some(Value::Int(number)) => usize::try_from(*number).ok(),
            _ => None,
        };
        let number = |name: &str| match node.get(name).map(|node| &node.value) {
            Some(Value::Int(number)) => Some(*number),
            _ => None,
        };
        let strings = |name: &str| match node.get(name).map(|node| &node.value) {
            Some(Value::List(items)) => items.iter().filter_map(Node::as_str).map(str::to_owned).collect(),
            _ => Vec::new(),
        };
        let boxed = |name: &str| node.get(name).map(|node| Box::new(Schema::read(node)));
        let properties = match node.get("properties").map(|node| &node.value) {
            Some(Value::Map(fields)) => {
                fields.iter().map(|field| (field.key.clone(), Schema::read(&field.value))).collect()
            }
            _ => Vec::new(),
        };
        let rules = match node.get("x-kubernetes-validations").map(|node| &node.value) {
            Some(Value::List(items)) => items.iter().map(Rule::read).collect(),
            _ => Vec::new(),
        };
        Schema {
            kind: node.get("type").and_then(Node::as_str).and_then(type_named),
            properties,
            additional: boxed("additionalProperties"),
            items: boxed("items"),
            required: strings("required"),
            minimum: number("minimum"),
            maximum: number("maximum"),
            min_items: size("minItems"),
            max_items: size("maxItems"),
            max_length: size("maxLength"),
            max_properties: size("maxProperties"),
            values: strings("enum"),
            list_keys: strings("x-kubernetes-list-map-keys"),
            format: match node.get("format").and_then(Node::as_str) {
                Some("int32") => Some(Format::Int32),
                Some("byte") => Some(Format::Byte),
                _ => None,
            },
            exclusive: exclusive(node),
            open: node.get("x-kubernetes-preserve-unknown-fields").is_some(),
            rules,
        }
    }
}

fn list<'n>(node: &'n Node, name: &str) -> &'n [Node] {
    match node.get(name).map(|node| &node.value) {
        Some(Value::List(items)) => items,
        _ => &[],
    }
}

/// What protobuf's `oneof` becomes in a schema: `oneOf` none of the fields, or the first, or the second... Several of
/// them stand under `allOf`.
fn exclusive(node: &Node) -> Vec<Vec<String>> {
    let names = |choices: &[Node]| -> Vec<String> {
        choices.iter().flat_map(|choice| list(choice, "required")).filter_map(Node::as_str).map(str::to_owned).collect()
    };
    let mut groups: Vec<Vec<String>> = list(node, "allOf").iter().flat_map(exclusive).collect();
    groups.extend(Some(names(list(node, "oneOf"))).filter(|names| !names.is_empty()));
    groups
}

fn type_named(name: &str) -> Option<&'static str> {
    ["object", "array", "string", "integer", "number", "boolean"].into_iter().find(|known| *known == name)
}

impl Rule {
    fn read(node: &Node) -> Rule {
        let rule = node.get("rule").and_then(Node::as_str).unwrap_or_default();
        let message = node.get("message").and_then(Node::as_str).unwrap_or_default().to_owned();
        #[expect(clippy::panic, reason = "the CRDs are compiled in and every test reads them")]
        let check = schema_rules::find(rule).unwrap_or_else(|| panic!("no counterpart of the CEL rule {rule}"));
        Rule { message, check }
    }
}

impl Crd {
    fn read(text: &str) -> Crd {
        #[expect(clippy::expect_used, reason = "the CRDs are compiled in and every test reads them")]
        let root = tree::parse(text, 1).expect("our own CRDs are YAML").root;
        let versions = match root.get("spec").and_then(|spec| spec.get("versions")).map(|node| &node.value) {
            Some(Value::List(versions)) => versions.as_slice(),
            _ => &[],
        };
        let schema = versions
            .first()
            .and_then(|version| version.get("schema"))
            .and_then(|schema| schema.get("openAPIV3Schema"))
            .map(Schema::read)
            .unwrap_or_default();
        let names = versions.iter().filter_map(|version| version.get("name").and_then(Node::as_str));
        Crd { versions: names.map(str::to_owned).collect(), schema }
    }
}
