//! Root VirtualServices with the routes of their delegates in place (SEMANTICS 4.7).

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::api::virtual_service::{HttpMatch, HttpRoute, StringMatch, VirtualService};
use crate::model::{Checked, Labels};

/// The routes of a VirtualService. `delegate` finds a VirtualService without hosts by namespace and name, if it is
/// exported to the root's namespace. A route whose delegate is not there is dropped.
pub(crate) fn merged<'v>(
    root: &'v Checked<VirtualService>,
    delegate: impl Fn(&str, &str) -> Option<&'v Checked<VirtualService>>,
) -> Vec<Cow<'v, HttpRoute>> {
    let mut out = Vec::with_capacity(root.spec.http.len());
    for route in &root.spec.http {
        let Some(reference) = &route.delegate else {
            out.push(Cow::Borrowed(route));
            continue;
        };
        let namespace = match reference.namespace.as_str() {
            "" => root.meta.namespace.as_str(),
            given => given,
        };
        let Some(found) = delegate(namespace, &reference.name) else { continue };
        out.extend(found.spec.http.iter().filter_map(|own| combine(route, own)).map(Cow::Owned));
    }
    out
}

/// A delegate's route under a root's; `None` where the two contradict each other.
fn combine(root: &HttpRoute, own: &HttpRoute) -> Option<HttpRoute> {
    let mut out = own.clone();
    out.matches = matches(&root.matches, &own.matches)?;
    out.name = match (root.name.as_str(), own.name.as_str()) {
        ("", name) | (name, "") => name.to_owned(),
        (root, own) => format!("{root}-{own}"),
    };
    out.rewrite = out.rewrite.or_else(|| root.rewrite.clone());
    out.direct_response = out.direct_response.or_else(|| root.direct_response.clone());
    out.timeout = out.timeout.or(root.timeout);
    out.retries = out.retries.or_else(|| root.retries.clone());
    out.fault = out.fault.or_else(|| root.fault.clone());
    out.mirror = out.mirror.or_else(|| root.mirror.clone());
    out.mirror_percent = out.mirror_percent.or(root.mirror_percent);
    out.mirror_percentage = out.mirror_percentage.or_else(|| root.mirror_percentage.clone());
    if out.mirrors.is_empty() {
        out.mirrors.clone_from(&root.mirrors);
    }
    out.cors_policy = out.cors_policy.or_else(|| root.cors_policy.clone());
    out.headers = out.headers.or_else(|| root.headers.clone());
    Some(out)
}

/// Each condition of the delegate with each of the root's that it does not contradict; one that contradicts all drops
/// the route.
fn matches(root: &[HttpMatch], own: &[HttpMatch]) -> Option<Vec<HttpMatch>> {
    if root.is_empty() || own.is_empty() {
        return Some(if own.is_empty() { root } else { own }.to_vec());
    }
    let mut out = Vec::new();
    for ours in own {
        let before = out.len();
        out.extend(root.iter().filter(|theirs| !conflict(theirs, ours)).map(|theirs| both(theirs, ours)));
        if out.len() == before {
            return None;
        }
    }
    Some(out)
}

fn conflict(root: &HttpMatch, own: &HttpMatch) -> bool {
    let maps = |root: &BTreeMap<String, StringMatch>, own: &BTreeMap<String, StringMatch>| {
        own.iter().any(|(name, ours)| texts(root.get(name), Some(ours)))
    };
    let labels = |root: &Labels, own: &Labels| own.iter().any(|(k, v)| root.get(k).is_some_and(|other| other != v));
    texts(root.uri.as_ref(), own.uri.as_ref())
        || texts(root.scheme.as_ref(), own.scheme.as_ref())
        || texts(root.method.as_ref(), own.method.as_ref())
        || texts(root.authority.as_ref(), own.authority.as_ref())
        || maps(&root.headers, &own.headers)
        || maps(&root.without_headers, &own.without_headers)
        || maps(&root.query_params, &own.query_params)
        || root.ignore_uri_case != own.ignore_uri_case
        || root.port != 0 && own.port != 0 && root.port != own.port
        || !root.source_namespace.is_empty() && root.source_namespace != own.source_namespace
        || labels(&root.source_labels, &own.source_labels)
        || !root.gateways.is_empty() && own.gateways.iter().any(|gateway| !root.gateways.contains(gateway))
}

fn texts(root: Option<&StringMatch>, own: Option<&StringMatch>) -> bool {
    let given = |text: Option<&StringMatch>| text.filter(|t| **t != StringMatch::default()).cloned();
    let (Some(root), Some(own)) = (given(root), given(own)) else { return false };
    if root.regex.is_some() || own.regex.is_some() {
        return true;
    }
    match (&root.exact, &root.prefix) {
        (Some(exact), _) => own.exact.as_ref() != Some(exact),
        (None, Some(prefix)) => {
            !own.exact.as_ref().or(own.prefix.as_ref()).is_some_and(|text| text.starts_with(prefix.as_str()))
        }
        (None, None) => false,
    }
}

fn both(root: &HttpMatch, own: &HttpMatch) -> HttpMatch {
    let maps = |root: &BTreeMap<String, StringMatch>, own: &BTreeMap<String, StringMatch>| {
        root.iter().chain(own).map(|(k, v)| (k.clone(), v.clone())).collect()
    };
    let mut out = own.clone();
    out.uri = out.uri.or_else(|| root.uri.clone());
    out.scheme = out.scheme.or_else(|| root.scheme.clone());
    out.method = out.method.or_else(|| root.method.clone());
    out.authority = out.authority.or_else(|| root.authority.clone());
    out.headers = maps(&root.headers, &own.headers);
    out.without_headers = maps(&root.without_headers, &own.without_headers);
    out.query_params = maps(&root.query_params, &own.query_params);
    out.source_labels =
        root.source_labels.iter().chain(&own.source_labels).map(|(k, v)| (k.clone(), v.clone())).collect();
    if out.port == 0 {
        out.port = root.port;
    }
    if out.gateways.is_empty() {
        out.gateways.clone_from(&root.gateways);
    }
    if out.source_namespace.is_empty() {
        out.source_namespace.clone_from(&root.source_namespace);
    }
    out.name = match (root.name.as_str(), own.name.as_str()) {
        ("", name) | (name, "") => name.to_owned(),
        (root, own) => format!("{root}-{own}"),
    };
    out
}
