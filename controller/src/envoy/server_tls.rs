//! TLS of clients that ends in a gateway's listener. An Envoy reads files again only where they are secrets of a
//! discovery service, so that is what they are: a secret's name says which files of the Envoy's own it is, as with istiod.

use std::path::Path;

use portolan_proto::envoy::envoy::config::core::v3 as core;
use portolan_proto::envoy::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, Secret, TlsCertificate,
    TlsParameters,
    certificate_validation_context::TrustChainVerification,
    common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
    secret,
};
use portolan_proto::envoy::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};
use portolan_proto::v1::ServerTls;

use super::chains::aggregated;
use super::{any, switch};
use crate::cluster::mesh_tls;

/// Type URL of a secret.
pub const SECRET_TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// What a certificate's name begins with; its file, a tilde and the key's follow.
const CERTIFICATE: &str = "file-cert:";
/// What the name of authorities begins with; their file follows.
const AUTHORITIES: &str = "file-root:";

/// Where an Envoy has its files.
#[derive(Debug, Clone, Copy)]
pub(super) struct Folders<'f> {
    /// Secrets that Gateways name.
    pub(super) credentials: Option<&'f str>,
    /// The mesh's certificates.
    pub(super) mesh: Option<&'f str>,
}

impl Folders<'_> {
    /// A file of the Envoy's; without a folder one that does not exist, so that clients are refused.
    fn file(self, path: &str) -> String {
        match path.strip_prefix(mesh_tls::FOLDER) {
            Some(file) => format!("{}/{file}", self.mesh.unwrap_or("/--mesh-certificates-not-given")),
            None => path.to_owned(),
        }
    }
}

/// The transport socket.
// Envoy's newer field takes one matcher for each type of name; the older one, which istiod writes, takes any type.
#[allow(deprecated)]
pub(super) fn socket(tls: &ServerTls, folders: Folders<'_>) -> core::TransportSocket {
    let credentials = folders.credentials;
    let certificates = tls.certificates.iter().map(|one| {
        let (certificate, key) = match one.secret.as_str() {
            "" => (folders.file(&one.certificate), folders.file(&one.key)),
            secret => (within(credentials, secret, "tls.crt"), within(credentials, secret, "tls.key")),
        };
        certificate_named(&certificate, &key)
    });
    let ca = if tls.ca_of_secret { within(credentials, &tls.ca, "ca.crt") } else { folders.file(&tls.ca) };
    let exact = |name: &String| StringMatcher {
        match_pattern: Some(MatchPattern::Exact(name.clone())),
        ..StringMatcher::default()
    };
    let validation = CertificateValidationContext {
        match_subject_alt_names: tls.client_names.iter().map(exact).collect(),
        verify_certificate_spki: tls.client_keys.clone(),
        verify_certificate_hash: tls.client_hashes.clone(),
        crl: file(&tls.revocations),
        trust_chain_verification: if tls.any_client {
            TrustChainVerification::AcceptUntrusted.into()
        } else {
            TrustChainVerification::VerifyTrustChain.into()
        },
        ..CertificateValidationContext::default()
    };
    let validation = match ca.as_str() {
        "" => tls.any_client.then_some(ValidationContextType::ValidationContext(validation)),
        ca => Some(ValidationContextType::CombinedValidationContext(CombinedCertificateValidationContext {
            default_validation_context: Some(validation),
            validation_context_sds_secret_config: Some(authorities_named(ca)),
            ..CombinedCertificateValidationContext::default()
        })),
    };
    let parameters = TlsParameters {
        tls_minimum_protocol_version: i32::try_from(tls.min_version).unwrap_or_default(),
        tls_maximum_protocol_version: i32::try_from(tls.max_version).unwrap_or_default(),
        cipher_suites: tls.ciphers.clone(),
        ..TlsParameters::default()
    };
    let context = DownstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            tls_params: (parameters != TlsParameters::default()).then_some(parameters),
            tls_certificate_sds_secret_configs: certificates.collect(),
            alpn_protocols: tls.protocols.clone(),
            validation_context_type: validation,
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

/// Asks for the secret that is this certificate and key.
pub(super) fn certificate_named(certificate: &str, key: &str) -> SdsSecretConfig {
    SdsSecretConfig { name: format!("{CERTIFICATE}{certificate}~{key}"), sds_config: Some(aggregated()) }
}

/// Asks for the secret that is these authorities.
pub(super) fn authorities_named(file: &str) -> SdsSecretConfig {
    SdsSecretConfig { name: format!("{AUTHORITIES}{file}"), sds_config: Some(aggregated()) }
}

/// The secret of a name; `None` where it is none of ours.
pub fn secret(name: &str) -> Option<Secret> {
    let of = |kind| Secret { name: name.to_owned(), r#type: Some(kind) };
    if let Some((certificate, key)) = name.strip_prefix(CERTIFICATE).and_then(|files| files.split_once('~')) {
        return Some(of(secret::Type::TlsCertificate(TlsCertificate {
            watched_directory: directory(certificate),
            certificate_chain: file(certificate),
            private_key: file(key),
            ..TlsCertificate::default()
        })));
    }
    let ca = name.strip_prefix(AUTHORITIES)?;
    Some(of(secret::Type::ValidationContext(CertificateValidationContext {
        watched_directory: directory(ca),
        trusted_ca: file(ca),
        ..CertificateValidationContext::default()
    })))
}

/// A file of a secret. Without a folder, or for a name that leads out of it, one that does not exist: Envoy says which
/// file is missing, and refuses clients.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_the_files_that_its_name_says() {
        let Some(secret::Type::TlsCertificate(one)) = secret("file-cert:/c/tls.crt~/c/tls.key").unwrap().r#type else {
            panic!("no certificate")
        };
        assert_eq!((one.certificate_chain, one.private_key), (file("/c/tls.crt"), file("/c/tls.key")));
        assert_eq!(one.watched_directory.unwrap().path, "/c");
        assert!(matches!(secret("file-root:/c/ca.crt").unwrap().r#type, Some(secret::Type::ValidationContext(_))));
        assert_eq!(secret("default"), None);
    }

    #[test]
    fn a_name_does_not_lead_out_of_the_folder() {
        assert_eq!(within(Some("/c"), "kubernetes://own", "tls.crt"), "/c/own/tls.crt");
        assert_eq!(within(Some("/c"), "../own", "tls.crt"), "/--credentials-not-given/-/tls.crt");
        assert_eq!(within(None, "own", "tls.crt"), "/--credentials-not-given/own/tls.crt");
    }
}
