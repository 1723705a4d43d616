//! A client's HTTP/2 connection whose frames are counted ([`super::frames`]) on their way to hyper. A flood ends it: the
//! client gets a GOAWAY, and nothing more of it is read.

use std::{
    future::Future as _,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::Sleep,
};

use super::{
    frames::Frames,
    guard::{Control, End},
    rewind::Rewind,
};

/// Frames of one connection that are taken before others have their turn.
const TURN: usize = 256;
/// How long a client gets to read why it was left.
const LINGER: Duration = Duration::from_secs(1);
/// `ENHANCE_YOUR_CALM` (RFC 9113, 7).
const CALM: u32 = 11;

/// The connection.
#[derive(Debug)]
pub struct Calm {
    inner: Rewind,
    control: Arc<Control>,
    frames: Frames,
    /// Frames since the connection last waited.
    turn: usize,
    header_time: Duration,
    /// Runs while the head of a request is under way.
    deadline: Option<Pin<Box<Sleep>>>,
    left: bool,
}

impl Calm {
    /// Watches a connection, from its preface on; `control` is told how it ends. `header_time`: zero for no limit.
    #[must_use]
    pub fn new(inner: Rewind, control: Arc<Control>, header_time: Duration) -> Self {
        Self { inner, control, frames: Frames::new(Instant::now()), turn: 0, header_time, deadline: None, left: false }
    }

    /// Holds a connection that ended by a flood, unread, so that its client gets to know why.
    pub async fn linger(mut self) {
        if self.left {
            // It is left in any case.
            let _ = self.inner.shutdown().await;
            tokio::time::sleep(LINGER).await;
        }
    }

    fn leave(&mut self, cx: &mut Context<'_>, why: &str) -> io::Error {
        self.left = true;
        self.control.ends(End::Broken);
        if self.frames.may_write() {
            let length = u32::try_from(8 + why.len()).unwrap_or(8).to_be_bytes();
            let last = self.frames.newest().to_be_bytes();
            let goaway = [&length[1..], &[7, 0, 0, 0, 0, 0], &last, &CALM.to_be_bytes(), why.as_bytes()].concat();
            // A client that reads nothing is not told.
            let _ = Pin::new(&mut self.inner).poll_write(cx, &goaway);
        }
        tracing::debug!("an HTTP/2 connection is closed: {why}");
        io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
    }

    /// Notes a failure of the connection, which is its end.
    fn told<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(_)) = &polled {
            self.control.ends(End::Gone);
        }
        polled
    }

    /// Whether the head under way takes too long.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        if self.header_time.is_zero() || !self.frames.in_head() {
            self.deadline = None;
            return false;
        }
        let time = self.header_time;
        self.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(time))).as_mut().poll(cx).is_ready()
    }
}

impl AsyncRead for Calm {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.turn >= TURN {
            this.turn = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        match Pin::new(&mut this.inner).poll_read(cx, buf) {
            Poll::Ready(read) => {
                if read.is_err() || buf.filled().len() == before {
                    this.control.ends(End::Gone);
                }
                read?;
            }
            Poll::Pending => {
                this.turn = 0;
                return if this.is_late(cx) {
                    Poll::Ready(Err(this.leave(cx, "request headers timeout")))
                } else {
                    Poll::Pending
                };
            }
        }
        match this.frames.received(&buf.filled()[before..], Instant::now()) {
            Ok(count) => this.turn += count,
            Err(flood) => {
                buf.set_filled(before);
                return Poll::Ready(Err(this.leave(cx, flood.text())));
            }
        }
        if this.is_late(cx) {
            buf.set_filled(before);
            return Poll::Ready(Err(this.leave(cx, "request headers timeout")));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Calm {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.inner).poll_write(cx, buf);
        let count = ready!(self.told(wrote))?;
        self.frames.wrote(&buf[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        let count = ready!(self.told(wrote))?;
        let mut rest = count;
        for buf in bufs {
            let part = rest.min(buf.len());
            self.frames.wrote(&buf[..part]);
            rest -= part;
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.inner).poll_flush(cx);
        self.told(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
