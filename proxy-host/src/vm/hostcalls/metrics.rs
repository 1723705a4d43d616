//! Metrics.

use super::{ENV, HostState};
use crate::vm::abi::MetricKind;
use crate::vm::memory::{Fault, finish, read_str, split, write, write_u32};
use wasmtime::{Caller, Linker};

pub(super) fn link(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker.func_wrap(
        ENV,
        "proxy_define_metric",
        |caller: Caller<'_, HostState>, kind: u32, name: u32, len: u32, to: u32| {
            finish(define(caller, kind, name, len, to))
        },
    )?;
    linker.func_wrap(ENV, "proxy_increment_metric", |caller: Caller<'_, HostState>, id: u32, offset: i64| {
        finish(caller.data().metrics.increment(id, offset).map_err(Fault::from))
    })?;
    linker.func_wrap(ENV, "proxy_record_metric", |caller: Caller<'_, HostState>, id: u32, value: u64| {
        finish(caller.data().metrics.record(id, value).map_err(Fault::from))
    })?;
    linker.func_wrap(ENV, "proxy_get_metric", |caller: Caller<'_, HostState>, id: u32, to: u32| {
        finish(get(caller, id, to))
    })?;
    Ok(())
}

fn define(mut caller: Caller<'_, HostState>, kind: u32, name: u32, len: u32, to: u32) -> Result<(), Fault> {
    let kind = MetricKind::from_abi(kind)?;
    let (memory, state) = split(&mut caller)?;
    let id = state.metrics.define(kind, read_str(memory, name, len)?)?;
    Ok(write_u32(memory, to, id)?)
}

fn get(mut caller: Caller<'_, HostState>, id: u32, to: u32) -> Result<(), Fault> {
    let value = caller.data().metrics.read(id)?;
    let (memory, _) = split(&mut caller)?;
    Ok(write(memory, to, &value.to_le_bytes())?)
}
