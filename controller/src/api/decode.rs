//! Decoding as istiod does it (`jsonpb`): snake_case names are read, numbers may stand in quotes, enums may be numbers,
//! `null` is the default, unknown fields are passed over. What is passed over is reported.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::SignedDuration;

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
        if c.is_ascii_digit() && bytes.clone().next() == Some(b'_') {
            // consecutive_5xx_errors is consecutive5xxErrors.
            humps = true;
            bytes.next();
        }
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

pub(super) fn wrong_type(node: Option<&Node>, wanted: &str, path: &Path<'_>, issues: &mut Vec<Issue>) {
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

/// A whole number of that type, perhaps in quotes; 0 if absent. `wanted` says so in words.
pub fn integer<T: TryFrom<i64> + Default>(
    node: Option<&Node>,
    wanted: &str,
    path: &Path<'_>,
    issues: &mut Vec<Issue>,
) -> T {
    let number = match node.map(|node| &node.value) {
        None | Some(Value::Null) => return T::default(),
        Some(Value::Int(number)) => Some(*number),
        Some(Value::String(text)) => {
            let digits = text.strip_prefix('-').unwrap_or(text);
            let plain = digits.bytes().all(|b| b.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
            plain.then(|| text.parse().ok()).flatten()
        }
        Some(_) => None,
    };
    number.and_then(|number: i64| T::try_from(number).ok()).unwrap_or_else(|| {
        wrong_type(node, wanted, path, issues);
        T::default()
    })
}

/// A number, perhaps in quotes; 0 if absent.
pub fn double(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> f64 {
    let number = match node.map(|node| &node.value) {
        None | Some(Value::Null) => return 0.0,
        #[expect(clippy::cast_precision_loss, reason = "what JSON does with such numbers, too")]
        Some(Value::Int(number)) => Some(*number as f64),
        Some(Value::Float(number)) => Some(*number),
        Some(Value::String(text)) if text.starts_with(|c: char| c.is_ascii_digit() || c == '-') => text.parse().ok(),
        Some(_) => None,
    };
    number.unwrap_or_else(|| {
        wrong_type(node, "a number", path, issues);
        0.0
    })
}

/// A boolean; false if absent.
pub fn boolean(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> bool {
    match node.map(|node| &node.value) {
        None | Some(Value::Null) => false,
        Some(Value::Bool(value)) => *value,
        Some(_) => {
            wrong_type(node, "a boolean", path, issues);
            false
        }
    }
}

/// Bytes in base64; none if absent.
pub fn base64(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Vec<u8> {
    let text = string(node, path, issues);
    BASE64.decode(text).unwrap_or_else(|error| {
        issues.push(Issue::refused("base64", path, format!("no base64: {error}")));
        Vec::new()
    })
}

/// A duration as Go writes it, `1m30s`; zero if absent.
pub fn duration(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> SignedDuration {
    let text = match node.map(|node| &node.value) {
        None | Some(Value::Null) => return SignedDuration::ZERO,
        Some(Value::String(text)) => text,
        Some(_) => {
            wrong_type(node, "a duration such as 10s", path, issues);
            return SignedDuration::ZERO;
        }
    };
    go_duration(text).unwrap_or_else(|| {
        issues.push(Issue::refused("duration", path, format!("{text:?} is no duration such as 10s")));
        SignedDuration::ZERO
    })
}

/// A duration as Go's `time.ParseDuration` reads it: `1m30s`, `-0.5s`, `250ms`; up to 292 years.
pub fn go_duration(text: &str) -> Option<SignedDuration> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(SignedDuration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: i64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let scale: i64 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return None;
        }
        let whole: i64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        let mut part = whole.checked_mul(scale)?;
        let mut place = scale;
        for digit in fraction.bytes() {
            // Digits below a nanosecond are cut off.
            let next = place / 10;
            part = part.checked_add(i64::from(digit - b'0') * place / 10)?;
            place = next;
        }
        total = total.checked_add(part)?;
        rest = tail;
    }
    Some(SignedDuration::from_nanos(if negative { -total } else { total }))
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
