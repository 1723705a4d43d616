//! The few Envoy messages that host calls take, cut down to the fields we set.

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
