//! Steering streams: continue, close, answer, and which context is meant.

use super::{ENV, HostState};
use crate::vm::abi::{Status, StreamType, read_pairs};
use crate::vm::env::ContextId;
use crate::vm::memory::{Fault, finish, read, split};
use crate::vm::stream::{EffectKind, LocalResponse, StreamKind, header_map};
use bytes::Bytes;
use http::StatusCode;
use wasmtime::{Caller, Linker};

pub(super) fn link(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker.func_wrap(ENV, "proxy_continue_stream", |caller: Caller<'_, HostState>, stream: u32| {
        finish(steer(caller, stream, EffectKind::Continue))
    })?;
    linker.func_wrap(ENV, "proxy_close_stream", |caller: Caller<'_, HostState>, stream: u32| {
        finish(steer(caller, stream, EffectKind::Close))
    })?;
    linker.func_wrap(
        ENV,
        "proxy_send_local_response",
        |caller: Caller<'_, HostState>,
         status: u32,
         details: u32,
         details_len: u32,
         body: u32,
         body_len: u32,
         headers: u32,
         headers_len: u32,
         grpc_status: u32| {
            let (details, body, headers) = ((details, details_len), (body, body_len), (headers, headers_len));
            finish(respond(caller, status, details, body, headers, grpc_status))
        },
    )?;
    linker.func_wrap(ENV, "proxy_set_effective_context", |caller: Caller<'_, HostState>, id: u32| {
        finish(set_effective(caller, id))
    })?;
    linker.func_wrap(ENV, "proxy_done", |caller: Caller<'_, HostState>| finish(done(caller)))?;
    Ok(())
}

fn steer(
    mut caller: Caller<'_, HostState>,
    stream: u32,
    effect: impl Fn(StreamType) -> EffectKind,
) -> Result<(), Fault> {
    let stream = StreamType::from_abi(stream)?;
    let state = caller.data_mut();
    match (state.stream().map(|stream| &stream.kind), stream) {
        // As Envoy: what comes from the upstream goes on when more of it comes, and cannot be continued.
        (Some(StreamKind::Network(_)), StreamType::Upstream) if matches!(effect(stream), EffectKind::Continue(_)) => {
            Err(Status::Unimplemented.into())
        }
        (Some(StreamKind::Http(_)), StreamType::Request | StreamType::Response)
        | (Some(StreamKind::Network(_)), StreamType::Downstream | StreamType::Upstream) => {
            state.push_effect(effect(stream));
            Ok(())
        }
        _ => Err(Status::BadArgument.into()),
    }
}

fn respond(
    mut caller: Caller<'_, HostState>,
    status: u32,
    details: (u32, u32),
    body: (u32, u32),
    headers: (u32, u32),
    grpc_status: u32,
) -> Result<(), Fault> {
    let status = u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok());
    let status = status.ok_or(Status::BadArgument)?;
    let (memory, state) = split(&mut caller)?;
    let (headers, refused) = header_map(read_pairs(read(memory, headers.0, headers.1)?)?);
    if refused > 0 || state.http().is_none() {
        return Err(Status::BadArgument.into());
    }
    let response = LocalResponse {
        status,
        details: Bytes::copy_from_slice(read(memory, details.0, details.1)?),
        body: Bytes::copy_from_slice(read(memory, body.0, body.1)?),
        headers,
        // The guest passes -1 for "not gRPC"; gRPC has the codes 0 to 16.
        grpc_status: (grpc_status <= 16).then_some(grpc_status),
    };
    state.push_effect(EffectKind::Respond(Box::new(response)));
    Ok(())
}

fn set_effective(mut caller: Caller<'_, HostState>, id: u32) -> Result<(), Fault> {
    let state = caller.data_mut();
    if !state.knows(id) {
        return Err(Status::BadArgument.into());
    }
    state.effective = id;
    Ok(())
}

fn done(mut caller: Caller<'_, HostState>) -> Result<(), Fault> {
    let state = caller.data_mut();
    let id = state.effective;
    if !state.stream().is_some_and(|stream| stream.draining) {
        return Err(Status::NotFound.into());
    }
    state.done.push(ContextId(id));
    Ok(())
}
