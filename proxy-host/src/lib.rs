//! proxy-host: a small proxy that runs the Portolan filter in wasmtime, and carries traffic where it says.
//!
//! A request or connection comes in by a [`listener`], is shown to the [`filter`] by way of the proxy-wasm ABI
//! ([`vm`]), and goes out to a cluster of [`upstream`]. Like Envoy, nothing here knows why the filter chose it.

#![allow(
    clippy::large_enum_variant,
    clippy::result_large_err,
    reason = "such values are moved once per request; a box would cost an allocation each time"
)]

pub mod access_log;
pub mod admin;
pub mod ads;
pub mod any_filter;
pub mod app;
pub mod body;
pub mod capture;
pub mod commands;
pub mod config;
pub mod control;
pub mod controller;
pub mod controller_tls;
pub mod dns;
pub mod dns_proxy;
pub mod exec;
pub mod filter;
pub mod filter_env;
pub mod flags;
mod gather;
pub mod headers;
pub mod idle;
pub mod inherited;
pub mod limits;
pub mod listener;
pub mod logging;
pub mod path;
pub mod replay;
pub mod router;
pub mod run;
pub mod stats;
pub mod upstream;
pub mod vm;
pub mod worker;
