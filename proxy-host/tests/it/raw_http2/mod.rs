//! A client of HTTP/2 that sends frames as a test makes them.

#![allow(dead_code, reason = "each test uses what it needs")]

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// GET http://a.test/, as HPACK.
pub const GET: &[u8] = b"\x82\x86\x84\x41\x06a.test";
/// GET http://a.test/slow
pub const SLOW: &[u8] = b"\x82\x86\x04\x05/slow\x41\x06a.test";

const PATIENCE: Duration = Duration::from_secs(15);

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

pub struct Client(pub TcpStream);

impl Client {
    pub fn connect(proxy: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(proxy).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, b"")).unwrap();
        Self(stream)
    }

    pub fn send(&mut self, bytes: &[u8]) {
        // The proxy may have left by now.
        let _ = self.0.write_all(bytes);
    }

    /// The next frame: kind, stream, payload; `None` at the end.
    pub fn frame(&mut self) -> Option<(u8, u32, Vec<u8>)> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).ok()?;
        let [a, b, c, kind, _, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.0.read_exact(&mut payload).ok()?;
        Some((kind, u32::from_be_bytes(stream), payload))
    }

    /// The next frame of one of these kinds.
    pub fn frame_of(&mut self, kinds: &[u8]) -> Option<(u8, u32, Vec<u8>)> {
        std::iter::from_fn(|| self.frame()).find(|(kind, ..)| kinds.contains(kind))
    }

    /// The code of the next GOAWAY.
    pub fn goaway(&mut self) -> Option<u32> {
        let (_, _, payload) = self.frame_of(&[GOAWAY])?;
        Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()))
    }
}
