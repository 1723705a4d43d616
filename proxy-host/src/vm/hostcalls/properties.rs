//! Properties: attributes of the stream, of the plugin and of the node.

use super::{ENV, HostState};
use crate::vm::abi::{MapType, Status, write_pairs};
use crate::vm::memory::{Fault, finish, give_with, read, split};
use crate::vm::stored::{self, Property};
use crate::vm::stream::{HttpState, Stream, StreamKind};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use wasmtime::{Caller, Linker};

/// Longer paths are answered with "not found"; Envoy's own have at most five parts.
const MAX_PARTS: usize = 16;

pub(super) fn link(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker.func_wrap(
        ENV,
        "proxy_get_property",
        |caller: Caller<'_, HostState>, path: u32, len: u32, to: u32, to_len: u32| {
            finish(get(caller, path, len, to, to_len))
        },
    )?;
    linker.func_wrap(
        ENV,
        "proxy_set_property",
        |caller: Caller<'_, HostState>, path: u32, path_len: u32, at: u32, len: u32| {
            finish(set(caller, (path, path_len), (at, len)))
        },
    )?;
    Ok(())
}

fn get(mut caller: Caller<'_, HostState>, path: u32, len: u32, to: u32, to_len: u32) -> Result<(), Fault> {
    give_with(&mut caller, to, to_len, |memory, state, out| {
        let raw = read(memory, path, len)?;
        let mut parts: [&[u8]; MAX_PARTS] = [&[]; MAX_PARTS];
        let mut count = 0;
        for part in raw.split(|byte| *byte == 0) {
            *parts.get_mut(count).ok_or(Status::NotFound)? = part;
            count += 1;
        }
        // Rust's SDK ends a path without a NUL, others with one.
        if count > 1 && parts.get(count - 1).is_some_and(|last| last.is_empty()) {
            count -= 1;
        }
        let path = parts.get(..count).ok_or(Status::NotFound)?;
        find(state, state.effective, raw, path, out)
    })
}

/// Gives a context's property, from its place in the whole path and its parts.
pub(super) fn find(
    state: &HostState,
    context: u32,
    raw: &[u8],
    path: &[&[u8]],
    out: &mut Vec<u8>,
) -> Result<(), Status> {
    if let Some(stream) = state.streams.get(&context) {
        if let Some(value) = stream.properties.get(path) {
            out.extend_from_slice(&value);
            return Ok(());
        }
        if let StreamKind::Http(http) = &stream.kind
            && http_attribute(http, path, out)
        {
            return Ok(());
        }
        if let Some(value) = stored(stream, raw, path)? {
            out.extend_from_slice(&value);
            return Ok(());
        }
    }
    let plugin = state.root_of(context).map(|root| &root.plugin);
    let value = match (path, plugin) {
        ([b"plugin_name"], Some(plugin)) => plugin.name.as_bytes(),
        ([b"plugin_root_id"], Some(plugin)) => plugin.root_id.as_bytes(),
        ([b"plugin_vm_id"], _) => state.vm_id.as_bytes(),
        _ => {
            let value = state.env.property(path).ok_or(Status::NotFound)?;
            out.extend_from_slice(&value);
            return Ok(());
        }
    };
    out.extend_from_slice(value);
    Ok(())
}

/// What the guest has stored. As Envoy: a property that was set is found by its whole name, and in the filter state under
/// `wasm.` and its name.
fn stored(stream: &Stream, raw: &[u8], path: &[&[u8]]) -> Result<Option<Bytes>, Status> {
    let shared = stream.properties.connection().map(|connection| connection.0.borrow());
    let both = || [Some(&stream.stored), shared.as_deref()].into_iter().flatten();
    let property = |name: &[u8]| both().find_map(|stored| stored.property(name));
    let object = |key: &str| both().find_map(|stored| stored.filter_state.get(key));
    Ok(match path {
        [b"filter_state", key] => {
            if let Ok(key) = std::str::from_utf8(key)
                && let Some(value) = object(key)
            {
                // Envoy gives a map without keys for an object with fields.
                let fields = || stored::has_fields(key).then_some(Bytes::from_static(&[0; 4]));
                return Ok(stored::text_of(key, value).or_else(fields));
            }
            match key.strip_prefix(b"wasm.").and_then(property).map(Property::shown) {
                Some(Some(stored::Shown::Bytes(value) | stored::Shown::Text(value))) => Some(value),
                Some(None) => return Err(Status::SerializationFailure),
                None => None,
            }
        }
        [b"filter_state", key, field] => {
            let key = std::str::from_utf8(key).ok();
            key.and_then(|key| stored::field_of(key, object(key)?, field))
        }
        // Of the metadata that other filters may add there is none.
        [b"metadata"] => Some(Bytes::new()),
        [name] => property(name).or_else(|| property(raw)).map(|property| property.value().clone()),
        _ => None,
    })
}

/// Attributes that follow from the headers the VM holds.
fn http_attribute(http: &HttpState, path: &[&[u8]], out: &mut Vec<u8>) -> bool {
    let request = &http.request;
    let shown = match path.first() {
        Some(&b"request") => http.shown.reads(MapType::RequestHeaders),
        Some(&b"response") if path.get(1) == Some(&&b"trailers"[..]) => http.shown.reads(MapType::ResponseTrailers),
        _ => http.shown.reads(MapType::ResponseHeaders),
    };
    if !shown {
        return false;
    }
    let whole_path = || request.path.as_ref().map(HeaderValue::as_bytes);
    let header = |map: &'_ HeaderMap, name: &[u8]| -> Option<Vec<u8>> {
        let name = std::str::from_utf8(name).ok()?;
        map.get(name).map(|value| value.as_bytes().to_vec())
    };
    let at_question = |path: &[u8]| path.iter().position(|byte| *byte == b'?');
    let value =
        match path {
            [b"request", b"path"] => whole_path().map(<[u8]>::to_vec),
            [b"request", b"url_path"] => whole_path()
                .map(|path| path.get(..at_question(path).unwrap_or(path.len())).unwrap_or_default().to_vec()),
            [b"request", b"query"] => whole_path()
                .map(|path| at_question(path).and_then(|at| path.get(at + 1..)).unwrap_or_default().to_vec()),
            [b"request", b"host"] => request.authority.as_ref().map(|value| value.as_bytes().to_vec()),
            [b"request", b"scheme"] => request.scheme.as_ref().map(|value| value.as_bytes().to_vec()),
            [b"request", b"method"] => Some(request.method.as_str().as_bytes().to_vec()),
            [b"request", b"referer"] => header(&request.headers, b"referer"),
            [b"request", b"useragent"] => header(&request.headers, b"user-agent"),
            [b"request", b"id"] => header(&request.headers, b"x-request-id"),
            [b"request", b"headers"] => Some(all(request.pseudo(), &request.headers)),
            [b"response", b"headers"] => Some(all(http.response.pseudo(), &http.response.headers)),
            [b"response", b"trailers"] => Some(all(std::iter::empty(), &http.response_trailers)),
            [b"request", b"headers", b"host"] => request.authority.as_ref().map(|value| value.as_bytes().to_vec()),
            [b"request", b"headers", name @ [b':', ..]] => value_of(request.pseudo(), name),
            [b"response", b"headers", name @ [b':', ..]] => value_of(http.response.pseudo(), name),
            [b"request", b"headers", name] => header(&request.headers, name),
            [b"response", b"code"] => Some(i64::from(http.response.status.as_u16()).to_le_bytes().to_vec()),
            [b"response", b"headers", name] => header(&http.response.headers, name),
            [b"response", b"trailers", name] => header(&http.response_trailers, name),
            _ => None,
        };
    match value {
        Some(value) => {
            out.extend_from_slice(&value);
            true
        }
        None => false,
    }
}

/// A header map as Envoy gives a whole map: serialized pairs.
fn all<'a>(pseudo: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone, headers: &'a HeaderMap) -> Vec<u8> {
    let mut out = Vec::new();
    let rest = || headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    write_pairs(&mut out, || pseudo.clone().chain(rest()));
    out
}

fn value_of<'a>(mut pseudo: impl Iterator<Item = (&'a [u8], &'a [u8])>, name: &[u8]) -> Option<Vec<u8>> {
    pseudo.find(|(have, _)| *have == name).map(|(_, value)| value.to_vec())
}

fn set(mut caller: Caller<'_, HostState>, (path, path_len): (u32, u32), (at, len): (u32, u32)) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    let path = read(memory, path, path_len)?;
    let value = Bytes::copy_from_slice(read(memory, at, len)?);
    let declared = state.root().and_then(|root| root.declared.get(path)).unwrap_or_default();
    let Stream { stored, properties, .. } = state.stream().ok_or(Status::NotFound)?;
    Ok(stored.set(properties.connection(), declared, path, value)?)
}
