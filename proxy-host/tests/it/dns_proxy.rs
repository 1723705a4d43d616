//! DNS for clients: names of the registry, and what other name servers know.

use crate::proxy_support;

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use portolan_proxy_host::app::App;
use proxy_support::*;

/// A server of bytes that says its name first.
fn greeter(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // A client that has gone needs no greeting.
            let _ = stream.write_all(name.as_bytes());
        }
    });
    address
}

/// A name server that knows one address for everything, over UDP and TCP.
fn name_server() -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(address).unwrap();
    let answer = |question: &[u8]| {
        let question = Message::from_vec(question).unwrap();
        let mut out = Message::response(question.metadata.id, question.metadata.op_code);
        let name = question.queries[0].name().clone();
        out.add_query(question.queries[0].clone());
        out.add_answer(Record::from_rdata(name, 77, RData::A(A("192.0.2.77".parse().unwrap()))));
        out.to_vec().unwrap()
    };
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((n, client)) = udp.recv_from(&mut buffer) {
            udp.send_to(&answer(&buffer[..n]), client).unwrap();
        }
    });
    thread::spawn(move || {
        for mut stream in tcp.incoming().flatten() {
            let question = read_message(&mut stream);
            write_message(&mut stream, &answer(&question));
        }
    });
    address
}

fn read_message(stream: &mut TcpStream) -> Vec<u8> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message).unwrap();
    message
}

fn write_message(stream: &mut TcpStream, message: &[u8]) {
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length, message].concat()).unwrap();
}

/// A status and the addresses in order.
type Said = (ResponseCode, Vec<IpAddr>);

fn question(name: &str, family: RecordType) -> Vec<u8> {
    let mut request = Message::query();
    request.add_query(Query::query(Name::from_ascii(name).unwrap(), family));
    request.to_vec().unwrap()
}

fn said(question: &[u8], answer: &[u8]) -> Said {
    assert_eq!(answer[..2], question[..2], "the id");
    let answer = Message::from_vec(answer).unwrap();
    let addresses = answer.answers.iter().filter_map(|record| match &record.data {
        RData::A(a) => Some(IpAddr::from(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::from(aaaa.0)),
        _ => None,
    });
    let mut addresses: Vec<IpAddr> = addresses.collect();
    addresses.sort();
    (answer.metadata.response_code, addresses)
}

fn over_udp(server: SocketAddr, name: &str, family: RecordType) -> Said {
    let question = question(name, family);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send_to(&question, server).unwrap();
    let mut buffer = [0; 1500];
    let (length, _) = socket.recv_from(&mut buffer).unwrap();
    said(&question, &buffer[..length])
}

fn over_tcp(server: SocketAddr, name: &str, family: RecordType) -> Said {
    let question = question(name, family);
    let mut stream = TcpStream::connect(server).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write_message(&mut stream, &question);
    said(&question, &read_message(&mut stream))
}

/// Asks until the answer is one address that the registry gives: names come a moment after the start, or a change.
fn address_of(app: &App, name: &str) -> IpAddr {
    let end = Instant::now() + PATIENCE;
    loop {
        let answer = over_udp(app.dns.unwrap(), name, RecordType::A);
        match answer.1.as_slice() {
            [address] if address.to_string().starts_with("240.240.") => return *address,
            _ => assert!(Instant::now() < end, "{name}: {answer:?}"),
        }
        thread::park_timeout(Duration::from_millis(20));
    }
}

/// Where the client of the transparent listener was going.
static DIALLED: Mutex<Option<SocketAddr>> = Mutex::new(None);

#[test]
fn tcp_services_on_one_port_are_told_apart_by_their_addresses() {
    let dir = tempfile::tempdir().unwrap();
    let tcp = "number: 9000, name: tcp, protocol: TCP";
    let others = name_server();
    let resources = [("a", "a.example.com"), ("b", "b.example.com")]
        .map(|(name, host)| entry(name, host, tcp, greeter(name)))
        .concat();
    let (app, _lines) = start(dir.path(), &resources, |config| {
        config.transparent = Some("127.0.0.1:0".parse().unwrap());
        config.original_destination = |_| Ok(DIALLED.lock().unwrap().unwrap());
        config.dns = Some("127.0.0.1:0".parse().unwrap());
        config.identity.dns_capture = true;
        config.name_servers = vec![others];
    });
    let [a, b] = ["a.example.com.", "b.example.com."].map(|name| address_of(&app, name));
    assert_ne!(a, b);
    for (address, name) in [(a, "a"), (b, "b")] {
        *DIALLED.lock().unwrap() = Some(SocketAddr::new(address, 9000));
        let end = Instant::now() + PATIENCE;
        loop {
            let mut stream = TcpStream::connect(app.transparent.unwrap()).unwrap();
            let mut greeting = [0];
            if stream.read(&mut greeting).is_ok_and(|n| n == 1) {
                assert_eq!(greeting, name.as_bytes());
                break;
            }
            assert!(Instant::now() < end, "{name} was not reached");
        }
    }
    // IPv6 addresses are for clients with IPv6 only; what the registry does not know, others do.
    for (name, family, addresses) in [
        ("a.example.com.", RecordType::A, vec![a]),
        ("a.example.com.", RecordType::AAAA, vec![]),
        ("elsewhere.example.org.", RecordType::A, vec!["192.0.2.77".parse().unwrap()]),
    ] {
        let expected = (ResponseCode::NoError, addresses);
        assert_eq!(over_udp(app.dns.unwrap(), name, family), expected, "{name}");
        assert_eq!(over_tcp(app.dns.unwrap(), name, family), expected, "{name}");
    }
    // A host that comes later is answered too, and moves nobody.
    std::fs::write(dir.path().join("more.yaml"), entry("c", "c.example.com", tcp, greeter("c"))).unwrap();
    let c = address_of(&app, "c.example.com.");
    assert!(c != a && c != b, "{c}");
    assert_eq!(address_of(&app, "a.example.com."), a);
    app.stop();
}
