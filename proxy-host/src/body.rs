//! Bodies on their way through: counted, and not collected where nobody needs them again.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::{sync::Notify, task::AbortHandle};

use crate::{
    access_log::Entry,
    exec, flags, idle, replay, router,
    upstream::{answer::Broken, http::Carried},
};

/// Why a body does not go on.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The client, who it comes from.
    #[error(transparent)]
    Source(#[from] hyper::Error),
    /// The upstream, which it comes from.
    #[error("{0}")]
    Upstream(#[source] Broken),
    /// The client's body had failed before.
    #[error("the request's body ended early")]
    Incomplete,
    /// Another attempt has taken the body over.
    #[error("the request is sent again")]
    Superseded,
    /// The time for the response has passed.
    #[error("upstream request timeout")]
    Timeout,
    /// Nothing has moved for too long.
    #[error("stream timeout")]
    Idle,
}

/// What is known of a client's body while others carry it.
#[derive(Debug, Default)]
pub struct Received {
    bytes: Cell<u64>,
    /// Frames of the stream so far, both ways.
    moved: Cell<u64>,
    ended: Cell<bool>,
    stopped: Cell<bool>,
    reader: RefCell<Option<Waker>>,
}

impl Received {
    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// So many more have come.
    pub fn add(&self, bytes: u64) {
        self.bytes.set(self.bytes.get() + bytes);
        self.touch();
    }

    /// Something of the stream has moved.
    pub fn touch(&self) {
        self.moved.set(self.moved.get() + 1);
    }

    /// Counts what has moved.
    #[must_use]
    pub fn moved(&self) -> u64 {
        self.moved.get()
    }

    /// Whether the whole body has come.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.ended.get()
    }

    /// The whole body has come.
    pub fn end(&self) {
        self.ended.set(true);
    }

    /// The answer is through. Where the body is not, nobody waits for the rest, as in Envoy: both connections end, as
    /// their next bytes would be the body's. Says whether it was.
    #[must_use]
    pub fn is_whole_or_stopped(&self) -> bool {
        if !self.ended.get() {
            self.stopped.set(true);
            if let Some(reader) = self.reader.take() {
                reader.wake();
            }
        }
        self.ended.get()
    }
}

/// A client's body on its way to the upstream.
#[derive(Debug)]
pub enum RequestBody {
    /// Passed on, and forgotten.
    Once {
        /// The client's.
        inner: Incoming,
        /// What is known of it.
        received: Rc<Received>,
    },
    /// Kept, for other attempts to read it again.
    Held(replay::Reader),
    /// A copy of one that is through.
    Copy(replay::Copy),
}

impl Default for RequestBody {
    /// No body.
    fn default() -> Self {
        Self::Copy(replay::Copy::default())
    }
}

impl RequestBody {
    /// Counts into `received`.
    #[must_use]
    pub fn new(inner: Incoming, received: Rc<Received>) -> Self {
        if inner.is_end_stream() {
            received.end();
        }
        Self::Once { inner, received }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let received = match &mut *self {
            Self::Once { received, .. } => received.clone(),
            Self::Held(reader) => reader.received().clone(),
            Self::Copy(copy) => return Poll::Ready(copy.take().map(Ok)),
        };
        if received.stopped.get() {
            return Poll::Ready(Some(Err(BodyError::Incomplete)));
        }
        let polled = match &mut *self {
            Self::Once { inner, received } => Pin::new(&mut *inner).poll_frame(cx).map(|frame| {
                if let Some(Ok(data)) = frame.as_ref().map(|f| f.as_ref().map(Frame::data_ref)) {
                    received.add(data.map_or(0, |d| d.remaining() as u64));
                }
                if frame.is_none() || inner.is_end_stream() {
                    received.end();
                }
                frame.map(|frame| frame.map_err(BodyError::Source))
            }),
            Self::Held(reader) => reader.poll_frame(cx),
            Self::Copy(_) => Poll::Ready(None),
        };
        if polled.is_pending() {
            received.reader.replace(Some(cx.waker().clone()));
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Once { inner, .. } => inner.is_end_stream(),
            Self::Held(reader) => reader.is_end_stream(),
            Self::Copy(copy) => copy.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Once { inner, .. } => inner.size_hint(),
            Self::Held(reader) => reader.size_hint(),
            Self::Copy(copy) => copy.size_hint(),
        }
    }
}

/// What goes back to the client. Dropping it writes the access log.
pub struct ResponseBody {
    source: Source,
    received: Rc<Received>,
    entry: Box<Entry>,
    /// All of it has been taken.
    through: bool,
    idle: Option<Pin<Box<dyn Future<Output = ()>>>>,
    unread: Option<Unread>,
    /// What lives as long as the stream.
    held: Option<Rc<dyn Any>>,
}

/// Ends the stream of a client that does not read: while it does not, nobody polls the body.
struct Unread {
    over: Rc<Cell<bool>>,
    watch: AbortHandle,
}

impl Unread {
    fn after(idle: Duration, received: Rc<Received>, end: Rc<Notify>) -> Self {
        let over = Rc::new(Cell::new(false));
        let is_over = over.clone();
        let watch = tokio::task::spawn_local(async move {
            // Later than the body itself says so, if it is polled.
            idle::quiet(idle + idle / 4, || Some(received.moved())).await;
            is_over.set(true);
            end.notify_one();
        });
        Self { over, watch: watch.abort_handle() }
    }
}

enum Source {
    Local(Option<Bytes>),
    Upstream(Box<Carried>),
}

impl ResponseBody {
    /// A body of our own.
    #[must_use]
    pub fn local(body: Bytes, received: Rc<Received>, entry: Box<Entry>) -> Self {
        let source = Source::Local((!body.is_empty()).then_some(body));
        Self { source, received, entry, through: false, idle: None, unread: None, held: None }
    }

    /// No body, and no line in the access log: another task writes it.
    #[must_use]
    pub fn silent(received: Rc<Received>) -> Self {
        Self {
            source: Source::Local(None),
            received,
            entry: Box::new(Entry::silent()),
            through: false,
            idle: None,
            unread: None,
            held: None,
        }
    }

    /// The upstream's body; its connection goes back to the pool when the body is through.
    #[must_use]
    pub fn upstream(carried: Box<Carried>, received: Rc<Received>, entry: Box<Entry>) -> Self {
        let mut source = Source::Upstream(carried);
        source.finish_at_end(&received);
        Self { source, received, entry, through: false, idle: None, unread: None, held: None }
    }

    /// Keeps this for as long as the stream goes on.
    #[must_use]
    pub fn holding(mut self, held: Rc<dyn Any>) -> Self {
        self.held = Some(held);
        self
    }

    /// Ends the stream when nothing of it has moved for this time, either way; zero for no limit.
    #[must_use]
    pub fn limited(mut self, idle: Duration) -> Self {
        if !idle.is_zero() && !self.is_end_stream() {
            let received = self.received.clone();
            self.unread = exec::end().map(|end| Unread::after(idle, received.clone(), end));
            self.idle = Some(Box::pin(async move { idle::quiet(idle, || Some(received.moved())).await }));
        }
        self
    }

    /// What has passed while no frame came: flag, details and error.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<(&'static str, &'static str, BodyError)> {
        if let Source::Upstream(carried) = &mut self.source
            && let Some(deadline) = &mut carried.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(("UT", "response_timeout", BodyError::Timeout));
        }
        let Some(idle) = &mut self.idle else { return Poll::Pending };
        ready!(idle.as_mut().poll(cx));
        Poll::Ready(("SI", "stream_idle_timeout", BodyError::Idle))
    }
}

impl Source {
    fn finish_at_end(&mut self, received: &Received) {
        if let Self::Upstream(carried) = self
            && carried.body.is_end_stream()
        {
            finish(carried, received);
        }
    }
}

/// The answer is through.
fn finish(carried: &mut Carried, received: &Received) {
    if carried.is_leased() {
        if received.is_whole_or_stopped() {
            carried.finish();
        } else {
            carried.leave();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let received = self.received.clone();
        let frame = match &mut self.source {
            Source::Local(body) => body.take().map(|body| Ok(Frame::data(body))),
            Source::Upstream(carried) => {
                let Poll::Ready(frame) = Pin::new(&mut carried.body).poll_frame(cx) else {
                    let (flag, details, error) = ready!(self.poll_over(cx));
                    if let Source::Upstream(carried) = &mut self.source {
                        carried.leave();
                    }
                    self.entry.flags = flags::join(self.entry.flags, flag);
                    self.entry.reason = Some(details.into());
                    return Poll::Ready(Some(Err(error)));
                };
                received.touch();
                match &frame {
                    None => finish(carried, &received),
                    Some(Err(error)) => {
                        carried.leave();
                        // Where the request broke off, so did the connection that the answer comes over.
                        let fault = self.entry.fault().filter(|_| !received.is_whole());
                        let (flag, details) = fault.unwrap_or_else(|| router::cut(error));
                        self.entry.flags = flags::join(self.entry.flags, flag);
                        self.entry.reason = Some(details);
                    }
                    Some(Ok(_)) => {}
                }
                frame.map(|frame| frame.map_err(BodyError::Upstream))
            }
        };
        if let Some(data) = frame.as_ref().and_then(|f| f.as_ref().ok()).and_then(Frame::data_ref) {
            self.entry.sent += data.remaining() as u64;
        }
        self.source.finish_at_end(&received);
        let last = frame.as_ref().is_none_or(|frame| frame.as_ref().is_ok_and(Frame::is_trailers));
        self.through |= last || self.is_end_stream();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Local(body) => body.is_none(),
            Source::Upstream(carried) => carried.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Local(body) => SizeHint::with_exact(body.as_ref().map_or(0, |b| b.len() as u64)),
            Source::Upstream(carried) => carried.body.size_hint(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if let Some(unread) = self.unread.take() {
            unread.watch.abort();
            if unread.over.get() {
                self.entry.flags = flags::join(self.entry.flags, "SI");
                self.entry.reason = Some("stream_idle_timeout".into());
            }
        }
        self.entry.received = self.received.bytes();
        // Where its length is told beforehand, nobody asks for the end.
        if !self.through && !self.is_end_stream() && self.size_hint().exact() != Some(0) {
            self.entry.broke_off();
        }
    }
}
