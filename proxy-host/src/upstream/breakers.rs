//! Envoy's circuit breakers: what may be going on at a time, counted over all workers. Nothing is counted where nothing is
//! limited.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use super::{health::Shared, options::Limits};

/// What is going on.
#[derive(Debug, Default)]
pub struct Usage {
    connections: AtomicU32,
    pending: AtomicU32,
    requests: AtomicU32,
    retries: AtomicU32,
}

/// There is as much as there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overflow;

/// Counts for as long as it lives.
#[derive(Debug)]
pub struct Taken(Arc<Usage>, fn(&Usage) -> &AtomicU32);

impl Drop for Taken {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Relaxed);
    }
}

impl Shared {
    fn take(&self, which: fn(&Usage) -> &AtomicU32, limit: Option<u32>) -> Result<Option<Taken>, Overflow> {
        let Some(limit) = limit else { return Ok(None) };
        let more = |count: u32| (count < limit).then(|| count + 1);
        match which(self.usage()).try_update(Relaxed, Relaxed, more) {
            Ok(_) => Ok(Some(Taken(self.usage().clone(), which))),
            Err(_) => Err(Overflow),
        }
    }

    /// One more connection; `first`: the first of an endpoint on this worker, which is always allowed.
    ///
    /// # Errors
    /// There are too many.
    pub fn connection(&self, limits: &Limits, first: bool) -> Result<Option<Taken>, Overflow> {
        let limit = limits.connections.map(|limit| if first { u32::MAX } else { limit });
        self.take(|usage| &usage.connections, limit)
    }

    /// One more request that waits for a connection.
    ///
    /// # Errors
    /// There are too many.
    pub fn waiting(&self, limits: &Limits) -> Result<Option<Taken>, Overflow> {
        self.take(|usage| &usage.pending, limits.pending)
    }

    /// One more request.
    ///
    /// # Errors
    /// There are too many.
    pub fn request(&self, limits: &Limits) -> Result<Option<Taken>, Overflow> {
        let counted = limits.retry_budget.map(|_| u32::MAX);
        self.take(|usage| &usage.requests, limits.requests.or(counted))
    }

    /// One more retry.
    ///
    /// # Errors
    /// There are too many.
    pub fn retry(&self, limits: &Limits) -> Result<Option<Taken>, Overflow> {
        let budget = limits.retry_budget.map(|(share, least)| {
            let requests = u64::from(self.usage().requests.load(Relaxed)) * u64::from(share) / 100;
            u32::try_from(requests).unwrap_or(u32::MAX).max(least)
        });
        self.take(|usage| &usage.retries, budget.or(limits.retries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_limited_is_counted_while_it_lives() {
        let shared = Shared::default();
        let limits = Limits { requests: Some(2), connections: Some(1), ..Limits::default() };
        let taken: Vec<_> = (0..2).map(|_| shared.request(&limits).unwrap()).collect();
        assert!(matches!(shared.request(&limits), Err(Overflow)));
        drop(taken);
        assert!(shared.request(&limits).is_ok_and(|taken| taken.is_some()));
        let _one = shared.connection(&limits, false).unwrap();
        assert!(matches!(shared.connection(&limits, false), Err(Overflow)));
        assert!(shared.connection(&limits, true).is_ok());
        assert!(shared.waiting(&limits).is_ok_and(|taken| taken.is_none()), "not limited, not counted");
    }

    #[test]
    fn a_retry_budget_follows_the_requests() {
        let shared = Shared::default();
        let limits = Limits { retry_budget: Some((20, 1)), ..Limits::default() };
        let _requests: Vec<_> = (0..10).map(|_| shared.request(&limits).unwrap()).collect();
        let _retries: Vec<_> = (0..2).map(|_| shared.retry(&limits).unwrap()).collect();
        assert!(matches!(shared.retry(&limits), Err(Overflow)));
    }
}
