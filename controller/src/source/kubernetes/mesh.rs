//! The mesh's settings in a ConfigMap, as istiod keeps them, for as long as somebody wants to know.
//!
//! What cannot be read never opens a mesh that was closed: before the first answer nobody is served, and later the last
//! good settings stay, also when the ConfigMap is gone.

use std::fmt;
use std::pin::pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::core::ApiResource;
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::follow::{SETTLED, WATCH, code};
use super::kinds::Raw;
use super::status::{CONFIG_MAP, Status};
use crate::model::MeshConfig;
use crate::source::read;
use crate::validate::finding::{Finding, Severity};

/// Key of the text, as istiod has it.
const KEY: &str = "mesh";
/// How long to wait after an error.
const AGAIN: Duration = Duration::from_secs(2);

/// Which ConfigMap; istiod's own is `istio-system/istio`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshMap {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for MeshMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for MeshMap {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(MeshMap { namespace: namespace.into(), name: name.into() })
            }
            _ => Err("write NAMESPACE/NAME"),
        }
    }
}

/// What a ConfigMap says.
#[derive(Debug)]
pub(crate) struct Said {
    /// `None`: nothing that could be used.
    pub mesh: Option<MeshConfig>,
    /// What there is to say about it.
    pub findings: Vec<Finding>,
}

impl Said {
    fn of(map: &MeshMap, raw: &Raw) -> Self {
        let place: Arc<str> = format!("ConfigMap {map}").into();
        let Some(text) = raw.value["data"][KEY].as_str() else {
            let message = format!("it has no text under the key {KEY:?}");
            let finding = read::about_file(&place, "no-mesh", Severity::Error, message);
            return Said { mesh: None, findings: vec![finding] };
        };
        let (mesh, findings) = read::mesh(text, &place);
        Said { mesh, findings }
    }
}

/// Says what the ConfigMap has, whenever that changes.
pub(crate) async fn follow(client: Client, map: MeshMap, said: mpsc::Sender<Said>, status: Status) {
    status.needed(CONFIG_MAP, true);
    let resource = ApiResource {
        group: String::new(),
        version: "v1".into(),
        api_version: "v1".into(),
        kind: "ConfigMap".into(),
        plural: "configmaps".into(),
    };
    let api: Api<Raw> = Api::namespaced_with(client, &map.namespace, &resource);
    let mut stream =
        pin!(watcher(api, watcher::Config::default().timeout(WATCH).fields(&format!("metadata.name={}", map.name))));
    let (mut first, mut found, mut failing, mut listed) = (true, false, false, false);
    loop {
        let event = tokio::select! {
            event = stream.next() => event,
            // A watch that goes on says nothing until something changes.
            () = sleep(SETTLED), if failing && listed => {
                status.event(CONFIG_MAP);
                failing = false;
                continue;
            }
            () = said.closed() => return,
        };
        let Some(event) = event else { return };
        match &event {
            // A list has begun, of which nothing has come yet.
            Ok(watcher::Event::Init) => listed = false,
            Ok(_) => {
                status.event(CONFIG_MAP);
                (failing, listed) = (false, true);
            }
            Err(_) => {}
        }
        let news = match event {
            Ok(watcher::Event::Init) => {
                found = false;
                continue;
            }
            Ok(watcher::Event::InitApply(raw) | watcher::Event::Apply(raw)) => {
                found = true;
                Said::of(&map, &raw)
            }
            Ok(watcher::Event::InitDone) if !found && first => {
                tracing::warn!(map = %map, "there is no such ConfigMap: Istio's defaults are in force");
                Said { mesh: Some(MeshConfig::default()), findings: Vec::new() }
            }
            Ok(watcher::Event::InitDone) if found => continue,
            Ok(watcher::Event::InitDone | watcher::Event::Delete(_)) => {
                tracing::warn!(map = %map, "the ConfigMap is gone: the mesh's last settings stay in force");
                continue;
            }
            // The API server has forgotten where we were: it is listed again.
            Err(error) if code(&error) == Some(410) => continue,
            Err(error) => {
                status.error(CONFIG_MAP);
                if !std::mem::replace(&mut failing, true) {
                    let what = if first { "nothing is served before it can" } else { "its last settings stay" };
                    tracing::error!(map = %map, %error, "the ConfigMap cannot be watched: {what}");
                }
                tokio::select! {
                    () = sleep(AGAIN) => continue,
                    () = said.closed() => return,
                }
            }
        };
        first = false;
        if said.send(news).await.is_err() {
            return;
        }
    }
}
