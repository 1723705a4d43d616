//! Resources in the shape they are written in, decoded by the rules of protobuf JSON and not judged yet.

pub mod decode;
pub mod kubernetes;
pub mod mesh;
pub mod meta;
pub mod service_entry;
pub mod workload_entry;
