//! A compiled snapshot, read in place: pages as they came off the wire, and a table that finds the page of a hash.
//!
//! An update is staged page by page and takes effect as a whole or not at all. Its cost follows the pages that changed,
//! so a worker is never held up by the size of the registry.

use crate::blocks::Blocks;
use crate::encode::{Summary, TAG_GLOBALS, TAG_SUMMARY};
use crate::hash;
use crate::page;

pub use crate::page::{FORMAT, FormatError};

const NONE: u32 = u32::MAX;

/// A page on its way in.
#[derive(Debug)]
struct Staged {
    id: u32,
    digest: u64,
    bytes: Vec<u8>,
}

/// Pages of one snapshot and the table over them.
#[derive(Debug, Default)]
struct Pages {
    blocks: Blocks,
    /// For each value of the first `depth` bits of a hash: where in `blocks`.
    table: Vec<u32>,
    depth: u32,
    /// Entries of `table` that lead nowhere.
    gaps: usize,
    digest: u64,
    count: usize,
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

    fn remove(&mut self, id: u32) -> Option<Staged> {
        if id == 0 || self.table.is_empty() || id.ilog2() > self.depth {
            return None;
        }
        let range = self.range(id);
        let at = *self.table.get(range.start)?;
        if self.blocks.id(at)? != id {
            return None;
        }
        let bytes = self.blocks.page(at)?.to_vec();
        self.blocks.free(at);
        let entries = self.table.get_mut(range)?;
        self.gaps += entries.len();
        entries.fill(NONE);
        let digest = page::stated(&bytes);
        self.digest = self.digest.wrapping_sub(hash::contribution(id, digest));
        self.count -= 1;
        Some(Staged { id, digest, bytes })
    }

    fn insert(&mut self, staged: &Staged) -> Result<(), FormatError> {
        let id = staged.id;
        self.deepen(id.ilog2());
        let range = self.range(id);
        let entries = self.table.get_mut(range).ok_or(FormatError::Cover { id })?;
        if entries.iter().any(|e| *e != NONE) {
            return Err(FormatError::Cover { id });
        }
        entries.fill(self.blocks.put(id, &staged.bytes));
        self.gaps -= entries.len();
        self.digest = self.digest.wrapping_add(hash::contribution(id, staged.digest));
        self.count += 1;
        Ok(())
    }

    fn page(&self, hash: u64) -> Option<&[u8]> {
        let entry = hash.checked_shr(64 - self.depth).unwrap_or(0) as usize;
        self.blocks.page(*self.table.get(entry)?)
    }

    /// Where each page is, by id's place in the trie.
    fn places(&self) -> impl Iterator<Item = u32> {
        let mut last = NONE;
        self.table.iter().copied().filter(move |at| {
            let new = *at != last && *at != NONE;
            last = *at;
            new
        })
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
    /// Read from `live` once, since every lookup needs it.
    summary: Summary,
    /// A whole new snapshot, built up beside the live one.
    fresh: Option<Pages>,
    staged: Vec<Staged>,
    dropped: Vec<u32>,
    broken: Option<FormatError>,
    /// A snapshot no longer needed, to be freed a piece at a time.
    retired: Blocks,
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
            let staged = Staged { id, digest, bytes };
            match &mut self.fresh {
                Some(pages) => pages.insert(&staged),
                None => {
                    self.staged.push(staged);
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
                    self.retired = old.blocks;
                }),
                None => self.patch(digest),
            },
        };
        self.abandon();
        if result.is_ok() {
            let value = |tag| self.find(tag, &[]).map(|(_, value)| value);
            self.summary = Summary::open(value(TAG_SUMMARY), value(TAG_GLOBALS));
        }
        result
    }

    fn patch(&mut self, digest: u64) -> Result<(), FormatError> {
        let added = std::mem::take(&mut self.staged);
        let leaving = self.dropped.iter().copied().chain(added.iter().map(|s| s.id));
        let removed: Vec<Staged> = leaving.filter_map(|id| self.live.remove(id)).collect();
        let mut inserted = 0;
        let result = added.iter().try_for_each(|staged| {
            self.live.insert(staged)?;
            inserted += 1;
            Ok(())
        });
        let result = result.and_then(|()| self.live.complete(digest));
        if result.is_err() {
            for staged in added.iter().take(inserted) {
                self.live.remove(staged.id);
            }
            removed.iter().try_for_each(|staged| self.live.insert(staged))?;
        }
        result
    }

    /// Frees at most `n` pieces (of 256 KiB) of a snapshot that was replaced. True: there are more.
    pub fn retire_some(&mut self, n: usize) -> bool {
        self.retired.shrink(n)
    }

    /// The pages held, for a subscription to resume with: 12 bytes each, id then digest, little endian.
    pub fn held(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.live.count * 12);
        for at in self.live.places() {
            if let (Some(id), Some(page)) = (self.live.blocks.id(at), self.live.blocks.page(at)) {
                out.extend_from_slice(&id.to_le_bytes());
                out.extend_from_slice(&page::stated(page).to_le_bytes());
            }
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

    /// Bytes that the pages in effect take, and the table over them.
    pub fn bytes(&self) -> usize {
        self.live.blocks.used() + self.live.table.len() * 4
    }

    pub(crate) fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The key as the snapshot holds it, and its value.
    pub(crate) fn find(&self, tag: u8, key: &[u8]) -> Option<(&[u8], &[u8])> {
        let hash = hash::key(tag, key);
        page::find(self.live.page(hash)?, hash, tag, key)
    }
}
