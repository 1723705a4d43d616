//! The proxy-wasm filter: it asks the registry about every connection and request, and tells the host.
//!
//! One [`vm::Vm`] holds what a VM has: the snapshot, the subscription that keeps it fresh, the metrics. The host's
//! callbacks enter through `host::abi`, and go to [`root`], [`http`] or [`tcp`]; they reach the host only through
//! [`host::Host`]. Nothing here knows Istio's rules, and no byte of a client and no status of a host makes it panic.

#![cfg_attr(
    not(any(test, feature = "fake")),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

mod carry;
pub mod config;
mod envoy;
mod hash_key;
pub mod host;
pub mod http;
mod later;
pub mod metrics;
mod request;
pub mod root;
pub mod subscription;
pub mod tcp;
#[cfg(test)]
mod testing;
pub mod vm;
