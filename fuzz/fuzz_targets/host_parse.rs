//! Names as resources declare them and clients send them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portolan_registry::name::{Buffer, HostPattern, normalise};

fuzz_target!(|data: &[u8]| {
    let mut name = Buffer::default();
    let taken = normalise(data, &mut name);
    assert_eq!(taken.is_err(), name.as_str().is_empty());
    assert!(!name.as_str().bytes().any(|b| b.is_ascii_uppercase()));

    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(pattern) = text.parse::<HostPattern>() else { return };
    match &pattern {
        HostPattern::Exact(host) => assert!(pattern.matches(host.as_str())),
        HostPattern::Suffix(suffix) => {
            assert!(pattern.matches(&format!("x{suffix}")));
            assert!(!pattern.matches(suffix), "the star stands for one character or more");
        }
    }
});
