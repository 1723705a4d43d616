//! The controller: Istio resources in, compiled snapshots, listener plans and clusters out.

pub mod cluster;
pub mod compile;
pub mod model;
pub mod publish;
pub mod serve;
