//! The resources of a cluster that are in force, and what a change of the cluster changes about them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use portolan_registry::object::Namespace;
use serde_json::Value;

use super::kinds::Watched;
use crate::config::tree;
use crate::discovery;
use crate::model::{Change, Kind, LabelSelector, Object, ObjectKey};
use crate::source::read::{self, Outcome};
use crate::source::yaml::Review;
use crate::validate::conflict::Placed;
use crate::validate::finding::{Finding, Severity};

/// What findings have for a file.
pub const PLACE: &str = "kubernetes";

/// A resource of the cluster that was read.
#[derive(Debug)]
pub struct Read {
    key: ObjectKey,
    /// `None`: it was refused.
    object: Option<Object>,
    findings: Vec<Finding>,
    /// For those whose status may be written.
    known: Option<Known>,
}

/// What has to be known of a resource to write its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Version of the API under which it was read.
    pub version: &'static str,
    /// `metadata.resourceVersion`
    pub resource_version: String,
    /// `status.conditions` as they are.
    pub conditions: Vec<Value>,
    /// `status.addresses` as they are: address and host.
    pub addresses: Vec<(String, String)>,
}

impl Known {
    fn of(version: &'static str, value: &Value) -> Self {
        let list = |of: &str| value.pointer(of).and_then(Value::as_array);
        let text = |item: &Value, field: &str| item[field].as_str().unwrap_or_default().to_owned();
        let addresses = list("/status/addresses").into_iter().flatten();
        Known {
            version,
            resource_version: value
                .pointer("/metadata/resourceVersion")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .into(),
            conditions: list("/status/conditions").cloned().unwrap_or_default(),
            addresses: addresses.map(|item| (text(item, "value"), text(item, "host"))).collect(),
        }
    }
}

/// Reads a resource as a file would be; `None` if its name is none.
pub fn read(watched: &Watched, version: &'static str, mut value: Value) -> Option<Read> {
    if let Some(fields) = value.as_object_mut() {
        // The items of a list do not say what they are.
        fields.insert("apiVersion".into(), watched.api_version(version).into());
        fields.insert("kind".into(), watched.name.into());
    }
    let key = key(watched.kind, &value)?;
    if matches!(watched.kind, Kind::Pod | Kind::EndpointSlice | Kind::Namespace)
        && let Some(meta) = value.get_mut("metadata").and_then(Value::as_object_mut)
    {
        // Nothing is decided by them, they are long, and controllers change them all the time.
        meta.remove("annotations");
    }
    let known = watched.is_istio().then(|| Known::of(version, &value));
    let (outcomes, findings) = read::resource(&tree::from_json(value, 0), &Arc::from(PLACE));
    let object = outcomes.into_iter().find_map(|outcome| match outcome {
        Outcome::Object(object, _) if object.key() == key => Some(object),
        _ => None,
    });
    Some(Read { key, object, findings, known })
}

/// What a resource is known by.
pub fn key(kind: Kind, value: &Value) -> Option<ObjectKey> {
    let text = |name: &str| value.get("metadata")?.get(name)?.as_str();
    let name = text("name").filter(|name| !name.is_empty())?;
    // A Namespace lies in itself.
    let namespace = if kind == Kind::Namespace { name } else { text("namespace")? };
    Some(ObjectKey { kind, namespace: namespace.parse().ok()?, name: name.parse().ok()? })
}

/// What happened in the cluster.
#[derive(Debug)]
pub enum Event {
    /// This is all there is of a kind.
    Listed(Kind, Vec<Read>),
    /// A resource is new or has changed.
    Applied(Read),
    /// A resource is gone.
    Gone(ObjectKey),
    /// The kind cannot be had: what is there goes on without it.
    Unavailable(Kind),
}

impl Event {
    /// What it is about.
    pub fn kind(&self) -> Kind {
        match self {
            Event::Listed(kind, _) | Event::Unavailable(kind) => *kind,
            Event::Applied(read) => read.key.kind,
            Event::Gone(key) => key.kind,
        }
    }
}

/// Whether the object chooses Pods by their labels.
fn selects_pods(object: &Object) -> bool {
    matches!(object, Object::ServiceEntry(entry) if entry.workload_selector.is_some())
}

/// The resources in force.
#[derive(Debug, Default)]
pub struct Store {
    objects: HashMap<ObjectKey, Object>,
    /// What there is to say of resources, where there is anything.
    findings: HashMap<ObjectKey, Vec<Finding>>,
    /// What has to be known to write the status of Istio's kinds, those that were refused included.
    known: HashMap<ObjectKey, Known>,
    /// Which namespaces are considered; all objects are kept.
    selectors: Vec<LabelSelector>,
    /// How many of the objects choose Pods.
    selecting: usize,
    /// [`Store::all`] was called.
    told: bool,
    /// What there is to say of resources is not what it was.
    news: bool,
}

/// Resources as they were before a batch of events.
pub type Before = BTreeMap<ObjectKey, Option<Object>>;

impl Store {
    /// Takes an event in, and notes in `before` what was there.
    pub fn take(&mut self, event: Event, before: &mut Before) {
        match event {
            Event::Listed(kind, all) => {
                let listed: HashSet<&ObjectKey> = all.iter().map(|read| &read.key).collect();
                let held = self.objects.keys().chain(self.findings.keys()).chain(self.known.keys());
                let gone: HashSet<ObjectKey> =
                    held.filter(|key| key.kind == kind && !listed.contains(key)).cloned().collect();
                gone.into_iter().for_each(|key| self.remove(key, before));
                all.into_iter().for_each(|read| self.apply(read, before));
            }
            Event::Applied(read) => self.apply(read, before),
            Event::Gone(key) => self.remove(key, before),
            Event::Unavailable(_) => {}
        }
    }

    /// A refused resource leaves its last good version in force.
    fn apply(&mut self, read: Read, before: &mut Before) {
        if let Some(known) = read.known {
            self.known.insert(read.key.clone(), known);
        }
        let said = self.findings.remove(&read.key).unwrap_or_default();
        self.news |= said != read.findings;
        if !read.findings.is_empty() {
            self.findings.insert(read.key.clone(), read.findings);
        }
        let Some(object) = read.object else { return };
        self.selecting += usize::from(selects_pods(&object));
        let held = self.objects.insert(read.key.clone(), object);
        self.selecting -= usize::from(held.as_ref().is_some_and(selects_pods));
        before.entry(read.key).or_insert(held);
    }

    fn remove(&mut self, key: ObjectKey, before: &mut Before) {
        self.known.remove(&key);
        self.news |= self.findings.remove(&key).is_some();
        let held = self.objects.remove(&key);
        self.selecting -= usize::from(held.as_ref().is_some_and(selects_pods));
        before.entry(key).or_insert(held);
    }

    /// What is different from before.
    pub fn changes(&self, before: Before) -> Vec<Change> {
        let change = |(key, before): (ObjectKey, Option<Object>)| match (before, self.objects.get(&key)) {
            (Some(before), Some(now)) if before == *now => None,
            (_, Some(now)) => Some(Change::Apply(now.clone())),
            (Some(_), None) => Some(Change::Delete(key)),
            (None, None) => None,
        };
        before.into_iter().filter_map(change).collect()
    }

    /// Whether anything chooses Pods by their labels.
    pub fn selects_pods(&self) -> bool {
        self.selecting > 0
    }

    /// Whether [`Store::all`] was called.
    pub fn first_told(&self) -> bool {
        self.told
    }

    /// Whether what there is to say of resources has changed since this was last asked.
    pub fn news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// Everything, as changes of nothing.
    pub fn all(&mut self) -> Vec<Change> {
        self.told = true;
        self.objects.values().cloned().map(Change::Apply).collect()
    }

    /// Resources in force.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Resources in force of each kind.
    pub fn by_kind(&self) -> BTreeMap<Kind, usize> {
        let mut counts = BTreeMap::new();
        for key in self.objects.keys() {
            *counts.entry(key.kind).or_default() += 1;
        }
        counts
    }

    /// Other namespaces are considered.
    pub fn select(&mut self, selectors: &[LabelSelector]) {
        self.selectors = selectors.to_vec();
    }

    /// The namespaces that are considered; `None`: all of them.
    pub fn considered(&self) -> Option<HashSet<Namespace>> {
        discovery::considered(&self.selectors, self.objects.values().filter_map(discovery::namespace))
    }

    /// Resources whose status may be written: those that are considered.
    pub fn known(&self) -> impl Iterator<Item = (&ObjectKey, &Known)> {
        let considered = self.considered();
        let counts = move |key: &ObjectKey| considered.as_ref().is_none_or(|all| all.contains(&key.namespace));
        self.known.iter().filter(move |(key, _)| counts(key))
    }

    /// Whether the version of a resource that is in the cluster was refused, or is not known.
    pub fn refused(&self, key: &ObjectKey) -> bool {
        let errors = |findings: &Vec<Finding>| findings.iter().any(|finding| finding.severity == Severity::Error);
        !self.objects.contains_key(key) || self.findings.get(key).is_some_and(errors)
    }

    /// The resources that can be in each other's way.
    pub fn placed(&self) -> Vec<Placed> {
        let file = Arc::from(PLACE);
        let place = |object: &Object| Placed { object: object.clone(), file: Arc::clone(&file), line: 0 };
        let considered = self.considered();
        // Conflicts are between Istio's kinds; Services say which names there are.
        let counts = |object: &&Object| {
            !matches!(object, Object::Pod(_) | Object::EndpointSlice(_) | Object::Namespace(_))
                && considered.as_ref().is_none_or(|all| all.contains(&object.meta().namespace))
        };
        self.objects.values().filter(counts).map(place).collect()
    }

    /// Everything at this moment, to be compared with each other.
    pub fn review(&self) -> Review {
        let findings = self.findings.values().flatten().cloned().collect();
        // Only what is considered is placed.
        Review { findings, placed: self.placed(), selectors: Vec::new() }
    }
}

/// A store that others may look into; only its source changes it.
#[derive(Debug, Clone, Default)]
pub struct Shared(Arc<RwLock<Store>>);

impl Shared {
    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Store> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// To look into it; changes wait meanwhile.
    pub fn read(&self) -> RwLockReadGuard<'_, Store> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Store::placed`].
    pub fn placed(&self) -> Vec<Placed> {
        self.read().placed()
    }

    /// Whether what lies in the namespace is considered.
    pub fn considers(&self, namespace: &Namespace) -> bool {
        self.read().considered().is_none_or(|all| all.contains(namespace))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::source::kubernetes::kinds::WATCHED;

    fn entry(name: &str, host: &str) -> Read {
        let spec = json!({ "hosts": [host], "ports": [{ "number": 80, "name": "http", "protocol": "HTTP" }],
                           "resolution": "DNS" });
        read(&WATCHED[0], "v1", json!({ "metadata": { "name": name, "namespace": "n" }, "spec": spec })).unwrap()
    }

    fn step(store: &mut Store, events: Vec<Event>) -> Vec<String> {
        let mut before = Before::new();
        events.into_iter().for_each(|event| store.take(event, &mut before));
        let say = |change: Change| match change {
            Change::Apply(object) => format!("+{}", object.key().name),
            Change::Delete(key) => format!("-{}", key.name),
        };
        store.changes(before).into_iter().map(say).collect()
    }

    #[test]
    fn a_list_changes_only_what_is_different() {
        let mut store = Store::default();
        let all = vec![entry("a", "a.io"), entry("b", "b.io")];
        assert_eq!(step(&mut store, vec![Event::Listed(Kind::ServiceEntry, all)]), ["+a", "+b"]);
        let again = vec![entry("b", "b2.io"), entry("c", "c.io"), entry("a", "a.io")];
        assert_eq!(step(&mut store, vec![Event::Listed(Kind::ServiceEntry, again)]), ["+b", "+c"]);
        assert_eq!(step(&mut store, vec![Event::Listed(Kind::Pod, Vec::new())]), [""; 0]);
        assert_eq!(step(&mut store, vec![Event::Listed(Kind::ServiceEntry, vec![entry("a", "a.io")])]), ["-b", "-c"]);
    }

    #[test]
    fn what_comes_and_goes_within_a_batch_is_no_change() {
        let mut store = Store::default();
        let gone = Event::Gone(entry("a", "a.io").key);
        assert_eq!(step(&mut store, vec![Event::Applied(entry("a", "a.io")), gone]), [""; 0]);
        let events = vec![Event::Applied(entry("a", "x.io")), Event::Applied(entry("a", "a.io"))];
        assert_eq!(step(&mut store, events), ["+a"]);
        assert_eq!(step(&mut store, vec![Event::Applied(entry("a", "a.io"))]), [""; 0]);
    }

    #[test]
    fn a_refused_version_leaves_the_last_good_one() {
        let mut store = Store::default();
        step(&mut store, vec![Event::Applied(entry("a", "a.io")), Event::Applied(entry("b", "b.io"))]);
        let refused = entry("a", "not a host");
        assert!(refused.object.is_none() && !refused.findings.is_empty());
        assert_eq!(step(&mut store, vec![Event::Applied(refused)]), [""; 0]);
        assert_eq!(store.len(), 2);
        // A list that no longer holds it removes both it and what was said of it.
        let all = vec![entry("b", "b.io")];
        assert_eq!(step(&mut store, vec![Event::Listed(Kind::ServiceEntry, all)]), ["-a"]);
        assert!(store.review().findings().is_empty());
    }

    #[test]
    fn odd_resources_are_no_resources() {
        for odd in [json!(7), json!({}), json!({ "metadata": { "name": "a" } }), json!({ "metadata": [] })] {
            assert!(read(&WATCHED[0], "v1", odd).is_none());
        }
        let odd = read(&WATCHED[0], "v1", json!({ "metadata": { "name": "a", "namespace": "n" }, "spec": "?" }));
        assert!(odd.unwrap().object.is_none());
    }
}
