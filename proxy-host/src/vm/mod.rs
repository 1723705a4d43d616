//! Runs proxy-wasm modules (ABI 0.2.0 and 0.2.1) in wasmtime.
//!
//! | type | is |
//! |---|---|
//! | [`Engine`] | a compiled module, ready to instantiate; one per process, shared by all threads |
//! | [`Vm`] | one instance with its root contexts and streams; one per thread |
//! | [`Env`] | what the VM asks of its surroundings: log, clocks, calls to upstreams |
//! | [`Properties`] | attributes of one stream |
//! | [`Shared`] | metrics, shared data and queues of all VMs of the process |
//!
//! A stream's life: [`Vm::create_http`], move the headers into [`Vm::http`], [`Vm::on_request_headers`], act on its
//! [`Outcome`], take the headers out, and so on; [`Vm::finish`] at its end. What the guest asks for a stream outside that
//! stream's own callback comes out of [`Vm::next_effect`], to be asked after each callback. After a [`Trap`] the VM is dead
//! and a fresh one is started from the same engine, which costs microseconds.
//!
//! No callback runs longer than the deadline and no instance holds more memory than the limit of [`Limits`].

mod abi;
mod callbacks;
pub mod embedded;
mod engine;
mod env;
mod error;
mod exports;
mod hostcalls;
mod inline;
mod instance;
mod memory;
mod metrics;
mod settings;
mod shared;
mod state;
mod stored;
mod stream;

pub use abi::{BufferType, LogLevel, MapType, MetricKind, Pairs, PeerType, Status, StreamType};
pub use callbacks::HttpCallResponse;
pub use engine::{Engine, Limits};
pub use env::{CallToken, ContextId, Env, GrpcRequest, HttpCall, Properties};
pub use error::{EngineError, StartError, Trap, TrapKind};
pub use inline::{join, once_in_request, once_in_response};
pub use instance::{Vm, VmConfig, Wants};
pub use metrics::{BUCKETS, MetricValue, Metrics};
pub use shared::{QueueWaker, Shared};
pub use state::{PluginConfig, PluginKind};
pub use stored::ConnectionState;
pub use stream::{
    Effect, EffectKind, FilterState, HttpState, LocalResponse, NetworkState, Outcome, RequestHead, ResponseHead, Shown,
};
