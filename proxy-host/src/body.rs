//! Bodies on their way through: counted, and never collected.

use std::{
    cell::Cell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::{access_log::Entry, upstream::http::Lease};

/// A client's body on its way to the upstream.
#[derive(Debug)]
pub struct RequestBody {
    inner: Incoming,
    received: Rc<Cell<u64>>,
}

impl RequestBody {
    /// Counts into `received`.
    #[must_use]
    pub fn new(inner: Incoming, received: Rc<Cell<u64>>) -> Self {
        Self { inner, received }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if let Some(Ok(data)) = frame.as_ref().map(|f| f.as_ref().map(Frame::data_ref)) {
            self.received.set(self.received.get() + data.map_or(0, |d| d.remaining() as u64));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// What goes back to the client. Dropping it writes the access log.
pub struct ResponseBody {
    source: Source,
    received: Rc<Cell<u64>>,
    entry: Box<Entry>,
}

enum Source {
    Local(Option<Bytes>),
    Upstream(Incoming, Option<Lease>),
}

impl ResponseBody {
    /// A body of our own.
    #[must_use]
    pub fn local(body: Bytes, received: Rc<Cell<u64>>, entry: Box<Entry>) -> Self {
        Self { source: Source::Local((!body.is_empty()).then_some(body)), received, entry }
    }

    /// No body, and no line in the access log: another task writes it.
    #[must_use]
    pub fn silent(received: Rc<Cell<u64>>) -> Self {
        Self { source: Source::Local(None), received, entry: Box::new(Entry::silent()) }
    }

    /// The upstream's body; its connection goes back to the pool when the body is through.
    #[must_use]
    pub fn upstream(body: Incoming, lease: Lease, received: Rc<Cell<u64>>, entry: Box<Entry>) -> Self {
        let mut source = Source::Upstream(body, Some(lease));
        source.finish_at_end();
        Self { source, received, entry }
    }
}

impl Source {
    fn finish_at_end(&mut self) {
        if let Self::Upstream(body, lease) = self
            && body.is_end_stream()
            && let Some(lease) = lease.take()
        {
            lease.finish();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = match &mut self.source {
            Source::Local(body) => body.take().map(|body| Ok(Frame::data(body))),
            Source::Upstream(body, lease) => {
                let frame = ready!(Pin::new(body).poll_frame(cx));
                match &frame {
                    None => {
                        if let Some(lease) = lease.take() {
                            lease.finish();
                        }
                    }
                    Some(Err(_)) => {
                        lease.take();
                        // Envoy's flag for an upstream that ends in the middle.
                        self.entry.flags = "UC";
                    }
                    Some(Ok(_)) => {}
                }
                frame
            }
        };
        if let Some(data) = frame.as_ref().and_then(|f| f.as_ref().ok()).and_then(Frame::data_ref) {
            self.entry.sent += data.remaining() as u64;
        }
        self.source.finish_at_end();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Local(body) => body.is_none(),
            Source::Upstream(body, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Local(body) => SizeHint::with_exact(body.as_ref().map_or(0, |b| b.len() as u64)),
            Source::Upstream(body, _) => body.size_hint(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        self.entry.received = self.received.get();
    }
}
