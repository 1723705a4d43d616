//! As much of a Kubernetes API server as lists, watches and applied status need, in this process.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

/// Resources by plural, namespace and name, with their history.
#[derive(Default)]
struct Held {
    version: u64,
    objects: BTreeMap<(String, String, String), Value>,
    history: Vec<(u64, String, &'static str, Value)>,
    /// Watches from before this version are told that it is gone.
    oldest: u64,
    /// Plurals that may not be listed.
    denied: BTreeSet<String>,
    /// Parts of paths that are not served.
    absent: BTreeSet<String>,
    /// Plurals whose lists wait.
    slow: BTreeSet<String>,
    down: bool,
    /// Lists that were answered, by plural.
    lists: HashMap<String, usize>,
    /// Names of resources whose status was written, in order, with the field manager.
    written: Vec<(String, String)>,
}

/// A running server.
#[derive(Clone)]
pub struct FakeApi {
    held: Arc<Mutex<Held>>,
    changed: Arc<watch::Sender<u64>>,
    address: std::net::SocketAddr,
}

impl FakeApi {
    /// An empty cluster.
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let held = Arc::new(Mutex::new(Held { version: 1, ..Held::default() }));
        let api = FakeApi { held, changed: Arc::default(), address: listener.local_addr().unwrap() };
        let router = Router::new().fallback(answer).with_state(api.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        api
    }

    /// A client of it.
    pub fn client(&self) -> kube::Client {
        let mut config = kube::Config::new(format!("http://{}", self.address).parse().unwrap());
        // A test says itself what is to be tried again.
        config.default_retry = false;
        kube::Client::try_from(config).unwrap()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Held)) {
        change(&mut self.held());
        self.changed.send_modify(|n| *n += 1);
    }

    /// Creates or replaces a resource.
    pub fn put(&self, plural: &str, namespace: &str, name: &str, mut value: Value) {
        self.change(|held| {
            held.version += 1;
            value["metadata"]["name"] = name.into();
            value["metadata"]["namespace"] = namespace.into();
            value["metadata"]["resourceVersion"] = held.version.to_string().into();
            let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
            let kind = if held.objects.insert(key, value.clone()).is_some() { "MODIFIED" } else { "ADDED" };
            held.history.push((held.version, plural.to_owned(), kind, value));
        });
    }

    /// Deletes a resource.
    pub fn delete(&self, plural: &str, namespace: &str, name: &str) {
        self.change(|held| {
            held.version += 1;
            let mut value = held.objects.remove(&(plural.into(), namespace.into(), name.into())).unwrap();
            value["metadata"]["resourceVersion"] = held.version.to_string().into();
            held.history.push((held.version, plural.to_owned(), "DELETED", value));
        });
    }

    /// Forgets what happened so far: watches from before are out of date.
    pub fn forget(&self) {
        self.change(|held| {
            held.version += 1;
            held.oldest = held.version;
        });
    }

    pub fn deny(&self, plural: &str) {
        self.change(|held| held.denied.extend([plural.to_owned()]));
    }

    pub fn hide(&self, path: &str) {
        self.change(|held| held.absent.extend([path.to_owned()]));
    }

    /// Lets lists of that kind wait, or no longer.
    pub fn slow(&self, plural: &str, slow: bool) {
        self.change(|held| {
            held.slow.remove(plural);
            if slow {
                held.slow.insert(plural.into());
            }
        });
    }

    /// Ends all watches and refuses everything, or no longer.
    pub fn down(&self, down: bool) {
        self.change(|held| held.down = down);
    }

    /// A resource as it is now.
    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Value {
        self.held().objects.get(&(plural.into(), namespace.into(), name.into())).cloned().unwrap_or_default()
    }

    /// Whose status was written, in order, and by which field manager.
    pub fn written(&self) -> Vec<(String, String)> {
        self.held().written.clone()
    }

    /// Applies a status: what it has replaces what was there by that name.
    fn apply_status(&self, path: &str, manager: &str, patch: &Value) -> Response {
        let parts: Vec<&str> = path.rsplit('/').collect();
        let [_, name, plural, namespace, ..] = parts[..] else { return refused(404, "NotFound") };
        let mut value = self.get(plural, namespace, name);
        let Some(status) = patch["status"].as_object().filter(|_| value.is_object()) else {
            return refused(404, "NotFound");
        };
        if value["metadata"]["resourceVersion"] != patch["metadata"]["resourceVersion"] {
            return refused(409, "Conflict");
        }
        for (field, now) in status {
            value["status"][field] = now.clone();
        }
        self.held().written.push((name.to_owned(), manager.to_owned()));
        self.put(plural, namespace, name, value);
        axum::Json(self.get(plural, namespace, name)).into_response()
    }

    pub fn lists(&self, plural: &str) -> usize {
        self.held().lists.get(plural).copied().unwrap_or_default()
    }
}

fn refusal(code: u16, reason: &str) -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
            "message": format!("{reason}, for the test") })
}

fn refused(code: u16, reason: &str) -> Response {
    (StatusCode::from_u16(code).unwrap(), axum::Json(refusal(code, reason))).into_response()
}

async fn answer(State(api): State<FakeApi>, method: Method, uri: Uri, body: Bytes) -> Response {
    let query = uri.query().unwrap_or_default().split('&').filter_map(|part| part.split_once('='));
    let query: HashMap<&str, &str> = query.collect();
    if method == Method::PATCH {
        let manager = query.get("fieldManager").copied().unwrap_or_default();
        return api.apply_status(uri.path(), manager, &serde_json::from_slice(&body).unwrap());
    }
    let plural = uri.path().rsplit('/').next().unwrap().to_owned();
    let mut changed = api.changed.subscribe();
    loop {
        {
            let held = api.held();
            if held.down {
                return refused(503, "ServiceUnavailable");
            }
            if held.absent.iter().any(|part| uri.path().contains(part)) {
                return refused(404, "NotFound");
            }
            if held.denied.contains(&plural) {
                return refused(403, "Forbidden");
            }
            if !held.slow.contains(&plural) {
                break;
            }
        }
        changed.changed().await.unwrap();
    }
    if query.contains_key("watch") {
        return events(api, plural, query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0));
    }
    let mut held = api.held();
    *held.lists.entry(plural.clone()).or_default() += 1;
    let all: Vec<&Value> = held.objects.iter().filter(|((p, ..), _)| *p == plural).map(|(_, v)| v).collect();
    let from: usize = query.get("continue").and_then(|c| c.parse().ok()).unwrap_or(0);
    let limit: usize = query.get("limit").and_then(|c| c.parse().ok()).unwrap_or(usize::MAX);
    let to = from.saturating_add(limit).min(all.len());
    let next = if to < all.len() { to.to_string() } else { String::new() };
    let list = json!({ "kind": "List", "apiVersion": "v1", "items": &all[from..to],
                       "metadata": { "resourceVersion": held.version.to_string(), "continue": next } });
    axum::Json(list).into_response()
}

fn events(api: FakeApi, plural: String, mut from: u64) -> Response {
    let (sender, receiver) = mpsc::channel::<Value>(16);
    let mut changed = api.changed.subscribe();
    tokio::spawn(async move {
        loop {
            let due: Vec<Value> = {
                let held = api.held();
                if held.down {
                    return;
                }
                if from < held.oldest {
                    vec![json!({ "type": "ERROR", "object": refusal(410, "Expired") })]
                } else {
                    let new = held.history.iter().filter(|(version, p, ..)| *version > from && *p == plural);
                    new.map(|(_, _, kind, value)| json!({ "type": kind, "object": value })).collect()
                }
            };
            from = due
                .last()
                .and_then(|e| e["object"]["metadata"]["resourceVersion"].as_str()?.parse().ok())
                .unwrap_or(from);
            for event in due {
                let end = event["type"] == "ERROR";
                if sender.send(event).await.is_err() || end {
                    return;
                }
            }
            tokio::select! {
                changed = changed.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
        }
    });
    let lines = ReceiverStream::new(receiver).map(|event| Ok::<_, Infallible>(Bytes::from(format!("{event}\n"))));
    Body::from_stream(lines).into_response()
}
