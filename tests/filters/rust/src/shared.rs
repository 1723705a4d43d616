//! Shared data with compare-and-swap, queues, timers and metrics.

use crate::{say, text};
use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::{Action, MetricType, Status};
use std::time::Duration;

#[derive(Default)]
pub struct Root {
    ticks: u32,
    queue: u32,
}

impl Root {
    pub fn configure(&mut self) {
        self.queue = hostcalls::register_shared_queue("work").unwrap_or_default();
        let _ = hostcalls::set_tick_period(Duration::from_millis(20));
    }

    pub fn tick(&mut self) {
        self.ticks += 1;
        if self.ticks == 3 {
            say("third tick");
            let _ = hostcalls::set_tick_period(Duration::ZERO);
        }
    }

    pub fn queue_ready(&mut self, queue: u32) {
        let message = hostcalls::dequeue_shared_queue(queue).ok().flatten();
        say(format!("queue {} {:?}", queue == self.queue, text(message)));
        say(format!("then {:?}", hostcalls::dequeue_shared_queue(queue)));
    }
}

pub struct Http;

/// CEL of every type, and what goes wrong.
const EXPRESSIONS: [&str; 14] = [
    "request.method + ' ' + request.path",
    "request.url_path.startsWith('/') && source.port > 0",
    "'x-none' in request.headers",
    "request.headers['x-none']",
    "request.time > timestamp('2020-01-01T00:00:00Z')",
    "request.size + 2",
    "connection.mtls",
    "duration('3s')",
    "2.5 * 2.0",
    "b'bytes'",
    "['a', 'b'].exists(x, x == 'b') ? 7u : 8u",
    "plugin_root_id",
    "nothing.of_it",
    "1 +",
];

impl Context for Http {}

impl HttpContext for Http {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        say(format!("unset {:?}", self.get_shared_data("none")));
        let (value, cas) = self.get_shared_data("count");
        let count = text(value).parse::<u32>().unwrap_or(0) + 1;
        let set = self.set_shared_data("count", Some(count.to_string().as_bytes()), cas);
        let stale = self.set_shared_data("count", Some(b"stale"), Some(cas.unwrap_or(0).wrapping_add(1_000_000)));
        say(format!("count {count} {set:?} {}", matches!(stale, Err(Status::CasMismatch))));
        // VMs of one id share queues; this one's id is empty.
        let queue = self.resolve_shared_queue("", "work");
        say(format!("queues {} {:?}", queue.is_some(), self.resolve_shared_queue("", "none")));
        if let Some(queue) = queue {
            let _ = self.enqueue_shared_queue(queue, Some(format!("message {count}").as_bytes()));
        }
        let counter = hostcalls::define_metric(MetricType::Counter, "filter_requests").unwrap_or(0);
        let gauge = hostcalls::define_metric(MetricType::Gauge, "filter_level").unwrap_or(0);
        let histogram = hostcalls::define_metric(MetricType::Histogram, "filter_sizes").unwrap_or(0);
        let _ = hostcalls::increment_metric(counter, 2);
        let _ = hostcalls::record_metric(gauge, 7);
        let _ = hostcalls::increment_metric(gauge, -3);
        let recorded = hostcalls::record_metric(histogram, 100);
        say(format!(
            "metrics {:?} {:?} {recorded:?}",
            hostcalls::get_metric(counter).map(|value| value % 2),
            hostcalls::get_metric(gauge)
        ));
        let compressed =
            self.call_foreign_function("compress", Some(b"hello world!")).ok().flatten().unwrap_or_default();
        let back = self.call_foreign_function("uncompress", Some(&compressed)).ok().flatten();
        say(format!("compressed {compressed:02x?} {:?}", text(back)));
        for expression in EXPRESSIONS {
            let made = self.call_foreign_function("expr_create", Some(expression.as_bytes()));
            let token = match made {
                Ok(token) => token.unwrap_or_default(),
                Err(error) => {
                    say(format!("expression {expression}: {error:?}"));
                    continue;
                }
            };
            let value = self.call_foreign_function("expr_evaluate", Some(&token));
            let _ = self.call_foreign_function("expr_delete", Some(&token));
            let again = self.call_foreign_function("expr_evaluate", Some(&token)).err();
            say(format!("expression {expression}: {value:?}, then {again:?}"));
        }
        say(format!("no function {:?}", self.call_foreign_function("none", None)));
        self.send_http_response(200, vec![("x-count", &count.to_string())], None);
        Action::Pause
    }
}
