//! ServiceEntries that take a port from each other.

use std::collections::HashMap;
use std::net::IpAddr;

use super::audience::Claims;
use super::{Entry, finding};
use crate::model::{Protocol, ServiceEntry};
use crate::validate::finding::Finding;

/// Of entries in the order in which they win.
pub(super) fn between<'o>(entries: &'o [Entry<'o>], findings: &mut Vec<Finding>) {
    let mut hosts: HashMap<(String, u16), Claims<'_, (usize, Protocol)>> = HashMap::new();
    let mut bare: HashMap<u16, Claims<'_, usize>> = HashMap::new();
    let mut addresses: HashMap<(IpAddr, u16), Claims<'_, usize>> = HashMap::new();
    for (number, this) in entries.iter().enumerate() {
        let entry = this.entry;
        for (index, port) in entry.ports.iter().enumerate() {
            for host in &entry.hosts {
                let claims = hosts.entry((host.to_ascii_lowercase(), port.number)).or_default();
                let earlier = claims.seen_with(&this.audience).min();
                match earlier.filter(|(_, protocol)| *protocol != port.protocol) {
                    Some((other, protocol)) => {
                        let message = format!(
                            "port {} of host {host} is {} here and {} in {}",
                            port.number,
                            name(port.protocol),
                            name(protocol),
                            entries[other].place(),
                        );
                        let field = format!("spec.ports[{index}].protocol");
                        findings.push(finding(this.placed, &field, "protocol-conflict", message));
                    }
                    // One claim of each audience is enough to compare with.
                    None if earlier.is_none() => claims.add((number, port.protocol), &this.audience),
                    None => {}
                }
            }
            if takes_whole_port(entry, port.protocol) {
                let claims = bare.entry(port.number).or_default();
                match claims.seen_with(&this.audience).min() {
                    Some(other) if entries[other].entry.hosts != entry.hosts => {
                        let message = format!(
                            "TCP port {} without addresses is already taken by {}: nothing reaches this one",
                            port.number,
                            entries[other].place(),
                        );
                        findings.push(finding(this.placed, &format!("spec.ports[{index}]"), "port-shadowed", message));
                    }
                    Some(_) => {}
                    None => claims.add(number, &this.audience),
                }
            }
            if !takes_address(port.protocol) {
                continue;
            }
            let plain = |(index, text): (usize, &String)| Some((index, text.parse::<IpAddr>().ok()?));
            for (address_index, ip) in entry.addresses.iter().enumerate().filter_map(plain) {
                let mut say = |field: String, message: String| {
                    findings.push(finding(this.placed, &field, "port-shadowed", message));
                };
                if address_index == 0 && entry.hosts.len() > 1 {
                    let message = format!(
                        "the hosts share {ip}:{}, where {} does not tell them apart: the first in order of names gets \
                         every connection",
                        port.number,
                        name(port.protocol)
                    );
                    say(format!("spec.ports[{index}]"), message);
                }
                let claims = addresses.entry((ip, port.number)).or_default();
                match claims.seen_with(&this.audience).min() {
                    Some(other) if entries[other].entry.hosts != entry.hosts => {
                        let message = format!(
                            "{ip}:{} is already taken by {}: no connection reaches this one",
                            port.number,
                            entries[other].place()
                        );
                        say(format!("spec.addresses[{address_index}]"), message);
                    }
                    Some(_) => {}
                    None => claims.add(number, &this.audience),
                }
            }
        }
    }
}

/// A TCP port without addresses listens on the wildcard address, and takes every connection that nothing else claims.
pub(super) fn takes_whole_port(entry: &ServiceEntry, protocol: Protocol) -> bool {
    use Protocol::{Mongo, Mysql, Redis, Tcp};
    entry.addresses.is_empty() && entry.status_addresses.is_empty() && matches!(protocol, Tcp | Mongo | Redis | Mysql)
}

/// A plain address on such a port is a listener of its own, without regard to server names.
fn takes_address(protocol: Protocol) -> bool {
    use Protocol::{Https, Mongo, Mysql, Redis, Tcp, Tls};
    matches!(protocol, Tcp | Tls | Https | Mongo | Redis | Mysql)
}

fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Auto => "without protocol",
        Protocol::Http => "HTTP",
        Protocol::HttpProxy => "HTTP_PROXY",
        Protocol::Http2 => "HTTP2",
        Protocol::Grpc => "GRPC",
        Protocol::GrpcWeb => "GRPC-WEB",
        Protocol::Https => "HTTPS",
        Protocol::Tls => "TLS",
        Protocol::Tcp => "TCP",
        Protocol::Mongo => "MONGO",
        Protocol::Redis => "REDIS",
        Protocol::Mysql => "MYSQL",
        Protocol::Udp => "UDP",
    }
}
