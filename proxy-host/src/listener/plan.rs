//! The listener plan: how a captured connection is read before the filter is asked (SEMANTICS 0.2, step 1).

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use portolan_proto::v1;
use serde::Serialize;

use super::{
    gateway::{Bind, GatewayListener, Place},
    sniff::Inspection,
};

/// What the plan says of one destination.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry {
    /// The first bytes to read.
    pub inspection: Inspection,
    /// TCP whatever the bytes are: the destination lies in an addressed TCP service's prefix.
    pub tcp: bool,
}

/// A plan that cannot be executed; the last good one of its port stays.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// The port does not fit.
    #[error("port {0} is not a TCP port")]
    Port(u32),
    /// Not an IP address.
    #[error("address {0:?} is not an IP address")]
    Address(String),
    /// Neither an address and port, nor a Unix socket.
    #[error("socket {0:?} is neither an address and port nor a Unix socket")]
    Socket(String),
    /// Not a CIDR.
    #[error("prefix {0:?} is not a CIDR")]
    Prefix(String),
}

/// The plan of one port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PortPlan {
    wildcard: Option<Inspection>,
    tcp_prefixes: Vec<IpNet>,
    addresses: HashMap<IpAddr, Inspection>,
    /// What is to be bound.
    pub gateway: Vec<GatewayListener>,
}

impl PortPlan {
    /// Reads the message.
    ///
    /// # Errors
    /// A port, address or prefix that is none.
    pub fn read(message: &v1::ListenerPlan) -> Result<(u16, Self), PlanError> {
        let port = u16::try_from(message.port).map_err(|_| PlanError::Port(message.port))?;
        let inspection = |i: &v1::Inspection| Inspection { tls: i.tls, http: i.http };
        let mut addresses = HashMap::new();
        for listener in &message.addresses {
            let address = listener.address.parse().map_err(|_| PlanError::Address(listener.address.clone()))?;
            addresses.insert(address, listener.inspection.as_ref().map(inspection).unwrap_or_default());
        }
        let tcp_prefixes = (message.tcp_prefixes.iter())
            .map(|prefix| prefix.parse().map_err(|_| PlanError::Prefix(prefix.clone())))
            .collect::<Result<_, _>>()?;
        let read = |listener| GatewayListener::read(listener, port);
        let gateway = message.gateway.iter().map(read).collect::<Result<_, _>>()?;
        Ok((port, Self { wildcard: message.wildcard.as_ref().map(inspection), tcp_prefixes, addresses, gateway }))
    }
}

/// The plans of all ports; port 0 is the catch-all listener.
#[derive(Debug, Clone, Default)]
pub struct Plans(pub HashMap<u16, PortPlan>);

impl Plans {
    /// The exact listener of an address, else the wildcard of its port, else the catch-all.
    #[must_use]
    pub fn entry(&self, destination: SocketAddr) -> Entry {
        let address = destination.ip().to_canonical();
        if let Some(plan) = self.0.get(&destination.port()).filter(|_| destination.port() != 0) {
            if let Some(inspection) = plan.addresses.get(&address) {
                return Entry { inspection: *inspection, tcp: false };
            }
            if let Some(inspection) = plan.wildcard {
                return Entry { inspection, tcp: plan.tcp_prefixes.iter().any(|prefix| prefix.contains(&address)) };
            }
        }
        Entry { inspection: self.0.get(&0).and_then(|plan| plan.wildcard).unwrap_or_default(), tcp: false }
    }
}

impl Plans {
    /// The listener that a connection to this address of the proxy came by: one of that address, else one of
    /// all.
    #[must_use]
    pub fn gateway(&self, own: SocketAddr) -> Option<&GatewayListener> {
        let at = |bind: &Bind| self.0.get(&own.port())?.gateway.iter().find(|listener| listener.bind == *bind);
        let ip = own.ip().to_canonical();
        at(&Bind::Address(ip))
            .or_else(|| at(&Bind::All))
            .or_else(|| self.socket(&Place::Tcp(SocketAddr::new(ip, own.port()))))
    }

    /// The listener of a socket that is no port's.
    #[must_use]
    pub fn socket(&self, place: &Place) -> Option<&GatewayListener> {
        let is = |listener: &&GatewayListener| matches!(&listener.bind, Bind::Socket(socket) if socket == place);
        self.0.get(&0)?.gateway.iter().find(is)
    }

    /// What is to be bound; `all` stands for all addresses.
    pub fn gateway_addresses(&self, all: IpAddr) -> impl Iterator<Item = Place> {
        let listeners =
            self.0.iter().flat_map(|(port, plan)| plan.gateway.iter().map(move |listener| (port, listener)));
        listeners.map(move |(port, listener)| match &listener.bind {
            Bind::All => Place::Tcp(SocketAddr::new(all, *port)),
            Bind::Address(ip) => Place::Tcp(SocketAddr::new(*ip, *port)),
            Bind::Socket(place) => place.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans(messages: &[v1::ListenerPlan]) -> Plans {
        Plans(messages.iter().map(|m| PortPlan::read(m).unwrap()).collect())
    }

    fn message() -> v1::ListenerPlan {
        v1::ListenerPlan {
            port: 443,
            wildcard: Some(v1::Inspection { tls: true, http: true }),
            tcp_prefixes: vec!["10.2.0.0/16".into()],
            addresses: vec![v1::AddressListener { address: "10.0.0.1".into(), inspection: None }],
            ..Default::default()
        }
    }

    #[test]
    fn exact_address_then_wildcard_then_catch_all() {
        let plans = plans(&[message()]);
        let both = Inspection { tls: true, http: true };
        assert_eq!(plans.entry("10.0.0.1:443".parse().unwrap()), Entry::default());
        assert_eq!(plans.entry("[::ffff:10.0.0.1]:443".parse().unwrap()), Entry::default());
        assert_eq!(plans.entry("10.2.9.9:443".parse().unwrap()), Entry { inspection: both, tcp: true });
        assert_eq!(plans.entry("9.9.9.9:443".parse().unwrap()), Entry { inspection: both, tcp: false });
        assert_eq!(plans.entry("9.9.9.9:80".parse().unwrap()), Entry::default());
    }

    #[test]
    fn a_port_without_wildcard_leaves_other_addresses_to_the_catch_all() {
        let all = v1::ListenerPlan { wildcard: Some(v1::Inspection { tls: false, http: true }), ..Default::default() };
        let plans = plans(&[all, v1::ListenerPlan { wildcard: None, ..message() }]);
        let http = Inspection { tls: false, http: true };
        assert_eq!(plans.entry("9.9.9.9:443".parse().unwrap()), Entry { inspection: http, tcp: false });
        assert_eq!(plans.entry("10.2.0.1:443".parse().unwrap()), Entry { inspection: http, tcp: false });
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        assert_eq!(PortPlan::read(&v1::ListenerPlan { port: 70000, ..message() }), Err(PlanError::Port(70000)));
        let bad = v1::ListenerPlan { tcp_prefixes: vec!["10.0.0.0/99".into()], ..message() };
        assert_eq!(PortPlan::read(&bad), Err(PlanError::Prefix("10.0.0.0/99".into())));
    }
}
