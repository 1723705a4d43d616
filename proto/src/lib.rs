//! The wire: Portolan's registry stream and listener plan, and (feature `xds`) Envoy's own discovery messages.
//!
//! Nothing here decides anything. The code in `gen` is generated from `proto/` and committed; the test
//! `bootstrap` proves that both say the same, and rewrites it with `UPDATE=1`.

/// Messages of `portolan.v1`; with feature `grpc` also its client and server.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::cast_possible_wrap)]
pub mod v1 {
    include!("gen/portolan.v1.rs");
}

/// Envoy's messages and services, from the crate that carries them.
#[cfg(feature = "xds")]
pub use envoy_types::pb as envoy;

/// Type URL of [`v1::ListenerPlan`] in delta discovery.
pub const LISTENER_PLAN_TYPE_URL: &str = "type.googleapis.com/portolan.v1.ListenerPlan";
/// Type URL of [`v1::DnsName`] in delta discovery.
pub const DNS_NAME_TYPE_URL: &str = "type.googleapis.com/portolan.v1.DnsName";
/// Type URL of Envoy's cluster in delta discovery.
pub const CLUSTER_TYPE_URL: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
/// Type URL of Envoy's listener in delta discovery.
pub const LISTENER_TYPE_URL: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
