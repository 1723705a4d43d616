//! The header of the PROXY protocol, by which an upstream learns who its client is
//! (<https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt>).

use std::net::{IpAddr, SocketAddr};

/// Begins a header of version 2.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// Which of its two forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Text.
    V1,
    /// Binary.
    V2,
}

/// Both ends of a client's connection: the client, and where it was going.
pub type Ends = (SocketAddr, SocketAddr);

/// The header for a connection of this client's. Without one the connection is our own: `own` are its ends, which
/// version 1 tells, and version 2 leaves out, as Envoy has it.
#[must_use]
pub fn header(version: Version, client: Option<Ends>, own: Option<Ends>) -> Vec<u8> {
    match version {
        Version::V1 => match client.or(own).map(alike) {
            Some((source, destination)) => {
                let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
                let (from, to) = (source.ip(), destination.ip());
                format!("PROXY {family} {from} {to} {} {}\r\n", source.port(), destination.port()).into_bytes()
            }
            None => b"PROXY UNKNOWN\r\n".to_vec(),
        },
        Version::V2 => {
            // Version 2 and a command, the family with TCP, and the length of what follows.
            let Some((source, destination)) = client.map(alike) else {
                return [&SIGNATURE[..], &[0x20, 0, 0, 0]].concat();
            };
            let (family, length) = if source.is_ipv4() { (0x11, 12) } else { (0x21, 36) };
            let mut header = [&SIGNATURE[..], &[0x21, family, 0, length]].concat();
            for ip in [source.ip(), destination.ip()] {
                match ip {
                    IpAddr::V4(ip) => header.extend(ip.octets()),
                    IpAddr::V6(ip) => header.extend(ip.octets()),
                }
            }
            header.extend(source.port().to_be_bytes());
            header.extend(destination.port().to_be_bytes());
            header
        }
    }
}

/// Both in one family.
fn alike((source, destination): Ends) -> Ends {
    let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let (source, destination) = (canonical(source), canonical(destination));
    if source.is_ipv4() == destination.is_ipv4() {
        return (source, destination);
    }
    let mapped = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    (mapped(source), mapped(destination))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(source: &str, destination: &str) -> Option<Ends> {
        Some((source.parse().unwrap(), destination.parse().unwrap()))
    }

    #[test]
    fn version_1_is_a_line() {
        let line = |client, own| String::from_utf8(header(Version::V1, client, own)).unwrap();
        let v4 = ends("192.0.2.1:5", "198.51.100.7:443");
        assert_eq!(line(v4, None), "PROXY TCP4 192.0.2.1 198.51.100.7 5 443\r\n");
        assert_eq!(line(None, v4), "PROXY TCP4 192.0.2.1 198.51.100.7 5 443\r\n");
        assert_eq!(line(ends("[::1]:5", "[2001:db8::2]:6"), v4), "PROXY TCP6 ::1 2001:db8::2 5 6\r\n");
        let mapped = ends("[::ffff:192.0.2.1]:5", "198.51.100.7:443");
        assert_eq!(line(mapped, None), "PROXY TCP4 192.0.2.1 198.51.100.7 5 443\r\n");
        assert_eq!(line(ends("192.0.2.1:5", "[::1]:6"), None), "PROXY TCP6 ::ffff:192.0.2.1 ::1 5 6\r\n");
        assert_eq!(line(None, None), "PROXY UNKNOWN\r\n");
    }

    #[test]
    fn version_2_is_binary() {
        let begin = b"\r\n\r\n\0\r\nQUIT\n";
        let v4 = header(Version::V2, ends("192.0.2.1:5", "198.51.100.7:443"), None);
        assert_eq!(v4, [&begin[..], b"\x21\x11\0\x0c\xc0\0\x02\x01\xc6\x33\x64\x07\0\x05\x01\xbb"].concat());
        let v6 = header(Version::V2, ends("[::1]:5", "[::2]:6"), None);
        assert_eq!((v6.len(), &v6[12..16]), (16 + 36, &b"\x21\x21\0\x24"[..]));
        assert_eq!(&v6[48..], b"\0\x05\0\x06");
        assert_eq!(header(Version::V2, None, ends("[::1]:5", "[::2]:6")), [&begin[..], b"\x20\0\0\0"].concat());
    }
}
