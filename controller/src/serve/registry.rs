//! `portolan.v1.Registry`: pages, and then their changes. One update is under way at a time; while it waits for its
//! acknowledgement, later ones gather into the next.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use portolan_proto::v1::{self, Page, WatchRequest, WatchResponse, registry_server::Registry, watch_request};
use portolan_registry::page::FORMAT;
use portolan_registry::write::PageId;
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::peer::{self, Peer};
use super::sessions::{Listed, Session};
use super::{Counters, Open};
use crate::publish::{Published, Publisher};

/// Bytes of pages in one message, so that no subscriber has much to do at a time.
const PART: usize = 128 * 1024;

/// How long a subscriber may take to answer an update before its stream is ended, so that it starts anew.
const ANSWER: Duration = Duration::from_secs(30);

pub(super) struct Service {
    publisher: Publisher,
    counters: Arc<Counters>,
}

impl Service {
    pub(super) fn new(publisher: Publisher, counters: Arc<Counters>) -> Self {
        Service { publisher, counters }
    }
}

#[tonic::async_trait]
impl Registry for Service {
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(&self, request: Request<Streaming<WatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        let (responses, stream) = mpsc::channel(4);
        let (publisher, counters) = (self.publisher.clone(), self.counters.clone());
        tokio::spawn(async move {
            let _open = Open::new(counters.clone(), |c| &c.subscribers);
            let failed = responses.clone();
            let peer = peer::of(&request);
            if let Err(status) = serve(request.into_inner(), peer, publisher, counters, responses).await {
                let _ = failed.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Pages that a subscriber has.
#[derive(Clone)]
enum Held {
    /// By its own account: digests by id.
    Stated(BTreeMap<PageId, u64>),
    /// What was sent to it.
    Published(Arc<Published>),
}

impl Held {
    fn digest(&self, id: PageId) -> Option<u64> {
        match self {
            Held::Stated(pages) => pages.get(&id).copied(),
            Held::Published(published) => published.page_digest(id),
        }
    }

    fn ids(&self) -> Vec<PageId> {
        match self {
            Held::Stated(pages) => pages.keys().copied().collect(),
            Held::Published(published) => published.pages.iter().map(|p| p.id).collect(),
        }
    }
}

struct Subscriber {
    name: String,
    /// What it holds for certain.
    held: Held,
    /// The update that it has not answered, and what it will hold then.
    sent: Option<(u64, Held)>,
    /// Until when it has to.
    deadline: Instant,
    /// Pages of refused updates, of which nobody knows whether it kept them. While there are any, the next update is whole.
    doubtful: Option<BTreeSet<PageId>>,
    /// The last version that was sent or needed no sending.
    version: u64,
}

async fn serve(
    mut requests: Streaming<WatchRequest>,
    peer: Option<Peer>,
    publisher: Publisher,
    counters: Arc<Counters>,
    responses: mpsc::Sender<Result<WatchResponse, Status>>,
) -> Result<(), Status> {
    let Some(first) = requests.message().await? else { return Ok(()) };
    let Some(watch_request::Message::Subscribe(subscribe)) = first.message else {
        return Err(Status::invalid_argument("the first message of a stream is Subscribe"));
    };
    if subscribe.format != u32::from(FORMAT) {
        let message = format!("format {}, expected {FORMAT}", subscribe.format);
        return Err(Status::failed_precondition(message));
    }
    let held = read_held(&subscribe.held)?;
    let scope = super::scope(subscribe.scope.unwrap_or_default());
    peer::agree(peer.as_ref(), &scope.namespace).inspect_err(|_| Counters::add(&counters.denied, 1))?;
    let session = Session::new("registry", &subscribe.subscriber, peer.as_ref(), &scope);
    let session = Listed::new(&counters, session);
    let ended = |_| Status::unavailable("the compiler has ended");
    let mut published = publisher.subscribe(scope).await.map_err(ended)?;
    let mut subscriber = Subscriber {
        name: subscribe.subscriber,
        held,
        sent: None,
        deadline: Instant::now(),
        doubtful: None,
        version: subscribe.version,
    };
    let current = published.borrow_and_update().clone();
    let pages = subscriber.held.ids().len();
    tracing::info!(subscriber = subscriber.name, held = pages, version = subscribe.version, "subscribed");
    send(&mut subscriber, &current, true, &counters, &responses).await?;
    loop {
        tokio::select! {
            message = requests.next() => match message {
                None => return Ok(()),
                Some(message) => answered(&mut subscriber, message?, &counters, &session),
            },
            changed = wait(&mut published, subscriber.sent.is_none()) => changed?,
            () = sleep_until(subscriber.deadline), if subscriber.sent.is_some() => {
                let (subscriber, version) = (&subscriber.name, subscriber.version);
                tracing::warn!(subscriber, version, "the update was not answered in time; the stream is ended");
                return Err(Status::deadline_exceeded(format!("update {version} was not answered in {ANSWER:?}")));
            }
        }
        if subscriber.sent.is_none() {
            let current = published.borrow_and_update().clone();
            if current.version > subscriber.version {
                send(&mut subscriber, &current, false, &counters, &responses).await?;
            }
        }
    }
}

/// Waits for the next version, unless an answer has to come first.
async fn wait(published: &mut watch::Receiver<Arc<Published>>, ready: bool) -> Result<(), Status> {
    if !ready {
        return std::future::pending().await;
    }
    published.changed().await.map_err(|_| Status::unavailable("the compiler has ended"))
}

fn answered(subscriber: &mut Subscriber, message: WatchRequest, counters: &Counters, session: &Listed) {
    let name = &subscriber.name;
    match message.message {
        Some(watch_request::Message::Ack(v1::Ack { version })) => {
            if let Some((_, held)) = subscriber.sent.take_if(|(sent, _)| *sent == version) {
                subscriber.held = held;
                subscriber.doubtful = None;
                session.note(|s| s.version = version);
                tracing::debug!(subscriber = name, version, "acknowledged");
            }
        }
        Some(watch_request::Message::Nack(v1::Nack { version, reason })) => {
            if let Some((_, held)) = subscriber.sent.take_if(|(sent, _)| *sent == version) {
                Counters::add(&counters.nacks, 1);
                subscriber.doubtful.get_or_insert_default().extend(held.ids());
                session.note(|s| s.refused = Some(format!("version {version}: {reason}")));
                tracing::warn!(subscriber = name, version, reason, "refused: the last good update stays in force");
            }
        }
        Some(watch_request::Message::Subscribe(_)) | None => {
            tracing::warn!(subscriber = name, "message out of turn ignored");
        }
    }
}

/// Sends what the subscriber lacks. Without any difference nothing is sent, but the first answer to a subscription.
async fn send(
    subscriber: &mut Subscriber,
    current: &Arc<Published>,
    first: bool,
    counters: &Counters,
    responses: &mpsc::Sender<Result<WatchResponse, Status>>,
) -> Result<(), Status> {
    subscriber.version = current.version;
    let whole = subscriber.doubtful.is_some();
    let lacks = current.pages.iter().filter(|p| whole || subscriber.held.digest(p.id) != Some(p.digest));
    let mut known: BTreeSet<PageId> = subscriber.held.ids().into_iter().collect();
    known.extend(subscriber.doubtful.iter().flatten());
    let removed = known.into_iter().filter(|id| current.page_digest(*id).is_none()).collect();

    let version = current.version;
    let blank = || WatchResponse { version, ..WatchResponse::default() };
    let mut parts = vec![WatchResponse { removed, ..blank() }];
    let (mut size, mut pages) = (0, 0);
    for page in lacks {
        if size + page.data.len() > PART && size > 0 {
            parts.push(blank());
            size = 0;
        }
        size += page.data.len();
        pages += 1;
        if let Some(part) = parts.last_mut() {
            part.pages.push(Page { id: page.id, data: page.data.to_vec() });
        }
    }
    let nothing = pages == 0 && parts.iter().all(|p| p.removed.is_empty());
    if nothing && !first {
        return Ok(());
    }
    if let Some(last) = parts.last_mut() {
        last.last = true;
        last.digest = current.digest;
    }
    let bytes: usize = parts.iter().map(Message::encoded_len).sum();
    Counters::add(&counters.updates, 1);
    Counters::add(&counters.pages, pages);
    Counters::add(&counters.bytes, bytes);
    tracing::info!(subscriber = subscriber.name, version, pages, bytes, parts = parts.len(), whole, "update sent");
    subscriber.sent = Some((version, Held::Published(current.clone())));
    for part in parts {
        // One that reads nothing would block this as well.
        let sent = timeout(ANSWER, responses.send(Ok(part))).await;
        let sent = sent.map_err(|_| Status::deadline_exceeded("the subscriber does not read"))?;
        sent.map_err(|_| Status::cancelled("the subscriber has gone"))?;
    }
    subscriber.deadline = Instant::now() + ANSWER;
    Ok(())
}

fn read_held(bytes: &[u8]) -> Result<Held, Status> {
    let (entries, rest) = bytes.as_chunks::<12>();
    if !rest.is_empty() {
        return Err(Status::invalid_argument("held is 12 bytes for each page"));
    }
    let entry =
        |[a, b, c, d, digest @ ..]: &[u8; 12]| (u32::from_le_bytes([*a, *b, *c, *d]), u64::from_le_bytes(*digest));
    Ok(Held::Stated(entries.iter().map(entry).collect()))
}
