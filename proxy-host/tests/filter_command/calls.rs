//! HTTP calls, gRPC calls and streams; shared data, queues, timers and metrics; properties.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::Response;
use http_body_util::BodyExt as _;

use crate::{
    http::same,
    support::{Host, Kind, Setup, body, get, origin, post, server},
};

/// Answers HTTP calls by their path.
pub fn asked() -> std::net::SocketAddr {
    server(false, |request| async move {
        let path = request.uri().path().to_owned();
        let asked = request.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        let answer =
            |status: u16, text: &str| Response::builder().status(status).body(body(text.to_owned(), &[])).unwrap();
        match path.as_str() {
            "/allow" => answer(200, &format!("alice {}", asked.len())),
            "/wait" | "/" => answer(200, ""),
            "/hang" => std::future::pending().await,
            _ => answer(401, "who?"),
        }
    })
}

fn message(text: &[u8]) -> Bytes {
    let length = u32::try_from(text.len()).unwrap().to_be_bytes();
    [&[0], &length[..], text].concat().into()
}

/// A gRPC server: `Good` and `Bad` calls, one that never ends, and a stream that repeats what it gets.
fn grpc() -> std::net::SocketAddr {
    server(true, |request| async move {
        let path = request.uri().path().to_owned();
        let metadata = request.headers().contains_key("x-meta");
        let answer = Response::builder().header("content-type", "application/grpc").header("x-initial", "first");
        let whole = match request.into_body().collect().await {
            Ok(whole) => whole.to_bytes(),
            Err(_) => Bytes::new(),
        };
        match path.as_str() {
            "/test.Service/Good" if metadata && whole == message(b"ask") => {
                answer.body(body(message(b"answer"), &[("grpc-status", "0")])).unwrap()
            }
            "/test.Service/Echo" => answer.body(body(whole, &[("grpc-status", "0"), ("x-trailing", "last")])).unwrap(),
            "/test.Service/Hang" => std::future::pending().await,
            _ => answer.header("grpc-status", "7").header("grpc-message", "no%20way").body(body("", &[])).unwrap(),
        }
    })
}

#[test]
fn an_http_call_lets_a_request_pass_or_not() {
    let setup = Setup { calls: asked(), ..Setup::new("http-call", origin(false)) };
    let results = same(&setup, "http calls", |host| {
        ["/allow", "/deny", "/hang"].map(|path| {
            let got = get(host.address, path, "").compared();
            (host.wait("call response"), got)
        })
    });
    let [(said, allowed), (_, denied), (hung, timeout)] = results;
    assert_eq!(said, ["call response true Some(\"200\") \"alice 10\" 0"]);
    assert!(allowed.status == 200 && allowed.body.contains("x-allowed: alice 10\n"), "{allowed:?}");
    assert_eq!((denied.status, denied.body.as_str()), (403, "denied\n"));
    assert!(denied.has("x-denied: 1"));
    assert_eq!(hung, ["call response true Some(\"504\") \"upstream request timeout\" 0"]);
    assert_eq!(timeout.status, 403);
}

#[test]
fn a_call_to_nobody_is_a_503_and_one_to_no_cluster_fails_at_once() {
    let setup = Setup::new("http-call", origin(false));
    let (said, status) = same(&setup, "no one called", |host| {
        let nobody = get(host.address, "/", "").status;
        let mut said = host.wait("call response");
        let no_cluster = get(host.address, "/", "x-cluster: none\r\n").status;
        said.extend(host.wait("no call"));
        // The reason is the system's.
        said[0].truncate("call response true Some(\"503\") \"upstream connect error".len());
        (said, [nobody, no_cluster])
    });
    assert_eq!(said, ["call response true Some(\"503\") \"upstream connect error", "no call: BadArgument"]);
    assert_eq!(status, [403, 500]);
}

#[test]
fn any_paused_callback_is_resumed_by_a_call() {
    let setup = Setup { calls: asked(), ..Setup::new("order", origin(false)) };
    let results = same(&setup, "pauses", |host| {
        ["request-headers", "request-body", "response-headers", "response-body"].map(|at| {
            let got = post(host.address, "/p", &format!("x-at: {at}=pause\r\n"), "body").compared();
            (host.wait("delete"), got)
        })
    });
    for (said, got) in &results {
        assert_eq!((got.status, got.broken), (200, false), "{said:?}");
        assert!(got.body.ends_with("body\n"), "{got:?}");
        assert_eq!(said.iter().filter(|line| line.starts_with("call response")).count(), 1, "{said:?}");
    }
}

#[test]
fn a_grpc_call_lets_a_request_pass_or_not() {
    let setup = Setup { grpc: grpc(), ..Setup::new("grpc-call", origin(false)) };
    let results = same(&setup, "grpc calls", |host| {
        ["Good", "Bad", "Hang"].map(|method| {
            let got = get(host.address, "/", &format!("x-method: {method}\r\n")).compared();
            let last = if method == "Good" { "grpc response" } else { "grpc status" };
            (host.wait(last), got)
        })
    });
    let [(said, good), (_, bad), (_, hung)] = results;
    assert_eq!(said, ["grpc response 0 \"answer\""]);
    assert!(good.body.contains("x-grpc: answer\n"), "{good:?}");
    assert_eq!((bad.status, bad.body.as_str()), (403, "grpc 7\n"));
    assert_eq!(hung.status, 403);
}

#[test]
fn a_grpc_stream_carries_messages_both_ways() {
    let setup = Setup { grpc: grpc(), ..Setup::new("grpc-stream", origin(false)) };
    let host = Host::start(Kind::Portolan, &setup);
    // The server repeats the messages once all of them have come: the filter has to end its side first.
    drop(host);
    let echo = crate::support::server(true, |request| async move {
        let answer = Response::builder().header("content-type", "application/grpc").header("x-initial", "first");
        // Frame by frame: an echo that waited for the end would wait for the filter, which waits for it.
        let (parts, body) = request.into_parts();
        assert!(parts.headers.contains_key("x-meta"));
        let trailers = tokio_stream::once(Ok(http_body::Frame::trailers(
            [("grpc-status", "0"), ("x-trailing", "last")]
                .into_iter()
                .map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap()))
                .collect(),
        )));
        let frames = http_body_util::BodyStream::new(body);
        let frames = tokio_stream::StreamExt::filter_map(frames, |frame| frame.ok().map(Ok));
        let all = tokio_stream::StreamExt::chain(frames, trailers);
        answer.body(http_body_util::StreamBody::new(all).boxed_unsync()).unwrap()
    });
    let setup = Setup { grpc: echo, ..setup };
    let (said, got) = same(&setup, "a grpc stream", |host| {
        let got = get(host.address, "/", "").compared();
        (host.wait("close"), got)
    });
    assert_eq!(
        said,
        ["initial \"first\"", "message true \"one\"", "message true \"two\"", "trailing \"last\"", "close 0"]
    );
    assert!(got.body.contains("x-grpc: one+two\n"), "{got:?}");
}

#[test]
fn data_queues_timers_and_metrics() {
    let setup = Setup::new("shared", origin(false));
    let host = Host::start(Kind::Portolan, &setup);
    assert!(get(host.address, "/", "").has("x-count: 1"));
    assert!(get(host.address, "/", "").has("x-count: 2"));
    let said = host.wait_count("then", 2);
    for line in [
        "unset (None, None)",
        "count 1 Ok(()) true",
        "count 2 Ok(()) true",
        "queues true None",
        "queue true \"message 2\"",
        "then Ok(None)",
        "metrics Ok(0) Ok(4) Ok(())",
        "no function Err(NotFound)",
    ] {
        assert!(said.iter().any(|said| said == line), "{line} in {said:#?}");
    }
    let host = Host::start(Kind::Portolan, &setup);
    host.wait("third tick");
}

#[test]
fn data_metrics_and_functions_are_envoys() {
    let said = same(&Setup::new("shared", origin(false)), "shared", |host| {
        assert_eq!(get(host.address, "/", "").status, 200);
        let mut said = host.wait("then");
        // When timers fire, and on which of Envoy's threads, is not the question.
        said.retain(|line| !line.contains("tick"));
        said
    });
    let compressed = said.iter().find(|line| line.starts_with("compressed ")).unwrap();
    assert!(compressed.ends_with("\"hello world!\""), "{compressed}");
    let expressions = said.iter().filter(|line| line.starts_with("expression ")).count();
    assert_eq!(expressions, 14, "{said:#?}");
}

#[test]
fn a_timer_lets_requests_pass_or_answers_them() {
    let results = same(&Setup::new("waiting", origin(false)), "waiting", |host| {
        let first = get(host.address, "/", "").compared();
        let second = get(host.address, "/", "").compared();
        (first, second, host.wait_count("delete", 2))
    });
    let (passed, answered, said) = results;
    assert!(passed.status == 200 && passed.body.contains("x-waited: yes\n"), "{passed:?}");
    assert_eq!((answered.status, answered.body.as_str()), (429, "too many\n"));
    assert_eq!(said, ["released 1", "delete", "released 2", "delete"]);
}

/// Attributes that must be the same in both hosts, apart from those that hold a time, a port or an id.
const ATTRIBUTES: &str = "request.path\nrequest.url_path\nrequest.query\nrequest.host\nrequest.scheme\nrequest.method
request.headers.x-a\nrequest.headers.x-none\nrequest.referer\nrequest.useragent\nrequest.protocol\nrequest.size
response.code\nresponse.code_details\nresponse.flags\nresponse.headers.x-origin\nresponse.grpc_status\nresponse.size
connection.mtls\nconnection.requested_server_name\nconnection.tls_version\nupstream.address\nupstream.port
upstream.transport_failure_reason\nupstream.request_attempt_count\ndestination.address\ndestination.port
xds.cluster_name\nxds.route_name\nxds.virtual_host_name\nxds.filter_chain_name\nxds.listener_direction\nxds.node.id
xds.node.cluster\ncluster_name\nroute_name\nlistener_direction\nnode.id\nplugin_name\nplugin_root_id\nplugin_vm_id
own\nfilter_state.wasm.own\nnone\nmetadata.filter_metadata.none\nrequest.none\nsource.none";

#[test]
fn properties_have_envoys_names_and_encodings() {
    let destination = |said: &str| said.contains(" destination.");
    let setup = Setup { configuration: ATTRIBUTES, ..Setup::new("properties", origin(false)) };
    let count = ATTRIBUTES.lines().count();
    let said = same(&setup, "properties", |host| {
        let headers = "x-a: A\r\nreferer: r\r\nuser-agent: u\r\n";
        assert_eq!(post(host.address, "/p/q?x=1", headers, "body").status, 200);
        let said = host.wait_count("log", count);
        // Each host has its own address.
        assert_eq!(said.iter().filter(|line| destination(line)).count(), 6);
        said.into_iter().filter(|line| !destination(line)).collect::<Vec<_>>()
    });
    let values: BTreeMap<_, _> = said.iter().filter_map(|line| line.rsplit_once(' ')).collect();
    let hex = |text: &str| text.bytes().map(|b| format!("{b:02x}")).collect::<String>();
    for (path, value) in [
        ("request request.url_path", hex("/p/q")),
        ("request request.query", hex("x=1")),
        ("request request.headers.x-a", hex("A")),
        ("request own", hex("mine")),
        ("request plugin_root_id", hex("properties")),
        ("response response.code", "c800000000000000".to_owned()),
        ("log response.code_details", hex("via_upstream")),
        ("request none", "-".to_owned()),
    ] {
        assert_eq!(values.get(path), Some(&value.as_str()), "{path}");
    }
}
