//! What an upstream is told of the certificate that a gateway's client showed: `x-forwarded-client-cert`, as istiod's
//! gateways have their Envoy set it (the certificate itself, its subject, URIs and DNS names).

use std::fmt::Write as _;

use ::http::HeaderValue;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use ring::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer as _,
    x509::{AttributeTypeAndValue, X509Name},
};

/// The header's value; `own`: URIs of the certificate that the gateway shows.
pub(super) fn header(shown: &CertificateDer<'_>, own: &[String]) -> Option<HeaderValue> {
    let (_, certificate) = X509Certificate::from_der(shown).ok()?;
    let mut parts: Vec<String> = own.iter().map(|uri| format!("By={uri}")).collect();
    let hash = digest(&SHA256, shown);
    parts.push(hash.as_ref().iter().fold("Hash=".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }));
    parts.push(format!("Cert=\"{}\"", pem(shown)));
    parts.push(format!("Subject=\"{}\"", subject(certificate.subject())));
    let (uris, names) = alternative_names(&certificate);
    let none = uris.is_empty().then(|| "URI=".to_owned());
    parts.extend(none.into_iter().chain(uris.iter().map(|uri| format!("URI={uri}"))));
    parts.extend(names.iter().map(|name| format!("DNS={name}")));
    HeaderValue::from_str(&parts.join(";")).ok()
}

/// The names of a certificate that are URIs.
pub(super) fn uris(certificate: &CertificateDer<'_>) -> Vec<String> {
    X509Certificate::from_der(certificate).map(|(_, parsed)| alternative_names(&parsed).0).unwrap_or_default()
}

/// SHA-256 of a certificate and of its public key.
pub(super) fn digests(certificate: &CertificateDer<'_>) -> Vec<[u8; 32]> {
    let sum = |bytes: &[u8]| <[u8; 32]>::try_from(digest(&SHA256, bytes).as_ref()).unwrap_or_default();
    let key = X509Certificate::from_der(certificate).map(|(_, parsed)| sum(parsed.public_key().raw));
    key.into_iter().chain([sum(certificate)]).collect()
}

fn alternative_names(certificate: &X509Certificate<'_>) -> (Vec<String>, Vec<String>) {
    let (mut uris, mut names) = (Vec::new(), Vec::new());
    for extension in certificate.extensions() {
        let ParsedExtension::SubjectAlternativeName(held) = extension.parsed_extension() else { continue };
        for name in &held.general_names {
            match name {
                GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                GeneralName::DNSName(name) => names.push((*name).to_owned()),
                _ => {}
            }
        }
    }
    (uris, names)
}

/// PEM with what a header may not hold in Envoy's percent signs.
fn pem(certificate: &CertificateDer<'_>) -> String {
    let base64 = BASE64_STANDARD.encode(certificate);
    let mut out = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for line in base64.as_bytes().chunks(64) {
        out.push_str(&String::from_utf8_lossy(line));
        out.push('\n');
    }
    out.push_str("-----END CERTIFICATE-----\n");
    [("\n", "%0A"), (" ", "%20"), ("+", "%2B"), ("/", "%2F"), ("=", "%3D")]
        .into_iter()
        .fold(out, |text, (plain, encoded)| text.replace(plain, encoded))
}

/// A name as RFC 2253 writes it: the last part first.
fn subject(name: &X509Name<'_>) -> String {
    let parts = name.iter_rdn().map(|part| part.iter().map(attribute).collect::<Vec<_>>().join("+"));
    let mut parts: Vec<String> = parts.collect();
    parts.reverse();
    parts.join(",")
}

fn attribute(attribute: &AttributeTypeAndValue<'_>) -> String {
    let id = attribute.attr_type().to_id_string();
    let known = KINDS.iter().find(|(known, _)| *known == id).map(|(_, name)| *name);
    match (known, attribute.as_str()) {
        (Some(name), Ok(value)) => format!("{name}={}", escaped(value)),
        _ => {
            let bytes = attribute.as_slice().iter().fold(String::new(), |mut text, byte| {
                let _ = write!(text, "{byte:02X}");
                text
            });
            format!("{}=#{bytes}", known.unwrap_or(&id))
        }
    }
}

/// The kinds of parts that OpenSSL has short names for.
const KINDS: [(&str, &str); 14] = [
    ("2.5.4.3", "CN"),
    ("2.5.4.4", "SN"),
    ("2.5.4.5", "serialNumber"),
    ("2.5.4.6", "C"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.9", "street"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.12", "title"),
    ("2.5.4.42", "GN"),
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("1.2.840.113549.1.9.1", "emailAddress"),
];

fn escaped(value: &str) -> String {
    let mut out = String::new();
    let end = value.len().saturating_sub(1);
    for (at, letter) in value.char_indices() {
        let edge = letter == ' ' && (at == 0 || at == end) || letter == '#' && at == 0;
        if edge || matches!(letter, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
            out.push('\\');
            out.push(letter);
        } else if letter.is_ascii_control() || !letter.is_ascii() {
            for byte in letter.to_string().bytes() {
                let _ = write!(out, "\\{byte:02X}");
            }
        } else {
            out.push(letter);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    #[test]
    fn a_certificate_is_told_in_envoys_words() {
        let mut params = CertificateParams::new(vec!["a.test".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::URI("spiffe://td/ns/n/sa/a".try_into().unwrap()));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Größe, Inc.");
        params.distinguished_name.push(DnType::CommonName, "#a");
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let value = header(certificate.der(), &["spiffe://td/own".to_owned()]).unwrap();
        let value = value.to_str().unwrap();
        let parts: Vec<&str> = value.split(';').collect();
        assert_eq!(parts[0], "By=spiffe://td/own");
        assert!(parts[1].starts_with("Hash=") && parts[1].len() == 69);
        assert!(parts[2].starts_with("Cert=\"-----BEGIN%20CERTIFICATE-----%0AMI"), "{value}");
        assert!(parts[2].ends_with("%0A-----END%20CERTIFICATE-----%0A\""));
        let rest = parts[3..].join(";");
        assert_eq!(rest, r#"Subject="CN=\#a,O=Gr\C3\B6\C3\9Fe\, Inc.";URI=spiffe://td/ns/n/sa/a;DNS=a.test"#);
        assert_eq!(uris(certificate.der()), ["spiffe://td/ns/n/sa/a"]);
        let both = digests(certificate.der());
        assert!(both.len() == 2 && both[0] != both[1]);
    }
}
