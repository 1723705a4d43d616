//! What a proxy counts. Each worker writes cells of its own, so that no two threads share a cache line and none waits
//! for another; whoever reads adds up.

use std::{
    cell::{OnceCell, RefCell},
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::{listener::Kind, upstream::breakers::Taken};

/// Upper bounds of the buckets of durations, in milliseconds (Envoy's, shortened); one more bucket takes the rest.
pub const DURATIONS: [u64; 12] = [1, 5, 10, 25, 50, 100, 250, 500, 1_000, 5_000, 30_000, 300_000];

thread_local! {
    static HERE: OnceCell<Arc<WorkerStats>> = const { OnceCell::new() };
}

/// A number that one thread writes and any thread reads.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds; only the thread that owns the cell may.
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(amount), Relaxed);
    }

    /// Takes away; only the thread that owns the cell may.
    pub fn sub(&self, amount: u64) {
        self.0.store(self.0.load(Relaxed).saturating_sub(amount), Relaxed);
    }

    /// The value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How a request or connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ending {
    /// A request, not a TCP connection.
    pub http: bool,
    /// Status of the response; 0 for none.
    pub code: u16,
    /// Envoy's response flags; empty for none.
    pub flags: &'static str,
}

/// What one worker counts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerStats {
    /// Connections accepted, by [`Kind`].
    pub accepted: [Cell; 3],
    /// Connections that are open, by [`Kind`].
    pub open: [Cell; 3],
    /// Connections refused because there were too many.
    pub over_limit: Cell,
    /// Failures to accept, as for want of descriptors.
    pub accept_failures: Cell,
    /// Body bytes from clients.
    pub received: Cell,
    /// Body bytes to clients.
    pub sent: Cell,
    /// Requests by duration, see [`DURATIONS`].
    pub durations: [Cell; DURATIONS.len() + 1],
    /// Sum of the durations, in milliseconds.
    pub duration_sum: Cell,
    /// Connections to upstreams that were opened.
    pub upstream_opened: Cell,
    /// Connections to upstreams that are open.
    pub upstream_open: Cell,
    /// Connections to upstreams that failed to open.
    pub upstream_failed: Cell,
    /// Of those, the ones that took too long.
    pub upstream_timeouts: Cell,
    /// Requests that got no response in the time that they had.
    pub upstream_request_timeouts: Cell,
    /// Attempts that took longer than one may.
    pub upstream_try_timeouts: Cell,
    /// Attempts after the first.
    pub upstream_retries: Cell,
    /// Requests that were not tried again because no retry was left.
    pub upstream_retries_exceeded: Cell,
    /// Requests, retries and connections refused because there were too many towards a cluster.
    pub upstream_overflows: Cell,
    /// Lines of the access log that were dropped because nobody reads it.
    pub lost_lines: Cell,
    /// 1 once the filter has its first snapshot.
    pub ready: Cell,
    /// Locked where an ending is met for the first time, and to read.
    endings: Mutex<Vec<(Ending, Arc<Cell>)>>,
}

impl WorkerStats {
    fn ending(&self, ending: Ending) -> Arc<Cell> {
        let mut endings = self.endings.lock().unwrap_or_else(PoisonError::into_inner);
        let cell = Arc::new(Cell::default());
        endings.push((ending, cell.clone()));
        cell
    }

    /// Makes these the ones that [`here`] finds on this thread.
    pub fn install(self: &Arc<Self>) {
        HERE.with(|here| {
            // A thread is one worker for all of its life.
            let _ = here.set(self.clone());
        });
    }
}

/// Counts on the worker that this thread is, if it is one.
pub fn here(count: impl FnOnce(&WorkerStats)) {
    HERE.with(|here| {
        if let Some(stats) = here.get() {
            count(stats);
        }
    });
}

/// Counts a connection to an upstream as open for as long as it lives.
#[derive(Debug)]
pub struct UpstreamOpen(Option<Taken>);

impl UpstreamOpen {
    /// One more.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "making one counts")]
    pub fn new() -> Self {
        here(|stats| {
            stats.upstream_opened.add(1);
            stats.upstream_open.add(1);
        });
        Self(None)
    }

    /// Also counts among the connections of its cluster.
    pub fn hold(&mut self, taken: Option<Taken>) {
        self.0 = taken;
    }
}

impl Drop for UpstreamOpen {
    fn drop(&mut self) {
        here(|stats| stats.upstream_open.sub(1));
    }
}

/// Counts a client's connection as open for as long as it lives.
#[derive(Debug)]
pub struct DownstreamOpen(Arc<WorkerStats>, usize);

impl DownstreamOpen {
    /// One more of this kind.
    #[must_use]
    pub fn new(stats: &Arc<WorkerStats>, kind: Kind) -> Self {
        stats.open[of(kind)].add(1);
        Self(stats.clone(), of(kind))
    }
}

impl Drop for DownstreamOpen {
    fn drop(&mut self) {
        self.0.open[self.1].sub(1);
    }
}

/// Counts how requests and connections end, for one worker.
#[derive(Debug)]
pub struct Recorder {
    /// The worker's cells.
    pub stats: Arc<WorkerStats>,
    /// The endings met so far; few, so that looking for one costs next to nothing.
    known: RefCell<Vec<(Ending, Arc<Cell>)>>,
}

impl Recorder {
    /// Writes to these cells.
    #[must_use]
    pub fn new(stats: Arc<WorkerStats>) -> Self {
        Self { stats, known: RefCell::default() }
    }

    /// One request or connection has ended.
    pub fn ended(&self, ending: Ending, took: Duration, received: u64, sent: u64) {
        let mut known = self.known.borrow_mut();
        match known.iter().find(|(other, _)| *other == ending) {
            Some((_, cell)) => cell.add(1),
            None => {
                let cell = self.stats.ending(ending);
                cell.add(1);
                known.push((ending, cell));
            }
        }
        self.stats.received.add(received);
        self.stats.sent.add(sent);
        if ending.http {
            let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
            let bucket = DURATIONS.iter().position(|bound| ms <= *bound).unwrap_or(DURATIONS.len());
            self.stats.durations[bucket].add(1);
            self.stats.duration_sum.add(ms);
        }
    }
}

/// The counts of all workers.
#[derive(Debug, Default)]
pub struct Stats {
    workers: Vec<Arc<WorkerStats>>,
    /// Client connections that are open, over all workers, for the limit.
    pub connections: AtomicUsize,
}

impl Stats {
    /// For this many workers.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self { workers: (0..workers).map(|_| Arc::default()).collect(), connections: AtomicUsize::new(0) }
    }

    /// The cells of one worker.
    #[must_use]
    pub fn worker(&self, index: usize) -> Arc<WorkerStats> {
        self.workers.get(index).cloned().unwrap_or_default()
    }

    /// How many workers there are.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// The sum of one cell over all workers.
    pub fn sum(&self, cell: impl Fn(&WorkerStats) -> &Cell) -> u64 {
        self.workers.iter().map(|worker| cell(worker).get()).sum()
    }

    /// How many requests and connections ended how.
    #[must_use]
    pub fn endings(&self) -> BTreeMap<Ending, u64> {
        let mut all = BTreeMap::new();
        for worker in &self.workers {
            for (ending, cell) in worker.endings.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                *all.entry(*ending).or_default() += cell.get();
            }
        }
        all
    }
}

/// The place of a listener's kind in the arrays by kind.
#[must_use]
pub fn of(kind: Kind) -> usize {
    match kind {
        Kind::Transparent => 0,
        Kind::HttpProxy => 1,
        Kind::Gateway => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_add_up_over_workers() {
        let stats = Stats::new(2);
        let ending = Ending { http: true, code: 200, flags: "" };
        for worker in 0..2 {
            let recorder = Recorder::new(stats.worker(worker));
            for _ in 0..3 {
                recorder.ended(ending, Duration::from_millis(7), 1, 2);
            }
        }
        assert_eq!(stats.endings(), BTreeMap::from([(ending, 6)]));
        assert_eq!((stats.sum(|w| &w.received), stats.sum(|w| &w.sent)), (6, 12));
        assert_eq!((stats.sum(|w| &w.durations[2]), stats.sum(|w| &w.duration_sum)), (6, 42));
    }

    #[test]
    fn what_is_open_is_counted_on_its_own_thread() {
        let stats = Stats::new(1);
        let worker = stats.worker(0);
        std::thread::spawn(move || {
            worker.install();
            let open = UpstreamOpen::new();
            assert_eq!(worker.upstream_open.get(), 1);
            drop(open);
            drop(UpstreamOpen::new());
        })
        .join()
        .unwrap();
        drop(UpstreamOpen::new());
        assert_eq!((stats.sum(|w| &w.upstream_open), stats.sum(|w| &w.upstream_opened)), (0, 2));
    }
}
