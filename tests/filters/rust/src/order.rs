//! Tells each callback as it comes, and does in one of them what the request header `x-at` says: `CALLBACK=ACTION`.

use crate::say;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;
use std::time::Duration;

pub struct Order {
    at: String,
    what: String,
    configuration: String,
}

impl Order {
    pub fn new(_: u32, configuration: String) -> Self {
        say("create");
        Self { at: String::new(), what: String::new(), configuration }
    }

    fn act(&self, callback: &str) -> Action {
        if self.at != callback {
            return Action::Continue;
        }
        match self.what.as_str() {
            "respond" => {
                self.send_http_response(
                    418,
                    vec![("x-local", callback), ("content-type", "text/x-tea")],
                    Some(b"tea\n"),
                );
                Action::Pause
            }
            "empty" => {
                self.send_http_response(204, vec![], None);
                Action::Pause
            }
            "reset-request" => {
                self.reset_http_request();
                Action::Pause
            }
            "reset-response" => {
                self.reset_http_response();
                Action::Pause
            }
            "pause" => {
                let headers = vec![(":method", "GET"), (":path", "/wait"), (":authority", "wait")];
                if let Err(status) = self.dispatch_http_call("calls", headers, None, vec![], Duration::from_secs(5)) {
                    say(format!("no call: {status:?}"));
                }
                Action::Pause
            }
            "panic" => panic!("as asked"),
            _ => Action::Continue,
        }
    }
}

impl Context for Order {
    fn on_http_call_response(&mut self, _: u32, headers: usize, body: usize, trailers: usize) {
        say(format!("call response {} {body} {trailers}", headers > 0));
        if self.at.starts_with("request") { self.resume_http_request() } else { self.resume_http_response() }
    }

    fn on_done(&mut self) -> bool {
        say("done");
        true
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        say("delete");
    }
}

impl HttpContext for Order {
    fn on_http_request_headers(&mut self, _: usize, end: bool) -> Action {
        let header = self.get_http_request_header("x-at").unwrap_or_else(|| self.configuration.clone());
        let (at, what) = header.split_once('=').unwrap_or_default();
        (self.at, self.what) = (at.to_owned(), what.to_owned());
        say(format!("request-headers {end}"));
        self.act("request-headers")
    }

    fn on_http_request_body(&mut self, size: usize, end: bool) -> Action {
        // Where a body is cut is up to the network: only its end is told.
        if end {
            say(format!("request-body {size}"));
            return self.act("request-body");
        }
        if self.at == "request-body" { Action::Pause } else { Action::Continue }
    }

    fn on_http_request_trailers(&mut self, _: usize) -> Action {
        say("request-trailers");
        self.act("request-trailers")
    }

    fn on_http_response_headers(&mut self, _: usize, end: bool) -> Action {
        let status = self.get_http_response_header(":status").unwrap_or_default();
        say(format!("response-headers {status} {end}"));
        self.act("response-headers")
    }

    fn on_http_response_body(&mut self, size: usize, end: bool) -> Action {
        if end {
            say(format!("response-body {size}"));
            return self.act("response-body");
        }
        if self.at == "response-body" { Action::Pause } else { Action::Continue }
    }

    fn on_http_response_trailers(&mut self, _: usize) -> Action {
        say("response-trailers");
        self.act("response-trailers")
    }

    fn on_log(&mut self) {
        let path = self.get_http_request_header(":path");
        let status = self.get_http_response_header(":status");
        say(format!("log {path:?} {status:?} {:?}", self.get_http_request_header("x-none")));
    }
}
