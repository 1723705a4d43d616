//! Each group of hostcalls, called by small guests.

use crate::vm_support;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode};
use portolan_proxy_host::vm::{
    EffectKind, HttpCallResponse, HttpState, MapType, MetricValue, Outcome, PeerType, Properties, ResponseHead, Shared,
    Shown, StreamType, VmConfig,
};
use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use vm_support::{Rig, config, guest, on_request, request, start, start_with};

/// Runs `body` on the request headers of [`request`].
fn run(body: &str, data: &str) -> (Rig, Outcome, HttpState) {
    let mut rig = start(&on_request(body, data));
    let stream = rig.http(request());
    let outcome = rig.vm.on_request_headers(stream, true).expect("no trap");
    let state = std::mem::take(rig.vm.http(stream).expect("the stream"));
    (rig, outcome, state)
}

fn header<'a>(map: &'a HeaderMap, name: &str) -> Option<&'a str> {
    map.get(name).map(|value| value.to_str().expect("text"))
}

#[test]
fn configurations_reach_the_guest() {
    let engine = guest(
        r#"(func $read (param $type i32) (param $len i32)
             (call $check (call $buffer (local.get $type) (i32.const 0) (local.get $len) (i32.const 8) (i32.const 12)))
             (call $show))
           (func (export "proxy_on_vm_start") (param i32 i32) (result i32)
             (call $read (i32.const 6) (local.get 1)) (i32.const 1))
           (func (export "proxy_on_configure") (param i32 i32) (result i32)
             (call $read (i32.const 7) (local.get 1)) (i32.const 1))"#,
    );
    let rig = start_with(&engine, VmConfig { vm_configuration: Bytes::from_static(b"for the vm"), ..config() });
    assert_eq!(rig.logs(), ["for the vm", "configuration"]);
}

#[test]
fn of_several_values_a_guest_sees_the_first_as_in_envoy() {
    let body = "(call $check (call $value (i32.const 0) (i32.const 1024) (i32.const 5) (i32.const 8) (i32.const 12)))
                (call $show)";
    assert_eq!(run(body, "X-Two").0.logs(), ["1"]);
}

#[test]
fn pseudo_headers_are_headers() {
    let body = "(call $check (call $value (i32.const 0) (i32.const 1024) (i32.const 10) (i32.const 8) (i32.const 12)))
                (call $show)";
    assert_eq!(run(body, ":authority").0.logs(), ["example.com"]);
}

#[test]
fn a_missing_header_is_not_found() {
    let body = "(call $say (call $value (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 8) (i32.const 12)))";
    assert_eq!(run(body, "none").0.words(), [1]);
    assert_eq!(run(body, "\\ff\\fe\\00\\80").0.words(), [1]);
}

#[test]
fn headers_are_added_replaced_and_removed() {
    let body = "(call $check (call $add (i32.const 0) (i32.const 1024) (i32.const 2) (i32.const 1026) (i32.const 1)))
                (call $check (call $replace (i32.const 0) (i32.const 1027) (i32.const 5) (i32.const 1032) (i32.const 2)))
                (call $check (call $remove (i32.const 0) (i32.const 1034) (i32.const 5)))";
    let (rig, _, state) = run(body, "x-y:path/zX-TWO");
    assert_eq!(rig.words(), [0_u32; 0]);
    assert_eq!(header(&state.request.headers, "x-"), Some("y"));
    assert_eq!(state.request.path, Some(HeaderValue::from_static("/z")));
    assert_eq!(header(&state.request.headers, "x-two"), None);
}

#[test]
fn bytes_no_header_can_hold_are_bad_arguments() {
    let body = "(call $say (call $add (i32.const 0) (i32.const 1024) (i32.const 1) (i32.const 1025) (i32.const 1)))
                (call $say (call $add (i32.const 0) (i32.const 1025) (i32.const 1) (i32.const 1024) (i32.const 1)))
                (call $say (call $replace (i32.const 0) (i32.const 1026) (i32.const 5) (i32.const 1024) (i32.const 1)))";
    assert_eq!(run(body, "a\\n:nope").0.words(), [2, 2, 2]);
}

#[test]
fn header_pairs_round_trip() {
    let body = "(call $check (call $pairs (i32.const 0) (i32.const 8) (i32.const 12)))
                (call $check (call $set_pairs (i32.const 0) (i32.load (i32.const 8)) (i32.load (i32.const 12))))
                (call $check (call $map_size (i32.const 0) (i32.const 16)))
                (call $say (i32.load (i32.const 16)))";
    let (rig, _, state) = run(body, "");
    let before = request();
    assert_eq!(state.request.headers, before.request.headers);
    assert_eq!(state.request.path, before.request.path);
    // :authority example.com, :path /a?b, :method GET, :scheme http, x-two 1, x-two 2
    assert_eq!(rig.words(), [10 + 11 + 5 + 4 + 7 + 3 + 7 + 4 + 6 + 6]);
}

#[test]
fn broken_pairs_are_refused() {
    let body = "(call $say (call $set_pairs (i32.const 0) (i32.const 1024) (i32.const 4)))";
    assert_eq!(run(body, "\\ff\\ff\\ff\\ff").0.words(), [3]);
}

#[test]
fn unknown_maps_are_bad_arguments_and_maps_that_are_not_there_are_empty() {
    let body = "(call $say (call $pairs (i32.const 99) (i32.const 8) (i32.const 12)))
                (call $say (call $pairs (i32.const 6) (i32.const 8) (i32.const 12)))
                (call $say (call $pairs (i32.const 4) (i32.const 8) (i32.const 12)))";
    assert_eq!(run(body, "").0.words(), [2, 0, 0]);
}

/// Runs `body` on a request body `hello`.
fn run_body(body: &str, data: &str) -> (Rig, Bytes) {
    let engine = guest(&format!(
        r#"(data (i32.const 1024) "{data}")
           (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) {body} (i32.const 0))"#
    ));
    let mut rig = start(&engine);
    let stream = rig.http(HttpState { request_body: Bytes::from_static(b"hello"), ..HttpState::default() });
    assert!(matches!(rig.vm.on_request_body(stream, true), Ok(Outcome::Continue)));
    let body = rig.vm.http(stream).expect("the stream").request_body.clone();
    (rig, body)
}

#[test]
fn a_buffer_is_read_in_parts_and_cut_at_its_end() {
    let read = |start: u32, len: u32| {
        let body = format!(
            "(call $check (call $buffer (i32.const 0) (i32.const {start}) (i32.const {len}) (i32.const 8) (i32.const 12)))
             (call $show)"
        );
        run_body(&body, "").0.logs()
    };
    assert_eq!(read(1, 3), ["ell"]);
    assert_eq!(read(3, 100), ["lo"]);
    assert_eq!(read(9, 1), [""]);
}

#[test]
fn a_buffer_is_prepended_replaced_appended_but_not_split() {
    let set = |start: u32, len: u32| {
        let body = format!(
            "(call $say (call $set_buffer (i32.const 0) (i32.const {start}) (i32.const {len}) (i32.const 1024) (i32.const 2)))"
        );
        let (rig, body) = run_body(&body, "ab");
        (rig.words()[0], String::from_utf8_lossy(&body).into_owned())
    };
    assert_eq!(set(0, 0), (0, "abhello".into()));
    assert_eq!(set(0, 5), (0, "ab".into()));
    assert_eq!(set(5, 0), (0, "helloab".into()));
    assert_eq!(set(2, 1), (2, "hello".into()));
}

#[test]
fn the_length_of_a_buffer() {
    let body = "(call $check (call $buffer_status (i32.const 0) (i32.const 16) (i32.const 20)))
                (call $say (i32.load (i32.const 16)))
                (call $say (call $buffer_status (i32.const 2) (i32.const 16) (i32.const 20)))";
    assert_eq!(run_body(body, "").0.words(), [5, 1]);
}

struct Attributes;

impl Properties for Attributes {
    fn get(&self, path: &[&[u8]]) -> Option<Cow<'_, [u8]>> {
        (path == [b"destination".as_slice(), b"address"]).then_some(Cow::Borrowed(b"10.0.0.1:80"))
    }
}

#[test]
fn properties_come_from_stream_plugin_and_node() {
    let get = |path: &str| {
        let len = path.replace("\\00", "0").len();
        let body = format!(
            "(call $check (call $property (i32.const 1024) (i32.const {len}) (i32.const 8) (i32.const 12))) (call $show)"
        );
        let mut rig = start(&on_request(&body, path));
        let stream = rig.vm.create_http(rig.root, request(), Rc::new(Attributes)).expect("a stream");
        assert!(matches!(rig.vm.on_request_headers(stream, true), Ok(Outcome::Continue)));
        rig.logs()
    };
    assert_eq!(get("destination\\00address"), ["10.0.0.1:80"]);
    assert_eq!(get("plugin_root_id"), ["root"]);
    assert_eq!(get("plugin_name"), ["plugin"]);
    assert_eq!(get("plugin_vm_id"), ["vm"]);
    assert_eq!(get("node\\00id"), ["node-1"]);
    assert_eq!(get("request\\00url_path"), ["/a"]);
    assert_eq!(get("request\\00query"), ["b"]);
    assert_eq!(get("request\\00headers\\00x-two"), ["1"]);
    // The status, and then the value that was never written.
    assert_eq!(get("nothing\\00here"), ["\u{1}\0\0\0", ""]);
}

#[test]
fn a_property_that_was_set_is_read_back() {
    let body = "(call $check (call $set_property (i32.const 1024) (i32.const 4) (i32.const 1028) (i32.const 2)))
                (call $check (call $property (i32.const 1024) (i32.const 4) (i32.const 8) (i32.const 12))) (call $show)";
    assert_eq!(run(body, "mineok").0.logs(), ["ok"]);
}

#[test]
fn metrics_count_over_fresh_instances() {
    let body = "(call $check (call $define (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 16)))
                (call $check (call $increment (i32.load (i32.const 16)) (i64.const 2)))
                (call $check (call $metric (i32.load (i32.const 16)) (i32.const 24)))
                (call $say (i32.load (i32.const 24)))";
    let engine = on_request(body, "hits");
    let shared = Arc::new(Shared::default());
    for expected in [2, 4] {
        let mut rig = start_with(&engine, VmConfig { shared: shared.clone(), ..config() });
        let stream = rig.http(request());
        assert!(matches!(rig.vm.on_request_headers(stream, true), Ok(Outcome::Continue)));
        assert_eq!(rig.words(), [expected]);
    }
    assert_eq!(shared.metrics.get("hits"), Some(MetricValue::Counter(4)));
}

#[test]
fn shared_data_is_compared_and_swapped() {
    let set =
        |cas: &str| format!("(call $set_data (i32.const 1024) (i32.const 1) (i32.const 1025) (i32.const 2) {cas})");
    let body = format!(
        "(call $say (call $data (i32.const 1024) (i32.const 1) (i32.const 8) (i32.const 12) (i32.const 16)))
         (call $say {any})
         (call $check (call $data (i32.const 1024) (i32.const 1) (i32.const 8) (i32.const 12) (i32.const 16)))
         (call $say {right})
         (call $say {right})",
        any = set("(i32.const 0)"),
        right = set("(i32.load (i32.const 16))"),
    );
    assert_eq!(run(&body, "kvv").0.words(), [1, 0, 0, 8]);
}

#[test]
fn queues_carry_messages_between_vms_and_wake_them() {
    let engine = guest(
        r#"(data (i32.const 1024) "vmqueuemessage")
           (func (export "proxy_on_tick") (param i32)
             (call $say (call $resolve (i32.const 1024) (i32.const 2) (i32.const 1026) (i32.const 5) (i32.const 16)))
             (call $check (call $register (i32.const 1026) (i32.const 5) (i32.const 16)))
             (call $say (call $dequeue (i32.load (i32.const 16)) (i32.const 8) (i32.const 12)))
             (call $check (call $enqueue (i32.load (i32.const 16)) (i32.const 1031) (i32.const 7)))
             (call $say (call $enqueue (i32.const 77) (i32.const 1031) (i32.const 7))))
           (func (export "proxy_on_queue_ready") (param i32 i32)
             (call $check (call $dequeue (local.get 1) (i32.const 8) (i32.const 12)))
             (call $show))"#,
    );
    let woken = Arc::new(AtomicU32::new(0));
    let waker = woken.clone();
    let queue_waker = Some(Arc::new(move |_, queue| waker.store(queue, Ordering::SeqCst)) as _);
    let mut rig = start_with(&engine, VmConfig { queue_waker, ..config() });
    rig.vm.on_tick(rig.root).expect("no trap");
    assert_eq!(rig.words(), [1, 7, 1]);
    let queue = woken.load(Ordering::SeqCst);
    rig.vm.on_queue_ready(rig.root.get(), queue).expect("no trap");
    assert_eq!(rig.logs(), ["message"]);
}

#[test]
fn clock_log_level_and_timer() {
    let body = "(call $check (call $now (i32.const 16)))
                (call $say (i32.load (i32.const 20)))
                (call $check (call $log_level (i32.const 16)))
                (call $say (i32.load (i32.const 16)))
                (call $check (call $tick (i32.const 250)))
                (call $say (call $log (i32.const 9) (i32.const 0) (i32.const 1)))";
    let (rig, _, _) = run(body, "");
    assert_eq!(rig.words(), [0x0102_0304, 2, 2]);
    assert_eq!(rig.record.borrow().ticks, [(rig.root, Duration::from_millis(250))]);
}

#[test]
fn a_local_response_is_the_outcome() {
    // One header pair: "a" = "bc".
    let data = "because\\01\\00\\00\\00\\01\\00\\00\\00\\02\\00\\00\\00a\\00bc\\00body";
    let body =
        "(call $check (call $respond (i32.const 503) (i32.const 1024) (i32.const 7) (i32.const 1048) (i32.const 4)
                  (i32.const 1031) (i32.const 17) (i32.const -1)))";
    let (rig, outcome, _) = run(body, data);
    assert_eq!(rig.words(), [0_u32; 0]);
    let Outcome::Respond(response) = outcome else { panic!("{outcome:?}") };
    assert_eq!((response.status, &response.details[..]), (StatusCode::SERVICE_UNAVAILABLE, &b"because"[..]));
    assert_eq!((&response.body[..], response.grpc_status), (&b"body"[..], None));
    assert_eq!(header(&response.headers, "a"), Some("bc"));
}

#[test]
fn a_local_response_with_an_impossible_status_is_a_bad_argument() {
    let body = "(call $say (call $respond (i32.const 70000) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
                  (i32.const 0) (i32.const 0) (i32.const -1)))";
    let (rig, outcome, _) = run(body, "");
    assert_eq!(rig.words(), [2]);
    assert!(matches!(outcome, Outcome::Continue));
}

#[test]
fn foreign_functions_steer_the_route() {
    // SetEnvoyFilterStateArguments { path: "envoy.string", value: "val", span: 1 }
    let data = "clear_route_cacheset_envoy_filter_state\\0a\\0cenvoy.string\\12\\03val\\18\\01echonope";
    let foreign = |name: u32, len: u32, at: u32, at_len: u32| {
        format!(
            "(call $foreign (i32.const {name}) (i32.const {len}) (i32.const {at}) (i32.const {at_len})
               (i32.const 8) (i32.const 12))"
        )
    };
    let body = format!(
        "(call $say {}) (call $say {}) (call $say {}) (call $say {})",
        foreign(1024, 17, 0, 0),
        foreign(1041, 22, 1063, 21),
        foreign(1088, 4, 0, 0),
        foreign(1041, 22, 1024, 5),
    );
    let mut rig = start(&on_request(&body, data));
    let stream = rig.http(request());
    assert!(matches!(rig.vm.on_request_headers(stream, true), Ok(Outcome::Continue)));
    assert_eq!(rig.words(), [0, 0, 1, 2]);
    assert!(rig.vm.http(stream).expect("the stream").route_cleared);
    let state = rig.vm.filter_state(stream).expect("the stream");
    assert_eq!(state.get("envoy.string").map(|value| &value[..]), Some(&b"val"[..]));
}

#[test]
fn expressions_are_evaluated_over_attributes() {
    // Each is made, evaluated, deleted, and then no longer there.
    let value = |expression: &str| {
        let body = format!(
            "(call $check (call $foreign (i32.const 1024) (i32.const 11) (i32.const 1048) (i32.const {})
               (i32.const 8) (i32.const 12)))
             (i32.store (i32.const 16) (i32.load (i32.load (i32.const 8))))
             (call $check (call $foreign (i32.const 1035) (i32.const 13) (i32.const 16) (i32.const 4)
               (i32.const 8) (i32.const 12)))
             (call $show)
             (call $check (call $foreign (i32.const 1200) (i32.const 11) (i32.const 16) (i32.const 4)
               (i32.const 8) (i32.const 12)))
             (call $say (call $foreign (i32.const 1035) (i32.const 13) (i32.const 16) (i32.const 4)
               (i32.const 8) (i32.const 12)))",
            expression.len()
        );
        let data = format!("expr_createexpr_evaluate{expression:<152}expr_delete");
        assert_eq!(data.len(), 187);
        let logs = run(&body, &data).0.logs();
        assert_eq!((logs.len(), &*logs[1]), (2, "\u{1}\0\0\0"), "{logs:?}");
        logs[0].clone()
    };
    assert_eq!(value("request.method + ' ' + request.headers['x-two']"), "GET 1,2");
    assert_eq!(value("request.path.startsWith('/') && !('x-z' in request.headers)"), "\u{1}");
    assert_eq!(value("size(request.method) * 2"), "\u{6}\0\0\0\0\0\0\0");
}

#[test]
fn the_embedder_adds_foreign_functions() {
    let body = "(call $check (call $foreign (i32.const 1024) (i32.const 4) (i32.const 1028) (i32.const 2)
                  (i32.const 8) (i32.const 12))) (call $show)";
    assert_eq!(run(body, "echohi").0.logs(), ["hi"]);
}

#[test]
fn grpc_streams_open_send_receive_and_close() {
    let engine = guest(
        r#"(data (i32.const 1024) "upstreamservicemethodnowhere")
           (func $open (param $at i32) (param $len i32) (result i32)
             (call $grpc_stream (local.get $at) (local.get $len) (i32.const 1032) (i32.const 7) (i32.const 1039)
               (i32.const 6) (i32.const 0) (i32.const 0) (i32.const 16)))
           (func (export "proxy_on_tick") (param i32)
             (call $say (call $open (i32.const 1045) (i32.const 7)))
             (call $check (call $open (i32.const 1024) (i32.const 8)))
             (call $check (call $grpc_send (i32.load (i32.const 16)) (i32.const 1032) (i32.const 7) (i32.const 1)))
             (call $say (call $grpc_send (i32.const 999) (i32.const 1032) (i32.const 7) (i32.const 0))))
           (func (export "proxy_on_grpc_receive_initial_metadata") (param i32 i32 i32)
             (call $check (call $value (i32.const 4) (i32.const 1032) (i32.const 7) (i32.const 8) (i32.const 12)))
             (call $show))
           (func (export "proxy_on_grpc_receive") (param i32 i32 i32)
             (call $check (call $buffer (i32.const 5) (i32.const 0) (local.get 2) (i32.const 8) (i32.const 12)))
             (call $show))
           (func (export "proxy_on_grpc_close") (param i32 i32 i32)
             (call $check (call $status (i32.const 20) (i32.const 8) (i32.const 12)))
             (call $show)
             (call $say (i32.load (i32.const 20))))"#,
    );
    let mut rig = start(&engine);
    rig.vm.on_tick(rig.root).expect("no trap");
    assert_eq!(rig.words(), [2, 1]);
    let token = {
        let record = rig.record.borrow();
        let (token, request) = &record.opened[0];
        assert_eq!((request.service.as_str(), request.method.as_str()), ("service", "method"));
        assert_eq!(record.sent, [(*token, Bytes::from_static(b"service"), true)]);
        *token
    };
    let metadata = vec![(Bytes::from_static(b"service"), Bytes::from_static(b"meta"))];
    rig.vm.on_grpc_receive_initial_metadata(token, metadata).expect("no trap");
    rig.vm.on_grpc_receive(token, Bytes::from_static(b"message")).expect("no trap");
    rig.vm.on_grpc_close(token, 14, Bytes::from_static(b"gone")).expect("no trap");
    assert_eq!(rig.logs(), ["meta", "message", "gone", "\u{e}\0\0\0"]);
    // It has ended: nothing more reaches the guest.
    rig.vm.on_grpc_receive(token, Bytes::from_static(b"late")).expect("no trap");
    assert_eq!(rig.logs(), [""; 0]);
}

#[test]
fn a_grpc_call_ends_with_its_response() {
    let engine = guest(
        r#"(data (i32.const 1024) "upstream")
           (func (export "proxy_on_tick") (param i32)
             (call $check (call $grpc_call (i32.const 1024) (i32.const 8) (i32.const 1024) (i32.const 2) (i32.const 1024)
               (i32.const 2) (i32.const 0) (i32.const 0) (i32.const 1024) (i32.const 3) (i32.const 30) (i32.const 16))))
           (func (export "proxy_on_grpc_receive") (param i32 i32 i32)
             (call $say (call $grpc_cancel (local.get 1))))"#,
    );
    let mut rig = start(&engine);
    rig.vm.on_tick(rig.root).expect("no trap");
    let (token, message, timeout) = rig.record.borrow().grpc_calls[0].clone();
    assert_eq!((&message[..], timeout), (&b"ups"[..], Duration::from_millis(30)));
    rig.vm.on_grpc_receive(token, Bytes::from_static(b"answer")).expect("no trap");
    assert_eq!(rig.words(), [1]);
}

/// A guest that makes an HTTP call for a request, pauses it, and continues it with a header when the answer is there.
fn http_call_guest() -> portolan_proxy_host::vm::Engine {
    // :authority=a :path=/ as pairs at 1028, 41 bytes
    let pairs = "\\02\\00\\00\\00\\0a\\00\\00\\00\\01\\00\\00\\00\\05\\00\\00\\00\\01\\00\\00\\00:authority\\00a\\00:path\\00/\\00";
    guest(&format!(
        r#"(data (i32.const 1024) "uphx{pairs}")
           (global $stream (mut i32) (i32.const 0))
           (func (export "proxy_on_request_headers") (param $ctx i32) (param i32 i32) (result i32)
             (global.set $stream (local.get $ctx))
             (call $check (call $http_call (i32.const 1024) (i32.const 2) (i32.const 1028) (i32.const 41) (i32.const 0)
               (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 500) (i32.const 16)))
             (i32.const 1))
           (func (export "proxy_on_http_call_response") (param $root i32) (param i32 i32 i32 i32)
             (call $say (local.get $root))
             (if (i32.eq (call $effective (global.get $stream)) (i32.const 2)) (then (return)))
             (call $check (call $buffer (i32.const 4) (i32.const 0) (i32.const 9) (i32.const 8) (i32.const 12)))
             (call $check (call $add (i32.const 0) (i32.const 1027) (i32.const 1) (i32.load (i32.const 8))
               (i32.load (i32.const 12))))
             (call $check (call $continue (i32.const 0))))"#
    ))
}

#[test]
fn an_http_call_resumes_the_request_that_waited_for_it() {
    let mut rig = start(&http_call_guest());
    let stream = rig.http(request());
    assert!(matches!(rig.vm.on_request_headers(stream, true), Ok(Outcome::Pause)));
    assert_eq!(rig.words(), [0_u32; 0]);
    let token = {
        let record = rig.record.borrow();
        let (token, call) = &record.http_calls[0];
        assert_eq!((&call.upstream[..], call.timeout), (&b"up"[..], Duration::from_millis(500)));
        assert_eq!(call.head.path, Some(HeaderValue::from_static("/")));
        *token
    };
    let head = ResponseHead { status: StatusCode::OK, headers: HeaderMap::new() };
    let response = HttpCallResponse { head, body: Bytes::from_static(b"answer"), trailers: HeaderMap::new() };
    rig.vm.on_http_call_response(token, Some(response)).expect("no trap");
    assert_eq!(rig.words(), [rig.root.get()], "answers are delivered to the root context");
    let effect = rig.vm.next_effect().expect("the request goes on");
    assert_eq!(effect.context, stream);
    assert!(matches!(effect.kind, EffectKind::Continue(StreamType::Request)));
    assert!(rig.vm.next_effect().is_none());
    assert_eq!(header(&rig.vm.http(stream).expect("the stream").request.headers, "x"), Some("answer"));
}

#[test]
fn a_call_outlives_its_stream_as_in_envoy() {
    let mut rig = start(&http_call_guest());
    let stream = rig.http(request());
    assert!(matches!(rig.vm.on_request_headers(stream, true), Ok(Outcome::Pause)));
    let token = rig.record.borrow().http_calls[0].0;
    rig.vm.finish(stream).expect("no trap");
    assert!(rig.record.borrow().cancelled.is_empty());
    rig.vm.on_http_call_response(token, None).expect("no trap");
    assert_eq!((rig.vm.streams(), rig.words()), (0, vec![rig.root.get()]));
}

#[test]
fn a_stream_that_is_not_done_stays_until_it_is() {
    let engine = guest(
        r#"(global $ctx (mut i32) (i32.const 0))
           (func (export "proxy_on_done") (param i32) (result i32) (global.set $ctx (local.get 0)) (i32.const 0))
           (func (export "proxy_on_log") (param i32) (call $say (i32.const 1)))
           (func (export "proxy_on_delete") (param i32) (call $say (i32.const 2)))
           (func (export "proxy_on_tick") (param i32)
             (call $check (call $effective (global.get $ctx)))
             (call $check (call $done)))"#,
    );
    let mut rig = start(&engine);
    let stream = rig.http(request());
    rig.vm.finish(stream).expect("no trap");
    assert_eq!((rig.vm.streams(), rig.words()), (1, vec![1]));
    rig.vm.on_tick(rig.root).expect("no trap");
    assert_eq!((rig.vm.streams(), rig.words()), (0, vec![2]));
}

#[test]
fn connections_are_read_changed_and_closed() {
    let engine = guest(
        r#"(data (i32.const 1024) ">>")
           (func (export "proxy_on_new_connection") (param i32) (result i32) (i32.const 1))
           (func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32)
             (call $say (local.get 1))
             (call $check (call $set_buffer (i32.const 2) (i32.const 0) (i32.const 0) (i32.const 1024) (i32.const 2)))
             (i32.const 0))
           (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32)
             (call $say (call $close (i32.const 0)))
             (call $check (call $close (i32.const 2)))
             (i32.const 0))
           (func (export "proxy_on_downstream_connection_close") (param i32 i32) (call $say (local.get 1)))"#,
    );
    let mut rig = start(&engine);
    let stream = rig.vm.create_network(rig.root, Rc::new(())).expect("a stream");
    assert!(matches!(rig.vm.on_new_connection(stream), Ok(Outcome::Pause)));
    rig.vm.network(stream).expect("the stream").downstream = Bytes::from_static(b"hi");
    assert!(matches!(rig.vm.on_downstream_data(stream, false), Ok(Outcome::Continue)));
    assert_eq!(&rig.vm.network(stream).expect("the stream").downstream[..], b">>hi");
    let outcome = rig.vm.on_upstream_data(stream, false);
    assert!(matches!(outcome, Ok(Outcome::Close(StreamType::Downstream))));
    rig.vm.on_downstream_connection_close(stream, PeerType::Remote).expect("no trap");
    assert_eq!(rig.words(), [2, 2, 2]);
}

#[test]
fn callbacks_that_are_not_exported_continue() {
    let mut rig = start(&guest(""));
    let stream = rig.http(request());
    assert!(matches!(rig.vm.on_request_headers(stream, false), Ok(Outcome::Continue)));
    assert!(matches!(rig.vm.on_request_body(stream, false), Ok(Outcome::Continue)));
    assert!(matches!(rig.vm.on_request_trailers(stream), Ok(Outcome::Continue)));
    assert!(matches!(rig.vm.on_response_headers(stream, false), Ok(Outcome::Continue)));
    assert!(matches!(rig.vm.on_response_body(stream, false), Ok(Outcome::Continue)));
    assert!(matches!(rig.vm.on_response_trailers(stream), Ok(Outcome::Continue)));
    rig.vm.on_tick(rig.root).expect("no trap");
    rig.vm.finish(stream).expect("no trap");
}

#[test]
fn output_is_logged_by_lines() {
    // Two parts: "one\ntw" and "o\n".
    let data = "\\10\\04\\00\\00\\06\\00\\00\\00\\16\\04\\00\\00\\02\\00\\00\\00one\\ntwo\\n";
    let body = "(call $check (call $fd_write (i32.const 2) (i32.const 1024) (i32.const 2) (i32.const 16)))
                (call $check (call $environ (i32.const 16) (i32.const 20)))
                (call $check (call $random (i32.const 16) (i32.const 8)))
                (call $check (call $clock (i32.const 0) (i64.const 1) (i32.const 16)))";
    assert_eq!(run(body, data).0.logs(), ["one", "two"]);
}

#[test]
fn there_are_no_files_and_nothing_to_wait_for() {
    let body = "(call $say (call $fd_write (i32.const 7) (i32.const 1024) (i32.const 0) (i32.const 16)))
                (call $say (call $path_open (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
                  (i64.const 0) (i64.const 0) (i32.const 0) (i32.const 0)))";
    assert_eq!(run(body, "").0.words(), [8, 44]);
    let poll = "(i32.store (i32.const 16) (i32.const 9))
                (call $say (call $poll (i32.const 32) (i32.const 96) (i32.const 1) (i32.const 16)))
                (call $say (i32.load (i32.const 16)))";
    assert_eq!(run(poll, "").0.words(), [0, 0]);
}

#[test]
fn maps_that_are_not_shown_cannot_be_reached_and_the_log_only_reads() {
    let get = "(call $say (call $value (i32.const 0) (i32.const 1024) (i32.const 5) (i32.const 8) (i32.const 12)))
               (call $say (call $add (i32.const 0) (i32.const 1024) (i32.const 5) (i32.const 1024) (i32.const 1)))";
    let engine = guest(&format!(
        r#"(data (i32.const 1024) "x-two")
           (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) {get} (i32.const 0))
           (func (export "proxy_on_log") (param i32) {get})
           (func (export "proxy_on_done") (param i32) (result i32) (call $say (i32.const 9)) (i32.const 1))"#
    ));
    let mut rig = start(&engine);
    let stream = rig.http(HttpState { shown: Shown::NONE, ..request() });
    assert!(matches!(rig.vm.on_response_headers(stream, true), Ok(Outcome::Continue)));
    assert_eq!(rig.words(), [2, 2]);
    rig.vm.http(stream).expect("the stream").shown.set(MapType::RequestHeaders, true);
    rig.vm.finish(stream).expect("no trap");
    // As Envoy: not to be changed (2), and logged before it is done.
    assert_eq!(rig.words(), [0, 2, 9]);
}
