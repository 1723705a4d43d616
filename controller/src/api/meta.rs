//! Object metadata.

use std::str::FromStr;

use portolan_registry::object::{Namespace, ObjectNameError};

use crate::api::decode::{self, Path};
use crate::config::tree::Node;
use crate::model::Meta;
use crate::validate::finding::Issue;

/// Reads `metadata`. The namespace of a resource that names none is `default`.
///
/// Errors in it are of the kind that hide which object is meant; [`Issue::rejects`] tells.
pub fn read(root: &Node, issues: &mut Vec<Issue>) -> Meta {
    let path = Path::root("metadata");
    let mut fields = decode::Fields::of(root.get("metadata"), &path, issues);
    let name = object_name(fields.take("name"), &path.field("name"), issues);
    let namespace: Namespace = object_name(fields.take("namespace"), &path.field("namespace"), issues);
    let labels = decode::string_map(fields.take("labels"), &path.field("labels"), issues);
    let annotations = decode::string_map(fields.take("annotations"), &path.field("annotations"), issues);
    let written = decode::string(fields.take("creationTimestamp"), &path.field("creationTimestamp"), issues);
    let created = match written.parse::<jiff::Timestamp>() {
        _ if written.is_empty() => 0,
        Ok(time) => time.as_second(),
        Err(_) => {
            let message = format!("{written:?} is no RFC 3339 time");
            issues.push(Issue::refused("timestamp", path.field("creationTimestamp"), message));
            0
        }
    };
    // The rest of metadata (uid, managedFields, ...) is the API server's business.
    let namespace = if namespace.is_empty() { "default".parse().unwrap_or_default() } else { namespace };
    Meta { namespace, name, created, labels, annotations }
}

fn object_name<T>(node: Option<&Node>, path: &Path, issues: &mut Vec<Issue>) -> T
where
    T: FromStr<Err = ObjectNameError> + Default,
{
    let written = decode::string(node, path, issues);
    written.parse().unwrap_or_else(|error: ObjectNameError| {
        issues.push(Issue::refused("name", *path, error.to_string()));
        T::default()
    })
}
