//! What is wrong right now, so that each reload says once what is new and what is gone.

use std::collections::{BTreeMap, btree_map::Entry};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use crate::validate::finding::{Finding, Gate, Severity};

/// Findings in force.
#[derive(Debug, Default)]
pub struct Ledger(BTreeMap<Key, Finding>);

/// What makes two findings the same one. Lines move when something above them changes, so they do not count.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    file: String,
    object: [String; 3],
    field: String,
    code: &'static str,
    message: String,
}

impl Key {
    fn of(finding: &Finding) -> Self {
        Key {
            file: finding.file.to_string(),
            object: [finding.kind.clone(), finding.namespace.clone(), finding.name.clone()],
            field: finding.field.clone(),
            code: finding.code,
            message: without_lines(&finding.message),
        }
    }
}

/// The text without the numbers that follow a colon.
fn without_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut number = false;
    for c in text.chars() {
        number &= c.is_ascii_digit();
        if !number {
            out.push(c);
        }
        number |= c == ':';
    }
    out
}

/// What a reload changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Findings that were not in force before.
    pub new: Vec<Finding>,
    /// Findings that are not in force any more.
    pub gone: Vec<Finding>,
}

impl Ledger {
    /// Puts these findings in force and says what that changes.
    pub fn replace(&mut self, findings: Vec<Finding>) -> Difference {
        let mut now = BTreeMap::new();
        let mut new = Vec::new();
        for finding in findings {
            let Entry::Vacant(place) = now.entry(Key::of(&finding)) else { continue };
            if !self.0.contains_key(place.key()) {
                new.push(finding.clone());
            }
            place.insert(finding);
        }
        let before = std::mem::replace(&mut self.0, now);
        let gone =
            before.into_iter().filter(|(key, _)| !self.0.contains_key(key)).map(|(_, finding)| finding).collect();
        Difference { new, gone }
    }

    fn counts(&self) -> BTreeMap<Count, u64> {
        let mut counts = BTreeMap::new();
        for finding in self.0.values() {
            *counts.entry((finding.gate, finding.severity, finding.code)).or_default() += 1;
        }
        counts
    }
}

/// Gate, severity and code of findings.
pub type Count = (Gate, Severity, &'static str);

/// The state of the sources, for metrics; any thread may read it.
#[derive(Debug, Default)]
pub struct Status {
    findings: Mutex<BTreeMap<Count, u64>>,
    objects: AtomicU64,
    applied: AtomicU64,
    refused: AtomicU64,
}

impl Status {
    /// Findings in force, by gate, severity and code.
    pub fn findings(&self) -> BTreeMap<Count, u64> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Resources in force.
    pub fn objects(&self) -> u64 {
        self.objects.load(Relaxed)
    }

    /// Reloads without an error, and those of which something was refused.
    pub fn reloads(&self) -> (u64, u64) {
        (self.applied.load(Relaxed), self.refused.load(Relaxed))
    }

    pub(crate) fn loaded(&self, ledger: &Ledger, objects: usize) {
        *self.findings.lock().unwrap_or_else(PoisonError::into_inner) = ledger.counts();
        self.objects.store(objects as u64, Relaxed);
    }

    pub(crate) fn reloaded(&self, clean: bool) {
        let counter = if clean { &self.applied } else { &self.refused };
        counter.fetch_add(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(line: u32, message: &str) -> Finding {
        Finding {
            file: "a.yaml".into(),
            line,
            kind: "ServiceEntry".into(),
            namespace: "n".into(),
            name: "e".into(),
            field: "spec".into(),
            gate: Gate::Conflict,
            severity: Severity::Warning,
            code: "c",
            message: message.into(),
        }
    }

    #[test]
    fn each_finding_is_new_once_and_gone_once() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.replace(vec![finding(1, "x")]).new.len(), 1);
        assert_eq!(ledger.replace(vec![finding(1, "x")]), Difference::default());
        let both = ledger.replace(vec![finding(2, "y")]);
        assert_eq!((both.new[0].message.as_str(), both.gone[0].message.as_str()), ("y", "x"));
        assert_eq!(ledger.replace(Vec::new()).gone.len(), 1);
    }

    #[test]
    fn a_finding_that_only_moved_is_the_same() {
        let mut ledger = Ledger::default();
        ledger.replace(vec![finding(1, "stands in b.yaml:7; this one counts")]);
        assert_eq!(ledger.replace(vec![finding(9, "stands in b.yaml:81; this one counts")]), Difference::default());
        assert_eq!(without_lines("port 80 in a/b (c.yaml:12)"), "port 80 in a/b (c.yaml:)");
    }

    #[test]
    fn what_is_counted_is_what_is_in_force() {
        let mut ledger = Ledger::default();
        let status = Status::default();
        ledger.replace(vec![finding(1, "x"), finding(1, "y"), finding(5, "y")]);
        status.loaded(&ledger, 3);
        assert_eq!(status.findings(), BTreeMap::from([((Gate::Conflict, Severity::Warning, "c"), 2)]));
        ledger.replace(Vec::new());
        status.loaded(&ledger, 3);
        assert!(status.findings().is_empty());
    }
}
