//! The admin port, and what the access log says.

use crate::proxy_support;

use std::{net::SocketAddr, time::Duration};

use proxy_support::*;

fn admin(app: &portolan_proxy_host::app::App) -> SocketAddr {
    app.admin.unwrap()
}

#[test]
fn metrics_tell_of_requests_connections_decisions_and_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let first = origin("first", Duration::ZERO);
    let twice = [entry("a", "a.test", HTTP, first), entry("b", "a.test", "number: 80, name: t, protocol: TCP", first)];
    let (app, lines) = start(dir.path(), &twice.concat(), |_| {});
    let proxy = app.http_proxies[0];
    until(admin(&app), "/ready", "LIVE");
    assert!(get(proxy, "http://a.test/").contains("first"));
    assert!(get(proxy, "http://a.test/").contains("first"));
    assert!(get(proxy, "http://b.test/").starts_with("HTTP/1.1 502 "));
    for _ in 0..3 {
        lines.recv_timeout(PATIENCE).unwrap();
    }
    let answer = get(admin(&app), "/metrics");
    for line in [
        "portolan_requests_total{code=\"200\",flags=\"-\"} 2\n",
        "portolan_requests_total{code=\"502\",flags=\"-\"} 1\n",
        "portolan_connections_total{listener=\"http_proxy\"} 3\n",
        "portolan_upstream_connections_total ",
        "portolan_request_duration_milliseconds_count 3\n",
        "portolan_http_route_host_exact_total 2\n",
        "portolan_http_deny_blocked_total 1\n",
        "portolan_snapshot_state 1\n",
        "portolan_workers_ready 2\n",
        "portolan_filter_traps_total{kind=\"guest\"} 0\n",
        "portolan_config_resources 2\n",
        "portolan_config_findings{gate=\"conflict\",severity=\"warning\",code=\"protocol-conflict\"} 1\n",
        "portolan_controller_subscribers 2\n",
        "portolan_clusters 1\n",
    ] {
        assert!(answer.contains(line), "no {line:?} in {answer}");
    }
    assert!(answer.ends_with("# EOF\n"));
}

#[test]
fn clusters_and_configuration_can_be_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let first = origin("first", Duration::ZERO);
    let (app, _lines) = start(dir.path(), &entry("a", "a.test", HTTP, first), |_| {});
    until(app.http_proxies[0], "http://a.test/", "first");
    let clusters = get(admin(&app), "/clusters");
    let line = format!("outbound|80||a.test::{first}::rq_active::0\n");
    assert!(clusters.contains(&line), "{clusters}");
    let dump = get(admin(&app), "/config_dump");
    let json: serde_json::Value = serde_json::from_str(dump.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(json["settings"]["namespace"], "default");
    assert_eq!(json["sources"]["resources"], 1);
    let endpoints = &json["clusters"]["outbound|80||a.test"]["discovery"]["endpoints"];
    assert_eq!(endpoints[0]["addresses"][0], first.to_string());
}

#[test]
fn what_is_not_there_or_not_meant_so_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let (app, _lines) = start(dir.path(), "", |_| {});
    let index = get(admin(&app), "/");
    assert!(index.starts_with("HTTP/1.1 200 ") && index.contains("/metrics"), "{index}");
    let answer = get(admin(&app), "/nothing");
    assert!(answer.starts_with("HTTP/1.1 404 ") && answer.contains("/metrics"), "{answer}");
    let post =
        |target| exchange(admin(&app), &format!("POST {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
    assert!(post("/metrics").starts_with("HTTP/1.1 405 "));
    assert!(post("/logging?level=loud").contains("\"loud\" is not known"));
    assert!(get(admin(&app), "/healthz").ends_with("ok\n"));
}

#[test]
fn a_line_of_the_access_log_says_why_for_allowed_and_refused_requests() {
    let dir = tempfile::tempdir().unwrap();
    let (app, lines) = start(dir.path(), &entry("a", "a.test", HTTP, origin("first", Duration::ZERO)), |_| {});
    get(app.http_proxies[0], "http://a.test/");
    let line = lines.recv_timeout(PATIENCE).unwrap();
    assert!(line.ends_with(" \"via_upstream\" \"host_exact: ServiceEntry default/a\"\n"), "{line}");
    get(app.http_proxies[0], "http://b.test/");
    let line = lines.recv_timeout(PATIENCE).unwrap();
    assert!(line.ends_with(" \"portolan_denied{blocked}\" \"blocked\"\n"), "{line}");
}

#[test]
fn listener_plans_are_json() {
    let dir = tempfile::tempdir().unwrap();
    let first = origin("first", Duration::ZERO);
    let resources = [
        entry("a", "a.test", HTTP, first),
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: b, namespace: default}\nspec:\n  \
         hosts: [b.test]\n  addresses: [198.18.5.0/24]\n  resolution: NONE\n  \
         ports: [{number: 80, name: tcp, protocol: TCP}]\n"
            .to_owned(),
    ];
    let (app, _lines) = start(dir.path(), &resources.concat(), |_| {});
    until(admin(&app), "/ready", "LIVE");
    let dump = until(admin(&app), "/config_dump", "\"80\": {");
    let json: serde_json::Value = serde_json::from_str(dump.split_once("\r\n\r\n").unwrap().1).unwrap();
    let plan = &json["listener_plans"]["80"];
    assert_eq!(plan["wildcard"], serde_json::json!({ "tls": false, "http": true }), "{plan}");
    assert_eq!(plan["tcp_prefixes"], serde_json::json!(["198.18.5.0/24"]), "{plan}");
    assert!(plan["addresses"].is_object(), "{plan}");
}
