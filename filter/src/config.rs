//! The plugin's configuration, a JSON object. All of it is optional; a field that is not known is an error.
//!
//! | field | value | default |
//! |---|---|---|
//! | `controller` | the host's name of the cluster that serves the registry | `portolan` |
//! | `namespace` | namespace of the workload | node metadata `NAMESPACE`, or the namespace in the node id |
//! | `labels` | object of strings | node metadata `LABELS` |
//! | `role` | `sidecar` or `gateway` | from the node id: `router~…` is a gateway |
//! | `ips` | list of addresses of the workload | node metadata `INSTANCE_IPS` |
//! | `locality` | `region/zone/subzone` | the node's locality |
//! | `dns_capture` | whether names are resolved by a DNS proxy that knows the registry's addresses | node metadata `DNS_CAPTURE` |
//! | `no_snapshot` | `closed`: refuse until there is a snapshot; `open`: let pass | `closed` |
//! | `report_decisions` | whether to say why each request or connection was decided as it was, for an access log | false |
//! | `destination_header` | whether the host says where each request came in, whatever a client says: in the header
//! `x-portolan-destination`, its address and port or `proxy`. It costs less than to ask the host | false |
//! | `subscriber` | name in the controller's log | node id and root context |

use std::collections::BTreeMap;
use std::net::IpAddr;

use portolan_proto::v1::{Role, Scope};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::host::pairs::Pairs;
use crate::host::{Host, Status};

/// Why a configuration was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// The host does not give it.
    #[error("host does not give it: {0}")]
    Host(Status),
    /// Not a JSON object.
    #[error("expected a JSON object: {0}")]
    Json(String),
    /// A field that does not exist.
    #[error("unknown field `{0}`")]
    Unknown(String),
    /// A field with a value that it cannot have.
    #[error("field `{field}`: expected {expected}")]
    Value {
        /// The field.
        field: String,
        /// What it can be.
        expected: &'static str,
    },
    /// Neither configured nor known from the node.
    #[error("field `{0}`: not configured, and the node does not say it")]
    Missing(&'static str),
}

/// What to do before there is a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NoSnapshot {
    /// Refuse: 503 for a request; a connection is closed.
    #[default]
    Closed,
    /// Let it pass to where it was going.
    Open,
}

/// The checked configuration; `None`: ask the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The host's name of the controller's cluster.
    pub controller: String,
    /// Namespace of the workload.
    pub namespace: Option<String>,
    /// Labels of the workload.
    pub labels: Option<BTreeMap<String, String>>,
    /// Its role.
    pub role: Option<Role>,
    /// Its addresses.
    pub ips: Option<Vec<String>>,
    /// `region/zone/subzone`
    pub locality: Option<String>,
    /// Whether a DNS proxy answers with the registry's addresses.
    pub dns_capture: Option<bool>,
    /// What to do before there is a snapshot.
    pub no_snapshot: NoSnapshot,
    /// Whether to set [`DECISION`](crate::host::DECISION).
    pub report_decisions: bool,
    /// Whether the host sets [`DESTINATION_HEADER`](crate::http::DESTINATION_HEADER).
    pub destination_header: bool,
    /// Name in the controller's log.
    pub subscriber: Option<String>,
}

impl Config {
    /// Reads a configuration; nothing at all is the default one.
    pub fn parse(bytes: &[u8]) -> Result<Config, ConfigError> {
        let mut fields = if bytes.trim_ascii().is_empty() {
            Map::new()
        } else {
            match serde_json::from_slice(bytes) {
                Ok(Value::Object(fields)) => fields,
                Ok(_) => return Err(ConfigError::Json("it is another kind of value".to_owned())),
                Err(error) => return Err(ConfigError::Json(error.to_string())),
            }
        };
        let role = choice(&mut fields, "role", "`sidecar` or `gateway`", |value| match value {
            "sidecar" => Some(Role::Sidecar),
            "gateway" => Some(Role::Gateway),
            _ => None,
        })?;
        let no_snapshot = choice(&mut fields, "no_snapshot", "`closed` or `open`", |value| match value {
            "closed" => Some(NoSnapshot::Closed),
            "open" => Some(NoSnapshot::Open),
            _ => None,
        })?;
        let config = Config {
            controller: text(&mut fields, "controller")?.unwrap_or_else(|| "portolan".to_owned()),
            namespace: text(&mut fields, "namespace")?,
            labels: labels(&mut fields)?,
            role,
            ips: ips(&mut fields)?,
            locality: text(&mut fields, "locality")?,
            dns_capture: flag(&mut fields, "dns_capture")?,
            no_snapshot: no_snapshot.unwrap_or_default(),
            report_decisions: flag(&mut fields, "report_decisions")?.unwrap_or_default(),
            destination_header: flag(&mut fields, "destination_header")?.unwrap_or_default(),
            subscriber: text(&mut fields, "subscriber")?,
        };
        match fields.keys().next() {
            Some(field) => Err(ConfigError::Unknown(field.clone())),
            None => Ok(config),
        }
    }

    /// Whom the plugin subscribes for, with the node's word on what is not configured.
    pub fn scope(&self, host: &impl Host) -> Result<Scope, ConfigError> {
        let id = string(host, "id").unwrap_or_default();
        let role = self.role.unwrap_or(if id.starts_with("router~") { Role::Gateway } else { Role::Sidecar });
        let namespace = self.namespace.clone().or_else(|| string(host, "metadata\0NAMESPACE"));
        let namespace = namespace.or_else(|| {
            // TYPE~IP~NAME.NAMESPACE~NAMESPACE.svc.DOMAIN
            id.split('~').nth(3)?.split('.').next().filter(|s| !s.is_empty()).map(str::to_owned)
        });
        Ok(Scope {
            namespace: namespace.ok_or(ConfigError::Missing("namespace"))?,
            labels: self.labels.clone().unwrap_or_else(|| node_labels(host)),
            role: role.into(),
            ips: self.ips.clone().unwrap_or_else(|| node_ips(host)),
            locality: self.locality.clone().unwrap_or_else(|| node_locality(host)),
            dns_capture: self
                .dns_capture
                .unwrap_or_else(|| string(host, "metadata\0DNS_CAPTURE").is_some_and(|value| value == "true")),
        })
    }

    /// Name of the plugin in the controller's log.
    pub fn subscriber(&self, host: &impl Host, context: u32) -> String {
        self.subscriber.clone().unwrap_or_else(|| {
            let node = string(host, "id").unwrap_or_else(|| "unknown".to_owned());
            format!("{node}#{context}")
        })
    }
}

fn value_error(field: impl Into<String>, expected: &'static str) -> ConfigError {
    ConfigError::Value { field: field.into(), expected }
}

fn text(fields: &mut Map<String, Value>, field: &str) -> Result<Option<String>, ConfigError> {
    match fields.remove(field) {
        None => Ok(None),
        Some(Value::String(text)) if !text.is_empty() => Ok(Some(text)),
        Some(_) => Err(value_error(field, "a string that is not empty")),
    }
}

fn flag(fields: &mut Map<String, Value>, field: &str) -> Result<Option<bool>, ConfigError> {
    match fields.remove(field) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(_) => Err(value_error(field, "true or false")),
    }
}

fn choice<T>(
    fields: &mut Map<String, Value>,
    field: &str,
    expected: &'static str,
    read: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, ConfigError> {
    let Some(value) = fields.remove(field) else { return Ok(None) };
    value.as_str().and_then(read).map(Some).ok_or_else(|| value_error(field, expected))
}

fn labels(fields: &mut Map<String, Value>) -> Result<Option<BTreeMap<String, String>>, ConfigError> {
    match fields.remove("labels") {
        None => Ok(None),
        Some(Value::Object(labels)) => {
            let label = |(name, value)| match value {
                Value::String(value) => Ok((name, value)),
                _ => Err(value_error(format!("labels.{name}"), "a string")),
            };
            labels.into_iter().map(label).collect::<Result<_, _>>().map(Some)
        }
        Some(_) => Err(value_error("labels", "an object of strings")),
    }
}

fn ips(fields: &mut Map<String, Value>) -> Result<Option<Vec<String>>, ConfigError> {
    match fields.remove("ips") {
        None => Ok(None),
        Some(Value::Array(ips)) => {
            let ip = |(at, value): (usize, Value)| match value {
                Value::String(ip) if ip.parse::<IpAddr>().is_ok() => Ok(ip),
                _ => Err(value_error(format!("ips[{at}]"), "an IP address")),
            };
            ips.into_iter().enumerate().map(ip).collect::<Result<_, _>>().map(Some)
        }
        Some(_) => Err(value_error("ips", "a list of IP addresses")),
    }
}

/// A field of the node: Envoy 1.40 has it under `xds.node`, others have it under `node`.
fn node(host: &impl Host, path: &str) -> Option<Vec<u8>> {
    host.property(&format!("xds\0node\0{path}")).or_else(|| host.property(&format!("node\0{path}")))
}

fn string(host: &impl Host, path: &str) -> Option<String> {
    let value = String::from_utf8(node(host, path)?).ok()?;
    if value.is_empty() { None } else { Some(value) }
}

fn node_labels(host: &impl Host) -> BTreeMap<String, String> {
    let map = node(host, "metadata\0LABELS").unwrap_or_default();
    let owned = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
    let pairs = Pairs::new(&map).into_iter().flatten().flatten();
    pairs.filter_map(|(name, value)| owned(name).zip(owned(value))).collect()
}

fn node_ips(host: &impl Host) -> Vec<String> {
    let ips = string(host, "metadata\0INSTANCE_IPS").unwrap_or_default();
    ips.split(',').map(str::trim).filter(|ip| ip.parse::<IpAddr>().is_ok()).map(str::to_owned).collect()
}

fn node_locality(host: &impl Host) -> String {
    let part = |path| string(host, path).unwrap_or_default();
    let parts = [part("locality\0region"), part("locality\0zone"), part("locality\0sub_zone")];
    parts.join("/").trim_end_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::Fake;

    fn error(json: &str) -> String {
        Config::parse(json.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn nothing_is_the_default() {
        let config = Config::parse(b" \n").unwrap();
        assert_eq!(config, Config::parse(b"{}").unwrap());
        assert_eq!((config.controller.as_str(), config.no_snapshot), ("portolan", NoSnapshot::Closed));
    }

    #[test]
    fn every_field_is_read() {
        let json =
            br#"{"controller":"c","namespace":"n","labels":{"app":"a"},"role":"gateway","ips":["10.0.0.1","::1"],
            "locality":"r/z","dns_capture":true,"no_snapshot":"open","report_decisions":true,"destination_header":true,"subscriber":"s"}"#;
        let config = Config::parse(json).unwrap();
        let scope = config.scope(&Fake::default()).unwrap();
        let expected = Scope {
            namespace: "n".into(),
            labels: [("app".to_owned(), "a".to_owned())].into(),
            role: Role::Gateway.into(),
            ips: vec!["10.0.0.1".into(), "::1".into()],
            locality: "r/z".into(),
            dns_capture: true,
        };
        assert_eq!(scope, expected);
        assert_eq!((config.controller.as_str(), config.no_snapshot), ("c", NoSnapshot::Open));
        assert!(config.destination_header && !Config::parse(b"").unwrap().destination_header);
        assert!(config.report_decisions && !Config::parse(b"").unwrap().report_decisions);
        assert_eq!(config.subscriber(&Fake::default(), 1), "s");
    }

    #[test]
    fn an_error_names_the_field() {
        let cases = [
            ("[]", "expected a JSON object: it is another kind of value"),
            (r#"{"contoller":"c"}"#, "unknown field `contoller`"),
            (r#"{"controller":""}"#, "field `controller`: expected a string that is not empty"),
            (r#"{"namespace":3}"#, "field `namespace`: expected a string that is not empty"),
            (r#"{"labels":["a"]}"#, "field `labels`: expected an object of strings"),
            (r#"{"labels":{"app":1}}"#, "field `labels.app`: expected a string"),
            (r#"{"role":"Gateway"}"#, "field `role`: expected `sidecar` or `gateway`"),
            (r#"{"ips":["10.0.0.1","x"]}"#, "field `ips[1]`: expected an IP address"),
            (r#"{"ips":"10.0.0.1"}"#, "field `ips`: expected a list of IP addresses"),
            (r#"{"locality":null}"#, "field `locality`: expected a string that is not empty"),
            (r#"{"report_decisions":1}"#, "field `report_decisions`: expected true or false"),
            (r#"{"no_snapshot":true}"#, "field `no_snapshot`: expected `closed` or `open`"),
        ];
        for (json, expected) in cases {
            assert_eq!(error(json), expected, "{json}");
        }
        assert!(error("{").starts_with("expected a JSON object: "));
        assert!(Config::parse(b"\xff\xfe").is_err());
    }

    #[test]
    fn the_node_says_what_is_not_configured() {
        let host = Fake::default();
        host.set_property("xds\0node\0id", b"router~10.0.0.9~gw.infra~infra.svc.cluster.local");
        host.set_property("xds\0node\0metadata\0INSTANCE_IPS", b"10.0.0.9, bad,fd00::9");
        let labels = crate::host::pairs::write(&[(b"app".to_vec(), b"gw".to_vec()), (b"\xff".to_vec(), b"x".to_vec())]);
        host.set_property("node\0metadata\0LABELS", &labels);
        host.set_property("node\0locality\0region", b"r");
        host.set_property("node\0locality\0zone", b"z");
        let config = Config::parse(b"").unwrap();
        let scope = config.scope(&host).unwrap();
        assert_eq!(scope.namespace, "infra");
        assert_eq!(scope.role(), Role::Gateway);
        assert_eq!(scope.ips, ["10.0.0.9", "fd00::9"]);
        assert_eq!(scope.locality, "r/z");
        assert_eq!(scope.labels, [("app".to_owned(), "gw".to_owned())].into());
        host.set_property("node\0metadata\0NAMESPACE", b"named");
        assert_eq!(config.scope(&host).unwrap().namespace, "named");
        assert_eq!(config.subscriber(&host, 7), "router~10.0.0.9~gw.infra~infra.svc.cluster.local#7");
    }

    #[test]
    fn a_namespace_that_nobody_names_is_an_error() {
        let error = Config::parse(b"{}").unwrap().scope(&Fake::default()).unwrap_err();
        assert_eq!(error, ConfigError::Missing("namespace"));
    }
}
