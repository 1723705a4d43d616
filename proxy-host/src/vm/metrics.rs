//! Metrics that guests define, added up over all VMs of the process.
//!
//! Each VM writes to cells of its own, so two threads that count the same metric never share a cache line; readers add up.

use super::abi::{MetricKind, Status};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Upper bound of distinct names, so that a guest that puts a client's bytes into names cannot fill the memory.
const MAX_METRICS: usize = 16_384;
/// A histogram's bucket `n` counts values below 2^n that bucket `n-1` did not; the last takes the rest.
pub const BUCKETS: usize = 65;

/// All metrics by name.
#[derive(Default)]
pub struct Metrics {
    families: Mutex<BTreeMap<String, Family>>,
}

struct Family {
    kind: MetricKind,
    /// What VMs that are gone had counted; the value itself for a gauge.
    base: Arc<Cell>,
    cells: Vec<Arc<Cell>>,
}

struct Cell {
    /// Counter or gauge value, or sum of a histogram.
    value: AtomicU64,
    buckets: Option<Box<[AtomicU64; BUCKETS]>>,
}

/// A metric's value now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricValue {
    /// Sum over all VMs since the start.
    Counter(u64),
    /// The last value set.
    Gauge(u64),
    /// Sum of all values and how many fell into each power of two.
    Histogram {
        /// Sum of the values.
        sum: u64,
        /// See [`BUCKETS`].
        buckets: Box<[u64; BUCKETS]>,
    },
}

/// One VM's handles, by the ids it was given.
pub(super) struct MetricTable {
    metrics: Arc<Metrics>,
    entries: Vec<Entry>,
}

struct Entry {
    name: String,
    kind: MetricKind,
    cell: Arc<Cell>,
}

impl Cell {
    fn new(kind: MetricKind) -> Arc<Self> {
        let buckets = (kind == MetricKind::Histogram).then(|| Box::new([const { AtomicU64::new(0) }; BUCKETS]));
        Arc::new(Self { value: AtomicU64::new(0), buckets })
    }

    /// Only one thread writes a counter's cell, so a load and a store are enough.
    fn add(&self, amount: u64) {
        self.value.store(self.value.load(Relaxed).wrapping_add(amount), Relaxed);
    }

    fn record(&self, value: u64) {
        self.add(value);
        let bucket = (u64::BITS - value.leading_zeros()) as usize;
        if let Some(count) = self.buckets.as_ref().and_then(|buckets| buckets.get(bucket)) {
            count.store(count.load(Relaxed) + 1, Relaxed);
        }
    }

    /// Adds another cell's counts; the caller holds the lock and the other cell's writer is gone.
    fn absorb(&self, other: &Self) {
        self.add(other.value.load(Relaxed));
        if let (Some(mine), Some(theirs)) = (&self.buckets, &other.buckets) {
            for (mine, theirs) in mine.iter().zip(theirs.iter()) {
                mine.store(mine.load(Relaxed) + theirs.load(Relaxed), Relaxed);
            }
        }
    }
}

impl Family {
    fn read(&self) -> MetricValue {
        let total = Cell::new(self.kind);
        total.absorb(&self.base);
        for cell in &self.cells {
            total.absorb(cell);
        }
        let value = total.value.load(Relaxed);
        match (self.kind, &total.buckets) {
            (MetricKind::Histogram, Some(buckets)) => MetricValue::Histogram {
                sum: value,
                buckets: Box::new(std::array::from_fn(|at| buckets[at].load(Relaxed))),
            },
            (MetricKind::Gauge, _) => MetricValue::Gauge(value),
            _ => MetricValue::Counter(value),
        }
    }
}

impl Metrics {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Family>> {
        // A poisoned lock only means that another thread panicked between two whole updates.
        self.families.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The metric of that name.
    pub fn get(&self, name: &str) -> Option<MetricValue> {
        self.lock().get(name).map(Family::read)
    }

    /// Every metric in order of names.
    pub fn all(&self) -> Vec<(String, MetricValue)> {
        self.lock().iter().map(|(name, family)| (name.clone(), family.read())).collect()
    }
}

impl MetricTable {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, entries: Vec::new() }
    }

    /// Id of the metric `name`; defining it again gives the same id.
    pub(super) fn define(&mut self, kind: MetricKind, name: &str) -> Result<u32, Status> {
        if let Some(at) = self.entries.iter().position(|entry| entry.name == name) {
            let same = self.entries.get(at).is_some_and(|entry| entry.kind == kind);
            return if same { Self::id(at) } else { Err(Status::BadArgument) };
        }
        let mut families = self.metrics.lock();
        if !families.contains_key(name) && families.len() >= MAX_METRICS {
            return Err(Status::InternalFailure);
        }
        let family = families.entry(name.to_owned()).or_insert_with(|| Family {
            kind,
            base: Cell::new(kind),
            cells: Vec::new(),
        });
        if family.kind != kind {
            return Err(Status::BadArgument);
        }
        // A gauge is one value for the process: every VM sets the same cell.
        let cell = if kind == MetricKind::Gauge {
            family.base.clone()
        } else {
            let cell = Cell::new(kind);
            family.cells.push(cell.clone());
            cell
        };
        self.entries.push(Entry { name: name.to_owned(), kind, cell });
        Self::id(self.entries.len() - 1)
    }

    /// Ids start at 1, since guests take 0 for "not defined yet".
    fn id(at: usize) -> Result<u32, Status> {
        u32::try_from(at + 1).map_err(|_| Status::InternalFailure)
    }

    fn entry(&self, id: u32) -> Result<&Entry, Status> {
        let at = (id as usize).checked_sub(1).ok_or(Status::NotFound)?;
        self.entries.get(at).ok_or(Status::NotFound)
    }

    pub(super) fn increment(&self, id: u32, offset: i64) -> Result<(), Status> {
        let entry = self.entry(id)?;
        match entry.kind {
            MetricKind::Counter => entry.cell.add(u64::try_from(offset).map_err(|_| Status::BadArgument)?),
            MetricKind::Gauge => {
                let add = |value: u64| Some(value.saturating_add_signed(offset));
                // The closure never refuses.
                let _ = entry.cell.value.try_update(Relaxed, Relaxed, add);
            }
            MetricKind::Histogram => return Err(Status::BadArgument),
        }
        Ok(())
    }

    pub(super) fn record(&self, id: u32, value: u64) -> Result<(), Status> {
        let entry = self.entry(id)?;
        match entry.kind {
            MetricKind::Counter => entry.cell.add(value),
            MetricKind::Gauge => entry.cell.value.store(value, Relaxed),
            MetricKind::Histogram => entry.cell.record(value),
        }
        Ok(())
    }

    /// Value over all VMs.
    pub(super) fn read(&self, id: u32) -> Result<u64, Status> {
        match self.metrics.get(&self.entry(id)?.name) {
            Some(MetricValue::Counter(value) | MetricValue::Gauge(value)) => Ok(value),
            Some(MetricValue::Histogram { .. }) => Err(Status::BadArgument),
            None => Err(Status::NotFound),
        }
    }
}

impl Drop for MetricTable {
    /// What this VM counted stays counted.
    fn drop(&mut self) {
        let mut families = self.metrics.lock();
        for entry in &self.entries {
            let Some(family) = families.get_mut(&entry.name) else { continue };
            if entry.kind != MetricKind::Gauge {
                family.base.absorb(&entry.cell);
                family.cells.retain(|cell| !Arc::ptr_eq(cell, &entry.cell));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_add_up_over_vms_and_outlive_them() -> Result<(), Status> {
        let metrics = Arc::new(Metrics::default());
        let mut one = MetricTable::new(metrics.clone());
        let mut two = MetricTable::new(metrics.clone());
        let id = one.define(MetricKind::Counter, "c")?;
        one.increment(id, 2)?;
        let id = two.define(MetricKind::Counter, "c")?;
        two.increment(id, 3)?;
        drop(one);
        assert_eq!(two.read(id), Ok(5));
        drop(two);
        assert_eq!(metrics.get("c"), Some(MetricValue::Counter(5)));
        Ok(())
    }

    #[test]
    fn a_gauge_is_one_value() -> Result<(), Status> {
        let metrics = Arc::new(Metrics::default());
        let mut one = MetricTable::new(metrics.clone());
        let mut two = MetricTable::new(metrics.clone());
        let (a, b) = (one.define(MetricKind::Gauge, "g")?, two.define(MetricKind::Gauge, "g")?);
        one.record(a, 7)?;
        two.increment(b, -2)?;
        assert_eq!(metrics.get("g"), Some(MetricValue::Gauge(5)));
        Ok(())
    }

    #[test]
    fn a_histogram_counts_by_powers_of_two() -> Result<(), Status> {
        let metrics = Arc::new(Metrics::default());
        let mut table = MetricTable::new(metrics.clone());
        let id = table.define(MetricKind::Histogram, "h")?;
        for value in [0, 1, 3, u64::MAX - 4] {
            table.record(id, value)?;
        }
        let Some(MetricValue::Histogram { buckets, .. }) = metrics.get("h") else { panic!("not a histogram") };
        assert_eq!((buckets[0], buckets[1], buckets[2], buckets[64]), (1, 1, 1, 1));
        Ok(())
    }

    #[test]
    fn kinds_and_ids_are_checked() -> Result<(), Status> {
        let mut table = MetricTable::new(Arc::default());
        let id = table.define(MetricKind::Counter, "c")?;
        assert_eq!(table.define(MetricKind::Gauge, "c"), Err(Status::BadArgument));
        assert_eq!(table.increment(id, -1), Err(Status::BadArgument));
        assert_eq!(table.increment(99, 1), Err(Status::NotFound));
        assert_eq!(table.increment(0, 1), Err(Status::NotFound));
        Ok(())
    }
}
