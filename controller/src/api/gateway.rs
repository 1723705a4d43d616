//! Gateway.

use crate::api::message::{enumeration, message};
use crate::model::Labels;

message! {
    /// The spec.
    Gateway {
        /// Servers.
        servers: Vec<Server> = "servers",
        /// Labels of the gateway's workloads.
        selector: Labels = "selector",
    }
}

message! {
    /// A port of a gateway and the hosts behind it.
    Server {
        /// Port.
        port: Option<Port> = "port",
        /// Address or `unix://` path to listen on.
        bind: String = "bind",
        /// Hosts, `[namespace/]name`.
        hosts: Vec<String> = "hosts",
        /// TLS.
        tls: Option<ServerTls> = "tls",
        /// Not honoured by Istio.
        default_endpoint: String = "defaultEndpoint",
        /// Name, for statistics.
        name: String = "name",
    }
}

message! {
    /// A port.
    Port {
        /// Number.
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
    /// TLS of a server.
    ServerTls {
        /// Whether plain HTTP is redirected.
        https_redirect: bool = "httpsRedirect",
        /// Mode.
        mode: ServerTlsMode = "mode",
        /// File of the certificate.
        server_certificate: String = "serverCertificate",
        /// File of its key.
        private_key: String = "privateKey",
        /// File of certificate authorities for clients.
        ca_certificates: String = "caCertificates",
        /// File of revocations.
        ca_crl: String = "caCrl",
        /// Secret that holds them.
        credential_name: String = "credentialName",
        /// Secrets of several certificates.
        credential_names: Vec<String> = "credentialNames",
        /// Secret of the authorities.
        ca_cert_credential_name: String = "caCertCredentialName",
        /// Several certificates by file.
        tls_certificates: Vec<TlsCertificate> = "tlsCertificates",
        /// Names of which a client's certificate must have one.
        subject_alt_names: Vec<String> = "subjectAltNames",
        /// Hashes of clients' keys.
        verify_certificate_spki: Vec<String> = "verifyCertificateSpki",
        /// Hashes of clients' certificates.
        verify_certificate_hash: Vec<String> = "verifyCertificateHash",
        /// Lowest version.
        min_protocol_version: TlsProtocol = "minProtocolVersion",
        /// Highest version.
        max_protocol_version: TlsProtocol = "maxProtocolVersion",
        /// Cipher suites.
        cipher_suites: Vec<String> = "cipherSuites",
        /// Curves of the key exchange.
        ecdh_curves: Vec<String> = "ecdhCurves",
        /// Whether clients' certificates are taken unseen.
        insecure_skip_verify: Option<bool> = "insecureSkipVerify",
    }
}

message! {
    /// A certificate by file.
    TlsCertificate {
        /// File of the certificate.
        server_certificate: String = "serverCertificate",
        /// File of its key.
        private_key: String = "privateKey",
        /// File of certificate authorities for clients.
        ca_certificates: String = "caCertificates",
    }
}

enumeration! {
    /// Modes of TLS at a server.
    ServerTlsMode {
        /// By SNI to where a VirtualService says.
        Passthrough = 0 "PASSTHROUGH",
        /// Server certificate.
        Simple = 1 "SIMPLE",
        /// Both certificates.
        Mutual = 2 "MUTUAL",
        /// By SNI to where the SNI says.
        AutoPassthrough = 3 "AUTO_PASSTHROUGH",
        /// Both, from the mesh.
        IstioMutual = 4 "ISTIO_MUTUAL",
        /// Server certificate, and the client's if it has one.
        OptionalMutual = 5 "OPTIONAL_MUTUAL",
    }
}

enumeration! {
    /// Versions of TLS.
    TlsProtocol {
        /// As the proxy likes.
        Auto = 0 "TLS_AUTO",
        /// 1.0
        V1_0 = 1 "TLSV1_0",
        /// 1.1
        V1_1 = 2 "TLSV1_1",
        /// 1.2
        V1_2 = 3 "TLSV1_2",
        /// 1.3
        V1_3 = 4 "TLSV1_3",
    }
}
