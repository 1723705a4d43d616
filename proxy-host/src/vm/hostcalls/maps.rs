//! Header, trailer and metadata maps.

use super::{ENV, HostState};
use crate::vm::abi::{MapType, Pairs, Status, read_pairs, write_pairs};
use crate::vm::inline::{once_in_request, once_in_response};
use crate::vm::memory::{Fault, finish, give_with, read, split, write_u32};
use crate::vm::stream::{RequestHead, ResponseHead, header_map, request_head};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use std::borrow::Cow;
use wasmtime::{Caller, Linker};

pub(super) fn link(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker.func_wrap(ENV, "proxy_get_header_map_size", |caller: Caller<'_, HostState>, kind: u32, to: u32| {
        finish(size(caller, kind, to))
    })?;
    linker.func_wrap(
        ENV,
        "proxy_get_header_map_pairs",
        |caller: Caller<'_, HostState>, kind: u32, to: u32, to_len: u32| finish(pairs(caller, kind, to, to_len)),
    )?;
    linker.func_wrap(
        ENV,
        "proxy_set_header_map_pairs",
        |caller: Caller<'_, HostState>, kind: u32, at: u32, len: u32| finish(set_pairs(caller, kind, at, len)),
    )?;
    linker.func_wrap(
        ENV,
        "proxy_get_header_map_value",
        |caller: Caller<'_, HostState>, kind: u32, key: u32, key_len: u32, to: u32, to_len: u32| {
            finish(value(caller, kind, key, key_len, to, to_len))
        },
    )?;
    linker.func_wrap(
        ENV,
        "proxy_add_header_map_value",
        |caller: Caller<'_, HostState>, kind: u32, key: u32, key_len: u32, at: u32, len: u32| {
            finish(edit(caller, kind, (key, key_len), Some((at, len)), Edit::Add))
        },
    )?;
    linker.func_wrap(
        ENV,
        "proxy_replace_header_map_value",
        |caller: Caller<'_, HostState>, kind: u32, key: u32, key_len: u32, at: u32, len: u32| {
            finish(edit(caller, kind, (key, key_len), Some((at, len)), Edit::Replace))
        },
    )?;
    linker.func_wrap(
        ENV,
        "proxy_remove_header_map_value",
        |caller: Caller<'_, HostState>, kind: u32, key: u32, key_len: u32| {
            finish(edit(caller, kind, (key, key_len), None, Edit::Remove))
        },
    )?;
    Ok(())
}

/// A map as the guest sees it.
enum Map<'a> {
    Request(&'a mut RequestHead),
    Response(&'a mut ResponseHead),
    Plain(&'a mut HeaderMap),
    Metadata(&'a mut Pairs),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Edit {
    Add,
    Replace,
    Remove,
}

/// Maps of a stream the guest may change; those of a response to its own call it may only read.
fn map(state: &mut HostState, kind: MapType, change: bool) -> Result<Map<'_>, Status> {
    if let Some(http) = state.http()
        && is_stream_map(kind)
        && !(if change { http.shown.writes(kind) } else { http.shown.reads(kind) })
    {
        // As Envoy: what is gone by the log callback is no mistake of a reader's, but one of a writer's.
        return Err(if change { Status::BadArgument } else { http.shown.refusal() });
    }
    let delivery = match kind {
        MapType::CallResponseHeaders => state.delivery.http.as_mut().map(|http| Map::Response(&mut http.head)),
        MapType::CallResponseTrailers => state.delivery.http.as_mut().map(|http| Map::Plain(&mut http.trailers)),
        MapType::GrpcInitialMetadata | MapType::GrpcTrailingMetadata => {
            state.delivery.metadata.as_mut().map(Map::Metadata)
        }
        MapType::RequestHeaders => state.http().map(|http| {
            // As Envoy has it of modules of these ABI versions.
            http.route_cleared |= change;
            Map::Request(&mut http.request)
        }),
        MapType::RequestTrailers => state.http().map(|http| Map::Plain(&mut http.request_trailers)),
        MapType::ResponseHeaders => state.http().map(|http| Map::Response(&mut http.response)),
        MapType::ResponseTrailers => state.http().map(|http| Map::Plain(&mut http.response_trailers)),
    };
    delivery.ok_or(Status::BadArgument)
}

fn is_stream_map(kind: MapType) -> bool {
    matches!(
        kind,
        MapType::RequestHeaders | MapType::RequestTrailers | MapType::ResponseHeaders | MapType::ResponseTrailers
    )
}

impl Map<'_> {
    fn headers(&self) -> Option<&HeaderMap> {
        match self {
            Map::Request(head) => Some(&head.headers),
            Map::Response(head) => Some(&head.headers),
            Map::Plain(headers) => Some(headers),
            Map::Metadata(_) => None,
        }
    }

    fn headers_mut(&mut self) -> Option<&mut HeaderMap> {
        match self {
            Map::Request(head) => Some(&mut head.headers),
            Map::Response(head) => Some(&mut head.headers),
            Map::Plain(headers) => Some(headers),
            Map::Metadata(_) => None,
        }
    }

    /// Every pair, pseudo headers first.
    fn pairs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let pseudo = match self {
            Map::Request(head) => [
                head.authority.as_ref().map(|value| (&b":authority"[..], value.as_bytes())),
                head.path.as_ref().map(|value| (&b":path"[..], value.as_bytes())),
                Some((&b":method"[..], head.method.as_str().as_bytes())),
                head.scheme.as_ref().map(|value| (&b":scheme"[..], value.as_bytes())),
            ],
            Map::Response(head) => [Some((&b":status"[..], head.status.as_str().as_bytes())), None, None, None],
            _ => [None; 4],
        };
        let metadata: &[_] = if let Map::Metadata(pairs) = self { pairs } else { &[] };
        let headers = self.headers().into_iter().flatten();
        pseudo
            .into_iter()
            .flatten()
            .chain(headers.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes())))
            .chain(metadata.iter().map(|(name, value)| (&name[..], &value[..])))
    }

    /// The name under which this map holds what a guest calls `name`: without capitals, and a request's `host` is its
    /// `:authority`, as in Envoy.
    fn name<'n>(&self, name: &'n [u8]) -> Cow<'n, [u8]> {
        if matches!(self, Map::Request(_)) && name.eq_ignore_ascii_case(b"host") {
            return Cow::Borrowed(b":authority");
        }
        match name {
            [b':', rest @ ..] if rest.iter().any(u8::is_ascii_uppercase) => Cow::Owned(name.to_ascii_lowercase()),
            name => Cow::Borrowed(name),
        }
    }

    /// Whether this map holds only one header of that name.
    fn once(&self, name: &str) -> bool {
        match self {
            Map::Request(_) => once_in_request(name),
            Map::Response(_) => once_in_response(name),
            Map::Plain(_) | Map::Metadata(_) => false,
        }
    }

    /// The value of a pseudo header with another behind it.
    fn joined_pseudo(&self, name: &[u8], value: &[u8]) -> Option<Vec<u8>> {
        let (_, have) = self.pairs().find(|(have, _)| *have == name)?;
        Some([have, value].join(&b','))
    }

    fn set_pseudo(&mut self, name: &[u8], value: Option<&[u8]>) -> Result<(), Status> {
        let parsed = value.map(HeaderValue::from_bytes).transpose().map_err(|_| Status::BadArgument)?;
        match (self, name) {
            (Map::Request(head), b":authority") => head.authority = parsed,
            (Map::Request(head), b":path") => head.path = parsed,
            (Map::Request(head), b":scheme") => head.scheme = parsed,
            (Map::Request(head), b":method") => {
                let value = value.ok_or(Status::BadArgument)?;
                head.method = Method::from_bytes(value).map_err(|_| Status::BadArgument)?;
            }
            (Map::Response(head), b":status") => {
                let value = value.ok_or(Status::BadArgument)?;
                head.status = StatusCode::from_bytes(value).map_err(|_| Status::BadArgument)?;
            }
            _ => return Err(Status::BadArgument),
        }
        Ok(())
    }
}

fn size(mut caller: Caller<'_, HostState>, kind: u32, to: u32) -> Result<(), Fault> {
    let kind = MapType::from_abi(kind)?;
    let (memory, state) = split(&mut caller)?;
    let bytes: usize = map(state, kind, true)?.pairs().map(|(name, value)| name.len() + value.len()).sum();
    Ok(write_u32(memory, to, u32::try_from(bytes).unwrap_or(u32::MAX))?)
}

fn pairs(mut caller: Caller<'_, HostState>, kind: u32, to: u32, to_len: u32) -> Result<(), Fault> {
    let kind = MapType::from_abi(kind)?;
    give_with(&mut caller, to, to_len, |_, state, out| {
        // As Envoy: a map that is empty or not there is no bytes at all.
        if let Ok(map) = map(state, kind, false)
            && map.pairs().next().is_some()
        {
            write_pairs(out, || map.pairs());
        }
        Ok(())
    })
}

fn set_pairs(mut caller: Caller<'_, HostState>, kind: u32, at: u32, len: u32) -> Result<(), Fault> {
    let kind = changeable(kind)?;
    let (memory, state) = split(&mut caller)?;
    let pairs = read_pairs(read(memory, at, len)?)?;
    match map(state, kind, true)? {
        Map::Request(head) => *head = request_head(&pairs).ok_or(Status::BadArgument)?,
        mut map => {
            let plain = || pairs.iter().copied().filter(|(name, _)| !name.starts_with(b":"));
            let (headers, refused) = header_map(plain());
            if refused > 0 {
                return Err(Status::BadArgument.into());
            }
            for (name, value) in pairs.iter().filter(|(name, _)| name.starts_with(b":")) {
                map.set_pseudo(name, Some(value))?;
            }
            *map.headers_mut().ok_or(Status::BadArgument)? = headers;
        }
    }
    Ok(())
}

/// Envoy keeps all values of these in one, so a guest sees them all; of any other name it sees the first.
const JOINED: [&str; 5] =
    ["x-forwarded-for", "via", "x-forwarded-client-cert", "x-forwarded-host", "grpc-accept-encoding"];

fn value(
    mut caller: Caller<'_, HostState>,
    kind: u32,
    key: u32,
    key_len: u32,
    to: u32,
    to_len: u32,
) -> Result<(), Fault> {
    let kind = MapType::from_abi(kind)?;
    give_with(&mut caller, to, to_len, |memory, state, out| {
        let key = read(memory, key, key_len)?;
        let map = map(state, kind, false)?;
        let key = &*map.name(key);
        let found = match map.headers() {
            Some(headers) if !key.starts_with(b":") => {
                // A name that is not text cannot be in the map.
                let name = std::str::from_utf8(key).map_err(|_| Status::NotFound)?;
                let joined = match &map {
                    Map::Request(_) => &JOINED[..],
                    Map::Response(_) => &JOINED[1..2],
                    _ => &[],
                };
                let all = joined.iter().any(|joined| joined.eq_ignore_ascii_case(name));
                let values = headers.get_all(name).iter().map(HeaderValue::as_bytes);
                join(out, values.take(if all { usize::MAX } else { 1 }))
            }
            _ => join(out, map.pairs().filter(|(name, _)| *name == key).map(|(_, value)| value)),
        };
        if found { Ok(()) } else { Err(Status::NotFound) }
    })
}

fn join<'a>(out: &mut Vec<u8>, values: impl Iterator<Item = &'a [u8]>) -> bool {
    let mut found = false;
    for value in values {
        if found {
            out.push(b',');
        }
        found = true;
        out.extend_from_slice(value);
    }
    found
}

fn joined(first: &HeaderValue, second: &HeaderValue) -> Result<HeaderValue, Status> {
    let both = [first.as_bytes(), second.as_bytes()].join(&b',');
    HeaderValue::from_bytes(&both).map_err(|_| Status::BadArgument)
}

fn changeable(kind: u32) -> Result<MapType, Status> {
    match MapType::from_abi(kind)? {
        MapType::GrpcInitialMetadata
        | MapType::GrpcTrailingMetadata
        | MapType::CallResponseHeaders
        | MapType::CallResponseTrailers => Err(Status::BadArgument),
        kind => Ok(kind),
    }
}

fn edit(
    mut caller: Caller<'_, HostState>,
    kind: u32,
    (key, key_len): (u32, u32),
    value: Option<(u32, u32)>,
    how: Edit,
) -> Result<(), Fault> {
    let kind = changeable(kind)?;
    let (memory, state) = split(&mut caller)?;
    let key = read(memory, key, key_len)?;
    let value = value.map(|(at, len)| read(memory, at, len)).transpose()?;
    let mut map = map(state, kind, true)?;
    let key = &*map.name(key);
    if key.starts_with(b":") {
        let joined = value.filter(|_| how == Edit::Add).and_then(|value| map.joined_pseudo(key, value));
        return Ok(map.set_pseudo(key, joined.as_deref().or(value))?);
    }
    let Some(value) = value else {
        let headers = map.headers_mut().ok_or(Status::BadArgument)?;
        if let Ok(name) = std::str::from_utf8(key) {
            headers.remove(name);
        }
        return Ok(());
    };
    let name = HeaderName::from_bytes(key).map_err(|_| Status::BadArgument)?;
    let value = HeaderValue::from_bytes(value).map_err(|_| Status::BadArgument)?;
    let once = how == Edit::Add && map.once(name.as_str());
    let headers = map.headers_mut().ok_or(Status::BadArgument)?;
    if once && let Some(have) = headers.get_mut(&name) {
        *have = joined(have, &value)?;
        return Ok(());
    }
    let done = match how {
        Edit::Add => headers.try_append(name, value).map(|_| ()),
        _ => headers.try_insert(name, value).map(|_| ()),
    };
    // The map holds at most 32,768 names.
    Ok(done.map_err(|_| Status::InternalFailure)?)
}
