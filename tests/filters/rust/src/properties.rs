//! Reads the properties that the configuration lists, one path a line with dots between its parts, in every phase.

use crate::say;
use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

pub struct Properties {
    paths: Vec<String>,
}

impl Properties {
    pub fn new(configuration: &str) -> Self {
        Self { paths: configuration.lines().map(str::to_owned).collect() }
    }

    fn show(&self, phase: &str) {
        for path in &self.paths {
            let value = hostcalls::get_property(path.split('.').collect());
            let shown = match value {
                Ok(Some(bytes)) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
                Ok(None) => "-".to_owned(),
                Err(status) => format!("{status:?}"),
            };
            say(format!("{phase} {path} {shown}"));
        }
    }
}

impl Context for Properties {}

impl HttpContext for Properties {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        self.set_property(vec!["own"], Some(b"mine"));
        self.show("request");
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        self.show("response");
        Action::Continue
    }

    fn on_log(&mut self) {
        self.show("log");
    }
}
