//! Istio's predicates on names, addresses and labels (`pkg/config/validation`, `pkg/config/labels`), with its wording.

use std::net::{Ipv4Addr, Ipv6Addr};

/// `[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?`, at most 63 bytes.
pub fn is_dns_label(text: &str) -> bool {
    text.len() <= 63 && is_label_of_any_length(text)
}

/// As [`is_dns_label`], without the limit.
pub fn is_label_of_any_length(text: &str) -> bool {
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    first.is_ascii_alphanumeric()
        && last.is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
}

/// A DNS label that may begin with `*` or `*-`.
fn is_wildcard_label(text: &str) -> bool {
    let body = text.strip_prefix("*-").filter(|body| is_label_of_any_length(body));
    let glued = text.strip_prefix('*').filter(|body| body.is_empty() || is_label_of_any_length(body));
    text.len() <= 63 && (body.is_some() || glued.is_some() || is_label_of_any_length(text))
}

/// A fully qualified name of 1 to 255 bytes; one trailing dot is allowed, a last label of digits only is not.
///
/// # Errors
/// What is wrong with it.
pub fn fqdn(domain: &str) -> Result<(), String> {
    length(domain)?;
    labels(domain)
}

/// As [`fqdn`], with a first label that may be or begin with `*`.
///
/// # Errors
/// What is wrong with it.
pub fn wildcard_domain(domain: &str) -> Result<(), String> {
    length(domain)?;
    let (first, rest) = match domain.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (domain, None),
    };
    if !is_wildcard_label(first) {
        return Err(format!("domain name {domain:?} invalid (label {first:?} invalid)"));
    }
    rest.map_or(Ok(()), labels)
}

fn length(domain: &str) -> Result<(), String> {
    match domain.len() {
        0 => Err("empty domain name not allowed".into()),
        1..=255 => Ok(()),
        _ => Err(format!("domain name {domain:?} too long (max 255)")),
    }
}

fn labels(domain: &str) -> Result<(), String> {
    let parts: Vec<&str> = domain.split('.').collect();
    if let Some(top) = parts.last().filter(|top| top.parse::<i64>().is_ok()) {
        return Err(format!("domain name {domain:?} invalid (top level domain {top:?} cannot be all-numeric)"));
    }
    for (index, label) in parts.iter().enumerate() {
        if index + 1 == parts.len() && label.is_empty() {
            return Ok(());
        }
        if !is_dns_label(label) {
            return Err(format!("domain name {domain:?} invalid (label {label:?} invalid)"));
        }
    }
    Ok(())
}

/// A wildcard that stands for a part of a label: `*foo.com`.
pub fn is_partial_wildcard(host: &str) -> bool {
    host.len() > 1 && host.contains('*') && !host.starts_with("*.")
}

/// An IPv4 or IPv6 address; a zone (`%eth0`) is allowed, leading zeros are not.
pub fn is_ip(text: &str) -> bool {
    match text.split_once('%') {
        Some((address, zone)) => !zone.is_empty() && address.parse::<Ipv6Addr>().is_ok(),
        None => text.parse::<Ipv4Addr>().is_ok() || text.parse::<Ipv6Addr>().is_ok(),
    }
}

/// An IP address, or with exactly one `/` a CIDR block.
///
/// # Errors
/// What is wrong with it.
pub fn ip_subnet(text: &str) -> Result<(), String> {
    if text.bytes().filter(|&b| b == b'/').count() == 1 {
        return if is_cidr(text) { Ok(()) } else { Err(format!("{text} is not a valid CIDR block")) };
    }
    if is_ip(text) { Ok(()) } else { Err(format!("{text} is not a valid IP")) }
}

fn is_cidr(text: &str) -> bool {
    let Some((address, bits)) = text.split_once('/') else { return false };
    let plain = !bits.is_empty() && bits.bytes().all(|b| b.is_ascii_digit()) && (bits == "0" || !bits.starts_with('0'));
    let longest = match (address.parse::<Ipv4Addr>(), address.parse::<Ipv6Addr>()) {
        (Ok(_), _) => 32,
        (_, Ok(_)) => 128,
        _ => return false,
    };
    plain && bits.parse::<u32>().is_ok_and(|bits| bits <= longest)
}

/// A port from 1 to 65535.
///
/// # Errors
/// That it is none.
pub fn port(number: u32) -> Result<(), String> {
    match number {
        1..=65535 => Ok(()),
        _ => Err(format!("port number {number} must be in the range 1..65535")),
    }
}

/// The path of a Unix socket: abstract (`@name`), or absolute and no directory.
///
/// # Errors
/// What is wrong with it.
pub fn unix_path(path: &str) -> Result<(), String> {
    if path.is_empty() {
        return Err("unix address must not be empty".into());
    }
    if path.starts_with('@') || path.starts_with('/') && !path.ends_with('/') {
        return Ok(());
    }
    Err(format!("{path} is not an absolute path to a file"))
}

/// Letters, digits, `-`, `_` and `.`, with a letter or digit at both ends.
fn is_qualified_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    first.is_ascii_alphanumeric()
        && last.is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}

/// A label's key: `[dns prefix/]name`.
///
/// # Errors
/// What is wrong with it.
pub fn label_key(key: &str) -> Result<(), String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if !is_qualified_name(name) || prefix.is_some_and(|p| !p.split('.').all(is_label_of_any_length)) {
        return Err(format!("invalid tag key: {key:?}"));
    }
    if prefix.is_some_and(|p| p.len() > 253) {
        return Err(format!("invalid tag key: {key:?} (DNS prefix is too long)"));
    }
    if name.len() > 63 {
        return Err(format!("invalid tag key: {key:?} (name is too long)"));
    }
    Ok(())
}

/// A label's value, of any length as far as istiod is concerned.
///
/// # Errors
/// What is wrong with it.
pub fn label_value(value: &str) -> Result<(), String> {
    if value.is_empty() || is_qualified_name(value) { Ok(()) } else { Err(format!("invalid tag value: {value:?}")) }
}

/// A Kubernetes object name: DNS-1123 subdomain, lower case, at most 253 bytes.
pub fn is_object_name(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|part| is_label_of_any_length(part) && !part.bytes().any(|b| b.is_ascii_uppercase()))
}

/// A Kubernetes label value: as [`label_value`], at most 63 bytes.
pub fn is_kubernetes_label_value(value: &str) -> bool {
    value.len() <= 63 && label_value(value).is_ok()
}

/// Whether two host names, each perhaps a wildcard, have a name in common (Istio's `Name.Matches`; case counts).
pub fn hosts_match(a: &str, b: &str) -> bool {
    match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (Some(a), Some(b)) if a.len() < b.len() => b.ends_with(a),
        (Some(a), Some(b)) => a.ends_with(b),
        (Some(suffix), None) => b.ends_with(suffix),
        (None, Some(suffix)) => a.ends_with(suffix),
        (None, None) => a == b,
    }
}

/// Whether every name of `a` is one of `b` (Istio's `Name.SubsetOf`).
pub fn is_host_subset(a: &str, b: &str) -> bool {
    match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (Some(rest), Some(suffix)) => rest.len() >= suffix.len() && rest.ends_with(suffix),
        (Some(_), None) => false,
        (None, Some(suffix)) => a.ends_with(suffix),
        (None, None) => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_have_names_in_common() {
        for (a, b, matches, subset) in [
            ("api.shop.io", "*.shop.io", true, true),
            ("*.shop.io", "api.shop.io", true, false),
            ("shop.io", "*.shop.io", false, false),
            ("*.eu.shop.io", "*.shop.io", true, true),
            ("*.shop.io", "*.eu.shop.io", true, false),
            ("*", "*.io", true, false),
            ("*shop.io", "*.shop.io", true, false),
            ("API.shop.io", "api.shop.io", false, false),
        ] {
            assert_eq!((hosts_match(a, b), is_host_subset(a, b)), (matches, subset), "{a} {b}");
        }
    }
}
