//! What keeps requests together on one endpoint, as Envoy's hash policies read it.

use std::hash::{DefaultHasher, Hasher};

use portolan_registry::route::{HashCookie, HashKey};
use portolan_registry::routing::{Asked, query_parameter};

use crate::carry::without_port;
use crate::host::Host;
use crate::request::Headers;

/// What a request has in common with others of its kind.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Sticky {
    /// Requests of one value belong together; an empty one goes anywhere.
    pub(crate) value: Vec<u8>,
    /// A cookie for the client, that it may be known again.
    pub(crate) cookie: Option<Vec<u8>>,
}

/// Reads the key of a request.
pub(crate) fn value(host: &impl Host, request: &Headers<'_>, key: &HashKey) -> Sticky {
    let value = match key {
        HashKey::Header(name) => request.header(name).map(|value| value.into_owned()),
        HashKey::Query(name) => {
            let path = request.header(":path").unwrap_or_default();
            query_parameter(&path, name).map(|value| value.into_owned())
        }
        HashKey::SourceIp => host.property("source\0address").map(|address| without_port(&address).to_vec()),
        HashKey::Cookie(wanted) => match (request.cookie(&wanted.name), wanted.ttl) {
            (Some(value), _) => Some(value.to_vec()),
            (None, Some(ttl)) => {
                let value = new_cookie(host);
                let cookie = Some(set_cookie(wanted, &value, ttl));
                return Sticky { value, cookie };
            }
            (None, None) => None,
        },
    };
    Sticky { value: value.unwrap_or_default(), cookie: None }
}

/// The same for all requests of a connection, so that those which come at once get one cookie.
fn new_cookie(host: &impl Host) -> Vec<u8> {
    let mut hasher = DefaultHasher::new();
    for end in ["source\0address", "destination\0address"] {
        hasher.write(&host.property(end).unwrap_or_default());
    }
    format!("{:016x}", hasher.finish()).into_bytes()
}

/// A `Set-Cookie` as Envoy writes it.
fn set_cookie(wanted: &HashCookie, value: &[u8], ttl: u32) -> Vec<u8> {
    let mut out = [wanted.name.as_bytes(), b"=\"", value, b"\""].concat();
    if ttl > 0 {
        out.extend_from_slice(format!("; Max-Age={ttl}").as_bytes());
    }
    if !wanted.path.is_empty() {
        out.extend_from_slice(format!("; Path={}", wanted.path).as_bytes());
    }
    for (name, value) in &wanted.attributes {
        let value = if value.is_empty() { String::new() } else { format!("={value}") };
        out.extend_from_slice(format!("; {name}{value}").as_bytes());
    }
    out.extend_from_slice(b"; HttpOnly");
    out
}
