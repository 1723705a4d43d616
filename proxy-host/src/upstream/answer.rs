//! Bodies of answers, and why there is none or not all of one, whichever version of HTTP the upstream speaks.

use std::{
    error::Error as _,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::http2;

/// Why an answer did not come, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// Of an HTTP/1.1 connection.
    #[error(transparent)]
    Http1(#[from] hyper::Error),
    /// Of an HTTP/2 stream or its connection. It is its own source, for those who look for it.
    #[error("{0}")]
    Http2(#[from] h2::Error),
    /// It says twice how long it is.
    #[error("the length of the answer is ambiguous")]
    Ambiguous,
}

impl Broken {
    /// What came is not HTTP.
    #[must_use]
    pub fn is_parse(&self) -> bool {
        match self {
            Self::Http1(error) => error.is_parse(),
            Self::Http2(_) => false,
            Self::Ambiguous => true,
        }
    }

    /// It was the client's body that broke off.
    #[must_use]
    pub fn is_user(&self) -> bool {
        matches!(self, Self::Http1(error) if error.is_user())
    }

    /// Whether the server said that it has done nothing about the request: by refusing its stream, or by ending the
    /// connection before it, which to Envoy is the same.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.reset_by_server() == Some(h2::Reason::REFUSED_STREAM)
    }

    /// Why the server ended the stream, if it did.
    #[must_use]
    pub fn reset_by_server(&self) -> Option<h2::Reason> {
        match self {
            Self::Http2(error) if error.is_remote() && error.is_go_away() => Some(h2::Reason::REFUSED_STREAM),
            Self::Http2(error) if error.is_remote() => error.reason(),
            _ => None,
        }
    }

    /// The kind of error below HTTP/1.1, where that was the cause.
    #[must_use]
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        let Self::Http1(error) = self else { return None };
        let mut source = error.source();
        while let Some(error) = source {
            if let Some(error) = error.downcast_ref::<io::Error>() {
                return Some(error.kind());
            }
            source = error.source();
        }
        None
    }
}

/// The body of an answer.
#[derive(Debug)]
pub enum Answer {
    /// Of an HTTP/1.1 connection.
    Http1(Incoming),
    /// Of an HTTP/2 stream.
    Http2(http2::Received),
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match &mut *self {
            Self::Http1(body) => Pin::new(body).poll_frame(cx).map_err(Broken::Http1),
            Self::Http2(body) => body.poll_frame(cx).map_err(Broken::Http2),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(body) => body.size_hint(),
            Self::Http2(body) => body.size_hint(),
        }
    }
}
