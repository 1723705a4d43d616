//! A compiled snapshot, read in place: pages as they came off the wire, and a table that finds the page of a hash.
//!
//! An update is staged page by page and takes effect as a whole or not at all. Its cost follows the pages that changed,
//! so a worker is never held up by the size of the registry. A small update changes the table when it takes effect; a
//! large one has a table of its own, which each page enters as it comes, so that the end is an exchange of the tables.

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

/// An update of more pages than this has a table of its own.
const LARGE: usize = 128;
/// Pages no longer needed are freed so many at a time, with each piece of a replaced snapshot.
const FREED: usize = 256;

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

/// The table over the pages of one snapshot.
#[derive(Debug, Default, Clone)]
struct Table {
    /// For each value of the first `depth` bits of a hash.
    entries: Vec<Entry>,
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

impl Table {
    /// The entries of the table that a page fills, if it is not deeper.
    fn range(&self, id: u32) -> Option<std::ops::Range<usize>> {
        let width = 1usize << self.depth.checked_sub(id.ilog2())?;
        let start = (id as usize - (1usize << id.ilog2())) * width;
        Some(start..start + width)
    }

    /// The entry of the table above a deep page.
    fn above(&mut self, start: u32) -> Option<&mut Entry> {
        self.entries.get_mut((start >> (MAX_DEPTH - self.depth)) as usize)
    }

    fn deepen(&mut self, blocks: &Blocks) {
        let halves = |entry: &Entry| if *entry == Entry::DEEP { [Entry::NONE; 2] } else { [*entry; 2] };
        self.entries = self.entries.iter().flat_map(halves).collect();
        self.depth += 1;
        let depth = self.depth;
        let deep = std::mem::take(&mut self.deep);
        for (start, (id, at)) in deep {
            let fits = id.ilog2() == depth;
            let entry = if fits { Entry::new(at, blocks.page(at).unwrap_or_default()) } else { Entry::DEEP };
            if let Some(place) = self.above(start) {
                *place = entry;
            }
            if !fits {
                self.deep.insert(start, (id, at));
            }
        }
    }

    /// Takes a page out of the table.
    fn unlink(&mut self, blocks: &Blocks, id: u32) -> Option<Staged> {
        if id == 0 || id.ilog2() > MAX_DEPTH {
            return None;
        }
        let (start, width) = places(id);
        let range = self.range(id);
        let entry = match &range {
            Some(range) => *self.entries.get(range.start)?,
            None => {
                let (_, at) = *self.deep.get(&start).filter(|(deep, _)| *deep == id)?;
                Entry::new(at, blocks.page(at)?)
            }
        };
        if blocks.id(entry.at)? != id {
            return None;
        }
        let digest = page::stated(blocks.page(entry.at)?);
        if let Some(range) = range {
            self.entries.get_mut(range)?.fill(Entry::NONE);
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
    fn link(&mut self, blocks: &Blocks, page: &Staged) -> Result<(), FormatError> {
        let id = page.id;
        let overlap = FormatError::Cover { id };
        if self.entries.is_empty() {
            self.entries = vec![Entry::NONE];
        }
        let (start, width) = places(id);
        match self.range(id) {
            Some(range) => {
                let entries = self.entries.get_mut(range).ok_or(overlap.clone())?;
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
                if self.deep.len() > self.entries.len() / SHARE {
                    self.deepen(blocks);
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
    fn page<'p>(&self, blocks: &'p Blocks, hash: u64) -> Option<&'p [u8]> {
        let entry = self.entries.get(hash.checked_shr(64 - self.depth).unwrap_or(0) as usize)?;
        if !entry.may_hold(hash) {
            return None;
        }
        match entry.at {
            DEEP => {
                let start = (hash >> (64 - MAX_DEPTH)) as u32;
                let (_, (_, at)) = self.deep.range(..=start).next_back()?;
                blocks.page(*at)
            }
            at => blocks.page(at),
        }
    }

    /// Where each page is.
    fn places(&self) -> impl Iterator<Item = u32> {
        let mut last = NONE;
        let shallow = self.entries.iter().map(|entry| entry.at).filter(move |at| {
            let new = *at != last && *at < DEEP;
            last = *at;
            new
        });
        shallow.chain(self.deep.values().map(|(_, at)| *at))
    }

    /// Do the pages cover everything, and are they those of this digest?
    fn complete(&self, expected: u64) -> Result<(), FormatError> {
        if self.covered != 1 << MAX_DEPTH {
            let at = self.entries.iter().position(|e| e.at == NONE).unwrap_or(0);
            return Err(FormatError::Cover { id: (1 << self.depth) + at as u32 });
        }
        if self.digest != expected {
            return Err(FormatError::Digest { got: self.digest, expected });
        }
        Ok(())
    }
}

/// Pages of one snapshot and the table over them.
#[derive(Debug, Default)]
struct Pages {
    blocks: Blocks,
    table: Table,
}

/// An update to the live pages. Their bytes lie in the live blocks already.
#[derive(Debug, Default)]
struct Patch {
    /// Pages that come, each in place of the one of its id.
    added: Vec<Staged>,
    /// Ids of pages that go.
    dropped: Vec<u32>,
    /// The table of a large update; what it shows is what there will be.
    ahead: Option<Table>,
    /// Where the pages are that `ahead` shows no more.
    leaving: Vec<u32>,
}

impl Patch {
    /// Enters a page into the table of a large update.
    fn enter(table: &mut Table, leaving: &mut Vec<u32>, blocks: &Blocks, page: &Staged) -> Result<(), FormatError> {
        leaving.extend(table.unlink(blocks, page.id).map(|old| old.entry.at));
        table.link(blocks, page)
    }

    /// A page comes.
    fn add(&mut self, live: &Pages, page: Staged) -> Result<(), FormatError> {
        let entered = match &mut self.ahead {
            Some(table) => Self::enter(table, &mut self.leaving, &live.blocks, &page),
            None => Ok(()),
        };
        self.added.push(page);
        entered?;
        self.grown(live)
    }

    /// A page goes.
    fn drop(&mut self, live: &Pages, id: u32) -> Result<(), FormatError> {
        match &mut self.ahead {
            Some(table) => self.leaving.extend(table.unlink(&live.blocks, id).map(|old| old.entry.at)),
            None => self.dropped.push(id),
        }
        self.grown(live)
    }

    /// Gives the update a table of its own, when it is large.
    fn grown(&mut self, live: &Pages) -> Result<(), FormatError> {
        if self.ahead.is_some() || self.added.len() + self.dropped.len() <= LARGE {
            return Ok(());
        }
        let table = self.ahead.insert(live.table.clone());
        for id in self.dropped.drain(..) {
            self.leaving.extend(table.unlink(&live.blocks, id).map(|old| old.entry.at));
        }
        let mut pages = self.added.iter();
        pages.try_for_each(|page| Self::enter(table, &mut self.leaving, &live.blocks, page))
    }

    /// Puts the update into effect, or leaves what was. Gives where the pages are that are no longer needed.
    fn apply(self, live: &mut Pages, digest: u64) -> (Vec<u32>, Result<(), FormatError>) {
        let places = |pages: &[Staged]| pages.iter().map(|page| page.entry.at).collect();
        if let Some(table) = self.ahead {
            let complete = table.complete(digest);
            if complete.is_err() {
                return (places(&self.added), complete);
            }
            live.table = table;
            return (self.leaving, Ok(()));
        }
        let Pages { blocks, table } = live;
        let leaving = self.dropped.into_iter().chain(self.added.iter().map(|page| page.id));
        let removed: Vec<Staged> = leaving.filter_map(|id| table.unlink(blocks, id)).collect();
        let mut linked = 0;
        let result = self.added.iter().try_for_each(|page| {
            table.link(blocks, page)?;
            linked += 1;
            Ok(())
        });
        let result = result.and_then(|()| table.complete(digest));
        if result.is_ok() {
            return (places(&removed), result);
        }
        for page in self.added.iter().take(linked) {
            table.unlink(blocks, page.id);
        }
        let restored = removed.iter().try_for_each(|page| table.link(blocks, page));
        (places(&self.added), restored.and(result))
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
    patch: Patch,
    broken: Option<FormatError>,
    /// Where pages are that are no longer needed, to be freed some at a time.
    useless: Vec<u32>,
    /// A snapshot no longer needed, likewise.
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
        let patch = std::mem::take(&mut self.patch);
        self.useless.extend(patch.added.iter().map(|page| page.entry.at));
        self.broken = None;
    }

    /// Checks a page and adds it to the update, in place of the page of this id if there is one. Pages that go with
    /// [`Snapshot::unstage`] go before any comes. After an error the update cannot be committed.
    pub fn stage(&mut self, id: u32, bytes: Vec<u8>) -> Result<(), FormatError> {
        let staged = page::check(id, &bytes).and_then(|digest| {
            // What can be done now is not left for the end, when all pages take effect at once.
            let place = |blocks: &mut Blocks| Staged { id, digest, entry: Entry::new(blocks.put(id, &bytes), &bytes) };
            match &mut self.fresh {
                Some(pages) => {
                    let page = place(&mut pages.blocks);
                    pages.table.link(&pages.blocks, &page)
                }
                None => {
                    let page = place(&mut self.live.blocks);
                    self.patch.add(&self.live, page)
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
        if self.fresh.is_none()
            && let Err(error) = self.patch.drop(&self.live, id)
        {
            self.broken = Some(error);
        }
    }

    /// Puts the update into effect, if the result is the snapshot of this digest; else leaves what was and forgets
    /// the update.
    pub fn commit(&mut self, digest: u64) -> Result<(), FormatError> {
        let result = match self.broken.take() {
            Some(error) => Err(error),
            None => match self.fresh.take() {
                Some(pages) => pages.table.complete(digest).map(|()| {
                    let old = std::mem::replace(&mut self.live, pages);
                    self.retired = old.blocks;
                    // They were places in what is freed as a whole.
                    self.useless.clear();
                }),
                None => {
                    let (useless, result) = std::mem::take(&mut self.patch).apply(&mut self.live, digest);
                    self.useless.extend(useless);
                    result
                }
            },
        };
        self.abandon();
        if result.is_ok() {
            let value = |tag| self.find(tag, &[]).map(|(_, value)| value);
            self.summary = Summary::open(value(TAG_SUMMARY), value(TAG_GLOBALS));
        }
        result
    }

    /// Frees at most `n` pieces (of 256 KiB) of a snapshot that was replaced, or as much of pages that were. True: there
    /// are more.
    pub fn retire_some(&mut self, n: usize) -> bool {
        let kept = self.useless.len().saturating_sub(n.saturating_mul(FREED));
        self.useless.drain(kept..).for_each(|at| self.live.blocks.free(at));
        if self.useless.is_empty() {
            self.useless = Vec::new();
        }
        self.retired.shrink(n);
        self.is_retiring()
    }

    /// Is there anything that [`Snapshot::retire_some`] would free?
    pub fn is_retiring(&self) -> bool {
        !self.retired.is_empty() || !self.useless.is_empty()
    }

    /// The pages held, for a subscription to resume with: 12 bytes each, id then digest, little endian.
    pub fn held(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.live.table.count * 12);
        for at in self.live.table.places() {
            if let (Some(id), Some(page)) = (self.live.blocks.id(at), self.live.blocks.page(at)) {
                out.extend_from_slice(&id.to_le_bytes());
                out.extend_from_slice(&page::stated(page).to_le_bytes());
            }
        }
        out
    }

    /// True until the first update has taken effect.
    pub fn is_empty(&self) -> bool {
        self.live.table.entries.is_empty()
    }

    /// Digest of what is in effect.
    pub fn digest(&self) -> u64 {
        self.live.table.digest
    }

    /// Bytes that the pages in effect take, and the table over them.
    pub fn bytes(&self) -> usize {
        self.live.blocks.used() + self.live.table.entries.len() * size_of::<Entry>() + self.live.table.deep.len() * 16
    }

    pub(crate) fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The key as the snapshot holds it, and its value.
    #[inline]
    pub(crate) fn find(&self, tag: u8, key: &[u8]) -> Option<(&[u8], &[u8])> {
        let hash = hash::key(tag, key);
        page::find(self.live.table.page(&self.live.blocks, hash)?, hash, tag, key)
    }
}
