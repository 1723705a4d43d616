//! Requests wait in a queue of the filter's own, and the timer lets them go on: the odd ones pass, the even ones are
//! answered.

use crate::say;
use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;
use std::cell::RefCell;
use std::rc::Rc;

pub type Queue = Rc<RefCell<Vec<u32>>>;

pub struct Waiting {
    pub id: u32,
    pub queue: Queue,
}

impl Context for Waiting {}

impl HttpContext for Waiting {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        self.queue.borrow_mut().push(self.id);
        Action::Pause
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        say("delete");
    }
}

/// Lets every request go on that waits.
pub fn tick(queue: &Queue, count: &mut u32) {
    for id in queue.take() {
        *count += 1;
        let _ = hostcalls::set_effective_context(id);
        say(format!("released {count}"));
        if *count % 2 == 1 {
            let _ = hostcalls::set_map_value(proxy_wasm::types::MapType::HttpRequestHeaders, "x-waited", Some("yes"));
            let _ = hostcalls::resume_http_request();
        } else {
            let _ = hostcalls::send_http_response(429, vec![], Some(b"too many\n"));
        }
    }
}
