//! The wildcard listener of each port: whose chains survive on it (SEMANTICS 3.4, 3.5), kept up to date claim by claim.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use portolan_proto::v1::{AddressListener, GatewayListener, GatewayServer, Inspection, ListenerPlan};

use super::chains::PortClaim;
use super::service::Order;
use crate::model::Protocol;

/// Which protocols share a listener. MONGO and MYSQL share with nobody: the first to come decides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    /// All but MONGO and MYSQL.
    #[default]
    Shared,
    /// This one alone.
    Only(Protocol),
}

impl Mode {
    /// The listener that a chain of this protocol makes.
    pub(crate) fn of(first: Protocol) -> Self {
        if alone(first) { Mode::Only(first) } else { Mode::Shared }
    }

    pub(crate) fn takes(self, protocol: Protocol) -> bool {
        match self {
            Mode::Shared => !alone(protocol),
            Mode::Only(only) => protocol == only,
        }
    }
}

fn alone(protocol: Protocol) -> bool {
    matches!(protocol, Protocol::Mongo | Protocol::Mysql)
}

/// The listener of one address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct At {
    /// What is told apart there.
    pub(crate) inspection: Inspection,
    /// All is HTTP, whatever its bytes.
    pub(crate) only_http: bool,
    /// It has a socket of its own.
    pub(crate) bound: bool,
}

impl At {
    fn captured(self, address: IpAddr) -> Option<AddressListener> {
        let inspection = Some(self.inspection);
        (!self.bound).then(|| AddressListener { address: address.to_string(), inspection })
    }

    fn socket(self, address: IpAddr) -> Option<GatewayListener> {
        let chain = |http: bool| GatewayServer {
            name: if http { "http" } else { "tcp" }.to_owned(),
            http,
            ..GatewayServer::default()
        };
        let http = self.inspection.http.then(|| chain(true));
        let tcp = (!self.only_http).then(|| chain(false));
        self.bound.then(|| GatewayListener {
            bind: address.to_string(),
            servers: http.into_iter().chain(tcp).collect(),
            inspects: self.inspection.tls,
            sniffs_http: self.inspection.http && !self.only_http,
        })
    }
}

/// All that is known of one port.
#[derive(Debug, Default)]
pub(crate) struct PortState {
    claims: BTreeMap<Order, PortClaim>,
    /// Claims without any condition, in order.
    all: BTreeSet<Order>,
    http: usize,
    sni: usize,
    dials: usize,
    /// Claims of protocols that share with nobody.
    alone: usize,
    mode: Mode,
    /// Prefixes that have a row, and whether server names are asked for there.
    nets: BTreeMap<IpNet, bool>,
    /// Addresses that have a row, and how they listen.
    addresses: BTreeMap<IpAddr, At>,
}

impl PortState {
    pub(crate) fn add(&mut self, order: Order, claim: PortClaim) {
        self.remove(&order);
        self.http += usize::from(claim.http);
        self.sni += usize::from(claim.sni);
        self.dials += usize::from(claim.dials);
        self.alone += usize::from(alone(claim.protocol));
        if claim.all {
            self.all.insert(order.clone());
        }
        self.claims.insert(order, claim);
    }

    pub(crate) fn remove(&mut self, order: &Order) {
        if let Some(claim) = self.claims.remove(order) {
            self.http -= usize::from(claim.http);
            self.sni -= usize::from(claim.sni);
            self.dials -= usize::from(claim.dials);
            self.alone -= usize::from(alone(claim.protocol));
            self.all.remove(order);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.claims.is_empty() && self.nets.is_empty() && self.addresses.is_empty()
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// Settles whose listener it is; true if that changed.
    pub(crate) fn settle(&mut self) -> bool {
        let mode = self.claims.first_key_value().map_or(Mode::Shared, |(_, c)| Mode::of(c.protocol));
        std::mem::replace(&mut self.mode, mode) != mode
    }

    /// Services with a claim, in order.
    pub(crate) fn orders(&self) -> impl Iterator<Item = &Order> {
        self.claims.keys()
    }

    /// Those that would take everything, first the one that does.
    pub(crate) fn everything(&self) -> impl Iterator<Item = &Order> {
        self.all.iter().filter(|o| self.claims.get(o).is_some_and(|c| self.mode.takes(c.protocol)))
    }

    /// Services that another protocol keeps out, in order.
    pub(crate) fn kept_out(&self) -> impl Iterator<Item = &Order> {
        let mixed = self.alone > 0;
        self.claims.iter().take_while(move |_| mixed).filter(|(_, c)| !self.mode.takes(c.protocol)).map(|(o, _)| o)
    }

    pub(crate) fn http(&self) -> bool {
        self.http > 0 && self.mode == Mode::Shared
    }

    pub(crate) fn nets(&self) -> impl Iterator<Item = &IpNet> {
        self.nets.keys()
    }

    /// Notes what became of the row of a prefix.
    pub(crate) fn set_net(&mut self, net: IpNet, sni: Option<bool>) {
        match sni {
            Some(sni) => drop(self.nets.insert(net, sni)),
            None => drop(self.nets.remove(&net)),
        }
    }

    /// Notes what became of the row of an address.
    pub(crate) fn set_address(&mut self, address: IpAddr, at: Option<At>) {
        match at {
            Some(at) => drop(self.addresses.insert(address, at)),
            None => drop(self.addresses.remove(&address)),
        }
    }

    /// Is there a wildcard listener?
    pub(crate) fn wildcard(&self) -> bool {
        self.claims.values().any(|c| self.mode.takes(c.protocol))
    }

    /// The listener plan of the port (SEMANTICS 3.4); `None` without listeners.
    pub(crate) fn plan(&self, port: u16) -> Option<ListenerPlan> {
        let dials = self.mode == Mode::Shared && self.dials > 0;
        let sni = dials || self.mode == Mode::Shared && self.sni > 0 || self.nets.values().any(|sni| *sni);
        let wildcard = self.wildcard().then(|| Inspection { tls: sni, http: self.http() });
        (wildcard.is_some() || !self.addresses.is_empty()).then(|| ListenerPlan {
            port: port.into(),
            wildcard,
            tcp_prefixes: self.nets.keys().map(ToString::to_string).collect(),
            addresses: self.addresses.iter().filter_map(|(address, at)| at.captured(*address)).collect(),
            dials_server_names: dials,
            gateway: self.addresses.iter().filter_map(|(address, at)| at.socket(*address)).collect(),
        })
    }
}
