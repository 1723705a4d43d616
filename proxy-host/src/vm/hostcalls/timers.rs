//! Clock and timers.

use super::{ENV, HostState};
use crate::vm::abi::Status;
use crate::vm::memory::{Fault, finish, split, write};
use std::time::Duration;
use wasmtime::{Caller, Linker};

pub(super) fn link(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker.func_wrap(ENV, "proxy_get_current_time_nanoseconds", |caller: Caller<'_, HostState>, to: u32| {
        finish(now(caller, to))
    })?;
    linker.func_wrap(ENV, "proxy_set_tick_period_milliseconds", |caller: Caller<'_, HostState>, period: u32| {
        finish(set_tick(caller, period))
    })?;
    Ok(())
}

fn now(mut caller: Caller<'_, HostState>, to: u32) -> Result<(), Fault> {
    let now = caller.data().env.now();
    let (memory, _) = split(&mut caller)?;
    Ok(write(memory, to, &now.to_le_bytes())?)
}

/// The timer is the root context's, whichever of its contexts sets it.
fn set_tick(mut caller: Caller<'_, HostState>, period: u32) -> Result<(), Fault> {
    let state = caller.data_mut();
    let root = state.root().ok_or(Status::BadArgument)?.id;
    state.env.set_tick(root, Duration::from_millis(period.into()));
    Ok(())
}
