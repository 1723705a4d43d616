//! Properties: attributes of the stream, of the plugin and of the node.

use super::{ENV, HostState};
use crate::vm::abi::{MapType, Status, write_pairs};
use crate::vm::memory::{Fault, finish, give_with, read, split};
use crate::vm::stream::{HttpState, StreamKind};
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
        find(state, raw, path, out)
    })
}

pub(super) fn find(state: &HostState, raw: &[u8], path: &[&[u8]], out: &mut Vec<u8>) -> Result<(), Status> {
    if let Some(stream) = state.streams.get(&state.effective) {
        if let Some(value) = stream.properties.get(path) {
            out.extend_from_slice(&value);
            return Ok(());
        }
        if let StreamKind::Http(http) = &stream.kind
            && http_attribute(http, path, out)
        {
            return Ok(());
        }
        // As Envoy: a property that was set is found by its whole name, and in the filter state under `wasm.` and its name.
        let set = |name: &[u8]| stream.own_properties.iter().find(|(key, _)| key == name).map(|(_, value)| value);
        let own = if let [name] = path { set(name).or_else(|| set(raw)) } else { None };
        let filter_state = || match path {
            [b"filter_state", key] => {
                let stored = std::str::from_utf8(key).ok().and_then(|key| stream.filter_state.get(key));
                stored.or_else(|| key.strip_prefix(b"wasm.").and_then(set))
            }
            _ => None,
        };
        if let Some(value) = own.or_else(filter_state) {
            out.extend_from_slice(value);
            return Ok(());
        }
    }
    let plugin = state.root().map(|root| &root.plugin);
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
            [b"request", b"headers"] => Some(all(&request.headers)),
            [b"response", b"headers"] => Some(all(&http.response.headers)),
            [b"response", b"trailers"] => Some(all(&http.response_trailers)),
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
fn all(headers: &HeaderMap) -> Vec<u8> {
    let mut out = Vec::new();
    write_pairs(&mut out, || headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes())));
    out
}

fn set(mut caller: Caller<'_, HostState>, (path, path_len): (u32, u32), (at, len): (u32, u32)) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    let path = read(memory, path, path_len)?;
    let value = Bytes::copy_from_slice(read(memory, at, len)?);
    let stream = state.stream().ok_or(Status::NotFound)?;
    match stream.own_properties.iter_mut().find(|(key, _)| key == path) {
        Some((_, have)) => *have = value,
        None => stream.own_properties.push((Bytes::copy_from_slice(path), value)),
    }
    Ok(())
}
