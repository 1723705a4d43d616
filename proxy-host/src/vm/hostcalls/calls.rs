//! HTTP calls of the guest's own.

use super::{ENV, HostState};
use crate::vm::abi::{Status, read_pairs};
use crate::vm::env::HttpCall;
use crate::vm::memory::{Fault, finish, read, split, write_u32};
use crate::vm::state::CallKind;
use crate::vm::stream::{header_map, request_head};
use bytes::Bytes;
use std::time::Duration;
use wasmtime::{Caller, Linker};

pub(super) fn link(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker.func_wrap(
        ENV,
        "proxy_http_call",
        |caller: Caller<'_, HostState>,
         upstream: u32,
         upstream_len: u32,
         headers: u32,
         headers_len: u32,
         body: u32,
         body_len: u32,
         trailers: u32,
         trailers_len: u32,
         timeout: u32,
         to: u32| {
            let parts = [(upstream, upstream_len), (headers, headers_len), (body, body_len), (trailers, trailers_len)];
            finish(call(caller, parts, timeout, to))
        },
    )?;
    Ok(())
}

fn call(mut caller: Caller<'_, HostState>, parts: [(u32, u32); 4], timeout: u32, to: u32) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    let [upstream, headers, body, trailers] = parts;
    let head = request_head(&read_pairs(read(memory, headers.0, headers.1)?)?).ok_or(Status::BadArgument)?;
    // As Envoy: a call needs to say what it asks for.
    if head.path.is_none() || head.authority.is_none() {
        return Err(Status::BadArgument.into());
    }
    let (trailers, refused) = header_map(read_pairs(read(memory, trailers.0, trailers.1)?)?);
    if refused > 0 {
        return Err(Status::BadArgument.into());
    }
    let call = HttpCall {
        upstream: Bytes::copy_from_slice(read(memory, upstream.0, upstream.1)?),
        head,
        body: Bytes::copy_from_slice(read(memory, body.0, body.1)?),
        trailers,
        timeout: Duration::from_millis(timeout.into()),
    };
    // Checked before the call is made, which cannot be taken back.
    read(memory, to, 4)?;
    let token = state.new_call(CallKind::Http);
    if let Err(status) = state.env.http_call(token, call) {
        state.calls.remove(&token);
        return Err(status.into());
    }
    Ok(write_u32(memory, to, token.0)?)
}
