//! Foreign functions: Envoy's that steer routing, and whatever the embedder adds.

use super::{ENV, HostState};
use crate::vm::abi::Status;
use crate::vm::memory::{Fault, finish, give, read, read_str, split};
use prost::Message;
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
        _ => state.env.foreign(name, arguments)?,
    };
    // As Envoy: no result leaves the guest's pointers alone.
    if result.is_empty() { Ok(()) } else { give(&mut caller, &result, to, to_len) }
}
