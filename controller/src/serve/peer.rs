//! Who is at the other end of a connection, as far as it has proved it.

use std::net::SocketAddr;

use thiserror::Error;
use tonic::{Request, Status};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A connection's other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// What its certificate says, where one was asked for.
    pub identity: Option<Identity>,
}

/// A workload's identity by SPIFFE: `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The whole URI.
    pub uri: String,
    /// The namespace in it.
    pub namespace: String,
}

/// A certificate that names no workload.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdentityError {
    /// It cannot be read.
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
    /// It has no URI of the form that Istio gives workloads, or several.
    #[error("the certificate has not one SPIFFE identity, spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT")]
    None,
}

impl Identity {
    /// Reads the identity in a certificate.
    ///
    /// # Errors
    /// There is not exactly one of Istio's form.
    pub fn of_certificate(der: &[u8]) -> Result<Self, IdentityError> {
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|error| IdentityError::Certificate(error.to_string()))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| IdentityError::Certificate(error.to_string()))?
            .map(|extension| extension.value.general_names.clone())
            .unwrap_or_default();
        let mut uris = names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) if uri.starts_with("spiffe://") => Some(*uri),
            _ => None,
        });
        match (uris.next().and_then(Self::of_uri), uris.next()) {
            (Some(identity), None) => Ok(identity),
            _ => Err(IdentityError::None),
        }
    }

    fn of_uri(uri: &str) -> Option<Self> {
        let mut parts = uri.strip_prefix("spiffe://")?.split('/');
        match (parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next()) {
            (domain, "ns", namespace, "sa", account, None)
                if !domain.is_empty() && !namespace.is_empty() && !account.is_empty() =>
            {
                Some(Identity { uri: uri.to_owned(), namespace: namespace.to_owned() })
            }
            _ => None,
        }
    }
}

/// The peer of a request; `None` within the process.
pub(super) fn of<T>(request: &Request<T>) -> Option<Peer> {
    request.extensions().get::<Peer>().cloned()
}

/// Refuses a subscriber whose certificate is of another namespace than it names (ARCHITECTURE, Registry stream).
pub(super) fn agree(peer: Option<&Peer>, namespace: &str) -> Result<(), Status> {
    match peer.and_then(|p| p.identity.as_ref()) {
        Some(identity) if identity.namespace != namespace => {
            let uri = &identity.uri;
            tracing::warn!(uri, namespace, "a subscriber names a namespace that is not its certificate's: refused");
            let said = format!("the subscriber says namespace {namespace:?}, its certificate says {uri}");
            Err(Status::permission_denied(said))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespace_is_istios_place_in_the_uri() {
        let identity = Identity::of_uri("spiffe://cluster.local/ns/shop/sa/cart").unwrap();
        assert_eq!(identity.namespace, "shop");
        for wrong in [
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns//sa/cart",
            "spiffe:///ns/shop/sa/cart",
            "spiffe://cluster.local/ns/shop/sa/cart/x",
            "spiffe://cluster.local/sa/cart/ns/shop",
            "https://cluster.local/ns/shop/sa/cart",
        ] {
            assert_eq!(Identity::of_uri(wrong), None, "{wrong}");
        }
    }
}
