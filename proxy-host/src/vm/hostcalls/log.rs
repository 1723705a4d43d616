//! Logging.

use super::{ENV, HostState};
use crate::vm::abi::LogLevel;
use crate::vm::memory::{Fault, finish, read, split, write_u32};
use wasmtime::{Caller, Linker};

pub(super) fn link(linker: &mut Linker<HostState>, with_level: bool) -> wasmtime::Result<()> {
    linker.func_wrap(ENV, "proxy_log", |caller: Caller<'_, HostState>, level: u32, at: u32, len: u32| {
        finish(log(caller, level, at, len))
    })?;
    if with_level {
        linker.func_wrap(ENV, "proxy_get_log_level", |caller: Caller<'_, HostState>, to: u32| {
            finish(log_level(caller, to))
        })?;
    }
    Ok(())
}

fn log(mut caller: Caller<'_, HostState>, level: u32, at: u32, len: u32) -> Result<(), Fault> {
    let level = LogLevel::from_abi(level)?;
    let (memory, state) = split(&mut caller)?;
    let message = read(memory, at, len)?;
    if level >= state.env.log_level() {
        state.env.log(level, message);
    }
    Ok(())
}

fn log_level(mut caller: Caller<'_, HostState>, to: u32) -> Result<(), Fault> {
    let level = caller.data().env.log_level();
    let (memory, _) = split(&mut caller)?;
    Ok(write_u32(memory, to, level as u32)?)
}
