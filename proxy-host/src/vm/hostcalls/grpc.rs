//! gRPC calls and streams of the guest's own.

use super::{ENV, HostState};
use crate::vm::abi::{Status, read_pairs};
use crate::vm::env::{CallToken, GrpcRequest};
use crate::vm::memory::{Fault, finish, give, read, read_str, split, write_u32};
use crate::vm::state::CallKind;
use bytes::Bytes;
use std::time::Duration;
use wasmtime::{Caller, Linker};

pub(super) fn link(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker.func_wrap(
        ENV,
        "proxy_grpc_stream",
        |caller: Caller<'_, HostState>,
         upstream: u32,
         upstream_len: u32,
         service: u32,
         service_len: u32,
         method: u32,
         method_len: u32,
         metadata: u32,
         metadata_len: u32,
         to: u32| {
            let target =
                [(upstream, upstream_len), (service, service_len), (method, method_len), (metadata, metadata_len)];
            finish(open(caller, target, None, to))
        },
    )?;
    linker.func_wrap(
        ENV,
        "proxy_grpc_call",
        |caller: Caller<'_, HostState>,
         upstream: u32,
         upstream_len: u32,
         service: u32,
         service_len: u32,
         method: u32,
         method_len: u32,
         metadata: u32,
         metadata_len: u32,
         message: u32,
         message_len: u32,
         timeout: u32,
         to: u32| {
            let target =
                [(upstream, upstream_len), (service, service_len), (method, method_len), (metadata, metadata_len)];
            finish(open(caller, target, Some(((message, message_len), timeout)), to))
        },
    )?;
    linker.func_wrap(
        ENV,
        "proxy_grpc_send",
        |caller: Caller<'_, HostState>, token: u32, at: u32, len: u32, end_of_stream: u32| {
            finish(send(caller, CallToken(token), at, len, end_of_stream != 0))
        },
    )?;
    linker.func_wrap(ENV, "proxy_grpc_close", |caller: Caller<'_, HostState>, token: u32| {
        finish(close(caller, CallToken(token)))
    })?;
    linker.func_wrap(ENV, "proxy_grpc_cancel", |caller: Caller<'_, HostState>, token: u32| {
        finish(cancel(caller, CallToken(token)))
    })?;
    linker.func_wrap(
        ENV,
        "proxy_get_status",
        |caller: Caller<'_, HostState>, to_code: u32, to: u32, to_len: u32| finish(status(caller, to_code, to, to_len)),
    )?;
    Ok(())
}

/// Opens a stream, or makes a call when there is a message with its time limit in milliseconds.
fn open(
    mut caller: Caller<'_, HostState>,
    [upstream, service, method, metadata]: [(u32, u32); 4],
    message: Option<((u32, u32), u32)>,
    to: u32,
) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    let pairs = read_pairs(read(memory, metadata.0, metadata.1)?)?;
    let own = |bytes: &[u8]| Bytes::copy_from_slice(bytes);
    let request = GrpcRequest {
        upstream: own(read(memory, upstream.0, upstream.1)?),
        service: read_str(memory, service.0, service.1)?.to_owned(),
        method: read_str(memory, method.0, method.1)?.to_owned(),
        initial_metadata: pairs.into_iter().map(|(name, value)| (own(name), own(value))).collect(),
    };
    // Checked before the stream is opened, which cannot be taken back.
    read(memory, to, 4)?;
    let (token, opened) = match message {
        None => {
            let token = state.new_call(CallKind::GrpcStream);
            (token, state.env.open_grpc_stream(token, request))
        }
        Some((message, timeout)) => {
            let message = own(read(memory, message.0, message.1)?);
            let token = state.new_call(CallKind::Grpc);
            (token, state.env.grpc_call(token, request, message, Duration::from_millis(timeout.into())))
        }
    };
    if let Err(status) = opened {
        state.calls.remove(&token);
        return Err(status.into());
    }
    Ok(write_u32(memory, to, token.0)?)
}

fn is_grpc(state: &HostState, token: CallToken) -> Result<CallKind, Status> {
    match state.calls.get(&token) {
        Some(call) if call.kind != CallKind::Http => Ok(call.kind),
        _ => Err(Status::NotFound),
    }
}

fn send(
    mut caller: Caller<'_, HostState>,
    token: CallToken,
    at: u32,
    len: u32,
    end_of_stream: bool,
) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    if is_grpc(state, token)? != CallKind::GrpcStream {
        return Err(Status::BadArgument.into());
    }
    let message = Bytes::copy_from_slice(read(memory, at, len)?);
    Ok(state.env.send_grpc(token, message, end_of_stream)?)
}

fn close(mut caller: Caller<'_, HostState>, token: CallToken) -> Result<(), Fault> {
    let state = caller.data_mut();
    match is_grpc(state, token)? {
        CallKind::GrpcStream => state.env.close_grpc(token),
        // A call has nothing left to send.
        _ => return cancel(caller, token),
    }
    Ok(())
}

fn cancel(mut caller: Caller<'_, HostState>, token: CallToken) -> Result<(), Fault> {
    let state = caller.data_mut();
    is_grpc(state, token)?;
    state.calls.remove(&token);
    state.env.cancel_call(token);
    Ok(())
}

/// Code and message of the gRPC stream or call that just ended.
fn status(mut caller: Caller<'_, HostState>, to_code: u32, to: u32, to_len: u32) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    let (code, message) = state.delivery.status.clone().unwrap_or_default();
    write_u32(memory, to_code, code)?;
    give(&mut caller, &message, to, to_len)
}
