//! TLS that a cluster begins. Its files are the Envoy's own, as with istiod; an Envoy reads files again only where they are
//! secrets of a discovery service, so that is what they become.

use portolan_proto::envoy::envoy::config::core::v3::{DataSource, TransportSocket, data_source, transport_socket};
use portolan_proto::envoy::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use portolan_proto::envoy::envoy::extensions::transport_sockets::tls::v3::{
    CommonTlsContext, UpstreamTlsContext,
    common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
};
use prost::{Message, Name};

use super::any;
use super::server_tls::{authorities_named, certificate_named};

/// Has the files of a transport socket read again when they change.
pub(super) fn renew_files(socket: &mut TransportSocket) {
    let Some(transport_socket::ConfigType::TypedConfig(config)) = &mut socket.config_type else { return };
    if config.type_url == ProxyProtocolUpstreamTransport::type_url() {
        // TLS is within it.
        let Ok(mut outer) = ProxyProtocolUpstreamTransport::decode(&*config.value) else { return };
        outer.transport_socket.iter_mut().for_each(renew_files);
        *config = any(&outer);
    }
    if config.type_url != UpstreamTlsContext::type_url() {
        return;
    }
    let Ok(mut context) = UpstreamTlsContext::decode(&*config.value) else { return };
    if let Some(common) = &mut context.common_tls_context {
        name_files(common);
        *config = any(&context);
    }
}

fn name_files(common: &mut CommonTlsContext) {
    common.tls_certificates.retain(|one| {
        let (Some(certificate), Some(key)) = (path(one.certificate_chain.as_ref()), path(one.private_key.as_ref()))
        else {
            return true;
        };
        common.tls_certificate_sds_secret_configs.push(certificate_named(certificate, key));
        false
    });
    let Some(ValidationContextType::ValidationContext(validation)) = &mut common.validation_context_type else {
        return;
    };
    let Some(authorities) = path(validation.trusted_ca.as_ref()).map(authorities_named) else { return };
    validation.trusted_ca = None;
    validation.watched_directory = None;
    let combined = CombinedCertificateValidationContext {
        default_validation_context: Some(std::mem::take(validation)),
        validation_context_sds_secret_config: Some(authorities),
        ..CombinedCertificateValidationContext::default()
    };
    common.validation_context_type = Some(ValidationContextType::CombinedValidationContext(combined));
}

fn path(source: Option<&DataSource>) -> Option<&str> {
    match source?.specifier.as_ref()? {
        data_source::Specifier::Filename(path) => Some(path),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use portolan_proto::envoy::envoy::extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, TlsCertificate,
    };

    use super::*;

    fn file(path: &str) -> Option<DataSource> {
        let specifier = Some(data_source::Specifier::Filename(path.to_owned()));
        Some(DataSource { specifier, ..DataSource::default() })
    }

    #[test]
    fn files_are_secrets_and_the_rest_stays() {
        let own = TlsCertificate {
            certificate_chain: file("/c/tls.crt"),
            private_key: file("/c/tls.key"),
            ..TlsCertificate::default()
        };
        let validation = CertificateValidationContext {
            trusted_ca: file("/c/ca.crt"),
            crl: file("/c/crl"),
            ..CertificateValidationContext::default()
        };
        let common = CommonTlsContext {
            tls_certificates: vec![own],
            validation_context_type: Some(ValidationContextType::ValidationContext(validation)),
            alpn_protocols: vec!["h2".to_owned()],
            ..CommonTlsContext::default()
        };
        let context =
            UpstreamTlsContext { sni: "a.com".to_owned(), common_tls_context: Some(common), ..Default::default() };
        let config_type = Some(transport_socket::ConfigType::TypedConfig(any(&context)));
        let mut socket = TransportSocket { name: "tls".to_owned(), config_type };
        renew_files(&mut socket);
        let Some(transport_socket::ConfigType::TypedConfig(config)) = socket.config_type else { panic!("no config") };
        let renewed = UpstreamTlsContext::decode(&*config.value).unwrap();
        assert_eq!(renewed.sni, "a.com");
        let common = renewed.common_tls_context.unwrap();
        assert_eq!((common.tls_certificates.len(), common.alpn_protocols.len()), (0, 1));
        assert_eq!(common.tls_certificate_sds_secret_configs[0].name, "file-cert:/c/tls.crt~/c/tls.key");
        let Some(ValidationContextType::CombinedValidationContext(both)) = common.validation_context_type else {
            panic!("not combined")
        };
        assert_eq!(both.validation_context_sds_secret_config.unwrap().name, "file-root:/c/ca.crt");
        let rest = both.default_validation_context.unwrap();
        assert_eq!((rest.trusted_ca, rest.crl), (None, file("/c/crl")));
    }
}
