//! What a lookup answers: a verdict for the host to carry out, and the reason for it.

use std::borrow::Cow;
use std::fmt;

use crate::row::OriginKind;

/// What the host is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict<'s> {
    /// Send it to this cluster.
    Route {
        /// Cluster name.
        cluster: Cow<'s, str>,
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
}

impl Rule {
    /// How many rules there are; counters are made for each.
    pub const ALL: [Rule; 12] = [
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
        };
        write!(f, "{kind} {}/{}", self.namespace, self.name)
    }
}

/// Why: the rule, the entry that won, and those that claimed the same and lost. Reasons order by rule first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reason<'s> {
    /// The rule that decided.
    pub rule: Rule,
    /// The entry that won, if any did.
    pub winner: Option<OriginRef<'s>>,
    /// Entries that lost to it.
    pub losers: Vec<OriginRef<'s>>,
}

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.rule.as_str())?;
        if let Some(winner) = &self.winner {
            write!(f, ": {winner}")?;
        }
        for (i, loser) in self.losers.iter().enumerate() {
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
