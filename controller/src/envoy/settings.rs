//! What an Envoy says of itself in its node's metadata, so that its listeners can be made: the bootstrap writes it, and
//! discovery reads it.

use std::net::{IpAddr, SocketAddr};

use portolan_proto::envoy::envoy::config::core::v3::Node;
use portolan_proto::envoy::google::protobuf::{Struct, Value, value::Kind};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The field of the node's metadata.
pub const FIELD: &str = "PORTOLAN";

/// The field of the node's metadata, of `proxy-host` too, that names the folder of the mesh's certificates.
pub const MESH_CERTIFICATES: &str = "MESH_CERTIFICATES";

/// What to do before the filter has its first snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum NoSnapshot {
    /// Refuse: 503 with a reason, or a closed connection
    #[default]
    Closed,
    /// Let pass to where it was going
    Open,
}

/// The settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Settings {
    /// Path of `filter.wasm`, where Envoy runs.
    pub filter: String,
    /// Envoy's name of the controller's cluster.
    pub controller: String,
    /// Port that iptables redirects to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transparent: Option<u16>,
    /// HTTP proxy listeners.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub http_proxy: Vec<SocketAddr>,
    /// Address on which each port of the registry is really bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bind_ports: Option<IpAddr>,
    /// Folder of the secrets that Gateways name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<String>,
    /// What to do before there is a snapshot.
    #[serde(default)]
    pub no_snapshot: NoSnapshot,
    /// File of the access log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_log: Option<String>,
}

/// Why no listeners can be made for a node.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The node says nothing.
    #[error("node metadata has no field {FIELD}: make the bootstrap with `portolan bootstrap envoy`")]
    Missing,
    /// A field is wrong.
    #[error("node metadata {FIELD}: {0}")]
    Field(#[from] serde_json::Error),
}

impl Settings {
    /// Reads a node's settings.
    ///
    /// # Errors
    /// There are none, or a field is wrong.
    pub fn read(node: &Node) -> Result<Self, SettingsError> {
        let field = node.metadata.as_ref().and_then(|m| m.fields.get(FIELD)).ok_or(SettingsError::Missing)?;
        Ok(serde_json::from_value(json(field))?)
    }
}

fn json(value: &Value) -> serde_json::Value {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => serde_json::Value::Null,
        Some(Kind::BoolValue(value)) => (*value).into(),
        // Numbers of a Struct are doubles; ours are ports.
        Some(Kind::NumberValue(value)) if value.fract() == 0.0 && (0.0..=65535.0).contains(value) => {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let port = *value as u16;
            port.into()
        }
        Some(Kind::NumberValue(value)) => (*value).into(),
        Some(Kind::StringValue(value)) => value.as_str().into(),
        Some(Kind::ListValue(list)) => list.values.iter().map(json).collect(),
        Some(Kind::StructValue(Struct { fields })) => fields.iter().map(|(k, v)| (k.clone(), json(v))).collect(),
    }
}
