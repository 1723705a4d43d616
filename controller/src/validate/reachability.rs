//! Routes of a VirtualService that nothing reaches, as far as istiod finds them. All of this is warnings.

use std::collections::BTreeMap;

use crate::api::virtual_service::{HttpMatch, HttpRoute, StringMatch, VirtualService};
use crate::validate::finding::Issue;

/// Looks at the three lists of routes.
pub(super) fn analyze(spec: &VirtualService, issues: &mut Vec<Issue>) {
    let http: Vec<Route<HttpMatch>> = spec
        .http
        .iter()
        .enumerate()
        .map(|(index, route)| Route {
            name: route_name(route, index),
            matches: route
                .matches
                .iter()
                .enumerate()
                .map(|(index, item)| {
                    let nameless = HttpMatch { name: String::new(), ..item.clone() };
                    (match_name(item, index), nameless)
                })
                .collect(),
        })
        .collect();
    let numbered = |index: usize| format!("#{index}");
    list("http", &http, issues);
    covered(&spec.http, issues);
    let tcp: Vec<_> = spec.tcp.iter().map(|route| route.matches.clone()).collect();
    list("tcp", &unnamed(tcp, numbered), issues);
    let tls: Vec<_> = spec.tls.iter().map(|route| route.matches.clone()).collect();
    list("tls", &unnamed(tls, numbered), issues);
}

struct Route<M> {
    name: String,
    matches: Vec<(String, M)>,
}

fn unnamed<M>(routes: Vec<Vec<M>>, name: impl Fn(usize) -> String) -> Vec<Route<M>> {
    let matches = |items: Vec<M>| items.into_iter().enumerate().map(|(index, item)| (name(index), item)).collect();
    routes.into_iter().enumerate().map(|(index, items)| Route { name: name(index), matches: matches(items) }).collect()
}

fn route_name(route: &HttpRoute, index: usize) -> String {
    if route.name.is_empty() { format!("#{index}") } else { format!("{:?}", route.name) }
}

fn match_name(item: &HttpMatch, index: usize) -> String {
    if item.name.is_empty() { format!("#{index}") } else { format!("{:?}", item.name) }
}

fn unused(issues: &mut Vec<Issue>, field: String, rule: &str, reason: &str) {
    let message = format!("virtualService rule {rule} not used ({reason})");
    issues.push(Issue::warned("unreachable-rule", field, message));
}

fn ineffective(issues: &mut Vec<Issue>, field: String, rule: &str, item: &str, earlier: &str) {
    let message =
        format!("virtualService rule {rule} match {item} is not used (duplicate/overlapping match in rule {earlier})");
    issues.push(Issue::warned("ineffective-match", field, message));
}

/// Rules after one that takes everything, and matches that stand in an earlier rule.
fn list<M: PartialEq>(kind: &str, routes: &[Route<M>], issues: &mut Vec<Issue>) {
    let mut takes_all = false;
    let mut seen: Vec<(&M, &str)> = Vec::new();
    for (index, route) in routes.iter().enumerate() {
        let field = format!("spec.{kind}[{index}]");
        if route.matches.is_empty() {
            if takes_all {
                unused(issues, field, &route.name, "only the last rule can have no matches");
            }
            takes_all = true;
            continue;
        }
        let mut duplicates = 0;
        for (match_index, (name, item)) in route.matches.iter().enumerate() {
            let match_field = format!("{field}.match[{match_index}]");
            if takes_all {
                unused(issues, match_field, &route.name, "route without matches defined before");
            } else if let Some((_, earlier)) = seen.iter().find(|(known, _)| *known == item) {
                ineffective(issues, match_field, &route.name, name, earlier);
                duplicates += 1;
            } else {
                seen.push((item, &route.name));
            }
        }
        if duplicates == route.matches.len() {
            unused(issues, field, &route.name, "all matches used by prior rules");
        }
    }
}

/// What istiod compares of a match on a path's prefix.
struct Prefix {
    field: String,
    route: String,
    name: String,
    prefix: String,
    port: u32,
    method: String,
    authority: String,
    maps: [BTreeMap<String, String>; 3],
}

/// Prefixes that an earlier prefix covers. What an earlier rule without matches takes is said above, and an equal
/// match again, too.
fn covered(routes: &[HttpRoute], issues: &mut Vec<Issue>) {
    let mut prefixes: Vec<Prefix> = Vec::new();
    let mut seen: Vec<HttpMatch> = Vec::new();
    for (route_index, route) in routes.iter().enumerate() {
        if route.matches.is_empty() {
            break;
        }
        for (index, item) in route.matches.iter().enumerate() {
            let nameless = HttpMatch { name: String::new(), ..item.clone() };
            if seen.contains(&nameless) {
                continue;
            }
            seen.push(nameless);
            let prefix = item.uri.as_ref().and_then(|uri| uri.prefix.clone()).unwrap_or_default();
            if prefix.is_empty() {
                continue;
            }
            let method = item.method.as_ref().map(as_text).filter(|text| !text.is_empty());
            let map = |map: &BTreeMap<String, StringMatch>| map.iter().map(|(k, v)| (k.clone(), as_text(v))).collect();
            prefixes.push(Prefix {
                field: format!("spec.http[{route_index}].match[{index}]"),
                route: route_name(route, route_index),
                name: match_name(item, index),
                prefix,
                port: item.port,
                // Without one, GET.
                method: method.unwrap_or_else(|| "exact:GET".into()),
                authority: item.authority.as_ref().map(as_text).unwrap_or_default(),
                maps: [map(&item.headers), map(&item.query_params), map(&item.without_headers)],
            });
        }
    }
    for (index, earlier) in prefixes.iter().enumerate() {
        for later in prefixes.iter().skip(index + 1).filter(|later| later.prefix != earlier.prefix) {
            if covers(earlier, later) {
                let item = format!("{} of prefix {}", later.name, later.prefix);
                let rule = format!("{} of prefix {} on {}", earlier.name, earlier.prefix, earlier.route);
                ineffective(issues, later.field.clone(), &later.route, &item, &rule);
            }
        }
    }
}

fn as_text(condition: &StringMatch) -> String {
    let of = |kind: &str, text: &Option<String>| {
        text.as_ref().filter(|text| !text.is_empty()).map(|text| format!("{kind}:{text}"))
    };
    of("exact", &condition.exact).or_else(|| of("prefix", &condition.prefix)).unwrap_or_default()
}

fn covers(earlier: &Prefix, later: &Prefix) -> bool {
    let same = |earlier: &BTreeMap<String, String>, later: &BTreeMap<String, String>| {
        earlier.len() == later.len()
            && earlier.iter().all(|(key, text)| later.get(key).is_some_and(|other| text.starts_with(other.as_str())))
    };
    later.prefix.starts_with(&earlier.prefix)
        && later.port == earlier.port
        && earlier.method.starts_with(&later.method)
        && earlier.authority.starts_with(&later.authority)
        && earlier.maps.iter().zip(&later.maps).all(|(earlier, later)| same(earlier, later))
}
