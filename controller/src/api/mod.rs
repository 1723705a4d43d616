//! Resources in the shape they are written in, decoded by the rules of protobuf JSON and not judged yet.

pub mod decode;
pub mod destination_rule;
pub mod gateway;
pub mod kubernetes;
pub mod mesh;
pub mod message;
pub mod meta;
pub mod service_entry;
pub mod sidecar;
pub mod virtual_service;
pub mod workload_entry;
