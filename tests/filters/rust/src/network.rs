//! Connections: what the configuration says happens to their bytes.

use crate::{say, text};
use proxy_wasm::traits::{Context, StreamContext};
use proxy_wasm::types::{Action, PeerType};
use std::time::Duration;

pub struct Network {
    what: String,
}

impl Network {
    pub fn new(what: &str) -> Self {
        Self { what: what.to_owned() }
    }
}

/// Attributes of connections that are the same in every host and at every time.
const ATTRIBUTES: [&str; 12] = [
    "connection.mtls",
    "connection.requested_server_name",
    "connection.termination_details",
    "destination.port",
    "request.path",
    "request.protocol",
    "upstream.address",
    "upstream.port",
    "upstream.transport_failure_reason",
    "xds.cluster_name",
    "xds.listener_direction",
    "plugin_root_id",
];

impl Network {
    fn show(&self, phase: &str) {
        for path in ATTRIBUTES.iter().filter(|_| self.what == "attributes") {
            let value = proxy_wasm::hostcalls::get_property(path.split('.').collect());
            // The listener's port differs between hosts: only that there is one is told.
            let value = value.map(|value| value.map(|bytes| if *path == "destination.port" { vec![1] } else { bytes }));
            say(format!("{phase} {path} {value:?}"));
        }
    }
}

fn peer(peer: PeerType) -> &'static str {
    match peer {
        PeerType::Local => "local",
        PeerType::Remote => "remote",
        _ => "unknown",
    }
}

impl Context for Network {
    fn on_http_call_response(&mut self, _: u32, headers: usize, _: usize, _: usize) {
        say(format!("call response {}", headers > 0));
        self.resume_downstream();
    }

    fn on_done(&mut self) -> bool {
        say("done");
        true
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        say("delete");
    }
}

impl StreamContext for Network {
    fn on_new_connection(&mut self) -> Action {
        say("new");
        self.show("new");
        match self.what.as_str() {
            "ask" => {
                let headers = vec![(":method", "GET"), (":path", "/"), (":authority", "a")];
                let called = self.dispatch_http_call("calls", headers, None, vec![], Duration::from_secs(5));
                say(format!("asked {}", called.is_ok()));
                Action::Pause
            }
            "shut" => {
                self.close_downstream();
                Action::Pause
            }
            "route" => {
                // envoy.source.extensions.common.wasm.SetEnvoyFilterStateArguments: path and value.
                let mut arguments = vec![0x0a, 23];
                arguments.extend_from_slice(b"envoy.tcp_proxy.cluster");
                arguments.extend_from_slice(&[0x12, 5]);
                arguments.extend_from_slice(b"calls");
                let set = self.call_foreign_function("set_envoy_filter_state", Some(&arguments));
                say(format!("routed {}", set.is_ok()));
                Action::Continue
            }
            _ => Action::Continue,
        }
    }

    fn on_downstream_data(&mut self, size: usize, end: bool) -> Action {
        let data = text(self.get_downstream_data(0, size));
        say(format!("downstream {data:?} {end}"));
        match self.what.as_str() {
            // Lines go on when they are whole.
            "lines" if !data.ends_with('\n') && !end => return Action::Pause,
            "lines" => self.set_downstream_data(0, size, data.to_uppercase().as_bytes()),
            "quit" if data.contains("quit") => {
                self.close_downstream();
                return Action::Pause;
            }
            _ => {}
        }
        Action::Continue
    }

    fn on_upstream_data(&mut self, size: usize, end: bool) -> Action {
        let data = text(self.get_upstream_data(0, size));
        say(format!("upstream {data:?} {end}"));
        self.show("upstream");
        if self.what == "lines" && size > 0 {
            self.set_upstream_data(size, 0, b"<");
            self.set_upstream_data(0, 0, b">");
        }
        Action::Continue
    }

    fn on_downstream_close(&mut self, by: PeerType) {
        say(format!("downstream close {}", peer(by)));
    }

    fn on_upstream_close(&mut self, by: PeerType) {
        say(format!("upstream close {}", peer(by)));
    }

    fn on_log(&mut self) {
        say("log");
    }
}
