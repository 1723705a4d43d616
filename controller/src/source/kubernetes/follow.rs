//! One kind, watched for as long as the source lives: listed, followed, and listed again when the API server has
//! forgotten where we were. An error is an event as well; the last good state stays until there is a better one.

use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::kinds::{Raw, Watched};
use super::status::Status;
use super::store::{self, Event, Read};

/// Resources that one page of a list has.
const PAGE: u32 = 500;
/// Seconds after which a watch is begun anew, so that a connection which died unnoticed is missed for no longer.
pub(super) const WATCH: u32 = 90;
/// A watch that did not fail for so long after an error goes on: longer than an attempt to connect takes.
pub(super) const SETTLED: Duration = Duration::from_secs(6);
/// How long to wait after the first and after many errors.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// The status code of an error that is the API server's answer.
pub(super) fn code(error: &watcher::Error) -> Option<u16> {
    use watcher::Error::{InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status))
        | WatchError(status) => Some(status.code),
        InitialListFailed(_) | WatchStartFailed(_) | WatchFailed(_) | NoResourceVersion => None,
    }
}

/// What the API server said, or what went wrong with asking it.
fn told(error: &watcher::Error) -> String {
    use watcher::Error::{InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status))
        | WatchError(status) => status.message.clone(),
        InitialListFailed(error) | WatchStartFailed(error) | WatchFailed(error) => error.to_string(),
        NoResourceVersion => error.to_string(),
    }
}

/// Says what happens to a kind until nobody listens any more.
pub(super) async fn follow(client: Client, watched: &'static Watched, events: mpsc::Sender<Event>, status: Status) {
    let mut follower =
        Follower { watched, events, status, version: 0, failing: false, listed: false, delay: BACKOFF.0 };
    while follower.watch(&client).await.is_some() {}
}

struct Follower {
    watched: &'static Watched,
    events: mpsc::Sender<Event>,
    status: Status,
    /// Which of the versions is asked for.
    version: usize,
    /// The last thing that happened was an error.
    failing: bool,
    /// There was a list, or it was said that there will be none.
    listed: bool,
    delay: Duration,
}

impl Follower {
    fn version(&self) -> &'static str {
        self.watched.versions.get(self.version).copied().unwrap_or("v1")
    }

    fn read(&self, raw: Raw) -> Option<Read> {
        let read = store::read(self.watched, self.version(), raw.value);
        if read.is_none() {
            tracing::warn!(kind = self.watched.name, "a resource without a name is passed over");
        }
        read
    }

    /// `None` when nobody listens any more.
    async fn send(&mut self, event: Event) -> Option<()> {
        self.events.send(event).await.ok()
    }

    fn well(&mut self) {
        self.status.event(self.watched.name);
        self.delay = BACKOFF.0;
        if std::mem::take(&mut self.failing) {
            tracing::info!(kind = self.watched.name, "watched again");
        }
    }

    /// Watches until the watch has to be begun from nothing.
    async fn watch(&mut self, client: &Client) -> Option<()> {
        let api: Api<Raw> = Api::all_with(client.clone(), &self.watched.resource(self.version()));
        let config = watcher::Config::default().timeout(WATCH).page_size(PAGE);
        let mut stream = pin!(watcher(api, config));
        let mut all = Vec::new();
        // There was a list, and what comes is what changes.
        let mut following = false;
        loop {
            let event = tokio::select! {
                event = stream.next() => event?,
                // A watch that goes on says nothing until something changes.
                () = sleep(SETTLED), if self.failing && following => {
                    self.well();
                    continue;
                }
                () = self.events.closed() => return None,
            };
            match event {
                Ok(watcher::Event::Init) => {
                    all.clear();
                    following = false;
                }
                Ok(watcher::Event::InitApply(raw)) => all.extend(self.read(raw)),
                Ok(watcher::Event::InitDone) => {
                    self.well();
                    let (kind, count) = (self.watched.name, all.len());
                    tracing::info!(kind, count, version = self.version(), "listed");
                    (self.listed, following) = (true, true);
                    self.send(Event::Listed(self.watched.kind, std::mem::take(&mut all))).await?;
                }
                Ok(watcher::Event::Apply(raw)) => {
                    self.well();
                    if let Some(read) = self.read(raw) {
                        self.send(Event::Applied(read)).await?;
                    }
                }
                Ok(watcher::Event::Delete(raw)) => {
                    self.well();
                    if let Some(key) = store::key(self.watched.kind, &raw.value) {
                        self.send(Event::Gone(key)).await?;
                    }
                }
                Err(error) => {
                    all.clear();
                    if self.failed(&error).await? {
                        return Some(());
                    }
                }
            }
        }
    }

    /// Says whether to begin from nothing, after a while.
    async fn failed(&mut self, error: &watcher::Error) -> Option<bool> {
        let code = code(error);
        let kind = self.watched.name;
        // The API server has forgotten where we were; it happens to every watch now and then, and costs a list.
        if code == Some(410) {
            tracing::info!(kind, "the watch is out of date: listing again");
            sleep(BACKOFF.0).await;
            return Some(true);
        }
        self.status.error(self.watched.name);
        let absent = code == Some(404);
        if absent && self.version + 1 < self.watched.versions.len() {
            self.version += 1;
            return Some(true);
        }
        if absent {
            self.version = 0;
        }
        if !std::mem::replace(&mut self.failing, true) {
            match code {
                Some(403) => tracing::error!(
                    kind,
                    error = told(error),
                    "may not be listed and watched: what is held of it stays as it is, until list and watch are granted"
                ),
                Some(404) => tracing::warn!(kind, "the API server does not serve this kind: is the CRD installed?"),
                _ => tracing::warn!(kind, error = told(error), "not watched: the last good state stays in force"),
            }
        }
        if !self.listed && matches!(code, Some(403 | 404)) {
            self.listed = true;
            self.send(Event::Unavailable(self.watched.kind)).await?;
        }
        let delay = if matches!(code, Some(403 | 404)) { BACKOFF.1 } else { self.delay };
        self.delay = (self.delay * 2).min(BACKOFF.1);
        tokio::select! {
            () = sleep(delay) => Some(absent),
            () = self.events.closed() => None,
        }
    }
}
