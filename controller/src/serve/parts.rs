//! An update in parts, each made when it is to be sent.

use std::collections::VecDeque;
use std::sync::Arc;

use portolan_proto::v1::{Page, WatchResponse};
use portolan_registry::write::PageId;

use crate::publish::Published;

/// Bytes of pages in one part, so that no subscriber has much to do at a time.
const BYTES: usize = 32 * 1024;

/// Ids of pages that go, in one part.
const IDS: usize = 2048;

/// What is left of an update.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// What there will be; `None`: the last part was taken.
    to: Option<Arc<Published>>,
    removed: Vec<PageId>,
    /// Which of its pages are to be sent.
    pages: VecDeque<u32>,
}

impl Parts {
    /// An update of one part at least, by which these pages go, and these come of what is published, by their place in it.
    pub(super) fn new(to: Arc<Published>, removed: Vec<PageId>, pages: VecDeque<u32>) -> Self {
        Parts { to: Some(to), removed, pages }
    }

    /// Was the last part taken?
    pub(super) fn is_empty(&self) -> bool {
        self.to.is_none()
    }
}

/// What goes comes before what comes: a page of the trie may stand where its parent or its children stood.
impl Iterator for Parts {
    type Item = WatchResponse;

    fn next(&mut self) -> Option<WatchResponse> {
        let to = self.to.clone()?;
        let mut part = WatchResponse { version: to.version, ..WatchResponse::default() };
        part.removed = self.removed.split_off(self.removed.len().saturating_sub(IDS));
        let mut size = part.removed.len() * size_of::<PageId>();
        while self.removed.is_empty()
            && let Some(page) = self.pages.front().and_then(|at| to.pages.get(*at as usize))
            && (size == 0 || size + page.data.len() <= BYTES)
        {
            size += page.data.len();
            part.pages.push(Page { id: page.id, data: page.data.to_vec() });
            self.pages.pop_front();
        }
        if self.removed.is_empty() && self.pages.is_empty() {
            *self = Parts::default();
            (part.last, part.digest) = (true, to.digest);
        }
        Some(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish;

    fn published(pages: u32, size: usize) -> Arc<Published> {
        let page = |id| publish::Page { id, data: vec![0; size].into(), digest: 0 };
        Arc::new(Published { version: 7, digest: 9, pages: (0..pages).map(page).collect(), ..Published::default() })
    }

    #[test]
    fn an_update_with_nothing_in_it_is_one_part() {
        let parts: Vec<_> = Parts::new(published(3, 10), vec![], VecDeque::new()).collect();
        assert_eq!(parts, [WatchResponse { version: 7, last: true, digest: 9, ..WatchResponse::default() }]);
    }

    #[test]
    fn every_page_is_sent_once_and_every_id_that_goes_before() {
        for (pages, size) in [(100, 1000), (5, BYTES), (5, BYTES + 1), (1, 0)] {
            let gone: Vec<PageId> = (1000..1000 + 2 * IDS as u32).collect();
            let parts: Vec<_> = Parts::new(published(pages, size), gone.clone(), (0..pages).collect()).collect();
            let ids: Vec<u32> = parts.iter().flat_map(|part| part.pages.iter().map(|page| page.id)).collect();
            assert_eq!(ids, (0..pages).collect::<Vec<_>>());
            let mut removed: Vec<PageId> = parts.iter().flat_map(|part| part.removed.clone()).collect();
            removed.sort_unstable();
            assert_eq!(removed, gone);
            let last_gone = parts.iter().rposition(|part| !part.removed.is_empty()).unwrap();
            let first_page = parts.iter().position(|part| !part.pages.is_empty()).unwrap();
            assert!(last_gone <= first_page, "{last_gone} {first_page}");
            let bytes = |part: &WatchResponse| part.pages.iter().map(|page| page.data.len()).sum::<usize>();
            assert!(parts.iter().all(|part| part.pages.len() == 1 || bytes(part) <= BYTES));
            assert_eq!(parts.iter().filter(|part| part.last).count(), 1);
            assert!(parts.last().is_some_and(|part| part.last && part.digest == 9));
        }
    }
}
