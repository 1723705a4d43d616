//! Locality load balancing: istiod's `ValidateLocalityLbSetting` and `ValidateZoneAwareLbSetting`.

use std::collections::{BTreeMap, BTreeSet};

use crate::api::destination_rule::{Failover, LocalityLb, ZoneAwareLb};
use crate::validate::finding::Issue;
use crate::validate::shared::{check, refuse};

/// The labels that stand for region, zone and subzone.
const TOPOLOGY: [&str; 3] =
    ["topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"];

/// `localityLbSetting`
pub(super) fn locality(setting: &LocalityLb, outlier: bool, path: &str, issues: &mut Vec<Issue>) {
    let LocalityLb { distribute, failover, failover_priority, .. } = setting;
    if !distribute.is_empty() && !failover.is_empty() {
        refuse(issues, "locality", path, "can not simultaneously specify 'distribute' and 'failover'");
        return;
    }
    if !failover.is_empty()
        && let Some(label) = failover_priority.iter().find(|label| TOPOLOGY.contains(&label.as_str()))
    {
        let message =
            format!("can not simultaneously set 'failover' and topology label '{label}' in 'failover_priority'");
        refuse(issues, "locality", format!("{path}.failoverPriority"), message);
        return;
    }
    for (index, item) in distribute.iter().enumerate() {
        let field = format!("{path}.distribute[{index}].to");
        if item.to.values().any(|weight| !(1..=100).contains(weight)) {
            refuse(issues, "locality-weight", field, "locality weight must be in range [1, 100]");
            return;
        }
        let total: u32 = item.to.values().sum();
        if total != 100 {
            refuse(issues, "locality-weight", field, format!("total locality weight {total} != 100"));
            return;
        }
        // Istiod goes through a map, so which of two overlapping ones it names varies; one is named in any case.
        check(issues, "locality", field, localities(item.to.keys().map(String::as_str)));
    }
    let sources = distribute.iter().map(|item| item.from.as_str());
    check(issues, "locality", format!("{path}.distribute"), localities(sources));
    failovers(failover, failover_priority, outlier, path, issues);
}

/// `zoneAwareLbSetting`
pub(super) fn zone_aware(setting: &ZoneAwareLb, outlier: bool, path: &str, issues: &mut Vec<Issue>) {
    for (index, label) in setting.failover_priority.iter().enumerate() {
        if TOPOLOGY.contains(&label.as_str()) {
            let message = format!(
                "'failover_priority' for zone aware lb must not use topology label '{label}'; region- and zone-level \
                 routing are handled automatically"
            );
            refuse(issues, "locality", format!("{path}.failoverPriority[{index}]"), message);
        }
    }
    failovers(&setting.failover, &setting.failover_priority, outlier, path, issues);
}

fn failovers(failover: &[Failover], priority: &[String], outlier: bool, path: &str, issues: &mut Vec<Issue>) {
    if !outlier && !(failover.is_empty() && priority.is_empty()) {
        let message = "outlier detection policy must be provided for failover";
        issues.push(Issue::warned("failover-without-outlier", path, message));
    }
    for (index, Failover { from, to }) in failover.iter().enumerate() {
        let field = format!("{path}.failover[{index}]");
        if from == to {
            refuse(issues, "failover", &field, "lb failover settings must specify different regions");
        }
        if from.contains('/') || to.contains('/') {
            refuse(issues, "failover", &field, "lb failover only specifies region");
        }
        if from.contains('*') || to.contains('*') {
            refuse(issues, "failover", field, "lb failover region should not contain '*' wildcard");
        }
    }
}

/// Localities that are well formed and do not overlap, as far as istiod sees it: `a/*` after `a/b` escapes it.
fn localities<'l>(list: impl Iterator<Item = &'l str>) -> Result<(), String> {
    let mut taken: BTreeMap<&str, BTreeMap<&str, BTreeSet<&str>>> = BTreeMap::new();
    for locality in list {
        let stars = locality.bytes().filter(|&b| b == b'*').count();
        if stars > 1 || stars == 1 && !locality.ends_with('*') {
            return Err(format!("locality {locality} wildcard '*' number can not exceed 1 and must be in the end"));
        }
        let overlap = || Err(format!("locality {locality} overlap with previous specified ones"));
        if taken.contains_key("*") {
            return overlap();
        }
        let parts: Vec<&str> = locality.splitn(3, '/').collect();
        if parts.contains(&"") {
            return Err(format!("locality {locality} must not contain empty region/zone/subzone info"));
        }
        match parts.as_slice() {
            [region] if taken.contains_key(region) => return overlap(),
            [region] => {
                taken.entry(region).or_default().insert("*", BTreeSet::from(["*"]));
            }
            [region, zone] => {
                let zones = taken.entry(region).or_default();
                if zones.contains_key("*") || zones.contains_key(zone) {
                    return overlap();
                }
                zones.insert(zone, BTreeSet::from(["*"]));
            }
            [region, zone, subzone, ..] => {
                let zones = taken.entry(region).or_default();
                if zones.contains_key("*") {
                    return overlap();
                }
                let subzones = zones.entry(zone).or_default();
                if subzones.contains("*") || !subzones.insert(subzone) {
                    return overlap();
                }
            }
            [] => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_localities() {
        let check = |list: &[&str]| localities(list.iter().copied());
        for list in [vec![], vec!["a", "b"], vec!["a/b", "a/c"], vec!["a/b/c", "a/b/d"], vec!["a/*"], vec!["a", "*"]] {
            assert_eq!(check(&list), Ok(()), "{list:?}");
        }
        for list in [vec!["a", "a"], vec!["a", "a/b"], vec!["a/*", "a/b"], vec!["*", "a"], vec!["a//b"], vec!["*/a"]] {
            assert!(check(&list).is_err(), "{list:?}");
        }
    }
}
