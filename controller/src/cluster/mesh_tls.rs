//! The mesh's own TLS (`ISTIO_MUTUAL`, SEMANTICS 5.9): its certificates are files where the host runs.

use portolan_proto::envoy::envoy::config::cluster::v3::Cluster;
use portolan_proto::envoy::envoy::config::core::v3::{
    DataSource, TransportSocket, data_source::Specifier, transport_socket::ConfigType,
};
use portolan_proto::envoy::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use portolan_proto::envoy::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use portolan_proto::envoy::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, TlsCertificate, TlsParameters, UpstreamTlsContext,
    common_tls_context::ValidationContextType, tls_parameters::TlsProtocol,
};
use portolan_proto::envoy::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};
use prost::Message;

use super::{any, policy, tls};
use crate::api::destination_rule::ClientTls;

/// The certificate with its chain, its key, and the authorities of others, as Istio's proxy calls them.
pub(crate) const FILES: [&str; 3] = ["cert-chain.pem", "key.pem", "root-cert.pem"];
/// Stands for the folder until the host is known.
pub(crate) const FOLDER: &str = "mesh-certificates:";

/// A file before it is known where it is.
pub(crate) fn unplaced(file: &str) -> String {
    format!("{FOLDER}{file}")
}

const TLS: &str = "envoy.transport_sockets.tls";
const PROXY_PROTOCOL: &str = "envoy.transport_sockets.upstream_proxy_protocol";

/// The transport socket of a cluster, to be placed. `names` are those that endpoints' certificates may have where the rule
/// does not say.
// As for other TLS, the older field for names.
#[allow(deprecated)]
pub(super) fn socket(settings: &ClientTls, cluster: &str, http2: bool, names: &[String]) -> TransportSocket {
    let own = &settings.subject_alt_names;
    let exact = |name: &String| StringMatcher {
        match_pattern: Some(MatchPattern::Exact(name.clone())),
        ..StringMatcher::default()
    };
    let [chain, key, authorities] = FILES.map(|file| tls::file(&format!("{FOLDER}{file}")));
    let validation = CertificateValidationContext {
        trusted_ca: authorities,
        match_subject_alt_names: if own.is_empty() { names } else { own }.iter().map(exact).collect(),
        ..CertificateValidationContext::default()
    };
    let certificate = TlsCertificate { certificate_chain: chain, private_key: key, ..TlsCertificate::default() };
    let protocols: &[&str] = if http2 { &["istio", "h2"] } else { &["istio"] };
    let context = UpstreamTlsContext {
        sni: if settings.sni.is_empty() { cluster.replace('|', "_.") } else { settings.sni.clone() },
        common_tls_context: Some(CommonTlsContext {
            tls_params: Some(TlsParameters {
                tls_minimum_protocol_version: TlsProtocol::TlSv12.into(),
                tls_maximum_protocol_version: TlsProtocol::TlSv13.into(),
                ..TlsParameters::default()
            }),
            tls_certificates: vec![certificate],
            alpn_protocols: protocols.iter().map(|name| (*name).to_owned()).collect(),
            validation_context_type: Some(ValidationContextType::ValidationContext(validation)),
            ..CommonTlsContext::default()
        }),
        ..UpstreamTlsContext::default()
    };
    policy::socket(TLS, &context)
}

/// Says where a host has the mesh's certificates. A host without any speaks plain text, as to endpoints that are not in the
/// mesh.
pub fn place(cluster: &mut Cluster, folder: Option<&str>) {
    cluster.transport_socket = cluster.transport_socket.take().and_then(|socket| placed(socket, folder));
}

fn placed(socket: TransportSocket, folder: Option<&str>) -> Option<TransportSocket> {
    let Some(ConfigType::TypedConfig(config)) = &socket.config_type else { return Some(socket) };
    if socket.name == PROXY_PROTOCOL {
        let Ok(mut outer) = ProxyProtocolUpstreamTransport::decode(&*config.value) else { return Some(socket) };
        let plain = || policy::socket("envoy.transport_sockets.raw_buffer", &RawBuffer::default());
        outer.transport_socket = outer.transport_socket.map(|inner| placed(inner, folder).unwrap_or_else(plain));
        return Some(TransportSocket { config_type: Some(ConfigType::TypedConfig(any(&outer))), ..socket });
    }
    if socket.name != TLS {
        return Some(socket);
    }
    let Ok(mut context) = UpstreamTlsContext::decode(&*config.value) else { return Some(socket) };
    let Some(common) = &mut context.common_tls_context else { return Some(socket) };
    let Some(own) = common.tls_certificates.first_mut().filter(|own| is_ours(own.certificate_chain.as_ref())) else {
        return Some(socket);
    };
    let folder = folder?;
    let [chain, key, authorities] = FILES.map(|file| format!("{folder}/{file}"));
    own.certificate_chain = tls::file(&chain);
    own.private_key = tls::file(&key);
    own.watched_directory = tls::directory(&chain);
    if let Some(ValidationContextType::ValidationContext(validation)) = &mut common.validation_context_type {
        validation.trusted_ca = tls::file(&authorities);
        validation.watched_directory = tls::directory(&authorities);
    }
    Some(TransportSocket { config_type: Some(ConfigType::TypedConfig(any(&context))), ..socket })
}

fn is_ours(file: Option<&DataSource>) -> bool {
    matches!(file.and_then(|file| file.specifier.as_ref()), Some(Specifier::Filename(path)) if path.starts_with(FOLDER))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> Cluster {
        let socket = socket(&ClientTls::default(), "outbound|80|v1|a.com", false, &["spiffe://x".to_owned()]);
        Cluster { transport_socket: Some(socket), ..Cluster::default() }
    }

    #[test]
    fn certificates_are_where_the_host_has_them() {
        let mut cluster = cluster();
        place(&mut cluster, Some("/etc/certs"));
        let Some(ConfigType::TypedConfig(config)) = cluster.transport_socket.unwrap().config_type else { panic!() };
        let context = UpstreamTlsContext::decode(&*config.value).unwrap();
        assert_eq!(context.sni, "outbound_.80_.v1_.a.com");
        let own = &context.common_tls_context.unwrap().tls_certificates[0];
        assert_eq!(own.private_key, tls::file("/etc/certs/key.pem"));
    }

    #[test]
    fn without_certificates_there_is_plain_text() {
        let mut cluster = cluster();
        place(&mut cluster, None);
        assert_eq!(cluster.transport_socket, None);
    }
}
