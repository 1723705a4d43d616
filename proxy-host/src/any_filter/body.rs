//! Bodies on their way through a filter.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::sync::mpsc;

/// A body is shown to the filter in pieces of about this size where more is there at once.
const PIECE: usize = 64 * 1024;
/// While headers are held back, about this much of their body is read ahead (Envoy's buffer limit).
const GATHERED: usize = 1 << 20;

/// The body ended before it was complete.
#[derive(Debug, thiserror::Error)]
#[error("the body was cut off")]
pub struct Broken;

/// A body that we send.
#[derive(Debug)]
pub enum Body {
    /// Whole; none at all where it is empty.
    Whole(Bytes),
    /// As it comes.
    Channel(mpsc::Receiver<Result<Frame<Bytes>, Broken>>),
}

/// Where a [`Body::Channel`] is written.
pub type Sink = mpsc::Sender<Result<Frame<Bytes>, Broken>>;

impl Body {
    /// No body.
    #[must_use]
    pub fn empty() -> Self {
        Self::Whole(Bytes::new())
    }

    /// A body and its other end. One piece waits at most: whoever reads slowly slows the writer down.
    #[must_use]
    pub fn channel() -> (Sink, Self) {
        let (sink, source) = mpsc::channel(1);
        (sink, Self::Channel(source))
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match &mut *self {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Channel(source) => source.poll_recv(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(bytes) if bytes.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Channel(_) => SizeHint::default(),
        }
    }
}

/// What comes next of a received body.
#[derive(Debug)]
pub enum Piece {
    /// Bytes; `true`: the last ones.
    Data(Bytes, bool),
    /// Trailers, which end it.
    Trailers(HeaderMap),
    /// It broke off.
    Broken,
}

/// A received body.
pub struct Source {
    body: Received,
    /// Read already, to see whether it was there.
    ahead: Option<Result<Frame<Bytes>, Broken>>,
    /// Read while the headers were held back.
    gathered: BytesMut,
    /// Nothing more comes of it.
    exhausted: bool,
    ended: bool,
    /// As Envoy's codec for HTTP/1.1: the end comes after the last bytes, and trailers are dropped.
    http1: bool,
}

enum Received {
    Incoming(Incoming),
    Whole(Bytes),
}

impl Source {
    /// A body from the network.
    #[must_use]
    pub fn incoming(body: Incoming, http2: bool) -> Self {
        let ended = body.is_end_stream();
        Self {
            body: Received::Incoming(body),
            ahead: None,
            gathered: BytesMut::new(),
            exhausted: ended,
            ended,
            http1: !http2,
        }
    }

    /// A body of our own.
    #[must_use]
    pub fn whole(bytes: Bytes) -> Self {
        let ended = bytes.is_empty();
        Self {
            body: Received::Whole(bytes),
            ahead: None,
            gathered: BytesMut::new(),
            exhausted: ended,
            ended,
            http1: false,
        }
    }

    /// Whether nothing more comes.
    #[must_use]
    pub fn is_end(&self) -> bool {
        self.ended
    }

    async fn frame(&mut self) -> Option<Result<Frame<Bytes>, Broken>> {
        if let Some(ahead) = self.ahead.take() {
            return Some(ahead);
        }
        if self.exhausted {
            return None;
        }
        let frame = match &mut self.body {
            Received::Incoming(body) => body.frame().await.map(|frame| frame.map_err(|_| Broken)),
            Received::Whole(bytes) if bytes.is_empty() => None,
            Received::Whole(bytes) => Some(Ok(Frame::data(std::mem::take(bytes)))),
        };
        self.exhausted = frame.is_none();
        frame
    }

    /// Whether the last frame is known to have been read.
    fn is_last(&self) -> bool {
        self.ahead.is_none()
            && match &self.body {
                Received::Incoming(body) => body.is_end_stream(),
                Received::Whole(bytes) => bytes.is_empty(),
            }
    }

    /// Reads ahead while the filter holds the headers back, so that all that came meanwhile is shown at once. Never
    /// ends by itself; may be dropped at any time.
    pub async fn gather(&mut self) -> Infallible {
        while self.gathered.len() < GATHERED && self.ahead.is_none() && !self.exhausted {
            match self.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.gathered.extend_from_slice(&data),
                    Err(frame) => self.ahead = Some(Ok(frame)),
                },
                Some(Err(broken)) => self.ahead = Some(Err(broken)),
                None => {}
            }
        }
        std::future::pending().await
    }

    /// The next piece. What is there at once comes at once, as a filter in Envoy is shown what was read at once. May be
    /// dropped and called again without losing anything.
    pub async fn next(&mut self) -> Piece {
        if !self.gathered.is_empty() {
            let data = std::mem::take(&mut self.gathered).freeze();
            let trailers = matches!(&self.ahead, Some(Ok(frame)) if frame.is_trailers());
            self.ended =
                (self.exhausted && self.ahead.is_none()) || self.is_last() && !self.http1 || trailers && self.http1;
            if self.ended {
                (self.exhausted, self.ahead) = (true, None);
            }
            return Piece::Data(data, self.ended);
        }
        let first = loop {
            match self.frame().await {
                None => {
                    self.ended = true;
                    return Piece::Data(Bytes::new(), true);
                }
                Some(Err(Broken)) => {
                    self.ended = true;
                    return Piece::Broken;
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => break data,
                    Err(frame) => {
                        if let Some(piece) = self.trailers(frame) {
                            return piece;
                        }
                    }
                },
            }
        };
        // Nothing is awaited from here on, so nothing is lost when this is dropped.
        let mut more = BytesMut::new();
        while !self.is_last() && first.len() + more.len() < PIECE {
            match self.frame().now_or_never() {
                Some(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => more.extend_from_slice(&data),
                    Err(frame) => {
                        self.ahead = Some(Ok(frame));
                        break;
                    }
                },
                Some(Some(Err(broken))) => {
                    self.ahead = Some(Err(broken));
                    break;
                }
                Some(None) | None => break,
            }
        }
        self.ended = !self.http1 && (self.is_last() || (self.exhausted && self.ahead.is_none()));
        if more.is_empty() {
            return Piece::Data(first, self.ended);
        }
        let mut joined = BytesMut::with_capacity(first.len() + more.len());
        joined.extend_from_slice(&first);
        joined.extend_from_slice(&more);
        Piece::Data(joined.freeze(), self.ended)
    }

    fn trailers(&mut self, frame: Frame<Bytes>) -> Option<Piece> {
        let trailers = frame.into_trailers().ok()?;
        self.ended = true;
        Some(if self.http1 { Piece::Data(Bytes::new(), true) } else { Piece::Trailers(trailers) })
    }
}
