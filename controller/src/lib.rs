//! The controller: Istio resources in, compiled snapshots, listener plans and clusters out.

mod allocate;
pub mod api;
pub mod cluster;
pub mod compile;
pub mod config;

pub mod discovery;
mod distinctions;
pub mod embed;
pub mod envoy;
pub mod model;
pub mod publish;
pub mod serve;
pub mod source;
pub mod status;
pub mod validate;
