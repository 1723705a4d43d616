//! A compiled snapshot, read in place: pages as they came off the wire, and a table that finds the page of a hash.
//!
//! An update is staged page by page and takes effect as a whole or not at all. Its cost follows the pages that changed,
//! so a worker is never held up by the size of the registry.

use std::collections::BTreeMap;

use crate::blocks::Blocks;
use crate::encode::{Summary, TAG_GLOBALS, TAG_SUMMARY};
use crate::hash;
use crate::page::{self, MAX_DEPTH};

pub use crate::page::{FORMAT, FormatError};

/// No page.
const NONE: u32 = u32::MAX;
/// Pages that are deeper than the table.
const DEEP: u32 = u32::MAX - 1;
/// The table is made deeper when there is more than one deep page for so many of its entries. Pages are of nearly one
/// depth; a table as deep as the deepest of them would be many times as large.
const SHARE: usize = 32;

/// A page on its way in or out: its bytes lie in their place, and the table does not show it.
#[derive(Debug)]
struct Staged {
    id: u32,
    digest: u64,
    entry: Entry,
}

/// An entry of the table: where a page is, and two bits for each of its rows, so that most keys that are in no page are
/// known from the table alone. In three words, to take no more room than they need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    at: u32,
    rows: [u32; 2],
}

impl Entry {
    const NONE: Entry = Entry { at: NONE, rows: [0; 2] };
    const DEEP: Entry = Entry { at: DEEP, rows: [u32::MAX; 2] };

    fn new(at: u32, page: &[u8]) -> Self {
        let bits = page::all_row_bits(page);
        Entry { at, rows: [bits as u32, (bits >> 32) as u32] }
    }

    /// May the page hold a key of this hash?
    fn may_hold(&self, hash: u64) -> bool {
        let [low, high] = self.rows;
        let bits = page::row_bits(hash);
        bits & (u64::from(low) | u64::from(high) << 32) == bits
    }
}

/// Pages of one snapshot and the table over them.
#[derive(Debug, Default)]
struct Pages {
    blocks: Blocks,
    /// For each value of the first `depth` bits of a hash.
    table: Vec<Entry>,
    depth: u32,
    /// Pages deeper than the table, by the first place they cover: where in `blocks`.
    deep: BTreeMap<u32, (u32, u32)>,
    /// How much is covered, in places.
    covered: u32,
    digest: u64,
    count: usize,
}

/// The first of the places that a page covers, and how many; there are 2 to the power of [`MAX_DEPTH`].
fn places(id: u32) -> (u32, u32) {
    let depth = id.ilog2();
    let width = 1 << (MAX_DEPTH - depth);
    ((id - (1 << depth)) * width, width)
}

impl Pages {
    /// The entries of the table that a page fills, if it is not deeper.
    fn range(&self, id: u32) -> Option<std::ops::Range<usize>> {
        let width = 1usize << self.depth.checked_sub(id.ilog2())?;
        let start = (id as usize - (1usize << id.ilog2())) * width;
        Some(start..start + width)
    }

    /// The entry of the table above a deep page.
    fn above(&mut self, start: u32) -> Option<&mut Entry> {
        self.table.get_mut((start >> (MAX_DEPTH - self.depth)) as usize)
    }

    fn deepen(&mut self) {
        let halves = |entry: &Entry| if *entry == Entry::DEEP { [Entry::NONE; 2] } else { [*entry; 2] };
        self.table = self.table.iter().flat_map(halves).collect();
        self.depth += 1;
        let depth = self.depth;
        let deep = std::mem::take(&mut self.deep);
        for (start, (id, at)) in deep {
            let fits = id.ilog2() == depth;
            let entry = if fits { Entry::new(at, self.blocks.page(at).unwrap_or_default()) } else { Entry::DEEP };
            if let Some(place) = self.above(start) {
                *place = entry;
            }
            if !fits {
                self.deep.insert(start, (id, at));
            }
        }
    }

    /// Gives a page its place.
    fn put(&mut self, id: u32, digest: u64, bytes: &[u8]) -> Staged {
        Staged { id, digest, entry: Entry::new(self.blocks.put(id, bytes), bytes) }
    }

    fn free(&mut self, page: &Staged) {
        self.blocks.free(page.entry.at);
    }

    /// Takes a page out of the table.
    fn unlink(&mut self, id: u32) -> Option<Staged> {
        if id == 0 || id.ilog2() > MAX_DEPTH {
            return None;
        }
        let (start, width) = places(id);
        let range = self.range(id);
        let at = match &range {
            Some(range) => self.table.get(range.start)?.at,
            None => self.deep.get(&start).filter(|(deep, _)| *deep == id)?.1,
        };
        if self.blocks.id(at)? != id {
            return None;
        }
        let page = self.blocks.page(at)?;
        let (digest, entry) = (page::stated(page), Entry::new(at, page));
        if let Some(range) = range {
            self.table.get_mut(range)?.fill(Entry::NONE);
        } else {
            self.deep.remove(&start);
            let shift = MAX_DEPTH - self.depth;
            let first = start >> shift << shift;
            if self.deep.range(first..first + (1 << shift)).next().is_none() {
                *self.above(start)? = Entry::NONE;
            }
        }
        self.digest = self.digest.wrapping_sub(hash::contribution(id, digest));
        self.covered -= width;
        self.count -= 1;
        Some(Staged { id, digest, entry })
    }

    /// Has the table show a page.
    fn link(&mut self, page: &Staged) -> Result<(), FormatError> {
        let id = page.id;
        let overlap = FormatError::Cover { id };
        if self.table.is_empty() {
            self.table = vec![Entry::NONE];
        }
        let (start, width) = places(id);
        match self.range(id) {
            Some(range) => {
                let entries = self.table.get_mut(range).ok_or(overlap.clone())?;
                if entries.iter().any(|e| e.at != NONE) {
                    return Err(overlap);
                }
                entries.fill(page.entry);
            }
            None => {
                let before = self.deep.range(..=start).next_back().map(|(at, (id, _))| at + places(*id).1);
                let after = self.deep.range(start..).next().map(|(at, _)| *at);
                let entry = self.above(start).ok_or(overlap.clone())?;
                if entry.at < DEEP
                    || before.is_some_and(|end| end > start)
                    || after.is_some_and(|at| at < start + width)
                {
                    return Err(overlap);
                }
                *entry = Entry::DEEP;
                self.deep.insert(start, (id, page.entry.at));
                if self.deep.len() > self.table.len() / SHARE {
                    self.deepen();
                }
            }
        }
        self.digest = self.digest.wrapping_add(hash::contribution(id, page.digest));
        self.covered += width;
        self.count += 1;
        Ok(())
    }

    /// The page that holds a key of this hash, if any does.
    #[inline]
    fn page(&self, hash: u64) -> Option<&[u8]> {
        let entry = self.table.get(hash.checked_shr(64 - self.depth).unwrap_or(0) as usize)?;
        if !entry.may_hold(hash) {
            return None;
        }
        match entry.at {
            DEEP => {
                let start = (hash >> (64 - MAX_DEPTH)) as u32;
                let (_, (_, at)) = self.deep.range(..=start).next_back()?;
                self.blocks.page(*at)
            }
            at => self.blocks.page(at),
        }
    }

    /// Where each page is.
    fn places(&self) -> impl Iterator<Item = u32> {
        let mut last = NONE;
        let shallow = self.table.iter().map(|entry| entry.at).filter(move |at| {
            let new = *at != last && *at < DEEP;
            last = *at;
            new
        });
        shallow.chain(self.deep.values().map(|(_, at)| *at))
    }

    fn complete(&self, expected: u64) -> Result<(), FormatError> {
        if self.covered != 1 << MAX_DEPTH {
            let at = self.table.iter().position(|e| e.at == NONE).unwrap_or(0);
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
        for page in std::mem::take(&mut self.staged) {
            self.live.free(&page);
        }
        self.dropped.clear();
        self.broken = None;
    }

    /// Checks a page and adds it to the update, in place of the page of this id if there is one. After an error the
    /// update cannot be committed.
    pub fn stage(&mut self, id: u32, bytes: Vec<u8>) -> Result<(), FormatError> {
        let staged = page::check(id, &bytes).and_then(|digest| match &mut self.fresh {
            Some(pages) => {
                let page = pages.put(id, digest, &bytes);
                pages.link(&page)
            }
            None => {
                // What can be done now is not left for the end, when all pages take effect at once.
                self.staged.push(self.live.put(id, digest, &bytes));
                Ok(())
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
        let removed: Vec<Staged> = leaving.filter_map(|id| self.live.unlink(id)).collect();
        let mut linked = 0;
        let result = added.iter().try_for_each(|page| {
            self.live.link(page)?;
            linked += 1;
            Ok(())
        });
        let result = result.and_then(|()| self.live.complete(digest));
        if result.is_err() {
            for page in added.iter().take(linked) {
                self.live.unlink(page.id);
            }
            removed.iter().try_for_each(|page| self.live.link(page))?;
        }
        let useless = if result.is_ok() { &removed } else { &added };
        useless.iter().for_each(|page| self.live.free(page));
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
        self.live.blocks.used() + self.live.table.len() * size_of::<Entry>() + self.live.deep.len() * 16
    }

    pub(crate) fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The key as the snapshot holds it, and its value.
    #[inline]
    pub(crate) fn find(&self, tag: u8, key: &[u8]) -> Option<(&[u8], &[u8])> {
        let hash = hash::key(tag, key);
        page::find(self.live.page(hash)?, hash, tag, key)
    }
}
