//! `proxy-host filter` as a process: filters built on the public SDK, driven by clients. What Envoy does with the same
//! module is compared where the project has installed it.

mod admin;
mod calls;
mod cli;
mod endings;
mod foreign;
mod go;
mod http;
mod maps;
mod modules;
mod network;
mod support;
mod version;
