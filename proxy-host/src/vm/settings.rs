//! The wasmtime settings, shared with `build.rs`: an artifact loads only into an engine with the settings it was compiled with.

/// Settings under which modules are compiled, ahead of time or at start.
pub fn wasmtime_config() -> wasmtime::Config {
    let mut config = wasmtime::Config::new();
    config
        .epoch_interruption(true)
        .cranelift_opt_level(wasmtime::OptLevel::Speed)
        .memory_init_cow(true)
        .max_wasm_stack(512 * 1024);
    config
}
