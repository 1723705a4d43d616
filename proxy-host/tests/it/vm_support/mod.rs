//! Guests written in WAT, and surroundings that record what the guest asks for.
#![allow(dead_code, reason = "each test file uses a part of it")]

use bytes::Bytes;
use portolan_proxy_host::vm::{
    CallToken, ContextId, Engine, Env, GrpcRequest, HttpCall, HttpState, LogLevel, PluginConfig, PluginKind, Status,
    Vm, VmConfig,
};
use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// Everything of ABI 0.2.1, an allocator that never frees, and three helpers: `$say` logs a word as 4 bytes, `$show` logs
/// the value whose place and length are at 8 and 12, `$check` logs a status if it is not zero.
const PRELUDE: &str = r#"
(import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
(import "env" "proxy_get_log_level" (func $log_level (param i32) (result i32)))
(import "env" "proxy_get_current_time_nanoseconds" (func $now (param i32) (result i32)))
(import "env" "proxy_set_tick_period_milliseconds" (func $tick (param i32) (result i32)))
(import "env" "proxy_get_buffer_bytes" (func $buffer (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_buffer_status" (func $buffer_status (param i32 i32 i32) (result i32)))
(import "env" "proxy_set_buffer_bytes" (func $set_buffer (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_header_map_size" (func $map_size (param i32 i32) (result i32)))
(import "env" "proxy_get_header_map_pairs" (func $pairs (param i32 i32 i32) (result i32)))
(import "env" "proxy_set_header_map_pairs" (func $set_pairs (param i32 i32 i32) (result i32)))
(import "env" "proxy_get_header_map_value" (func $value (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_add_header_map_value" (func $add (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_replace_header_map_value" (func $replace (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_remove_header_map_value" (func $remove (param i32 i32 i32) (result i32)))
(import "env" "proxy_get_property" (func $property (param i32 i32 i32 i32) (result i32)))
(import "env" "proxy_set_property" (func $set_property (param i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_shared_data" (func $data (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_set_shared_data" (func $set_data (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_register_shared_queue" (func $register (param i32 i32 i32) (result i32)))
(import "env" "proxy_resolve_shared_queue" (func $resolve (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_dequeue_shared_queue" (func $dequeue (param i32 i32 i32) (result i32)))
(import "env" "proxy_enqueue_shared_queue" (func $enqueue (param i32 i32 i32) (result i32)))
(import "env" "proxy_continue_stream" (func $continue (param i32) (result i32)))
(import "env" "proxy_close_stream" (func $close (param i32) (result i32)))
(import "env" "proxy_send_local_response" (func $respond (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_http_call" (func $http_call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_grpc_call" (func $grpc_call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_grpc_stream" (func $grpc_stream (param i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_grpc_send" (func $grpc_send (param i32 i32 i32 i32) (result i32)))
(import "env" "proxy_grpc_cancel" (func $grpc_cancel (param i32) (result i32)))
(import "env" "proxy_grpc_close" (func $grpc_close (param i32) (result i32)))
(import "env" "proxy_get_status" (func $status (param i32 i32 i32) (result i32)))
(import "env" "proxy_set_effective_context" (func $effective (param i32) (result i32)))
(import "env" "proxy_call_foreign_function" (func $foreign (param i32 i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_done" (func $done (result i32)))
(import "env" "proxy_define_metric" (func $define (param i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_metric" (func $metric (param i32 i32) (result i32)))
(import "env" "proxy_record_metric" (func $record (param i32 i64) (result i32)))
(import "env" "proxy_increment_metric" (func $increment (param i32 i64) (result i32)))
(import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
(import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
(import "wasi_snapshot_preview1" "path_open"
  (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
(memory (export "memory") 2)
(func (export "proxy_abi_version_0_2_1"))
(global $heap (mut i32) (i32.const 65536))
(func (export "proxy_on_memory_allocate") (param i32) (result i32)
  (global.get $heap)
  (global.set $heap (i32.add (global.get $heap) (local.get 0))))
(func $say (param i32)
  (i32.store (i32.const 0) (local.get 0))
  (drop (call $log (i32.const 2) (i32.const 0) (i32.const 4))))
(func $show
  (drop (call $log (i32.const 2) (i32.load (i32.const 8)) (i32.load (i32.const 12)))))
(func $check (param i32) (if (local.get 0) (then (call $say (local.get 0)))))
"#;

/// A guest with every import of the ABI and `body`; its own data belongs at 1024.
pub fn guest(body: &str) -> Engine {
    raw(&format!("(module {PRELUDE} {body})"))
}

/// A guest that is nothing but `text`.
pub fn raw(text: &str) -> Engine {
    let wasm = wat::parse_str(text).expect("valid WAT");
    Engine::compile(&wasm).expect("a proxy-wasm module")
}

/// A guest that does `body` when request headers come, and continues.
pub fn on_request(body: &str, data: &str) -> Engine {
    guest(&format!(
        r#"(data (i32.const 1024) "{data}")
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) {body} (i32.const 0))"#
    ))
}

/// What the guest asked its surroundings for.
#[derive(Default)]
pub struct Record {
    pub logs: Vec<(LogLevel, Vec<u8>)>,
    pub opened: Vec<(CallToken, GrpcRequest)>,
    pub grpc_calls: Vec<(CallToken, Bytes, Duration)>,
    pub sent: Vec<(CallToken, Bytes, bool)>,
    pub closed: Vec<CallToken>,
    pub cancelled: Vec<CallToken>,
    pub http_calls: Vec<(CallToken, HttpCall)>,
    pub ticks: Vec<(ContextId, Duration)>,
}

pub type Recorder = Rc<RefCell<Record>>;

struct Fake(Recorder);

impl Env for Fake {
    fn log(&mut self, level: LogLevel, message: &[u8]) {
        self.0.borrow_mut().logs.push((level, message.to_vec()));
    }
    fn now(&self) -> u64 {
        0x0102_0304_0506_0708
    }
    fn set_tick(&mut self, root: ContextId, period: Duration) {
        self.0.borrow_mut().ticks.push((root, period));
    }
    fn property(&self, path: &[&[u8]]) -> Option<Cow<'_, [u8]>> {
        (path == [b"node".as_slice(), b"id"]).then_some(Cow::Borrowed(b"node-1"))
    }
    fn open_grpc_stream(&mut self, token: CallToken, request: GrpcRequest) -> Result<(), Status> {
        if &request.upstream[..] == b"nowhere" {
            return Err(Status::BadArgument);
        }
        self.0.borrow_mut().opened.push((token, request));
        Ok(())
    }
    fn send_grpc(&mut self, token: CallToken, message: Bytes, end_of_stream: bool) -> Result<(), Status> {
        self.0.borrow_mut().sent.push((token, message, end_of_stream));
        Ok(())
    }
    fn close_grpc(&mut self, token: CallToken) {
        self.0.borrow_mut().closed.push(token);
    }
    fn cancel_call(&mut self, token: CallToken) {
        self.0.borrow_mut().cancelled.push(token);
    }
    fn grpc_call(&mut self, token: CallToken, _: GrpcRequest, message: Bytes, timeout: Duration) -> Result<(), Status> {
        self.0.borrow_mut().grpc_calls.push((token, message, timeout));
        Ok(())
    }
    fn http_call(&mut self, token: CallToken, call: HttpCall) -> Result<(), Status> {
        self.0.borrow_mut().http_calls.push((token, call));
        Ok(())
    }
    fn foreign(&mut self, name: &str, arguments: &[u8]) -> Result<Vec<u8>, Status> {
        if name == "echo" { Ok(arguments.to_vec()) } else { Err(Status::NotFound) }
    }
}

/// One VM with one root context, `root`.
pub struct Rig {
    pub vm: Vm,
    pub root: ContextId,
    pub record: Recorder,
}

pub fn config() -> VmConfig {
    let plugin = PluginConfig {
        name: "plugin".into(),
        root_id: "root".into(),
        configuration: Bytes::from_static(b"configuration"),
        kind: PluginKind::Http,
    };
    VmConfig { vm_id: "vm".into(), plugins: vec![plugin], ..VmConfig::default() }
}

pub fn start_with(engine: &Engine, config: VmConfig) -> Rig {
    let record = Recorder::default();
    let vm = Vm::start(engine, config, Box::new(Fake(record.clone()))).expect("the guest starts");
    let root = vm.root("root").expect("a root context");
    Rig { vm, root, record }
}

pub fn start(engine: &Engine) -> Rig {
    start_with(engine, config())
}

pub fn env() -> Box<dyn Env> {
    Box::new(Fake(Recorder::default()))
}

impl Rig {
    /// A stream in the state given, with no attributes.
    pub fn http(&mut self, state: HttpState) -> ContextId {
        self.vm.create_http(self.root, state, Rc::new(())).expect("a stream")
    }

    /// What was logged since the last time.
    pub fn logs(&self) -> Vec<String> {
        let logs = std::mem::take(&mut self.record.borrow_mut().logs);
        logs.into_iter().map(|(_, line)| String::from_utf8_lossy(&line).into_owned()).collect()
    }

    /// Words logged by `$say` since the last time.
    pub fn words(&self) -> Vec<u32> {
        let logs = std::mem::take(&mut self.record.borrow_mut().logs);
        logs.into_iter().map(|(_, line)| u32::from_le_bytes(line.try_into().expect("4 bytes"))).collect()
    }
}

/// `GET http://example.com/a?b` with two headers of one name.
pub fn request() -> HttpState {
    let mut state = HttpState::default();
    state.request.authority = Some("example.com".parse().expect("a value"));
    state.request.path = Some("/a?b".parse().expect("a value"));
    state.request.scheme = Some("http".parse().expect("a value"));
    for value in ["1", "2"] {
        state.request.headers.append("x-two", value.parse().expect("a value"));
    }
    state
}
