//! The tests of this crate that need no process of their own, in one binary: linking is most of what a test binary costs.

mod admin;
mod app;
mod cluster_policy;
mod corpus;
mod descriptors;
mod dns;
mod dns_proxy;
mod endings;
mod exchanges;
mod floods;
mod gateway;
mod h2spec;
mod http2;
mod http2_upstream;
mod http_support;
mod keep_alive;
mod operation;
mod proxy_support;
mod raw_http2;
mod remote;
mod router_policy;
mod timeouts;
mod tls_origination;
mod vm_hostcalls;
mod vm_limits;
mod vm_support;
