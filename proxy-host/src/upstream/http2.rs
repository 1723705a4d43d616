//! Requests over HTTP/2, by the crate `h2` alone: a request costs no task and no channel of its own, as it does with
//! hyper's client on top.

use std::{
    error::Error as _,
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, ready},
};

use ::http::{HeaderMap, HeaderValue, Method, Request, Response, header::CONTENT_LENGTH};
use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    client::{Builder, Connection, ResponseFuture, SendRequest},
};
use http_body::{Body as _, Frame, SizeHint};

use super::connect::Stream;
use crate::{
    body::{BodyError, RequestBody},
    exec,
};

/// Bytes that a server may send on a connection, and on a stream of it, before they are read: hyper's own.
const CONNECTION_WINDOW: u32 = 5 << 20;
const STREAM_WINDOW: u32 = 2 << 20;
/// Bytes of an answer's headers.
const MAX_HEADER_LIST: u32 = 16 << 10;
/// Bytes of a request's body that wait for a connection to take them.
const MAX_SEND_BUFFER: usize = 1 << 20;

/// Opens a connection; what is returned beside its sender is to be run until it ends, which is when nobody has a sender
/// or a stream any more, or when the server has closed it.
///
/// # Errors
/// The connection is broken already.
pub async fn handshake(stream: Stream) -> Result<(SendRequest<Bytes>, Connection<Stream>), h2::Error> {
    let mut builder = Builder::new();
    builder
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_window_size(STREAM_WINDOW)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_send_buffer_size(MAX_SEND_BUFFER)
        .enable_push(false);
    builder.handshake(stream).await
}

/// Sends a request and waits for the answer's head. A sender that was not ready just before is no good.
///
/// # Errors
/// The stream or its connection ended, or the request is none in HTTP/2. Where this is dropped, the stream is reset.
pub async fn send(
    sender: &mut SendRequest<Bytes>,
    request: Request<RequestBody>,
) -> Result<Response<Received>, h2::Error> {
    let (mut response, unsent) = begin(sender, request)?;
    let answered = match unsent {
        None => response.await?,
        Some((body, stream)) => {
            // Rarer, and its state must not weigh on each request.
            let (answered, sending) = Box::pin(with_body(sender, &mut response, body, stream)).await?;
            if let Some(sending) = sending {
                exec::spawn(sending);
            }
            answered
        }
    };
    let (head, stream) = answered.into_parts();
    let body = Received::new(stream, &head.headers);
    Ok(Response::from_parts(head, body))
}

/// A body that is still to be sent, and where.
type Unsent = (RequestBody, SendStream<Bytes>);

/// Sends the head.
fn begin(
    sender: &mut SendRequest<Bytes>,
    request: Request<RequestBody>,
) -> Result<(ResponseFuture, Option<Unsent>), h2::Error> {
    let (mut head, body) = request.into_parts();
    prepare(&mut head.headers, &head.method, &body);
    let end = body.is_end_stream();
    let (response, stream) = sender.send_request(Request::from_parts(head, ()), end)?;
    Ok((response, (!end).then_some((body, stream))))
}

/// What goes on sending a body.
type Sending = Pin<Box<dyn Future<Output = ()>>>;

/// Sends the body until there is an answer, and says what is left of that.
async fn with_body(
    sender: &mut SendRequest<Bytes>,
    response: &mut ResponseFuture,
    body: RequestBody,
    stream: SendStream<Bytes>,
) -> Result<(Response<RecvStream>, Option<Sending>), h2::Error> {
    // The server may have as many streams as it wants, and then this one waits for its turn.
    poll_fn(|cx| sender.poll_ready(cx)).await?;
    let mut sending: Option<Sending> = Some(Box::pin(pass(body, stream)));
    let answered = poll_fn(|cx| {
        if sending.as_mut().is_some_and(|sending| sending.as_mut().poll(cx).is_ready()) {
            sending = None;
        }
        Pin::new(&mut *response).poll(cx)
    });
    let answered = answered.await?;
    Ok((answered, sending))
}

/// Says how long the body is, where that is known and is of interest.
fn prepare(headers: &mut HeaderMap, method: &Method, body: &RequestBody) {
    if let Some(length) = body.size_hint().exact()
        && (length != 0 || !matches!(*method, Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT))
    {
        headers.entry(CONTENT_LENGTH).or_insert_with(|| HeaderValue::from(length));
    }
}

/// Passes a body on, until it ends or the server has had enough of it.
async fn pass(mut body: RequestBody, mut stream: SendStream<Bytes>) {
    loop {
        let next = poll_fn(|cx| {
            if stream.poll_reset(cx).is_ready() {
                return Poll::Ready(None);
            }
            Pin::new(&mut body).poll_frame(cx).map(Some)
        });
        let frame = match next.await {
            None => return,
            Some(None) => {
                // Where it cannot be sent, whoever waits for the answer is told why.
                let _ = stream.send_data(Bytes::new(), true);
                return;
            }
            Some(Some(Err(error))) => return stream.send_reset(reason(&error)),
            Some(Some(Ok(frame))) => frame,
        };
        match frame.into_data() {
            Ok(data) => {
                let end = body.is_end_stream();
                if !data.is_empty() && !has_room(&mut stream).await || stream.send_data(data, end).is_err() || end {
                    return;
                }
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    stream.reserve_capacity(0);
                    let _ = stream.send_trailers(trailers);
                    return;
                }
            }
        }
    }
}

/// Waits until the server takes more. Only then is there a claim on what the connection may carry: other streams wait
/// for that, too.
async fn has_room(stream: &mut SendStream<Bytes>) -> bool {
    stream.reserve_capacity(1);
    poll_fn(|cx| {
        while stream.capacity() == 0 {
            if stream.poll_reset(cx).is_ready() {
                return Poll::Ready(false);
            }
            match ready!(stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(false),
            }
        }
        Poll::Ready(true)
    })
    .await
}

/// What a server is told of a body that broke off: what the client said, where it said something.
fn reason(error: &BodyError) -> Reason {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(reason) = error.downcast_ref::<h2::Error>().and_then(h2::Error::reason) {
            return reason;
        }
        source = error.source();
    }
    Reason::INTERNAL_ERROR
}

/// The body of an answer.
#[derive(Debug)]
pub struct Received {
    stream: RecvStream,
    /// Bytes to come, where the server said how many.
    left: Option<u64>,
    /// What is left are trailers.
    data_done: bool,
}

impl Received {
    /// Of an answer with these headers.
    fn new(stream: RecvStream, headers: &HeaderMap) -> Self {
        let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        Self { stream, left: length, data_done: false }
    }

    /// Data, then trailers.
    ///
    /// # Errors
    /// The stream or its connection ended before the body did.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        // A server may say that it wants no more of the request, by a reset without an error: all of the answer is here.
        let ended = |error: h2::Error| (error.reason() != Some(Reason::NO_ERROR)).then_some(Err(error));
        if !self.data_done {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    // It fails only for a stream that is closed already.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(ended(error)),
                None => self.data_done = true,
            }
        }
        Poll::Ready(match ready!(self.stream.poll_trailers(cx)) {
            Ok(trailers) => trailers.map(|trailers| Ok(Frame::trailers(trailers))),
            Err(error) => ended(error),
        })
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    /// How much is left.
    #[must_use]
    pub fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
