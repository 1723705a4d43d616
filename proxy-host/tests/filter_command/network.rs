//! Network filters: bytes both ways, pauses, closes.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use crate::{
    http::same,
    support::{Host, Setup},
};

/// Answers each piece with itself and its name, and ends when the client does.
pub fn echo(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    let answer = [name.as_bytes(), b":", &buffer[..n]].concat();
                    if stream.write_all(&answer).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

fn setup(configuration: &'static str) -> Setup<'static> {
    Setup { configuration, network: true, calls: echo("other"), ..Setup::new("net", echo("main")) }
}

/// Writes each piece, waits for the answer where one is expected, ends its side, and reads to the end.
pub fn talk(host: &Host, pieces: &[(&str, usize)]) -> String {
    let mut stream = TcpStream::connect(host.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut all = Vec::new();
    for (piece, answer) in pieces {
        stream.write_all(piece.as_bytes()).unwrap();
        if *answer == 0 {
            host.wait(&format!("downstream {piece:?}"));
            continue;
        }
        let mut got = vec![0; *answer];
        stream.read_exact(&mut got).unwrap();
        all.extend(got);
    }
    // The host may have closed it.
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut all);
    String::from_utf8(all).unwrap()
}

#[test]
fn bytes_are_changed_both_ways_and_held_until_a_line_is_whole() {
    let (got, said) = same(&setup("lines"), "lines", |host| {
        let got = talk(host, &[("he", 0), ("llo\n", ">main:HELLO\n<".len())]);
        (got, host.wait("delete"))
    });
    assert_eq!(got, ">main:HELLO\n<");
    for line in
        ["downstream \"hello\\n\" false", "upstream \"main:HELLO\\n\" false", "downstream \"\" true", "done", "log"]
    {
        assert!(said.iter().any(|said| said == line), "{line} in {said:#?}");
    }
}

#[test]
fn closes_are_told_in_envoys_order() {
    let said = same(&setup(""), "closes", |host| {
        assert_eq!(talk(host, &[("hi", "main:hi".len())]), "main:hi");
        host.wait("delete")
    });
    let ends: Vec<_> = said.iter().skip_while(|line| *line != "upstream \"\" true").map(String::as_str).collect();
    assert_eq!(
        ends,
        ["upstream \"\" true", "upstream close unknown", "downstream close local", "done", "log", "delete"]
    );
}

#[test]
fn a_filter_closes_a_connection_at_once_or_later() {
    let (got, said) = same(&setup("shut"), "shut", |host| (talk(host, &[]), host.wait("delete")));
    assert_eq!(got, "");
    assert!(said.iter().any(|line| line == "downstream close local"), "{said:?}");
    let (got, said) = same(&setup("quit"), "quit", |host| (talk(host, &[("hi", 7), ("quit", 0)]), ()));
    assert_eq!((got.as_str(), said), ("main:hi", ()));
}

#[test]
fn a_connection_on_which_nothing_moves_ends() {
    let setup = Setup { tcp_idle: Some(400), ..setup("") };
    let (got, said) = same(&setup, "a silent connection", |host| {
        let mut stream = TcpStream::connect(host.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(b"hi").unwrap();
        let mut got = String::new();
        stream.read_to_string(&mut got).unwrap();
        (got, host.wait("delete"))
    });
    assert_eq!(got, "main:hi");
    assert!(said.iter().any(|line| line == "downstream close local"), "{said:?}");
}

#[test]
fn a_filter_state_chooses_the_cluster() {
    let got = same(&setup("route"), "route", |host| talk(host, &[("hi", "other:hi".len())]));
    assert_eq!(got, "other:hi");
}

#[test]
fn connections_have_envoys_attributes() {
    let said = same(&setup("attributes"), "attributes", |host| {
        assert_eq!(talk(host, &[("hi", "main:hi".len())]), "main:hi");
        host.wait("delete")
    });
    assert!(said.iter().any(|line| line.starts_with("upstream upstream.port Ok(Some(")), "{said:#?}");
}

#[test]
fn an_upstream_that_is_not_there_closes_the_connection() {
    let setup = Setup { upstream: "127.0.0.1:1".parse().unwrap(), ..setup("") };
    let (got, said) = same(&setup, "no upstream", |host| (talk(host, &[]), host.wait("delete")));
    assert_eq!(got, "");
    assert!(said.iter().any(|line| line == "downstream close local"), "{said:?}");
}
