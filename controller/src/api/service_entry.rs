//! ServiceEntry.

use crate::api::decode::{self, Fields, Path};
use crate::api::workload_entry::{self, WorkloadEntry};
use crate::config::tree::Node;
use crate::model::Labels;
use crate::validate::finding::Issue;

/// Names and numbers of `spec.location`.
pub const LOCATIONS: &[(&str, i32)] = &[("MESH_EXTERNAL", 0), ("MESH_INTERNAL", 1)];
/// Names and numbers of `spec.resolution`.
pub const RESOLUTIONS: &[(&str, i32)] =
    &[("NONE", 0), ("STATIC", 1), ("DNS", 2), ("DNS_ROUND_ROBIN", 3), ("DYNAMIC_DNS", 4)];

/// A port as written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Port {
    /// Number.
    pub number: u32,
    /// Name.
    pub name: String,
    /// Protocol.
    pub protocol: String,
    /// Target port, 0 if none.
    pub target_port: u32,
}

/// The spec as written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Hosts.
    pub hosts: Vec<String>,
    /// Addresses.
    pub addresses: Vec<String>,
    /// Ports.
    pub ports: Vec<Port>,
    /// Number of the location.
    pub location: i32,
    /// Number of the resolution.
    pub resolution: i32,
    /// Endpoints.
    pub endpoints: Vec<WorkloadEntry>,
    /// Labels of the selector, where there is one.
    pub workload_selector: Option<Labels>,
    /// exportTo.
    pub export_to: Vec<String>,
    /// subjectAltNames.
    pub subject_alt_names: Vec<String>,
}

/// Reads the spec.
pub fn read(node: Option<&Node>, issues: &mut Vec<Issue>) -> ServiceEntry {
    let path = Path::root("spec");
    let mut fields = Fields::of(node, &path, issues);
    let entry = ServiceEntry {
        hosts: decode::strings(fields.take("hosts"), &path.field("hosts"), issues),
        addresses: decode::strings(fields.take("addresses"), &path.field("addresses"), issues),
        ports: decode::list(fields.take("ports"), &path.field("ports"), issues, port),
        location: decode::enumeration(fields.take("location"), LOCATIONS, &path.field("location"), issues),
        resolution: decode::enumeration(fields.take("resolution"), RESOLUTIONS, &path.field("resolution"), issues),
        endpoints: decode::list(fields.take("endpoints"), &path.field("endpoints"), issues, |node, path, issues| {
            workload_entry::read(Some(node), path, issues)
        }),
        workload_selector: fields.take("workloadSelector").map(|node| {
            let path = path.field("workloadSelector");
            let mut fields = Fields::of(Some(node), &path, issues);
            let labels = decode::string_map(fields.take("labels"), &path.field("labels"), issues);
            fields.finish(&path, issues);
            labels
        }),
        export_to: decode::strings(fields.take("exportTo"), &path.field("exportTo"), issues),
        subject_alt_names: decode::strings(fields.take("subjectAltNames"), &path.field("subjectAltNames"), issues),
    };
    fields.finish(&path, issues);
    entry
}

fn port(node: &Node, path: &Path<'_>, issues: &mut Vec<Issue>) -> Port {
    let mut fields = Fields::of(Some(node), path, issues);
    let port = Port {
        number: decode::uint32(fields.take("number"), &path.field("number"), issues),
        name: decode::string(fields.take("name"), &path.field("name"), issues),
        protocol: decode::string(fields.take("protocol"), &path.field("protocol"), issues),
        target_port: decode::uint32(fields.take("targetPort"), &path.field("targetPort"), issues),
    };
    fields.finish(path, issues);
    port
}

/// `status.addresses`: the address and the host it stands for.
pub fn read_status(status: Option<&Node>, issues: &mut Vec<Issue>) -> Vec<(String, String)> {
    let path = Path::root("status");
    let mut fields = Fields::of(status, &path, issues);
    decode::list(fields.take("addresses"), &path.field("addresses"), issues, |node, path, issues| {
        let mut fields = Fields::of(Some(node), path, issues);
        let value = decode::string(fields.take("value"), &path.field("value"), issues);
        let host = decode::string(fields.take("host"), &path.field("host"), issues);
        (value, host)
    })
}
