//! A connection with the bytes that were read to find out what it is, still to be read.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf as _, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use crate::gather;

/// Gives `read` again, then goes on with the connection.
#[derive(Debug)]
pub struct Rewind {
    read: Bytes,
    stream: Side,
}

#[derive(Debug)]
enum Side {
    Plain(TcpStream),
    /// TLS that ends here.
    Secure(Box<TlsStream<Rewind>>),
}

impl Rewind {
    /// A connection of which these bytes were read.
    #[must_use]
    pub fn new(read: Bytes, stream: TcpStream) -> Self {
        Self { read, stream: Side::Plain(stream) }
    }

    /// A connection whose TLS ends here, and what was read from within it.
    #[must_use]
    pub fn secure(read: Bytes, stream: TlsStream<Rewind>) -> Self {
        Self { read, stream: Side::Secure(Box::new(stream)) }
    }

    /// The same connection with these bytes to be given again, in place of those before.
    #[must_use]
    pub fn with_read(self, read: Bytes) -> Self {
        Self { read, ..self }
    }

    /// Whether its TLS ends here.
    #[must_use]
    pub fn is_secure(&self) -> bool {
        matches!(self.stream, Side::Secure(_))
    }

    /// Takes the bytes that were read and have not been given again.
    pub fn take_read(&mut self) -> Bytes {
        std::mem::take(&mut self.read)
    }

    /// The connection itself, to set its options, or to go on with it once [`Self::take_read`] has been asked.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        match &self.stream {
            Side::Plain(stream) => stream,
            Side::Secure(stream) => stream.get_ref().0.stream(),
        }
    }
}

impl AsyncRead for Rewind {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return match &mut self.stream {
                Side::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
                Side::Secure(stream) => Pin::new(stream).poll_read(cx, buf),
            };
        }
        let n = self.read.len().min(buf.remaining());
        buf.put_slice(&self.read[..n]);
        self.read.advance(n);
        if self.read.is_empty() {
            // Gives the memory back.
            self.read = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewind {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Side::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Side::Secure(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Side::Plain(stream) => gather::poll_write(stream, cx, bufs),
            Side::Secure(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Side::Plain(stream) => stream.is_write_vectored(),
            Side::Secure(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Side::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Side::Secure(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Side::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Side::Secure(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
