//! The few Envoy messages that host calls take, cut down to the fields we set.

use prost::Message;

use crate::host::{Host, Status};

/// `envoy.config.core.v3.GrpcService`
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct GrpcService {
    #[prost(message, optional, tag = "1")]
    pub(crate) envoy_grpc: Option<EnvoyGrpc>,
}

/// `envoy.config.core.v3.GrpcService.EnvoyGrpc`
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct EnvoyGrpc {
    #[prost(string, tag = "1")]
    pub(crate) cluster_name: String,
}

/// `envoy.source.extensions.common.wasm.SetEnvoyFilterStateArguments`
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SetFilterState {
    #[prost(string, tag = "1")]
    pub(crate) path: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) value: Vec<u8>,
    /// `LifeSpan`: 1 is `DownstreamRequest`.
    #[prost(int32, tag = "3")]
    pub(crate) span: i32,
}

/// Sets filter state of the stream; `span` is that of the message.
pub(crate) fn set_state(host: &impl Host, path: &str, value: &[u8], span: i32) -> Result<(), Status> {
    let arguments = SetFilterState { path: path.to_owned(), value: value.to_owned(), span };
    host.foreign("set_envoy_filter_state", &arguments.encode_to_vec())
}
