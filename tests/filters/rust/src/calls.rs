//! Calls: by HTTP, by gRPC, and a gRPC stream. The request waits for the answer.

use crate::{say, text};
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;
use std::time::Duration;

pub struct HttpCall;

impl HttpContext for HttpCall {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let cluster = self.get_http_request_header("x-cluster").unwrap_or_else(|| "calls".into());
        let path = self.get_http_request_header(":path").unwrap_or_default();
        let headers = vec![(":method", "POST"), (":path", &path), (":authority", "auth.example"), ("x-ask", "1")];
        match self.dispatch_http_call(&cluster, headers, Some(b"who is it?"), vec![], Duration::from_millis(500)) {
            Ok(_) => Action::Pause,
            Err(status) => {
                say(format!("no call: {status:?}"));
                self.send_http_response(500, vec![], None);
                Action::Pause
            }
        }
    }
}

impl Context for HttpCall {
    fn on_http_call_response(&mut self, _: u32, headers: usize, size: usize, trailers: usize) {
        let status = self.get_http_call_response_header(":status");
        let body = text(self.get_http_call_response_body(0, size));
        say(format!("call response {} {status:?} {body:?} {trailers}", headers > 0));
        if status.as_deref() == Some("200") {
            self.set_http_request_header("x-allowed", Some(&body));
            self.resume_http_request();
        } else {
            self.send_http_response(403, vec![("x-denied", "1")], Some(b"denied\n"));
        }
    }
}

pub struct GrpcCall;

impl HttpContext for GrpcCall {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let method = self.get_http_request_header("x-method").unwrap_or_default();
        let metadata = vec![("x-meta", &b"data"[..])];
        let called = self.dispatch_grpc_call(
            "grpc",
            "test.Service",
            &method,
            metadata,
            Some(b"ask"),
            Duration::from_millis(500),
        );
        if let Err(status) = called {
            say(format!("no call: {status:?}"));
            return Action::Continue;
        }
        Action::Pause
    }
}

impl Context for GrpcCall {
    fn on_grpc_call_response(&mut self, _: u32, code: u32, size: usize) {
        let message = text(self.get_grpc_call_response_body(0, size));
        say(format!("grpc response {code} {message:?}"));
        if code == 0 {
            self.set_http_request_header("x-grpc", Some(&message));
            self.resume_http_request();
        } else {
            say(format!("grpc status {:?}", self.get_grpc_status().0));
            self.send_http_response(403, vec![], Some(format!("grpc {code}\n").as_bytes()));
        }
    }
}

#[derive(Default)]
pub struct GrpcStream {
    token: u32,
    seen: Vec<String>,
}

impl HttpContext for GrpcStream {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        match self.open_grpc_stream("grpc", "test.Service", "Echo", vec![("x-meta", &b"data"[..])]) {
            Ok(token) => {
                self.token = token;
                self.send_grpc_stream_message(token, Some(b"one"), false);
                self.send_grpc_stream_message(token, Some(b"two"), false);
                Action::Pause
            }
            Err(status) => {
                say(format!("no stream: {status:?}"));
                Action::Continue
            }
        }
    }
}

impl Context for GrpcStream {
    fn on_grpc_stream_initial_metadata(&mut self, _: u32, _: u32) {
        say(format!("initial {:?}", text(self.get_grpc_stream_initial_metadata_value("x-initial"))));
    }

    fn on_grpc_stream_message(&mut self, token: u32, size: usize) {
        let message = text(self.get_grpc_stream_message(0, size));
        say(format!("message {} {message:?}", token == self.token));
        self.seen.push(message);
        if self.seen.len() == 2 {
            self.close_grpc_stream(token);
        }
    }

    fn on_grpc_stream_trailing_metadata(&mut self, _: u32, _: u32) {
        say(format!("trailing {:?}", text(self.get_grpc_stream_trailing_metadata_value("x-trailing"))));
    }

    fn on_grpc_stream_close(&mut self, _: u32, code: u32) {
        say(format!("close {code}"));
        self.set_http_request_header("x-grpc", Some(&self.seen.join("+")));
        self.resume_http_request();
    }
}
