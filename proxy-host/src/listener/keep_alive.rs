//! A client's HTTP/1.1 connection from its first request to its end. One that waits for its next request is parked: its
//! reader, its buffers and its state are given back, and made anew when bytes come.

use std::{error::Error, pin::pin, rc::Rc, sync::Arc, task::Poll, time::Duration};

use ::http::{Request, Response};
use hyper::{
    body::{Body, Incoming},
    server::conn::http1,
    service::Service,
};
use hyper_util::rt::TokioIo;
use tokio::{sync::watch, time::Instant};

use super::{
    guard::{Control, End, Guard},
    rewind::Rewind,
    server::{self, HttpLimits},
};
use crate::exec;

/// How long a connection is left alone before it is looked at. It is short, so that many that come at once and then
/// wait never need their memory at the same time.
const FIRST: Duration = Duration::from_millis(100);
/// The longest time between two looks at a connection that is in use.
const LONGEST: Duration = Duration::from_millis(3200);
/// Looks in the time that a connection may be without requests.
const LOOKS: u32 = 8;

/// Serves the requests of a connection, as [`server::serve`].
pub(super) async fn serve<S, B>(
    mut client: Rewind,
    limits: HttpLimits,
    mut stop: watch::Receiver<bool>,
    control: Arc<Control>,
    service: S,
    look: impl Fn() -> Option<u64>,
) where
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Future: 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let service = Rc::new(service);
    let idle = limits.connection_idle;
    let most = if idle.is_zero() { LONGEST } else { LONGEST.min(idle / LOOKS) };
    let mut patience = FIRST;
    loop {
        let guard = Guard::new(client, control.clone(), limits);
        // In a box, which is given back with all else.
        let requests = requests(guard, stop.clone(), &control, &service, (idle, patience.min(most), most), &look);
        let served = if limits.stream_idle.is_zero() {
            Box::pin(requests).await
        } else {
            // A stream that is to end ends its connection.
            exec::endable(Box::pin(requests)).await.flatten()
        };
        let Some((parked, since)) = served else { return };
        client = parked;
        let begun = Instant::now();
        tokio::select! {
            biased;
            readable = client.stream().readable() => if readable.is_err() {
                return;
            },
            _ = stop.wait_for(|stop| *stop) => return,
            () = tokio::time::sleep_until(since + idle), if !idle.is_zero() => return,
        }
        // One that is parked all too often is left alone for longer.
        patience = if begun.elapsed() < LONGEST { LONGEST.min(patience * 2) } else { FIRST };
    }
}

/// Serves requests; gives the connection back where it waits for the next one, and since when.
async fn requests<S, B>(
    guard: Guard,
    mut stop: watch::Receiver<bool>,
    control: &Control,
    service: &Rc<S>,
    (idle, mut patience, most): (Duration, Duration, Duration),
    look: impl Fn() -> Option<u64>,
) -> Option<(Rewind, Instant)>
where
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Future: 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let serving = http1::Builder::new().serve_connection(TokioIo::new(guard), service.clone()).with_upgrades();
    let mut serving = pin!(serving);
    let (mut last, mut since) = (look(), Instant::now());
    let mut next = pin!(tokio::time::sleep_until(since + patience));
    let changed = stop.clone();
    let mut stopped = pin!(stop.wait_for(|stop| *stop));
    let mut asked = false;
    loop {
        let event = std::future::poll_fn(|cx| {
            // How a connection ends is told by its requests.
            if serving.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Event::Over);
            }
            // Once asked it wakes this task by itself; to ask each time would cost each request.
            if (!asked || changed.has_changed().unwrap_or(true)) && stopped.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Event::Stop);
            }
            asked = true;
            next.as_mut().poll(cx).map(|()| Event::Look)
        });
        match event.await {
            Event::Over => return control.take_parked().map(|parked| (parked, since)),
            Event::Stop => {
                control.ends(End::Stopped);
                serving.as_mut().graceful_shutdown();
                server::last(serving, false, look).await;
                return None;
            }
            Event::Look => {
                let now = look();
                if now.is_none() || now != last {
                    (last, since) = (now, Instant::now());
                }
                if now.is_some() {
                    control.park(true);
                    let over = std::future::poll_fn(|cx| Poll::Ready(serving.as_mut().poll(cx).is_ready())).await;
                    control.park(false);
                    if over {
                        return control.take_parked().map(|parked| (parked, since));
                    }
                    // What has begun to say something is not parked.
                    if !idle.is_zero() && since.elapsed() >= idle {
                        serving.as_mut().graceful_shutdown();
                        server::last(serving, true, look).await;
                        return None;
                    }
                }
                patience = most.min(patience * 2);
                next.as_mut().reset(Instant::now() + patience);
            }
        }
    }
}

enum Event {
    /// The connection has ended, or is parked.
    Over,
    /// The process is to end.
    Stop,
    /// It is time to see whether the connection waits.
    Look,
}
