//! The admission webhook, request by request.

use crate::fake_api;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use fake_api::FakeApi;
use portolan_controller::embed::{Controller, MeshSource};
use portolan_controller::serve::webhook::Webhook;
use serde_json::{Value, json};
use tokio::time::timeout;
use tower::ServiceExt as _;

async fn ask(router: &Router, body: String) -> (StatusCode, Value) {
    let request = Request::post("/validate").header("content-type", "application/json").body(Body::from(body)).unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let status = response.status();
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

async fn judged(router: &Router, object: Value) -> Value {
    let review = json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
                         "request": { "uid": "u-1", "operation": "CREATE", "object": object } });
    let (status, answer) = ask(router, review.to_string()).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!((&answer["kind"], &answer["response"]["uid"]), (&"AdmissionReview".into(), &"u-1".into()));
    answer["response"].clone()
}

fn entry(name: &str, host: &str, resolution: &str) -> Value {
    json!({ "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": { "name": name, "namespace": "n" },
            "spec": { "hosts": [host], "resolution": resolution,
                      "ports": [{ "number": 80, "name": "http", "protocol": "HTTP" }] } })
}

fn alone() -> Router {
    Webhook::new(None, Arc::default()).router()
}

#[tokio::test]
async fn errors_refuse_and_name_the_field() {
    let router = alone();
    assert_eq!(judged(&router, entry("a", "a.example.com", "DNS")).await["allowed"], true);
    let refused = judged(&router, entry("a", "*", "DNS")).await;
    assert_eq!((&refused["allowed"], &refused["status"]["code"]), (&false.into(), &422.into()));
    let message = refused["status"]["message"].as_str().unwrap();
    assert!(message.contains("hosts"), "{message}");
    // Whatever it is, it is an answer about this one alone.
    for odd in
        [json!({}), json!([]), json!("x"), json!({ "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry" })]
    {
        judged(&router, odd).await;
    }
    assert_eq!(judged(&router, entry("a", "a.example.com", "DNS")).await["allowed"], true);
}

#[tokio::test]
async fn what_goes_and_what_is_no_review() {
    let router = alone();
    let delete = json!({ "apiVersion": "admission.k8s.io/v1", "request": { "uid": "d", "operation": "DELETE", "object": null } });
    assert_eq!(ask(&router, delete.to_string()).await.1["response"]["allowed"], true);
    let status = json!({ "apiVersion": "admission.k8s.io/v1",
        "request": { "uid": "s", "operation": "UPDATE", "subResource": "status", "object": entry("a", "*", "DNS") } });
    assert_eq!(ask(&router, status.to_string()).await.1["response"]["allowed"], true);
    for text in ["", "{}", "[1]", r#"{"apiVersion":"admission.k8s.io/v1beta1","request":{"uid":"1"}}"#] {
        assert_eq!(ask(&router, text.to_owned()).await.0, StatusCode::BAD_REQUEST, "{text}");
    }
}

#[tokio::test]
async fn conflicts_with_what_is_there_are_warnings() {
    let api = FakeApi::start().await;
    let mut there = entry("older", "one.example.com", "NONE");
    there["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
    api.put("serviceentries", "n", "older", there);
    for n in 0..200 {
        api.put("serviceentries", "n", &format!("e{n}"), entry("", &format!("host-{n}.example.com"), "DNS"));
    }
    let (controller, listed) = Controller::of_cluster(&api.client(), &MeshSource::Defaults).unwrap();
    timeout(Duration::from_secs(20), listed.wait()).await.unwrap().unwrap();
    let known = controller.cluster().unwrap().resources.clone();
    let router = Webhook::new(Some(known), controller.counters().clone()).router();
    let warned = judged(&router, entry("newer", "ONE.example.com", "DNS")).await;
    let warning = warned["warnings"][0].as_str().unwrap();
    assert!(warned["allowed"] == true && warning.contains("n/older") && warning.contains("duplicate-host"), "{warned}");
    assert!(warned["warnings"].as_array().unwrap().iter().all(|w| w.as_str().unwrap().len() <= 256));
    let clean = judged(&router, entry("newer", "two.example.com", "DNS")).await;
    assert_eq!((&clean["allowed"], &clean["warnings"]), (&true.into(), &json!([])));
    // A new version of what is there is not in its own way.
    assert_eq!(judged(&router, entry("e7", "host-7.example.com", "DNS")).await["warnings"], json!([]));
}
