//! Requests that are malformed, or that two readers may read differently. Each file of `corpus/` begins with a line that
//! says what has to come of the raw bytes that follow it.

use crate::http_support;

use std::{fs, path::Path};

use http_support::{PATIENCE, Proxy, answering, statuses};

/// Follows each case: it is answered where the case leaves the connection usable, and no other request is.
const LAST: &[u8] = b"GET /last HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n";

struct Case {
    name: String,
    expected: Vec<u16>,
    details: Option<String>,
    bytes: Vec<u8>,
}

fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut cases = Vec::new();
    for file in fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()) {
        if file.extension().is_none_or(|e| e != "raw") {
            continue;
        }
        let whole = fs::read(&file).unwrap();
        let end = whole.iter().position(|b| *b == b'\n').unwrap();
        let said = std::str::from_utf8(&whole[..end]).unwrap();
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let words = said.strip_prefix("expect: ").unwrap_or_else(|| panic!("{name}: no expect line"));
        let words: Vec<_> = words.split(" (").next().unwrap().split(' ').collect();
        let expected: Vec<_> = words.iter().map_while(|word| word.parse().ok()).collect();
        let details = words.get(expected.len()).map(|details| (*details).to_owned());
        cases.push(Case { name, expected, details, bytes: whole[end + 1..].to_vec() });
    }
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    cases
}

#[test]
fn each_case_is_answered_as_it_says_and_nothing_else_reaches_the_origin() {
    let (origin, seen) = answering();
    let proxy = Proxy::start(origin, "HTTP");
    let mut wrong = Vec::new();
    for Case { name, mut expected, details, bytes } in cases() {
        if details.is_none() {
            expected.push(200);
        }
        let answer = proxy.send(&[&bytes, LAST].concat());
        let lines: Vec<_> = statuses(&answer).iter().map(|_| proxy.log.recv_timeout(PATIENCE / 10)).collect();
        let reached = seen.try_iter().count();
        let answered = statuses(&answer);
        let through = answered.iter().filter(|status| **status == 200).count();
        if answered != expected || reached != through {
            wrong.push(format!("{name}: {answered:?} instead of {expected:?}, {reached} requests reached the origin"));
        }
        if let Some(details) = details {
            match lines.last() {
                Some(Ok(line)) if line.contains(&details) => {}
                line => wrong.push(format!("{name}: the log does not say {details}: {line:?}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn heads_have_the_limits_of_envoys() {
    let (origin, _seen) = answering();
    let proxy = Proxy::start(origin, "HTTP");
    let many = |count: usize| (0..count).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
    let long = |count: usize| format!("x: {}\r\n", "a".repeat(count));
    for (headers, status) in [(many(90), 200), (many(101), 431), (long(50_000), 200), (long(61_500), 431)] {
        let answer =
            proxy.send(format!("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n{headers}\r\n").as_bytes());
        assert_eq!(statuses(&answer), [status], "{} bytes of headers", headers.len());
    }
    let answer = proxy.send(format!("GET /{} HTTP/1.1\r\nHost: a.test\r\n\r\n", "a".repeat(61_500)).as_bytes());
    assert_eq!(statuses(&answer), [431]);
}
