//! What a stock Envoy needs from us beside clusters: its bootstrap, and the listeners that carry out the listener plans.

pub mod bootstrap;
mod chains;
mod client_tls;
mod cluster;
pub mod listeners;
pub mod server_tls;
pub mod settings;

use portolan_proto::envoy::envoy::config::core::v3::socket_address::PortSpecifier;
use portolan_proto::envoy::envoy::config::core::v3::{Address, SocketAddress, address};
use portolan_proto::envoy::google::protobuf::{Any, BoolValue, UInt32Value};
use prost::{Message, Name};
use std::net::IpAddr;

pub use self::cluster::{absent, adapt};

/// Name of the cluster in the bootstrap that refuses every connection, as istiod names it.
pub const BLACK_HOLE: &str = "BlackHoleCluster";

fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

// Envoy's optional numbers and switches are all wrapped in an option.
#[allow(clippy::unnecessary_wraps)]
fn switch(value: bool) -> Option<BoolValue> {
    Some(BoolValue { value })
}

#[allow(clippy::unnecessary_wraps)]
fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

fn socket_address(ip: IpAddr, port: u16) -> Address {
    let socket = SocketAddress {
        address: ip.to_string(),
        port_specifier: Some(PortSpecifier::PortValue(port.into())),
        ..SocketAddress::default()
    };
    Address { address: Some(address::Address::SocketAddress(socket)) }
}
