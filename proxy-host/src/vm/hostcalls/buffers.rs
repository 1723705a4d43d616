//! Bodies, connection data, messages and configurations as byte buffers.

use super::{ENV, HostState};
use crate::vm::abi::{BufferType, Status};
use crate::vm::memory::{Fault, finish, give, read, split, write_u32};
use bytes::{Bytes, BytesMut};
use wasmtime::{Caller, Linker};

pub(super) fn link(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker.func_wrap(
        ENV,
        "proxy_get_buffer_bytes",
        |caller: Caller<'_, HostState>, kind: u32, start: u32, max: u32, to: u32, to_len: u32| {
            finish(get(caller, kind, start, max, to, to_len))
        },
    )?;
    linker.func_wrap(
        ENV,
        "proxy_get_buffer_status",
        |caller: Caller<'_, HostState>, kind: u32, to_len: u32, to_flags: u32| {
            finish(status(caller, kind, to_len, to_flags))
        },
    )?;
    linker.func_wrap(
        ENV,
        "proxy_set_buffer_bytes",
        |caller: Caller<'_, HostState>, kind: u32, start: u32, len: u32, at: u32, at_len: u32| {
            finish(set(caller, kind, start, len, at, at_len))
        },
    )?;
    Ok(())
}

/// A handle on the buffer; its bytes are shared, not copied.
fn buffer(state: &mut HostState, kind: BufferType) -> Result<Bytes, Status> {
    if let Some(buffer) = stream_buffer(state, kind) {
        return Ok(buffer.clone());
    }
    let delivery = &state.delivery;
    match kind {
        BufferType::VmConfiguration => Some(state.vm_configuration.clone()),
        BufferType::PluginConfiguration => state.root().map(|root| root.plugin.configuration.clone()),
        BufferType::GrpcReceive => delivery.message.clone(),
        BufferType::CallResponseBody => delivery.http.as_ref().map(|http| http.body.clone()),
        BufferType::CallData => delivery.call_data.clone(),
        _ => None,
    }
    .ok_or(Status::NotFound)
}

/// The buffers a guest may also change.
fn stream_buffer(state: &mut HostState, kind: BufferType) -> Option<&mut Bytes> {
    match kind {
        BufferType::RequestBody => state.http().map(|http| &mut http.request_body),
        BufferType::ResponseBody => state.http().map(|http| &mut http.response_body),
        BufferType::DownstreamData => state.network().map(|network| &mut network.downstream),
        BufferType::UpstreamData => state.network().map(|network| &mut network.upstream),
        _ => None,
    }
}

fn get(mut caller: Caller<'_, HostState>, kind: u32, start: u32, max: u32, to: u32, to_len: u32) -> Result<(), Fault> {
    let buffer = buffer(caller.data_mut(), BufferType::from_abi(kind)?)?;
    // As Envoy: an overflow is an error, a range past the end is cut.
    let end = start.checked_add(max).ok_or(Status::BadArgument)? as usize;
    let part = buffer.get(start as usize..end.min(buffer.len())).unwrap_or_default();
    give(&mut caller, part, to, to_len)
}

fn status(mut caller: Caller<'_, HostState>, kind: u32, to_len: u32, to_flags: u32) -> Result<(), Fault> {
    let len = buffer(caller.data_mut(), BufferType::from_abi(kind)?)?.len();
    let (memory, _) = split(&mut caller)?;
    write_u32(memory, to_len, u32::try_from(len).unwrap_or(u32::MAX))?;
    Ok(write_u32(memory, to_flags, 0)?)
}

/// Prepends, replaces or appends, and refuses a range in the middle, as Envoy does.
fn set(mut caller: Caller<'_, HostState>, kind: u32, start: u32, len: u32, at: u32, at_len: u32) -> Result<(), Fault> {
    let kind = BufferType::from_abi(kind)?;
    let (memory, state) = split(&mut caller)?;
    let new = read(memory, at, at_len)?;
    let buffer = stream_buffer(state, kind).ok_or(Status::BadArgument)?;
    let (start, len) = (start as usize, len as usize);
    let join = |first: &[u8], second: &[u8]| {
        let mut joined = BytesMut::with_capacity(first.len() + second.len());
        joined.extend_from_slice(first);
        joined.extend_from_slice(second);
        joined.freeze()
    };
    *buffer = if start == 0 && len == 0 {
        join(new, buffer)
    } else if start == 0 && len >= buffer.len() {
        Bytes::copy_from_slice(new)
    } else if start >= buffer.len() {
        join(buffer, new)
    } else {
        return Err(Status::BadArgument.into());
    };
    Ok(())
}
