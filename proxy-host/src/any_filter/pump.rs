//! Bodies and trailers past a filter's callbacks for them.

use std::{rc::Rc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::Frame;
use tokio::{
    sync::{Notify, watch},
    task::AbortHandle,
};

use super::{
    attributes::Info,
    body::{Broken, Piece, Sink, Source},
    client::Lease,
    host::{Abort, Step, Stream},
};
use crate::idle;
use crate::vm::{HttpState, MapType, StreamType};

/// A body that a filter holds back may be this large (Envoy's `per_connection_buffer_limit_bytes`).
pub const LIMIT: usize = 1 << 20;

/// Envoy's response flag `SI`.
const STREAM_IDLE: i64 = 0x1_0000;

/// Ends a task when the request ends.
pub struct Pump(pub AbortHandle);

impl Drop for Pump {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Notes the gRPC status that headers or trailers hold.
pub fn note_grpc(info: &Info, headers: &HeaderMap) {
    if let Some(status) = headers.get("grpc-status").and_then(|value| value.to_str().ok()?.parse().ok()) {
        info.grpc_status.set(Some(status));
    }
}

/// Carries a request's body to the upstream.
pub async fn request_body(stream: Rc<Stream>, mut source: Source, sink: Sink, complete: watch::Sender<bool>) {
    match carry(&stream, StreamType::Request, &mut source, &sink).await {
        Ok(()) => {
            complete.send_replace(true);
        }
        Err(Ended::Abort(abort)) => stream.abort(abort),
        // The client broke off: hyper ends the request as well.
        Err(Ended::Broken | Ended::Silent) => {
            let _ = sink.send(Err(Broken)).await;
        }
        // The upstream wants no more of it.
        Err(Ended::Closed) => {}
    }
}

/// Silence that ends a response.
pub struct Silence {
    /// How long; zero for no limit.
    pub time: Duration,
    /// Ends the client's stream, or in HTTP/1.1 its connection, where the client reads nothing.
    pub end: Option<Rc<Notify>>,
}

/// Carries a response's body to the client, and holds what the response needs until its end.
pub async fn response_body(
    stream: Rc<Stream>,
    mut source: Source,
    sink: Sink,
    lease: Option<Lease>,
    pump: Option<Pump>,
    silence: Silence,
) {
    let carried = tokio::select! {
        biased;
        _ = stream.aborted() => Err(Ended::Broken),
        () = sink.closed() => Err(Ended::Closed),
        () = idle::quiet(silence.time, || Some(stream.info.moved.get())) => {
            stream.info.flag(STREAM_IDLE);
            stream.info.details.replace("stream_idle_timeout".into());
            Err(Ended::Silent)
        }
        carried = carry(&stream, StreamType::Response, &mut source, &sink) => carried,
    };
    drop(pump);
    if !matches!(carried, Err(Ended::Closed)) {
        stream.info.settle();
    }
    match carried {
        Ok(()) => {
            if let Some(lease) = lease {
                lease.finish();
            }
        }
        Err(Ended::Closed) => {}
        // The headers have left: all that can be done is to reset the stream.
        Err(Ended::Abort(_) | Ended::Broken) => {
            let _ = sink.send(Err(Broken)).await;
        }
        Err(Ended::Silent) => {
            let told = async {
                // Where it cannot be told, it is gone.
                let _ = sink.send(Err(Broken)).await;
                sink.closed().await;
            };
            // While a client does not read, nobody takes what is told.
            if tokio::time::timeout(silence.time / 4, told).await.is_err()
                && let Some(end) = silence.end
            {
                end.notify_one();
            }
        }
    }
}

/// Why a body did not come to its end.
enum Ended {
    /// The filter ended it.
    Abort(Abort),
    /// Its source broke off.
    Broken,
    /// Nothing has moved for too long.
    Silent,
    /// Nobody takes it any more.
    Closed,
}

/// Carries a body and its trailers past the filter's callbacks for them.
async fn carry(stream: &Stream, direction: StreamType, source: &mut Source, sink: &Sink) -> Result<(), Ended> {
    let is_request = direction == StreamType::Request;
    let (wants_body, wants_trailers) = match is_request {
        true => (stream.wants.request_body, stream.wants.request_trailers),
        false => (stream.wants.response_body, stream.wants.response_trailers),
    };
    let mut held = false;
    loop {
        let piece = tokio::select! {
            biased;
            () = stream.continued(direction), if held => {
                held = false;
                flush(stream, is_request, sink).await?;
                continue;
            }
            piece = source.next() => piece,
        };
        match piece {
            Piece::Broken => return Err(Ended::Broken),
            Piece::Data(data, end) => {
                if is_request {
                    stream.info.count_request(data.len())
                } else {
                    stream.info.count_response(data.len())
                }
                if !wants_body {
                    send(sink, data).await?;
                    if end {
                        return Ok(());
                    }
                    continue;
                }
                let step = show_body(stream, is_request, data, end);
                held = match step {
                    Step::Go => false,
                    Step::Abort(abort) => return Err(Ended::Abort(abort)),
                    Step::Wait if length(stream, is_request) > LIMIT => return Err(Ended::Abort(Abort::TooLarge)),
                    Step::Wait if end => {
                        stream.continued(direction).await;
                        false
                    }
                    Step::Wait => true,
                };
                if !held {
                    flush(stream, is_request, sink).await?;
                }
                if end {
                    // The filter may have added some with the last bytes.
                    let trailers = take_trailers(stream, is_request);
                    return if trailers.is_empty() {
                        Ok(())
                    } else {
                        send_trailers(stream, is_request, sink, trailers).await
                    };
                }
            }
            Piece::Trailers(trailers) => {
                let trailers =
                    if wants_trailers { show_trailers(stream, direction, trailers).await? } else { trailers };
                flush(stream, is_request, sink).await?;
                return send_trailers(stream, is_request, sink, trailers).await;
            }
        }
    }
}

fn trailers_of(is_request: bool) -> MapType {
    if is_request { MapType::RequestTrailers } else { MapType::ResponseTrailers }
}

/// Shows the filter the bytes that it holds back together with these.
fn show_body(stream: &Stream, is_request: bool, data: Bytes, end: bool) -> Step {
    stream.http(|http| {
        let held = if is_request { &mut http.request_body } else { &mut http.response_body };
        if held.is_empty() {
            *held = data;
        } else if !data.is_empty() {
            let before = std::mem::take(held);
            // Grows in place where nobody else holds the bytes.
            let mut joined = before.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
            joined.extend_from_slice(&data);
            *held = joined.freeze();
        }
        http.shown.set(trailers_of(is_request), end);
    });
    if is_request {
        stream.pausing(StreamType::Request);
        stream.call(|vm, context| vm.on_request_body(context, end))
    } else {
        stream.pausing(StreamType::Response);
        stream.call(|vm, context| vm.on_response_body(context, end))
    }
}

async fn show_trailers(stream: &Stream, direction: StreamType, trailers: HeaderMap) -> Result<HeaderMap, Ended> {
    let is_request = direction == StreamType::Request;
    stream.http(|http| {
        let slot = if is_request { &mut http.request_trailers } else { &mut http.response_trailers };
        *slot = trailers;
        http.shown.set(trailers_of(is_request), true);
    });
    stream.pausing(direction);
    let step = if is_request {
        stream.call(|vm, context| vm.on_request_trailers(context))
    } else {
        stream.call(|vm, context| vm.on_response_trailers(context))
    };
    match step {
        Step::Go => {}
        Step::Wait => stream.continued(direction).await,
        Step::Abort(abort) => return Err(Ended::Abort(abort)),
    }
    Ok(take_trailers(stream, is_request))
}

fn take_trailers(stream: &Stream, is_request: bool) -> HeaderMap {
    let take = stream.http(|http| {
        http.shown.set(trailers_of(is_request), false);
        std::mem::take(if is_request { &mut http.request_trailers } else { &mut http.response_trailers })
    });
    take.unwrap_or_default()
}

fn length(stream: &Stream, is_request: bool) -> usize {
    stream.http(|http| if is_request { http.request_body.len() } else { http.response_body.len() }).unwrap_or(0)
}

/// Sends on what the filter held back.
async fn flush(stream: &Stream, is_request: bool, sink: &Sink) -> Result<(), Ended> {
    let take = |http: &mut HttpState| {
        std::mem::take(if is_request { &mut http.request_body } else { &mut http.response_body })
    };
    // Where the VM is gone, so are the bytes: the stream fails.
    let data = stream.http(take).ok_or(Ended::Abort(Abort::Failed))?;
    send(sink, data).await
}

async fn send(sink: &Sink, data: Bytes) -> Result<(), Ended> {
    if data.is_empty() {
        return Ok(());
    }
    sink.send(Ok(Frame::data(data))).await.map_err(|_| Ended::Closed)
}

async fn send_trailers(stream: &Stream, is_request: bool, sink: &Sink, trailers: HeaderMap) -> Result<(), Ended> {
    if !is_request {
        note_grpc(&stream.info, &trailers);
        stream.keep_trailers(&trailers);
    }
    sink.send(Ok(Frame::trailers(trailers))).await.map_err(|_| Ended::Closed)
}
