//! Claims that met at one key, and who lost.

use portolan_registry::row::{Choice, Origin, Row};

use super::Compiler;
use super::chains::Group;

/// Claims that met, and who lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// What was claimed: a host and port, an address, a prefix or a port.
    pub subject: String,
    /// The rule that decided.
    pub rule: ConflictRule,
    /// Who has it now; `None`: nobody.
    pub winner: Option<Origin>,
    /// Who lost it, in the order of precedence; not all, if they are many.
    pub losers: Vec<Origin>,
}

/// Why a claim was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConflictRule {
    /// One host and port, claimed more than once: own namespace, then Kubernetes, then the oldest.
    Host,
    /// One server name and port: the oldest.
    ServerName,
    /// One address and port: the oldest.
    Address,
    /// One destination prefix and port: the oldest.
    Prefix,
    /// Everything on a port: the oldest.
    Port,
    /// MONGO and MYSQL share a port with nobody.
    Protocol,
    /// A partial wildcard cannot be matched on a TLS port.
    PartialWildcard,
    /// The name cannot be looked up, or what it means is too large for a page.
    Refused,
}
impl Compiler {
    pub(super) fn note_refusals(&self, key: &str, group: &Group, conflicts: &mut Vec<Conflict>) {
        let mut note = |subject: &str, rule, losers| {
            conflicts.push(Conflict { subject: subject.to_owned(), rule, winner: None, losers });
        };
        if group.pattern.is_none() {
            let losers = group.resolved.services.iter().map(|s| s.member.source.origin()).collect();
            note(key, ConflictRule::Refused, losers);
        }
        for (origin, pattern) in &group.dropped {
            note(pattern, ConflictRule::PartialWildcard, vec![origin.clone()]);
        }
    }
}

/// Notes who lost the row.
pub(super) fn note_losers(row: &Row, conflicts: &mut Vec<Conflict>) {
    let mut note = |subject: String, rule, choice: Option<&Choice>| {
        if let Some(choice) = choice.filter(|c| !c.losers.is_empty()) {
            let (winner, losers) = (Some(choice.winner.clone()), choice.losers.clone());
            conflicts.push(Conflict { subject, rule, winner, losers });
        }
    };
    match row {
        Row::Host { pattern, ports } => {
            for p in ports {
                let host = p.http.as_ref().or(p.proxy.as_ref());
                note(format!("{pattern}:{}", p.port), ConflictRule::Host, host);
                let same = matches!((host, &p.sni), (Some(h), Some(s)) if h.winner == s.winner && h.losers == s.losers);
                let sni = p.sni.as_ref().filter(|_| !same);
                note(format!("{pattern}:{}", p.port), ConflictRule::ServerName, sni);
            }
        }
        Row::Address { address, port, tcp, .. } => {
            note(std::net::SocketAddr::new(*address, *port).to_string(), ConflictRule::Address, tcp.as_ref());
        }
        Row::Prefix { port, net, tcp, sni } => {
            note(format!("{net} port {port}"), ConflictRule::Prefix, tcp.as_ref());
            for (name, choice) in sni {
                note(format!("{net} port {port} server name {name}"), ConflictRule::Prefix, Some(choice));
            }
        }
        Row::Port { port, tcp, .. } => note(format!("port {port}"), ConflictRule::Port, tcp.as_ref()),
        Row::Globals(_) | Row::Table { .. } | Row::Routes { .. } => {}
    }
}
