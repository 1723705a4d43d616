//! Envoy's foreign functions, and what they leave in the filter state.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use crate::{
    http::same,
    support::{Host, Setup, origin},
};

/// Requests on one connection; the statuses.
fn on_one_connection(host: &Host, count: usize) -> Vec<String> {
    let mut stream = TcpStream::connect(host.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut statuses = Vec::new();
    for number in 1..=count {
        let last = if number == count { "connection: close\r\n" } else { "" };
        write!(stream, "GET /p HTTP/1.1\r\nhost: a.example\r\n{last}\r\n").unwrap();
        let mut answer = Vec::new();
        // It has no body.
        while !answer.ends_with(b"\r\n\r\n") {
            let mut part = [0; 1024];
            let read = stream.read(&mut part).unwrap();
            assert!(read > 0, "{:?}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&part[..read]);
        }
        statuses.push(String::from_utf8_lossy(&answer[..12]).into_owned());
    }
    statuses
}

/// Keys of the filter state; the last one is nobody's.
const KEYS: [&str; 22] = [
    "envoy.ai.llm_protocol.request",
    "envoy.ai.model.request",
    "envoy.bool",
    "envoy.filters.listener.original_dst.local_ip",
    "envoy.filters.listener.original_dst.remote_ip",
    "envoy.hashable_string",
    "envoy.network.application_protocols",
    "envoy.network.ip",
    "envoy.network.network_namespace",
    "envoy.network.transport_socket.http_11_proxy.info",
    "envoy.network.transport_socket.original_dst_address",
    "envoy.network.upstream_server_name",
    "envoy.network.upstream_subject_alt_names",
    "envoy.ratelimit.hits_addend",
    "envoy.router.debug_config",
    "envoy.string",
    "envoy.tcp_proxy.cluster",
    "envoy.tcp_proxy.disable_tunneling",
    "envoy.tcp_proxy.per_connection_idle_timeout_ms",
    "envoy.upstream.dynamic_host",
    "envoy.upstream.dynamic_port",
    "own.key",
];

const VALUES: [&str; 12] =
    ["", "x", "true", "TRUE", "yes", "10", "-1", "4294967296", "10.0.0.1", "10.0.0.1:80", "::1", "a,10.0.0.2:90"];

/// What goes right, and what goes wrong.
const CALLS: &str = "compress hello world!
uncompress nonsense
repeat compress 100000
tell compress
tell none
clear_route_cache
none
sign
verify_signature
expr_create
expr_evaluate 1
expr_evaluate aaaa
expr_delete 1
expr_delete aaaa
expr ['a', 'b']
expr [1, 2u, 3.0, true]
expr []
expr {'a': 1}
expr {1: true}
expr {}
expr null
expr 1/0
expr request
expr filter_state
expr metadata
expr request.headers[':path'] + request.headers['host']
expr 'host' in request.headers || has(request.headers.none)
expr xds.node.id
expr filter_state['envoy.hashable_string']
expr filter_state['envoy.bool']
expr request.nothing";

#[test]
fn foreign_functions_are_envoys() {
    let states = KEYS.iter().flat_map(|key| VALUES.map(|value| format!("state {key}={value}")));
    let key = rcgen::KeyPair::generate().unwrap();
    let escaped = |pem: String| pem.replace('\n', "\\n");
    let (private, public) = (escaped(key.serialize_pem()), escaped(key.public_key_pem()));
    let signatures = ["sha256", "SHA256", "md5"].map(|hash| format!("signature {hash}|{private}|{public}"));
    let lines: Vec<_> = states.chain(CALLS.lines().map(str::to_owned)).chain(signatures).collect();
    let configuration = lines.join("\n");
    let setup = Setup { configuration: &configuration, ..Setup::new("foreign", origin(false)) };
    let (statuses, said) = same(&setup, "foreign functions", |host| {
        let statuses = on_one_connection(host, 2);
        (statuses, host.wait_count("told", 2))
    });
    assert_eq!(statuses, ["HTTP/1.1 200"; 2]);
    for line in [
        // What a root context declares is declared once, and heeded.
        "root: bytes (0, \"nothing\")",
        "root: again (2, \"nothing\")",
        "once set [0, 2]",
        "filter_state['wasm.string'] + 'text': (0, \"secondtext\") (0, \"nothing\")",
        // The second request of a connection finds what the first one left with it, and nothing else.
        "connection-span: Ok(Some(\"second\")), in the filter state Ok(Some(\"second\"))",
        "request-span: Ok(None), in the filter state Ok(None)",
        "in a stream again (2, \"nothing\")",
        "none (1, \"untouched\")",
        "state own.key=x (1, \"nothing\") Ok(None) Ok(None)",
        "state envoy.tcp_proxy.cluster=x (0, \"nothing\") Ok(Some(\"x\")) Ok(None)",
    ] {
        assert!(said.iter().any(|said| said == line), "{line} in {said:#?}");
    }
    let signed = said.iter().filter(|line| line.starts_with("signature signed 0, (0, \"\\\\x08\\\\x01\")")).count();
    assert!(signed >= 2, "{said:#?}");
}
