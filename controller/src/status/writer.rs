//! Writes conditions by server-side apply, only where they differ from what is there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::sleep;

use super::conditions::{self, Condition, Name};
use crate::model::ObjectKey;
use crate::source::kubernetes::kinds::{Raw, WATCHED};
use crate::source::kubernetes::store::{Known, Shared};
use crate::validate::finding::Finding;

/// Whose fields they are.
const MANAGER: &str = "portolan";
/// How long to wait before what could not be written is tried again.
const AGAIN: Duration = Duration::from_secs(2);

/// Writes what the findings say for as long as this is the leader, until the findings end.
pub async fn write(
    client: Client,
    resources: Shared,
    mut findings: watch::Receiver<Option<Arc<Vec<Finding>>>>,
    mut leads: watch::Receiver<bool>,
) {
    loop {
        // The first value of each counts as seen only when it was used.
        let leader = *leads.borrow_and_update();
        let found = findings.borrow_and_update().clone();
        let mut failed = 0;
        if let Some(found) = found.filter(|_| leader) {
            let wanted = conditions::of(&found);
            for (key, known) in pending(&resources, &wanted) {
                if !*leads.borrow() {
                    break;
                }
                let wanted = wanted.get(&conditions::name(&key)).map_or(&[][..], Vec::as_slice);
                if let Err(error) = apply(&client, &key, &known, wanted).await {
                    // A resource that has changed meanwhile comes again with its new version; one that is gone does not.
                    let changed = matches!(&error, kube::Error::Api(status) if matches!(status.code, 404 | 409));
                    failed += 1;
                    if !changed {
                        tracing::warn!(object = conditions::name(&key).2, %error, "its status cannot be written");
                        break;
                    }
                }
            }
        }
        tokio::select! {
            changed = findings.changed() => if changed.is_err() { return },
            changed = leads.changed() => if changed.is_err() { return },
            () = sleep(AGAIN), if failed > 0 => {}
        }
    }
}

/// The resources whose conditions are not what they should be.
fn pending(resources: &Shared, wanted: &BTreeMap<Name, Vec<Condition>>) -> Vec<(ObjectKey, Known)> {
    let store = resources.read();
    let differs = |(key, known): &(&ObjectKey, &Known)| {
        let wanted = wanted.get(&conditions::name(key)).map_or(&[][..], Vec::as_slice);
        conditions::next(&known.conditions, wanted, "").is_some()
    };
    store.known().filter(differs).map(|(key, known)| (key.clone(), known.clone())).collect()
}

async fn apply(client: &Client, key: &ObjectKey, known: &Known, wanted: &[Condition]) -> kube::Result<()> {
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let (Some(conditions), Some(watched)) =
        (conditions::next(&known.conditions, wanted, &now), WATCHED.iter().find(|watched| watched.kind == key.kind))
    else {
        return Ok(());
    };
    let resource = watched.resource(known.version);
    let api: Api<Raw> = Api::namespaced_with(client.clone(), key.namespace.as_str(), &resource);
    // The list of conditions is one value in Istio's CRDs: it is written whole, those of others with it, and only over
    // the version in which they were seen.
    let patch = json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": { "name": key.name.as_str(), "namespace": key.namespace.as_str(),
                      "resourceVersion": known.resource_version },
        "status": { "conditions": conditions },
    });
    let how = PatchParams::apply(MANAGER).force();
    api.patch_status(key.name.as_str(), &how, &Patch::Apply(&patch)).await?;
    tracing::debug!(kind = watched.name, namespace = %key.namespace, name = %key.name, "status written");
    Ok(())
}
