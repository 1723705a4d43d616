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

/// Links every hostcall. As in Envoy, a module that imports anything else does not load: `proxy_get_log_level` is of ABI
/// 0.2.1, and names outside WASI and this ABI are nobody's.
pub(super) fn link(linker: &mut Linker<HostState>, module: &Module) -> wasmtime::Result<()> {
    log::link(linker, module.get_export("proxy_abi_version_0_2_1").is_some())?;
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
    // What Emscripten's runtime, and with it the C++ SDK, needs beside the ABI.
    linker.func_wrap(ENV, "emscripten_notify_memory_growth", |_: u32| ())?;
    linker.func_wrap(ENV, "pthread_equal", |one: u32, other: u32| u32::from(one == other))?;
    Ok(())
}
