//! Names resolved by a name server that does what it likes, and IPv6.

use crate::proxy_support;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr, UdpSocket},
    str::FromStr as _,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME},
    },
};
use portolan_proxy_host::{
    dns::{ResolveError, Resolver},
    upstream::cluster::Family,
};
use proxy_support::*;

/// What the server does when it is asked for a name.
#[derive(Clone)]
enum Zone {
    /// Addresses with this TTL.
    Addresses(u32, Vec<IpAddr>),
    /// Another name.
    Alias(&'static str),
    /// No answer.
    Silent,
    /// An answer to another question.
    Lie(IpAddr),
    /// SERVFAIL
    Broken,
}

/// A name server; names that it does not know do not exist.
struct Server {
    address: SocketAddr,
    zones: Arc<Mutex<HashMap<String, Zone>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(zones: &[(&str, Zone)]) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: socket.local_addr().unwrap(),
            zones: Arc::new(Mutex::new(zones.iter().map(|(name, zone)| (format!("{name}."), zone.clone())).collect())),
            asked: Arc::default(),
        };
        let (zones, asked) = (server.zones.clone(), server.asked.clone());
        thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((n, client)) = socket.recv_from(&mut buffer) {
                let question = Message::from_vec(&buffer[..n]).unwrap();
                let name = question.queries[0].name().to_string().to_lowercase();
                asked.lock().unwrap().push(name.clone());
                if let Some(answer) = answer(&question, &name, &zones.lock().unwrap()) {
                    socket.send_to(&answer.to_vec().unwrap(), client).unwrap();
                }
            }
        });
        server
    }

    fn set(&self, name: &str, zone: Zone) {
        self.zones.lock().unwrap().insert(format!("{name}."), zone);
    }

    /// Names that were asked for, each once.
    fn names(&self) -> Vec<String> {
        let mut names = self.asked.lock().unwrap().clone();
        names.sort();
        names.dedup();
        names
    }
}

fn answer(question: &Message, name: &str, zones: &HashMap<String, Zone>) -> Option<Message> {
    let query = question.queries[0].clone();
    let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
    answer.metadata.recursion_available = true;
    let record = |name: &str, ttl, data| Record::from_rdata(Name::from_str(name).unwrap(), ttl, data);
    let mut at = name.to_owned();
    // The chain as a recursive server gives it; one that runs in a circle is cut off.
    for _ in 0..20 {
        match zones.get(&at) {
            Some(Zone::Alias(to)) => {
                let to = format!("{to}.");
                answer.add_answer(record(&at, 60, RData::CNAME(CNAME(Name::from_str(&to).unwrap()))));
                at = to;
            }
            Some(Zone::Addresses(ttl, addresses)) => {
                for address in addresses {
                    match (address, query.query_type()) {
                        (IpAddr::V4(ip), RecordType::A) => drop(answer.add_answer(record(&at, *ttl, RData::A(A(*ip))))),
                        (IpAddr::V6(ip), RecordType::AAAA) => {
                            answer.add_answer(record(&at, *ttl, RData::AAAA(AAAA(*ip))));
                        }
                        _ => {}
                    }
                }
                break;
            }
            Some(Zone::Silent) => return None,
            Some(Zone::Broken) => {
                answer.metadata.response_code = ResponseCode::ServFail;
                break;
            }
            Some(Zone::Lie(IpAddr::V4(ip))) => {
                let mut other = query.clone();
                other.name = Name::from_str("other.test.").unwrap();
                answer.add_query(other);
                answer.add_answer(record("other.test.", 60, RData::A(A(*ip))));
                return Some(answer);
            }
            Some(Zone::Lie(IpAddr::V6(_))) => return None,
            None => {
                answer.metadata.response_code = ResponseCode::NXDomain;
                break;
            }
        }
    }
    answer.add_query(query);
    Some(answer)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn lookup(server: &Server, name: &str, family: Family) -> Result<Vec<IpAddr>, ResolveError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let resolver = Resolver::new(&[server.address]);
    runtime.block_on(resolver.lookup(name, family)).map(|answer| answer.addresses)
}

#[test]
fn each_family_gets_its_addresses() {
    let both = Zone::Addresses(60, vec![ip("192.0.2.1"), ip("2001:db8::1")]);
    let server = Server::start(&[("both.test", both), ("six.test", Zone::Addresses(60, vec![ip("2001:db8::6")]))]);
    let (four, six) = (vec![ip("192.0.2.1")], vec![ip("2001:db8::1")]);
    assert_eq!(lookup(&server, "both.test", Family::V4).unwrap(), four);
    assert_eq!(lookup(&server, "both.test", Family::V6).unwrap(), six);
    assert_eq!(lookup(&server, "both.test", Family::Auto).unwrap(), six);
    assert_eq!(lookup(&server, "both.test", Family::V4Preferred).unwrap(), four);
    let mut all = lookup(&server, "both.test", Family::All).unwrap();
    all.sort();
    assert_eq!(all, [four, six].concat());
    assert_eq!(lookup(&server, "six.test", Family::V4Preferred).unwrap(), [ip("2001:db8::6")]);
    assert_eq!(lookup(&server, "six.test", Family::V4).unwrap(), [] as [IpAddr; 0]);
}

#[test]
fn an_address_that_is_v4_in_v6_is_that_of_v4() {
    let server = Server::start(&[("mapped.test", Zone::Addresses(60, vec![ip("::ffff:192.0.2.9")]))]);
    assert_eq!(lookup(&server, "mapped.test", Family::V6).unwrap(), [ip("192.0.2.9")]);
}

#[test]
fn chains_of_names_are_followed_and_circles_are_not() {
    let server = Server::start(&[
        ("a.test", Zone::Alias("b.test")),
        ("b.test", Zone::Alias("c.test")),
        ("c.test", Zone::Addresses(60, vec![ip("192.0.2.3")])),
        ("circle.test", Zone::Alias("round.test")),
        ("round.test", Zone::Alias("circle.test")),
    ]);
    assert_eq!(lookup(&server, "a.test", Family::V4).unwrap(), [ip("192.0.2.3")]);
    assert_ne!(lookup(&server, "circle.test", Family::V4), Ok(vec![ip("192.0.2.3")]));
}

#[test]
fn no_such_name_is_an_answer_and_a_broken_server_is_none() {
    let server = Server::start(&[("broken.test", Zone::Broken)]);
    assert_eq!(lookup(&server, "nowhere.test", Family::V4).unwrap(), [] as [IpAddr; 0]);
    assert!(lookup(&server, "broken.test", Family::V4).is_err());
}

#[test]
fn an_answer_to_another_question_is_not_taken() {
    let server = Server::start(&[("a.test", Zone::Lie(ip("192.0.2.66")))]);
    assert!(!lookup(&server, "a.test", Family::V4).is_ok_and(|found| found.contains(&ip("192.0.2.66"))));
}

fn dns_entry(name: &str, host: &str, port: u16) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: default}}\n\
         spec:\n  hosts: [{host}]\n  resolution: DNS\n  ports: [{{{HTTP}, targetPort: {port}}}]\n---\n"
    )
}

#[test]
fn only_names_that_are_used_are_asked_for() {
    let origin = origin("first", Duration::ZERO);
    let server = Server::start(&[]);
    let mut resources = String::new();
    for n in 0..2000 {
        let host = format!("h{n}.test");
        server.set(&host, Zone::Addresses(300, vec![origin.ip()]));
        resources += &dns_entry(&format!("e{n}"), &host, origin.port());
    }
    let dir = tempfile::tempdir().unwrap();
    let (app, _lines) = start(dir.path(), &resources, |config| config.name_servers = vec![server.address]);
    let used: Vec<_> = (0..10).map(|n| format!("h{}.test", n * 7)).collect();
    for host in &used {
        assert!(get(app.http_proxies[0], &format!("http://{host}/")).ends_with("first"), "{host}");
    }
    let mut expected: Vec<_> = used.iter().map(|host| format!("{host}.")).collect();
    expected.sort();
    assert_eq!(server.names(), expected);
}

#[test]
fn a_name_with_a_ttl_of_0_moves_and_one_that_is_gone_has_no_endpoint() {
    let old = origin("first", Duration::ZERO);
    let new = origin_at(&format!("127.0.0.3:{}", old.port()), "other", Duration::ZERO);
    let server = Server::start(&[("a.test", Zone::Addresses(0, vec![old.ip()]))]);
    let dir = tempfile::tempdir().unwrap();
    let resources = dns_entry("a", "a.test", old.port());
    let (app, _lines) = start(dir.path(), &resources, |config| config.name_servers = vec![server.address]);
    until(app.http_proxies[0], "http://a.test/", "first");
    server.set("a.test", Zone::Addresses(0, vec![new.ip()]));
    until(app.http_proxies[0], "http://a.test/", "other");
    server.zones.lock().unwrap().clear();
    until(app.http_proxies[0], "http://a.test/", "no healthy upstream");
}

#[test]
fn a_dead_name_server_is_said_in_time_and_keeps_what_is_known() {
    let origin = origin("first", Duration::ZERO);
    let server = Server::start(&[("a.test", Zone::Addresses(1, vec![origin.ip()])), ("dead.test", Zone::Silent)]);
    let dir = tempfile::tempdir().unwrap();
    let resources = dns_entry("a", "a.test", origin.port()) + &dns_entry("d", "dead.test", origin.port());
    let (app, _lines) = start(dir.path(), &resources, |config| config.name_servers = vec![server.address]);
    until(app.http_proxies[0], "http://a.test/", "first");
    server.set("a.test", Zone::Silent);
    let answer = get(app.http_proxies[0], "http://dead.test/");
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("no healthy upstream"), "{answer}");
    // By now the answer about a.test is too old, and nobody gives another one.
    assert!(get(app.http_proxies[0], "http://a.test/").ends_with("first"));
}

#[test]
fn ipv6_is_served_and_dialled() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        assert!(std::env::var_os("CI").is_none(), "SKIPPED: there is no IPv6 here");
        return eprintln!("SKIPPED: there is no IPv6 here");
    }
    let origin = origin_at("[::1]:0", "six", Duration::ZERO);
    let server = Server::start(&[("named.test", Zone::Addresses(60, vec![ip("::1")]))]);
    let resources = entry("a", "a.test", HTTP, origin) + &dns_entry("named", "named.test", origin.port());
    let dir = tempfile::tempdir().unwrap();
    let (app, lines) = start(dir.path(), &resources, |config| {
        config.name_servers = vec![server.address];
        // Names are resolved to IPv6 for a workload that has nothing else.
        config.identity.ips = vec![ip("::1")];
        config.http_proxies = vec!["[::1]:0".parse().unwrap()];
        // Takes IPv4 as well, whose addresses are then v4 in v6.
        config.transparent = Some("[::]:0".parse().unwrap());
        config.original_destination = |stream| {
            let mapped = stream.local_addr()?.ip().to_canonical().is_ipv4();
            Ok(if mapped { "[::ffff:198.18.5.5]:80" } else { "[2001:db8::5]:80" }.parse().unwrap())
        };
    });
    let proxy = app.http_proxies[0];
    assert!(proxy.is_ipv6());
    assert!(get(proxy, "http://a.test/").ends_with("six"));
    assert!(get(proxy, "http://named.test/").ends_with("six"));
    let port = app.transparent.unwrap().port();
    let request = "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n";
    for client in [SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::new(ip("::1"), port)] {
        assert!(exchange(client, request).ends_with("six"), "{client}");
    }
    let line = lines.recv_timeout(PATIENCE).unwrap();
    assert!(line.contains(&format!("\"{origin}\"")), "{line}");
}
