//! Envoy's foreign functions `expr_create`, `expr_evaluate` and `expr_delete`: CEL over the attributes of a stream.

use std::{
    collections::{BTreeMap, HashMap},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use cel::{
    Context, Program, Value,
    objects::{Key, Map},
};

use super::{HostState, properties};
use crate::vm::abi::{Status, read_pairs, write_pairs};
use crate::vm::stored::{self, Stored};

/// Bytes of an expression, and expressions of one root: a guest must not fill the host's memory.
const LONGEST: usize = 64 << 10;
const MOST: usize = 4096;

/// The expressions of a root context.
#[derive(Default)]
pub(in crate::vm) struct Expressions {
    next: u32,
    programs: BTreeMap<u32, (Arc<Program>, Option<Bare>)>,
}

/// An expression that is no more than a name whose value Envoy gives otherwise than any map.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bare {
    /// It has no bytes.
    Attributes,
    /// A message, which is empty.
    Metadata,
    /// All that there are, without the one that stands for another.
    RequestHeaders,
}

impl Bare {
    fn of(text: &str) -> Option<Self> {
        match text.trim() {
            "metadata" => Some(Self::Metadata),
            "request.headers" => Some(Self::RequestHeaders),
            "filter_state" => Some(Self::Attributes),
            name => ATTRIBUTES.iter().any(|(root, _)| *root == name).then_some(Self::Attributes),
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Int,
    Uint,
    Bool,
    Duration,
    Time,
    Headers,
}

/// Envoy's attributes and their types in CEL.
const ATTRIBUTES: &[(&str, &[(&str, Kind)])] = &[
    (
        "request",
        &[
            ("path", Kind::Text),
            ("url_path", Kind::Text),
            ("host", Kind::Text),
            ("scheme", Kind::Text),
            ("method", Kind::Text),
            ("referer", Kind::Text),
            ("useragent", Kind::Text),
            ("id", Kind::Text),
            ("protocol", Kind::Text),
            ("query", Kind::Text),
            ("headers", Kind::Headers),
            ("time", Kind::Time),
            ("duration", Kind::Duration),
            ("size", Kind::Int),
            ("total_size", Kind::Int),
        ],
    ),
    (
        "response",
        &[
            ("code", Kind::Int),
            ("code_details", Kind::Text),
            ("flags", Kind::Int),
            ("grpc_status", Kind::Int),
            ("headers", Kind::Headers),
            ("trailers", Kind::Headers),
            ("size", Kind::Int),
            ("total_size", Kind::Int),
            ("backend_latency", Kind::Duration),
        ],
    ),
    ("connection", &[("id", Kind::Uint), ("mtls", Kind::Bool)]),
    ("source", &[("address", Kind::Text), ("port", Kind::Int)]),
    ("destination", &[("address", Kind::Text), ("port", Kind::Int)]),
    (
        "upstream",
        &[
            ("address", Kind::Text),
            ("port", Kind::Int),
            ("local_address", Kind::Text),
            ("request_attempt_count", Kind::Uint),
        ],
    ),
    (
        "xds",
        &[
            ("cluster_name", Kind::Text),
            ("route_name", Kind::Text),
            ("virtual_host_name", Kind::Text),
            ("filter_chain_name", Kind::Text),
            ("listener_direction", Kind::Int),
        ],
    ),
];

/// Compiles an expression for the guest's root; its token, little-endian.
pub(super) fn create(state: &mut HostState, text: &[u8]) -> Result<Vec<u8>, Status> {
    let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= LONGEST).ok_or(Status::BadArgument)?;
    // A parser's bug must not end a worker.
    let compiled = catch_unwind(|| Program::compile(text)).map_err(|_| Status::InternalFailure)?;
    let program = compiled.map_err(|error| {
        tracing::info!("expr_create: {error}");
        Status::BadArgument
    })?;
    let Expressions { next, programs } = &mut state.root_of_mut(state.current).ok_or(Status::BadArgument)?.expressions;
    if programs.len() >= MOST {
        return Err(Status::InternalFailure);
    }
    while programs.contains_key(next) {
        *next = next.wrapping_add(1);
    }
    let token = *next;
    *next = next.wrapping_add(1);
    programs.insert(token, (Arc::new(program), Bare::of(text)));
    Ok(token.to_le_bytes().to_vec())
}

/// The value of an expression for the stream that the guest looks at.
pub(super) fn evaluate(state: &HostState, token: &[u8]) -> Result<Vec<u8>, Status> {
    let token = token_of(token)?;
    let root = state.root_of(state.current);
    let (program, bare) = root.and_then(|root| root.expressions.programs.get(&token)).ok_or(Status::NotFound)?;
    let value = catch_unwind(AssertUnwindSafe(|| {
        let mut context = Context::default();
        for name in program.references().variables() {
            if let Some(value) = variable(state, name) {
                context.add_variable_from_value(name, value);
            }
        }
        program.execute(&context)
    }));
    let value = value.map_err(|_| Status::InternalFailure)?.map_err(|error| {
        tracing::debug!("expr_evaluate: {error}");
        Status::InternalFailure
    })?;
    match bare {
        Some(Bare::Metadata) => Ok(Vec::new()),
        Some(Bare::Attributes) => Err(Status::SerializationFailure),
        Some(Bare::RequestHeaders) => {
            let mut out = Vec::new();
            properties::find(state, state.current, b"request\0headers", &[b"request", b"headers"], &mut out)?;
            Ok(out)
        }
        None => serialize(&value),
    }
}

/// Forgets an expression.
pub(super) fn delete(state: &mut HostState, token: &[u8]) -> Result<Vec<u8>, Status> {
    let token = token_of(token)?;
    if let Some(root) = state.root_of_mut(state.current) {
        root.expressions.programs.remove(&token);
    }
    Ok(Vec::new())
}

fn token_of(bytes: &[u8]) -> Result<u32, Status> {
    bytes.try_into().map(u32::from_le_bytes).map_err(|_| Status::BadArgument)
}

fn variable(state: &HostState, name: &str) -> Option<Value> {
    let find = |path: &[&[u8]]| {
        let mut out = Vec::new();
        properties::find(state, state.current, &path.join(&0), path, &mut out).ok().map(|()| out)
    };
    if let Some((root, attributes)) = ATTRIBUTES.iter().find(|(root, _)| *root == name) {
        let found = attributes.iter().filter_map(|(attribute, kind)| {
            let raw = find(&[root.as_bytes(), attribute.as_bytes()])?;
            Some(((*attribute).to_owned(), typed(raw, *kind)?))
        });
        let node = (*root == "xds").then(|| {
            let part = |part: &str| find(&[b"xds", b"node", part.as_bytes()]).and_then(|raw| typed(raw, Kind::Text));
            map(["id", "cluster"].into_iter().filter_map(|name| Some((name.to_owned(), part(name)?))))
        });
        return Some(map(found.chain(node.map(|node| ("node".to_owned(), node)))));
    }
    match name {
        "filter_state" => {
            let stream = state.streams.get(&state.current)?;
            let shared = stream.properties.connection().map(|connection| connection.0.borrow());
            // What the stream has of its own comes last, and so before what the connection has.
            let both = || [shared.as_deref(), Some(&stream.stored)].into_iter().flatten();
            let own = both().flat_map(Stored::properties).filter_map(|property| {
                let name = std::str::from_utf8(property.name()).ok()?;
                let value = match property.shown()? {
                    stored::Shown::Text(text) => Value::from(String::from_utf8(text.to_vec()).ok()?),
                    stored::Shown::Bytes(bytes) => Value::from(bytes.to_vec()),
                };
                Some((format!("wasm.{name}"), value))
            });
            let objects = both()
                .flat_map(|stored| stored.filter_state.iter())
                .filter_map(|(key, value)| Some((key.to_owned(), Value::from(stored::text_of(key, value)?.to_vec()))));
            Some(map(own.chain(objects)))
        }
        "node" => {
            let of_node = |part: &str| find(&[b"node", part.as_bytes()]).and_then(|raw| typed(raw, Kind::Text));
            Some(map(["id", "cluster"].into_iter().filter_map(|part| Some((part.to_owned(), of_node(part)?)))))
        }
        "metadata" => Some(map([("filter_metadata".to_owned(), map(std::iter::empty()))].into_iter())),
        "plugin_name" | "plugin_root_id" | "plugin_vm_id" => typed(find(&[name.as_bytes()])?, Kind::Text),
        _ => None,
    }
}

fn map(pairs: impl Iterator<Item = (String, Value)>) -> Value {
    let map: HashMap<Key, Value> = pairs.map(|(key, value)| (Key::String(Arc::new(key)), value)).collect();
    Value::Map(Map { map: Arc::new(map) })
}

/// An attribute as CEL has it, from the bytes that a guest would get.
fn typed(raw: Vec<u8>, kind: Kind) -> Option<Value> {
    let number = || <[u8; 8]>::try_from(&*raw).map(i64::from_le_bytes).ok();
    Some(match kind {
        Kind::Text => match String::from_utf8(raw) {
            Ok(text) => Value::from(text),
            Err(error) => Value::from(error.into_bytes()),
        },
        Kind::Int => Value::Int(number()?),
        Kind::Uint => Value::UInt(number()?.cast_unsigned()),
        Kind::Bool => Value::Bool(raw.first()? != &0),
        Kind::Duration => Value::Duration(chrono::Duration::nanoseconds(number()?)),
        Kind::Time => Value::Timestamp(chrono::DateTime::from_timestamp_nanos(number()?).fixed_offset()),
        Kind::Headers => {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let mut joined: BTreeMap<String, String> = BTreeMap::new();
            // As Envoy: of several values, all of them with commas between.
            for (name, value) in read_pairs(&raw).ok()? {
                let have = joined.entry(text(name)).or_default();
                if !have.is_empty() {
                    have.push(',');
                }
                have.push_str(&text(value));
            }
            // As Envoy: a request's `host` is its `:authority`, though no key of the map.
            if let Some(authority) = joined.get(":authority").cloned() {
                joined.insert("host".to_owned(), authority);
            }
            map(joined.into_iter().map(|(name, value)| (name, Value::from(value))))
        }
    })
}

/// A value as Envoy gives it to a guest: text as it is, numbers, times and durations (nanoseconds) as 8 bytes
/// little-endian, booleans as one byte, maps and lists as pairs.
fn serialize(value: &Value) -> Result<Vec<u8>, Status> {
    let nanoseconds = |count: Option<i64>| count.map(|count| count.to_le_bytes().to_vec());
    let bytes = match value {
        Value::String(text) => Some(text.as_bytes().to_vec()),
        Value::Bytes(bytes) => Some(bytes.to_vec()),
        Value::Int(number) => Some(number.to_le_bytes().to_vec()),
        Value::UInt(number) => Some(number.to_le_bytes().to_vec()),
        Value::Float(number) => Some(number.to_le_bytes().to_vec()),
        Value::Bool(is) => Some(vec![u8::from(*is)]),
        Value::Duration(time) => nanoseconds(time.num_nanoseconds()),
        Value::Timestamp(time) => nanoseconds(time.timestamp_nanos_opt()),
        Value::Map(map) => {
            let pair = |(key, value): (&Key, &Value)| {
                let key = match key {
                    Key::String(text) => text.as_bytes().to_vec(),
                    Key::Int(number) => number.to_le_bytes().to_vec(),
                    Key::Uint(number) => number.to_le_bytes().to_vec(),
                    Key::Bool(is) => vec![u8::from(*is)],
                };
                Some((key, serialize(value).ok()?))
            };
            map.map.iter().map(pair).collect::<Option<BTreeMap<_, _>>>().map(|all| pairs(all.iter()))
        }
        // As Envoy: each value is the name of a pair.
        Value::List(list) => {
            let all: Option<Vec<_>> = list.iter().map(|value| Some((serialize(value).ok()?, Vec::new()))).collect();
            all.map(|all| pairs(all.iter().map(|(value, nothing)| (value, nothing))))
        }
        _ => None,
    };
    bytes.ok_or(Status::SerializationFailure)
}

fn pairs<'a>(all: impl Iterator<Item = (&'a Vec<u8>, &'a Vec<u8>)> + Clone) -> Vec<u8> {
    let mut out = Vec::new();
    write_pairs(&mut out, || all.clone().map(|(name, value)| (&name[..], &value[..])));
    out
}
