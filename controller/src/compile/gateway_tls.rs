//! TLS of a gateway's server, as its host is told (SEMANTICS 6.1).

use base64::prelude::{BASE64_STANDARD, Engine as _};
use portolan_proto::v1::{ServerCertificate, ServerTls as Plan};

use crate::api::gateway::{ServerTls, ServerTlsMode as Mode, TlsProtocol};
use crate::cluster::mesh_tls;

/// What clients of HTTP are offered.
const PROTOCOLS: [&str; 2] = ["h2", "http/1.1"];

/// What the host has to know; `None` where there is no certificate to show, or nothing to know clients by.
pub(crate) fn plan(tls: &ServerTls) -> Option<Plan> {
    let files = |certificate: &str, key: &str| ServerCertificate {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        secret: String::new(),
    };
    let secret = |name: &String| ServerCertificate { secret: name.clone(), ..ServerCertificate::default() };
    let own = (!tls.credential_name.is_empty()).then_some(&tls.credential_name);
    let secrets: Vec<&String> =
        tls.credential_names.iter().chain(own.filter(|_| tls.credential_names.is_empty())).collect();
    let mut certificates: Vec<ServerCertificate> = secrets.iter().copied().map(secret).collect();
    if certificates.is_empty() {
        certificates = tls.tls_certificates.iter().map(|c| files(&c.server_certificate, &c.private_key)).collect();
    }
    if tls.mode == Mode::IstioMutual {
        let [chain, key, _] = mesh_tls::FILES.map(mesh_tls::unplaced);
        certificates = vec![files(&chain, &key)];
    }
    if certificates.is_empty() && !tls.server_certificate.is_empty() {
        certificates.push(files(&tls.server_certificate, &tls.private_key));
    }
    let asks = matches!(tls.mode, Mode::Mutual | Mode::OptionalMutual | Mode::IstioMutual);
    let (ca, ca_of_secret) = match secrets.first() {
        _ if !asks => (String::new(), false),
        _ if tls.mode == Mode::IstioMutual => (mesh_tls::unplaced(mesh_tls::FILES[2]), false),
        _ if !tls.ca_cert_credential_name.is_empty() => (tls.ca_cert_credential_name.clone(), true),
        Some(secret) => ((*secret).clone(), true),
        None => (authorities(tls), false),
    };
    let unseen = tls.insecure_skip_verify == Some(true);
    if certificates.is_empty() || asks && ca.is_empty() && !unseen {
        return None;
    }
    let (keys, hashes) = (&tls.verify_certificate_spki, &tls.verify_certificate_hash);
    let client_keys: Vec<String> = keys.iter().filter(|key| is_key(key)).cloned().collect();
    let client_hashes: Vec<String> = hashes.iter().filter(|hash| is_hash(hash)).cloned().collect();
    // None that a client could have: nobody is let in.
    if asks && keys.len() + hashes.len() > 0 && client_keys.is_empty() && client_hashes.is_empty() {
        return None;
    }
    let mesh = (tls.mode == Mode::IstioMutual).then_some("istio");
    Some(Plan {
        client_keys: if asks { client_keys } else { Vec::new() },
        client_hashes: if asks { client_hashes } else { Vec::new() },
        certificates,
        any_client: asks && unseen,
        ca: if unseen { String::new() } else { ca },
        ca_of_secret,
        client_required: matches!(tls.mode, Mode::Mutual | Mode::IstioMutual),
        client_names: if asks { tls.subject_alt_names.clone() } else { Vec::new() },
        min_version: version(tls.min_protocol_version),
        max_version: version(tls.max_protocol_version),
        ciphers: tls.cipher_suites.clone(),
        protocols: PROTOCOLS.into_iter().chain(mesh).map(str::to_owned).collect(),
        revocations: if asks { tls.ca_crl.clone() } else { String::new() },
    })
}

/// A SHA-256 in base64: Envoy refuses a listener with anything else.
fn is_key(text: &str) -> bool {
    BASE64_STANDARD.decode(text).is_ok_and(|digest| digest.len() == 32)
}

/// A SHA-256 in hexadecimal, 64 digits, with a colon between each two or without any.
fn is_hash(text: &str) -> bool {
    let digits = text.replace(':', "");
    let colons = text.len() == 64 || text.len() == 95 && text.split(':').all(|two| two.len() == 2);
    colons && digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_hexdigit())
}

fn authorities(tls: &ServerTls) -> String {
    let of_first = tls.tls_certificates.iter().map(|c| &c.ca_certificates).find(|ca| !ca.is_empty());
    match of_first {
        Some(ca) if tls.ca_certificates.is_empty() => ca.clone(),
        _ => tls.ca_certificates.clone(),
    }
}

fn version(version: TlsProtocol) -> u32 {
    match version {
        TlsProtocol::V1_0 => 1,
        TlsProtocol::V1_1 => 2,
        TlsProtocol::V1_2 => 3,
        TlsProtocol::V1_3 => 4,
        _ => 0,
    }
}
