//! The lookup: Envoy's rules of selection (SEMANTICS 0.2, 1.4 and 3) over a snapshot. Each level commits to its best
//! match; there is no way back from one that fails later.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use crate::authority;
use crate::decision::{Cluster, Decision, Reason, Rule, Verdict};
use crate::encode::{self, ChoiceRef, ClusterRef, PortRef, TAG_ADDRESS, TAG_EXACT, TAG_PORT, TAG_PREFIX, TAG_SUFFIX};
use crate::encode::{Use, Value};
use crate::hash;
use crate::name::{self, NameError};
use crate::routing::Table;
use crate::row::{CatchAll, Globals};
use crate::snapshot::Snapshot;

/// Cluster that dials the address that the client dialled.
pub const PASSTHROUGH_CLUSTER: &str = "PassthroughCluster";
/// Cluster that dials the name that the client asked for.
pub const DYNAMIC_CLUSTER: &str = "AllowAnyDynamicDNSCluster";

/// A connection whose bytes are not HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection<'q> {
    /// Where the client dialled.
    pub destination: SocketAddr,
    /// Server name of its ClientHello, if it sent one.
    pub sni: Option<&'q [u8]>,
}

/// Where an HTTP request came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listener {
    /// On a captured connection that was meant for this address.
    Captured(SocketAddr),
    /// On the HTTP proxy port.
    Proxy,
    /// On a forward proxy of its own, by [`server_id`]: an egress listener of a Sidecar.
    EgressProxy(u32),
    /// On a port of a gateway.
    Gateway {
        /// The port.
        port: u16,
        /// The server, by [`server_id`].
        server: u32,
    },
}

/// What a server of a gateway is known by: a digest of the name of its virtual hosts, which its filter chain bears.
pub fn server_id(name: &[u8]) -> u32 {
    let digest = hash::checksum(0, name);
    // 0 is that of no server.
    ((digest >> 32) as u32 ^ digest as u32).max(1)
}

/// The server of a chain of a gateway's port. A chain without a name is that of the port's plain HTTP server, as istiod
/// has it; what else is without one is of no server that there is.
pub fn server_of(chain: &[u8], port: u16) -> u32 {
    if chain.is_empty() { server_id(format!("http.{port}").as_bytes()) } else { server_id(chain) }
}

/// What stands for a Unix socket where rows want an address: one of the prefix whose packets are discarded (RFC 6666), by a
/// digest of the name of the socket's filter chain.
pub fn socket_address(chain: &[u8]) -> SocketAddr {
    let address = 0x0100_u128 << 112 | u128::from(hash::checksum(0, chain));
    SocketAddr::new(IpAddr::V6(Ipv6Addr::from(address)), 0)
}

/// An HTTP request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'q> {
    /// Where it came in.
    pub listener: Listener,
    /// Host header or `:authority`.
    pub authority: &'q [u8],
    /// Method CONNECT.
    pub connect: bool,
}

impl Snapshot {
    /// Decides a connection that is not HTTP.
    pub fn connection(&self, query: &Connection<'_>) -> Decision<'_> {
        let address = query.destination.ip().to_canonical();
        let port = query.destination.port();
        if let Some(value) = self.address(address, port) {
            let mut buffer = None;
            // Whoever asks for no name that could be gets what takes everything.
            let sni = query.sni.filter(|sni| !sni.ends_with(b".")).and_then(|sni| name::normal(sni, &mut buffer).ok());
            if let Some(choice) = sni.and_then(|name| value.server_name(name)) {
                return route(Rule::Address, port, NO_HOST, choice);
            }
            return match value.address() {
                Some([_, Some(tcp)]) => route(Rule::Address, port, NO_HOST, tcp),
                _ => self.unknown_connection(),
            };
        }
        let Some(listener) = self.port(port) else { return self.unknown_connection() };
        let mut buffer = None;
        let sni = match query.sni.unwrap_or_default() {
            // A trailing dot is no part of a server name, and Envoy knows none that has one.
            [] | [.., b'.'] => None,
            sni => match name::normal(sni, &mut buffer) {
                Ok(name) => Some(name),
                Err(_) => return deny(400, Rule::BadName),
            },
        };
        if let Some(prefix) = self.prefix(address, port, &listener) {
            if let Some(choice) = sni.and_then(|name| prefix.server_name(name)) {
                return route(Rule::PrefixSni, port, NO_HOST, choice);
            }
            if let Some(choice) = prefix.prefix_tcp() {
                return route(Rule::Prefix, port, NO_HOST, choice);
            }
        } else if let Some((pattern, choice)) = sni.and_then(|name| self.host(name, port, 0, Use::Sni)) {
            let rule = if pattern.star { Rule::SniWildcard } else { Rule::SniExact };
            return route(rule, port, pattern, choice);
        }
        match listener.tcp {
            Some(tcp) => route(Rule::Port, port, NO_HOST, tcp),
            None => self.unknown_connection(),
        }
    }

    /// Decides an HTTP request.
    pub fn request(&self, query: &Request<'_>) -> Decision<'_> {
        // Nearly all are a name and nothing else, which one look at the bytes tells.
        let plain = name::is_normal(query.authority);
        let (host, asked_port) = if plain { (query.authority, None) } else { authority::split(query.authority) };
        let mut buffer = None;
        let (port, server, wanted) = match query.listener {
            Listener::Proxy => (asked_port.unwrap_or(if query.connect { 443 } else { 80 }), 0, Use::Proxy),
            // Of a name alone the row itself says what it means, as that of port 0.
            Listener::EgressProxy(server) => {
                (asked_port.unwrap_or(if query.connect { 443 } else { 0 }), server, Use::Proxy)
            }
            Listener::Gateway { port, server } => (port, server, Use::Http),
            Listener::Captured(destination) => {
                let (address, port) = (destination.ip().to_canonical(), destination.port());
                match self.address(address, port).and_then(|v| v.address()) {
                    Some([Some(http), _]) => return route(Rule::Address, port, NO_HOST, http),
                    Some([None, Some(tcp)]) => return route(Rule::Address, port, NO_HOST, tcp),
                    _ => (port, 0, Use::Http),
                }
            }
        };
        let name = match if plain { Ok(host) } else { name::normal(host, &mut buffer) } {
            Ok(name) => name,
            // No name is one that nobody declared.
            Err(NameError::Empty) => return self.unknown_request(query.listener),
            Err(_) => return deny(400, Rule::BadName),
        };
        // A gateway's domains have no other form: with a dot behind it, a name is under `*` alone.
        let dotted = wanted == Use::Http && server != 0 && host.ends_with(b".");
        let found = if dotted {
            self.under(TAG_SUFFIX, b"", port, server, wanted)
        } else {
            self.host(name, port, server, wanted)
        };
        match found {
            Some((pattern, choice)) => {
                let rule = if pattern.star { Rule::HostWildcard } else { Rule::HostExact };
                route(rule, port, pattern, choice)
            }
            None => self.unknown_request(query.listener),
        }
    }

    fn unknown_connection(&self) -> Decision<'_> {
        match self.globals().catch_all {
            CatchAll::Block => deny(502, Rule::Blocked),
            CatchAll::PassThrough | CatchAll::DynamicDns => pass(PASSTHROUGH_CLUSTER),
        }
    }

    fn unknown_request(&self, listener: Listener) -> Decision<'_> {
        let globals = self.globals();
        match (globals.catch_all, listener) {
            _ if globals.gateway => deny(404, Rule::NoVirtualHost),
            (_, Listener::Gateway { .. }) => deny(404, Rule::NoVirtualHost),
            (CatchAll::Block, _) => deny(502, Rule::Blocked),
            (CatchAll::PassThrough, Listener::Captured(_)) => pass(PASSTHROUGH_CLUSTER),
            (CatchAll::DynamicDns, _) | (CatchAll::PassThrough, Listener::Proxy | Listener::EgressProxy(_)) => {
                pass(DYNAMIC_CLUSTER)
            }
        }
    }

    /// What holds for all; nothing is let through where there is nothing.
    pub fn globals(&self) -> &Globals {
        &self.summary().globals
    }

    fn address(&self, address: IpAddr, port: u16) -> Option<Value<'_>> {
        if !self.summary().addresses {
            return None;
        }
        self.value(TAG_ADDRESS, &encode::address_key(address, port))
    }

    fn port(&self, port: u16) -> Option<PortRef<'_>> {
        self.value(TAG_PORT, &port.to_be_bytes())?.port()
    }

    /// The longest prefix of the port that holds the address.
    fn prefix(&self, address: IpAddr, port: u16, listener: &PortRef<'_>) -> Option<Value<'_>> {
        listener.prefix_lengths(address.is_ipv6()).find_map(|len| {
            let masked = IpNet::new(address, len).ok()?.network();
            self.value(TAG_PREFIX, &encode::prefix_key(masked, len, port))
        })
    }

    fn value(&self, tag: u8, key: &[u8]) -> Option<Value<'_>> {
        self.find(tag, key).and_then(|(_, value)| Value::open(value))
    }

    /// The most specific pattern that means something on this port.
    #[inline]
    fn host(&self, name: &[u8], port: u16, server: u32, wanted: Use) -> Option<(Pattern<'_>, ChoiceRef<'_>)> {
        let under = |tag: u8, key: &[u8]| self.under(tag, key, port, server, wanted);
        under(TAG_EXACT, name).or_else(|| self.summary().suffixes(name).find_map(|suffix| under(TAG_SUFFIX, suffix)))
    }

    /// What a pattern means on this port.
    #[inline]
    fn under(&self, tag: u8, key: &[u8], port: u16, server: u32, wanted: Use) -> Option<(Pattern<'_>, ChoiceRef<'_>)> {
        let (host, value) = self.find(tag, key)?;
        let choice = Value::open(value)?.host_port(port, server, wanted)?;
        Some((Pattern { star: tag == TAG_SUFFIX, host }, choice))
    }
}

/// The pattern that a name was found under, as the snapshot holds it.
#[derive(Clone, Copy)]
struct Pattern<'s> {
    star: bool,
    host: &'s [u8],
}

/// Of rows that are not about a host.
const NO_HOST: Pattern<'static> = Pattern { star: false, host: b"" };

#[inline]
fn route<'s>(rule: Rule, port: u16, pattern: Pattern<'s>, choice: ChoiceRef<'s>) -> Decision<'s> {
    let own = |prefix| Cluster::own(prefix, port, pattern.star, pattern.host);
    let verdict = match choice.cluster() {
        Some(ClusterRef::Outbound) => Verdict::Route { cluster: own("outbound") },
        Some(ClusterRef::Forward) => Verdict::Route { cluster: own("forward") },
        Some(ClusterRef::Routes(name)) => Verdict::Table { table: Table { name } },
        Some(ClusterRef::Named(name)) if !name.is_empty() => Verdict::Route { cluster: Cluster::whole(name) },
        _ => Verdict::Deny { status: 404 },
    };
    Decision { verdict, reason: Reason::new(rule, Some(choice)) }
}

fn pass<'s>(cluster: &'static str) -> Decision<'s> {
    let verdict = Verdict::Route { cluster: Cluster::whole(cluster) };
    Decision { verdict, reason: Reason::new(Rule::PassThrough, None) }
}

fn deny<'s>(status: u16, rule: Rule) -> Decision<'s> {
    Decision { verdict: Verdict::Deny { status }, reason: Reason::new(rule, None) }
}
