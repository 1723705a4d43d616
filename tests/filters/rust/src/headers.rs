//! Headers: read, set, added, removed, replaced as a whole; a redirect.

use crate::say;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

pub struct Headers {
    pub configuration: String,
}

impl Context for Headers {}

impl HttpContext for Headers {
    fn on_http_request_headers(&mut self, count: usize, end: bool) -> Action {
        say(format!("request headers {} end {end}", count == self.get_http_request_headers().len()));
        for name in [":method", ":path", ":authority", ":scheme", "x-two", "x-forwarded-for", "x-none"] {
            say(format!("{name} = {:?}", self.get_http_request_header(name)));
        }
        if self.get_http_request_header(":path").as_deref() == Some("/redirect") {
            self.send_http_response(302, vec![("location", "/elsewhere")], None);
            return Action::Pause;
        }
        self.set_http_request_header("x-set", Some("set"));
        self.add_http_request_header("x-two", "third");
        self.remove_http_request_header("x-gone");
        self.set_http_request_header(":path", Some("/changed?by=filter"));
        Action::Continue
    }

    fn on_http_response_headers(&mut self, count: usize, end: bool) -> Action {
        say(format!("response headers {} end {end}", count == self.get_http_response_headers().len()));
        say(format!(":status = {:?}", self.get_http_response_header(":status")));
        self.add_http_response_header("x-configuration", &self.configuration);
        self.set_http_response_header("x-origin", None);
        if self.get_http_response_header(":status").as_deref() == Some("404") {
            self.set_http_response_headers(vec![(":status", "410"), ("x-all", "new"), ("content-length", "0")]);
        }
        Action::Continue
    }
}
