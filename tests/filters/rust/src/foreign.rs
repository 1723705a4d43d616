//! Envoy's foreign functions, called as they are meant to be and otherwise. The configuration of the plugin has a line
//! for each call that a request makes.

use crate::say;
use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_call_foreign_function(
        name: *const u8,
        name_size: usize,
        arguments: *const u8,
        arguments_size: usize,
        results: *mut usize,
        results_size: *mut usize,
    ) -> u32;
    fn proxy_set_property(path: *const u8, path_size: usize, value: *const u8, value_size: usize) -> u32;
}

/// Status, and what the host writes as the result's place and size over numbers that are neither.
fn call(name: &str, arguments: &[u8]) -> (u32, String) {
    let (status, result) = call_for_bytes(name, arguments);
    (status, result.map_or_else(str::to_owned, |bytes| bytes.escape_ascii().to_string()))
}

fn call_for_bytes(name: &str, arguments: &[u8]) -> (u32, Result<Vec<u8>, &'static str>) {
    let (mut at, mut size) = (1, 77);
    // SAFETY: the pointers are of this frame.
    let status = unsafe {
        proxy_call_foreign_function(name.as_ptr(), name.len(), arguments.as_ptr(), arguments.len(), &mut at, &mut size)
    };
    let result = match (at, size) {
        (1, 77) => Err("untouched"),
        // What the allocator gives for nothing is its own affair.
        (_, 0) => Err("nothing"),
        // SAFETY: the host had the allocator of this module make it.
        _ => Ok(unsafe { std::slice::from_raw_parts(at as *const u8, size) }.to_vec()),
    };
    (status, result)
}

/// The status of setting a property; the SDK panics at some.
fn set(name: &str, value: &str) -> u32 {
    // SAFETY: both are borrowed.
    unsafe { proxy_set_property(name.as_ptr(), name.len(), value.as_ptr(), value.len()) }
}

fn shown(value: Option<Vec<u8>>) -> Option<String> {
    value.map(|bytes| bytes.escape_ascii().to_string())
}

/// As [`call`], without any wish for a result.
fn tell(name: &str, arguments: &[u8]) -> u32 {
    let none = std::ptr::null_mut();
    // SAFETY: no results are asked for.
    unsafe { proxy_call_foreign_function(name.as_ptr(), name.len(), arguments.as_ptr(), arguments.len(), none, none) }
}

/// A message of fields that are bytes or numbers below 128.
fn message(fields: &[(u8, Field)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, field) in fields {
        match field {
            Field::Number(value) => out.extend([number << 3, *value]),
            Field::Text(value) => {
                out.push(number << 3 | 2);
                let mut size = value.len();
                while size > 127 {
                    out.push(size as u8 | 128);
                    size >>= 7;
                }
                out.push(size as u8);
                out.extend(*value);
            }
        }
    }
    out
}

#[derive(Clone, Copy)]
enum Field<'a> {
    Number(u8),
    Text(&'a [u8]),
}
use Field::{Number, Text};

const KINDS: [&str; 4] = ["bytes", "string", "flatbuffers", "protobuf"];

fn declaration(name: &str, readonly: bool, kind: u8, span: u8) -> Vec<u8> {
    let schema = Text(b"type.googleapis.com/google.protobuf.StringValue");
    let (readonly, kind, span) = (Number(readonly.into()), Number(kind), Number(span));
    message(&[(1, Text(name.as_bytes())), (2, readonly), (3, kind), (4, schema), (5, span)])
}

/// Declares properties, as only a root context can; what came of it.
pub fn declare() -> Vec<String> {
    let mut said = Vec::new();
    let mut declare =
        |what: &str, arguments: &[u8]| said.push(format!("{what} {:?}", call("declare_property", arguments)));
    for (kind, name) in (0..).zip(KINDS) {
        declare(name, &declaration(name, false, kind, 0));
    }
    declare("again", &declaration("bytes", false, 1, 0));
    declare("once", &declaration("once", true, 1, 0));
    declare("request", &declaration("request-span", false, 1, 1));
    declare("connection", &declaration("connection-span", false, 1, 2));
    declare("unknown kind", &declaration("unknown-kind", false, 9, 9));
    declare("nameless", &declaration("", false, 1, 0));
    declare("nonsense", b"\xff\xff");
    declare("nothing", b"");
    for name in ["clear_route_cache", "set_envoy_filter_state", "none"] {
        said.push(format!("{name} {:?}", call(name, b"")));
    }
    let state = message(&[(1, Text(b"envoy.string")), (2, Text(b"value"))]);
    said.push(format!("state {:?}", call("set_envoy_filter_state", &state)));
    said.push(format!("property {:?}", set("bytes", "value")));
    for expression in ["1 + 1", "plugin_root_id", "request.path"] {
        said.push(format!("{expression}: {}", evaluate(expression)));
    }
    said
}

/// Signs by a private key and verifies by a public one, both PEM, what is signed and something else.
fn sign(hash: &str, private: &str, public: &str) -> String {
    let (hash, private, public) = (Text(hash.as_bytes()), Text(private.as_bytes()), Text(public.as_bytes()));
    let (status, signed) = call_for_bytes("sign", &message(&[(1, hash), (3, Text(b"text")), (4, private)]));
    let signed = signed.unwrap_or_default();
    // `result` is true, and `signature` has fewer than 128 bytes.
    let [8, 1, 0x12, _, signature @ ..] = &signed[..] else {
        return format!("not signed {status} {}", signed.escape_ascii());
    };
    let verify = |text: &'static [u8]| {
        call("verify_signature", &message(&[(1, hash), (3, Text(signature)), (4, Text(text)), (5, public)]))
    };
    format!("signed {status}, {:?}, {:?}", verify(b"text"), verify(b"another text"))
}

fn evaluate(expression: &str) -> String {
    let Ok(token) = hostcalls::call_foreign_function("expr_create", Some(expression.as_bytes())) else {
        return "no expression".to_owned();
    };
    let token = token.unwrap_or_default();
    let value = call("expr_evaluate", &token);
    let deleted = call("expr_delete", &token);
    format!("{value:?} {deleted:?}")
}

pub struct Foreign {
    declared: Vec<String>,
    calls: Vec<String>,
}

impl Foreign {
    pub fn new(declared: &[String], configuration: &str) -> Self {
        Self { declared: declared.to_vec(), calls: configuration.lines().map(str::to_owned).collect() }
    }

    fn show(name: &str) {
        let own = hostcalls::get_property(vec![name]).map(shown);
        let key = format!("wasm.{name}");
        let state = hostcalls::get_property(vec!["filter_state", &key]).map(shown);
        say(format!("{name}: {own:?}, in the filter state {state:?}"));
    }
}

impl Context for Foreign {}

impl HttpContext for Foreign {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        for line in &self.declared {
            say(format!("root: {line}"));
        }
        // Envoy does not survive a look into a buffer whose schema is none.
        for name in KINDS.iter().filter(|name| **name != "flatbuffers").chain(&[
            "once",
            "request-span",
            "connection-span",
            "unknown-kind",
            "undeclared",
        ]) {
            Self::show(name);
            let set = ["first", "second"].map(|value| set(name, value));
            say(format!("{name} set {set:?}"));
            Self::show(name);
            let part = hostcalls::get_property(vec![name, "value"]).map(shown);
            say(format!("{name}.value {part:?}"));
            for cel in ["X + 'text'", "X + b'bytes'", "size(X)", "X", "X.value"] {
                let cel = cel.replace('X', &format!("filter_state['wasm.{name}']"));
                say(format!("{cel}: {}", evaluate(&cel)));
            }
        }
        say(format!("in a stream {:?}", call("declare_property", &declaration("own", true, 1, 0))));
        say(format!("in a stream again {:?}", call("declare_property", &declaration("own", true, 1, 0))));
        let set = ["first", "second"].map(|value| set("own", value));
        say(format!("own set {set:?}"));
        for line in &self.calls {
            let (name, argument) = line.split_once(' ').unwrap_or((line, ""));
            match name {
                "expr" => say(format!("{argument}: {}", evaluate(argument))),
                "state" => {
                    let (key, value) = argument.split_once('=').unwrap_or((argument, ""));
                    let set = message(&[(1, Text(key.as_bytes())), (2, Text(value.as_bytes()))]);
                    let done = call("set_envoy_filter_state", &set);
                    let read = hostcalls::get_property(vec!["filter_state", key]).map(shown);
                    let port = hostcalls::get_property(vec!["filter_state", key, "port"]).map(shown);
                    say(format!("{line} {done:?} {read:?} {port:?}"));
                }
                "signature" => {
                    let argument = argument.replace("\\n", "\n");
                    let parts: Vec<_> = argument.split('|').collect();
                    say(format!("signature {}", sign(parts[0], parts[1], parts[2])));
                }
                "tell" => say(format!("{line} {}", tell(argument, b"hello"))),
                "repeat" => {
                    let (name, count) = argument.split_once(' ').unwrap_or((argument, "0"));
                    let (status, result) = call(name, &vec![b'a'; count.parse().unwrap_or(0)]);
                    say(format!("{line} {status} {}", result.len() > 100));
                }
                _ => say(format!("{line} {:?}", call(name, &argument.replace("\\n", "\n").into_bytes()))),
            }
        }
        say("told");
        // What was set may bear on the way to the upstream.
        self.send_http_response(200, vec![], None);
        Action::Pause
    }
}
