//! The first bytes of a connection. The modules are taken as they are, which spares this build wasmtime.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code, reason = "only the reading of bytes is wanted of it")]
#[path = "../../proxy-host/src/listener/plan.rs"]
mod plan;
#[path = "../../proxy-host/src/listener/sniff.rs"]
mod sniff;

/// Where `sniff` looks for the plan.
mod listener {
    pub(crate) use crate::plan;
}

use plan::Inspection;
use sniff::{LIMIT, Sniffed, sniff};

fuzz_target!(|data: &[u8]| {
    for (tls, http) in [(true, true), (true, false), (false, true), (false, false)] {
        let inspection = Inspection { tls, http };
        let whole = sniff(data, inspection);
        assert!(data.len() < LIMIT || whole != Sniffed::NeedMore, "asks for more than the limit");
        if data.len() > 2 * 1024 {
            continue;
        }
        // However the bytes are cut, the first answer stands.
        let first = (0..data.len()).map(|n| sniff(&data[..n], inspection)).find(|s| *s != Sniffed::NeedMore);
        if let Some(first) = first {
            assert_eq!(first, whole);
        }
    }
});
