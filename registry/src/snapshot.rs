//! A compiled snapshot, read in place: pages as they came off the wire, and a table that finds the page of a hash.
//!
//! An update is staged page by page and takes effect as a whole or not at all. Its cost follows the pages that changed,
//! so a worker is never held up by the size of the registry.

use crate::hash;
use crate::page;

pub use crate::page::{FORMAT, FormatError};

const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Held {
    id: u32,
    digest: u64,
    bytes: Box<[u8]>,
}

/// Pages of one snapshot and the table over them.
#[derive(Debug, Default)]
struct Pages {
    held: Vec<Option<Held>>,
    free: Vec<u32>,
    /// For each value of the first `depth` bits of a hash: which of `held`.
    table: Vec<u32>,
    depth: u32,
    /// Entries of `table` that lead nowhere.
    gaps: usize,
    digest: u64,
    bytes: usize,
}

impl Pages {
    fn range(&self, id: u32) -> std::ops::Range<usize> {
        let depth = id.ilog2();
        let width = 1usize << (self.depth - depth);
        let start = (id as usize - (1usize << depth)) * width;
        start..start + width
    }

    fn deepen(&mut self, depth: u32) {
        if self.table.is_empty() {
            self.table = vec![NONE];
            self.gaps = 1;
        }
        if depth > self.depth {
            let copies = 1usize << (depth - self.depth);
            self.table = self.table.iter().flat_map(|at| std::iter::repeat_n(*at, copies)).collect();
            self.gaps *= copies;
            self.depth = depth;
        }
    }

    fn remove(&mut self, id: u32) -> Option<Held> {
        if id == 0 || self.table.is_empty() || id.ilog2() > self.depth {
            return None;
        }
        let range = self.range(id);
        let at = *self.table.get(range.start)?;
        let place = self.held.get_mut(at as usize)?;
        if place.as_ref()?.id != id {
            return None;
        }
        let held = place.take()?;
        self.free.push(at);
        let entries = self.table.get_mut(range)?;
        self.gaps += entries.len();
        entries.fill(NONE);
        self.digest = self.digest.wrapping_sub(hash::contribution(id, held.digest));
        self.bytes -= held.bytes.len();
        Some(held)
    }

    fn insert(&mut self, held: Held) -> Result<(), FormatError> {
        let id = held.id;
        self.deepen(id.ilog2());
        let range = self.range(id);
        let at = self.free.last().copied().unwrap_or(self.held.len() as u32);
        let entries = self.table.get_mut(range).ok_or(FormatError::Cover { id })?;
        if entries.iter().any(|e| *e != NONE) {
            return Err(FormatError::Cover { id });
        }
        entries.fill(at);
        self.gaps -= entries.len();
        self.digest = self.digest.wrapping_add(hash::contribution(id, held.digest));
        self.bytes += held.bytes.len();
        if self.free.pop().is_none() {
            self.held.push(None);
        }
        if let Some(place) = self.held.get_mut(at as usize) {
            *place = Some(held);
        }
        Ok(())
    }

    fn page(&self, hash: u64) -> Option<&[u8]> {
        let entry = hash.checked_shr(64 - self.depth).unwrap_or(0) as usize;
        let at = *self.table.get(entry)?;
        self.held.get(at as usize)?.as_ref().map(|h| &*h.bytes)
    }

    fn complete(&self, expected: u64) -> Result<(), FormatError> {
        if self.gaps != 0 || self.table.is_empty() {
            let at = self.table.iter().position(|e| *e == NONE).unwrap_or(0);
            return Err(FormatError::Cover { id: (1 << self.depth) + at as u32 });
        }
        if self.digest != expected {
            return Err(FormatError::Digest { got: self.digest, expected });
        }
        Ok(())
    }
}

/// A snapshot and the update to it that is under way.
#[derive(Debug, Default)]
pub struct Snapshot {
    live: Pages,
    /// A whole new snapshot, built up beside the live one.
    fresh: Option<Pages>,
    staged: Vec<Held>,
    dropped: Vec<u32>,
    broken: Option<FormatError>,
    /// Pages no longer needed, to be freed a few at a time.
    retired: Vec<Option<Held>>,
}

impl Snapshot {
    /// A snapshot with nothing in it, not even a catch-all.
    pub fn new() -> Self {
        Self::default()
    }

    /// The staged update begins from nothing instead of from what is live.
    pub fn reset(&mut self) {
        self.abandon();
        self.fresh = Some(Pages::default());
    }

    /// Forgets the staged update.
    pub fn abandon(&mut self) {
        self.fresh = None;
        self.staged.clear();
        self.dropped.clear();
        self.broken = None;
    }

    /// Checks a page and adds it to the update, in place of the page of this id if there is one. After an error the
    /// update cannot be committed.
    pub fn stage(&mut self, id: u32, bytes: Vec<u8>) -> Result<(), FormatError> {
        let staged = page::check(id, &bytes).and_then(|digest| {
            let held = Held { id, digest, bytes: bytes.into_boxed_slice() };
            match &mut self.fresh {
                Some(pages) => pages.insert(held),
                None => {
                    self.staged.push(held);
                    Ok(())
                }
            }
        });
        if let Err(error) = &staged {
            self.broken = Some(error.clone());
        }
        staged
    }

    /// Takes a page out with the update.
    pub fn unstage(&mut self, id: u32) {
        if self.fresh.is_none() {
            self.dropped.push(id);
        }
    }

    /// Puts the update into effect, if the result is the snapshot of this digest; else leaves what was and forgets
    /// the update.
    pub fn commit(&mut self, digest: u64) -> Result<(), FormatError> {
        let result = match self.broken.take() {
            Some(error) => Err(error),
            None => match self.fresh.take() {
                Some(pages) => pages.complete(digest).map(|()| {
                    let old = std::mem::replace(&mut self.live, pages);
                    self.retired.extend(old.held);
                }),
                None => self.patch(digest),
            },
        };
        self.abandon();
        result
    }

    fn patch(&mut self, digest: u64) -> Result<(), FormatError> {
        let added = std::mem::take(&mut self.staged);
        let ids: Vec<u32> = added.iter().map(|h| h.id).collect();
        let leaving = self.dropped.iter().chain(&ids);
        let mut removed: Vec<Held> = Vec::new();
        for id in leaving {
            removed.extend(self.live.remove(*id));
        }
        let mut result = Ok(());
        let mut inserted = Vec::with_capacity(ids.len());
        for held in added {
            let id = held.id;
            result = self.live.insert(held);
            if result.is_err() {
                break;
            }
            inserted.push(id);
        }
        result = result.and_then(|()| self.live.complete(digest));
        if result.is_err() {
            for id in inserted {
                self.live.remove(id);
            }
            for held in removed {
                self.live.insert(held)?;
            }
            return result;
        }
        self.retired.extend(removed.into_iter().map(Some));
        Ok(())
    }

    /// Frees at most `n` pages that earlier updates replaced. True: there are more.
    pub fn retire_some(&mut self, n: usize) -> bool {
        self.retired.truncate(self.retired.len().saturating_sub(n));
        if self.retired.is_empty() {
            self.retired.shrink_to_fit();
        }
        !self.retired.is_empty()
    }

    /// The pages held, for a subscription to resume with: 12 bytes each, id then digest, little endian.
    pub fn held(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for held in self.live.held.iter().flatten() {
            out.extend_from_slice(&held.id.to_le_bytes());
            out.extend_from_slice(&held.digest.to_le_bytes());
        }
        out
    }

    /// True until the first update has taken effect.
    pub fn is_empty(&self) -> bool {
        self.live.table.is_empty()
    }

    /// Digest of what is in effect.
    pub fn digest(&self) -> u64 {
        self.live.digest
    }

    /// Bytes of the pages in effect, and of the table over them.
    pub fn bytes(&self) -> usize {
        self.live.bytes + self.live.table.len() * 4 + self.live.held.len() * size_of::<Option<Held>>()
    }

    pub(crate) fn find(&self, tag: u8, key: &[u8]) -> Option<&[u8]> {
        let hash = hash::key(tag, key);
        page::find(self.live.page(hash)?, hash, tag, key)
    }
}
