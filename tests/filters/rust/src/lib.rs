//! One module with many filters: the root id chooses which. Each uses one part of the ABI as filters in the wild do, and
//! tells what it sees in log lines that begin with `@@`, which the tests read.

mod bodies;
mod calls;
mod foreign;
mod headers;
mod maps;
mod network;
mod order;
mod properties;
mod shared;
mod waiting;

use proxy_wasm::traits::{Context, HttpContext, RootContext, StreamContext};
use proxy_wasm::types::{ContextType, LogLevel};

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Trace);
    proxy_wasm::set_root_context(|_| -> Box<dyn RootContext> { Box::new(Root::default()) });
}}

/// Writes a line that a test waits for.
pub fn say(line: impl AsRef<str>) {
    // A host that does not log shows in the test.
    let _ = proxy_wasm::hostcalls::log(LogLevel::Info, &format!("@@ {}", line.as_ref()));
}

/// Which filter this is: known once the root context is configured.
#[derive(Default)]
struct Root {
    kind: String,
    configuration: String,
    shared: shared::Root,
    waiting: waiting::Queue,
    released: u32,
    declared: Vec<String>,
}

fn text(bytes: Option<Vec<u8>>) -> String {
    bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

impl Context for Root {
    fn on_done(&mut self) -> bool {
        say(format!("root {} done", self.kind));
        true
    }
}

impl RootContext for Root {
    fn on_vm_start(&mut self, size: usize) -> bool {
        say(format!("vm start {size} {:?}", text(self.get_vm_configuration())));
        true
    }

    fn on_configure(&mut self, size: usize) -> bool {
        self.kind = text(self.get_property(vec!["plugin_root_id"]));
        self.configuration = text(self.get_plugin_configuration());
        say(format!("configure {} {size} {:?}", self.kind, self.configuration));
        if self.kind == "shared" {
            self.shared.configure();
        }
        if self.kind == "waiting" {
            self.set_tick_period(std::time::Duration::from_millis(50));
        }
        if self.kind == "foreign" {
            self.declared = foreign::declare();
        }
        self.configuration != "refuse"
    }

    fn on_tick(&mut self) {
        if self.kind == "waiting" {
            return waiting::tick(&self.waiting, &mut self.released);
        }
        self.shared.tick();
    }

    fn on_queue_ready(&mut self, queue: u32) {
        self.shared.queue_ready(queue);
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(if self.kind.starts_with("net") { ContextType::StreamContext } else { ContextType::HttpContext })
    }

    fn create_http_context(&self, id: u32) -> Option<Box<dyn HttpContext>> {
        let configuration = self.configuration.clone();
        Some(match self.kind.as_str() {
            "headers" => Box::new(headers::Headers { configuration }),
            "bodies" => Box::new(bodies::Bodies::default()),
            "order" => Box::new(order::Order::new(id, configuration)),
            "http-call" => Box::new(calls::HttpCall),
            "grpc-call" => Box::new(calls::GrpcCall),
            "grpc-stream" => Box::new(calls::GrpcStream::default()),
            "foreign" => Box::new(foreign::Foreign::new(&self.declared, &configuration)),
            "maps" => Box::new(maps::Maps { configuration }),
            "shared" => Box::new(shared::Http),
            "waiting" => Box::new(waiting::Waiting { id, queue: self.waiting.clone() }),
            "properties" => Box::new(properties::Properties::new(&configuration)),
            other => panic!("no filter {other:?}"),
        })
    }

    fn create_stream_context(&self, _: u32) -> Option<Box<dyn StreamContext>> {
        Some(Box::new(network::Network::new(&self.configuration)))
    }
}
