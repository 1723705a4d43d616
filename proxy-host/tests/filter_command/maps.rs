//! Header maps by the calls of the ABI as they are.

use crate::{
    http::same,
    support::{Setup, exchange, get, origin},
};

/// Names of which Envoy keeps one header (the first rows), and names of which it keeps several.
const NAMES: [&str; 24] = [
    "accept",
    "authorization",
    "cache-control",
    "content-type",
    "etag",
    "location",
    "origin",
    "referer",
    "user-agent",
    "vary",
    "via",
    "x-envoy-retry-on",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-client-cert",
    "x-forwarded-port",
    "x-request-id",
    "grpc-accept-encoding",
    "cookie",
    "set-cookie",
    "accept-language",
    "last-modified",
    "x-envoy-overloaded",
    "x-own",
];

/// Map 0 is the request's headers, 1 its trailers, 2 the response's headers, 6 those of a call's response.
const CALLS: &str = "request get host
request get Host
request get :Path
request get X-Two
request get user-agent
request get none
request get #2/x
request get #4/x
request get #9/x
request size #9/
request set #2/x 1
request set #6/x 1
request remove #2/x
request pairs #1/
request pairs #6/
request pairs #9/
request size #1/
request set host b.example
request get :authority
request add host c
request get host
request remove host
request get :authority
request set Host d.example
request add :path &x
request get :path
request set :path /p
request set x-two one
request get x-two
request add x-empty
request get x-empty
request remove x-none
request size
request replace-all all :method=GET|:path=/all|:scheme=http|x-forwarded-proto=http|host=e.example|accept=1|accept=2|x-own=3|x-own=4
request get :authority
request get x-own
response get :status
response set :status 201
response get :status
response get #0/:path
response set #0/x-late 1
response pairs #0/
log get host
log get :path
log get #2/:status
log get #1/x
log get #3/x
log pairs #1/
log set x 1
log size
log get x-none";

#[test]
fn header_maps_are_envoys() {
    let tried = NAMES.iter().flat_map(|name| {
        ["request", "response"].into_iter().flat_map(move |map| {
            [format!("set {name} 1"), format!("add {name} 2"), format!("get {name}"), format!("remove {name}")]
                .map(|call| format!("{map} {call}"))
        })
    });
    let lines: Vec<_> = CALLS.lines().take(5).map(str::to_owned).chain(tried).collect();
    let configuration = [&lines.join("\n"), CALLS].join("\n");
    let setup = Setup { configuration: &configuration, ..Setup::new("maps", origin(false)) };
    let (said, got) = same(&setup, "maps", |host| {
        let request = "GET /p?q HTTP/1.1\r\nx-two: a\r\nX-Two: b\r\nhost: a.example\r\nuser-agent: c\r\n\
             user-agent: d\r\nconnection: close\r\n\r\n";
        let got = exchange(host.address, request).compared();
        (host.wait("logged"), got)
    });
    for line in [
        "request get host: a.example",
        "request get user-agent: c,d",
        "request get accept: 1,2",
        "request get etag: 1",
        "response get etag: 1,2",
        "request get :authority: b.example",
        "request get host: b.example,c",
        "request get :path: /p?q,&x",
        "response get :status: 201",
        "log get host: e.example",
    ] {
        assert!(said.iter().any(|said| said == line), "{line} in {said:#?}");
    }
    assert!(got.status == 201 && got.body.starts_with("GET /all\n"), "{got:?}");
}

#[test]
fn a_request_that_loses_what_routes_look_at_is_404() {
    for call in ["request remove x-forwarded-proto", "request remove :path", "request set :path "] {
        let setup = Setup { configuration: call, ..Setup::new("maps", origin(false)) };
        let got = same(&setup, call, |host| get(host.address, "/p", "").compared());
        assert!(got.status == 404 && got.body.is_empty(), "{call}: {got:?}");
    }
}
