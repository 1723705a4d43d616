//! `portolan.v1.Registry`: pages, and then their changes. One update is under way at a time; while it waits for its
//! acknowledgement, later ones gather into the next. Of an update only so many parts are on their way as the subscriber
//! wants to find at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use portolan_proto::v1::{self, WatchRequest, WatchResponse, registry_server::Registry, watch_request};
use portolan_registry::page::FORMAT;
use portolan_registry::write::PageId;
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::parts::Parts;
use super::peer::{self, Peer};
use super::sessions::{Listed, Session};
use super::{Counters, Open};
use crate::publish::{self, Published, Publisher};

/// How long a subscriber may take to answer a part of an update, or all of it, before its stream is ended, so that it
/// starts anew.
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
    /// Ids and digests by ascending id.
    fn pages(&self) -> impl Iterator<Item = (PageId, u64)> {
        let (stated, published) = match self {
            Held::Stated(pages) => (Some(pages), None),
            Held::Published(published) => (None, Some(published)),
        };
        let stated = stated.into_iter().flatten().map(|(id, digest)| (*id, *digest));
        stated.chain(published.into_iter().flat_map(|published| &published.pages).map(|page| (page.id, page.digest)))
    }
}

impl Subscriber {
    /// May a part be sent?
    fn may_send(&self) -> bool {
        !self.parts.is_empty() && (self.window == 0 || self.under_way < self.window)
    }

    /// Time is given anew: something was sent, or answered.
    fn wait(&mut self) {
        self.deadline = Instant::now() + ANSWER;
    }
}

struct Subscriber {
    name: String,
    /// What it holds for certain.
    held: Held,
    /// The update that it has not answered, and what it will hold then.
    sent: Option<(u64, Held)>,
    /// What of that update was not sent yet.
    parts: Parts,
    /// How many parts may be on their way at a time; 0: any number.
    window: usize,
    /// How many are.
    under_way: usize,
    /// Until when it has to answer.
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
        parts: Parts::default(),
        window: subscribe.window as usize,
        under_way: 0,
        deadline: Instant::now(),
        doubtful: None,
        version: subscribe.version,
    };
    let current = published.borrow_and_update().clone();
    let pages = subscriber.held.pages().count();
    tracing::info!(subscriber = subscriber.name, held = pages, version = subscribe.version, "subscribed");
    begin(&mut subscriber, &current, true, &counters);
    loop {
        tokio::select! {
            room = responses.reserve(), if subscriber.may_send() => {
                let room = room.map_err(|_| Status::cancelled("the subscriber has gone"))?;
                if let Some(part) = subscriber.parts.next() {
                    Counters::add(&counters.bytes, part.encoded_len());
                    subscriber.under_way += 1;
                    subscriber.wait();
                    room.send(Ok(part));
                }
            }
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
                begin(&mut subscriber, &current, false, &counters);
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
        Some(watch_request::Message::Ack(v1::Ack { version })) if subscriber.parts.is_empty() => {
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
                // Nobody needs the rest of it.
                subscriber.parts = Parts::default();
                subscriber.doubtful.get_or_insert_default().extend(held.pages().map(|(id, _)| id));
                session.note(|s| s.refused = Some(format!("version {version}: {reason}")));
                tracing::warn!(subscriber = name, version, reason, "refused: the last good update stays in force");
            }
        }
        Some(watch_request::Message::Taken(v1::Taken { version })) => {
            if subscriber.sent.as_ref().is_some_and(|(sent, _)| *sent == version) {
                subscriber.under_way = subscriber.under_way.saturating_sub(1);
                subscriber.wait();
            }
        }
        Some(watch_request::Message::Subscribe(_) | watch_request::Message::Ack(_)) | None => {
            tracing::warn!(subscriber = name, "message out of turn ignored");
        }
    }
}

/// Begins an update with what the subscriber lacks. Without any difference there is none, but for the first answer to a
/// subscription.
fn begin(subscriber: &mut Subscriber, current: &Arc<Published>, first: bool, counters: &Counters) {
    subscriber.version = current.version;
    let whole = subscriber.doubtful.is_some();
    let (pages, removed) = if whole {
        let mut known: BTreeSet<PageId> = subscriber.held.pages().map(|(id, _)| id).collect();
        known.extend(subscriber.doubtful.iter().flatten());
        let gone = known.into_iter().filter(|id| current.page_digest(*id).is_none());
        ((0..).zip(&current.pages).map(|(at, _)| at).collect(), gone.collect())
    } else {
        differences(subscriber.held.pages(), &current.pages)
    };
    if pages.is_empty() && removed.is_empty() && !first {
        return;
    }
    let (version, count) = (current.version, pages.len());
    Counters::add(&counters.updates, 1);
    Counters::add(&counters.pages, count);
    tracing::info!(subscriber = subscriber.name, version, pages = count, removed = removed.len(), whole, "update");
    subscriber.sent = Some((version, Held::Published(current.clone())));
    subscriber.parts = Parts::new(current.clone(), removed, pages);
    subscriber.under_way = 0;
    subscriber.wait();
}

/// What somebody who holds these pages lacks, by its place, and what goes. Both sides are in order, so that each page is
/// looked at once: this is done for every subscriber and change.
fn differences(held: impl Iterator<Item = (PageId, u64)>, current: &[publish::Page]) -> (VecDeque<u32>, Vec<PageId>) {
    let mut held = held.peekable();
    let (mut lacking, mut removed) = (VecDeque::new(), Vec::new());
    for (at, page) in (0..).zip(current) {
        removed.extend(std::iter::from_fn(|| held.next_if(|(id, _)| *id < page.id)).map(|(id, _)| id));
        let has = held.next_if(|(id, _)| *id == page.id);
        if has.is_none_or(|(_, digest)| digest != page.digest) {
            lacking.push_back(at);
        }
    }
    removed.extend(held.map(|(id, _)| id));
    (lacking, removed)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_or_other_is_lacking_and_what_is_not_there_goes() {
        let page = |(id, digest)| publish::Page { id, data: [].into(), digest };
        let current: Vec<_> = [(1, 1), (2, 9), (4, 4), (7, 7)].map(page).into();
        let held = [(0, 0), (2, 2), (3, 3), (4, 4), (8, 8), (9, 9)];
        assert_eq!(differences(held.into_iter(), &current), ([0, 1, 3].into(), vec![0, 3, 8, 9]));
        assert_eq!(differences([].into_iter(), &current), ([0, 1, 2, 3].into(), vec![]));
        assert_eq!(differences([(5, 5)].into_iter(), &[]), ([].into(), vec![5]));
    }
}
