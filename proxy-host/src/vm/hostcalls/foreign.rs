//! Foreign functions: Envoy's, and whatever the embedder adds.

use super::{ENV, HostState, expression, signature};
use crate::vm::abi::Status;
use crate::vm::memory::{Fault, finish, give, read, read_str, split, write_u32};
use crate::vm::stored::{self, Declared, WITH_CONNECTION};
use crate::vm::stream::Stream;
use flate2::{Compression, bufread::ZlibDecoder, write::ZlibEncoder};
use prost::Message;
use std::io::{Read as _, Write as _};
use wasmtime::{Caller, Linker};

pub(super) fn link(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker.func_wrap(
        ENV,
        "proxy_call_foreign_function",
        |caller: Caller<'_, HostState>, name: u32, name_len: u32, at: u32, len: u32, to: u32, to_len: u32| {
            finish(call(caller, (name, name_len), (at, len), to, to_len))
        },
    )?;
    Ok(())
}

/// Envoy's `envoy.source.extensions.common.wasm.SetEnvoyFilterStateArguments`.
#[derive(Clone, PartialEq, Message)]
struct SetEnvoyFilterState {
    #[prost(string, tag = "1")]
    path: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: bytes::Bytes,
    #[prost(int32, tag = "3")]
    span: i32,
}

fn call(
    mut caller: Caller<'_, HostState>,
    (name, name_len): (u32, u32),
    (at, len): (u32, u32),
    to: u32,
    to_len: u32,
) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    let name = read_str(memory, name, name_len)?;
    let arguments = read(memory, at, len)?;
    // As Envoy: what there is no function for leaves the guest's pointers alone.
    let Some(result) = run(state, name, arguments) else { return Err(Status::NotFound.into()) };
    match result {
        Ok(result) if to != 0 && !result.is_empty() => give(&mut caller, &result, to, to_len),
        result => {
            // A guest that does not want the result may still want its length.
            let size = result.as_ref().map_or(0, |result| if to == 0 { result.len() } else { 0 });
            for (to, value) in [(to, 0), (to_len, u32::try_from(size).unwrap_or(u32::MAX))] {
                if to != 0 {
                    write_u32(memory, to, value)?;
                }
            }
            Ok(result.map(|_| ())?)
        }
    }
}

/// What a function comes to; `None` where there is none of that name.
fn run(state: &mut HostState, name: &str, arguments: &[u8]) -> Option<Result<Vec<u8>, Status>> {
    let nothing = |done: Result<(), Status>| done.map(|()| Vec::new());
    Some(match name {
        "clear_route_cache" => {
            // As Envoy: no mistake where there is no route.
            if let Some(http) = state.http() {
                http.route_cleared = true;
            }
            Ok(Vec::new())
        }
        "set_envoy_filter_state" => nothing(set_filter_state(state, arguments)),
        "compress" => compress(arguments),
        "uncompress" => uncompress(arguments),
        "declare_property" => nothing(declare(state, arguments)),
        "verify_signature" => signature::verify(arguments),
        "sign" => signature::sign(arguments),
        "expr_create" => expression::create(state, arguments),
        "expr_evaluate" => expression::evaluate(state, arguments),
        "expr_delete" => expression::delete(state, arguments),
        _ => match state.env.foreign(name, arguments) {
            Err(Status::NotFound) => return None,
            result => result,
        },
    })
}

fn set_filter_state(state: &mut HostState, arguments: &[u8]) -> Result<(), Status> {
    let SetEnvoyFilterState { path, value, span } =
        SetEnvoyFilterState::decode(arguments).map_err(|_| Status::BadArgument)?;
    stored::check(&path, &value)?;
    let Stream { stored, properties, .. } = state.stream().ok_or(Status::NotFound)?;
    match properties.connection().filter(|_| span == WITH_CONNECTION) {
        Some(connection) => connection.0.borrow_mut().filter_state.set(path, value),
        None => stored.filter_state.set(path, value),
    }
    Ok(())
}

/// As Envoy: only what a root context declares is heeded, and of what context is asked the current one.
fn declare(state: &mut HostState, arguments: &[u8]) -> Result<(), Status> {
    let declared = Declared::decode(arguments)?;
    let current = state.current;
    match state.streams.get_mut(&current) {
        Some(stream) => stream.declared.declare(declared),
        None => state.root_of_mut(current).ok_or(Status::BadArgument)?.declared.declare(declared),
    }
}

/// What `uncompress` gives at most, in bytes: a few bytes must not fill the host's memory.
const LARGEST: u64 = 64 << 20;

fn compress(bytes: &[u8]) -> Result<Vec<u8>, Status> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).map_err(|_| Status::InternalFailure)
}

fn uncompress(bytes: &[u8]) -> Result<Vec<u8>, Status> {
    let mut out = Vec::new();
    // One byte more than allowed shows that there is more.
    let read =
        ZlibDecoder::new(bytes).take(LARGEST + 1).read_to_end(&mut out).map_err(|_| Status::SerializationFailure)?;
    if read as u64 > LARGEST { Err(Status::InternalFailure) } else { Ok(out) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compressed_is_what_comes_back() {
        let compressed = compress(b"hello world!").unwrap();
        assert_eq!(compressed[..2], [0x78, 0x9c]);
        assert_eq!(uncompress(&compressed).unwrap(), b"hello world!");
        assert_eq!(uncompress(b"no zlib"), Err(Status::SerializationFailure));
    }

    #[test]
    fn a_bomb_is_refused() {
        let bomb = compress(&vec![0; (64 << 20) + 1]).unwrap();
        assert!(bomb.len() < 100_000);
        assert_eq!(uncompress(&bomb), Err(Status::InternalFailure));
    }
}
