//! HTTP contexts: one decision for each request, when its headers have come.

use std::borrow::Cow;

use portolan_registry::decision::{Rule, Verdict};
use portolan_registry::lookup::{Listener, PASSTHROUGH_CLUSTER, Request, server_id, server_of};

use crate::carry::{self, Carried};
use crate::config::NoSnapshot;
use crate::host::pairs::Pairs;
use crate::host::{Action, Answer, Host, Level, Status, address, destination, printable};
use crate::metrics::{Cause, Kind, Outcome};
use crate::request::Headers;
use crate::vm::{self, Vm};

/// The header by which the host's route chooses its cluster.
pub const CLUSTER_HEADER: &str = "x-portolan-cluster";

/// The header by which the host says where a request came in, if the configuration promises that: its address and port,
/// [`PROXY`], or the name of a chain that is an [`EGRESS_PROXY`]. What a client says there the host has replaced.
pub const DESTINATION_HEADER: &str = "x-portolan-destination";
/// It came to the HTTP proxy.
const PROXY: &[u8] = b"proxy";

/// Name of the host's filter chain that takes HTTP proxy requests.
const PROXY_CHAIN: &[u8] = b"http_proxy";
/// How the names of chains begin that take the requests of a Sidecar's own forward proxies.
const EGRESS_PROXY: &[u8] = b"egress_proxy:";

/// Does this header give orders to the host, and is it none that an application may send under Istio? Timeouts and
/// retries are the application's; the original destination, faults, and what the host says about itself are not.
fn is_control(name: &[u8]) -> bool {
    let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
    let begins = |prefix: &str| name.get(..prefix.len()).is_some_and(|n| n.eq_ignore_ascii_case(prefix.as_bytes()));
    begins("x-portolan-")
        || begins("x-envoy-fault-")
        || is("x-envoy-original-dst-host")
        || is("x-envoy-decorator-operation")
        || is("x-envoy-internal")
}

/// An answer in place of the upstream's.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    status: u16,
    cause: Cause,
    /// For people: what was refused, and why.
    body: String,
}

impl Refusal {
    fn new(status: u16, cause: Cause, body: &str) -> Self {
        Refusal { status, cause, body: body.to_owned() }
    }

    fn details(&self) -> Cow<'static, str> {
        match self.cause {
            Cause::Rule(rule) => Cow::Owned(format!("portolan_denied{{{}}}", rule.as_str())),
            Cause::NoSnapshot => Cow::Borrowed("portolan_no_snapshot"),
            Cause::NoAuthority => Cow::Borrowed("portolan_no_authority"),
            Cause::NoDestination => Cow::Borrowed("portolan_no_destination"),
            Cause::HostFailure => Cow::Borrowed("portolan_host_failure"),
        }
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let body = format!("portolan: the host does not do what it was told: {status}");
        Refusal { status: 503, cause: Cause::HostFailure, body }
    }
}

/// What was read of the request.
struct Head<'h> {
    authority: &'h [u8],
    connect: bool,
    /// Where it came in, as the host says by [`DESTINATION_HEADER`].
    destination: Option<&'h [u8]>,
}

impl<H: Host> Vm<H> {
    /// The headers of a request have come.
    pub fn on_request_headers(&mut self, context: u32) -> Action {
        let refusal = match self.route_request(context) {
            Ok(None) => return Action::Continue,
            Ok(Some((answer, delay))) if delay > 0 && self.answer_later(context, answer.clone(), delay) => {
                return Action::Pause;
            }
            Ok(Some((answer, _))) => match self.host.answer(&answer) {
                Ok(()) => return Action::Pause,
                Err(status) => Refusal::from(status),
            },
            Err(refusal) => refusal,
        };
        self.decided(Kind::Http, Outcome::Deny, refusal.cause);
        if !matches!(refusal.cause, Cause::Rule(_)) {
            vm::report(&self.host, self.report, &refusal.cause.as_str());
        }
        self.log(Level::Info, || format!("{} ({})", refusal.body, refusal.status));
        let body = format!("{}\n", refusal.body);
        if self.host.local_response(refusal.status, &refusal.details(), &body).is_err() {
            // Refused it stays; if this fails as well, the request is at least not let on.
            let _ = self.host.reset_request();
        }
        Action::Pause
    }

    /// The headers of a response have come.
    pub fn on_response_headers(&mut self, context: u32) -> Action {
        // One that cannot be changed is passed on as it is: the upstream has done its work already.
        if let Some(Err(status)) = self.pending.remove(&context).map(|pending| pending.apply(&self.host)) {
            self.log(Level::Warn, || format!("portolan: a response's headers cannot be changed: {status}"));
        }
        Action::Continue
    }

    /// Says where the request goes, or how it is answered.
    fn route_request(&mut self, context: u32) -> Result<Option<(Box<Answer>, u32)>, Refusal> {
        let headers = self.host.request_headers()?;
        let head = read_head(&self.host, &headers, self.destination_header)?;
        let Vm { host, subscription, metrics, log_level, report, destination_header, room, patterns, pending, .. } =
            &mut *self;
        let Some(snapshot) = subscription.as_ref().and_then(|s| s.snapshot()) else {
            return self.route_without_snapshot().map(|()| None);
        };
        let told = *destination_header && !snapshot.globals().gateway;
        let listener = if told { told_by(head.destination) } else { asked(host, snapshot.globals().gateway) };
        let no_destination =
            || Refusal::new(503, Cause::NoDestination, "portolan: the host does not say the destination");
        let listener = listener.ok_or_else(no_destination)?;
        let decision = snapshot.request(&Request { listener, authority: head.authority, connect: head.connect });
        let rule = decision.reason.rule;
        if !matches!(decision.verdict, Verdict::Table { .. }) {
            vm::report(host, *report, &decision.reason);
        }
        match decision.verdict {
            Verdict::Route { cluster } => {
                if let Some(retry) = snapshot.globals().retry.as_ref().filter(|_| rule < Rule::PassThrough) {
                    carry::retries(host, &Headers(&headers), retry)?;
                }
                set_cluster(host, cluster.bytes(room))?;
                metrics.decided(host, Kind::Http, Outcome::Route, Cause::Rule(rule));
                vm::log(host, *log_level, Level::Debug, || {
                    format!("portolan: {} goes to {cluster} ({})", printable(head.authority), decision.reason)
                });
                Ok(None)
            }
            Verdict::Table { table } => {
                let request = Headers(&headers);
                let matched = snapshot.routed(table, &request, patterns);
                let reason = decision.reason.routed(matched.as_ref());
                vm::report(host, *report, &reason);
                let Some(matched) = matched else {
                    let body =
                        format!("portolan: no route takes the request to {} ({reason})", printable(head.authority));
                    return Err(Refusal { status: 404, cause: Cause::Rule(Rule::NoRoute), body });
                };
                let carried = carry::carry_out(host, &request, &matched, patterns)?;
                metrics.decided(host, Kind::Http, Outcome::Route, Cause::Rule(reason.rule));
                vm::log(host, *log_level, Level::Debug, || {
                    format!("portolan: {}: {reason}", printable(head.authority))
                });
                Ok(match carried {
                    Carried::Answered(answer, delay) => Some((answer, delay)),
                    Carried::On(changes) => {
                        pending.extend(changes.map(|changes| (context, changes)));
                        None
                    }
                })
            }
            Verdict::Deny { status } => {
                let what = match rule {
                    Rule::Blocked => "is not in the registry",
                    Rule::NoVirtualHost => "has no virtual host",
                    Rule::BadName => "cannot be a host name",
                    _ => "is refused",
                };
                let body = format!("portolan: {} {what} ({})", printable(head.authority), decision.reason);
                Err(Refusal { status, cause: Cause::Rule(rule), body })
            }
        }
    }

    fn route_without_snapshot(&mut self) -> Result<(), Refusal> {
        match self.no_snapshot() {
            NoSnapshot::Closed => {
                Err(Refusal::new(503, Cause::NoSnapshot, "portolan: the registry has not been received yet"))
            }
            NoSnapshot::Open => {
                set_cluster(&self.host, PASSTHROUGH_CLUSTER.as_bytes())?;
                self.decided(Kind::Http, Outcome::Route, Cause::NoSnapshot);
                vm::report(&self.host, self.report, &Cause::NoSnapshot.as_str());
                Ok(())
            }
        }
    }
}

/// Finds what the decision needs, and removes what a client must not say.
fn read_head<'h>(host: &impl Host, headers: &'h [u8], told: bool) -> Result<Head<'h>, Refusal> {
    let malformed = |_| Refusal::new(503, Cause::HostFailure, "portolan: the host's headers cannot be read");
    let no_authority = || Refusal::new(400, Cause::NoAuthority, "portolan: the request does not name one host");
    let mut authority: Option<&[u8]> = None;
    let mut connect = false;
    let mut destination: Option<&[u8]> = None;
    for pair in Pairs::new(headers).map_err(malformed)? {
        let (name, value) = pair.map_err(malformed)?;
        match name.first() {
            Some(b':') if name == b":authority" => {
                if authority.replace(value).is_some() {
                    return Err(no_authority());
                }
            }
            Some(b':') if name == b":method" => connect = value == b"CONNECT",
            // Of two there would be one that the host did not set: neither counts.
            Some(b'x') if told && name == DESTINATION_HEADER.as_bytes() => {
                destination = if destination.is_none() { Some(value) } else { Some(b"") };
            }
            Some(b'x' | b'X') if is_control(name) => host.remove_request_header(name)?,
            _ => {}
        }
    }
    let authority = authority.ok_or_else(no_authority)?;
    Ok(Head { authority, connect, destination })
}

/// Where the request came in, as the host's header says.
fn told_by(destination: Option<&[u8]>) -> Option<Listener> {
    match destination? {
        PROXY => Some(Listener::Proxy),
        chain if chain.starts_with(EGRESS_PROXY) => Some(Listener::EgressProxy(server_id(chain))),
        captured => address(captured).map(Listener::Captured),
    }
}

/// The same, as the host's properties say. Only a loopback address can be that of the proxy port; the chains of a gateway
/// bear the names of its servers' virtual hosts.
fn asked(host: &impl Host, gateway: bool) -> Option<Listener> {
    let destination = destination(host)?;
    if !gateway && !destination.ip().is_loopback() {
        return Some(Listener::Captured(destination));
    }
    let chain = host.property("xds\0filter_chain_name").unwrap_or_default();
    Some(match &*chain {
        PROXY_CHAIN => Listener::Proxy,
        name if name.starts_with(EGRESS_PROXY) => Listener::EgressProxy(server_id(name)),
        name if gateway => Listener::Gateway { port: destination.port(), server: server_of(name, destination.port()) },
        _ => Listener::Captured(destination),
    })
}

pub(crate) fn set_cluster(host: &impl Host, cluster: &[u8]) -> Result<(), Status> {
    // The route is chosen anew without being told to: of a module of this ABI version every change of request headers
    // does that (Envoy since 1.33; before it, of any module).
    host.replace_request_header(CLUSTER_HEADER, cluster)
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
