//! What a guest stores with a stream: properties of its own, declared or not, and objects of Envoy's filter state.

use super::abi::Status;
use super::stream::FilterState;
use bytes::Bytes;
use prost::Message;
use std::cell::RefCell;

/// How a property's bytes are meant (Envoy's `WasmType`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Bytes, as of a property that nobody declared. A table of `FlatBuffers` is no more than that here.
    #[default]
    Bytes,
    /// Text.
    Text,
    /// A message that Envoy's expressions have as text: `google.protobuf.StringValue`.
    TextMessage,
    /// Another message.
    Message,
}

/// What a root context has declared of a property.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Declared {
    meaning: Meaning,
    readonly: bool,
    with_connection: bool,
}

/// Envoy's `envoy.source.extensions.common.wasm.DeclarePropertyArguments`.
#[derive(Clone, PartialEq, Message)]
struct DeclareProperty {
    #[prost(bytes = "bytes", tag = "1")]
    name: Bytes,
    #[prost(bool, tag = "2")]
    readonly: bool,
    #[prost(int32, tag = "3")]
    kind: i32,
    #[prost(bytes = "bytes", tag = "4")]
    schema: Bytes,
    #[prost(int32, tag = "5")]
    span: i32,
}

/// Envoy's `LifeSpan.DownstreamConnection`.
pub(super) const WITH_CONNECTION: i32 = 2;

impl Declared {
    /// Reads the arguments of `declare_property`: the property's name, and what it is to be.
    pub(super) fn decode(arguments: &[u8]) -> Result<(Bytes, Self), Status> {
        // Envoy takes no arguments for none at all.
        if arguments.is_empty() {
            return Err(Status::BadArgument);
        }
        let told = DeclareProperty::decode(arguments).map_err(|_| Status::BadArgument)?;
        let meaning = match told.kind {
            1 => Meaning::Text,
            3 if told.schema.ends_with(b"/google.protobuf.StringValue") => Meaning::TextMessage,
            3 => Meaning::Message,
            _ => Meaning::Bytes,
        };
        let with_connection = told.span == WITH_CONNECTION;
        Ok((told.name, Self { meaning, readonly: told.readonly, with_connection }))
    }
}

/// What a root context, or a stream for nobody's use, has declared.
#[derive(Default)]
pub(super) struct Declarations(Vec<(Bytes, Declared)>);

impl Declarations {
    /// Declares a property, which can be done once.
    pub(super) fn declare(&mut self, (name, declared): (Bytes, Declared)) -> Result<(), Status> {
        if self.get(&name).is_some() {
            return Err(Status::BadArgument);
        }
        self.0.push((name, declared));
        Ok(())
    }

    pub(super) fn get(&self, name: &[u8]) -> Option<Declared> {
        self.0.iter().find(|(have, _)| have == name).map(|(_, declared)| *declared)
    }
}

/// A property that a guest has set.
#[derive(Clone, Debug)]
pub(super) struct Property {
    name: Bytes,
    value: Bytes,
    declared: Declared,
}

/// A property as the filter state shows it.
pub(super) enum Shown {
    Bytes(Bytes),
    Text(Bytes),
}

impl Property {
    pub(super) fn name(&self) -> &[u8] {
        &self.name
    }

    pub(super) fn value(&self) -> &Bytes {
        &self.value
    }

    /// `None`: it is not what it was declared to be.
    pub(super) fn shown(&self) -> Option<Shown> {
        Some(match self.declared.meaning {
            Meaning::Bytes | Meaning::Message => Shown::Bytes(self.value.clone()),
            Meaning::Text => Shown::Text(self.value.clone()),
            Meaning::TextMessage => Shown::Text(String::decode(self.value.clone()).ok()?.into()),
        })
    }

    fn replace(&mut self, value: Bytes) -> Result<(), Status> {
        if self.declared.readonly {
            return Err(Status::BadArgument);
        }
        self.value = value;
        Ok(())
    }
}

/// Properties and filter state of a stream, or of a connection with many streams.
#[derive(Default)]
pub(super) struct Stored {
    properties: Vec<Property>,
    pub(super) filter_state: FilterState,
}

impl Stored {
    pub(super) fn property(&self, name: &[u8]) -> Option<&Property> {
        self.properties.iter().find(|property| property.name == name)
    }

    pub(super) fn properties(&self) -> impl Iterator<Item = &Property> {
        self.properties.iter()
    }

    fn property_mut(&mut self, name: &[u8]) -> Option<&mut Property> {
        self.properties.iter_mut().find(|property| property.name == name)
    }

    /// Sets a property in the stream or, where it is there or was declared for it, in the connection.
    pub(super) fn set(
        &mut self,
        connection: Option<&ConnectionState>,
        declared: Declared,
        name: &[u8],
        value: Bytes,
    ) -> Result<(), Status> {
        if let Some(have) = self.property_mut(name) {
            return have.replace(value);
        }
        let new = |value| Property { name: Bytes::copy_from_slice(name), value, declared };
        if let Some(connection) = connection {
            let mut shared = connection.0.borrow_mut();
            if let Some(have) = shared.property_mut(name) {
                return have.replace(value);
            }
            if declared.with_connection {
                shared.properties.push(new(value));
                return Ok(());
            }
        }
        self.properties.push(new(value));
        Ok(())
    }
}

/// What streams of one connection have stored with it.
#[derive(Default)]
pub struct ConnectionState(pub(super) RefCell<Stored>);

/// What Envoy makes of the bytes that are given for an object of its filter state.
#[derive(Clone, Copy)]
enum Object {
    /// Any text.
    Text,
    /// Text, but not the empty one.
    SomeText,
    /// Anything, which nobody can read again.
    Hidden,
    Bool,
    /// Only `true` is true.
    True,
    U32,
    U64,
    Ip,
    Address,
    /// A host and an address, with a comma between.
    Proxy,
    /// None that a guest could sensibly give.
    Never,
}

/// The keys that Envoy knows; a guest can set no other.
fn object(key: &str) -> Option<Object> {
    Some(match key {
        "envoy.hashable_string"
        | "envoy.network.network_namespace"
        | "envoy.network.upstream_server_name"
        | "envoy.network.upstream_subject_alt_names"
        | "envoy.string"
        | "envoy.tcp_proxy.cluster"
        | "envoy.upstream.dynamic_host" => Object::Text,
        "envoy.ai.model.request" => Object::SomeText,
        "envoy.network.application_protocols" | "envoy.router.debug_config" => Object::Hidden,
        "envoy.bool" => Object::Bool,
        "envoy.tcp_proxy.disable_tunneling" => Object::True,
        "envoy.ratelimit.hits_addend" | "envoy.upstream.dynamic_port" => Object::U32,
        "envoy.tcp_proxy.per_connection_idle_timeout_ms" => Object::U64,
        "envoy.network.ip" => Object::Ip,
        "envoy.filters.listener.original_dst.local_ip"
        | "envoy.filters.listener.original_dst.remote_ip"
        | "envoy.network.transport_socket.original_dst_address" => Object::Address,
        "envoy.network.transport_socket.http_11_proxy.info" => Object::Proxy,
        "envoy.ai.llm_protocol.request" => Object::Never,
        _ => return None,
    })
}

fn boolean(text: &str) -> Option<bool> {
    match &*text.to_ascii_lowercase() {
        "true" | "t" | "yes" | "y" | "1" => Some(true),
        "false" | "f" | "no" | "n" | "0" => Some(false),
        _ => None,
    }
}

fn address(text: &str) -> Option<std::net::SocketAddr> {
    text.parse().ok()
}

/// Whether Envoy makes an object of this value.
///
/// # Errors
/// [`Status::NotFound`]: it knows no such key; [`Status::BadArgument`]: the value is none for it.
pub(super) fn check(key: &str, value: &[u8]) -> Result<(), Status> {
    let object = object(key).ok_or(Status::NotFound)?;
    let text = std::str::from_utf8(value);
    let is = |test: &dyn Fn(&str) -> bool| text.is_ok_and(test);
    let good = match object {
        Object::Text | Object::Hidden | Object::True => true,
        Object::SomeText => !value.is_empty(),
        Object::Bool => is(&|text| boolean(text).is_some()),
        Object::U32 => is(&|text| text.trim_ascii().parse::<u32>().is_ok()),
        Object::U64 => is(&|text| text.trim_ascii().parse::<u64>().is_ok()),
        Object::Ip => is(&|text| text.parse::<std::net::IpAddr>().is_ok()),
        Object::Address => is(&|text| address(text).is_some()),
        Object::Proxy => is(&|text| text.split_once(',').is_some_and(|(_, to)| address(to).is_some())),
        Object::Never => false,
    };
    if good { Ok(()) } else { Err(Status::BadArgument) }
}

/// An object of the filter state as text, where it has a text.
pub(super) fn text_of(key: &str, value: &Bytes) -> Option<Bytes> {
    let text = || std::str::from_utf8(value).ok();
    let number = |number: u64| Some(Bytes::from(number.to_string()));
    match object(key)? {
        Object::Text | Object::SomeText => Some(value.clone()),
        Object::Bool => boolean(text()?).map(|is| Bytes::from(is.to_string())),
        Object::True => Some(Bytes::from((value == "true").to_string())),
        Object::U32 | Object::U64 => number(text()?.trim_ascii().parse().ok()?),
        Object::Ip => {
            let ip = text()?.parse().ok()?;
            Some(Bytes::from(std::net::SocketAddr::new(ip, 0).to_string()))
        }
        Object::Hidden | Object::Address | Object::Proxy | Object::Never => None,
    }
}

/// An address in the filter state has fields.
pub(super) fn field_of(key: &str, value: &[u8], field: &[u8]) -> Option<Bytes> {
    let Object::Address = object(key)? else { return None };
    let address = address(std::str::from_utf8(value).ok()?)?;
    match field {
        b"ip" => Some(Bytes::from(address.ip().to_string())),
        b"port" => Some(Bytes::copy_from_slice(&i64::from(address.port()).to_le_bytes())),
        _ => None,
    }
}

/// Whether an object is a map of fields, which Envoy gives as an empty one.
pub(super) fn has_fields(key: &str) -> bool {
    matches!(object(key), Some(Object::Address))
}
