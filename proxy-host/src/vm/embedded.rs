//! The filter that this build carries.

use super::engine::Engine;
use super::error::EngineError;

/// `filter.wasm`, as it would be given to Envoy.
pub const FILTER_WASM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/filter.wasm"));

/// The same, compiled for the machine that built it.
const FILTER_CWASM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/filter.cwasm"));

/// The filter, ready to start: in less than a millisecond where the CPU has all that the building one had, after a
/// compilation otherwise.
///
/// # Errors
/// When this machine cannot run wasmtime at all.
#[allow(unsafe_code, reason = "the artifact was made by our own build script from the module beside it")]
pub fn filter() -> Result<Engine, EngineError> {
    // SAFETY: build.rs wrote the artifact with the same settings, and the binary carries it unchanged.
    match unsafe { Engine::precompiled(FILTER_CWASM) } {
        Err(EngineError::Precompiled(_)) => Engine::compile(FILTER_WASM),
        loaded => loaded,
    }
}
