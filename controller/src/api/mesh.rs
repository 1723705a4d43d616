//! Istio's MeshConfig: the fields that Portolan honours. Every other field is reported as ignored.

use std::time::Duration;

use crate::api::decode::{self, Fields, Path};
use crate::api::message::Decode;
use crate::config::tree::{Node, Value};
use crate::model::{LabelOperator, LabelSelector, MeshConfig, OutboundMode};
use crate::validate::finding::Issue;
use crate::validate::{http_route, predicates};

const MODES: &[(&str, i32)] = &[("REGISTRY_ONLY", 0), ("ALLOW_ANY", 1), ("ALLOW_ANY_DYNAMIC_DNS", 3)];

/// Reads a MeshConfig over Istio's defaults. With an error among the issues the result must not be used: a misspelt
/// outbound policy must not open the mesh.
pub fn read(root: &Node, issues: &mut Vec<Issue>) -> MeshConfig {
    let mut mesh = MeshConfig::default();
    let fields: &[_] = match &root.value {
        Value::Map(fields) => fields,
        Value::Null => &[],
        _ => {
            issues.push(Issue::refused("type", "", format!("a MeshConfig is an object, not {}", root.type_name())));
            &[]
        }
    };
    for field in fields {
        let path = Path::root(&field.key);
        let value = Some(&field.value);
        if field.value.is_null() {
            continue;
        }
        match field.key.as_str() {
            "outboundTrafficPolicy" | "outbound_traffic_policy" => {
                let mut policy = Fields::of(value, &path, issues);
                let mode = policy.take("mode");
                // The zero value of the enum, which an empty policy therefore means.
                mesh.outbound = match decode::enumeration(mode, MODES, &path.field("mode"), issues) {
                    0 => OutboundMode::RegistryOnly,
                    1 => OutboundMode::AllowAny,
                    3 => OutboundMode::AllowAnyDynamicDns,
                    other => {
                        issues.push(Issue::refused("enum", path.field("mode"), format!("no mode has number {other}")));
                        OutboundMode::RegistryOnly
                    }
                };
                policy.finish(&path, issues);
            }
            "proxyHttpPort" | "proxy_http_port" => {
                let port = decode::uint32(value, &path, issues);
                mesh.proxy_http_port = u16::try_from(port).ok().filter(|&port| port != 0);
                if port != 0
                    && let Err(message) = predicates::port(port)
                {
                    issues.push(Issue::refused("port-range", path, message));
                }
            }
            "rootNamespace" | "root_namespace" => {
                let namespace = decode::string(value, &path, issues);
                if predicates::is_dns_label(&namespace) {
                    mesh.root_namespace = namespace;
                } else if !namespace.is_empty() {
                    issues.push(Issue::refused("namespace", path, format!("{namespace:?} is no namespace")));
                }
            }
            "trustDomain" | "trust_domain" => {
                let domain = decode::string(value, &path, issues);
                match predicates::fqdn(&domain) {
                    _ if domain.is_empty() => {}
                    Ok(()) => mesh.trust_domain = domain,
                    Err(message) => issues.push(Issue::refused("trust-domain", path, message)),
                }
            }
            "defaultServiceExportTo"
            | "default_service_export_to"
            | "defaultVirtualServiceExportTo"
            | "default_virtual_service_export_to" => {
                let entries = decode::strings(value, &path, issues);
                for (index, entry) in entries.iter().enumerate() {
                    if !matches!(entry.as_str(), "." | "*" | "~") && !predicates::is_dns_label(entry) {
                        let message = "only ., *, ~ or a namespace is allowed";
                        issues.push(Issue::refused("export-entry", path.item(index), message));
                    }
                }
                let virtual_service = field.key.contains("irtual");
                let default = match virtual_service {
                    true => &mut mesh.default_virtual_service_export_to,
                    false => &mut mesh.default_service_export_to,
                };
                if !entries.is_empty() {
                    *default = entries;
                }
            }
            "connectTimeout" | "connect_timeout" => {
                mesh.connect_timeout = duration(value, &path, issues).unwrap_or(mesh.connect_timeout);
            }
            "dnsRefreshRate" | "dns_refresh_rate" => {
                mesh.dns_refresh_rate = duration(value, &path, issues).unwrap_or(mesh.dns_refresh_rate);
            }
            "discoverySelectors" | "discovery_selectors" => {
                mesh.discovery_selectors = decode::list(value, &path, issues, selector);
            }
            "defaultHttpRetryPolicy" | "default_http_retry_policy" => {
                mesh.default_retry = Option::decode(value, &path, issues);
                if let Some(retry) = &mesh.default_retry {
                    http_route::retries(retry, &field.key, issues);
                }
            }
            _ => issues.push(Issue::warned("ignored-field", path, "not supported by Portolan, ignored")),
        }
    }
    mesh
}

/// A `LabelSelector`, held to what Kubernetes' own asks (`labels.NewRequirement`).
fn selector(node: &Node, path: &Path<'_>, issues: &mut Vec<Issue>) -> LabelSelector {
    let mut fields = Fields::of(Some(node), path, issues);
    let place = path.field("matchLabels");
    let labels = decode::string_map(fields.take("matchLabels"), &place, issues);
    for (key, value) in &labels {
        requirement(key, std::slice::from_ref(value), &place.field(key), issues);
    }
    let expressions =
        decode::list(fields.take("matchExpressions"), &path.field("matchExpressions"), issues, |node, path, issues| {
            let mut fields = Fields::of(Some(node), path, issues);
            let key = decode::string(fields.take("key"), &path.field("key"), issues);
            let operator = decode::string(fields.take("operator"), &path.field("operator"), issues);
            let values = decode::strings(fields.take("values"), &path.field("values"), issues);
            known(node, &["key", "operator", "values"], path, issues);
            requirement(&key, &values, path, issues);
            let some = matches!(operator.as_str(), "In" | "NotIn");
            if some && values.is_empty() {
                let message = format!("operator {operator} needs at least one value");
                issues.push(Issue::refused("selector", path.field("values"), message));
            }
            let operator = match operator.as_str() {
                "In" => LabelOperator::In(values),
                "NotIn" => LabelOperator::NotIn(values),
                "Exists" | "DoesNotExist" if !values.is_empty() => {
                    let message = format!("operator {operator} takes no values");
                    issues.push(Issue::refused("selector", path.field("values"), message));
                    LabelOperator::Exists
                }
                "Exists" => LabelOperator::Exists,
                "DoesNotExist" => LabelOperator::DoesNotExist,
                _ => {
                    let message = format!("{operator:?} is none of In, NotIn, Exists, DoesNotExist");
                    issues.push(Issue::refused("selector", path.field("operator"), message));
                    LabelOperator::Exists
                }
            };
            (key, operator)
        });
    known(node, &["matchLabels", "matchExpressions"], path, issues);
    LabelSelector { labels, expressions }
}

/// Refuses what is none of these fields: passed over, a misspelt `matchLabels` would ask for nothing and choose everything.
fn known(node: &Node, names: &[&str], path: &Path<'_>, issues: &mut Vec<Issue>) {
    let Value::Map(fields) = &node.value else { return };
    for field in fields.iter().filter(|field| !names.contains(&field.key.as_str())) {
        let message = format!("unknown field, expected one of {}", names.join(", "));
        issues.push(Issue::refused("unknown-field", path.field(&field.key), message));
    }
}

/// What of a requirement holds for every operator.
fn requirement(key: &str, values: &[String], path: &Path<'_>, issues: &mut Vec<Issue>) {
    if let Err(message) = predicates::label_key(key) {
        issues.push(Issue::refused("selector", path, message));
    }
    for value in values.iter().filter(|value| !predicates::is_kubernetes_label_value(value)) {
        issues.push(Issue::refused("selector", path, format!("{value:?} is no value of a label")));
    }
}

fn duration(node: Option<&Node>, path: &Path<'_>, issues: &mut Vec<Issue>) -> Option<Duration> {
    let text = decode::string(node, path, issues);
    if text.is_empty() {
        return None;
    }
    let Some(duration) = decode::go_duration(&text).and_then(|duration| Duration::try_from(duration).ok()) else {
        issues.push(Issue::refused("duration", path, format!("{text:?} is no duration such as 10s")));
        return None;
    };
    if duration < Duration::from_millis(1) || duration.subsec_nanos() % 1_000_000 != 0 {
        let message = "duration must be at least 1ms and only durations to ms precision are supported";
        issues.push(Issue::refused("duration", path, message));
        return None;
    }
    Some(duration)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tree;

    fn mesh(text: &str) -> (MeshConfig, Vec<Issue>) {
        let mut issues = Vec::new();
        let mesh = read(&tree::parse(text, 1).unwrap().root, &mut issues);
        (mesh, issues)
    }

    #[test]
    fn honoured_fields_are_read() {
        let (mesh, issues) = mesh(
            "outboundTrafficPolicy: {mode: REGISTRY_ONLY}\nproxyHttpPort: 15080\nrootNamespace: sys\n\
             trustDomain: td.example\ndefaultServiceExportTo: ['.']\nconnectTimeout: 1m0.25s\ndnsRefreshRate: 5s\n",
        );
        assert_eq!(issues, []);
        assert_eq!(mesh.outbound, OutboundMode::RegistryOnly);
        assert_eq!(mesh.proxy_http_port, Some(15080));
        assert_eq!(mesh.root_namespace, "sys");
        assert_eq!(mesh.trust_domain, "td.example");
        assert_eq!(mesh.default_service_export_to, ["."]);
        assert_eq!(mesh.connect_timeout, Duration::from_millis(60_250));
        assert_eq!(mesh.dns_refresh_rate, Duration::from_secs(5));
    }

    #[test]
    fn selectors_of_namespaces_are_read() {
        let (mesh, issues) = mesh(
            "discoverySelectors:\n- matchLabels: {istio-discovery: enabled}\n- matchExpressions:\n\
             \x20 - {key: kubernetes.io/metadata.name, operator: In, values: [a, b]}\n\
             \x20 - {key: env, operator: DoesNotExist}\n- {}\n",
        );
        assert_eq!(issues, []);
        let [first, second, all] = &mesh.discovery_selectors[..] else { panic!("{mesh:?}") };
        assert_eq!(first.labels["istio-discovery"], "enabled");
        let of_names = LabelOperator::In(vec!["a".into(), "b".into()]);
        let wanted =
            [("kubernetes.io/metadata.name".to_owned(), of_names), ("env".to_owned(), LabelOperator::DoesNotExist)];
        assert_eq!(second.expressions, wanted);
        assert_eq!(*all, LabelSelector::default());
    }

    #[test]
    fn wrong_selectors_are_named_by_their_field() {
        for (selector, field) in [
            ("matchLabels: {a b: c}", "discoverySelectors[0].matchLabels.a b"),
            ("matchLabels: {a: b c}", "discoverySelectors[0].matchLabels.a"),
            ("matchLabel: {a: b}", "discoverySelectors[0].matchLabel"),
            (
                "matchExpressions: [{key: a, operator: Exists, value: b}]",
                "discoverySelectors[0].matchExpressions[0].value",
            ),
            ("matchExpressions: [{operator: Exists}]", "discoverySelectors[0].matchExpressions[0]"),
            ("matchExpressions: [{key: a}]", "discoverySelectors[0].matchExpressions[0].operator"),
            ("matchExpressions: [{key: a, operator: in}]", "discoverySelectors[0].matchExpressions[0].operator"),
            ("matchExpressions: [{key: a, operator: In}]", "discoverySelectors[0].matchExpressions[0].values"),
            (
                "matchExpressions: [{key: a, operator: Exists, values: [b]}]",
                "discoverySelectors[0].matchExpressions[0].values",
            ),
        ] {
            let (_, issues) = mesh(&format!("discoverySelectors: [{{{selector}}}]"));
            let told: Vec<&str> = issues.iter().filter(|i| i.rejects()).map(|i| i.field.as_str()).collect();
            assert_eq!(told, [field], "{selector}: {issues:?}");
        }
    }

    #[test]
    fn fields_that_do_nothing_are_told() {
        let (_, issues) = mesh("enableTracing: true\n");
        assert_eq!(issues.len(), 1);
        assert_eq!(
            (issues[0].code, issues[0].field.as_str(), issues[0].rejects()),
            ("ignored-field", "enableTracing", false)
        );
    }

    #[test]
    fn wrong_values_are_errors() {
        for text in [
            "outboundTrafficPolicy: {mode: REGISTRY_ONY}",
            "proxyHttpPort: 70000",
            "connectTimeout: 10",
            "connectTimeout: 1us",
            "defaultServiceExportTo: [a_b]",
            "trustDomain: a_b",
            "discoverySelectors: {matchLabels: {a: b}}",
            "discoverySelectors: [a]",
            "discoverySelectors: [{matchLabel: {a: b}}]",
            "[]",
        ] {
            assert!(mesh(text).1.iter().any(Issue::rejects), "{text}");
        }
    }
}
