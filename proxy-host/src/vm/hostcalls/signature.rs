//! Envoy's foreign functions `verify_signature` and `sign`: RSA with PKCS #1 padding, and ECDSA.

use prost::Message;
use ring::{
    rand::SystemRandom,
    signature::{self, EcdsaKeyPair, RsaKeyPair, UnparsedPublicKey},
};
use rustls::pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer, pem::PemObject};
use x509_parser::{oid_registry, prelude::FromDer as _, x509::SubjectPublicKeyInfo};

use crate::vm::abi::Status;

/// Envoy's `envoy.source.extensions.common.wasm.VerifySignatureArguments`.
#[derive(Clone, PartialEq, Message)]
struct VerifyArguments {
    #[prost(string, tag = "1")]
    hash_function: String,
    #[prost(bytes = "vec", tag = "2")]
    public_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    signature: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    text: Vec<u8>,
    #[prost(string, tag = "5")]
    public_key_pem: String,
}

/// `VerifySignatureResult`.
#[derive(Clone, PartialEq, Message)]
struct VerifyResult {
    #[prost(bool, tag = "1")]
    result: bool,
    #[prost(string, tag = "2")]
    error: String,
}

/// `SignArguments`.
#[derive(Clone, PartialEq, Message)]
struct SignArguments {
    #[prost(string, tag = "1")]
    hash_function: String,
    #[prost(bytes = "vec", tag = "2")]
    private_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    text: Vec<u8>,
    #[prost(string, tag = "4")]
    private_key_pem: String,
}

/// `SignResult`.
#[derive(Clone, PartialEq, Message)]
struct SignResult {
    #[prost(bool, tag = "1")]
    result: bool,
    #[prost(bytes = "vec", tag = "2")]
    signature: Vec<u8>,
    #[prost(string, tag = "3")]
    error: String,
}

/// `verify_signature`: a key that is none is the guest's mistake, all else an answer.
pub(super) fn verify(arguments: &[u8]) -> Result<Vec<u8>, Status> {
    let arguments = VerifyArguments::decode(arguments).map_err(|_| Status::BadArgument)?;
    let der = one_of(&arguments.public_key, &arguments.public_key_pem, |pem| {
        SubjectPublicKeyInfoDer::from_pem_slice(pem).ok().map(|key| key.to_vec())
    })?;
    let (rest, key) = SubjectPublicKeyInfo::from_der(&der).map_err(|_| Status::BadArgument)?;
    if !rest.is_empty() {
        return Err(Status::BadArgument);
    }
    let error = match algorithm(&key, &arguments.hash_function.to_ascii_lowercase()) {
        None => unsupported(&arguments.hash_function),
        Some(algorithm) => UnparsedPublicKey::new(algorithm, &key.subject_public_key.data)
            .verify(&arguments.text, &arguments.signature)
            .err()
            .map_or_else(String::new, |_| "Failed to verify digest. Error code: 0".to_owned()),
    };
    Ok(VerifyResult { result: error.is_empty(), error }.encode_to_vec())
}

fn algorithm(key: &SubjectPublicKeyInfo<'_>, hash: &str) -> Option<&'static dyn signature::VerificationAlgorithm> {
    let oid = &key.algorithm.algorithm;
    if *oid == oid_registry::OID_PKCS1_RSAENCRYPTION {
        return Some(match hash {
            "sha1" => &signature::RSA_PKCS1_1024_8192_SHA1_FOR_LEGACY_USE_ONLY,
            "sha256" => &signature::RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY,
            "sha384" => &signature::RSA_PKCS1_2048_8192_SHA384,
            "sha512" => &signature::RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY,
            _ => return None,
        });
    }
    let curve = key.algorithm.parameters.as_ref()?.as_oid().ok()?;
    Some(match hash {
        "sha256" if curve == oid_registry::OID_EC_P256 => &signature::ECDSA_P256_SHA256_ASN1,
        "sha384" if curve == oid_registry::OID_EC_P256 => &signature::ECDSA_P256_SHA384_ASN1,
        "sha256" if curve == oid_registry::OID_NIST_EC_P384 => &signature::ECDSA_P384_SHA256_ASN1,
        "sha384" if curve == oid_registry::OID_NIST_EC_P384 => &signature::ECDSA_P384_SHA384_ASN1,
        _ => return None,
    })
}

/// `sign`: by a key in PKCS #8.
pub(super) fn sign(arguments: &[u8]) -> Result<Vec<u8>, Status> {
    let arguments = SignArguments::decode(arguments).map_err(|_| Status::BadArgument)?;
    let der = one_of(&arguments.private_key, &arguments.private_key_pem, |pem| {
        PrivatePkcs8KeyDer::from_pem_slice(pem).ok().map(|key| key.secret_pkcs8_der().to_vec())
    })?;
    let random = SystemRandom::new();
    let hash = arguments.hash_function.to_ascii_lowercase();
    let made = if let Ok(key) = RsaKeyPair::from_pkcs8(&der) {
        let padding: Option<&dyn signature::RsaEncoding> = match &*hash {
            "sha256" => Some(&signature::RSA_PKCS1_SHA256),
            "sha384" => Some(&signature::RSA_PKCS1_SHA384),
            "sha512" => Some(&signature::RSA_PKCS1_SHA512),
            _ => None,
        };
        padding.and_then(|padding| {
            let mut made = vec![0; key.public().modulus_len()];
            key.sign(padding, &random, &arguments.text, &mut made).ok().map(|()| made)
        })
    } else {
        let curves = [
            ("sha256", &signature::ECDSA_P256_SHA256_ASN1_SIGNING),
            ("sha384", &signature::ECDSA_P384_SHA384_ASN1_SIGNING),
        ];
        let key = curves
            .iter()
            .find_map(|(its, curve)| EcdsaKeyPair::from_pkcs8(curve, &der, &random).ok().map(|key| (*its, key)));
        let (its, key) = key.ok_or(Status::BadArgument)?;
        (its == hash).then(|| key.sign(&random, &arguments.text).ok().map(|made| made.as_ref().to_vec())).flatten()
    };
    Ok(match made {
        Some(signature) => SignResult { result: true, signature, error: String::new() },
        None => SignResult { result: false, signature: Vec::new(), error: unsupported(&arguments.hash_function) },
    }
    .encode_to_vec())
}

/// A key is given in DER or in PEM, not in both.
fn one_of(der: &[u8], pem: &str, read: impl FnOnce(&[u8]) -> Option<Vec<u8>>) -> Result<Vec<u8>, Status> {
    match (der, pem) {
        (der, "") if !der.is_empty() => Ok(der.to_vec()),
        ([], pem) if !pem.is_empty() => read(pem.as_bytes()).ok_or(Status::BadArgument),
        _ => Err(Status::BadArgument),
    }
}

fn unsupported(hash: &str) -> String {
    format!("{hash} is not supported.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (String, Vec<u8>) {
        let key = rcgen::KeyPair::generate().unwrap();
        (key.serialize_pem(), rcgen::PublicKeyData::subject_public_key_info(&key))
    }

    fn signed(pem: &str, hash: &str) -> SignResult {
        let arguments = SignArguments {
            hash_function: hash.to_owned(),
            private_key_pem: pem.to_owned(),
            text: b"text".to_vec(),
            ..SignArguments::default()
        };
        SignResult::decode(&*sign(&arguments.encode_to_vec()).unwrap()).unwrap()
    }

    fn verified(public_key: &[u8], hash: &str, signature: &[u8], text: &[u8]) -> VerifyResult {
        let arguments = VerifyArguments {
            hash_function: hash.to_owned(),
            public_key: public_key.to_vec(),
            signature: signature.to_vec(),
            text: text.to_vec(),
            ..VerifyArguments::default()
        };
        VerifyResult::decode(&*verify(&arguments.encode_to_vec()).unwrap()).unwrap()
    }

    #[test]
    fn what_is_signed_is_verified_and_nothing_else() {
        let (pem, public) = pair();
        let made = signed(&pem, "SHA256");
        assert!(made.result, "{made:?}");
        assert!(verified(&public, "sha256", &made.signature, b"text").result);
        let other = verified(&public, "sha256", &made.signature, b"texts");
        assert_eq!((other.result, &*other.error), (false, "Failed to verify digest. Error code: 0"));
    }

    #[test]
    fn a_hash_that_is_none_is_said() {
        let (pem, public) = pair();
        assert_eq!(signed(&pem, "md5").error, "md5 is not supported.");
        assert_eq!(verified(&public, "md5", b"", b"").error, "md5 is not supported.");
    }

    #[test]
    fn keys_that_are_none_or_too_many_are_refused() {
        let (pem, public) = pair();
        let none = SignArguments { private_key: b"none".to_vec(), ..SignArguments::default() };
        let both = SignArguments { private_key_pem: pem, private_key: public.clone(), ..SignArguments::default() };
        for arguments in [SignArguments::default(), none, both] {
            assert_eq!(sign(&arguments.encode_to_vec()), Err(Status::BadArgument));
        }
        let none = VerifyArguments { public_key: public[1..].to_vec(), ..VerifyArguments::default() };
        assert_eq!(verify(&none.encode_to_vec()), Err(Status::BadArgument));
    }
}
