//! Keeps rows in pages: the compiler's side of a snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::encode::{self, EncodeError, TAG_ADDRESS, TAG_SUFFIX, TAG_SUMMARY};
use crate::hash;
use crate::page::{self, MAX_DEPTH, PAGE_LIMIT, PAGE_MAX, Packed};
use crate::row::{Row, RowKey};

pub use crate::page::digest as page_digest;

/// Id of a page: its place in the trie, counted as in a heap.
pub type PageId = u32;

/// New values by hash, tag and key; `None` removes.
type Changes = BTreeMap<(u64, u8, Vec<u8>), Option<Vec<u8>>>;

/// What a [`Writer::commit`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Commit {
    /// Pages that are new or have new bytes, ascending.
    pub changed: Vec<PageId>,
    /// Pages that are no more, ascending.
    pub removed: Vec<PageId>,
}

/// Rows in pages. Which pages result depends on the rows alone, never on the order in which they came.
#[derive(Debug, Clone)]
pub struct Writer {
    pages: BTreeMap<PageId, Arc<[u8]>>,
    /// Rows that wait for [`Writer::commit`].
    pending: Changes,
    /// How many wildcards there are of each length, with and without a leading dot.
    suffixes: [BTreeMap<u8, u32>; 2],
    /// How many listeners of one address there are.
    addresses: u32,
    digest: u64,
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// An empty snapshot.
    pub fn new() -> Self {
        let empty: Arc<[u8]> = page::write(&[]).into();
        let digest = hash::contribution(1, page::digest(&empty));
        Writer {
            pages: [(1, empty)].into(),
            pending: BTreeMap::new(),
            suffixes: Default::default(),
            addresses: 0,
            digest,
        }
    }

    /// Adds a row or replaces the one of its key, at the next [`Writer::commit`]. A row that cannot fit a page is
    /// refused, and the one it would have replaced stays.
    pub fn put(&mut self, row: &Row) -> Result<(), EncodeError> {
        let (tag, key) = encode::key(&row.key());
        let value = encode::value(row);
        let (got, max) = (key.len() + value.len() + 32, PAGE_MAX);
        if got > max {
            return Err(EncodeError::TooLarge { got, max });
        }
        self.pending.insert((hash::key(tag, &key), tag, key), Some(value));
        Ok(())
    }

    /// Removes a row, if there is one, at the next [`Writer::commit`].
    pub fn remove(&mut self, key: &RowKey) {
        let (tag, key) = encode::key(key);
        self.pending.insert((hash::key(tag, &key), tag, key), None);
    }

    /// Brings the pages up to date.
    pub fn commit(&mut self) -> Commit {
        let mut touched: BTreeMap<PageId, Arc<[u8]>> = BTreeMap::new();
        let mut pending = std::mem::take(&mut self.pending);
        self.count(&pending);
        pending.insert((hash::key(TAG_SUMMARY, &[]), TAG_SUMMARY, Vec::new()), self.summary());

        let mut pending = pending.into_iter().peekable();
        while let Some((first, _)) = pending.peek() {
            let id = self.leaf(first.0);
            let mut changes = BTreeMap::new();
            while let Some((key, value)) = pending.next_if(|(k, _)| page::covers(id, k.0)) {
                changes.insert(key, value);
            }
            self.rewrite(id, changes, &mut touched);
        }
        let mut commit = Commit::default();
        for (id, old) in touched {
            match self.pages.get(&id) {
                None if !old.is_empty() => commit.removed.push(id),
                Some(new) if *new != old => commit.changed.push(id),
                _ => {}
            }
            if !old.is_empty() {
                self.digest = self.digest.wrapping_sub(hash::contribution(id, page::digest(&old)));
            }
            if let Some(new) = self.pages.get(&id) {
                self.digest = self.digest.wrapping_add(hash::contribution(id, page::digest(new)));
            }
        }
        commit
    }

    /// All pages, by id.
    pub fn pages(&self) -> impl Iterator<Item = (PageId, &Arc<[u8]>)> {
        self.pages.iter().map(|(id, page)| (*id, page))
    }

    /// One page.
    pub fn page(&self, id: PageId) -> Option<&Arc<[u8]>> {
        self.pages.get(&id)
    }

    /// Digest of the whole snapshot.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    fn leaf(&self, hash: u64) -> PageId {
        (0..=MAX_DEPTH)
            .map(|depth| if depth == 0 { 1 } else { 1 << depth | (hash >> (64 - depth)) as u32 })
            .find(|id| self.pages.contains_key(id))
            .unwrap_or(1)
    }

    /// What a lookup need not ask for is kept in one row, the summary: wildcards by length, and addresses at all.
    fn count(&mut self, pending: &Changes) {
        let counted = |tag: u8| tag == TAG_SUFFIX || tag == TAG_ADDRESS;
        for ((hash, tag, key), value) in pending.iter().filter(|((_, tag, _), _)| counted(*tag)) {
            let had = self.pages.get(&self.leaf(*hash)).is_some_and(|p| page::find(p, *hash, *tag, key).is_some());
            let dotted = usize::from(key.first() == Some(&b'.'));
            let count = match (*tag, self.suffixes.get_mut(dotted), u8::try_from(key.len())) {
                (TAG_ADDRESS, ..) => &mut self.addresses,
                (_, Some(counts), Ok(len)) => counts.entry(len).or_default(),
                _ => continue,
            };
            match (had, value.is_some()) {
                (false, true) => *count += 1,
                (true, false) => *count = count.saturating_sub(1),
                _ => {}
            }
        }
    }

    fn summary(&self) -> Option<Vec<u8>> {
        let mut out = vec![0; 64];
        for (half, counts) in out.chunks_mut(32).zip(&self.suffixes) {
            counts.iter().filter(|(_, n)| **n > 0).for_each(|(len, _)| encode::set_bit(half, *len));
        }
        out.push(u8::from(self.addresses > 0));
        out.iter().any(|b| *b != 0).then_some(out)
    }

    fn rewrite(&mut self, id: PageId, changes: Changes, touched: &mut BTreeMap<PageId, Arc<[u8]>>) {
        let old = self.take(id, touched);
        let mut rows = page::rows(&old);
        rows.retain(|r| {
            let parts = page::parts(&r.bytes).map(|(tag, key, _)| (r.hash, tag, key.to_vec()));
            !parts.is_some_and(|key| changes.contains_key(&key))
        });
        let added = changes.iter().filter_map(|((_, tag, key), v)| Some(Packed::new(*tag, key, v.as_ref()?)));
        rows.extend(added);
        rows.sort();
        let (mut id, mut rows) = (id, rows);
        // Joined with its other half for as long as both fit one page.
        while id > 1 {
            let other = id ^ 1;
            let Some(page) = self.pages.get(&other) else { break };
            let theirs = page::rows(page);
            if !fits(&rows, &theirs) {
                break;
            }
            self.take(other, touched);
            rows.extend(theirs);
            rows.sort();
            id /= 2;
            touched.entry(id).or_insert_with(|| Arc::from([]));
        }
        self.split(id, &rows, touched);
    }

    fn split(&mut self, id: PageId, rows: &[Packed], touched: &mut BTreeMap<PageId, Arc<[u8]>>) {
        let depth = id.ilog2();
        if page::size(rows) <= PAGE_LIMIT || rows.len() <= 1 || depth >= MAX_DEPTH {
            touched.entry(id).or_insert_with(|| Arc::from([]));
            // Only names made to collide fill a page of the last depth; what is left out is not known, hence denied.
            let fitting = (1..=rows.len()).rev().find(|n| rows.get(..*n).is_some_and(|r| page::size(r) <= PAGE_MAX));
            let rows = rows.get(..fitting.unwrap_or(0)).unwrap_or_default();
            self.pages.insert(id, page::write(rows).into());
            return;
        }
        let bit = 1u64 << (63 - depth);
        // Sorted by hash, and alike in all higher bits.
        let (low, high) = rows.split_at(rows.partition_point(|r| r.hash & bit == 0));
        self.split(id * 2, low, touched);
        self.split(id * 2 + 1, high, touched);
    }

    fn take(&mut self, id: PageId, touched: &mut BTreeMap<PageId, Arc<[u8]>>) -> Arc<[u8]> {
        let page = self.pages.remove(&id).unwrap_or_else(|| Arc::from([]));
        touched.entry(id).or_insert_with(|| page.clone());
        page
    }
}

fn fits(a: &[Packed], b: &[Packed]) -> bool {
    page::size(a.iter().chain(b)) <= PAGE_LIMIT || a.len() + b.len() <= 1
}
