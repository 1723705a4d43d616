//! Header maps by the calls of the ABI as they are: the SDK panics at some of their answers. The configuration has a
//! line for each call: `request` or `response`, the call, a name, a value.

use crate::say;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_get_header_map_value(map: u32, key: *const u8, key_size: usize, at: *mut usize, size: *mut usize) -> u32;
    fn proxy_add_header_map_value(map: u32, key: *const u8, key_size: usize, value: *const u8, size: usize) -> u32;
    fn proxy_replace_header_map_value(map: u32, key: *const u8, key_size: usize, value: *const u8, size: usize) -> u32;
    fn proxy_remove_header_map_value(map: u32, key: *const u8, key_size: usize) -> u32;
    fn proxy_get_header_map_pairs(map: u32, at: *mut usize, size: *mut usize) -> u32;
    fn proxy_set_header_map_pairs(map: u32, at: *const u8, size: usize) -> u32;
    fn proxy_get_header_map_size(map: u32, size: *mut usize) -> u32;
}

pub struct Maps {
    pub configuration: String,
}

fn shown(status: u32, at: usize, size: usize) -> String {
    match (status, at) {
        (0, 0) => format!("none of {size}"),
        // SAFETY: the host had the allocator of this module make it.
        (0, _) => unsafe { std::slice::from_raw_parts(at as *const u8, size) }.escape_ascii().to_string(),
        _ => format!("status {status}"),
    }
}

fn run(map: u32, line: &str) -> String {
    let mut words = line.splitn(3, ' ');
    let (call, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let value = words.next().unwrap_or_default();
    let (map, name) = match name.strip_prefix('#').and_then(|rest| rest.split_once('/')) {
        Some((number, name)) => (number.parse().unwrap_or(map), name),
        None => (map, name),
    };
    let (key, size) = (name.as_ptr(), name.len());
    let (mut at, mut len) = (1, 77);
    // SAFETY: all pointers are of this frame.
    unsafe {
        match call {
            "get" => shown(proxy_get_header_map_value(map, key, size, &mut at, &mut len), at, len),
            "add" => proxy_add_header_map_value(map, key, size, value.as_ptr(), value.len()).to_string(),
            "set" => proxy_replace_header_map_value(map, key, size, value.as_ptr(), value.len()).to_string(),
            "remove" => proxy_remove_header_map_value(map, key, size).to_string(),
            "pairs" => shown(proxy_get_header_map_pairs(map, &mut at, &mut len), at, len),
            "size" => format!("{} {len}", proxy_get_header_map_size(map, &mut len)),
            "replace-all" => {
                let pairs: Vec<_> = value.split('|').filter_map(|pair| pair.split_once('=')).collect();
                let mut out = (pairs.len() as u32).to_le_bytes().to_vec();
                for (name, value) in &pairs {
                    out.extend((name.len() as u32).to_le_bytes());
                    out.extend((value.len() as u32).to_le_bytes());
                }
                for (name, value) in &pairs {
                    out.extend([name.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat());
                }
                proxy_set_header_map_pairs(map, out.as_ptr(), out.len()).to_string()
            }
            _ => "what?".to_owned(),
        }
    }
}

impl Maps {
    fn all(&self, phase: &str, map: u32) {
        let lines = self.configuration.lines().filter_map(|line| line.strip_prefix(phase)?.strip_prefix(' '));
        for line in lines {
            say(format!("{phase} {line}: {}", run(map, line)));
        }
    }
}

impl Context for Maps {}

impl HttpContext for Maps {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        self.all("request", 0);
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        self.all("response", 2);
        Action::Continue
    }

    fn on_log(&mut self) {
        self.all("log", 0);
        say("logged");
    }
}
