//! Pages off the wire: raw, and with the checksum and digest that get them past the first doors.
//! Input: for each page its id (one byte), its length (two bytes, little endian) and its bytes.
#![no_main]

use std::net::{Ipv4Addr, SocketAddr};

use libfuzzer_sys::fuzz_target;
use portolan_registry::lookup::{Connection, Listener, Request};
use portolan_registry::snapshot::{FormatError, Snapshot};
use portolan_registry::write::page_digest;

fn pages(mut data: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut pages = Vec::new();
    while let [id, low, high, rest @ ..] = data {
        let (page, tail) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
        pages.push((u32::from(*id), page.to_vec()));
        data = tail;
    }
    pages
}

fn lookups(snapshot: &Snapshot) {
    let destination = SocketAddr::from((Ipv4Addr::new(10, 0, 0, 1), 80));
    for name in [b"a.example".as_slice(), b"x.w.example", b"10.0.0.1", b"*", b""] {
        let _ = snapshot.connection(&Connection { destination, sni: Some(name) });
        for listener in [Listener::Captured(destination), Listener::Proxy] {
            let decision = snapshot.request(&Request { listener, authority: name, connect: false });
            let _ = decision.reason.to_string();
        }
    }
}

fn open(pages: &[(u32, Vec<u8>)]) -> Result<Snapshot, FormatError> {
    let mut digest = 0;
    // The second time with the digest that the first attempt was told.
    for _ in 0..2 {
        let mut snapshot = Snapshot::new();
        snapshot.reset();
        for (id, page) in pages {
            let _ = snapshot.stage(*id, page.clone());
        }
        match snapshot.commit(digest) {
            Ok(()) => return Ok(snapshot),
            Err(FormatError::Digest { got, .. }) => digest = got,
            Err(error) => return Err(error),
        }
    }
    unreachable!("the digest was what the snapshot asked for")
}

fuzz_target!(|data: &[u8]| {
    let mut pages = pages(data);
    if let Ok(snapshot) = open(&pages) {
        lookups(&snapshot);
    }
    for (_, page) in &mut pages {
        let sum = page_digest(page).to_le_bytes();
        if let Some(place) = page.get_mut(8..16) {
            place.copy_from_slice(&sum);
        }
    }
    if let Ok(mut snapshot) = open(&pages) {
        lookups(&snapshot);
        // An update that fails leaves what was.
        let before = snapshot.held();
        snapshot.unstage(1);
        assert!(snapshot.commit(1).is_err());
        let mut after = snapshot.held();
        let mut before = before;
        (before.sort_unstable(), after.sort_unstable());
        assert_eq!(before, after);
        lookups(&snapshot);
    }
});
