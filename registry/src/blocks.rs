//! Room for pages: chunks that never move, so that a page costs no allocation of its own and a lookup no extra step.

const CHUNK: usize = 256 * 1024;
/// Pages begin at multiples of this; the id and length of each stand before it.
const UNIT: usize = 16;
const UNITS: u32 = (CHUNK / UNIT) as u32;

/// Chunks and what is free in them. A place is a number of [`UNIT`]s, counted over all chunks.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    chunks: Vec<Box<[u8]>>,
    /// The first place that was never used.
    end: u32,
    /// Places to use again, by their size in units.
    free: std::collections::BTreeMap<u32, Vec<u32>>,
    units: usize,
}

fn units(len: usize) -> u32 {
    (8 + len).div_ceil(UNIT) as u32
}

impl Blocks {
    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        self.units * UNIT
    }

    pub(crate) fn put(&mut self, id: u32, page: &[u8]) -> u32 {
        let need = units(page.len());
        self.units += need as usize;
        let at = self.reuse(need).unwrap_or_else(|| self.append(need));
        if let Some(room) = self.room(at).and_then(|r| r.get_mut(..8 + page.len())) {
            let (head, body) = room.split_at_mut(8);
            let (first, second) = head.split_at_mut(4);
            first.copy_from_slice(&id.to_le_bytes());
            second.copy_from_slice(&(page.len() as u32).to_le_bytes());
            body.copy_from_slice(page);
        }
        at
    }

    fn reuse(&mut self, need: u32) -> Option<u32> {
        // A little larger will do; the rest stays free.
        let (&size, places) = self.free.range_mut(need..).next()?;
        let at = places.pop()?;
        if places.is_empty() {
            self.free.remove(&size);
        }
        if size > need {
            self.free.entry(size - need).or_default().push(at + need);
        }
        Some(at)
    }

    fn append(&mut self, need: u32) -> u32 {
        let left = UNITS - self.end % UNITS;
        if need > left {
            self.free.entry(left).or_default().push(self.end);
            self.end += left;
        }
        let at = self.end;
        self.end += need;
        while self.chunks.len() < self.end.div_ceil(UNITS) as usize {
            self.chunks.push(vec![0; CHUNK].into_boxed_slice());
        }
        at
    }

    pub(crate) fn free(&mut self, at: u32) {
        if let Some(page) = self.page(at) {
            let size = units(page.len());
            self.units -= size as usize;
            self.free.entry(size).or_default().push(at);
        }
    }

    fn room(&mut self, at: u32) -> Option<&mut [u8]> {
        self.chunks.get_mut((at / UNITS) as usize)?.get_mut((at % UNITS) as usize * UNIT..)
    }

    fn block(&self, at: u32) -> Option<&[u8]> {
        self.chunks.get((at / UNITS) as usize)?.get((at % UNITS) as usize * UNIT..)
    }

    pub(crate) fn id(&self, at: u32) -> Option<u32> {
        self.block(at)?.first_chunk::<4>().map(|b| u32::from_le_bytes(*b))
    }

    pub(crate) fn page(&self, at: u32) -> Option<&[u8]> {
        let block = self.block(at)?;
        let len = u32::from_le_bytes(*block.get(4..)?.first_chunk::<4>()?);
        block.get(8..8 + len as usize)
    }

    /// Frees up to `n` chunks of what nobody reads any more.
    pub(crate) fn shrink(&mut self, n: usize) {
        self.chunks.truncate(self.chunks.len().saturating_sub(n));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }
}
