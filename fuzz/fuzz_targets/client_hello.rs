//! The first bytes of a connection. The module is taken as it is, which spares this build wasmtime.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../proxy-host/src/listener/sniff.rs"]
mod sniff;

use sniff::{Inspection, LIMIT, Sniffed, sniff};

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
