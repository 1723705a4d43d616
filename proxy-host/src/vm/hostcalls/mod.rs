//! The functions a guest may import, by group. Each group adds its own to the linker.

mod buffers;
mod calls;
mod expression;
mod foreign;
mod grpc;
mod log;
mod maps;
mod metrics;
mod properties;
mod shared_data;
mod signature;
mod streams;
mod timers;
mod wasi;

use super::state::HostState;
pub(super) use expression::Expressions;
pub(super) use wasi::Exit;
use wasmtime::{Linker, Module};

/// Module name of the proxy-wasm functions.
const ENV: &str = "env";

/// Links every hostcall, and stand-ins for the rest of what `module` imports.
pub(super) fn link(linker: &mut Linker<HostState>, module: &Module) -> wasmtime::Result<()> {
    log::link(linker)?;
    buffers::link(linker)?;
    maps::link(linker)?;
    properties::link(linker)?;
    metrics::link(linker)?;
    shared_data::link(linker)?;
    timers::link(linker)?;
    streams::link(linker)?;
    calls::link(linker)?;
    grpc::link(linker)?;
    foreign::link(linker)?;
    wasi::link(linker, module)?;
    linker.define_unknown_imports_as_traps(module)
}
