//! WorkloadEntry, which is also an endpoint of a ServiceEntry.

use std::collections::BTreeMap;

use crate::api::decode::{self, Fields, Path};
use crate::config::tree::Node;
use crate::model::Labels;
use crate::validate::finding::Issue;

/// The spec as written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkloadEntry {
    /// IP, host name or `unix://` path.
    pub address: String,
    /// Port by service port name.
    pub ports: BTreeMap<String, u32>,
    /// Labels.
    pub labels: Labels,
    /// Network.
    pub network: String,
    /// `region/zone/subzone`
    pub locality: String,
    /// Weight.
    pub weight: u32,
    /// Service account.
    pub service_account: String,
}

/// Reads a spec; `null` reads as an empty one.
pub fn read(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> WorkloadEntry {
    let mut fields = Fields::of(node, path, issues);
    let entry = WorkloadEntry {
        address: decode::string(fields.take("address"), &path.field("address"), issues),
        ports: decode::map(fields.take("ports"), &path.field("ports"), issues, decode::uint32),
        labels: decode::string_map(fields.take("labels"), &path.field("labels"), issues),
        network: decode::string(fields.take("network"), &path.field("network"), issues),
        locality: decode::string(fields.take("locality"), &path.field("locality"), issues),
        weight: decode::uint32(fields.take("weight"), &path.field("weight"), issues),
        service_account: decode::string(fields.take("serviceAccount"), &path.field("serviceAccount"), issues),
    };
    fields.finish(path, issues);
    entry
}

/// The status of the condition `Healthy`, if `status.conditions` has one.
pub fn read_health(status: Option<&Node>, issues: &mut Vec<Issue>) -> Option<bool> {
    let path = Path::root("status");
    let mut fields = Fields::of(status, &path, issues);
    let conditions =
        decode::list(fields.take("conditions"), &path.field("conditions"), issues, |node, path, issues| {
            let mut fields = Fields::of(Some(node), path, issues);
            let kind = decode::string(fields.take("type"), &path.field("type"), issues);
            let status = decode::string(fields.take("status"), &path.field("status"), issues);
            (kind, status)
        });
    conditions.iter().find(|(kind, _)| kind == "Healthy").map(|(_, status)| status == "True")
}
