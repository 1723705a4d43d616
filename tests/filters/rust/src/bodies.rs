//! Bodies and trailers. The request header `x-do` says what happens: to which body, and how.

use crate::{say, text};
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

#[derive(Default)]
pub struct Bodies {
    what: String,
}

impl Context for Bodies {}

impl Bodies {
    fn is(&self, what: &str) -> bool {
        self.what.split(',').any(|have| have == what)
    }
}

impl HttpContext for Bodies {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        self.what = self.get_http_request_header("x-do").unwrap_or_default();
        self.set_http_request_header("content-length", None);
        Action::Continue
    }

    fn on_http_request_body(&mut self, size: usize, end: bool) -> Action {
        if self.is("request-stream") {
            return Action::Continue;
        }
        if !end {
            return Action::Pause;
        }
        let body = text(self.get_http_request_body(0, size));
        say(format!("request body {size} {}", body.len() == size));
        if self.is("request-append") {
            self.set_http_request_body(size, 0, b"[appended]");
        }
        if self.is("request-prepend") {
            self.set_http_request_body(0, 0, b"[prepended]");
        }
        if self.is("request-replace") {
            self.set_http_request_body(0, size, b"[replaced]");
        }
        if self.is("request-part") {
            say(format!("part {:?}", text(self.get_http_request_body(2, 3))));
            say(format!("past {:?}", self.get_http_request_body(size + 1, 3)));
        }
        if self.is("request-trailer") {
            self.add_http_request_trailer("x-added", "by filter");
        }
        Action::Continue
    }

    fn on_http_request_trailers(&mut self, count: usize) -> Action {
        say(format!("request trailers {count} {:?}", self.get_http_request_trailer("x-client")));
        self.set_http_request_trailer("x-filter", Some("seen"));
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        self.set_http_response_header("content-length", None);
        Action::Continue
    }

    fn on_http_response_body(&mut self, size: usize, end: bool) -> Action {
        if self.is("response-stream") {
            return Action::Continue;
        }
        if !end {
            return Action::Pause;
        }
        say(format!("response body {size}"));
        if self.is("response-redact") && text(self.get_http_response_body(0, size)).contains("secret") {
            self.set_http_response_body(0, size, b"(redacted)");
        }
        if self.is("response-append") {
            self.set_http_response_body(size, 0, b"[appended]");
        }
        if self.is("response-empty") {
            self.set_http_response_body(0, size, b"");
        }
        Action::Continue
    }

    fn on_http_response_trailers(&mut self, count: usize) -> Action {
        say(format!("response trailers {count} {:?}", self.get_http_response_trailer("x-origin")));
        self.add_http_response_trailer("x-filter", "seen too");
        Action::Continue
    }
}
