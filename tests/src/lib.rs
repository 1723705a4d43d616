//! What the tests of the whole system share.

pub mod origin;
pub mod repo;
pub mod wasm;
