//! Host header and `:authority`: host and port, as Envoy takes them apart (SEMANTICS 1.4): everything from the last colon
//! outside brackets is the port, number or not.

/// Host, still in the client's spelling, and the port where it is a number from 1 to 65535.
pub fn split(authority: &[u8]) -> (&[u8], Option<u16>) {
    let colon = match memchr::memrchr(b':', authority) {
        Some(at) if !authority.get(at..).is_some_and(|rest| rest.contains(&b']')) => at,
        _ => return (authority, None),
    };
    let (host, rest) = authority.split_at_checked(colon).unwrap_or((authority, &[]));
    let port = rest
        .get(1..)
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|digits| digits.parse().ok())
        .filter(|port| *port != 0);
    (host, port)
}
