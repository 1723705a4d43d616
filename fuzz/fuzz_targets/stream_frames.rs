//! Messages of the registry stream as the subscription meets them.
//! Input: for each message its length (two bytes, little endian) and its bytes; length 65535 is the end of the stream.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portolan_filter::subscription::Subscription;
use portolan_proto::v1::Scope;

fuzz_target!(|data: &[u8]| {
    let mut subscription = Subscription::new(Scope::default(), "fuzz".into(), 1);
    subscription.start();
    subscription.on_open();
    let mut data = data;
    while let [low, high, rest @ ..] = data {
        let length = u16::from_le_bytes([*low, *high]);
        let (message, tail) = rest.split_at(usize::from(length).min(rest.len()));
        if length == u16::MAX {
            subscription.on_close("fuzz");
            subscription.on_tick();
            subscription.on_open();
        } else {
            subscription.on_message(message);
        }
        subscription.on_tick();
        data = tail;
    }
});
