//! The guest's callbacks, looked up once per instance. One that is not exported is never called.

use super::error::StartError;
use super::state::HostState;
use wasmtime::{Instance, Store, TypedFunc, WasmParams, WasmResults};

macro_rules! exports {
    ($($(#[$doc:meta])* $field:ident: $export:literal $params:ty => $results:ty;)*) => {
        /// Callbacks by name without their prefix.
        pub(super) struct Exports {
            $($(#[$doc])* pub(super) $field: Option<TypedFunc<$params, $results>>,)*
        }

        impl Exports {
            pub(super) fn find(instance: &Instance, store: &mut Store<HostState>) -> Result<Self, StartError> {
                Ok(Self { $($field: find(instance, store, $export)?,)* })
            }
        }
    };
}

exports! {
    context_create: "proxy_on_context_create" (u32, u32) => ();
    vm_start: "proxy_on_vm_start" (u32, u32) => u32;
    configure: "proxy_on_configure" (u32, u32) => u32;
    tick: "proxy_on_tick" u32 => ();
    queue_ready: "proxy_on_queue_ready" (u32, u32) => ();
    done: "proxy_on_done" u32 => u32;
    log: "proxy_on_log" u32 => ();
    delete: "proxy_on_delete" u32 => ();

    request_headers: "proxy_on_request_headers" (u32, u32, u32) => u32;
    request_body: "proxy_on_request_body" (u32, u32, u32) => u32;
    request_trailers: "proxy_on_request_trailers" (u32, u32) => u32;
    response_headers: "proxy_on_response_headers" (u32, u32, u32) => u32;
    response_body: "proxy_on_response_body" (u32, u32, u32) => u32;
    response_trailers: "proxy_on_response_trailers" (u32, u32) => u32;

    new_connection: "proxy_on_new_connection" u32 => u32;
    downstream_data: "proxy_on_downstream_data" (u32, u32, u32) => u32;
    upstream_data: "proxy_on_upstream_data" (u32, u32, u32) => u32;
    downstream_close: "proxy_on_downstream_connection_close" (u32, u32) => ();
    upstream_close: "proxy_on_upstream_connection_close" (u32, u32) => ();

    http_call_response: "proxy_on_http_call_response" (u32, u32, u32, u32, u32) => ();
    grpc_initial_metadata: "proxy_on_grpc_receive_initial_metadata" (u32, u32, u32) => ();
    grpc_receive: "proxy_on_grpc_receive" (u32, u32, u32) => ();
    grpc_trailing_metadata: "proxy_on_grpc_receive_trailing_metadata" (u32, u32, u32) => ();
    grpc_close: "proxy_on_grpc_close" (u32, u32, u32) => ();
    foreign_function: "proxy_on_foreign_function" (u32, u32, u32) => ();
}

/// The export of that name, if there is one.
pub(super) fn find<P: WasmParams, R: WasmResults>(
    instance: &Instance,
    store: &mut Store<HostState>,
    name: &'static str,
) -> Result<Option<TypedFunc<P, R>>, StartError> {
    match instance.get_func(&mut *store, name) {
        None => Ok(None),
        Some(func) => func.typed(&*store).map(Some).map_err(|_| StartError::Export(name)),
    }
}
