//! What a lookup answers: a verdict for the host to carry out, and the reason for it.

use std::cmp::Ordering;
use std::fmt;

use crate::encode::ChoiceRef;
use crate::routing::{Matched, Table};
use crate::row::OriginKind;

/// A cluster's name, put together only when it is asked for: most names are made of a port and a host that the snapshot
/// holds anyway.
#[derive(Debug, Clone, Copy)]
pub struct Cluster<'s>(Form<'s>);

#[derive(Debug, Clone, Copy)]
enum Form<'s> {
    Whole(&'s str),
    Own { prefix: &'static str, port: u16, star: bool, host: &'s [u8] },
}

impl<'s> Cluster<'s> {
    pub(crate) fn whole(name: &'s str) -> Self {
        Cluster(Form::Whole(name))
    }

    /// `PREFIX|PORT||HOST`; with a star before the host where the host is what a wildcard ends with.
    pub(crate) fn own(prefix: &'static str, port: u16, star: bool, host: &'s [u8]) -> Self {
        Cluster(Form::Own { prefix, port, star, host })
    }

    /// The name's bytes, written to `room` if they lie nowhere in one piece.
    pub fn bytes<'r>(&self, room: &'r mut Vec<u8>) -> &'r [u8]
    where
        's: 'r,
    {
        match self.0 {
            Form::Whole(name) => name.as_bytes(),
            Form::Own { prefix, port, star, host } => {
                // Without the machinery of `format!`, which costs as much as the lookup.
                room.clear();
                room.extend_from_slice(prefix.as_bytes());
                room.push(b'|');
                let mut started = false;
                for unit in [10_000, 1_000, 100, 10, 1] {
                    let digit = port / unit % 10;
                    started |= digit != 0 || unit == 1;
                    if started {
                        room.push(b'0' + digit as u8);
                    }
                }
                room.extend_from_slice(if star { b"||*" } else { b"||" });
                room.extend_from_slice(host);
                room
            }
        }
    }
}

impl fmt::Display for Cluster<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.bytes(&mut Vec::new())))
    }
}

impl PartialEq for Cluster<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.bytes(&mut Vec::new()) == other.bytes(&mut Vec::new())
    }
}

impl Eq for Cluster<'_> {}

impl PartialEq<str> for Cluster<'_> {
    fn eq(&self, other: &str) -> bool {
        self.bytes(&mut Vec::new()) == other.as_bytes()
    }
}

/// What the host is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict<'s> {
    /// Send it to this cluster.
    Route {
        /// Cluster name.
        cluster: Cluster<'s>,
    },
    /// Do what the first route of this table says that takes the request ([`crate::snapshot::Snapshot::routed`]).
    Table {
        /// The table.
        table: Table<'s>,
    },
    /// Answer an HTTP request with this status. On a connection without HTTP: close it.
    Deny {
        /// HTTP status: 502 where the registry does not know the destination, 404 where no virtual host matches, 400
        /// where the name cannot be a host name.
        status: u16,
    },
}

/// The rule by which a decision was made; the order is that of precedence, strongest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rule {
    /// The listener of exactly this address and port.
    Address,
    /// The longest destination prefix, with a server name.
    PrefixSni,
    /// The longest destination prefix.
    Prefix,
    /// The server name as declared.
    SniExact,
    /// The longest wildcard that the server name falls under.
    SniWildcard,
    /// The host as declared.
    HostExact,
    /// The longest wildcard that the host falls under.
    HostWildcard,
    /// Everything on the port.
    Port,
    /// No entry: the outbound traffic policy passes it through.
    PassThrough,
    /// No entry: the outbound traffic policy refuses it.
    Blocked,
    /// No entry on a gateway.
    NoVirtualHost,
    /// The name cannot be a host name.
    BadName,
    /// No route of the host takes the request.
    NoRoute,
}

impl Rule {
    /// How many rules there are; counters are made for each.
    pub const ALL: [Rule; 13] = [
        Rule::Address,
        Rule::PrefixSni,
        Rule::Prefix,
        Rule::SniExact,
        Rule::SniWildcard,
        Rule::HostExact,
        Rule::HostWildcard,
        Rule::Port,
        Rule::PassThrough,
        Rule::Blocked,
        Rule::NoVirtualHost,
        Rule::BadName,
        Rule::NoRoute,
    ];

    /// Name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Rule::Address => "address",
            Rule::PrefixSni => "prefix_sni",
            Rule::Prefix => "prefix",
            Rule::SniExact => "sni_exact",
            Rule::SniWildcard => "sni_wildcard",
            Rule::HostExact => "host_exact",
            Rule::HostWildcard => "host_wildcard",
            Rule::Port => "port",
            Rule::PassThrough => "pass_through",
            Rule::Blocked => "blocked",
            Rule::NoVirtualHost => "no_virtual_host",
            Rule::BadName => "bad_name",
            Rule::NoRoute => "no_route",
        }
    }
}

/// An object as a snapshot names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct OriginRef<'s> {
    /// Namespace.
    pub namespace: &'s str,
    /// Name.
    pub name: &'s str,
    /// Kind.
    pub kind: OriginKind,
}

impl fmt::Display for OriginRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            OriginKind::ServiceEntry => "ServiceEntry",
            OriginKind::Service => "Service",
            OriginKind::VirtualService => "VirtualService",
            OriginKind::Gateway => "Gateway",
        };
        write!(f, "{kind} {}/{}", self.namespace, self.name)
    }
}

/// Why: the rule, the entry that won, and those that claimed the same and lost. Reasons order by rule first. The entries
/// are read from the snapshot when they are asked for.
#[derive(Clone, Copy)]
pub struct Reason<'s> {
    /// The rule that decided.
    pub rule: Rule,
    choice: Option<ChoiceRef<'s>>,
    /// Name and number of the route of the entry that won, if it has routes.
    pub route: Option<(&'s str, u32)>,
}

impl<'s> Reason<'s> {
    pub(crate) fn new(rule: Rule, choice: Option<ChoiceRef<'s>>) -> Self {
        Reason { rule, choice, route: None }
    }

    /// The same after a table has been asked: its route took the request, or none did.
    #[must_use]
    pub fn routed(self, matched: Option<&Matched<'s>>) -> Self {
        match matched {
            Some(matched) => Reason { route: Some((matched.name, matched.index)), ..self },
            None => Reason { rule: Rule::NoRoute, ..self },
        }
    }

    /// The entry that won, if any did.
    pub fn winner(&self) -> Option<OriginRef<'s>> {
        self.choice.and_then(|choice| choice.winner())
    }

    /// Entries that lost to it, in the order of precedence.
    pub fn losers(&self) -> impl Iterator<Item = OriginRef<'s>> {
        self.choice.into_iter().flat_map(|choice| choice.losers())
    }
}

impl PartialEq for Reason<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Reason<'_> {}

impl PartialOrd for Reason<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Reason<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        let rest = || {
            self.winner()
                .cmp(&other.winner())
                .then_with(|| self.losers().cmp(other.losers()))
                .then_with(|| self.route.cmp(&other.route))
        };
        self.rule.cmp(&other.rule).then_with(rest)
    }
}

impl fmt::Debug for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.rule.as_str())?;
        if let Some(winner) = self.winner() {
            write!(f, ": {winner}")?;
        }
        match self.route {
            Some(("", index)) => write!(f, " route {index}")?,
            Some((name, index)) => write!(f, " route {index} ({name})")?,
            None => {}
        }
        for (i, loser) in self.losers().enumerate() {
            write!(f, "{}{loser}", if i == 0 { " over " } else { ", " })?;
        }
        Ok(())
    }
}

/// A verdict with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision<'s> {
    /// What to do.
    pub verdict: Verdict<'s>,
    /// Why.
    pub reason: Reason<'s>,
}
