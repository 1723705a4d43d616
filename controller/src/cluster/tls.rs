//! TLS that a cluster begins (SEMANTICS 5.9).

use portolan_proto::envoy::envoy::config::core::v3 as core;
use portolan_proto::envoy::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, TlsCertificate, TlsParameters, UpstreamTlsContext,
    common_tls_context::ValidationContextType, tls_parameters::TlsProtocol,
};
use portolan_proto::envoy::envoy::extensions::upstreams::http::v3::{HttpProtocolOptions, http_protocol_options};
use portolan_proto::envoy::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};

use super::{mesh_tls, policy};
use crate::api::destination_rule::{ClientTls, ClientTlsMode};

/// The transport socket of these settings; `None` for plain text. `names` are those that a ServiceEntry says the
/// server's certificate has.
///
/// The mesh's own TLS has its certificates where the host has them, which [`super::mesh_tls::place`] says. A `credentialName` is not read either, as no sidecar of Istio's
/// does without a workload selector.
// Envoy's newer field takes one matcher for each type of name; the older one, which istiod writes, takes any type.
#[allow(deprecated)]
pub(super) fn socket(
    settings: &ClientTls,
    cluster: &str,
    options: &mut HttpProtocolOptions,
    names: &[String],
) -> Option<core::TransportSocket> {
    if settings.mode == ClientTlsMode::IstioMutual {
        return Some(mesh_tls::socket(settings, cluster, is_http2(options), names));
    }
    if !matches!(settings.mode, ClientTlsMode::Simple | ClientTlsMode::Mutual) || !settings.credential_name.is_empty() {
        return None;
    }
    let own = &settings.subject_alt_names;
    let names = if own.is_empty() { names } else { own };
    let insecure = settings.insecure_skip_verify == Some(true);
    let verified = !insecure && !settings.ca_certificates.is_empty();
    let exact = |name: &String| StringMatcher {
        match_pattern: Some(MatchPattern::Exact(name.clone())),
        ..StringMatcher::default()
    };
    let validation = verified.then(|| CertificateValidationContext {
        trusted_ca: file(&settings.ca_certificates),
        watched_directory: directory(&settings.ca_certificates),
        match_subject_alt_names: names.iter().map(exact).collect(),
        crl: file(&settings.ca_crl),
        ..CertificateValidationContext::default()
    });
    let certificate = (settings.mode == ClientTlsMode::Mutual).then(|| TlsCertificate {
        certificate_chain: file(&settings.client_certificate),
        private_key: file(&settings.private_key),
        watched_directory: directory(&settings.client_certificate),
        ..TlsCertificate::default()
    });
    if settings.sni.is_empty() {
        // For HTTP the name asked for is the server's name.
        options.upstream_http_protocol_options = Some(core::UpstreamHttpProtocolOptions {
            auto_sni: true,
            auto_san_validation: verified && own.is_empty(),
            ..core::UpstreamHttpProtocolOptions::default()
        });
    }
    let context = UpstreamTlsContext {
        sni: settings.sni.clone(),
        common_tls_context: Some(CommonTlsContext {
            tls_params: Some(TlsParameters {
                tls_minimum_protocol_version: TlsProtocol::TlSv12.into(),
                tls_maximum_protocol_version: TlsProtocol::TlSv13.into(),
                ..TlsParameters::default()
            }),
            tls_certificates: certificate.into_iter().collect(),
            alpn_protocols: if is_http2(options) { vec!["h2".to_owned()] } else { Vec::new() },
            validation_context_type: validation.map(ValidationContextType::ValidationContext),
            ..CommonTlsContext::default()
        }),
        ..UpstreamTlsContext::default()
    };
    Some(policy::socket("envoy.transport_sockets.tls", &context))
}

fn is_http2(options: &HttpProtocolOptions) -> bool {
    use http_protocol_options::explicit_http_config::ProtocolConfig;
    match &options.upstream_protocol_options {
        Some(http_protocol_options::UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => {
            matches!(explicit.protocol_config, Some(ProtocolConfig::Http2ProtocolOptions(_)))
        }
        _ => false,
    }
}

pub(super) fn file(path: &str) -> Option<core::DataSource> {
    (!path.is_empty()).then(|| core::DataSource {
        specifier: Some(core::data_source::Specifier::Filename(path.to_owned())),
        ..core::DataSource::default()
    })
}

/// Envoy reads a file again when its directory is changed by a move, as a mounted Secret is.
pub(super) fn directory(path: &str) -> Option<core::WatchedDirectory> {
    let parent = std::path::Path::new(path).parent()?.to_str()?;
    (!parent.is_empty()).then(|| core::WatchedDirectory { path: parent.to_owned(), ..Default::default() })
}
