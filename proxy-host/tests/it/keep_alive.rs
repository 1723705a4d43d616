//! Clients' connections that wait between two requests: their memory is given back, and nobody can tell.

use crate::http_support;

use std::{
    io::{Read as _, Write as _},
    thread,
    time::Duration,
};

use http_support::{Proxy, origin, statuses};

/// Longer than a connection is left alone before it gives its buffers back, which nobody can see from outside.
const PAUSE: Duration = Duration::from_millis(400);

#[test]
fn a_client_that_has_waited_is_served_as_before() {
    let (address, _seen) = http_support::answering();
    let proxy = Proxy::start(address, "HTTP");
    let mut client = proxy.connect();
    let request = "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n";
    let mut heard = [0; 2];
    for _ in 0..3 {
        client.write_all(request.as_bytes()).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        client.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"ok");
        thread::park_timeout(PAUSE);
    }
    // Half a request is kept, and refused as ever where it goes wrong.
    client.write_all(b"GET / HTTP/1.1\r\nHo").unwrap();
    thread::park_timeout(PAUSE);
    client.write_all(b"st: a.test\r\n obs: fold\r\n\r\n").unwrap();
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert_eq!(statuses(&rest), [400]);
}

#[test]
fn an_answer_that_takes_long_is_waited_for() {
    let address = origin(|mut peer, _| {
        peer.request()?;
        thread::park_timeout(PAUSE);
        peer.say("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nla")?;
        thread::park_timeout(PAUSE);
        peer.say("te")
    });
    let proxy = Proxy::start(address, "HTTP");
    assert!(proxy.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n").ends_with("\r\n\r\nlate"));
}

#[test]
fn a_client_that_waits_is_hung_up_on_when_the_process_ends() {
    let (address, _seen) = http_support::answering();
    let proxy = Proxy::start(address, "HTTP");
    let mut client = proxy.connect();
    client.write_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n").unwrap();
    thread::park_timeout(PAUSE);
    proxy.app.drain();
    let mut all = String::new();
    client.read_to_string(&mut all).unwrap();
    assert_eq!(statuses(&all), [200]);
}
