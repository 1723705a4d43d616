//! A client's HTTP/1.1 connection whose bytes are judged ([`super::strict`]) before hyper reads them.
//!
//! A refused request never reaches hyper. In its place comes one with a method that no client can send, whose target says
//! what to answer; so the answer keeps its turn behind earlier ones, and is logged and counted as any other.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use ::http::{Request, StatusCode, Version};
use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

use super::{
    rewind::Rewind,
    server::HttpLimits,
    strict::{LATE, Refusal, Strict, Verdict},
};

/// Method of the request that stands for a refused one; [`super::strict`] lets no other method through than it knows.
pub const REFUSED: &str = "PORTOLAN-REFUSED";
/// What a request that stands for a refused one says: status and details.
#[must_use]
pub fn refused<B>(request: &Request<B>) -> Option<(StatusCode, String)> {
    if request.version() == Version::HTTP_2 || request.method().as_str() != REFUSED {
        return None;
    }
    let (status, details) = request.uri().path().get(1..).and_then(|said| said.split_once('/')).unwrap_or_default();
    Some((StatusCode::from_bytes(status.as_bytes()).unwrap_or(StatusCode::BAD_REQUEST), details.to_owned()))
}

/// The body of Envoy's answer to a refused request.
#[must_use]
pub fn refusal_text(status: StatusCode) -> &'static str {
    match status {
        StatusCode::REQUEST_TIMEOUT => "request header timeout",
        status => status.canonical_reason().unwrap_or_default(),
    }
}

/// How long a refused client's bytes are read and dropped, so that it gets the answer and no reset (Envoy's
/// `delayed_close_timeout`).
const LINGER: Duration = Duration::from_secs(1);
/// Bytes read at once.
const READ: usize = 16 * 1024;

thread_local! {
    /// One buffer for all connections of a thread: what is read is passed on at once.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into_boxed_slice());
}

/// What the two ends of a connection, its bytes and its requests, tell each other. They are on one thread, but hyper
/// wants what may be upgraded to be `Send`.
#[derive(Debug, Default)]
pub struct Control {
    answered: AtomicU8,
    broken: OnceLock<Refusal>,
    /// A request expects a 100, which is the upstream's to give: hyper's own is not written.
    expects: AtomicBool,
    /// The upstream gave it.
    go_on: AtomicBool,
    reader: AtomicWaker,
    /// The connection is to be taken out of hyper, where it waits for a request.
    park: AtomicBool,
    /// How the connection ends: [`End`], in order.
    end: AtomicU8,
    parked: Mutex<Option<Rewind>>,
}

/// What hyper writes by itself when a body is asked for.
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// How a connection that has requests under way ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum End {
    /// It goes on: one of its streams may end alone.
    Open,
    /// The process is to end.
    Stopped,
    /// What the client sent ends it.
    Broken,
    /// The client closed it.
    Gone,
}

const UPGRADED: u8 = 1;
const NOT_UPGRADED: u8 = 2;

impl Control {
    /// A request for an upgrade was answered.
    pub fn answered(&self, upgraded: bool) {
        self.answered.store(if upgraded { UPGRADED } else { NOT_UPGRADED }, Relaxed);
    }

    /// A request is under way whose client waits for a 100 before it sends its body.
    pub fn expects(&self) {
        self.expects.store(true, Relaxed);
    }

    /// The upstream said 100.
    pub fn go_on(&self) {
        if self.expects.load(Relaxed) {
            self.go_on.store(true, Relaxed);
            self.reader.wake();
        }
    }

    /// Whether a connection that waits for its next request is taken out when hyper next reads.
    pub fn park(&self, park: bool) {
        self.park.store(park, Relaxed);
    }

    /// The connection that was taken out.
    #[must_use]
    pub fn take_parked(&self) -> Option<Rewind> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The connection ends, for the strongest of the reasons that there are.
    pub fn ends(&self, end: End) {
        self.end.fetch_max(end as u8, Relaxed);
    }

    /// How it ends.
    #[must_use]
    pub fn end(&self) -> End {
        match self.end.load(Relaxed) {
            0 => End::Open,
            1 => End::Stopped,
            2 => End::Broken,
            _ => End::Gone,
        }
    }

    /// Why the body under way ended early, where the client is at fault.
    #[must_use]
    pub fn broken(&self) -> Option<Refusal> {
        self.broken.get().copied()
    }
}

/// The connection.
#[derive(Debug)]
pub struct Guard {
    /// None once it is parked.
    inner: Option<Rewind>,
    strict: Strict,
    control: Arc<Control>,
    /// May pass.
    ready: Bytes,
    /// Cannot be judged before more has come.
    held: BytesMut,
    refused: bool,
    /// Still to be told to hyper, after what came before it.
    broken: Option<Refusal>,
    header_time: Duration,
    /// Runs while the head of a request is under way.
    deadline: Option<Pin<Box<Sleep>>>,
    /// The rest of a 100 that is being written.
    going_on: &'static [u8],
    linger: Option<Pin<Box<Sleep>>>,
    /// What hyper wrote has not all been taken.
    writing: bool,
}

/// What hyper is told of a connection that is parked.
fn gone() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

impl Guard {
    /// Guards a connection.
    #[must_use]
    pub fn new(inner: Rewind, control: Arc<Control>, limits: HttpLimits) -> Self {
        Self {
            inner: Some(inner),
            strict: Strict::new(limits),
            control,
            ready: Bytes::new(),
            held: BytesMut::new(),
            refused: false,
            broken: None,
            header_time: limits.header_time,
            deadline: None,
            going_on: &[],
            linger: None,
            writing: false,
        }
    }

    fn poll_inner(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // The end, where it is parked.
        let Some(inner) = &mut self.inner else { return Poll::Ready(Ok(())) };
        let before = buf.filled().len();
        let read = Pin::new(inner).poll_read(cx, buf);
        if let Poll::Ready(read) = &read
            && (read.is_err() || buf.filled().len() == before)
        {
            self.control.ends(End::Gone);
        }
        read
    }

    fn wrote(&mut self, wrote: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.writing = wrote.is_pending();
        if let Poll::Ready(Err(_)) = &wrote {
            self.control.ends(End::Gone);
        }
        wrote
    }

    /// Takes the connection out, where that is asked for and nothing of it is under way.
    fn is_parked(&mut self) -> bool {
        let waits = self.strict.is_between() && self.ready.is_empty() && self.held.is_empty();
        if !waits || self.refused || self.writing || !self.going_on.is_empty() {
            return false;
        }
        *self.control.parked.lock().unwrap_or_else(PoisonError::into_inner) = self.inner.take();
        true
    }

    /// Writes the upstream's 100 where it is due.
    fn poll_go_on(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.control.go_on.swap(false, Relaxed) {
            self.going_on = CONTINUE;
        }
        while !self.going_on.is_empty() {
            let inner = self.inner.as_mut().ok_or_else(gone)?;
            let count = ready!(Pin::new(inner).poll_write(cx, self.going_on))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.going_on = &self.going_on[count..];
        }
        Poll::Ready(Ok(()))
    }

    /// Whether hyper begins to write a 100 of its own; anything else begins the answer, before which one was due.
    fn is_own_continue(&mut self, buf: &[u8]) -> bool {
        if !self.control.expects.load(Relaxed) || buf.is_empty() {
            return false;
        }
        let own = buf.starts_with(CONTINUE);
        if !own {
            self.control.expects.store(false, Relaxed);
        }
        own
    }

    /// Takes what was read; `buf` gets what may pass.
    fn take(&mut self, read: &[u8], buf: &mut ReadBuf<'_>) {
        if self.held.is_empty() {
            let (passed, end) = self.judge(read);
            self.pass(&read[..passed], buf);
            match end {
                None => self.held.extend_from_slice(&read[passed..]),
                Some(end) => self.end(end, buf),
            }
        } else {
            self.held.extend_from_slice(read);
            let held = std::mem::take(&mut self.held);
            let (passed, end) = self.judge(&held);
            self.pass(&held[..passed], buf);
            match end {
                // Nothing is kept of a connection that waits for its next request.
                None if passed == held.len() => {}
                None => {
                    self.held = held;
                    self.held.advance(passed);
                }
                Some(end) => self.end(end, buf),
            }
        }
    }

    fn judge(&mut self, bytes: &[u8]) -> (usize, Option<Verdict>) {
        match self.strict.judge(bytes) {
            Verdict::Pass(count) => (count, None),
            end @ (Verdict::Refuse(count, _) | Verdict::Broken(count, _)) => (count, Some(end)),
        }
    }

    fn pass(&mut self, bytes: &[u8], buf: &mut ReadBuf<'_>) {
        let now = bytes.len().min(buf.remaining());
        buf.put_slice(&bytes[..now]);
        if now < bytes.len() {
            self.ready = Bytes::copy_from_slice(&bytes[now..]);
        }
    }

    fn end(&mut self, verdict: Verdict, buf: &mut ReadBuf<'_>) {
        self.refused = true;
        match verdict {
            Verdict::Pass(_) => {}
            Verdict::Refuse(_, Refusal { status, details }) => {
                let request = format!("{REFUSED} /{status}/{details} HTTP/1.1\r\nconnection: close\r\n\r\n");
                if self.ready.is_empty() {
                    self.pass(request.as_bytes(), buf);
                } else {
                    self.ready = [&self.ready[..], request.as_bytes()].concat().into();
                }
            }
            Verdict::Broken(_, refusal) => {
                // Nothing is read after the first.
                let _ = self.control.broken.set(refusal);
                self.broken = Some(refusal);
            }
        }
    }

    /// Whether the head under way takes too long.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        if self.header_time.is_zero() || !self.strict.in_head() {
            self.deadline = None;
            return false;
        }
        let time = self.header_time;
        self.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(time))).as_mut().poll(cx).is_ready()
    }

    fn poll_into_scratch(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut into = ReadBuf::new(scratch);
            loop {
                into.clear();
                ready!(self.poll_inner(cx, &mut into))?;
                // The end of the connection, or something for hyper.
                if into.filled().is_empty() {
                    return Poll::Ready(Ok(()));
                }
                let before = buf.filled().len();
                self.take(into.filled(), buf);
                if buf.filled().len() > before {
                    return Poll::Ready(Ok(()));
                }
                if let Some(refusal) = self.broken.take() {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, refusal.details)));
                }
            }
        })
    }
}

impl AsyncRead for Guard {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.control.expects.load(Relaxed) {
            this.control.reader.register(cx.waker());
            // What cannot be written now goes before what is written next.
            if let Poll::Ready(Err(error)) = this.poll_go_on(cx) {
                return Poll::Ready(Err(error));
            }
        }
        if this.strict.is_held() {
            match this.control.answered.swap(0, Relaxed) {
                0 => {}
                answer => this.strict.answered(answer == UPGRADED),
            }
        }
        if !this.ready.is_empty() {
            let count = this.ready.len().min(buf.remaining());
            buf.put_slice(&this.ready[..count]);
            this.ready.advance(count);
            return Poll::Ready(Ok(()));
        }
        if let Some(refusal) = this.broken.take() {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, refusal.details)));
        }
        if this.refused {
            // The last answer is under way; an end would make hyper drop it.
            return Poll::Pending;
        }
        // Only what cannot reach into the next request goes straight where it is wanted.
        if this.strict.unseen() >= buf.remaining() as u64 && this.held.is_empty() {
            let before = buf.filled().len();
            ready!(this.poll_inner(cx, buf))?;
            this.strict.passed((buf.filled().len() - before) as u64);
            return Poll::Ready(Ok(()));
        }
        let read = this.poll_into_scratch(cx, buf);
        if read.is_pending() && this.is_late(cx) {
            this.held = BytesMut::new();
            this.end(Verdict::Refuse(0, LATE), buf);
            return Poll::Ready(Ok(()));
        }
        // Only now: what was read from a TLS connection's socket is not there a second time.
        if read.is_pending() && this.control.park.load(Relaxed) && this.is_parked() {
            return Poll::Ready(Ok(()));
        }
        read
    }
}

impl AsyncWrite for Guard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_own_continue(buf) {
            return Poll::Ready(Ok(CONTINUE.len()));
        }
        ready!(self.poll_go_on(cx))?;
        let this = &mut *self;
        let wrote = Pin::new(this.inner.as_mut().ok_or_else(gone)?).poll_write(cx, buf);
        this.wrote(wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = bufs.iter().find(|buf| !buf.is_empty()).map_or(&[][..], |buf| buf);
        if self.is_own_continue(first) {
            return Poll::Ready(Ok(CONTINUE.len()));
        }
        ready!(self.poll_go_on(cx))?;
        let this = &mut *self;
        let wrote = Pin::new(this.inner.as_mut().ok_or_else(gone)?).poll_write_vectored(cx, bufs);
        this.wrote(wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.as_ref().is_some_and(Rewind::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(inner) = &mut self.inner else { return Poll::Ready(Ok(())) };
        let flushed = Pin::new(inner).poll_flush(cx);
        self.writing = flushed.is_pending();
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some(inner) = &mut this.inner else { return Poll::Ready(Ok(())) };
        if this.linger.is_none() {
            ready!(Pin::new(&mut *inner).poll_shutdown(cx))?;
            if !this.refused {
                return Poll::Ready(Ok(()));
            }
        }
        let linger = this.linger.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        if linger.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let mut dropped = ReadBuf::new(scratch);
            loop {
                dropped.clear();
                // However it ends, it is over.
                match ready!(Pin::new(&mut *inner).poll_read(cx, &mut dropped)) {
                    Ok(()) if !dropped.filled().is_empty() => {}
                    _ => return Poll::Ready(Ok(())),
                }
            }
        })
    }
}
