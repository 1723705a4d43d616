//! The Sidecar resource that counts for a subscriber: what of the visible services it imports (SEMANTICS 6.2 to 6.4).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use portolan_proto::v1::{GatewayListener, GatewayServer};
use portolan_registry::lookup::{server_id, socket_address};

use super::service::{http_class, tls_class};
use crate::api::sidecar::{CaptureMode, EgressListener, OutboundMode as Mode, Sidecar};
use crate::model::{Checked, OutboundMode, Protocol, Role, Scope};
use crate::validate::predicates;
use crate::validate::service_entry::protocol;

/// Annotation, with the value `istiod`, of a Sidecar that is there for istiod alone: it keeps istiod from pushing the whole
/// registry to proxies that Portolan serves, and says nothing about what they may see.
const FOR: &str = "portolan.io/for";

/// The Sidecars that may count for a subscriber.
#[derive(Debug, Default)]
pub(crate) struct Sidecars {
    /// By whether they are the root namespace's and not the subscriber's, whether they have no selector, age and name.
    known: BTreeMap<(bool, bool, i64, String), Arc<Checked<Sidecar>>>,
}

impl Sidecars {
    fn place(object: &Checked<Sidecar>, scope: &Scope, root: &str) -> Option<(bool, bool, i64, String)> {
        let meta = &object.meta;
        let own = meta.namespace.as_str() == scope.namespace.as_str();
        let bare = object.spec.workload_selector.is_none();
        // The root namespace's hold for others only where they select nothing.
        let ours = meta.annotations.get(FOR).is_none_or(|whom| whom != "istiod");
        let counts = ours && scope.role == Role::Sidecar && (own || bare && meta.namespace.as_str() == root);
        counts.then(|| (!own, bare, meta.created, meta.name.to_string()))
    }

    pub(crate) fn insert(&mut self, object: &Arc<Checked<Sidecar>>, scope: &Scope, root: &str) {
        if let Some(place) = Self::place(object, scope, root) {
            self.known.insert(place, Arc::clone(object));
        }
    }

    pub(crate) fn remove(&mut self, object: &Checked<Sidecar>, scope: &Scope, root: &str) {
        if let Some(place) = Self::place(object, scope, root) {
            self.known.remove(&place);
        }
    }

    /// The one that counts: of the subscriber's namespace first one that selects it, then one that selects nothing, each
    /// time the oldest; else the root namespace's.
    pub(crate) fn chosen(&self, scope: &Scope) -> Option<Imports> {
        let selects = |object: &&Arc<Checked<Sidecar>>| {
            let labels = object.spec.workload_selector.iter().flat_map(|selector| &selector.labels);
            labels.into_iter().all(|(key, value)| scope.labels.get(key) == Some(value))
        };
        self.known.values().find(selects).map(|object| Imports::new(&object.spec, scope))
    }
}

/// What a Sidecar lets a subscriber see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Imports {
    pub(crate) listeners: Vec<Listener>,
    /// What happens to unknown destinations, where the Sidecar says so.
    pub(crate) outbound: Option<OutboundMode>,
    /// The cluster that what would pass through goes to instead.
    pub(crate) egress_proxy: Option<String>,
}

/// An egress listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listener {
    /// The port that it serves; `None`: all that no other listener has.
    pub(crate) port: Option<u16>,
    /// The port that it has in any case.
    bound_port: Option<u16>,
    /// How connections reach it.
    pub(crate) place: Place,
    /// What it binds, where that is no address of a port's.
    pub(crate) socket: Option<Socket>,
    hosts: Vec<Host>,
    excluded: Vec<Host>,
}

/// A Unix socket or a forward proxy: its services are those of all ports, and no listener of a port knows of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Socket {
    /// `ADDRESS:PORT` or `unix://PATH`.
    pub(crate) bind: String,
    /// Name of its filter chain.
    pub(crate) chain: String,
    /// It reads a server name.
    tls: bool,
}

impl Socket {
    /// A Unix socket, or a forward proxy with a port of its own. One to which connections are redirected is an ordinary
    /// listener of its port.
    fn new(listener: &EgressListener, place: &Place) -> Option<Socket> {
        let protocol = place.protocol?;
        let bind = match listener.bind.starts_with("unix://") {
            true => listener.bind.clone(),
            false if protocol == Protocol::HttpProxy && place.bound => {
                let port = u16::try_from(listener.port.as_ref()?.number).ok()?;
                SocketAddr::new(place.address?, port).to_string()
            }
            false => return None,
        };
        let kind = if http_class(protocol) { "egress_proxy" } else { "egress_socket" };
        Some(Socket { chain: format!("{kind}:{bind}"), bind, tls: tls_class(protocol) })
    }

    /// By what rows know it.
    pub(crate) fn id(&self) -> u32 {
        server_id(self.chain.as_bytes())
    }

    /// As hosts are told of it.
    pub(crate) fn listener(&self) -> GatewayListener {
        let http = self.chain.starts_with("egress_proxy:");
        let server = GatewayServer { name: self.chain.clone(), http, ..GatewayServer::default() };
        GatewayListener { bind: self.bind.clone(), servers: vec![server], inspects: self.tls, sniffs_http: false }
    }
}

/// Where an egress listener takes connections, and how it reads them (SEMANTICS 6.3).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// The one address at which it listens; `None`: where the service is.
    pub(crate) address: Option<IpAddr>,
    /// It has a socket of its own; else its connections are redirected ones.
    pub(crate) bound: bool,
    /// What it speaks, whatever the service does; `None`: as the service.
    pub(crate) protocol: Option<Protocol>,
    /// The [`Socket`] that it is, by its id; 0: none.
    pub(crate) socket: u32,
}

impl Place {
    fn new(listener: &EgressListener, v6_only: bool) -> Place {
        let bound = listener.capture_mode == CaptureMode::None;
        let localhost = if v6_only { IpAddr::from(Ipv6Addr::LOCALHOST) } else { Ipv4Addr::LOCALHOST.into() };
        let address = listener.bind.parse().ok().or(bound.then_some(localhost));
        let protocol = listener.port.as_ref().and_then(|port| protocol(&port.protocol));
        Place { address, bound, protocol, socket: 0 }
    }
}

/// `namespace/name`
#[derive(Debug, Clone, PartialEq, Eq)]
struct Host {
    /// `None` for all.
    namespace: Option<String>,
    name: String,
}

impl Imports {
    fn new(spec: &Sidecar, scope: &Scope) -> Imports {
        let outbound = spec.outbound_traffic_policy.as_ref().map(|policy| match policy.mode {
            Mode::AllowAny => OutboundMode::AllowAny,
            Mode::RegistryOnly | Mode::Other(_) => OutboundMode::RegistryOnly,
        });
        let proxy = spec.outbound_traffic_policy.as_ref().and_then(|policy| policy.egress_proxy.as_ref());
        let egress_proxy = proxy.filter(|_| outbound == Some(OutboundMode::AllowAny)).map(|to| {
            let port = to.port.as_ref().map_or(0, |port| port.number);
            format!("outbound|{port}|{}|{}", to.subset, to.host)
        });
        if spec.egress.is_empty() {
            let all = Host { namespace: None, name: "*".into() };
            let all = Listener {
                port: None,
                bound_port: None,
                place: Place::default(),
                socket: None,
                hosts: vec![all],
                excluded: Vec::new(),
            };
            return Imports { listeners: vec![all], outbound, egress_proxy };
        }
        let listeners = spec.egress.iter().map(|listener| Listener::new(listener, scope)).collect();
        Imports { listeners, outbound, egress_proxy }
    }

    /// Unix sockets and forward proxies.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = (&Socket, Option<u16>)> {
        self.listeners.iter().filter_map(|listener| Some((listener.socket.as_ref()?, listener.bound_port)))
    }

    /// Whether another listener has the virtual hosts of this port, so that the one without a port adds none.
    pub(crate) fn is_taken(&self, port: u16) -> bool {
        self.listeners.iter().any(|listener| listener.port == Some(port))
    }

    /// Whether another listener has this port at every address, so that the one without a port adds nothing there.
    pub(crate) fn is_taken_everywhere(&self, port: u16) -> bool {
        self.listeners.iter().any(|listener| listener.port == Some(port) && listener.place.address.is_none())
    }
}

impl Listener {
    fn new(listener: &EgressListener, scope: &Scope) -> Listener {
        let own = scope.namespace.as_str();
        let mut ips = scope.ips.iter().filter_map(|ip| ip.parse::<IpAddr>().ok()).peekable();
        let v6_only = ips.peek().is_some() && ips.all(|ip| ip.is_ipv6());
        let (mut hosts, mut excluded) = (Vec::new(), Vec::new());
        for (namespace, name) in listener.hosts.iter().filter_map(|host| host.split_once('/')) {
            let (list, namespace) = match namespace.strip_prefix('~') {
                Some(rest) => (&mut excluded, rest),
                None => (&mut hosts, namespace),
            };
            let namespace = match namespace {
                "" | "*" => None,
                "." => Some(own.to_owned()),
                other => Some(other.to_owned()),
            };
            list.push(Host { namespace, name: name.to_owned() });
        }
        let port = listener.port.as_ref().and_then(|port| u16::try_from(port.number).ok());
        let mut place = Place::new(listener, v6_only);
        let socket = Socket::new(listener, &place);
        if let Some(socket) = &socket {
            place.socket = socket.id();
            // What the filter finds its connections by, where they are not HTTP.
            place.address = Some(socket_address(socket.chain.as_bytes()).ip());
        }
        let own = port.filter(|port| *port != 0);
        Listener { port: own.filter(|_| socket.is_none()), bound_port: own, place, socket, hosts, excluded }
    }

    /// Whether it imports a VirtualService of that namespace with these hosts: one that has names in common is enough.
    pub(crate) fn imports_any(&self, namespace: &str, hosts: &[String]) -> bool {
        let entries = self.hosts.iter().filter(|entry| entry.namespace.as_deref().is_none_or(|of| of == namespace));
        entries.into_iter().any(|entry| hosts.iter().any(|host| predicates::hosts_match(host, &entry.name)))
    }

    /// Whether it imports a service of that namespace and host.
    pub(crate) fn imports(&self, namespace: &str, host: &str) -> bool {
        let within = |list: &[Host]| {
            list.iter().any(|entry| {
                entry.namespace.as_deref().is_none_or(|of| of == namespace)
                    && predicates::is_host_subset(host, &entry.name)
            })
        };
        within(&self.hosts) && !within(&self.excluded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::decode::Path;
    use crate::api::message::Decode;
    use crate::config::tree;
    use crate::model::Meta;

    fn sidecar(meta: Meta, spec: &str) -> Arc<Checked<Sidecar>> {
        let spec = Sidecar::decode(Some(&tree::parse(spec, 1).unwrap().root), &Path::root("spec"), &mut Vec::new());
        Arc::new(Checked { meta, spec })
    }

    fn listener(hosts: &str) -> Listener {
        let object = sidecar(Meta::default(), &format!("egress: [{{hosts: {hosts}}}]"));
        Listener::new(&object.spec.egress[0], &Scope { namespace: "own".into(), ..Scope::default() })
    }

    #[test]
    fn hosts_and_exclusions() {
        let some = listener("['./*', other/a.example.com, '*/*.w.com', '~./secret.example.com', '~/x.w.com']");
        for (namespace, host, imported) in [
            ("own", "b.example.com", true),
            ("own", "secret.example.com", false),
            ("other", "a.example.com", true),
            ("other", "secret.example.com", false),
            ("third", "a.example.com", false),
            ("third", "b.w.com", true),
            ("third", "x.w.com", false),
            ("third", "*.w.com", true),
            ("third", "*.com", false),
        ] {
            assert_eq!(some.imports(namespace, host), imported, "{namespace}/{host}");
        }
        assert!(!listener("['~/*']").imports("own", "a.example.com"));
    }

    #[test]
    fn the_one_that_counts() {
        let scope = |label: &str| Scope {
            namespace: "own".into(),
            labels: [("app".to_owned(), label.to_owned())].into(),
            ..Scope::default()
        };
        let named = |namespace: &str, name: &str, created: i64, spec: &str| {
            let meta =
                Meta { namespace: namespace.parse().unwrap(), name: name.parse().unwrap(), created, ..Meta::default() };
            sidecar(meta, spec)
        };
        let mut sidecars = Sidecars::default();
        let port = |sidecars: &Sidecars, label: &str| {
            sidecars.chosen(&scope(label)).map(|imports| imports.listeners[0].port.unwrap())
        };
        let egress = |port: u16| format!("egress: [{{port: {{number: {port}, protocol: HTTP}}, hosts: ['./*']}}]");
        let all = [
            named("root", "a", 0, &egress(1)),
            named("own", "young", 9, &egress(2)),
            named("own", "old", 3, &egress(3)),
            named("own", "selecting", 20, &format!("workloadSelector: {{labels: {{app: x}}}}\n{}", egress(4))),
            named("other", "a", 0, &egress(5)),
        ];
        let expected = [(Some(1), Some(1)), (Some(2), Some(2)), (Some(3), Some(3)), (Some(4), Some(3))];
        for (object, (x, y)) in all.iter().zip(expected.into_iter().chain([(Some(4), Some(3))])) {
            sidecars.insert(object, &scope("x"), "root");
            assert_eq!((port(&sidecars, "x"), port(&sidecars, "y")), (x, y), "{}", object.meta.name);
        }
        sidecars.remove(&all[2], &scope("x"), "root");
        assert_eq!(port(&sidecars, "y"), Some(2));
    }

    #[test]
    fn an_empty_policy_refuses() {
        let mode = |spec: &str| Imports::new(&sidecar(Meta::default(), spec).spec, &Scope::default()).outbound;
        assert_eq!(mode("outboundTrafficPolicy: {}"), Some(OutboundMode::RegistryOnly));
        assert_eq!(mode("outboundTrafficPolicy: {mode: ALLOW_ANY}"), Some(OutboundMode::AllowAny));
        assert_eq!(mode("egress: [{hosts: ['./*']}]"), None);
    }
}
