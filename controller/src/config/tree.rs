//! One document as a tree whose every node knows its line.
//!
//! Text comes from anywhere, so depth and the growth by aliases are limited, and an error names its line.

use saphyr_parser::{Event, Parser, ScalarStyle};
use std::collections::HashMap;

use super::scalar;

/// Deeper nesting than any resource has; keeps recursion over a tree bounded.
const MAX_DEPTH: usize = 100;
/// Nodes that aliases of one document may add, all together.
const MAX_ALIASED: usize = 100_000;

/// A value and the line (from 1) on which it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Line in the file, from 1.
    pub line: u32,
    /// The value.
    pub value: Value,
}

/// The value of a node, as JSON knows values.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `null`
    Null,
    /// A boolean.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// A string.
    String(String),
    /// A list.
    List(Vec<Node>),
    /// An object, in the order written; a key occurs once, the last one given counts.
    Map(Vec<Field>),
}

/// One field of an object.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    /// Name.
    pub key: String,
    /// Line of the key.
    pub line: u32,
    /// Value.
    pub value: Node,
}

/// Text that is no YAML, or YAML that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SyntaxError {
    /// Line in the file, from 1.
    pub line: u32,
    /// What is wrong.
    pub message: String,
}

/// A key that one object holds twice; the later value counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DuplicateKey {
    /// Line of the later one.
    pub line: u32,
    /// The key.
    pub key: String,
}

impl Node {
    /// The field of that name, if this is an object that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(fields) => fields.iter().find(|field| field.key == key).map(|field| &field.value),
            _ => None,
        }
    }

    /// The string, if this is one.
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// Whether this is `null`.
    pub fn is_null(&self) -> bool {
        self.value == Value::Null
    }

    /// What JSON calls the type of this value.
    pub fn type_name(&self) -> &'static str {
        match self.value {
            Value::Null => "null",
            Value::Bool(_) => "bool",
            Value::Int(_) | Value::Float(_) => "number",
            Value::String(_) => "string",
            Value::List(_) => "array",
            Value::Map(_) => "object",
        }
    }

    /// The line of the field that `path` (`spec.ports[0].name`) names, or of the nearest thing above it that exists.
    /// A camelCase name also finds the snake_case spelling.
    pub fn line_of(&self, path: &str) -> u32 {
        let mut node = self;
        let mut line = self.line;
        let mut rest = path;
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix('[') {
                let Some((index, tail)) = after.split_once(']') else { break };
                rest = tail.strip_prefix('.').unwrap_or(tail);
                let item = match &node.value {
                    Value::List(items) => index.parse().ok().and_then(|i: usize| items.get(i)),
                    _ => None,
                };
                let Some(item) = item else { break };
                (node, line) = (item, item.line);
                continue;
            }
            let Value::Map(fields) = &node.value else { break };
            // Keys of labels and ports maps may hold dots, so the longest key that fits is the one meant.
            let fits = |field: &&Field| key_fits(&field.key, rest).is_some();
            let Some(field) = fields.iter().filter(fits).max_by_key(|field| field.key.len()) else { break };
            rest = key_fits(&field.key, rest).unwrap_or_default();
            (node, line) = (&field.value, field.line);
        }
        line
    }
}

/// What is left of `path` after `key`, if it begins with it.
fn key_fits<'p>(key: &str, path: &'p str) -> Option<&'p str> {
    let tail = path.strip_prefix(key).or_else(|| path.strip_prefix(&camel_case(key)))?;
    match tail.as_bytes().first() {
        None | Some(b'[') => Some(tail),
        Some(b'.') => Some(&tail[1..]),
        Some(_) => None,
    }
}

/// `target_port` as `targetPort`.
fn camel_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        match c {
            '_' => upper = true,
            c if upper => {
                out.push(c.to_ascii_uppercase());
                upper = false;
            }
            c => out.push(c),
        }
    }
    out
}

/// A document that was read.
#[derive(Debug)]
pub struct Parsed {
    /// The document; `null` if the text holds nothing but comments.
    pub root: Node,
    /// Keys given twice.
    pub duplicates: Vec<DuplicateKey>,
}

/// Reads one document that begins on line `first_line` of its file.
///
/// # Errors
/// Text that is no YAML, more than one document, nesting over 100 levels, or aliases that add over 100,000 nodes.
pub fn parse(text: &str, first_line: u32) -> Result<Parsed, SyntaxError> {
    let mut builder = Builder {
        first_line,
        stack: Vec::new(),
        anchors: HashMap::new(),
        aliased: 0,
        duplicates: Vec::new(),
        root: None,
    };
    for event in Parser::new_from_str(text) {
        match event {
            Ok((event, span)) => {
                let line = builder.line(span.start.line());
                builder.event(event, line)?;
            }
            Err(error) => {
                let line = builder.line(error.marker().line());
                // JSON has escapes (surrogate pairs) and blanks (tabs) that the YAML reader refuses.
                if text.trim_start().starts_with('{')
                    && let Ok(value) = serde_json::from_str(text)
                {
                    return Ok(Parsed { root: from_json(value, first_line), duplicates: Vec::new() });
                }
                return Err(SyntaxError { line, message: error.info().to_owned() });
            }
        }
    }
    let root = builder.root.unwrap_or(Node { line: first_line, value: Value::Null });
    Ok(Parsed { root, duplicates: builder.duplicates })
}

/// A value that has no lines of its own: all of it is on `line`.
pub fn from_json(value: serde_json::Value, line: u32) -> Node {
    let value = match value {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Bool(b) => Value::Bool(b),
        serde_json::Value::Number(n) => {
            n.as_i64().map_or_else(|| Value::Float(n.as_f64().unwrap_or(f64::NAN)), Value::Int)
        }
        serde_json::Value::String(s) => Value::String(s),
        serde_json::Value::Array(items) => Value::List(items.into_iter().map(|v| from_json(v, line)).collect()),
        serde_json::Value::Object(fields) => {
            Value::Map(fields.into_iter().map(|(key, v)| Field { key, line, value: from_json(v, line) }).collect())
        }
    };
    Node { line, value }
}

/// A collection that is not closed yet.
struct Open {
    node: Node,
    anchor: usize,
    /// The key that waits for its value.
    key: Option<(String, u32)>,
    /// Where each key of a large object stands, so that a million keys do not cost a million squared.
    index: HashMap<String, usize>,
}

/// Objects with fewer keys are searched.
const INDEX_FROM: usize = 32;

impl Open {
    fn position(&mut self, key: &str) -> Option<usize> {
        let Value::Map(fields) = &self.node.value else { return None };
        if fields.len() < INDEX_FROM {
            return fields.iter().position(|field| field.key == key);
        }
        for (at, field) in fields.iter().enumerate().skip(self.index.len()) {
            self.index.insert(field.key.clone(), at);
        }
        self.index.get(key).copied()
    }

    fn put(&mut self, key: String, line: u32, value: Node) -> Option<DuplicateKey> {
        let at = self.position(&key);
        let Value::Map(fields) = &mut self.node.value else { return None };
        let Some(at) = at else {
            fields.push(Field { key, line, value });
            return None;
        };
        fields[at] = Field { key: key.clone(), line, value };
        Some(DuplicateKey { line, key })
    }

    /// `<<: *base`: fields that the object does not have itself.
    fn merge(&mut self, node: Node) -> Result<(), SyntaxError> {
        let line = node.line;
        match node.value {
            Value::Map(base) => {
                for field in base {
                    if self.position(&field.key).is_none() {
                        self.put(field.key, field.line, field.value);
                    }
                }
                Ok(())
            }
            Value::List(bases) => bases.into_iter().try_for_each(|base| self.merge(base)),
            _ => Err(SyntaxError { line, message: "a merge key needs an object".into() }),
        }
    }
}

struct Builder {
    first_line: u32,
    stack: Vec<Open>,
    anchors: HashMap<usize, Node>,
    aliased: usize,
    duplicates: Vec<DuplicateKey>,
    root: Option<Node>,
}

impl Builder {
    fn line(&self, line: usize) -> u32 {
        self.first_line.saturating_add(u32::try_from(line.saturating_sub(1)).unwrap_or(u32::MAX))
    }

    fn event(&mut self, event: Event<'_>, line: u32) -> Result<(), SyntaxError> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let string = style != ScalarStyle::Plain
                    || tag.is_some_and(|tag| tag.is_yaml_core_schema() && tag.suffix == "str");
                let value = if string { Value::String(text.into_owned()) } else { scalar::resolve(&text) };
                // A number or boolean as a key is the string it was written as.
                if let Some(open) = self.stack.last_mut()
                    && matches!(open.node.value, Value::Map(_))
                    && open.key.is_none()
                    && !matches!(value, Value::String(_))
                {
                    return self.add(Node { line, value: Value::String(text_of(&value)) }, anchor);
                }
                self.add(Node { line, value }, anchor)
            }
            Event::SequenceStart(anchor, _) => self.open(line, Value::List(Vec::new()), anchor),
            Event::MappingStart(anchor, _) => self.open(line, Value::Map(Vec::new()), anchor),
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(open) = self.stack.pop() else { return Ok(()) };
                self.add(open.node, open.anchor)
            }
            Event::Alias(anchor) => {
                let Some(target) = self.anchors.get(&anchor) else {
                    return Err(SyntaxError { line, message: "alias to an anchor that is not closed".into() });
                };
                self.aliased = self.aliased.saturating_add(size(target));
                if self.aliased > MAX_ALIASED {
                    let message = format!("aliases expand to more than {MAX_ALIASED} values");
                    return Err(SyntaxError { line, message });
                }
                if self.stack.len() + depth(target) > MAX_DEPTH {
                    return Err(too_deep(line));
                }
                let node = Node { line, value: target.value.clone() };
                self.add(node, 0)
            }
            Event::DocumentStart(_) if self.root.is_some() => {
                Err(SyntaxError { line, message: "a second document without a line that begins with ---".into() })
            }
            _ => Ok(()),
        }
    }

    fn open(&mut self, line: u32, value: Value, anchor: usize) -> Result<(), SyntaxError> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(too_deep(line));
        }
        self.stack.push(Open { node: Node { line, value }, anchor, key: None, index: HashMap::new() });
        Ok(())
    }

    fn add(&mut self, node: Node, anchor: usize) -> Result<(), SyntaxError> {
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(open) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        if let Value::List(items) = &mut open.node.value {
            items.push(node);
            return Ok(());
        }
        match (open.key.take(), node.value) {
            (None, Value::String(key)) => open.key = Some((key, node.line)),
            (None, _) => return Err(SyntaxError { line: node.line, message: "a key must be a scalar".into() }),
            (Some((key, _)), value) if key == "<<" => open.merge(Node { line: node.line, value })?,
            (Some((key, line)), value) => {
                self.duplicates.extend(open.put(key, line, Node { line: node.line, value }));
            }
        }
        Ok(())
    }
}

fn too_deep(line: u32) -> SyntaxError {
    SyntaxError { line, message: format!("nested more than {MAX_DEPTH} levels deep") }
}

fn size(node: &Node) -> usize {
    match &node.value {
        Value::List(items) => 1 + items.iter().map(size).sum::<usize>(),
        Value::Map(fields) => 1 + fields.iter().map(|field| size(&field.value)).sum::<usize>(),
        _ => 1,
    }
}

fn depth(node: &Node) -> usize {
    match &node.value {
        Value::List(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Map(fields) => 1 + fields.iter().map(|field| depth(&field.value)).max().unwrap_or(0),
        _ => 0,
    }
}

fn text_of(value: &Value) -> String {
    match value {
        Value::Bool(b) => b.to_string(),
        Value::Int(i) => i.to_string(),
        Value::Float(f) => f.to_string(),
        Value::String(s) => s.clone(),
        Value::Null | Value::List(_) | Value::Map(_) => "null".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_line() {
        let text = "kind: X\nspec:\n  hosts:\n  - a\n  - b\n  ports:\n  - number: 80\n    target_port: 1\n  labels: {a.b/c: d}\n";
        let root = parse(text, 10).unwrap().root;
        for (path, line) in [
            ("kind", 10),
            ("spec.hosts[1]", 14),
            ("spec.ports[0].targetPort", 17),
            ("spec.ports[0].name", 16),
            ("spec.labels.a.b/c", 18),
            ("metadata", 10),
        ] {
            assert_eq!(root.line_of(path), line, "{path}");
        }
    }

    #[test]
    fn an_alias_bomb_is_refused() {
        let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..10 {
            let list = vec![format!("*a{}", i - 1); 10].join(",");
            text.push_str(&format!("a{i}: &a{i} [{list}]\n"));
        }
        let error = parse(&text, 1).unwrap_err();
        assert!(error.message.contains("aliases expand"), "{error:?}");
    }

    #[test]
    fn a_tower_of_brackets_is_refused() {
        let text = "[".repeat(50_000);
        assert!(parse(&text, 1).is_err());
    }

    #[test]
    fn merge_keys_fill_in_what_is_missing() {
        let root = parse("base: &b {a: 1, b: 2}\nmine:\n  <<: *b\n  b: 3\n", 1).unwrap().root;
        let mine = root.get("mine").unwrap();
        assert_eq!(mine.get("a").unwrap().value, Value::Int(1));
        assert_eq!(mine.get("b").unwrap().value, Value::Int(3));
    }

    #[test]
    fn json_with_tabs_and_surrogates_is_read() {
        let root = parse("{\n\t\"a\": \"\\ud83d\\ude00\",\n\t\"b\": [1, null]\n}", 1).unwrap().root;
        assert_eq!(root.get("a").unwrap().as_str(), Some("\u{1f600}"));
    }

    #[test]
    fn a_key_given_twice_is_told() {
        let parsed = parse("a: 1\nb: 2\na: 3\n", 1).unwrap();
        assert_eq!(parsed.root.get("a").unwrap().value, Value::Int(3));
        assert_eq!(parsed.duplicates, [DuplicateKey { line: 3, key: "a".into() }]);
    }
}
