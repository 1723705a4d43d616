//! Sidecar.

use crate::api::destination_rule::ConnectionPool;
use crate::api::gateway::ServerTls;
use crate::api::message::{enumeration, message};
use crate::api::virtual_service::Destination;
use crate::model::Labels;

message! {
    /// The spec.
    Sidecar {
        /// Workloads for which this holds, all of the namespace where absent.
        workload_selector: Option<WorkloadSelector> = "workloadSelector",
        /// Inbound listeners.
        ingress: Vec<IngressListener> = "ingress",
        /// Outbound listeners.
        egress: Vec<EgressListener> = "egress",
        /// Limits on inbound connections.
        inbound_connection_pool: Option<ConnectionPool> = "inboundConnectionPool",
        /// What happens to unknown destinations.
        outbound_traffic_policy: Option<OutboundTrafficPolicy> = "outboundTrafficPolicy",
    }
}

message! {
    /// Workloads by label.
    WorkloadSelector {
        /// Labels that they must have.
        labels: Labels = "labels",
    }
}

message! {
    /// A port of a Sidecar.
    SidecarPort {
        /// Number, 0 for a Unix socket.
        number: u32 = "number",
        /// Protocol.
        protocol: String = "protocol",
        /// Name.
        name: String = "name",
        /// Without meaning.
        target_port: u32 = "targetPort",
    }
}

message! {
    /// An outbound listener.
    EgressListener {
        /// Port; the one without takes all others.
        port: Option<SidecarPort> = "port",
        /// Address or `unix://` path to listen on.
        bind: String = "bind",
        /// How connections get here.
        capture_mode: CaptureMode = "captureMode",
        /// Hosts, `namespace/name`.
        hosts: Vec<String> = "hosts",
    }
}

message! {
    /// An inbound listener.
    IngressListener {
        /// Port.
        port: Option<SidecarPort> = "port",
        /// Address to listen on.
        bind: String = "bind",
        /// How connections get here.
        capture_mode: CaptureMode = "captureMode",
        /// Where the application listens.
        default_endpoint: String = "defaultEndpoint",
        /// TLS.
        tls: Option<ServerTls> = "tls",
        /// Limits on connections.
        connection_pool: Option<ConnectionPool> = "connectionPool",
    }
}

enumeration! {
    /// How connections get to a listener.
    CaptureMode {
        /// As the mesh does it.
        Default = 0 "DEFAULT",
        /// By redirection.
        Iptables = 1 "IPTABLES",
        /// They are made to it.
        None = 2 "NONE",
    }
}

message! {
    /// What happens to unknown destinations.
    OutboundTrafficPolicy {
        /// Mode; where absent they are refused.
        mode: OutboundMode = "mode",
        /// Where they go instead of where they want to.
        egress_proxy: Option<Destination> = "egressProxy",
    }
}

enumeration! {
    /// Modes of `outboundTrafficPolicy`.
    OutboundMode {
        /// Refused.
        RegistryOnly = 0 "REGISTRY_ONLY",
        /// Passed through.
        AllowAny = 1 "ALLOW_ANY",
    }
}
