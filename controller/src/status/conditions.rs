//! From findings to conditions.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::model::ObjectKey;
use crate::source::read::kind_name;
use crate::validate::finding::{Finding, Gate, Severity};

/// Whether a resource is in force as it stands: `False` with what is wrong with it.
pub const ACCEPTED: &str = "portolan.io/Accepted";
/// Whether another resource is in its way: `True` with the other's name.
pub const CONFLICTED: &str = "portolan.io/Conflicted";

/// Most bytes of a message.
const LONGEST: usize = 1024;

/// A condition as it should be; when it came to be so is not part of that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// [`ACCEPTED`] or [`CONFLICTED`].
    pub kind: &'static str,
    /// `status`
    pub holds: bool,
    /// One word.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// What a resource is called in findings.
pub type Name = (String, String, String);

/// The name of a resource as findings have it.
pub fn name(key: &ObjectKey) -> Name {
    (kind_name(key.kind).to_owned(), key.namespace.to_string(), key.name.to_string())
}

/// What there is to say of each resource; of most there is nothing.
pub fn of(findings: &[Finding]) -> BTreeMap<Name, Vec<Condition>> {
    let mut said: BTreeMap<Name, [Vec<&Finding>; 2]> = BTreeMap::new();
    for finding in findings {
        let which = match (finding.gate, finding.severity) {
            (Gate::Webhook, Severity::Error) => 0,
            (Gate::Conflict, _) => 1,
            _ => continue,
        };
        let name = (finding.kind.clone(), finding.namespace.clone(), finding.name.clone());
        said.entry(name).or_default()[which].push(finding);
    }
    let conditions = |[errors, conflicts]: [Vec<&Finding>; 2]| {
        let accepted = (!errors.is_empty()).then(|| condition(ACCEPTED, false, &errors));
        let conflicted = (!conflicts.is_empty()).then(|| condition(CONFLICTED, true, &conflicts));
        accepted.into_iter().chain(conflicted).collect()
    };
    said.into_iter().map(|(name, findings)| (name, conditions(findings))).collect()
}

fn condition(kind: &'static str, holds: bool, findings: &[&Finding]) -> Condition {
    let mut texts: Vec<String> = findings.iter().map(|f| format!("{}: {}", f.field, f.message)).collect();
    // Findings come in no order; the same ones have to make the same text.
    texts.sort();
    let mut message = texts.join("; ");
    if message.len() > LONGEST {
        let cut = (0..=LONGEST - 3).rev().find(|&at| message.is_char_boundary(at)).unwrap_or_default();
        message.truncate(cut);
        message.push_str("...");
    }
    let code = findings.iter().map(|finding| finding.code).min().unwrap_or_default();
    Condition { kind, holds, reason: camel_case(code), message }
}

/// Reasons of conditions are written `LikeThis`.
fn camel_case(code: &str) -> String {
    code.split(['-', ' '])
        .flat_map(|word| word.chars().enumerate().map(|(at, c)| if at == 0 { c.to_ascii_uppercase() } else { c }))
        .collect()
}

/// The conditions that a resource should have, given those that it has; `None`: these will do. `now` is when they came
/// to be so, as RFC 3339 has it.
pub fn next(has: &[Value], wanted: &[Condition], now: &str) -> Option<Vec<Value>> {
    let text = |condition: &Value, field: &str| condition[field].as_str().unwrap_or_default().to_owned();
    let mut conditions = has.to_vec();
    let mut changed = false;
    for kind in [ACCEPTED, CONFLICTED] {
        let at = has.iter().position(|condition| condition["type"] == kind);
        let wanted = match (wanted.iter().find(|condition| condition.kind == kind), at) {
            (Some(wanted), _) => wanted.clone(),
            // What was said once is taken back in words.
            (None, Some(_)) if kind == ACCEPTED => {
                Condition { kind, holds: true, reason: "Accepted".into(), message: String::new() }
            }
            (None, Some(_)) => Condition { kind, holds: false, reason: "NoConflict".into(), message: String::new() },
            (None, None) => continue,
        };
        let status = if wanted.holds { "True" } else { "False" };
        let before = at.and_then(|at| has.get(at));
        let same = before.filter(|condition| text(condition, "status") == status);
        if same.is_some_and(|c| text(c, "reason") == wanted.reason && text(c, "message") == wanted.message) {
            continue;
        }
        let since = same.map(|condition| text(condition, "lastTransitionTime")).filter(|since| !since.is_empty());
        let condition = json!({ "type": kind, "status": status, "reason": wanted.reason, "message": wanted.message,
                                "lastTransitionTime": since.unwrap_or_else(|| now.to_owned()) });
        changed = true;
        match at.and_then(|at| conditions.get_mut(at)) {
            Some(place) => *place = condition,
            None => conditions.push(condition),
        }
    }
    changed.then_some(conditions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(gate: Gate, severity: Severity, code: &'static str, message: &str) -> Finding {
        Finding {
            file: "kubernetes".into(),
            line: 0,
            kind: "ServiceEntry".into(),
            namespace: "n".into(),
            name: "e".into(),
            field: "spec.hosts[0]".into(),
            gate,
            severity,
            code,
            message: message.into(),
        }
    }

    fn conditions(findings: &[Finding]) -> Vec<Condition> {
        of(findings).into_values().next().unwrap_or_default()
    }

    #[test]
    fn conditions_come_are_kept_and_are_taken_back() {
        let conflict = finding(Gate::Conflict, Severity::Warning, "duplicate-host", "also declared by n/other");
        let wanted = conditions(std::slice::from_ref(&conflict));
        let other = json!({ "type": "Healthy", "status": "True" });
        let first = next(std::slice::from_ref(&other), &wanted, "t1").unwrap();
        assert_eq!(first[0], other);
        assert_eq!((&first[1]["status"], &first[1]["reason"]), (&"True".into(), &"DuplicateHost".into()));
        assert!(first[1]["message"].as_str().unwrap().contains("n/other"));
        // The same again is nothing to write.
        assert_eq!(next(&first, &wanted, "t2"), None);
        let gone = next(&first, &[], "t3").unwrap();
        assert_eq!((&gone[1]["status"], &gone[1]["lastTransitionTime"]), (&"False".into(), &"t3".into()));
        assert_eq!(next(&gone, &[], "t4"), None);
        // Another message of the same state keeps its time.
        let more = finding(Gate::Conflict, Severity::Warning, "duplicate-host", "also declared by n/third");
        let both = next(&first, &conditions(&[more, conflict]), "t5").unwrap();
        assert_eq!(both[1]["lastTransitionTime"], "t1");
    }

    #[test]
    fn resources_without_findings_are_left_alone() {
        assert_eq!(next(&[], &[], "t"), None);
        assert_eq!(next(&[json!({ "type": "Healthy", "status": "False" })], &[], "t"), None);
        assert!(
            of(&[
                finding(Gate::Webhook, Severity::Warning, "w", "w"),
                finding(Gate::Schema, Severity::Error, "s", "s")
            ])
            .is_empty()
        );
    }

    #[test]
    fn the_order_of_findings_does_not_matter() {
        let (a, b) = (
            finding(Gate::Webhook, Severity::Error, "b-c", "one"),
            finding(Gate::Webhook, Severity::Error, "a", &"long ".repeat(500)),
        );
        let wanted = conditions(&[a.clone(), b.clone()]);
        assert_eq!(wanted, conditions(&[b, a]));
        assert_eq!((wanted[0].holds, wanted[0].reason.as_str()), (false, "A"));
        assert!(wanted[0].message.len() <= LONGEST);
    }
}
