//! One change costs the same whatever the number of entries.

#[path = "it/objects.rs"]
mod objects;

use std::time::{Duration, Instant};

use objects::*;
use portolan_controller::compile::compile;
use portolan_controller::model::Object;
use portolan_controller::model::Protocol::*;

fn nth(i: usize) -> Object {
    let host = format!("host-{i}.example.com");
    entry(se(&format!("e{i}@{}", i % 7), &[&host], &[(80, Http), (443, Tls)]))
}

fn megabytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    status.split(' ').nth(1).and_then(|p| p.parse::<usize>().ok()).unwrap_or_default() * 4096 / 1_000_000
}

#[test]
fn change_among_100_000_entries() {
    let objects: Vec<Object> = (0..100_000).map(nth).collect();
    let before = megabytes();
    let start = Instant::now();
    let (mut compiler, _) = compile(objects, scope(), blocking());
    let bytes: usize = compiler.pages().map(|(_, p)| p.len()).sum();
    println!(
        "compiled in {:?}: {bytes} bytes of pages, {before} MB of objects, then {} MB",
        start.elapsed(),
        megabytes()
    );
    let mut times: Vec<Duration> = (0..200)
        .map(|i| {
            let host = format!("other-{i}.example.com");
            let changes = apply([entry(se(&format!("e{}", i * 31), &[&host], &[(80, Http), (443, Tls)]))]);
            let start = Instant::now();
            compiler.apply(&changes);
            let update = compiler.commit();
            let elapsed = start.elapsed();
            let sent: usize = update.pages.changed.iter().filter_map(|id| compiler.page(*id)).map(|p| p.len()).sum();
            assert!(sent <= 4096, "{sent} bytes changed");
            elapsed
        })
        .collect();
    times.sort();
    println!("a change: median {:?}, longest {:?}", times[100], times[199]);
    assert!(times[100] < Duration::from_millis(5), "median {:?}", times[100]);
}
