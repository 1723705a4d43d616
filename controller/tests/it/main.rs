//! The tests of this crate that need no process of their own, in one binary: linking is most of what a test binary costs.

mod compile;
mod compile_clusters;
mod compile_conformance;
mod compile_gateways;
mod compile_properties;
mod compile_rules;
mod compile_sidecar;
mod compile_virtual_services;
mod conflicts;
mod envoy_listeners;
mod fake_api;
mod kubernetes_source;
mod objects;
mod reload;
mod serve_command;
mod serve_tcp;
mod shuffle;
mod stream;
mod validate_command;
mod validation;
mod webhook;
mod yaml_source;
