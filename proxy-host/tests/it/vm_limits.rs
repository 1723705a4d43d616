//! What a guest may do wrong: traps, endless loops, greed, hostile pointers.

use crate::vm_support;

use bytes::Bytes;
use portolan_proxy_host::vm::{
    ContextId, Engine, EngineError, Limits, Outcome, PeerType, Shared, StartError, Trap, TrapKind, Vm, VmConfig,
};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_support::{Rig, config, env, guest, on_request, raw, request, start, start_with};

const MINIMAL: &str = r#"(memory (export "memory") 1)
    (func (export "proxy_abi_version_0_2_0"))
    (func (export "malloc") (param i32) (result i32) (i32.const 0))"#;

fn kind_of(body: &str) -> TrapKind {
    let engine = on_request(body, "");
    let mut rig = start(&engine);
    let stream = rig.http(request());
    let trap = rig.vm.on_request_headers(stream, true).expect_err("a trap");
    assert_eq!(trap.callback, "proxy_on_request_headers");
    assert!(rig.vm.is_dead());
    let after = rig.vm.on_request_headers(stream, true).expect_err("still dead");
    assert_eq!(after.kind, TrapKind::Dead);
    // The request is still there to be answered, and a fresh instance works.
    assert!(rig.vm.http(stream).is_some());
    assert!(!start(&engine).vm.is_dead());
    trap.kind
}

#[test]
fn a_trap_is_an_error_and_the_vm_is_dead() {
    assert_eq!(kind_of("unreachable"), TrapKind::Guest);
}

#[test]
fn a_module_that_imports_what_there_is_not_does_not_load() {
    let link = |import: &str, version: &str| {
        let module = format!(
            r#"(module {import} (memory (export "memory") 1) (func (export "proxy_abi_version_{version}"))
                 (func (export "malloc") (param i32) (result i32) (i32.const 1024)))"#
        );
        Engine::compile(&wat::parse_str(module).expect("valid WAT")).map(|_| ())
    };
    let level = r#"(import "env" "proxy_get_log_level" (func (param i32) (result i32)))"#;
    for import in [
        level,
        r#"(import "env" "emscripten_notify_memory_growth" (func (param i32)))"#,
        r#"(import "env" "pthread_equal" (func (param i32 i32) (result i32)))"#,
        r#"(import "wasi_unstable" "environ_sizes_get" (func (param i32 i32) (result i32)))"#,
        r#"(import "wasi_snapshot_preview1" "fd_readdir" (func (param i32 i32 i32 i64 i32) (result i32)))"#,
    ] {
        assert!(link(import, "0_2_1").is_ok(), "{import}");
    }
    for (import, version) in [
        (level, "0_2_0"),
        (r#"(import "env" "proxy_nothing" (func))"#, "0_2_1"),
        (r#"(import "env" "proxy_get_configuration" (func (param i32 i32) (result i32)))"#, "0_2_1"),
        (r#"(import "other" "nothing" (func))"#, "0_2_1"),
        (r#"(import "wasi_snapshot_preview1" "sock_open" (func (param i32) (result i32)))"#, "0_2_1"),
    ] {
        assert!(matches!(link(import, version), Err(EngineError::Link(_))), "{import} of {version}");
    }
}

/// Runs one callback of a guest that traps in it, and in nothing else.
fn trap_in(export: &str, signature: &str, event: impl Fn(&mut Rig) -> Result<(), Trap>) {
    let result = if signature.contains("result") { "(i32.const 1)" } else { "" };
    // Calls, so that there is something to answer.
    let calls = r#"(func (export "proxy_on_queue_ready") (param i32 i32)
        (drop (call $grpc_stream (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 1)
          (i32.const 0) (i32.const 0) (i32.const 16)))
        (drop (call $http_call (i32.const 0) (i32.const 1) (i32.const 1028) (i32.const 41) (i32.const 0) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 9) (i32.const 16))))
        (data (i32.const 1028) "\02\00\00\00\0a\00\00\00\01\00\00\00\05\00\00\00\01\00\00\00:authority\00a\00:path\00/\00")"#;
    let engine = guest(&format!(r#"{calls} (func (export "{export}") {signature} unreachable {result})"#));
    let mut rig = start(&engine);
    rig.vm.on_queue_ready(rig.root.get(), 1).expect("the calls are made");
    let trap = event(&mut rig).expect_err(export);
    assert_eq!((trap.callback, trap.kind), (export, TrapKind::Guest));
    assert!(rig.vm.is_dead());
    assert!(!start(&engine).vm.is_dead(), "a fresh instance works");
}

#[test]
fn a_trap_in_each_stream_callback_is_an_error() {
    type Event = fn(&mut Vm, ContextId) -> Result<Outcome, Trap>;
    let http: [(&str, &str, Event); 6] = [
        ("proxy_on_request_headers", "(param i32 i32 i32) (result i32)", |vm, id| vm.on_request_headers(id, false)),
        ("proxy_on_request_body", "(param i32 i32 i32) (result i32)", |vm, id| vm.on_request_body(id, false)),
        ("proxy_on_request_trailers", "(param i32 i32) (result i32)", |vm, id| vm.on_request_trailers(id)),
        ("proxy_on_response_headers", "(param i32 i32 i32) (result i32)", |vm, id| vm.on_response_headers(id, false)),
        ("proxy_on_response_body", "(param i32 i32 i32) (result i32)", |vm, id| vm.on_response_body(id, false)),
        ("proxy_on_response_trailers", "(param i32 i32) (result i32)", |vm, id| vm.on_response_trailers(id)),
    ];
    for (export, signature, event) in http {
        trap_in(export, signature, |rig| {
            let stream = rig.http(request());
            event(&mut rig.vm, stream).map(|_| ())
        });
    }
    let network: [(&str, &str, Event); 3] = [
        ("proxy_on_new_connection", "(param i32) (result i32)", |vm, id| vm.on_new_connection(id)),
        ("proxy_on_downstream_data", "(param i32 i32 i32) (result i32)", |vm, id| vm.on_downstream_data(id, false)),
        ("proxy_on_upstream_data", "(param i32 i32 i32) (result i32)", |vm, id| vm.on_upstream_data(id, false)),
    ];
    for (export, signature, event) in network {
        trap_in(export, signature, |rig| {
            let stream = rig.vm.create_network(rig.root, Rc::new(())).expect("a stream");
            event(&mut rig.vm, stream).map(|_| ())
        });
    }
}

#[test]
fn a_trap_in_each_end_of_a_stream_is_an_error() {
    for (export, signature) in [
        ("proxy_on_done", "(param i32) (result i32)"),
        ("proxy_on_log", "(param i32)"),
        ("proxy_on_delete", "(param i32)"),
    ] {
        trap_in(export, signature, |rig| {
            let stream = rig.http(request());
            rig.vm.finish(stream)
        });
    }
    trap_in("proxy_on_downstream_connection_close", "(param i32 i32)", |rig| {
        let stream = rig.vm.create_network(rig.root, Rc::new(())).expect("a stream");
        rig.vm.on_downstream_connection_close(stream, PeerType::Remote)
    });
    trap_in("proxy_on_upstream_connection_close", "(param i32 i32)", |rig| {
        let stream = rig.vm.create_network(rig.root, Rc::new(())).expect("a stream");
        rig.vm.on_upstream_connection_close(stream, PeerType::Local)
    });
}

#[test]
fn a_trap_in_each_root_callback_is_an_error() {
    let stream = |rig: &Rig| rig.record.borrow().opened[0].0;
    trap_in("proxy_on_tick", "(param i32)", |rig| rig.vm.on_tick(rig.root));
    trap_in("proxy_on_foreign_function", "(param i32 i32 i32)", |rig| {
        rig.vm.on_foreign_function(rig.root, 1, Bytes::new())
    });
    trap_in("proxy_on_http_call_response", "(param i32 i32 i32 i32 i32)", |rig| {
        let token = rig.record.borrow().http_calls[0].0;
        rig.vm.on_http_call_response(token, None)
    });
    trap_in("proxy_on_grpc_receive_initial_metadata", "(param i32 i32 i32)", |rig| {
        rig.vm.on_grpc_receive_initial_metadata(stream(rig), Vec::new())
    });
    trap_in("proxy_on_grpc_receive", "(param i32 i32 i32)", |rig| rig.vm.on_grpc_receive(stream(rig), Bytes::new()));
    trap_in("proxy_on_grpc_receive_trailing_metadata", "(param i32 i32 i32)", |rig| {
        rig.vm.on_grpc_receive_trailing_metadata(stream(rig), Vec::new())
    });
    trap_in("proxy_on_grpc_close", "(param i32 i32 i32)", |rig| rig.vm.on_grpc_close(stream(rig), 14, Bytes::new()));
}

#[test]
fn an_exit_is_an_error() {
    assert_eq!(kind_of("(call $exit (i32.const 3))"), TrapKind::Exit);
}

#[test]
fn a_stack_that_overflows_is_an_error() {
    let engine = guest(
        r#"(func $deep (param i32) (result i32) (i32.add (call $deep (local.get 0)) (i32.const 1)))
           (func (export "proxy_on_tick") (param i32) (drop (call $deep (local.get 0))))"#,
    );
    let mut rig = start(&engine);
    assert_eq!(rig.vm.on_tick(rig.root).expect_err("a trap").kind, TrapKind::Guest);
}

#[test]
fn an_endless_loop_ends_at_the_deadline() {
    let engine = guest(r#"(func (export "proxy_on_tick") (param i32) (loop (br 0)))"#);
    let limits = Limits { deadline: Duration::from_millis(20), ..Limits::default() };
    let shared = Arc::new(Shared::default());
    let mut rig = start_with(&engine, VmConfig { limits, shared: shared.clone(), ..config() });
    let begun = Instant::now();
    let trap = rig.vm.on_tick(rig.root).expect_err("a trap");
    assert_eq!(trap.kind, TrapKind::Deadline);
    assert_eq!((shared.traps(TrapKind::Deadline), shared.traps(TrapKind::Guest)), (1, 0));
    // Far above the deadline, for a machine that is busy; far below for ever.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn an_endless_loop_in_the_allocator_ends_too() {
    let engine = raw(r#"(module
          (import "env" "proxy_get_header_map_pairs" (func $pairs (param i32 i32 i32) (result i32)))
          (memory (export "memory") 1)
          (func (export "proxy_abi_version_0_2_1"))
          (func (export "malloc") (param i32) (result i32) (loop (br 0)) (i32.const 0))
          (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (call $pairs (i32.const 0) (i32.const 8) (i32.const 12))))"#);
    let limits = Limits { deadline: Duration::from_millis(20), ..Limits::default() };
    let mut rig = start_with(&engine, VmConfig { limits, ..config() });
    let stream = rig.http(request());
    assert_eq!(rig.vm.on_request_headers(stream, true).expect_err("a trap").kind, TrapKind::Deadline);
}

#[test]
fn a_loop_in_each_start_phase_is_an_error() {
    for phase in [
        r#"(func $start (loop (br 0))) (start $start)"#,
        r#"(func (export "_initialize") (loop (br 0)))"#,
        r#"(func (export "proxy_on_vm_start") (param i32 i32) (result i32) (loop (br 0)) (i32.const 1))"#,
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32) (loop (br 0)) (i32.const 1))"#,
    ] {
        let engine = raw(&format!("(module {MINIMAL} {phase})"));
        let limits = Limits { deadline: Duration::from_millis(20), ..Limits::default() };
        assert!(Vm::start(&engine, VmConfig { limits, ..config() }, env()).is_err(), "{phase}");
    }
}

#[test]
fn memory_grows_up_to_the_limit_and_no_further() {
    let engine = guest(
        r#"(func (export "proxy_on_tick") (param i32)
             (call $say (memory.grow (i32.const 2)))
             (call $say (memory.grow (i32.const 1))))"#,
    );
    let limits = Limits { memory: 4 << 16, ..Limits::default() };
    let mut rig = start_with(&engine, VmConfig { limits, ..config() });
    rig.vm.on_tick(rig.root).expect("no trap");
    assert_eq!(rig.words(), [2, u32::MAX]);
    assert_eq!(rig.vm.memory_bytes(), 4 << 16);
}

#[test]
fn a_module_above_the_memory_limit_does_not_start() {
    let limits = Limits { memory: 1 << 16, ..Limits::default() };
    let started = Vm::start(&guest(""), VmConfig { limits, ..config() }, env());
    assert!(matches!(started, Err(StartError::Instantiate(_))));
}

/// Each hostcall with pointers past the end, at the end, and with lengths that wrap around.
#[test]
fn hostile_pointers_are_invalid_memory_accesses() {
    for (at, len) in [(u32::MAX, 8), (131_072, 1), (131_065, 8), (16, u32::MAX), (u32::MAX, u32::MAX)] {
        let pair = format!("(i32.const {at}) (i32.const {len})");
        let good = "(i32.const 1024) (i32.const 2)";
        let calls = [
            format!("(call $log (i32.const 2) {pair})"),
            format!("(call $value (i32.const 0) {pair} (i32.const 8) (i32.const 12))"),
            format!("(call $add (i32.const 0) {pair} {good})"),
            format!("(call $add (i32.const 0) {good} {pair})"),
            format!("(call $remove (i32.const 0) {pair})"),
            format!("(call $set_pairs (i32.const 0) {pair})"),
            format!("(call $set_buffer (i32.const 0) (i32.const 0) (i32.const 0) {pair})"),
            format!("(call $property {pair} (i32.const 8) (i32.const 12))"),
            format!("(call $set_property {pair} {good})"),
            format!("(call $set_property {good} {pair})"),
            format!("(call $data {pair} (i32.const 8) (i32.const 12) (i32.const 16))"),
            format!("(call $set_data {good} {pair} (i32.const 0))"),
            format!("(call $register {pair} (i32.const 8))"),
            format!("(call $resolve {pair} {good} (i32.const 8))"),
            format!("(call $define (i32.const 0) {pair} (i32.const 8))"),
            format!("(call $foreign {pair} {good} (i32.const 8) (i32.const 12))"),
            format!("(call $foreign {good} {pair} (i32.const 8) (i32.const 12))"),
            format!("(call $respond (i32.const 200) {pair} {good} (i32.const 0) (i32.const 0) (i32.const -1))"),
            format!("(call $respond (i32.const 200) {good} {good} {pair} (i32.const -1))"),
            format!("(call $http_call {good} {pair} {good} (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8))"),
            format!("(call $grpc_stream {pair} {good} {good} (i32.const 0) (i32.const 0) (i32.const 8))"),
            format!("(call $grpc_stream {good} {good} {good} {pair} (i32.const 8))"),
        ];
        let body: String = calls.iter().map(|call| format!("(call $say {call})\n")).collect();
        let mut rig = start(&on_request(&body, "ab"));
        let stream = rig.http(request());
        assert!(matches!(rig.vm.on_request_headers(stream, true), Ok(Outcome::Continue)));
        for (call, status) in calls.iter().zip(rig.words()) {
            assert_eq!(status, 6, "{call}");
        }
    }
}

#[test]
fn results_are_not_written_to_hostile_pointers() {
    let to = "(i32.const 131070)";
    let good = "(i32.const 1024) (i32.const 10)";
    let calls = [
        format!("(call $value (i32.const 0) {good} {to} (i32.const 8))"),
        format!("(call $value (i32.const 0) {good} (i32.const 8) {to})"),
        format!("(call $pairs (i32.const 0) {to} {to})"),
        format!("(call $map_size (i32.const 0) {to})"),
        format!("(call $buffer_status (i32.const 0) {to} (i32.const 8))"),
        format!("(call $now {to})"),
        format!("(call $log_level {to})"),
        format!("(call $define (i32.const 0) {good} {to})"),
        format!("(call $status {to} (i32.const 8) (i32.const 12))"),
        format!("(call $grpc_stream {good} {good} {good} (i32.const 0) (i32.const 0) {to})"),
    ];
    let body: String = calls.iter().map(|call| format!("(call $say {call})\n")).collect();
    let mut rig = start(&on_request(&body, ":authority"));
    let stream = rig.http(request());
    assert!(matches!(rig.vm.on_request_headers(stream, true), Ok(Outcome::Continue)));
    for (call, status) in calls.iter().zip(rig.words()) {
        assert_eq!(status, 6, "{call}");
    }
    assert!(rig.record.borrow().opened.is_empty());
}

#[test]
fn an_allocator_that_lies_is_caught() {
    let engine = raw(r#"(module
          (import "env" "proxy_get_header_map_pairs" (func $pairs (param i32 i32 i32) (result i32)))
          (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
          (memory (export "memory") 1)
          (func (export "proxy_abi_version_0_2_1"))
          (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const -2))
          (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (i32.store (i32.const 0) (call $pairs (i32.const 0) (i32.const 8) (i32.const 12)))
            (drop (call $log (i32.const 2) (i32.const 0) (i32.const 4)))
            (i32.const 0)))"#);
    let mut rig = start(&engine);
    let stream = rig.http(request());
    assert!(matches!(rig.vm.on_request_headers(stream, true), Ok(Outcome::Continue)));
    assert_eq!(rig.words(), [6]);
}

#[test]
fn modules_that_are_no_filters_are_refused() {
    assert!(matches!(Engine::compile(b"nonsense"), Err(EngineError::Compile(_))));
    let wasm = wat::parse_str(r#"(module (memory (export "memory") 1))"#).expect("valid WAT");
    assert!(matches!(Engine::compile(&wasm), Err(EngineError::AbiVersion)));
    let wasm = wat::parse_str(
        r#"(module (import "env" "proxy_log" (func (param i64))) (func (export "proxy_abi_version_0_2_1")))"#,
    );
    assert!(matches!(Engine::compile(&wasm.expect("valid WAT")), Err(EngineError::Link(_))));
}

#[test]
fn an_export_of_another_type_is_refused() {
    let engine = raw(&format!(r#"(module {MINIMAL} (func (export "proxy_on_tick")))"#));
    assert!(matches!(Vm::start(&engine, config(), env()), Err(StartError::Export("proxy_on_tick"))));
}

#[test]
fn a_configuration_that_the_guest_refuses_is_an_error() {
    let refuse = r#"(func (export "proxy_on_configure") (param i32 i32) (result i32) (i32.const 0))"#;
    let engine = raw(&format!("(module {MINIMAL} {refuse})"));
    let started = Vm::start(&engine, config(), env());
    assert!(matches!(started, Err(StartError::Refused { callback: "proxy_on_configure", .. })));
}

#[test]
#[allow(unsafe_code, reason = "loads what was precompiled one line above")]
fn a_precompiled_module_loads_and_a_foreign_one_does_not() {
    let wasm = wat::parse_str(format!("(module {MINIMAL})")).expect("valid WAT");
    let artifact = Engine::precompile(&wasm).expect("a module");
    // SAFETY: made by `precompile`.
    assert!(unsafe { Engine::precompiled(&artifact) }.is_ok());
    // SAFETY: refused by its header, before anything of it is run.
    assert!(matches!(unsafe { Engine::precompiled(b"not an artifact") }, Err(EngineError::Precompiled(_))));
}

#[test]
fn context_zero_and_contexts_that_are_gone_cannot_be_entered() {
    let engine =
        on_request("(call $say (call $effective (i32.const 0))) (call $say (call $effective (i32.const 99)))", "");
    let mut rig = start(&engine);
    let stream = rig.http(request());
    assert!(matches!(rig.vm.on_request_headers(stream, true), Ok(Outcome::Continue)));
    assert_eq!(rig.words(), [2, 2]);
}
