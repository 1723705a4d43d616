//! Every event that a VM can be told.

use super::abi::{Pairs, PeerType, StreamType};
use super::env::{CallToken, ContextId};
use super::error::Trap;
use super::instance::Vm;
use super::state::{Call, CallKind, Delivery, HttpDelivery};
use super::stream::{Outcome, ResponseHead};
use bytes::Bytes;
use http::HeaderMap;

/// Response to an HTTP call of the guest.
#[derive(Debug, Default)]
pub struct HttpCallResponse {
    /// Status and headers.
    pub head: ResponseHead,
    /// Whole body.
    pub body: Bytes,
    /// Trailers; empty for none.
    pub trailers: HeaderMap,
}

/// The ABI's sizes are 32 bits; more does not fit into the guest.
fn size(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// HTTP streams. The part that a callback is about has to be in [`Vm::http`] when it is called.
///
/// # Errors
/// Each returns the [`Trap`] when the guest crashed or ran too long; the stream must then be refused.
impl Vm {
    /// Request headers have arrived.
    pub fn on_request_headers(&mut self, context: ContextId, end_of_stream: bool) -> Result<Outcome, Trap> {
        // The pseudo headers count too.
        let count = self.http(context).map_or(0, |http| {
            let head = &http.request;
            let pseudo = [&head.authority, &head.path, &head.scheme].into_iter().flatten().count() + 1;
            size(head.headers.len() + pseudo)
        });
        let func = self.exports.request_headers.as_ref();
        let params = (context.0, count, end_of_stream.into());
        let answer = self.instance.call_opt("proxy_on_request_headers", context, func, params)?;
        self.outcome(StreamType::Request, answer)
    }

    /// Bytes of the request body have arrived.
    pub fn on_request_body(&mut self, context: ContextId, end_of_stream: bool) -> Result<Outcome, Trap> {
        let len = self.http(context).map_or(0, |http| size(http.request_body.len()));
        let func = self.exports.request_body.as_ref();
        let params = (context.0, len, end_of_stream.into());
        let answer = self.instance.call_opt("proxy_on_request_body", context, func, params)?;
        self.outcome(StreamType::Request, answer)
    }

    /// Request trailers have arrived.
    pub fn on_request_trailers(&mut self, context: ContextId) -> Result<Outcome, Trap> {
        let count = self.http(context).map_or(0, |http| size(http.request_trailers.len()));
        let func = self.exports.request_trailers.as_ref();
        let answer = self.instance.call_opt("proxy_on_request_trailers", context, func, (context.0, count))?;
        self.outcome(StreamType::Request, answer)
    }

    /// Response headers have arrived.
    pub fn on_response_headers(&mut self, context: ContextId, end_of_stream: bool) -> Result<Outcome, Trap> {
        // One more for `:status`.
        let count = self.http(context).map_or(0, |http| size(http.response.headers.len() + 1));
        let func = self.exports.response_headers.as_ref();
        let params = (context.0, count, end_of_stream.into());
        let answer = self.instance.call_opt("proxy_on_response_headers", context, func, params)?;
        self.outcome(StreamType::Response, answer)
    }

    /// Bytes of the response body have arrived.
    pub fn on_response_body(&mut self, context: ContextId, end_of_stream: bool) -> Result<Outcome, Trap> {
        let len = self.http(context).map_or(0, |http| size(http.response_body.len()));
        let func = self.exports.response_body.as_ref();
        let params = (context.0, len, end_of_stream.into());
        let answer = self.instance.call_opt("proxy_on_response_body", context, func, params)?;
        self.outcome(StreamType::Response, answer)
    }

    /// Response trailers have arrived.
    pub fn on_response_trailers(&mut self, context: ContextId) -> Result<Outcome, Trap> {
        let count = self.http(context).map_or(0, |http| size(http.response_trailers.len()));
        let func = self.exports.response_trailers.as_ref();
        let answer = self.instance.call_opt("proxy_on_response_trailers", context, func, (context.0, count))?;
        self.outcome(StreamType::Response, answer)
    }
}

/// TCP connections. The bytes that a callback is about have to be in [`Vm::network`] when it is called.
///
/// # Errors
/// Each returns the [`Trap`] when the guest crashed or ran too long; the connection must then be closed.
impl Vm {
    /// A client has connected.
    pub fn on_new_connection(&mut self, context: ContextId) -> Result<Outcome, Trap> {
        let func = self.exports.new_connection.as_ref();
        let answer = self.instance.call_opt("proxy_on_new_connection", context, func, context.0)?;
        self.outcome(StreamType::Downstream, answer)
    }

    /// Bytes from the client have arrived.
    pub fn on_downstream_data(&mut self, context: ContextId, end_of_stream: bool) -> Result<Outcome, Trap> {
        let len = self.network(context).map_or(0, |network| size(network.downstream.len()));
        let func = self.exports.downstream_data.as_ref();
        let params = (context.0, len, end_of_stream.into());
        let answer = self.instance.call_opt("proxy_on_downstream_data", context, func, params)?;
        self.outcome(StreamType::Downstream, answer)
    }

    /// Bytes from the upstream have arrived.
    pub fn on_upstream_data(&mut self, context: ContextId, end_of_stream: bool) -> Result<Outcome, Trap> {
        let len = self.network(context).map_or(0, |network| size(network.upstream.len()));
        let func = self.exports.upstream_data.as_ref();
        let params = (context.0, len, end_of_stream.into());
        let answer = self.instance.call_opt("proxy_on_upstream_data", context, func, params)?;
        self.outcome(StreamType::Upstream, answer)
    }

    /// The connection to the client is closed.
    pub fn on_downstream_connection_close(&mut self, context: ContextId, by: PeerType) -> Result<(), Trap> {
        let func = self.exports.downstream_close.as_ref();
        let params = (context.0, by as u32);
        self.instance.call_opt("proxy_on_downstream_connection_close", context, func, params)?;
        self.after_callback()
    }

    /// The connection to the upstream is closed.
    pub fn on_upstream_connection_close(&mut self, context: ContextId, by: PeerType) -> Result<(), Trap> {
        let func = self.exports.upstream_close.as_ref();
        let params = (context.0, by as u32);
        self.instance.call_opt("proxy_on_upstream_connection_close", context, func, params)?;
        self.after_callback()
    }
}

/// Timers, queues, and answers to the guest's own calls. What they change for streams comes out of [`Vm::next_effect`].
///
/// # Errors
/// Each returns the [`Trap`] when the guest crashed or ran too long. An answer to a call that is not under way, because
/// the guest cancelled it or the call's stream has ended, is dropped without an error.
impl Vm {
    /// The timer of a root context, see [`Env::set_tick`](super::Env::set_tick).
    pub fn on_tick(&mut self, root: ContextId) -> Result<(), Trap> {
        self.instance.call_opt("proxy_on_tick", root, self.exports.tick.as_ref(), root.0)?;
        self.after_callback()
    }

    /// A message has arrived in a queue; `root` and `queue` are what the waker was called with.
    pub fn on_queue_ready(&mut self, root: u32, queue: u32) -> Result<(), Trap> {
        let func = self.exports.queue_ready.as_ref();
        self.instance.call_opt("proxy_on_queue_ready", ContextId(root), func, (root, queue))?;
        self.after_callback()
    }

    /// An HTTP call has ended: with its response, or without one when it failed or timed out.
    pub fn on_http_call_response(&mut self, token: CallToken, response: Option<HttpCallResponse>) -> Result<(), Trap> {
        let Some(context) = self.end_call(token, CallKind::Http) else { return Ok(()) };
        let counts = response.as_ref().map_or((0, 0, 0), |response| {
            // One more for `:status`.
            let headers = response.head.headers.len() + 1;
            (size(headers), size(response.body.len()), size(response.trailers.len()))
        });
        let http = response.map(|HttpCallResponse { head, body, trailers }| HttpDelivery { head, body, trailers });
        self.deliver(Delivery { http, ..Delivery::default() });
        let func = self.exports.http_call_response.as_ref();
        let params = (context.0, token.0, counts.0, counts.1, counts.2);
        self.instance.call_opt("proxy_on_http_call_response", context, func, params)?;
        self.delivered()
    }

    /// Initial metadata of a gRPC stream or call.
    pub fn on_grpc_receive_initial_metadata(&mut self, token: CallToken, metadata: Pairs) -> Result<(), Trap> {
        let Some((context, _)) = self.grpc(token) else { return Ok(()) };
        let count = size(metadata.len());
        self.deliver(Delivery { metadata: Some(metadata), ..Delivery::default() });
        let func = self.exports.grpc_initial_metadata.as_ref();
        let params = (context.0, token.0, count);
        self.instance.call_opt("proxy_on_grpc_receive_initial_metadata", context, func, params)?;
        self.delivered()
    }

    /// A message of a gRPC stream, or the response of a call, which ends it.
    pub fn on_grpc_receive(&mut self, token: CallToken, message: Bytes) -> Result<(), Trap> {
        let Some((context, kind)) = self.grpc(token) else { return Ok(()) };
        if kind == CallKind::Grpc {
            self.end_call(token, kind);
        }
        let len = size(message.len());
        self.deliver(Delivery { message: Some(message), ..Delivery::default() });
        let func = self.exports.grpc_receive.as_ref();
        self.instance.call_opt("proxy_on_grpc_receive", context, func, (context.0, token.0, len))?;
        self.delivered()
    }

    /// Trailing metadata of a gRPC stream or call; [`Vm::on_grpc_close`] follows.
    pub fn on_grpc_receive_trailing_metadata(&mut self, token: CallToken, metadata: Pairs) -> Result<(), Trap> {
        let Some((context, _)) = self.grpc(token) else { return Ok(()) };
        let count = size(metadata.len());
        self.deliver(Delivery { metadata: Some(metadata), ..Delivery::default() });
        let func = self.exports.grpc_trailing_metadata.as_ref();
        let params = (context.0, token.0, count);
        self.instance.call_opt("proxy_on_grpc_receive_trailing_metadata", context, func, params)?;
        self.delivered()
    }

    /// A gRPC stream has ended, or a call failed, with this gRPC code.
    pub fn on_grpc_close(&mut self, token: CallToken, code: u32, message: Bytes) -> Result<(), Trap> {
        let Some((context, kind)) = self.grpc(token) else { return Ok(()) };
        self.end_call(token, kind);
        self.deliver(Delivery { status: Some((code, message)), ..Delivery::default() });
        let func = self.exports.grpc_close.as_ref();
        self.instance.call_opt("proxy_on_grpc_close", context, func, (context.0, token.0, code))?;
        self.delivered()
    }

    /// The embedder calls a foreign function of the guest.
    pub fn on_foreign_function(&mut self, context: ContextId, function: u32, arguments: Bytes) -> Result<(), Trap> {
        let len = size(arguments.len());
        self.deliver(Delivery { call_data: Some(arguments), ..Delivery::default() });
        let func = self.exports.foreign_function.as_ref();
        self.instance.call_opt("proxy_on_foreign_function", context, func, (context.0, function, len))?;
        self.delivered()
    }

    fn deliver(&mut self, delivery: Delivery) {
        self.instance.store.data_mut().delivery = delivery;
    }

    fn delivered(&mut self) -> Result<(), Trap> {
        self.deliver(Delivery::default());
        self.after_callback()
    }

    fn grpc(&mut self, token: CallToken) -> Option<(ContextId, CallKind)> {
        let call = self.instance.store.data().calls.get(&token)?;
        (call.kind != CallKind::Http).then_some((call.context, call.kind))
    }

    /// Takes a call out of those under way.
    fn end_call(&mut self, token: CallToken, kind: CallKind) -> Option<ContextId> {
        let calls = &mut self.instance.store.data_mut().calls;
        match calls.get(&token) {
            Some(Call { kind: have, context }) if *have == kind => {
                let context = *context;
                calls.remove(&token);
                Some(context)
            }
            _ => None,
        }
    }
}
