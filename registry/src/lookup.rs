//! The lookup: Envoy's rules of selection (SEMANTICS 0.2, 1.4 and 3) over a snapshot. Each level commits to its best
//! match; there is no way back from one that fails later.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::authority;
use crate::decision::{Decision, Reason, Rule, Verdict};
use crate::encode::{self, ChoiceRef, ClusterRef, PortRef, TAG_ADDRESS, TAG_EXACT, TAG_PORT, TAG_PREFIX, TAG_SUFFIX};
use crate::encode::{Use, Value};
use crate::name::{self, NameError};
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
            return match value.address() {
                Some([_, Some(tcp)]) => route(Rule::Address, port, "", &tcp),
                _ => self.unknown_connection(),
            };
        }
        let Some(listener) = self.port(port) else { return self.unknown_connection() };
        let mut buffer = name::Buffer::default();
        let sni = match query.sni.unwrap_or_default() {
            // A trailing dot is no part of a server name, and Envoy knows none that has one.
            [] | [.., b'.'] => None,
            sni => match name::normalise(sni, &mut buffer) {
                Ok(()) => Some(buffer.as_str()),
                Err(_) => return deny(400, Rule::BadName),
            },
        };
        if let Some(prefix) = self.prefix(address, port, &listener) {
            if let Some(choice) = sni.and_then(|name| prefix.prefix_sni(name)) {
                return route(Rule::PrefixSni, port, "", &choice);
            }
            if let Some(choice) = prefix.prefix_tcp() {
                return route(Rule::Prefix, port, "", &choice);
            }
        } else if let Some((suffix, choice)) = sni.and_then(|name| self.host(name, port, Use::Sni)) {
            return match suffix {
                None => route(Rule::SniExact, port, sni.unwrap_or_default(), &choice),
                Some(suffix) => route_suffix(Rule::SniWildcard, port, suffix, &choice),
            };
        }
        match &listener.tcp {
            Some(tcp) => route(Rule::Port, port, "", tcp),
            None => self.unknown_connection(),
        }
    }

    /// Decides an HTTP request.
    pub fn request(&self, query: &Request<'_>) -> Decision<'_> {
        let (host, asked_port) = authority::split(query.authority);
        let mut buffer = name::Buffer::default();
        let (port, wanted) = match query.listener {
            Listener::Proxy => (asked_port.unwrap_or(if query.connect { 443 } else { 80 }), Use::Proxy),
            Listener::Captured(destination) => {
                let (address, port) = (destination.ip().to_canonical(), destination.port());
                match self.address(address, port).and_then(|v| v.address()) {
                    Some([Some(http), _]) => return route(Rule::Address, port, "", &http),
                    Some([None, Some(tcp)]) => return route(Rule::Address, port, "", &tcp),
                    _ => (port, Use::Http),
                }
            }
        };
        let name = match name::normalise(host, &mut buffer) {
            Ok(()) => buffer.as_str(),
            // No name is one that nobody declared.
            Err(NameError::Empty) => return self.unknown_request(query.listener),
            Err(_) => return deny(400, Rule::BadName),
        };
        match self.host(name, port, wanted) {
            Some((None, choice)) => route(Rule::HostExact, port, name, &choice),
            Some((Some(suffix), choice)) => route_suffix(Rule::HostWildcard, port, suffix, &choice),
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
            (CatchAll::Block, _) => deny(502, Rule::Blocked),
            (CatchAll::PassThrough, Listener::Captured(_)) => pass(PASSTHROUGH_CLUSTER),
            (CatchAll::DynamicDns, _) | (CatchAll::PassThrough, Listener::Proxy) => pass(DYNAMIC_CLUSTER),
        }
    }

    /// What holds for all; nothing is let through where there is nothing.
    pub fn globals(&self) -> Globals {
        self.summary().globals
    }

    fn address(&self, address: IpAddr, port: u16) -> Option<Value<'_>> {
        if !self.summary().addresses {
            return None;
        }
        self.find(TAG_ADDRESS, &encode::address_key(address, port)).and_then(Value::open)
    }

    fn port(&self, port: u16) -> Option<PortRef<'_>> {
        Value::open(self.find(TAG_PORT, &port.to_be_bytes())?)?.port()
    }

    /// The longest prefix of the port that holds the address.
    fn prefix(&self, address: IpAddr, port: u16, listener: &PortRef<'_>) -> Option<Value<'_>> {
        listener.prefix_lengths(address.is_ipv6()).find_map(|len| {
            let masked = IpNet::new(address, len).ok()?.network();
            self.find(TAG_PREFIX, &encode::prefix_key(masked, len, port)).and_then(Value::open)
        })
    }

    /// The most specific pattern that means something on this port: what its star stands before, if it has one.
    fn host<'n>(&self, name: &'n str, port: u16, wanted: Use) -> Option<(Option<&'n str>, ChoiceRef<'_>)> {
        let exact = self.find(TAG_EXACT, name.as_bytes()).and_then(Value::open);
        if let Some(choice) = exact.and_then(|v| v.host_port(port, wanted)) {
            return Some((None, choice));
        }
        // The star stands for at least one character.
        for start in 1..=name.len() {
            let Some(suffix) = name.get(start..) else { continue };
            if !self.summary().has_suffix(suffix) {
                continue;
            }
            let row = self.find(TAG_SUFFIX, suffix.as_bytes()).and_then(Value::open);
            if let Some(choice) = row.and_then(|v| v.host_port(port, wanted)) {
                return Some((Some(suffix), choice));
            }
        }
        None
    }
}

fn route<'s>(rule: Rule, port: u16, host: &str, choice: &ChoiceRef<'s>) -> Decision<'s> {
    route_to(rule, port, ["", host], choice)
}

fn route_suffix<'s>(rule: Rule, port: u16, suffix: &str, choice: &ChoiceRef<'s>) -> Decision<'s> {
    route_to(rule, port, ["*", suffix], choice)
}

fn route_to<'s>(rule: Rule, port: u16, host: [&str; 2], choice: &ChoiceRef<'s>) -> Decision<'s> {
    let reason = Reason { rule, winner: choice.winner(), losers: choice.losers() };
    let cluster = match choice.cluster {
        ClusterRef::Named("") => return Decision { verdict: Verdict::Deny { status: 404 }, reason },
        ClusterRef::Named(name) => Cow::Borrowed(name),
        ClusterRef::Outbound => Cow::Owned(own_cluster("outbound|", port, host)),
        ClusterRef::Forward => Cow::Owned(own_cluster("forward|", port, host)),
    };
    Decision { verdict: Verdict::Route { cluster }, reason }
}

/// `outbound|PORT||HOST`, without the machinery of `format!`, which costs as much as the lookup.
fn own_cluster(prefix: &str, port: u16, host: [&str; 2]) -> String {
    let mut out = String::with_capacity(prefix.len() + 7 + host.iter().map(|h| h.len()).sum::<usize>());
    out.push_str(prefix);
    let mut started = false;
    for unit in [10_000, 1_000, 100, 10, 1] {
        let digit = port / unit % 10;
        started |= digit != 0 || unit == 1;
        if started {
            out.push(char::from(b'0' + digit as u8));
        }
    }
    out.push_str("||");
    host.iter().for_each(|part| out.push_str(part));
    out
}

fn pass<'s>(cluster: &'static str) -> Decision<'s> {
    let reason = Reason { rule: Rule::PassThrough, winner: None, losers: Vec::new() };
    Decision { verdict: Verdict::Route { cluster: Cow::Borrowed(cluster) }, reason }
}

fn deny<'s>(status: u16, rule: Rule) -> Decision<'s> {
    Decision { verdict: Verdict::Deny { status }, reason: Reason { rule, winner: None, losers: Vec::new() } }
}
