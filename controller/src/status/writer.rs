//! Writes conditions and allocated addresses by server-side apply, only where they differ from what is there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, Resource as _};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;

use super::conditions::{self, Condition, Name};
use crate::model::{Kind, ObjectKey};
use crate::publish::{Addresses, Publisher};
use crate::source::kubernetes::kinds::{Raw, WATCHED};
use crate::source::kubernetes::store::{Known, Shared};
use crate::validate::finding::Finding;

/// Whose the conditions are, and whose the addresses: what a manager does not apply again is taken away.
const CONDITIONS: &str = "portolan";
const ADDRESSES: &str = "portolan-addresses";
/// How long to wait before what could not be written is tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// Resources that are written at a time. An API server that has enough of it says so (429), which the client heeds: it waits
/// as long as it is told to before it tries that one again.
const AT_ONCE: usize = 16;

/// Writes what the findings say, and which addresses were allocated, for as long as this is the leader, until the
/// findings end.
pub async fn write(
    client: Client,
    publisher: Publisher,
    resources: Shared,
    mut findings: watch::Receiver<Option<Arc<Vec<Finding>>>>,
    mut leads: watch::Receiver<bool>,
) {
    loop {
        // The first value of each counts as seen only when it was used.
        let leader = *leads.borrow_and_update();
        let found = findings.borrow_and_update().clone();
        let mut again = false;
        if let Some(found) = found.filter(|_| leader) {
            let Ok(addresses) = publisher.addresses().await else { return };
            let due = pending(&resources, &conditions::of(&found), &addresses);
            let mut written = stream::iter(due)
                .map(|due| {
                    let (client, leads) = (&client, &leads);
                    async move {
                        let done = if *leads.borrow() { due.write(client).await } else { Ok(()) };
                        (due, done)
                    }
                })
                .buffer_unordered(AT_ONCE);
            while let Some((due, done)) = written.next().await {
                let Err(error) = done else { continue };
                again = true;
                // A resource that has changed meanwhile comes again with its new version; one that is gone does not.
                if !matches!(&error, kube::Error::Api(status) if matches!(status.code, 404 | 409)) {
                    tracing::warn!(object = conditions::name(&due.key).2, %error, "its status cannot be written");
                    break;
                }
            }
        }
        tokio::select! {
            changed = findings.changed() => if changed.is_err() { return },
            changed = leads.changed() => if changed.is_err() { return },
            () = sleep(AGAIN), if again => {}
        }
    }
}

/// A resource whose status is not what it should be.
struct Due {
    key: ObjectKey,
    known: Known,
    /// Conditions that it should have, where they are not as they should be.
    conditions: Option<Vec<Condition>>,
    /// Likewise its addresses and their hosts.
    addresses: Option<Vec<(String, String)>>,
}

fn pending(resources: &Shared, wanted: &BTreeMap<Name, Vec<Condition>>, addresses: &Addresses) -> Vec<Due> {
    let store = resources.read();
    let due = |(key, known): (&ObjectKey, &Known)| {
        let wanted = wanted.get(&conditions::name(key)).map_or(&[][..], Vec::as_slice);
        let conditions = conditions::next(&known.conditions, wanted, "").map(|_| wanted.to_vec());
        // Of an entry that was refused nothing is known, or what is known is not of this version.
        let judged = key.kind == Kind::ServiceEntry && !store.refused(key);
        let addresses = addresses.get(key).filter(|addresses| judged && **addresses != known.addresses).cloned();
        (conditions.is_some() || addresses.is_some()).then(|| Due {
            key: key.clone(),
            known: known.clone(),
            conditions,
            addresses,
        })
    };
    store.known().filter_map(due).collect()
}

impl Due {
    /// Only over the version that was seen: the lists are one value each in Istio's CRDs, and are written whole, what
    /// others have in them with it.
    async fn write(&self, client: &Client) -> kube::Result<()> {
        let mut version = self.known.resource_version.clone();
        if let Some(wanted) = &self.conditions {
            let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            if let Some(next) = conditions::next(&self.known.conditions, wanted, &now) {
                version = self.apply(client, CONDITIONS, &version, json!({ "conditions": next })).await?;
            }
        }
        if let Some(addresses) = &self.addresses {
            let list: Vec<Value> =
                addresses.iter().map(|(value, host)| json!({ "value": value, "host": host })).collect();
            self.apply(client, ADDRESSES, &version, json!({ "addresses": list })).await?;
        }
        Ok(())
    }

    /// Says which version the resource has then.
    async fn apply(&self, client: &Client, manager: &str, version: &str, status: Value) -> kube::Result<String> {
        let Some(watched) = WATCHED.iter().find(|watched| watched.kind == self.key.kind) else {
            return Ok(version.to_owned());
        };
        let (namespace, name) = (self.key.namespace.as_str(), self.key.name.as_str());
        let resource = watched.resource(self.known.version);
        let api: Api<Raw> = Api::namespaced_with(client.clone(), namespace, &resource);
        let patch = json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": { "name": name, "namespace": namespace, "resourceVersion": version },
            "status": status,
        });
        let now = api.patch_status(name, &PatchParams::apply(manager).force(), &Patch::Apply(&patch)).await?;
        tracing::debug!(kind = watched.name, namespace, name, manager, "status written");
        Ok(now.meta().resource_version.clone().unwrap_or_default())
    }
}
