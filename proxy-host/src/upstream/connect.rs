//! Opening connections to endpoints.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::client::TlsStream;

use super::{Apart, Resolved, breakers::Taken, cluster::Address, options::Keepalive, proxy_protocol, tls::Connector};
use crate::{
    gather,
    listener::relay::Socket,
    stats::{self, UpstreamOpen},
};

/// A connection to an endpoint.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream, UpstreamOpen),
    /// Unix-domain socket.
    Unix(UnixStream, UpstreamOpen),
    /// TLS on one of them.
    Tls(Box<TlsStream<Box<Stream>>>),
}

/// Why no connection could be opened; the texts are Envoy's.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The system said no.
    #[error("remote connection failure, transport failure reason: delayed connect error: {0}")]
    Io(#[from] io::Error),
    /// TLS did not come about.
    #[error("remote connection failure, transport failure reason: TLS_error:|{0}:TLS_error_end")]
    Tls(String),
    /// The cluster has as many connections, or requests that wait for one, as it may.
    #[error("overflow")]
    Overflow,
    /// It took longer than the cluster allows.
    #[error("connection timeout")]
    Timeout,
}

impl ConnectError {
    /// What a client is told. As in Envoy, what lies below is for the log alone.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Io(_) | Self::Tls(_) => "remote connection failure",
            Self::Overflow => "overflow",
            Self::Timeout => "connection timeout",
        }
    }

    /// The reason as Envoy has it in its response code details: with what lies below.
    #[must_use]
    pub fn details(&self) -> String {
        match self {
            Self::Io(error) => {
                let text = error.to_string();
                let text = text.split_once(" (os error").map_or(&*text, |(text, _)| text);
                format!("{}|delayed connect error: {text}", self.reason())
            }
            Self::Tls(error) => format!("{}|TLS_error:|{error}:TLS_error_end", self.reason()),
            Self::Overflow | Self::Timeout => self.reason().to_owned(),
        }
    }
}

/// Connects to the first of the addresses that answers, in order, all within one timeout; `apart` is what the
/// connection is for; `first`: the limit of connections does not matter.
///
/// # Errors
/// The last address's failure, or the timeout.
pub async fn connect(
    addresses: &[Address],
    spec: &Resolved,
    tls: &Connector,
    apart: Option<&Apart>,
    first: bool,
) -> Result<(Stream, Address), ConnectError> {
    let Ok(mut counted) = spec.shared.connection(&spec.options.limits, first) else {
        return Err(ConnectError::Overflow);
    };
    let attempt = async {
        let mut last = ConnectError::Io(io::Error::from(io::ErrorKind::AddrNotAvailable));
        for address in addresses {
            let opened = match address {
                Address::Ip(ip) => TcpStream::connect(ip).await.map(|stream| {
                    // Only costs latency where it cannot be set.
                    let _ = stream.set_nodelay(true);
                    if let Some(keepalive) = &spec.options.keepalive {
                        keep_alive(&stream, keepalive);
                    }
                    Stream::Tcp(stream, UpstreamOpen::new())
                }),
                Address::Unix(path) => {
                    UnixStream::connect(path).await.map(|stream| Stream::Unix(stream, UpstreamOpen::new()))
                }
            };
            let mut opened = opened.map(|stream| stream.holding(counted.take()));
            if let (Ok(stream), Some(version)) = (&mut opened, spec.options.proxy) {
                let header = proxy_protocol::header(version, apart.and_then(|apart| apart.client), stream.ends());
                if let Err(error) = stream.write_all(&header).await {
                    opened = Err(error);
                }
            }
            let host = apart.and_then(|apart| apart.host.as_deref());
            let secured = match (opened, &spec.options.tls) {
                (Ok(stream), None) => Ok(stream),
                (Ok(stream), Some(settings)) => Box::pin(tls.connect(settings, host, stream)).await,
                (Err(error), _) => Err(ConnectError::Io(error)),
            };
            match secured {
                Ok(stream) => return Ok((stream, address.clone())),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    let connected = tokio::time::timeout(spec.connect_timeout, attempt).await.unwrap_or(Err(ConnectError::Timeout));
    if let Err(error) = &connected {
        stats::here(|stats| {
            stats.upstream_failed.add(1);
            stats.upstream_timeouts.add(u64::from(matches!(error, ConnectError::Timeout)));
        });
    }
    connected
}

fn keep_alive(stream: &TcpStream, settings: &Keepalive) {
    let mut keepalive = TcpKeepalive::new();
    if let Some(time) = settings.time {
        keepalive = keepalive.with_time(time);
    }
    if let Some(interval) = settings.interval {
        keepalive = keepalive.with_interval(interval);
    }
    if let Some(probes) = settings.probes {
        keepalive = keepalive.with_retries(probes);
    }
    if let Err(error) = SockRef::from(stream).set_tcp_keepalive(&keepalive) {
        tracing::debug!("TCP keepalive: {error}");
    }
}

// === impl Stream ===

impl Stream {
    /// The socket itself, where its bytes are those of the connection.
    #[must_use]
    pub fn socket(&self) -> Option<Socket<'_>> {
        match self {
            Self::Tcp(stream, _) => Some(Socket::Tcp(stream)),
            Self::Unix(stream, _) => Some(Socket::Unix(stream)),
            Self::Tls(_) => None,
        }
    }

    /// Both ends of a TCP connection.
    fn ends(&self) -> Option<proxy_protocol::Ends> {
        match self {
            Self::Tcp(stream, _) => stream.local_addr().ok().zip(stream.peer_addr().ok()),
            Self::Unix(..) | Self::Tls(_) => None,
        }
    }

    /// Keeps what counts it.
    fn holding(mut self, taken: Option<Taken>) -> Self {
        if let Self::Tcp(_, open) | Self::Unix(_, open) = &mut self {
            open.hold(taken);
        }
        self
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream, _) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream, _) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream, _) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream, _) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream, _) => gather::poll_write(stream, cx, bufs),
            Self::Unix(stream, _) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        !matches!(self, Self::Tls(_))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream, _) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream, _) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream, _) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream, _) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
