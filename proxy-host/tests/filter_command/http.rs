//! Headers, bodies, trailers, and the order of callbacks.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
};

use crate::support::{Got, Host, Kind, Setup, exchange, get, hosts, http2, origin, post};

/// Runs the same in every host; all must come to the same, which is given back.
pub fn same<T: PartialEq + std::fmt::Debug>(setup: &Setup, what: &str, run: impl Fn(&Host) -> T) -> T {
    let mut results: Vec<(Kind, T)> = Vec::new();
    for kind in hosts() {
        let host = Host::start(kind, setup);
        results.push((kind, run(&host)));
    }
    if let [(_, ours), (_, envoys)] = &results[..] {
        assert_eq!(ours, envoys, "{what}: ours on the left, Envoy's on the right");
    }
    results.remove(0).1
}

#[test]
fn headers_are_read_and_changed() {
    let setup = Setup { configuration: "from the outside", ..Setup::new("headers", origin(false)) };
    let headers =
        "x-two: first\r\nx-two: second\r\nx-forwarded-for: 1.1.1.1\r\nx-forwarded-for: 2.2.2.2\r\nx-gone: 1\r\n";
    let (said, got) = same(&setup, "headers", |host| {
        let got = get(host.address, "/path?query", headers).compared();
        (host.wait(":status"), got)
    });
    for line in [
        "request headers true end true",
        ":path = Some(\"/path?query\")",
        ":authority = Some(\"a.example\")",
        ":scheme = Some(\"http\")",
        // Of several values a filter sees the first, as in Envoy, but for those that Envoy joins.
        "x-two = Some(\"first\")",
        "x-forwarded-for = Some(\"1.1.1.1,2.2.2.2\")",
        "x-none = None",
    ] {
        assert!(said.iter().any(|said| said == line), "{line} in {said:#?}");
    }
    assert_eq!(got.status, 200);
    assert!(got.has("x-configuration: from the outside") && !got.has("x-origin: yes"), "{got:?}");
    for line in ["GET /changed?by=filter\n", "x-set: set\n", "x-two: third\n"] {
        assert!(got.body.contains(line), "{line} in {}", got.body);
    }
    assert!(!got.body.contains("x-gone"));
}

#[test]
fn a_filter_redirects_and_replaces_all_headers() {
    let setup = Setup::new("headers", origin(false));
    let (redirect, replaced) = same(&setup, "redirect", |host| {
        (get(host.address, "/redirect", "").compared(), get(host.address, "/missing", "").compared())
    });
    assert_eq!(redirect.status, 302);
    assert!(redirect.has("location: /elsewhere"));
    // The filter changes every path, so that nothing is missing.
    assert_eq!(replaced.status, 200);
}

#[test]
fn request_bodies_are_appended_prepended_and_replaced() {
    let setup = Setup::new("bodies", origin(false));
    let bodies = same(&setup, "request bodies", |host| {
        let mut bodies = Vec::new();
        for what in ["", "request-append", "request-prepend", "request-replace", "request-append,request-prepend"] {
            let got = post(host.address, "/", &format!("x-do: {what}\r\n"), "0123456789");
            assert_eq!(got.status, 200, "{what}");
            bodies.push(got.body.lines().last().unwrap_or_default().to_owned());
        }
        bodies
    });
    assert_eq!(
        bodies,
        [
            "0123456789",
            "0123456789[appended]",
            "[prepended]0123456789",
            "[replaced]",
            "[prepended]0123456789[appended]"
        ]
    );
}

#[test]
fn a_part_of_a_body_is_read_and_a_chunked_body_is_collected() {
    let setup = Setup::new("bodies", origin(false));
    let (said, got) = same(&setup, "a part", |host| {
        let request = "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\
             x-do: request-part\r\n\r\n3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n";
        let got = exchange(host.address, request).compared();
        (host.wait("response body"), got)
    });
    assert_eq!(said[..3], ["request body 6 true", "part \"cde\"", "past None"]);
    assert!(got.body.ends_with("abcdef\n"), "{got:?}");
}

#[test]
fn response_bodies_are_changed() {
    let setup = Setup::new("bodies", origin(false));
    let bodies = same(&setup, "response bodies", |host| {
        let answer = |path: &str, what: &str| get(host.address, path, &format!("x-do: {what}\r\n")).compared();
        [
            answer("/secret", "response-redact"),
            answer("/secret", "response-append"),
            answer("/secret", "response-empty"),
            answer("/large", "response-stream"),
        ]
    });
    assert_eq!(bodies[0].body, "(redacted)");
    assert_eq!(bodies[1].body, "a secret thing[appended]");
    assert_eq!(bodies[2].body, "");
    assert_eq!(bodies[3].body.len(), 3 << 20);
    assert!(bodies.iter().all(|got| !got.broken && got.has("x-origin: yes")), "{bodies:?}");
}

#[test]
fn a_body_that_is_too_large_to_be_held_is_413_and_a_response_is_cut_off() {
    let setup = Setup::new("bodies", origin(false));
    let large = "y".repeat(3 << 20);
    let (request, response) = same(&setup, "too large", |host| {
        let request = post(host.address, "/", "", &large);
        let response = get(host.address, "/large", "");
        ((request.status, request.body), (response.status, response.broken))
    });
    assert_eq!(request, (413, "Payload Too Large".to_owned()));
    assert_eq!(response, (200, true));
    // What only passes may be of any size.
    let host = Host::start(Kind::Portolan, &setup);
    let got = post(host.address, "/", "x-do: request-stream\r\n", &large);
    assert!(got.body.ends_with(&format!("{} bytes\n", large.len())), "{got:?}");
}

#[test]
fn trailers_are_seen_changed_and_added() {
    let setup = Setup { http2: true, ..Setup::new("bodies", origin(true)) };
    let (seen, added) = same(&setup, "trailers", |host| {
        let seen = http2(host.address, "/trailers", &[], "body", &[("x-client", "trailer")]).compared();
        let said = host.wait("response trailers");
        let added = http2(host.address, "/", &[("x-do", "request-trailer")], "body", &[]).compared();
        ((said, seen), added)
    });
    let (said, seen) = seen;
    assert_eq!(said, ["request trailers 1 Some(\"trailer\")", "response trailers 1 Some(\"trailer\")"]);
    assert!(
        seen.body.contains("trailer x-client: trailer\n") && seen.body.contains("trailer x-filter: seen\n"),
        "{seen:?}"
    );
    assert!(seen.has("trailer x-origin: trailer") && seen.has("trailer x-filter: seen too"), "{seen:?}");
    assert!(added.body.contains("trailer x-added: by filter\n"), "{added:?}");
}

/// Runs one request through the filter that tells its callbacks.
fn ordered(host: &Host, at: &str, with_body: bool) -> (Vec<String>, Got) {
    let headers = format!("x-at: {at}\r\n");
    let got = if with_body { post(host.address, "/p", &headers, "body") } else { get(host.address, "/p", &headers) };
    (host.wait("delete"), got.compared())
}

#[test]
fn callbacks_come_in_envoys_order() {
    let setup = Setup::new("order", origin(false));
    let (said, _) = same(&setup, "order", |host| ordered(host, "", true));
    assert_eq!(said[0], "create");
    let expected = [
        "request-headers false",
        // The bytes came before, and only the end is told.
        "request-body 0",
        "response-headers 200 false",
        "response-body 0",
        "log Some(\"/p\") Some(\"200\") None",
        "done",
        "delete",
    ];
    assert_eq!(said[1..], expected);
    let (said, _) = same(&setup, "order without a body", |host| ordered(host, "", false));
    assert_eq!(said[1], "request-headers true");
}

/// An origin that says this to each client, and nothing more.
fn mute(says: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut open = Vec::new();
        for mut stream in listener.incoming().flatten() {
            // Not before it is asked.
            let _ = stream.read(&mut [0; 1024]);
            stream.write_all(says.as_bytes()).unwrap();
            open.push(stream);
        }
    });
    address
}

#[test]
fn a_stream_on_which_nothing_moves_ends() {
    let (silent, half) = (mute(""), mute("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"));
    for (upstream, request, status, broken) in [
        (silent, "GET /p HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\n\r\n", 504, false),
        (silent, "POST /p HTTP/1.1\r\nhost: a.example\r\ncontent-length: 4\r\n\r\nbo", 408, false),
        (half, "GET /p HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\n\r\n", 200, true),
    ] {
        let setup = Setup { stream_idle: Some(400), ..Setup::new("order", upstream) };
        let got = same(&setup, "a silent stream", |host| {
            let got = exchange(host.address, request);
            host.wait("delete");
            (got.status, got.broken, got.body)
        });
        let text = if broken { "half" } else { "stream timeout" };
        assert_eq!(got, (status, broken, text.to_owned()));
    }
}

/// An upstream whose answer fills every buffer on its way.
fn endless() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let part = [b'x'; 1 << 16];
                // Until the host has read the request and leaves.
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n");
                while stream.write_all(&part).is_ok() {}
            });
        }
    });
    address
}

#[test]
fn an_answer_that_nobody_reads_ends() {
    let setup = Setup { stream_idle: Some(400), ..Setup::new("order", endless()) };
    let said = same(&setup, "an unread answer", |host| {
        let mut client = std::net::TcpStream::connect(host.address).unwrap();
        client.write_all(b"GET /p HTTP/1.1\r\nhost: a.example\r\n\r\n").unwrap();
        host.wait("delete")
    });
    assert!(said.iter().any(|line| line.starts_with("log ")), "{said:?}");
}

#[test]
fn a_local_response_from_each_callback() {
    let setup = Setup::new("order", origin(false));
    let results = same(&setup, "local responses", |host| {
        let mut results = Vec::new();
        for at in ["request-headers", "request-body", "response-headers", "response-body"] {
            for what in ["respond", "empty"] {
                let (said, got) = ordered(host, &format!("{at}={what}"), true);
                results.push((at, what, said, got));
            }
        }
        results
    });
    for (at, what, said, got) in &results {
        let expected = match (*at, *what) {
            // Its headers have left already.
            ("response-body", _) => 200,
            (_, "respond") => 418,
            _ => 204,
        };
        assert_eq!(got.status, expected, "{at} {what}: {said:?}");
        assert_eq!(got.broken, *at == "response-body", "{at} {what}: {got:?}");
        if expected == 418 {
            assert!(got.body == "tea\n" && got.has(&format!("x-local: {at}")) && got.has("content-type: text/x-tea"));
            // A response that a request got goes through the filter; one in place of a response does not.
            assert_eq!(said.iter().any(|line| line.starts_with("response-headers 418")), at.starts_with("request"));
        }
    }
}

#[test]
fn a_stream_is_reset_from_each_callback() {
    let setup = Setup::new("order", origin(false));
    let results = same(&setup, "resets", |host| {
        let mut results = Vec::new();
        for at in ["request-headers=reset-request", "request-body=reset-request", "response-headers=reset-response"] {
            let (said, got) = ordered(host, at, true);
            results.push((said, got.status));
        }
        results
    });
    assert!(results.iter().all(|(_, status)| *status == 0), "{results:?}");
}

#[test]
fn a_crash_is_503_and_the_filter_comes_back() {
    let setup = Setup::new("order", origin(false));
    let host = Host::start(Kind::Portolan, &setup);
    for at in ["request-headers", "request-body", "response-headers"] {
        let got = post(host.address, "/", &format!("x-at: {at}=panic\r\n"), "body");
        assert_eq!((got.status, got.body.as_str()), (503, ""), "{at}");
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while get(host.address, "/", "").status != 200 {
            assert!(std::time::Instant::now() < end, "it does not come back after {at}");
        }
    }
}

#[test]
fn a_grpc_request_gets_a_local_response_in_grpcs_form() {
    let setup = Setup { http2: true, ..Setup::new("order", origin(true)) };
    let got = same(&setup, "gRPC", |host| {
        let headers = [("content-type", "application/grpc"), ("te", "trailers"), ("x-at", "request-headers=respond")];
        http2(host.address, "/s/m", &headers, "", &[]).compared()
    });
    assert_eq!(got.status, 200);
    assert!(got.has("grpc-status: 2") && got.has("grpc-message: tea%0A"), "{got:?}");
}

#[test]
fn a_client_that_goes_away_ends_its_stream() {
    let setup = Setup { calls: setup_that_never_answers(), ..Setup::new("order", origin(false)) };
    same(&setup, "a client that goes away", |host| {
        let mut stream = std::net::TcpStream::connect(host.address).unwrap();
        std::io::Write::write_all(&mut stream, b"GET /p HTTP/1.1\r\nhost: a\r\nx-at: request-headers=pause\r\n\r\n")
            .unwrap();
        host.printed("@@ request-headers");
        drop(stream);
        host.wait("delete")
    });
}

fn setup_that_never_answers() -> std::net::SocketAddr {
    crate::support::server(false, |_| std::future::pending())
}

#[test]
fn the_end_of_the_process_is_told_to_the_filter() {
    let host = Host::start(Kind::Portolan, &Setup::new("headers", origin(false)));
    assert_eq!(get(host.address, "/", "").status, 200);
    assert_eq!(host.terminate(), Some(0));
    host.wait("root headers done");
}

#[test]
fn an_upstream_that_is_not_there_is_shown_to_the_filter_as_503() {
    let setup = Setup::new("order", "127.0.0.1:1".parse().unwrap());
    let (said, got) = same(&setup, "no upstream", |host| {
        let (said, got) = ordered(host, "", false);
        (said, (got.status, got.body.contains("reset reason: remote connection failure")))
    });
    assert_eq!(got, (503, true));
    assert!(said.iter().any(|line| line == "response-headers 503 false"), "{said:?}");
}
