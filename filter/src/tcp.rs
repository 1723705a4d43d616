//! Stream contexts: one decision for each connection that is not HTTP, before its first byte goes on.

use std::net::SocketAddr;

use portolan_registry::decision::{Rule, Verdict};
use portolan_registry::lookup::{Connection, PASSTHROUGH_CLUSTER, socket_address};
use portolan_registry::route::Outcome as Routed;
use portolan_registry::routing::NoHeaders;

use crate::carry;
use crate::config::NoSnapshot;
use crate::envoy::set_state;
use crate::host::{Action, Host, Level, Status, destination, printable};
use crate::metrics::{Cause, Kind, Outcome};
use crate::vm::{self, Vm};

/// The filter state by which Envoy's `tcp_proxy` chooses its cluster.
pub const CLUSTER_STATE: &str = "envoy.tcp_proxy.cluster";

/// The filter state by which it is told to tunnel, where its listener can.
const NO_TUNNEL_STATE: &str = "envoy.tcp_proxy.disable_tunneling";
/// The property that names what is asked for in a tunnel.
const TUNNEL: &str = "portolan.tunnel";

/// How the names of chains begin that take the connections of a Sidecar's Unix sockets.
const EGRESS_SOCKET: &[u8] = b"egress_socket:";

/// Why a connection is closed.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    cause: Cause,
    reason: String,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let reason = format!("the host does not do what it was told: {status}");
        Refusal { cause: Cause::HostFailure, reason }
    }
}

impl<H: Host> Vm<H> {
    /// A connection has been accepted.
    pub fn on_new_connection(&mut self) -> Action {
        let Err(Refusal { cause, reason }) = self.route_connection() else { return Action::Continue };
        self.decided(Kind::Tcp, Outcome::Deny, cause);
        if !matches!(cause, Cause::Rule(_)) {
            vm::report(&self.host, self.report, &cause.as_str());
        }
        self.log(Level::Info, || format!("portolan: connection closed: {reason}"));
        // If this fails, the connection is at least not let on.
        let _ = self.host.close_downstream();
        Action::Pause
    }

    fn route_connection(&mut self) -> Result<(), Refusal> {
        let Vm { host, subscription, metrics, log_level, report, room, patterns, .. } = &mut *self;
        let Some(snapshot) = subscription.as_ref().and_then(|s| s.snapshot()) else {
            return self.connect_without_snapshot();
        };
        let Some(destination) = destination(host).filter(|at| at.port() != 0).or_else(|| socket(host)) else {
            let reason = "the host does not say the destination".to_owned();
            return Err(Refusal { cause: Cause::NoDestination, reason });
        };
        let sni = host.property("connection\0requested_server_name").filter(|name| !name.is_empty());
        let decision = snapshot.connection(&Connection { destination, sni: sni.as_deref() });
        if !matches!(decision.verdict, Verdict::Table { .. }) {
            vm::report(host, *report, &decision.reason);
        }
        let name = || printable(sni.as_deref().unwrap_or(b"-"));
        match decision.verdict {
            Verdict::Route { cluster } => {
                set_cluster(host, cluster.bytes(room))?;
                metrics.decided(host, Kind::Tcp, Outcome::Route, Cause::Rule(decision.reason.rule));
                vm::log(host, *log_level, Level::Debug, || {
                    format!("portolan: {destination} ({}) goes to {cluster} ({})", name(), decision.reason)
                });
                Ok(())
            }
            Verdict::Table { table } => {
                let matched = snapshot.routed(table, &NoHeaders, patterns);
                let reason = decision.reason.routed(matched.as_ref());
                vm::report(host, *report, &reason);
                let target = match matched.as_ref().map(|m| &m.action.outcome) {
                    Some(Routed::Forward(targets)) => carry::pick(targets),
                    _ => None,
                };
                let Some(target) = target else {
                    let cause = Cause::Rule(Rule::NoRoute);
                    return Err(Refusal {
                        cause,
                        reason: format!("{destination} ({}) has no route ({reason})", name()),
                    });
                };
                if let Some(tunnel) = target.extras.as_ref().map(|own| &own.tunnel).filter(|to| !to.is_empty()) {
                    host.set_property(TUNNEL, tunnel.as_bytes())?;
                    // As long as the connection, as the listener has set it.
                    set_state(host, NO_TUNNEL_STATE, b"false", 2)?;
                }
                set_cluster(host, target.cluster.as_bytes())?;
                metrics.decided(host, Kind::Tcp, Outcome::Route, Cause::Rule(reason.rule));
                vm::log(host, *log_level, Level::Debug, || {
                    format!("portolan: {destination} ({}) goes to {} ({reason})", name(), target.cluster)
                });
                Ok(())
            }
            Verdict::Deny { .. } => {
                let reason = format!("{destination} ({}) is refused ({})", name(), decision.reason);
                Err(Refusal { cause: Cause::Rule(decision.reason.rule), reason })
            }
        }
    }

    fn connect_without_snapshot(&mut self) -> Result<(), Refusal> {
        match self.no_snapshot() {
            NoSnapshot::Closed => {
                let reason = "the registry has not been received yet".to_owned();
                Err(Refusal { cause: Cause::NoSnapshot, reason })
            }
            NoSnapshot::Open => {
                set_cluster(&self.host, PASSTHROUGH_CLUSTER.as_bytes())?;
                self.decided(Kind::Tcp, Outcome::Route, Cause::NoSnapshot);
                vm::report(&self.host, self.report, &Cause::NoSnapshot.as_str());
                Ok(())
            }
        }
    }
}

/// What stands for the Unix socket that a connection came by, which its chain is named after.
fn socket(host: &impl Host) -> Option<SocketAddr> {
    let chain = host.property("xds\0filter_chain_name").filter(|name| name.starts_with(EGRESS_SOCKET))?;
    Some(socket_address(&chain))
}

fn set_cluster(host: &impl Host, cluster: &[u8]) -> Result<(), Status> {
    set_state(host, CLUSTER_STATE, cluster, 1)
}

#[cfg(test)]
#[path = "tcp_tests.rs"]
mod tests;
