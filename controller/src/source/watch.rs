//! Says when files are worth reading again: a short while after they were closed, renamed or removed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// How long to wait for more changes after a complete one.
const DEBOUNCE: Duration = Duration::from_millis(8);
/// How long a file that is being written may stay open before it is read as it is.
const OPEN: Duration = Duration::from_millis(100);

/// Files and directories under watch.
pub(crate) struct Watcher {
    watcher: RecommendedWatcher,
    events: mpsc::UnboundedReceiver<notify::Result<Event>>,
    watched: BTreeSet<PathBuf>,
    due: BTreeMap<PathBuf, Instant>,
    rescan: Option<Instant>,
}

/// What is to be looked at.
#[derive(Debug, Default)]
pub(crate) struct Due {
    /// Paths that changed, came or went.
    pub paths: Vec<PathBuf>,
    /// Everything is to be looked at: events were lost, or something happened to a directory.
    pub rescan: bool,
}

impl Watcher {
    pub(crate) fn new() -> notify::Result<Watcher> {
        let (sender, events) = mpsc::unbounded_channel();
        let watcher = notify::recommended_watcher(move |event| {
            // Nobody listens any more: the source is gone, and this watcher with it.
            let _ = sender.send(event);
        })?;
        Ok(Watcher { watcher, events, watched: BTreeSet::new(), due: BTreeMap::new(), rescan: None })
    }

    /// Watches exactly these directories, each without what lies below.
    pub(crate) fn watch(&mut self, directories: BTreeSet<PathBuf>) -> notify::Result<()> {
        for gone in self.watched.difference(&directories) {
            // A directory that was removed is not watched any more either.
            let _ = self.watcher.unwatch(gone);
        }
        for new in directories.difference(&self.watched) {
            self.watcher.watch(new, RecursiveMode::NonRecursive)?;
        }
        self.watched = directories;
        Ok(())
    }

    /// Forgets a directory, so that the next [`Watcher::watch`] watches what is there by then.
    pub(crate) fn forget(&mut self, directory: &Path) {
        if self.watched.remove(directory) {
            let _ = self.watcher.unwatch(directory);
        }
    }

    /// Asks for a path to be looked at again after a while.
    pub(crate) fn again(&mut self, path: PathBuf, after: Duration) {
        self.due.insert(path, Instant::now() + after);
    }

    /// Asks for everything to be looked at again after a while.
    pub(crate) fn rescan(&mut self, after: Duration) {
        let at = Instant::now() + after;
        self.rescan = Some(self.rescan.map_or(at, |earlier| earlier.min(at)));
    }

    /// Waits until there is something to look at. Nothing is lost if the future is dropped.
    pub(crate) async fn next(&mut self) -> Due {
        loop {
            let soonest = self.due.values().copied().chain(self.rescan).min();
            match soonest {
                None => match self.events.recv().await {
                    Some(event) => self.note(event),
                    None => std::future::pending().await,
                },
                Some(at) => tokio::select! {
                    biased;
                    Some(event) = self.events.recv() => self.note(event),
                    () = sleep_until(at) => return self.take(),
                },
            }
        }
    }

    fn take(&mut self) -> Due {
        let now = Instant::now();
        let paths: Vec<PathBuf> = self.due.iter().filter(|(_, at)| **at <= now).map(|(path, _)| path.clone()).collect();
        for path in &paths {
            self.due.remove(path);
        }
        let rescan = self.rescan.is_some_and(|at| at <= now);
        if rescan {
            self.rescan = None;
        }
        Due { paths, rescan }
    }

    fn note(&mut self, event: notify::Result<Event>) {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                tracing::warn!(%error, "watching configuration files");
                return self.rescan(DEBOUNCE);
            }
        };
        if event.need_rescan() {
            self.rescan(DEBOUNCE);
        }
        let complete = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
            EventKind::Access(_) => return,
            EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Any) | EventKind::Create(_) => false,
            _ => true,
        };
        let now = Instant::now();
        for path in event.paths {
            // A link or a directory is never closed after writing: it is complete at once.
            let complete = complete || !std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
            let at = now + if complete { DEBOUNCE } else { OPEN };
            self.due
                .entry(path)
                .and_modify(|due| *due = if complete { at } else { (*due).max(now + DEBOUNCE) })
                .or_insert(at);
        }
    }
}
