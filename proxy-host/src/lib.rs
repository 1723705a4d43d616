//! A small proxy that runs `filter.wasm` and does what it decides.

pub mod vm;
