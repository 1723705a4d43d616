//! A client's body that several attempts may read, or a copy of the request: kept up to a limit while it is passed on.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use ::http::HeaderMap;
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::{Notify, oneshot};

use crate::body::{BodyError, Received};

/// Bytes that are kept of a body (Envoy's buffer limit); a longer one goes through, but only once.
const LIMIT: usize = 1 << 20;

/// A body that is read once from the client and any number of times from here.
#[derive(Debug)]
pub struct Held {
    source: RefCell<Incoming>,
    received: Rc<Received>,
    kept: RefCell<Vec<Kept>>,
    bytes: Cell<usize>,
    /// What is the case after the last of `kept`.
    state: Cell<State>,
    /// Too long to be kept.
    over: Cell<bool>,
    /// The attempt that may read from the client.
    attempt: Cell<u32>,
    waiting: RefCell<Option<Waker>>,
    ended: Notify,
    copies: RefCell<Vec<oneshot::Sender<Copy>>>,
}

#[derive(Debug, Clone)]
enum Kept {
    Data(Bytes),
    Trailers(HeaderMap),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    More,
    End,
    Failed,
}

/// A body that is known as a whole.
#[derive(Debug, Default)]
pub struct Copy(VecDeque<Kept>);

impl Copy {
    /// The next part.
    pub fn take(&mut self) -> Option<Frame<Bytes>> {
        self.0.pop_front().map(Kept::frame)
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How much is left.
    #[must_use]
    pub fn size_hint(&self) -> SizeHint {
        let mut length = 0;
        for kept in &self.0 {
            match kept {
                Kept::Data(data) => length += data.len() as u64,
                Kept::Trailers(_) => return SizeHint::default(),
            }
        }
        SizeHint::with_exact(length)
    }
}

impl Kept {
    fn frame(self) -> Frame<Bytes> {
        match self {
            Self::Data(data) => Frame::data(data),
            Self::Trailers(trailers) => Frame::trailers(trailers),
        }
    }
}

/// One attempt's view of the body.
#[derive(Debug)]
pub struct Reader {
    held: Rc<Held>,
    attempt: u32,
    next: usize,
}

impl Held {
    /// Counts into `received`.
    #[must_use]
    pub fn new(source: Incoming, received: Rc<Received>) -> Rc<Self> {
        let state = if source.is_end_stream() { State::End } else { State::More };
        if state == State::End {
            received.end();
        }
        Rc::new(Self {
            source: RefCell::new(source),
            received,
            kept: RefCell::default(),
            bytes: Cell::new(0),
            state: Cell::new(state),
            over: Cell::new(false),
            attempt: Cell::new(0),
            waiting: RefCell::default(),
            ended: Notify::new(),
            copies: RefCell::default(),
        })
    }

    /// For a new attempt; earlier readers read no more.
    #[must_use]
    pub fn read(self: &Rc<Self>) -> Reader {
        self.attempt.set(self.attempt.get() + 1);
        if let Some(waker) = self.waiting.borrow_mut().take() {
            waker.wake();
        }
        Reader { held: self.clone(), attempt: self.attempt.get(), next: 0 }
    }

    /// Whether all that came so far can be read again.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        !self.over.get() && self.state.get() != State::Failed
    }

    /// Gives a copy of the whole body once it is through, and none where it is too long or does not get there.
    #[must_use]
    pub fn copy(&self) -> oneshot::Receiver<Copy> {
        let (sender, copy) = oneshot::channel();
        self.copies.borrow_mut().push(sender);
        if self.state.get() != State::More {
            self.end(self.state.get());
        }
        copy
    }

    /// Waits for the end of the client's body, or for ever where it fails.
    pub async fn ended(&self) {
        loop {
            let told = self.ended.notified();
            if self.state.get() == State::End {
                return;
            }
            told.await;
        }
    }

    fn end(&self, state: State) {
        self.state.set(state);
        if state == State::End {
            self.received.end();
        }
        self.ended.notify_waiters();
        for copy in self.copies.take() {
            if state == State::End && !self.over.get() {
                // Whoever wanted it may not want it any more.
                let _ = copy.send(Copy(self.kept.borrow().iter().cloned().collect()));
            }
        }
    }

    fn keep(&self, frame: &Frame<Bytes>) -> bool {
        if let Some(data) = frame.data_ref() {
            self.received.add(data.len() as u64);
            self.bytes.set(self.bytes.get() + data.len());
        }
        if self.bytes.get() > LIMIT {
            self.over.set(true);
            self.kept.borrow_mut().clear();
        }
        if self.over.get() {
            return false;
        }
        let kept = match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) => Kept::Data(data.clone()),
            (_, Some(trailers)) => Kept::Trailers(trailers.clone()),
            _ => return false,
        };
        self.kept.borrow_mut().push(kept);
        true
    }
}

impl Reader {
    /// The next part of the body.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let held = &self.held;
        if self.attempt != held.attempt.get() {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        if let Some(kept) = held.kept.borrow().get(self.next) {
            self.next += 1;
            return Poll::Ready(Some(Ok(kept.clone().frame())));
        }
        match held.state.get() {
            State::End => return Poll::Ready(None),
            State::Failed => return Poll::Ready(Some(Err(BodyError::Incomplete))),
            State::More => {}
        }
        *held.waiting.borrow_mut() = Some(cx.waker().clone());
        let mut source = held.source.borrow_mut();
        match ready!(Pin::new(&mut *source).poll_frame(cx)) {
            None => {
                held.end(State::End);
                Poll::Ready(None)
            }
            Some(Err(error)) => {
                held.end(State::Failed);
                Poll::Ready(Some(Err(error.into())))
            }
            Some(Ok(frame)) => {
                if held.keep(&frame) {
                    self.next += 1;
                }
                if source.is_end_stream() {
                    held.end(State::End);
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    /// What is known of the body.
    #[must_use]
    pub fn received(&self) -> &Rc<Received> {
        &self.held.received
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_end_stream(&self) -> bool {
        self.held.state.get() == State::End && self.next >= self.held.kept.borrow().len()
    }

    /// How much is left.
    #[must_use]
    pub fn size_hint(&self) -> SizeHint {
        let source = self.held.source.borrow().size_hint();
        let kept = self.held.kept.borrow();
        let left = kept.iter().skip(self.next).map(|kept| match kept {
            Kept::Data(data) => data.len() as u64,
            Kept::Trailers(_) => 0,
        });
        let left: u64 = left.sum();
        // Of a source that has ended nothing is left, whatever it said at first.
        match source.exact() {
            Some(rest) if self.held.state.get() == State::More => SizeHint::with_exact(left + rest),
            _ if self.held.state.get() == State::End && kept.iter().all(|k| matches!(k, Kept::Data(_))) => {
                SizeHint::with_exact(left)
            }
            _ => SizeHint::default(),
        }
    }
}
