//! What a controller tells those who wrote the resources: conditions and allocated addresses in `status`,
//! written by one of several controllers.

pub mod conditions;
pub mod lease;
mod writer;

pub use writer::write;
