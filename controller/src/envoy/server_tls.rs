//! TLS of clients that ends in a gateway's listener.

use std::path::Path;

use portolan_proto::envoy::envoy::config::core::v3 as core;
use portolan_proto::envoy::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, TlsCertificate, TlsParameters,
    certificate_validation_context::TrustChainVerification, common_tls_context::ValidationContextType,
};
use portolan_proto::envoy::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};
use portolan_proto::v1::ServerTls;

use super::{any, switch};

/// The transport socket. `credentials` is the folder of secrets.
// Envoy's newer field takes one matcher for each type of name; the older one, which istiod writes, takes any type.
#[allow(deprecated)]
pub(super) fn socket(tls: &ServerTls, credentials: Option<&str>) -> core::TransportSocket {
    let certificates = tls.certificates.iter().map(|one| {
        let (certificate, key) = match one.secret.as_str() {
            "" => (one.certificate.clone(), one.key.clone()),
            secret => (within(credentials, secret, "tls.crt"), within(credentials, secret, "tls.key")),
        };
        TlsCertificate {
            watched_directory: directory(&certificate),
            certificate_chain: file(&certificate),
            private_key: file(&key),
            ..TlsCertificate::default()
        }
    });
    let ca = if tls.ca_of_secret { within(credentials, &tls.ca, "ca.crt") } else { tls.ca.clone() };
    let exact = |name: &String| StringMatcher {
        match_pattern: Some(MatchPattern::Exact(name.clone())),
        ..StringMatcher::default()
    };
    let validation = (tls.any_client || !ca.is_empty()).then(|| CertificateValidationContext {
        watched_directory: directory(&ca),
        trusted_ca: file(&ca),
        match_subject_alt_names: tls.client_names.iter().map(exact).collect(),
        crl: file(&tls.revocations),
        trust_chain_verification: if tls.any_client {
            TrustChainVerification::AcceptUntrusted.into()
        } else {
            TrustChainVerification::VerifyTrustChain.into()
        },
        ..CertificateValidationContext::default()
    });
    let parameters = TlsParameters {
        tls_minimum_protocol_version: i32::try_from(tls.min_version).unwrap_or_default(),
        tls_maximum_protocol_version: i32::try_from(tls.max_version).unwrap_or_default(),
        cipher_suites: tls.ciphers.clone(),
        ..TlsParameters::default()
    };
    let context = DownstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            tls_params: (parameters != TlsParameters::default()).then_some(parameters),
            tls_certificates: certificates.collect(),
            alpn_protocols: tls.protocols.clone(),
            validation_context_type: validation.map(ValidationContextType::ValidationContext),
            ..CommonTlsContext::default()
        }),
        require_client_certificate: switch(tls.client_required),
        ..DownstreamTlsContext::default()
    };
    core::TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(any(&context))),
    }
}

/// A file of a secret. Without a folder, or for a name that leads out of it, one that does not exist: Envoy refuses the
/// listener, and says which file is missing.
fn within(credentials: Option<&str>, secret: &str, file: &str) -> String {
    let plain = secret.strip_prefix("kubernetes://").unwrap_or(secret);
    let stays = !plain.split('/').any(|part| part.is_empty() || part == "." || part == "..");
    let folder = credentials.filter(|_| stays).unwrap_or("/--credentials-not-given");
    format!("{folder}/{}/{file}", if stays { plain } else { "-" })
}

fn file(path: &str) -> Option<core::DataSource> {
    (!path.is_empty()).then(|| core::DataSource {
        specifier: Some(core::data_source::Specifier::Filename(path.to_owned())),
        ..core::DataSource::default()
    })
}

/// Envoy reads a file again when its directory is changed by a move, as a mounted Secret is.
fn directory(path: &str) -> Option<core::WatchedDirectory> {
    let parent = Path::new(path).parent()?.to_str()?;
    (!parent.is_empty()).then(|| core::WatchedDirectory { path: parent.to_owned(), ..Default::default() })
}
