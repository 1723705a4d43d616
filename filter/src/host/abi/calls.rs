//! Calls out of the VM. Each is safe for every argument that its types allow, and for every answer of the host but one:
//! memory that the host gives must come from `proxy_on_memory_allocate`, as the ABI demands.

use std::ptr::null_mut;
use std::time::Duration;

use crate::host::{Answer, Host, Level, MetricKind, Result, Status, pairs};

const HTTP_REQUEST: u32 = 0;
const DOWNSTREAM: u32 = 2;
const REQUEST_HEADERS: u32 = 0;
const RESPONSE_HEADERS: u32 = 2;
const GRPC_RECEIVE_BUFFER: u32 = 5;
const PLUGIN_CONFIGURATION: u32 = 7;
/// A map of one pair.
const TEXT_PLAIN: &[u8] = b"\x01\0\0\0\x0c\0\0\0\x0a\0\0\0content-type\0text/plain\0";
/// A map of none.
const NO_PAIRS: &[u8] = &[0; 4];
const NO_GRPC_STATUS: i32 = -1;

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_log(level: u32, message: *const u8, size: usize) -> u32;
    fn proxy_get_log_level(level: *mut u32) -> u32;
    fn proxy_get_current_time_nanoseconds(time: *mut u64) -> u32;
    safe fn proxy_set_tick_period_milliseconds(period: u32) -> u32;
    safe fn proxy_set_effective_context(context: u32) -> u32;
    fn proxy_set_property(name: *const u8, name_size: usize, value: *const u8, size: usize) -> u32;
    fn proxy_get_property(path: *const u8, path_size: usize, value: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_get_buffer_bytes(buffer: u32, start: usize, max: usize, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_get_header_map_pairs(map: u32, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_replace_header_map_value(
        map: u32,
        name: *const u8,
        name_size: usize,
        value: *const u8,
        value_size: usize,
    ) -> u32;
    fn proxy_add_header_map_value(
        map: u32,
        name: *const u8,
        name_size: usize,
        value: *const u8,
        value_size: usize,
    ) -> u32;
    fn proxy_remove_header_map_value(map: u32, name: *const u8, size: usize) -> u32;
    fn proxy_send_local_response(
        status: u32,
        details: *const u8,
        details_size: usize,
        body: *const u8,
        body_size: usize,
        headers: *const u8,
        headers_size: usize,
        grpc_status: i32,
    ) -> u32;
    safe fn proxy_close_stream(stream: u32) -> u32;
    fn proxy_call_foreign_function(
        name: *const u8,
        name_size: usize,
        arguments: *const u8,
        arguments_size: usize,
        results: *mut *mut u8,
        results_size: *mut usize,
    ) -> u32;
    fn proxy_grpc_stream(
        service: *const u8,
        service_size: usize,
        name: *const u8,
        name_size: usize,
        method: *const u8,
        method_size: usize,
        metadata: *const u8,
        metadata_size: usize,
        token: *mut u32,
    ) -> u32;
    fn proxy_grpc_send(token: u32, message: *const u8, size: usize, end: u32) -> u32;
    safe fn proxy_grpc_cancel(token: u32) -> u32;
    fn proxy_define_metric(kind: u32, name: *const u8, size: usize, id: *mut u32) -> u32;
    safe fn proxy_increment_metric(id: u32, by: i64) -> u32;
    safe fn proxy_record_metric(id: u32, value: u64) -> u32;
}

fn check(status: u32) -> Result {
    if status == 0 { Ok(()) } else { Err(Status(status)) }
}

/// Bytes that the host puts into memory it allocates here.
fn received(call: impl FnOnce(*mut *mut u8, *mut usize) -> u32) -> Result<Vec<u8>> {
    let mut data: *mut u8 = null_mut();
    let mut size = 0;
    check(call(&raw mut data, &raw mut size))?;
    if data.is_null() || size == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the ABI says that `data` is what `proxy_on_memory_allocate(size)` gave, and that it is ours now; there
    // it is a whole allocation of `size` initialised bytes.
    Ok(unsafe { Vec::from_raw_parts(data, size, size) })
}

fn replace(map: u32, name: &str, value: &[u8]) -> Result {
    let (n, v) = (name.as_ptr(), value.as_ptr());
    // SAFETY: as in `Host for Abi`.
    check(unsafe { proxy_replace_header_map_value(map, n, name.len(), v, value.len()) })
}

fn add(map: u32, name: &str, value: &[u8]) -> Result {
    let (n, v) = (name.as_ptr(), value.as_ptr());
    // SAFETY: as in `Host for Abi`.
    check(unsafe { proxy_add_header_map_value(map, n, name.len(), v, value.len()) })
}

fn remove(map: u32, name: &[u8]) -> Result {
    // SAFETY: as in `Host for Abi`.
    check(unsafe { proxy_remove_header_map_value(map, name.as_ptr(), name.len()) })
}

/// The host that runs this VM.
#[derive(Debug, Default)]
pub(crate) struct Abi;

// SAFETY of every block below: each pointer comes from a live slice with its length, or from a live variable, and the
// host keeps none of them beyond the call.
impl Host for Abi {
    fn log(&self, level: Level, message: &str) {
        // There is nobody to tell if the log fails.
        unsafe { proxy_log(level as u32, message.as_ptr(), message.len()) };
    }

    fn log_level(&self) -> Result<u32> {
        let mut level = 0;
        check(unsafe { proxy_get_log_level(&raw mut level) }).map(|()| level)
    }

    fn now(&self) -> Result<Duration> {
        let mut time = 0;
        check(unsafe { proxy_get_current_time_nanoseconds(&raw mut time) }).map(|()| Duration::from_nanos(time))
    }

    fn set_tick(&self, period: u32) -> Result {
        check(proxy_set_tick_period_milliseconds(period))
    }

    fn set_context(&self, context: u32) -> Result {
        check(proxy_set_effective_context(context))
    }

    fn property(&self, path: &str) -> Option<Vec<u8>> {
        received(|data, size| unsafe { proxy_get_property(path.as_ptr(), path.len(), data, size) }).ok()
    }

    fn set_property(&self, name: &str, value: &[u8]) -> Result {
        check(unsafe { proxy_set_property(name.as_ptr(), name.len(), value.as_ptr(), value.len()) })
    }

    fn plugin_configuration(&self) -> Result<Vec<u8>> {
        received(|data, size| unsafe { proxy_get_buffer_bytes(PLUGIN_CONFIGURATION, 0, usize::MAX, data, size) })
    }

    fn request_headers(&self) -> Result<Vec<u8>> {
        received(|data, size| unsafe { proxy_get_header_map_pairs(REQUEST_HEADERS, data, size) })
    }

    fn replace_request_header(&self, name: &str, value: &[u8]) -> Result {
        replace(REQUEST_HEADERS, name, value)
    }

    fn add_request_header(&self, name: &str, value: &[u8]) -> Result {
        add(REQUEST_HEADERS, name, value)
    }

    fn remove_request_header(&self, name: &[u8]) -> Result {
        remove(REQUEST_HEADERS, name)
    }

    fn replace_response_header(&self, name: &str, value: &[u8]) -> Result {
        replace(RESPONSE_HEADERS, name, value)
    }

    fn add_response_header(&self, name: &str, value: &[u8]) -> Result {
        add(RESPONSE_HEADERS, name, value)
    }

    fn remove_response_header(&self, name: &str) -> Result {
        remove(RESPONSE_HEADERS, name.as_bytes())
    }

    fn local_response(&self, status: u16, details: &str, body: &str) -> Result {
        check(unsafe {
            proxy_send_local_response(
                u32::from(status),
                details.as_ptr(),
                details.len(),
                body.as_ptr(),
                body.len(),
                TEXT_PLAIN.as_ptr(),
                TEXT_PLAIN.len(),
                NO_GRPC_STATUS,
            )
        })
    }

    fn answer(&self, answer: &Answer) -> Result {
        let headers = pairs::write(&answer.headers);
        let grpc = answer.grpc.and_then(|status| i32::try_from(status).ok()).unwrap_or(NO_GRPC_STATUS);
        check(unsafe {
            proxy_send_local_response(
                u32::from(answer.status),
                answer.details.as_ptr(),
                answer.details.len(),
                answer.body.as_ptr(),
                answer.body.len(),
                headers.as_ptr(),
                headers.len(),
                grpc,
            )
        })
    }

    fn reset_request(&self) -> Result {
        check(proxy_close_stream(HTTP_REQUEST))
    }

    fn close_downstream(&self) -> Result {
        check(proxy_close_stream(DOWNSTREAM))
    }

    fn foreign(&self, function: &str, arguments: &[u8]) -> Result {
        let (f, a) = (function.as_ptr(), arguments.as_ptr());
        received(|data, size| unsafe { proxy_call_foreign_function(f, function.len(), a, arguments.len(), data, size) })
            .map(drop)
    }

    fn open_stream(&self, service: &[u8]) -> Result<u32> {
        const SERVICE: &str = "portolan.v1.Registry";
        const METHOD: &str = "Watch";
        let mut token = 0;
        check(unsafe {
            proxy_grpc_stream(
                service.as_ptr(),
                service.len(),
                SERVICE.as_ptr(),
                SERVICE.len(),
                METHOD.as_ptr(),
                METHOD.len(),
                NO_PAIRS.as_ptr(),
                NO_PAIRS.len(),
                &raw mut token,
            )
        })
        .map(|()| token)
    }

    fn send(&self, token: u32, message: &[u8]) -> Result {
        check(unsafe { proxy_grpc_send(token, message.as_ptr(), message.len(), 0) })
    }

    fn cancel(&self, token: u32) -> Result {
        check(proxy_grpc_cancel(token))
    }

    fn stream_message(&self) -> Result<Vec<u8>> {
        received(|data, size| unsafe { proxy_get_buffer_bytes(GRPC_RECEIVE_BUFFER, 0, usize::MAX, data, size) })
    }

    fn define_metric(&self, kind: MetricKind, name: &str) -> Result<u32> {
        let mut id = 0;
        check(unsafe { proxy_define_metric(kind as u32, name.as_ptr(), name.len(), &raw mut id) }).map(|()| id)
    }

    fn increment_metric(&self, id: u32, by: i64) -> Result {
        check(proxy_increment_metric(id, by))
    }

    fn record_metric(&self, id: u32, value: u64) -> Result {
        check(proxy_record_metric(id, value))
    }
}
