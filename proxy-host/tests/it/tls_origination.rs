//! TLS that the proxy begins, as DestinationRules ask for it.

use crate::proxy_support;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread,
};

use proxy_support::{HTTP, PATIENCE, entry, get, start};
use rcgen::{
    CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType, KeyIdMethod, KeyPair,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::{
    RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::WebPkiClientVerifier,
};
use x509_parser::prelude::FromDer as _;

/// What the server saw of a handshake.
#[derive(Debug, PartialEq, Eq)]
struct Hello {
    name: Option<String>,
    protocol: Option<String>,
    /// Common name of the client's certificate.
    client: Option<String>,
}

/// The number of the certificate of a host.
fn serial(host: &str) -> SerialNumber {
    SerialNumber::from(host.as_bytes().to_vec())
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, common: &str, names: Vec<SanType>) -> (rcgen::Certificate, KeyPair) {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, common);
        if let Some(SanType::DnsName(name)) = names.first() {
            params.serial_number = Some(serial(name.as_str()));
        }
        params.subject_alt_names = names;
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap(), key)
    }

    /// Writes a list with the certificate of this host as revoked.
    fn revoke(&self, dir: &Path, host: &str) {
        let at = |year| rcgen::date_time_ymd(year, 1, 1);
        let list = CertificateRevocationListParams {
            this_update: at(2020),
            next_update: at(2100),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: serial(host),
                revocation_time: at(2020),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        fs::write(dir.join("crl.pem"), list.signed_by(&self.0).unwrap().pem().unwrap()).unwrap();
    }

    /// Writes a client's certificate and key.
    fn client(&self, dir: &Path, common: &str) {
        let (certificate, key) = self.issue(common, Vec::new());
        fs::write(dir.join("cert.pem"), certificate.pem()).unwrap();
        fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
    }

    /// A server with a certificate for `names` that answers one request on each connection.
    fn serve(&self, names: Vec<SanType>, mutual: bool) -> (SocketAddr, Receiver<Hello>) {
        let (certificate, key) = self.issue("server", names);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
        let builder = if mutual {
            let mut roots = RootCertStore::empty();
            roots.add(self.0.der().clone()).unwrap();
            builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap(),
            )
        } else {
            builder.with_no_client_auth()
        };
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let chain: Vec<CertificateDer<'static>> = vec![certificate.der().clone()];
        let mut config = builder.with_single_cert(chain, key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, seen) = channel();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut tls = StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), stream);
                if answer(&mut tls).is_err() {
                    // The client did not like the certificate.
                    continue;
                }
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                let client = tls.conn.peer_certificates().and_then(|chain| chain.first()).map(|der| {
                    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der).unwrap();
                    certificate.subject().iter_common_name().next().unwrap().as_str().unwrap().to_owned()
                });
                let hello = Hello {
                    name: tls.conn.server_name().map(str::to_owned),
                    protocol: tls.conn.alpn_protocol().map(text),
                    client,
                };
                // The test may be over.
                let _ = sender.send(hello);
            }
        });
        (address, seen)
    }
}

fn answer(tls: &mut StreamOwned<ServerConnection, std::net::TcpStream>) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        tls.read_exact(&mut byte)?;
        head.push(byte[0]);
        if head == b"PRI * HTTP/2.0\r\n\r\n" {
            // Speaking it is not the point here.
            return Ok(());
        }
    }
    tls.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")?;
    tls.conn.send_close_notify();
    tls.flush()
}

fn rule(host: &str, tls: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: tls, namespace: default}}\nspec:\n  \
         host: {host}\n  trafficPolicy: {{tls: {{{tls}}}}}\n---\n"
    )
}

fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().unwrap())
}

/// The answer, the line of the access log and what the server saw, of one request.
fn ask(
    port: &str,
    tls: &str,
    origin: &(SocketAddr, Receiver<Hello>),
    authority: &Authority,
) -> (String, String, Option<Hello>) {
    let dir = tempfile::tempdir().unwrap();
    let files = tempfile::tempdir().unwrap();
    fs::write(files.path().join("ca.pem"), authority.0.pem()).unwrap();
    authority.client(files.path(), "somebody");
    authority.revoke(files.path(), "revoked.test");
    let tls = tls.replace("DIR", files.path().to_str().unwrap());
    let resources = entry("a", "a.test", port, origin.0) + &rule("a.test", &tls);
    let (app, log) = start(dir.path(), &resources, |_| {});
    let answer = get(app.http_proxies[0], "http://a.test/");
    let line = log.recv_timeout(PATIENCE).unwrap();
    (answer, line, origin.1.try_recv().ok())
}

const CA: &str = "mode: SIMPLE, caCertificates: DIR/ca.pem";

#[test]
fn the_server_is_asked_for_the_host_and_has_to_be_it() {
    let authority = Authority::new();
    let origin = authority.serve(vec![dns("a.test")], false);
    let (answer, _, seen) = ask(HTTP, CA, &origin, &authority);
    assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
    assert_eq!(seen, Some(Hello { name: Some("a.test".into()), protocol: None, client: None }));

    let other = authority.serve(vec![dns("b.test")], false);
    let (answer, line, _) = ask(HTTP, CA, &other, &authority);
    // Why is told to the log, and not to the client.
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.ends_with("reset reason: remote connection failure"),
        "{answer}"
    );
    assert!(line.contains("\" 503 URX,UF ") && line.contains("{remote_connection_failure|TLS_error:|"), "{line}");
}

#[test]
fn a_name_in_the_rule_is_asked_for_and_any_certificate_of_the_authority_will_do() {
    let authority = Authority::new();
    let origin = authority.serve(vec![dns("b.test")], false);
    let (answer, _, seen) = ask(HTTP, &format!("{CA}, sni: c.test"), &origin, &authority);
    assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
    assert_eq!(seen.unwrap().name.as_deref(), Some("c.test"));
}

#[test]
fn names_in_the_rule_are_what_the_certificate_must_have() {
    let authority = Authority::new();
    let spiffe = SanType::URI("spiffe://cluster.local/ns/a/sa/b".try_into().unwrap());
    let origin = authority.serve(vec![spiffe, dns("*.b.test")], false);
    for (names, status) in [
        ("'spiffe://cluster.local/ns/a/sa/b'", 200),
        ("x.test, y.b.test", 200),
        ("'spiffe://other'", 503),
        ("b.test", 503),
    ] {
        let (answer, ..) = ask(HTTP, &format!("{CA}, subjectAltNames: [{names}]"), &origin, &authority);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{names}: {answer}");
    }
}

#[test]
fn an_unknown_authority_is_not_trusted_unless_the_rule_says_so() {
    let (authority, other) = (Authority::new(), Authority::new());
    let origin = other.serve(vec![dns("a.test")], false);
    let (answer, ..) = ask(HTTP, CA, &origin, &authority);
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    let (answer, ..) = ask(HTTP, "mode: SIMPLE, insecureSkipVerify: true", &origin, &authority);
    assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
}

#[test]
fn a_certificate_that_was_revoked_is_refused() {
    let authority = Authority::new();
    let rule = format!("{CA}, caCrl: DIR/crl.pem, subjectAltNames: [a.test, revoked.test]");
    let origin = authority.serve(vec![dns("a.test")], false);
    let (answer, ..) = ask(HTTP, &rule, &origin, &authority);
    assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
    let revoked = authority.serve(vec![dns("revoked.test")], false);
    let (answer, line, _) = ask(HTTP, &rule, &revoked, &authority);
    assert!(answer.starts_with("HTTP/1.1 503") && line.contains("Revoked"), "{answer} {line}");
    // Without the list it is as good as any.
    let (answer, ..) = ask(HTTP, &rule.replace(", caCrl: DIR/crl.pem", ""), &revoked, &authority);
    assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
}

#[test]
fn http2_is_offered_where_the_port_speaks_it() {
    let authority = Authority::new();
    let origin = authority.serve(vec![dns("a.test")], false);
    let (_, _, seen) = ask("number: 80, name: http2, protocol: HTTP2", CA, &origin, &authority);
    assert_eq!(seen.unwrap().protocol.as_deref(), Some("h2"));
}

#[test]
fn a_new_client_certificate_counts_from_the_next_connection() {
    let authority = Authority::new();
    let origin = authority.serve(vec![dns("a.test")], true);
    let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(files.path().join("ca.pem"), authority.0.pem()).unwrap();
    authority.client(files.path(), "first");
    let tls = "mode: MUTUAL, caCertificates: DIR/ca.pem, clientCertificate: DIR/cert.pem, privateKey: DIR/key.pem";
    let tls = tls.replace("DIR", files.path().to_str().unwrap());
    let resources = entry("a", "a.test", HTTP, origin.0) + &rule("a.test", &tls);
    let (app, log) = start(dir.path(), &resources, |_| {});
    let mut clients = Vec::new();
    for _ in 0..2 {
        let answer = get(app.http_proxies[0], "http://a.test/");
        assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
        clients.push(origin.1.recv_timeout(PATIENCE).unwrap().client.unwrap());
        log.recv_timeout(PATIENCE).unwrap();
        authority.client(files.path(), "second");
    }
    assert_eq!(clients, ["first", "second"]);
    fs::remove_file(files.path().join("key.pem")).unwrap();
    let answer = get(app.http_proxies[0], "http://a.test/");
    let line = log.recv_timeout(PATIENCE).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && line.contains("key.pem"), "{answer} {line}");
}
