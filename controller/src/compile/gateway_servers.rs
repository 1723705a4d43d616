//! The servers of all Gateways of one workload, as listeners: who shares a port, and who is refused (SEMANTICS 6.1).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use portolan_registry::row::{Origin, OriginKind};

use super::service::http_class;
use crate::api::gateway::{Gateway, Server as Spec, ServerTlsMode as Mode};
use crate::model::{Checked, Protocol};
use crate::validate::service_entry::protocol;

/// How a server reads its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// HTTP without TLS.
    Http,
    /// Bytes.
    Tcp,
    /// HTTP in TLS that ends here.
    Https,
    /// Bytes in TLS that ends here.
    Tls,
    /// TLS that is passed on by its server name.
    Passthrough,
}

impl Class {
    fn of(spec: &Spec, protocol: Protocol) -> Class {
        match &spec.tls {
            _ if http_class(protocol) => Class::Http,
            None => Class::Tcp,
            Some(tls) if matches!(tls.mode, Mode::Passthrough | Mode::AutoPassthrough) => Class::Passthrough,
            Some(_) if protocol == Protocol::Https => Class::Https,
            Some(_) => Class::Tls,
        }
    }

    /// Whether its connections are told apart by their server names.
    pub(crate) fn by_name(self) -> bool {
        matches!(self, Class::Https | Class::Tls | Class::Passthrough)
    }
}

/// A server that was taken.
#[derive(Debug)]
pub(crate) struct Server<'g> {
    pub(crate) origin: Origin,
    /// `namespace/name` of its Gateway, to which VirtualServices bind.
    pub(crate) gateway: String,
    pub(crate) spec: &'g Spec,
    pub(crate) class: Class,
    /// Hosts, `name` or `namespace/name`.
    pub(crate) hosts: Vec<String>,
    /// The port as written, which is what routes ask for.
    pub(crate) number: u16,
    /// Name of its virtual hosts; shared by the HTTP servers of a listener.
    pub(crate) name: String,
}

impl Server<'_> {
    /// Its hosts that VirtualServices of a namespace may bind to.
    pub(crate) fn hosts_for<'s>(&'s self, namespace: &'s str) -> impl Iterator<Item = &'s str> {
        self.hosts.iter().filter_map(move |host| match host.split_once('/') {
            Some((only, host)) => (only == namespace).then_some(host),
            None => Some(host.as_str()),
        })
    }

    /// Server names; empty for any.
    pub(crate) fn server_names(&self) -> Vec<String> {
        let names = self.hosts.iter().map(|host| host.split_once('/').map_or(host.as_str(), |(_, host)| host));
        let names: BTreeSet<String> = names.map(str::to_lowercase).collect();
        if names.contains("*") { Vec::new() } else { names.into_iter().collect() }
    }
}

/// Port and address of a listener; no address for all of them.
pub(crate) type At = (u16, String);

/// The servers of each listener, and those that found their place taken.
#[derive(Debug, Default)]
pub(crate) struct Merged<'g> {
    pub(crate) listeners: BTreeMap<At, Vec<Server<'g>>>,
    /// What was asked for, who has it, and who does not get it.
    pub(crate) refused: Vec<(String, Origin, Origin)>,
}

/// Puts the servers of these Gateways, in their order, on listeners. `target` translates the port of a Service in front of
/// the workload.
pub(crate) fn merge<'g>(
    gateways: impl Iterator<Item = &'g Arc<Checked<Gateway>>>,
    target: impl Fn(u16) -> u16,
) -> Merged<'g> {
    let mut out = Merged::default();
    // Whose each server name of a listener is.
    let mut names: BTreeMap<(At, String), Origin> = BTreeMap::new();
    for gateway in gateways {
        let meta = &gateway.meta;
        let origin = Origin { namespace: meta.namespace.clone(), name: meta.name.clone(), kind: OriginKind::Gateway };
        for spec in &gateway.spec.servers {
            let Some(port) = &spec.port else { continue };
            let Some(number) = u16::try_from(port.number).ok().filter(|number| *number != 0) else { continue };
            let Some(bind) = bind(&spec.bind) else { continue };
            let at = (target(number), bind);
            let protocol = protocol(&port.protocol).unwrap_or(Protocol::Tcp);
            let class = Class::of(spec, protocol);
            let hosts = sanitized(&spec.hosts, &meta.namespace);
            let dot = if at.1.is_empty() { "" } else { "." };
            let secure = || format!("{number}.{}.{}.{}{dot}{}", port.name, meta.name, meta.namespace, at.1);
            let name = match class {
                Class::Http => format!("http.{}{dot}{}", at.0, at.1),
                Class::Https => format!("https.{}", secure()),
                Class::Tls => format!("tls.{}", secure()),
                Class::Tcp | Class::Passthrough => "tcp".to_owned(),
            };
            let taken = out.listeners.get(&at).and_then(|here| refused(here, class)).or_else(|| {
                let tls = spec.tls.as_ref().map(|_| &hosts);
                tls.into_iter().flatten().find_map(|host| names.get(&(at.clone(), host.clone())))
            });
            if let Some(winner) = taken {
                let subject = format!("port {} of the gateway, server {}", at.0, port.name);
                out.refused.push((subject, winner.clone(), origin.clone()));
                continue;
            }
            if spec.tls.is_some() {
                names.extend(hosts.iter().map(|host| ((at.clone(), host.clone()), origin.clone())));
            }
            let gateway = format!("{}/{}", meta.namespace, meta.name);
            let server = Server { origin: origin.clone(), gateway, spec, class, hosts, number, name };
            out.listeners.entry(at).or_default().push(server);
        }
    }
    out
}

/// Who has the place of one more server of this class: HTTP shares with HTTP, TLS with TLS, bytes with nobody.
fn refused<'h>(here: &'h [Server<'_>], class: Class) -> Option<&'h Origin> {
    let plain = here.iter().find(|server| !server.class.by_name());
    match plain {
        Some(first) => (class != Class::Http || first.class != Class::Http).then_some(&first.origin),
        // Without TLS it takes what asks for no name, if nobody else does.
        None if class.by_name() => None,
        None => here.iter().find(|server| server.server_names().is_empty()).map(|server| &server.origin),
    }
}

/// The address to bind; `None` for a Unix socket.
fn bind(text: &str) -> Option<String> {
    match text.parse::<std::net::IpAddr>() {
        Ok(address) if address.is_unspecified() => Some(String::new()),
        Ok(address) => Some(address.to_string()),
        Err(_) => text.is_empty().then(String::new),
    }
}

/// Hosts without `./` and `*/`.
fn sanitized(hosts: &[String], namespace: &str) -> Vec<String> {
    if hosts.iter().any(|host| host == "*/*") {
        return vec!["*".to_owned()];
    }
    let host = |host: &String| match host.split_once('/') {
        Some((".", host)) => format!("{namespace}/{host}"),
        Some(("*", host)) => host.to_owned(),
        _ => host.clone(),
    };
    hosts.iter().map(host).collect()
}

/// A Gateway as a VirtualService names it, by namespace and name.
pub(crate) fn resolved(name: &str, namespace: &str) -> String {
    match name.split_once('/') {
        Some((".", name)) => format!("{namespace}/{name}"),
        Some(_) => name.to_owned(),
        // The old form is that of a DNS name.
        None => match name.split_once('.') {
            Some((name, rest)) => format!("{}/{name}", rest.split('.').next().unwrap_or_default()),
            None => format!("{namespace}/{name}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_has_four_ways_to_be_named() {
        for name in ["infra/g", "./g", "g", "g.infra.svc.cluster.local", "g.infra"] {
            assert_eq!(resolved(name, "infra"), "infra/g", "{name}");
        }
        assert_eq!(resolved("other/g", "infra"), "other/g");
    }

    #[test]
    fn hosts_name_the_namespaces_that_may_bind() {
        let hosts = ["./a.com", "*/b.com", "ns/c.com", "d.com"].map(str::to_owned);
        assert_eq!(sanitized(&hosts, "own"), ["own/a.com", "b.com", "ns/c.com", "d.com"]);
        assert_eq!(sanitized(&["a.com".into(), "*/*".into()], "own"), ["*"]);
    }
}
