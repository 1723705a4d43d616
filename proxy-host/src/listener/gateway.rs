//! Ports of a gateway, and sockets of a Sidecar's egress listeners that have some: they come and go with the listener plans, and a
//! connection is read as its server wants it.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use portolan_proto::v1;
use serde::{Serialize, Serializer};
use tokio::{net::TcpStream, task::AbortHandle};

use super::{
    Kind, Open, canonical, http, inspect, is_http2,
    plan::PlanError,
    read_until,
    rewind::Rewind,
    sniff::{Inspection, Sniffed},
    tcp,
    termination::Settings,
    unix,
};
use crate::{config::Role, filter::Via, worker::Worker};

/// The address of what has none.
pub(super) const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// Time between two attempts to bind what could not be bound.
const AGAIN: Duration = Duration::from_secs(1);

/// What a listener binds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Bind {
    /// The plan's port at all addresses.
    All,
    /// The plan's port at this one.
    Address(IpAddr),
    /// A socket that is no port's.
    Socket(Place),
}

/// Where a socket is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
pub enum Place {
    /// An address and port.
    Tcp(SocketAddr),
    /// The path of a Unix socket; one that begins with `@` is abstract.
    Unix(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Tcp(address) => address.fmt(f),
            Place::Unix(path) => path.fmt(f),
        }
    }
}

/// What listens at one address, or at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GatewayListener {
    /// Where.
    pub bind: Bind,
    /// A `ClientHello` is read for its server name.
    inspects: bool,
    /// Plain-text HTTP is told by its first bytes, and goes to the server with HTTP.
    sniffs_http: bool,
    servers: Vec<Server>,
}

/// A server of a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Server {
    /// Name of the filter chain.
    #[serde(serialize_with = "text")]
    name: Arc<str>,
    http: bool,
    /// Server names in lower case, some with a star before the first dot; none: any.
    names: Vec<String>,
    /// Shown as whether there is any.
    #[serde(serialize_with = "is_there")]
    tls: Option<Arc<Settings>>,
}

fn text<S: Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

#[allow(clippy::ref_option, reason = "serde gives the field")]
fn is_there<S: Serializer>(tls: &Option<Arc<Settings>>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bool(tls.is_some())
}

impl GatewayListener {
    /// Reads the message.
    ///
    /// # Errors
    /// An address that is none.
    pub fn read(message: &v1::GatewayListener, port: u16) -> Result<Self, PlanError> {
        let bind = match (message.bind.as_str(), message.bind.strip_prefix("unix://")) {
            (_, Some(path)) => Bind::Socket(Place::Unix(path.to_owned())),
            (socket, None) if port == 0 => {
                Bind::Socket(Place::Tcp(socket.parse().map_err(|_| PlanError::Socket(socket.to_owned()))?))
            }
            ("", None) => Bind::All,
            (address, None) => Bind::Address(address.parse().map_err(|_| PlanError::Address(address.to_owned()))?),
        };
        let server = |server: &v1::GatewayServer| Server {
            name: server.name.as_str().into(),
            http: server.http,
            names: server.server_names.iter().map(|name| name.to_ascii_lowercase()).collect(),
            tls: server.tls.as_ref().map(|tls| Arc::new(Settings::read(tls))),
        };
        let servers = message.servers.iter().map(server).collect();
        Ok(Self { bind, inspects: message.inspects, sniffs_http: message.sniffs_http, servers })
    }

    /// The server of a connection whose first bytes these were.
    fn chosen(&self, sniffed: &Sniffed) -> Option<&Server> {
        let http = matches!(sniffed, Sniffed::Http1 | Sniffed::Http2);
        match sniffed {
            _ if self.sniffs_http => self.servers.iter().find(|server| server.http == http),
            Sniffed::Tls(name) => self.server(name.as_deref()),
            _ => self.server(None),
        }
    }

    /// The server of a connection that asks for this name, as Envoy finds a filter chain: the name itself, else the
    /// longest wildcard, else one that names none.
    fn server(&self, name: Option<&[u8]>) -> Option<&Server> {
        let name = name.map(<[u8]>::to_ascii_lowercase).unwrap_or_default();
        let rank = |pattern: &String| match pattern.strip_prefix('*') {
            None => (pattern.as_bytes() == name).then_some(usize::MAX),
            Some(suffix) => (name.len() > suffix.len() && name.ends_with(suffix.as_bytes())).then_some(suffix.len()),
        };
        let named = self.servers.iter().filter_map(|s| Some((s.names.iter().filter_map(rank).max()?, s)));
        let best = named.max_by_key(|(rank, _)| *rank).map(|(_, server)| server);
        best.or_else(|| self.servers.iter().find(|server| server.names.is_empty()))
    }
}

/// The addresses that one worker has bound because the plans say so.
#[derive(Default)]
pub struct Ports {
    bound: HashMap<Place, AbortHandle>,
    /// Those that could not be, which has been said.
    failed: HashSet<Place>,
}

impl Ports {
    /// Binds what the plans ask for, and leaves what they do not. Connections that are open go on.
    pub fn follow(&mut self, worker: &Rc<Worker>) {
        let v6 = worker.config.identity.ips.iter().any(IpAddr::is_ipv6);
        let all = if v6 { IpAddr::from(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
        // A Unix socket cannot be shared as a port is: the first worker has it.
        let ours = |place: &Place| matches!(place, Place::Tcp(_)) || worker.index == 0;
        let wanted: HashSet<Place> = worker.plans().gateway_addresses(all).filter(ours).collect();
        worker.terminations.forget();
        self.bound.retain(|address, task| {
            let stays = wanted.contains(address);
            if !stays {
                task.abort();
            }
            stays
        });
        self.failed.retain(|address| wanted.contains(address));
        for address in wanted {
            if self.bound.contains_key(&address) {
                continue;
            }
            let accepting = match &address {
                Place::Tcp(address) => super::bind(*address)
                    .and_then(super::listen)
                    .map(|listener| tokio::task::spawn_local(super::accept(worker.clone(), listener, Kind::Gateway))),
                Place::Unix(path) => unix::listen(path)
                    .map(|listener| tokio::task::spawn_local(unix::accept(worker.clone(), listener, path.clone()))),
            };
            match accepting {
                Ok(task) => {
                    self.failed.remove(&address);
                    self.bound.insert(address, task.abort_handle());
                }
                Err(error) => {
                    if self.failed.insert(address.clone()) {
                        tracing::error!(%address, "a port of a Gateway or Sidecar cannot be listened on: {error}; trying again");
                    }
                }
            }
        }
    }

    /// Follows the plans until the process is to end.
    pub async fn run(mut self, worker: Rc<Worker>) {
        let (mut plans, mut stop) = (worker.plans_changed(), worker.stop.clone());
        plans.mark_unchanged();
        loop {
            let again = !self.failed.is_empty();
            tokio::select! {
                changed = plans.changed() => if changed.is_err() {
                    return;
                },
                () = tokio::time::sleep(AGAIN), if again => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            self.follow(&worker);
        }
    }
}

/// Serves one connection to a gateway's port, or to the Unix socket of this path.
pub(super) async fn serve(
    worker: Rc<Worker>,
    stream: TcpStream,
    source: SocketAddr,
    open: Rc<Open>,
    path: Option<String>,
) {
    let plans = worker.plans();
    let found = match path {
        Some(path) => plans.socket(&Place::Unix(path)).map(|listener| (listener, NOWHERE)),
        None => stream.local_addr().ok().map(canonical).and_then(|own| Some((plans.gateway(own)?, own))),
    };
    let Some((listener, own)) = found else { return };
    let time = worker.config.http.header_time;
    let inspection = Inspection { tls: listener.inspects, http: listener.sniffs_http };
    let Some((sniffed, client)) = inspect(worker.stop.clone(), stream, inspection, time).await else { return };
    let Some(server) = listener.chosen(&sniffed) else {
        tracing::debug!(%source, %own, "no server of the gateway has this name");
        return tcp::reset(&client);
    };
    let name = match sniffed {
        Sniffed::Tls(name) => name,
        _ => None,
    };
    let via = match worker.config.identity.role {
        Role::Gateway => Via::Gateway { chain: server.name.clone(), secure: server.tls.is_some() },
        Role::Sidecar if matches!(listener.bind, Bind::Socket(_)) => Via::EgressSocket(server.name.clone()),
        Role::Sidecar => Via::Egress,
    };
    // What knows a socket by its chain needs no address.
    let own = if matches!(via, Via::EgressSocket(_)) { NOWHERE } else { own };
    let mut connection = worker.connection(source, own, via);
    connection.server_name = name;
    let Some(tls) = &server.tls else {
        let connection = Rc::new(connection);
        if !server.http {
            return tcp::proxy(&worker, connection, client).await;
        }
        let Some((http2, client)) = version(&worker, client).await else { return };
        return http::serve(worker, connection, client, http2, open).await;
    };
    let (tls, http) = (tls.clone(), server.http);
    drop(plans);
    let Some(accepted) = worker.terminations.accept(&tls, client, &worker).await else { return };
    let client = accepted.stream;
    connection.client_certificate = accepted.client;
    let connection = Rc::new(connection);
    if !http {
        return tcp::proxy(&worker, connection, Rewind::secure(bytes::Bytes::new(), client)).await;
    }
    if client.get_ref().1.alpn_protocol().is_some_and(|agreed| agreed == b"h2") {
        return http::serve(worker, connection, Rewind::secure(bytes::Bytes::new(), client), true, open).await;
    }
    let mut client = client;
    let mut read = BytesMut::new();
    let http2 = read_until(worker.stop.clone(), &mut client, &mut read, time, is_http2).await;
    let Some(http2) = http2 else { return };
    let client = Rewind::secure(read.freeze(), client);
    http::serve(worker, connection, client, http2.unwrap_or(false), open).await;
}

/// Whether a client speaks HTTP/2, of which bytes may have been read already.
async fn version(worker: &Worker, mut client: Rewind) -> Option<(bool, Rewind)> {
    let mut read = BytesMut::from(client.take_read());
    let time = worker.config.http.header_time;
    let http2 = read_until(worker.stop.clone(), &mut client, &mut read, time, is_http2).await?;
    Some((http2.unwrap_or(false), client.with_read(read.freeze())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(servers: &[(&str, &[&str])]) -> GatewayListener {
        let server = |(name, names): &(&str, &[&str])| v1::GatewayServer {
            name: (*name).into(),
            server_names: names.iter().map(|name| (*name).to_owned()).collect(),
            ..v1::GatewayServer::default()
        };
        let servers = servers.iter().map(server).collect();
        GatewayListener::read(&v1::GatewayListener { servers, ..v1::GatewayListener::default() }, 443).unwrap()
    }

    #[test]
    fn a_server_is_found_by_its_name_then_by_the_longest_wildcard() {
        let listener =
            listener(&[("com", &["*.com"]), ("a", &["a.com", "A.org"]), ("deep", &["*.b.com"]), ("any", &[])]);
        for (name, server) in
            [("a.com", "a"), ("a.ORG", "a"), ("x.b.com", "deep"), ("b.com", "com"), (".com", "any"), ("a.net", "any")]
        {
            assert_eq!(&*listener.server(Some(name.as_bytes())).unwrap().name, server, "{name}");
        }
        assert_eq!(&*listener.server(None).unwrap().name, "any");
    }

    #[test]
    fn without_a_server_for_any_name_a_connection_goes_nowhere() {
        let listener = listener(&[("a", &["a.com"])]);
        assert!(listener.server(None).is_none() && listener.server(Some(b"b.com")).is_none());
    }
}
