//! A compiled module, its limits, and the clock that ends callbacks.

use super::error::EngineError;
use super::hostcalls;
use super::settings::wasmtime_config;
use super::state::HostState;
use std::sync::Arc;
use std::time::Duration;
use wasmtime::{InstancePre, Linker, Module};

/// How often the epoch advances, and so how exactly a deadline is kept.
const EPOCH: Duration = Duration::from_millis(5);

/// What one instance may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest time of one callback.
    pub deadline: Duration,
    /// Most linear memory, in bytes.
    pub memory: usize,
}

impl Default for Limits {
    /// 100 ms; 256 MiB, so that the snapshot of a large registry fits twice during an update.
    fn default() -> Self {
        Self { deadline: Duration::from_millis(100), memory: 256 << 20 }
    }
}

impl Limits {
    /// The deadline in epochs; one more, because the first may be nearly over.
    pub(super) fn ticks(&self) -> u64 {
        u64::try_from(self.deadline.as_millis().div_ceil(EPOCH.as_millis())).unwrap_or(u64::MAX / 2) + 1
    }
}

/// A compiled proxy-wasm module with everything that instances share. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    engine: wasmtime::Engine,
    pre: Arc<InstancePre<HostState>>,
}

impl Engine {
    /// Compiles a module, which takes from tens of milliseconds to seconds.
    ///
    /// # Errors
    /// When the bytes are no proxy-wasm module of a known ABI version.
    pub fn compile(wasm: &[u8]) -> Result<Self, EngineError> {
        let engine = start()?;
        let module = Module::new(&engine, wasm).map_err(|error| EngineError::Compile(format!("{error:#}")))?;
        Self::link(engine, &module)
    }

    /// Loads what [`Engine::precompile`] made, in less than a millisecond.
    ///
    /// # Errors
    /// [`EngineError::Precompiled`] when it was made with another wasmtime or other settings, or for a CPU that has
    /// more than this one: compile the module then.
    ///
    /// # Safety
    /// `artifact` must be unchanged output of [`Engine::precompile`] (or of the same settings in `build.rs`): it holds
    /// machine code.
    #[allow(unsafe_code, reason = "machine code that was compiled ahead of time can only be trusted, not checked")]
    pub unsafe fn precompiled(artifact: &[u8]) -> Result<Self, EngineError> {
        let engine = start()?;
        // SAFETY: the caller vouches for the artifact.
        let module = unsafe { Module::deserialize(&engine, artifact) }
            .map_err(|error| EngineError::Precompiled(format!("{error:#}")))?;
        Self::link(engine, &module)
    }

    /// Compiles ahead of time, for [`Engine::precompiled`].
    ///
    /// # Errors
    /// [`EngineError::Compile`] when the bytes are not a module.
    pub fn precompile(wasm: &[u8]) -> Result<Vec<u8>, EngineError> {
        let engine =
            wasmtime::Engine::new(&wasmtime_config()).map_err(|error| EngineError::Wasmtime(format!("{error:#}")))?;
        engine.precompile_module(wasm).map_err(|error| EngineError::Compile(format!("{error:#}")))
    }

    fn link(engine: wasmtime::Engine, module: &Module) -> Result<Self, EngineError> {
        let versions = ["proxy_abi_version_0_2_1", "proxy_abi_version_0_2_0"];
        if !versions.iter().any(|version| module.get_export(version).is_some()) {
            return Err(EngineError::AbiVersion);
        }
        let mut linker = Linker::new(&engine);
        let pre = hostcalls::link(&mut linker, module).and_then(|()| linker.instantiate_pre(module));
        let pre = pre.map_err(|error| EngineError::Link(format!("{error:#}")))?;
        Ok(Self { engine, pre: Arc::new(pre) })
    }

    pub(super) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.engine
    }

    pub(super) fn pre(&self) -> &InstancePre<HostState> {
        &self.pre
    }
}

/// Starts wasmtime and the thread that advances its epoch for as long as it lives.
fn start() -> Result<wasmtime::Engine, EngineError> {
    let engine =
        wasmtime::Engine::new(&wasmtime_config()).map_err(|error| EngineError::Wasmtime(format!("{error:#}")))?;
    let weak = engine.weak();
    let tick = move || {
        while let Some(engine) = weak.upgrade() {
            engine.increment_epoch();
            drop(engine);
            std::thread::park_timeout(EPOCH);
        }
    };
    std::thread::Builder::new()
        .name("wasm-epoch".to_owned())
        .spawn(tick)
        .map_err(|error| EngineError::Wasmtime(error.to_string()))?;
    Ok(engine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_engine_serves_all_threads() {
        fn shareable<T: Send + Sync>() {}
        shareable::<Engine>();
    }

    #[test]
    fn a_deadline_is_never_shorter_than_asked_for() {
        let ticks = |millis| Limits { deadline: Duration::from_millis(millis), ..Limits::default() }.ticks();
        assert_eq!((ticks(0), ticks(1), ticks(5), ticks(100)), (1, 2, 2, 21));
    }
}
