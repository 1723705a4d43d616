//! Which namespaces are considered: MeshConfig's `discoverySelectors`, as istiod's filter of namespaces
//! (`pkg/kube/namespace/filter.go`) has them. One that matches is enough, and with none there is no question. A namespace
//! that nobody has seen matches nothing, and the root namespace is one like any other.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use portolan_registry::object::Namespace;

use crate::model::{Change, Kind, LabelOperator, LabelSelector, Labels, Meta, Object, ObjectKey};
use crate::validate::conflict::Placed;
use crate::validate::finding::{Finding, Gate, Severity};

impl LabelSelector {
    /// Whether all that is asked holds.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.expressions.iter().all(|(key, operator)| operator.holds(labels.get(key)))
    }
}

impl LabelOperator {
    fn holds(&self, value: Option<&String>) -> bool {
        match self {
            LabelOperator::In(values) => value.is_some_and(|value| values.contains(value)),
            LabelOperator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            LabelOperator::Exists => value.is_some(),
            LabelOperator::DoesNotExist => value.is_none(),
        }
    }
}

/// The namespaces that are considered; `None`: all of them.
pub fn considered<'a>(
    selectors: &[LabelSelector],
    namespaces: impl IntoIterator<Item = (&'a Namespace, &'a Labels)>,
) -> Option<HashSet<Namespace>> {
    if selectors.is_empty() {
        return None;
    }
    let chosen = |(_, labels): &(&Namespace, &Labels)| selectors.iter().any(|selector| selector.matches(labels));
    Some(namespaces.into_iter().filter(chosen).map(|(name, _)| name.clone()).collect())
}

/// What of an object that is a Namespace decides.
pub fn namespace(object: &Object) -> Option<(&Namespace, &Labels)> {
    match object {
        Object::Namespace(meta) => Some((&meta.namespace, &meta.labels)),
        _ => None,
    }
}

/// Leaves what is considered. For each namespace that has objects and no Namespace, so that nobody can know, there is
/// a finding.
pub fn leave(placed: &mut Vec<Placed>, selectors: &[LabelSelector]) -> Vec<Finding> {
    let Some(considered) = considered(selectors, placed.iter().filter_map(|placed| namespace(&placed.object))) else {
        return Vec::new();
    };
    let known: HashSet<Namespace> =
        placed.iter().filter_map(|placed| namespace(&placed.object)).map(|(name, _)| name.clone()).collect();
    let mut told = HashSet::new();
    let mut findings = Vec::new();
    for of in placed.iter() {
        let meta: &Meta = of.object.meta();
        if !known.contains(&meta.namespace) && told.insert(meta.namespace.clone()) {
            findings.push(Finding {
                file: of.file.clone(),
                line: of.line,
                kind: "Namespace".into(),
                namespace: meta.namespace.to_string(),
                name: meta.namespace.to_string(),
                field: "metadata.labels".into(),
                gate: Gate::Conflict,
                severity: Severity::Warning,
                code: "unknown-namespace",
                message: "the mesh has discoverySelectors, and there is no Namespace of this name for them to match: \
                          what lies in it is passed over"
                    .into(),
            });
        }
    }
    placed.retain(|placed| considered.contains(&placed.object.meta().namespace));
    findings
}

/// Keeps aside what lies in namespaces that are not considered, until they are.
#[derive(Debug, Default)]
pub struct Discovery {
    selectors: Vec<LabelSelector>,
    labels: HashMap<Namespace, Labels>,
    considered: Option<HashSet<Namespace>>,
    aside: HashMap<ObjectKey, Object>,
}

impl Discovery {
    /// Other selectors count, from the next [`Discovery::sift`] on.
    pub fn select(&mut self, selectors: &[LabelSelector]) {
        self.selectors = selectors.to_vec();
    }

    fn considers(&self, key: &ObjectKey) -> bool {
        self.considered.as_ref().is_none_or(|considered| considered.contains(&key.namespace))
    }

    /// What changes for those who are told nothing of the rest; `held` is what they hold. Each object is in the changes
    /// at most once, and no Namespace.
    pub fn sift<'c>(&mut self, changes: &'c [Change], held: &HashMap<ObjectKey, Object>) -> Cow<'c, [Change]> {
        let mut plain = true;
        for change in changes {
            match change {
                Change::Apply(Object::Namespace(meta)) => {
                    self.labels.insert(meta.namespace.clone(), meta.labels.clone());
                }
                Change::Delete(key) if key.kind == Kind::Namespace => drop(self.labels.remove(&key.namespace)),
                _ => continue,
            }
            plain = false;
        }
        let now = considered(&self.selectors, &self.labels);
        let moved = now != self.considered;
        self.considered = now;
        if plain && !moved && self.considered.is_none() {
            return Cow::Borrowed(changes);
        }
        let mut out = Vec::new();
        let mut touched = HashSet::new();
        for change in changes.iter().filter(|change| change.kind() != Kind::Namespace) {
            let key = change.key();
            self.aside.remove(&key);
            if self.considers(&key) {
                out.push(change.clone());
            } else {
                if held.contains_key(&key) {
                    out.push(Change::Delete(key.clone()));
                }
                if let Change::Apply(object) = change {
                    self.aside.insert(key.clone(), object.clone());
                }
            }
            touched.insert(key);
        }
        if moved {
            for (key, object) in held.iter().filter(|(key, _)| !touched.contains(*key)) {
                if !self.considers(key) {
                    self.aside.insert(key.clone(), object.clone());
                    out.push(Change::Delete(key.clone()));
                }
            }
            let aside = std::mem::take(&mut self.aside);
            let (back, aside): (HashMap<_, _>, _) = aside.into_iter().partition(|(key, _)| self.considers(key));
            self.aside = aside;
            tracing::info!(
                namespaces = self.considered.as_ref().map(HashSet::len),
                resources = back.len(),
                passed_over = self.aside.len(),
                "discoverySelectors: other namespaces are considered"
            );
            out.extend(back.into_values().map(Change::Apply));
        }
        Cow::Owned(out)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::WorkloadEntry;

    fn labels(all: &[(&str, &str)]) -> Labels {
        all.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn selector(all: &[(&str, &str)]) -> LabelSelector {
        LabelSelector { labels: labels(all), expressions: Vec::new() }
    }

    fn expression(operator: LabelOperator) -> LabelSelector {
        LabelSelector { labels: Labels::new(), expressions: vec![("a".into(), operator)] }
    }

    #[test]
    fn selectors_match_as_kubernetes_has_it() {
        let (one, other, none) = (labels(&[("a", "1")]), labels(&[("a", "2"), ("b", "1")]), labels(&[]));
        let ask = |selector: &LabelSelector| [&one, &other, &none].map(|labels| selector.matches(labels));
        let values = || vec!["1".to_owned(), "3".to_owned()];
        assert_eq!(ask(&LabelSelector::default()), [true, true, true]);
        assert_eq!(ask(&selector(&[("a", "1")])), [true, false, false]);
        assert_eq!(ask(&selector(&[("a", "2"), ("b", "1")])), [false, true, false]);
        assert_eq!(ask(&selector(&[("a", "1"), ("b", "1")])), [false, false, false]);
        assert_eq!(ask(&expression(LabelOperator::In(values()))), [true, false, false]);
        assert_eq!(ask(&expression(LabelOperator::NotIn(values()))), [false, true, true]);
        assert_eq!(ask(&expression(LabelOperator::Exists)), [true, true, false]);
        assert_eq!(ask(&expression(LabelOperator::DoesNotExist)), [false, false, true]);
        let both = LabelSelector { labels: labels(&[("b", "1")]), ..expression(LabelOperator::Exists) };
        assert_eq!(ask(&both), [false, true, false]);
    }

    fn meta(namespace: &str, name: &str) -> Meta {
        Meta { namespace: namespace.parse().unwrap(), name: name.parse().unwrap(), ..Meta::default() }
    }

    fn object(namespace: &str, name: &str) -> Change {
        let meta = meta(namespace, name);
        Change::Apply(Object::WorkloadEntry(Arc::new(WorkloadEntry { meta, ..WorkloadEntry::default() })))
    }

    fn labelled(name: &str, all: &[(&str, &str)]) -> Change {
        Change::Apply(Object::Namespace(Arc::new(Meta { labels: labels(all), ..meta(name, name) })))
    }

    fn gone(change: &Change) -> Change {
        Change::Delete(change.key())
    }

    /// A reader of what is left, as the engine is.
    #[derive(Default)]
    struct Reader(Discovery, HashMap<ObjectKey, Object>);

    impl Reader {
        fn take(&mut self, changes: &[Change]) -> Vec<String> {
            let mut said = Vec::new();
            for change in self.0.sift(changes, &self.1).iter() {
                let key = change.key();
                match change {
                    Change::Apply(object) => {
                        said.push(format!("+{}", key.name));
                        self.1.insert(key, object.clone());
                    }
                    Change::Delete(_) => {
                        said.push(format!("-{}", key.name));
                        assert!(self.1.remove(&key).is_some(), "{said:?}: it was not there");
                    }
                }
            }
            said.sort();
            said
        }
    }

    #[test]
    fn a_namespace_brings_and_takes_its_objects() {
        let mut reader = Reader::default();
        assert_eq!(reader.take(&[object("n", "a"), object("m", "b"), labelled("n", &[])]), ["+a", "+b"]);
        reader.0.select(&[selector(&[("on", "1")]), selector(&[("also", "1")])]);
        assert_eq!(reader.take(&[]), ["-a", "-b"]);
        assert_eq!(reader.take(&[labelled("n", &[("on", "1")])]), ["+a"]);
        // Known before it is seen, and not changed without being considered.
        assert_eq!(reader.take(&[object("m", "c"), object("m", "b")]), [""; 0]);
        assert_eq!(reader.take(&[labelled("m", &[("also", "1")]), object("m", "d")]), ["+b", "+c", "+d"]);
        assert_eq!(reader.take(&[labelled("m", &[]), gone(&object("m", "d")), object("m", "c")]), ["-b", "-c", "-d"]);
        assert_eq!(reader.take(&[gone(&object("m", "b"))]), [""; 0]);
        assert_eq!(reader.take(&[gone(&labelled("n", &[]))]), ["-a"]);
        reader.0.select(&[]);
        assert_eq!(reader.take(&[]), ["+a", "+c"]);
    }
}
