//! Foreign functions: Envoy's, and whatever the embedder adds.

use super::{ENV, HostState, expression, signature};
use crate::vm::abi::Status;
use crate::vm::memory::{Fault, finish, give, read, read_str, split};
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

/// Envoy's `envoy.source.extensions.common.wasm.SetEnvoyFilterStateArguments`. How long the value lives (field 3) does
/// not matter here: a stream's values live as long as the stream.
#[derive(Clone, PartialEq, Message)]
struct SetEnvoyFilterState {
    #[prost(string, tag = "1")]
    path: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: bytes::Bytes,
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
    let result = match name {
        "clear_route_cache" => {
            state.http().ok_or(Status::BadArgument)?.route_cleared = true;
            Vec::new()
        }
        "set_envoy_filter_state" => {
            let set = SetEnvoyFilterState::decode(arguments).map_err(|_| Status::BadArgument)?;
            state.stream().ok_or(Status::BadArgument)?.filter_state.set(set.path, set.value);
            Vec::new()
        }
        "compress" => compress(arguments)?,
        "uncompress" => uncompress(arguments)?,
        // A property that is set is readable as it is, whatever it was declared to be.
        "declare_property" => Vec::new(),
        "verify_signature" => signature::verify(arguments)?,
        "sign" => signature::sign(arguments)?,
        "expr_create" => {
            let arguments = arguments.to_vec();
            expression::create(state, &arguments)?
        }
        "expr_evaluate" => expression::evaluate(state, arguments)?,
        "expr_delete" => {
            let arguments = arguments.to_vec();
            expression::delete(state, &arguments)?
        }
        _ => state.env.foreign(name, arguments)?,
    };
    // As Envoy: no result leaves the guest's pointers alone.
    if result.is_empty() { Ok(()) } else { give(&mut caller, &result, to, to_len) }
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
