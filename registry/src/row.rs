//! The rows of a snapshot: what the writer takes, one row for each key that a lookup may ask for.
//!
//! Rows say what Envoy would find under that key after all of Istio's rules have been applied; who computes them is the
//! compiler's business. A row's bytes are in [`crate::encode`].

use std::net::IpAddr;

use ipnet::IpNet;

use crate::name::HostPattern;
use crate::object::{ClusterName, Namespace, ObjectName};
use crate::route::{Retry, Route, TableBody};

pub use crate::object::TableName;

/// An object that a decision may name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// Namespace.
    pub namespace: Namespace,
    /// Name.
    pub name: ObjectName,
    /// Kind.
    pub kind: OriginKind,
}

/// Kind of an [`Origin`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OriginKind {
    /// `ServiceEntry`
    ServiceEntry,
    /// Kubernetes `Service`
    Service,
    /// `VirtualService`
    VirtualService,
    /// `Gateway`
    Gateway,
}

/// Where a key leads, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Cluster name. `outbound|PORT||HOST` of the row's own port and host costs nothing to store. Empty: there is no
    /// route, which is 404 for HTTP.
    pub cluster: ClusterName,
    /// The routes that decide instead of one cluster, if there are any.
    pub routes: Option<Routes>,
    /// The object that won.
    pub winner: Origin,
    /// Objects that claimed the same key and lost, in the order of precedence. At most [`MAX_LOSERS`] are kept.
    pub losers: Vec<Origin>,
}

/// The routes of a choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Routes {
    /// Those of this table.
    Table(TableName),
    /// These.
    Inline(Vec<Route>),
}

/// How many losers a row names.
pub const MAX_LOSERS: usize = 3;

/// What one port of a host pattern means.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostPort {
    /// The port.
    pub port: u16,
    /// The server of a gateway that the virtual host is of, by [`server_id`](crate::lookup::server_id); else 0.
    pub server: u32,
    /// Virtual host on the HTTP listener of the port.
    pub http: Option<Choice>,
    /// Filter chain by server name on the wildcard listener of the port, without a destination prefix.
    pub sni: Option<Choice>,
    /// What the HTTP proxy port does for this host and port.
    pub proxy: Option<Choice>,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Row {
    /// Everything under one host pattern. Ports ascend.
    Host {
        /// The pattern; IP addresses are exact hosts, IPv6 without brackets.
        pattern: HostPattern,
        /// Ports, and for each its servers.
        ports: Vec<HostPort>,
    },
    /// The listener `address_port`.
    Address {
        /// Address.
        address: IpAddr,
        /// Port.
        port: u16,
        /// Where plain-text HTTP goes, if it is told apart: the listener's one virtual host with domain `*`.
        http: Option<Choice>,
        /// Chain that takes everything else. `None`: the catch-all.
        tcp: Option<Choice>,
        /// Chains by server name, which go before it.
        sni: Vec<(HostPattern, Choice)>,
    },
    /// The listener `0.0.0.0_port`.
    Port {
        /// Port.
        port: u16,
        /// Plain-text HTTP goes to the virtual hosts of the port.
        http: bool,
        /// Chain without any condition. `None`: the catch-all.
        tcp: Option<Choice>,
        /// The longest prefix of [`Row::Prefix`] rows of this port that holds the destination is committed to before
        /// anything else is looked at.
        prefixes: Vec<IpNet>,
    },
    /// Filter chains of `port` that share one destination prefix. A connection that none of them takes goes to the
    /// chain without any condition, or else to the catch-all.
    Prefix {
        /// Port.
        port: u16,
        /// Prefix, masked.
        net: IpNet,
        /// Chain without server names.
        tcp: Option<Choice>,
        /// Chains by server name.
        sni: Vec<(HostPattern, Choice)>,
    },
    /// A route table, or what it is made of.
    Table {
        /// Its name.
        name: TableName,
        /// Its routes.
        body: TableBody,
    },
    /// A part of a table.
    Routes {
        /// The table.
        table: TableName,
        /// What its row calls the part.
        digest: u64,
        /// The routes.
        bytes: Vec<u8>,
    },
    /// What holds for all.
    Globals(Globals),
}

/// What happens to a destination that is not in the registry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CatchAll {
    /// REGISTRY_ONLY: 502 for HTTP on a known HTTP port, closed otherwise.
    #[default]
    Block,
    /// ALLOW_ANY: to the original destination.
    PassThrough,
    /// ALLOW_ANY_DYNAMIC_DNS: HTTP to the name it asks for, all else to the original destination.
    DynamicDns,
}

/// The one row of its kind; a snapshot without it is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Globals {
    /// Unknown destinations.
    pub catch_all: CatchAll,
    /// A gateway has no catch-all virtual host: an unknown host is 404.
    pub gateway: bool,
    /// Retries of requests that no route table takes.
    pub retry: Option<Retry>,
}

/// What a row is known by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RowKey {
    /// [`Row::Host`]
    Host(HostPattern),
    /// [`Row::Address`]
    Address(IpAddr, u16),
    /// [`Row::Port`]
    Port(u16),
    /// [`Row::Prefix`]
    Prefix(u16, IpNet),
    /// [`Row::Table`]
    Table(TableName),
    /// [`Row::Routes`]
    Routes(TableName, u64),
    /// [`Row::Globals`]
    Globals,
}

impl Row {
    /// What the row is known by.
    pub fn key(&self) -> RowKey {
        match self {
            Row::Host { pattern, .. } => RowKey::Host(pattern.clone()),
            Row::Address { address, port, .. } => RowKey::Address(*address, *port),
            Row::Port { port, .. } => RowKey::Port(*port),
            Row::Prefix { port, net, .. } => RowKey::Prefix(*port, *net),
            Row::Table { name, .. } => RowKey::Table(name.clone()),
            Row::Routes { table, digest, .. } => RowKey::Routes(table.clone(), *digest),
            Row::Globals(_) => RowKey::Globals,
        }
    }
}
