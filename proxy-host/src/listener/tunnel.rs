//! A connection within a CONNECT of HTTP/1.1, which the upstream is asked for.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Most bytes of an answer's head.
const LARGEST: usize = 16 << 10;

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The connection ended.
    #[error("tunnel: {0}")]
    Io(#[from] io::Error),
    /// The upstream does not want to.
    #[error("tunnel refused with status {0}")]
    Refused(u16),
    /// What the upstream says is no answer.
    #[error("tunnel: the upstream's answer is not HTTP")]
    NotHttp,
    /// It took too long.
    #[error("tunnel: no answer in time")]
    Silent,
}

/// Asks for a tunnel to a host and port. When it is there, the next byte of the upstream is the far end's.
///
/// # Errors
/// There is none.
pub async fn ask(upstream: &mut (impl AsyncRead + AsyncWrite + Unpin), to: &str) -> Result<(), TunnelError> {
    upstream.write_all(format!("CONNECT {to} HTTP/1.1\r\nhost: {to}\r\n\r\n").as_bytes()).await?;
    upstream.flush().await?;
    let mut head = Vec::with_capacity(256);
    // Byte by byte, so that none of the far end's is taken: an answer's head is short, and comes once.
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == LARGEST {
            return Err(TunnelError::NotHttp);
        }
        head.push(upstream.read_u8().await?);
    }
    match status(&head) {
        Some(200..=299) => Ok(()),
        Some(status) => Err(TunnelError::Refused(status)),
        None => Err(TunnelError::NotHttp),
    }
}

fn status(head: &[u8]) -> Option<u16> {
    let line = head.strip_prefix(b"HTTP/1.1 ").or_else(|| head.strip_prefix(b"HTTP/1.0 "))?;
    std::str::from_utf8(line.get(..3)?).ok()?.parse().ok().filter(|status| (200..600).contains(status))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    async fn asked(answer: &[u8]) -> (Result<(), TunnelError>, String, Vec<u8>) {
        let (mut near, mut far) = duplex(1 << 16);
        far.write_all(answer).await.unwrap();
        let result = ask(&mut near, "a.com:443").await;
        let mut request = vec![0; 256];
        let length = far.read(&mut request).await.unwrap();
        drop(far);
        let mut rest = Vec::new();
        near.read_to_end(&mut rest).await.unwrap();
        (result, String::from_utf8_lossy(&request[..length]).into_owned(), rest)
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_the_far_ends() {
        let (result, request, rest) = asked(b"HTTP/1.1 200 OK\r\nx: y\r\n\r\nhello").await;
        assert!(result.is_ok());
        assert_eq!(request, "CONNECT a.com:443 HTTP/1.1\r\nhost: a.com:443\r\n\r\n");
        assert_eq!(rest, b"hello");
    }

    #[tokio::test]
    async fn a_tunnel_may_be_refused() {
        for (answer, status) in [(&b"HTTP/1.1 403 No\r\n\r\n"[..], 403), (b"HTTP/1.0 502 \r\n\r\n", 502)] {
            assert!(matches!(asked(answer).await.0, Err(TunnelError::Refused(s)) if s == status));
        }
        assert!(matches!(asked(b"220 mail\r\n\r\n").await.0, Err(TunnelError::NotHttp)));
    }
}
