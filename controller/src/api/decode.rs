//! Decoding as istiod does it (`jsonpb`): snake_case names are read, numbers may stand in quotes, enums may be numbers,
//! `null` is the default, unknown fields are passed over. What is passed over is reported.

use std::collections::BTreeMap;
use std::fmt;

use crate::config::tree::{Field, Node, Value};
use crate::validate::finding::{Gate, Issue, Severity};

/// The path of a field, spelt out only when something is said about it.
#[derive(Clone, Copy)]
pub struct Path<'p> {
    parent: Option<&'p Path<'p>>,
    step: Step<'p>,
}

#[derive(Clone, Copy)]
enum Step<'p> {
    Field(&'p str),
    Item(usize),
}

impl<'p> Path<'p> {
    /// A field of the resource itself.
    pub fn root(name: &'p str) -> Path<'p> {
        Path { parent: None, step: Step::Field(name) }
    }

    /// A field of this.
    pub fn field(&'p self, name: &'p str) -> Path<'p> {
        Path { parent: Some(self), step: Step::Field(name) }
    }

    /// An item of this list.
    pub fn item(&'p self, index: usize) -> Path<'p> {
        Path { parent: Some(self), step: Step::Item(index) }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            write!(f, "{parent}")?;
        }
        match self.step {
            Step::Field(name) if self.parent.is_some() => write!(f, ".{name}"),
            Step::Field(name) => f.write_str(name),
            Step::Item(index) => write!(f, "[{index}]"),
        }
    }
}

/// The fields of one message; what nobody asked for is reported by [`Fields::finish`].
pub struct Fields<'n> {
    fields: &'n [Field],
    asked: Vec<bool>,
}

impl<'n> Fields<'n> {
    /// The fields of `node`; none if it is absent, `null`, or (reported) no object.
    pub fn of(node: Option<&'n Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Fields<'n> {
        let fields: &[Field] = match node.map(|node| &node.value) {
            None | Some(Value::Null) => &[],
            Some(Value::Map(fields)) => fields,
            Some(_) => {
                wrong_type(node, "object", path, issues);
                &[]
            }
        };
        Fields { fields, asked: vec![false; fields.len()] }
    }

    /// The field of that camelCase name, or of its snake_case spelling; `None` if absent or `null`.
    pub fn take(&mut self, name: &str) -> Option<&'n Node> {
        let mut found = None;
        for (index, field) in self.fields.iter().enumerate() {
            let exact = field.key == name;
            if exact || is_snake_case_of(&field.key, name) {
                self.asked[index] = true;
                if exact || found.is_none() {
                    found = Some(&field.value);
                }
            }
        }
        found.filter(|node| !node.is_null())
    }

    /// Reports what was passed over, and names that only istiod itself would read.
    pub fn finish(self, path: &Path<'_>, issues: &mut Vec<Issue>) {
        for (field, asked) in self.fields.iter().zip(self.asked) {
            if asked && field.key.contains('_') {
                issues.push(Issue::new(
                    Gate::Schema,
                    Severity::Warning,
                    "snake-case",
                    path.field(&field.key),
                    "read from a file, but an API server drops the snake_case spelling",
                ));
            } else if !asked {
                issues.push(Issue::new(
                    Gate::Schema,
                    Severity::Warning,
                    "unknown-field",
                    path.field(&field.key),
                    "unknown field, ignored",
                ));
            }
        }
    }
}

/// `target_port` for `targetPort`; false for a name without capitals.
fn is_snake_case_of(snake: &str, camel: &str) -> bool {
    let mut bytes = snake.bytes();
    let mut humps = false;
    for c in camel.bytes() {
        if c.is_ascii_uppercase() {
            humps = true;
            if bytes.next() != Some(b'_') || bytes.next() != Some(c.to_ascii_lowercase()) {
                return false;
            }
        } else if bytes.next() != Some(c) {
            return false;
        }
    }
    humps && bytes.next().is_none()
}

fn wrong_type(node: Option<&Node>, wanted: &str, path: &Path<'_>, issues: &mut Vec<Issue>) {
    let found = node.map_or("null", Node::type_name);
    // The trap of YAML 1.1, which Kubernetes reads.
    let hint = if found == "bool" && wanted == "string" { " (y, n, yes, no, on and off need quotes)" } else { "" };
    issues.push(Issue::refused("type", path, format!("cannot read {found} as {wanted}{hint}")));
}

/// A string; empty if absent.
pub fn string(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> String {
    match node.map(|node| &node.value) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(_) => {
            wrong_type(node, "string", path, issues);
            String::new()
        }
    }
}

/// An unsigned number of 32 bits, perhaps in quotes; 0 if absent.
pub fn uint32(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> u32 {
    let number = match node.map(|node| &node.value) {
        None | Some(Value::Null) => return 0,
        Some(Value::Int(number)) => u32::try_from(*number).ok(),
        Some(Value::String(text)) => json_integer(text),
        Some(_) => None,
    };
    number.unwrap_or_else(|| {
        wrong_type(node, "a number from 0 to 4294967295", path, issues);
        0
    })
}

fn json_integer(text: &str) -> Option<u32> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    plain.then(|| text.parse().ok()).flatten()
}

/// An enum by name or number; 0 if absent. `names` holds the name of each number.
pub fn enumeration(node: Option<&Node>, names: &[(&str, i32)], path: &Path<'_>, issues: &mut Vec<Issue>) -> i32 {
    let number = match node.map(|node| &node.value) {
        None | Some(Value::Null) => return 0,
        Some(Value::Int(number)) => i32::try_from(*number).ok(),
        Some(Value::String(text)) => names.iter().find(|(name, _)| name == text).map(|(_, number)| *number),
        Some(_) => None,
    };
    number.unwrap_or_else(|| {
        let written = node.and_then(Node::as_str).unwrap_or("the value");
        let known: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
        let message = format!("unknown value {written:?}, expected one of {}", known.join(", "));
        issues.push(Issue::refused("enum", path, message));
        0
    })
}

/// A list of messages or values.
pub fn list<T>(
    node: Option<&Node>,
    path: &Path<'_>,
    issues: &mut Vec<Issue>,
    mut item: impl FnMut(&Node, &Path<'_>, &mut Vec<Issue>) -> T,
) -> Vec<T> {
    match node.map(|node| &node.value) {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::List(items)) => {
            items.iter().enumerate().map(|(index, node)| item(node, &path.item(index), issues)).collect()
        }
        Some(_) => {
            wrong_type(node, "array", path, issues);
            Vec::new()
        }
    }
}

/// A list of strings.
pub fn strings(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Vec<String> {
    list(node, path, issues, |node, path, issues| string(Some(node), path, issues))
}

/// A map with string keys.
pub fn map<T>(
    node: Option<&Node>,
    path: &Path<'_>,
    issues: &mut Vec<Issue>,
    mut value: impl FnMut(Option<&Node>, &Path<'_>, &mut Vec<Issue>) -> T,
) -> BTreeMap<String, T> {
    match node.map(|node| &node.value) {
        None | Some(Value::Null) => BTreeMap::new(),
        Some(Value::Map(fields)) => fields
            .iter()
            .map(|field| (field.key.clone(), value(Some(&field.value), &path.field(&field.key), issues)))
            .collect(),
        Some(_) => {
            wrong_type(node, "object", path, issues);
            BTreeMap::new()
        }
    }
}

/// A map of strings.
pub fn string_map(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> BTreeMap<String, String> {
    map(node, path, issues, string)
}
